"""What is true of given weights: measured on them with plain backpropagation, not taken from the search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.torch_kernels import dot
from .model.loss import BatchLoss
from .model.network import Network, kernel, parameter_list
from .model.objective import LooksAhead, Objective, knows_weights
from .model.problem import Problem, layer_inputs
from .model.surroundings import Surroundings

# ⟨δ, K δ⟩ below this share of ‖K‖ ‖δ‖² has lost more than three of float32's seven digits.
CANCELLED = 1e-3


@dataclass(frozen=True)
class Measurement:
    """The losses of given weights, the objective and ‖∇L‖ on the batch.

    loss: on the batch; data_loss: the same with its weight terms, if it has any, held at the model's own weights, which
    is what the action keeps; sensitivity: by how much noise in the inputs moves the logits, see `Surroundings`;
    holdout: the loss on the holdout batch; holdout_ahead: the same after the step that an objective looks ahead to,
    which the gradient on the batch makes. None is what was not measured.
    """

    loss: float
    data_loss: float
    objective: float
    gradient_norm: float
    sensitivity: float | None = None
    holdout: float | None = None
    holdout_ahead: float | None = None

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, self.data_loss, self.objective, self.gradient_norm)))


@dataclass(frozen=True)
class WeightsOnBatch:
    """Formed weights on a batch: the inputs B_l and pre-activations Y_l of the layers, δ_l, and K_0.

    loss: that of the batch. known_gram: K_0, which no weights change, where it is known.
    """

    network: Network
    loss: BatchLoss
    inputs: list[Tensor]
    outputs: Sequence[Tensor]
    deltas: list[Tensor]
    known_gram: Tensor | None

    @cached_property
    def squared_gradient_norm(self) -> Tensor:
        """‖∇L‖² = Σ_l ‖δ_lᵀ [B_l, 1]‖², on a CPU for large layers as ⟨δ_l, K_l δ_l⟩ unless that sum cancels."""
        products, gradients = self.network.products, list[Tensor]()
        total = torch.zeros((), dtype=torch.float64, device=self.deltas[0].device)
        known = [self.known_gram, *[None] * len(self.inputs[1:])]
        for batch, gram, bias, delta in zip(self.inputs, known, self.network.biases, self.deltas, strict=True):
            on_cpu = batch.device.type == "cpu"
            square = _square_through_gram(batch, gram, bias is not None, delta) if on_cpu else None
            if square is not None:
                total = total + square
                continue
            gradients.append(products.linear(delta.T, batch))
            if bias is not None:
                gradients.append(delta.sum(0))
        return total + products.dot_sum(gradients, gradients) if gradients else total

    @cached_property
    def sample_gram(self) -> Tensor:
        """K_0."""
        if self.known_gram is not None:
            return self.known_gram
        return kernel(self.inputs[0], self.inputs[0], self.network.biases[0] is not None)

    @cached_property
    def gradients(self) -> list[Tensor]:
        """∂L/∂W_l = δ_lᵀ B_l and ∂L/∂b_l = δ_lᵀ 1, in the order of the network's `parameter_list`."""
        found: list[Tensor] = []
        for batch, bias, delta in zip(self.inputs, self.network.biases, self.deltas, strict=True):
            found += [self.network.products.linear(delta.T, batch), *([] if bias is None else [delta.sum(0)])]
        return found

    def stepped(self, rate: Tensor) -> Tensor:
        """The logits of the batch after a gradient step of length `rate`, with the new weights formed."""
        pairs = zip(parameter_list(self.network), self.gradients, strict=True)
        moved = self.network.with_parameters([p - rate.to(p.dtype) * gradient for p, gradient in pairs])
        return moved.forward(self.inputs[0])[-1]

    def loss_after(self, steps: Sequence[Tensor]) -> Tensor:
        """The loss of the batch after the `steps`, as in `logits_after`: a scalar."""
        return self.loss.value(self.logits_after(steps, self.outputs[0], self.sample_gram))

    def logits_after(self, steps: Sequence[Tensor], first_output: Tensor, overlap: Tensor) -> Tensor:
        """The logits of samples Q after W_l ← W_l + s_lᵀ B_l, b_l ← b_l + Σ s_l with `steps` s_l, without forming them.

        z_l = q_l W_lᵀ + b_l + (q_l B_lᵀ + 1) s_l, q_{l+1} = σ_l(z_l), q_0 = Q; the `first_output` is Q W_0ᵀ + b_0 and
        the `overlap` Q Xᵀ + 1, with the batch X = B_0, which may be Q itself.
        """
        network = self.network
        output = network.products.linear(overlap, steps[0], source=first_output)
        behind_the_first = (network.weights[1:], network.biases[1:], self.inputs[1:], steps[1:])
        for sigma, weight, bias, batch, step in zip(network.activations, *behind_the_first, strict=True):
            hidden = sigma.forward(output)
            source = F.linear(hidden, weight, bias)
            output = network.products.linear(kernel(hidden, batch, bias is not None), step, source=source)
        return output


def measure(
    problem: Problem,
    objective: Objective,
    around: Surroundings | None,
    network: Network,
    outputs: Sequence[Tensor],
    sample_gram: Tensor | None = None,
) -> Tensor:
    """Measure `network`, whose pre-activations on the batch are `outputs`, in the place of the problem's own weights.

    sample_gram is K_0 of the problem's samples, in any precision, where it is known: no weights change it.
    The values of a `Measurement`, in its order, as one float64 tensor on the device: `read` makes numbers of it.
    """
    data_loss, output_delta = problem.loss.value_and_gradient(outputs[-1])
    logits_ahead: Tensor | None = None  # those of the holdout
    if around is not None:
        others = around.others
        other_outputs = network.forward(others.inputs, others.outputs[: network.layers_in_common(problem.network)])
    if problem.sees_logits_alone and knows_weights(objective):
        inputs = layer_inputs(network, problem.samples, outputs)
        deltas = _backpropagate(network, outputs, output_delta)
        first_kernel = None if sample_gram is None else sample_gram.to(problem.samples.dtype)
        weights = WeightsOnBatch(network, problem.loss, inputs, outputs, deltas, first_kernel)
        loss, squared = data_loss, weights.squared_gradient_norm
        value, steps = objective.measure(weights)
        if steps is not None and around is not None and around.held > 0:
            first_output, overlap = other_outputs[0][: around.held], others.overlap[: around.held]
            logits_ahead = weights.logits_after(steps, first_output, overlap)
    else:
        loss, squared, value, ahead = _measure_with_autograd(problem, objective, network)
        if around is not None and ahead is not None and around.held > 0:
            logits_ahead = network.with_parameters(ahead).forward(others.inputs[: around.held])[-1]
    values = [loss, data_loss, value, squared.sqrt()]
    if around is not None:
        values.append(around.sensitivity(other_outputs[-1], outputs[-1]))
        if around.held > 0:
            values.append(around.holdout_loss(other_outputs[-1]))
        if logits_ahead is not None:
            values.append(around.holdout_loss(logits_ahead))
    return torch.stack([value.double() for value in values])


def loss_after_steps(problem: Problem, network: Network, rate: float, steps: int) -> Tensor:
    """The loss on the batch after so many gradient steps of this rate from `network`: a float64 scalar."""
    loss_of, parameters = problem.loss_of_trainable(network), problem.leaves(network)
    for _ in range(steps):
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss_of(parameters), parameters, materialize_grads=True)
        pairs = zip(parameters, gradients, strict=True)
        parameters = [(p.detach() - rate * gradient).requires_grad_() for p, gradient in pairs]
    return loss_of(parameters).detach().double()


def read(values: Tensor) -> Measurement:
    """The numbers that `measure` took, in one transfer."""
    return Measurement(*values.tolist())


def measure_own(problem: Problem, objective: Objective) -> Measurement:
    """Measure the problem's own weights, on its batch alone."""
    samples, biased = problem.samples, problem.network.biases[0] is not None
    sample_gram = kernel(samples, samples, biased)
    return read(measure(problem, objective, None, problem.network, problem.outputs, sample_gram))


def weight_changes(before: Network, after: Network) -> Tensor:
    """‖[W', b'] − [W, b]‖_F / ‖[W, b]‖_F of every weight layer, and behind them that of all: float64.

    It is 0 where nothing has changed, infinite from 0 to anything else, and not finite where a new weight is not.
    """
    changes = torch.stack([_square_sums(*pair) for pair in zip(_layers(before), _layers(after), strict=True)])
    changed, whole = torch.cat([changes, changes.sum(0, keepdim=True)]).sqrt().unbind(1)
    return torch.where(changed == 0, changed, changed / whole)


def _layers(network: Network) -> list[list[Tensor]]:
    pairs = zip(network.weights, network.biases, strict=True)
    return [[tensor for tensor in pair if tensor is not None] for pair in pairs]


def _square_sums(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Σ (θ' − θ)² and Σ θ² over the tensors of one layer: float64, of two elements."""
    differences = [new - old for old, new in zip(before, after, strict=True) if new is not old]
    changes = [dot(difference, difference) for difference in differences]
    whole = torch.stack([dot(old, old) for old in before]).sum()
    return torch.stack([torch.stack(changes).sum() if changes else torch.zeros_like(whole), whole])


def _backpropagate(network: Network, outputs: Sequence[Tensor], output_delta: Tensor) -> list[Tensor]:
    """δ_l = ∂L/∂Y_l of every layer, δ_{l−1} = (δ_l W_l) ⊙ σ'(Y_{l−1})."""
    deltas = [output_delta]
    behind_the_first = (network.weights[:0:-1], network.activations[::-1], outputs[-2::-1])
    for weight, sigma, before in zip(*behind_the_first, strict=True):
        deltas.append(sigma.pull_back(deltas[-1] @ weight, before))
    return deltas[::-1]


def _square_through_gram(batch: Tensor, known: Tensor | None, bias: bool, delta: Tensor) -> Tensor | None:
    """⟨δ, K δ⟩, or None where the gradient itself is the smaller matrix or the sum cancels; `known` is K if it is."""
    (n, columns), rows = batch.shape, delta.shape[1]
    if columns * rows <= n * (columns + rows):
        return None
    gram_matrix = kernel(batch, batch, bias) if known is None else known
    square = dot(delta, gram_matrix @ delta)
    trusted = CANCELLED * dot(gram_matrix, gram_matrix).sqrt() * dot(delta, delta)
    return square if bool(square > trusted) else None


def _measure_with_autograd(
    problem: Problem, objective: Objective, network: Network
) -> tuple[Tensor, Tensor, Tensor, list[Tensor] | None]:
    """Loss, ‖∇L‖² and objective of any loss of the parameters and any objective, and where it looks ahead to."""
    loss_of = problem.loss_of_trainable(network)
    with torch.enable_grad():
        parameters = problem.leaves(network)
        loss = loss_of(parameters)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        ahead = objective.ahead(loss_of, parameters) if isinstance(objective, LooksAhead) else None
        value = objective.value(loss_of, parameters) if ahead is None else loss_of(ahead)
    squares = [dot(gradient, gradient) for gradient in gradients if gradient is not None]
    whole = None if ahead is None else [tensor.detach() for tensor in problem.merge(network, ahead)]
    return loss.detach(), torch.stack(squares).sum(), value.detach(), whole


def relative_change(before: float, after: float) -> float:
    """|after − before| / |before|; from 0 to anything else it is infinite."""
    if after == before:
        return 0.0
    return abs(after - before) / abs(before) if before != 0 else math.inf
