"""Standardised pre-activations: a point of the orbit in closed form, by one pass over the layers and without a search.

For the hidden layers in turn, with B the layer's new input (n×d, one row a sample):

    Y = B Wᵀ + b,   μ = the mean of each column of Y,   s² = the mean of all (Y − μ)²,   c = τ/s
    W ← c W,   b ← c (b − μ) + m,   B ← σ(c (Y − μ) + m)

τ belongs to the activation (`Activation.spread`), and m = 0 unless it is shifted. Without bias μ = m = 0. What the
layers behind make of their new inputs is mended by a refit:

* "all": each layer behind a changed one is fitted to its old pre-activations T on the new input by ridge regression,

      V, v = argmin ‖T − B Vᵀ − 1vᵀ‖² + λ ‖V‖²   (without bias v = 0),

  and standardised after that if it is hidden. The function is kept approximately, on all data that is like the batch.
* "last": the hidden layers take their new inputs as they are, and the output layer absorbs all: the least change of it
  with the old logits on the batch, [W, b] + Eᵀ P(B), as in `orbits.layers`. It is exact where the n samples are
  independent in its input, so n ≤ d, and says nothing of other samples.

λ = "auto" is the largest of a grid for which the generalized cross-validation error (Golub, Heath, Wahba 1979)

    GCV(λ) = ‖T − T̂‖² / (1 − tr H / n)²,   T̂ = H T

is at most 10 % above the least: as much regularization as other samples do not notice. The curve is flat where features
are saturated, and the least of it alone may have weights that are a hundred times as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import Activation, Scaled
from ..checks import check_name, check_number
from ..errors import TeleportError
from ..kernels.pinv import factorize
from ..kernels.torch_kernels import dot
from ..model.chain import Chain
from ..model.network import Network
from ..model.problem import Problem
from ..model.surroundings import Surroundings
from ..orbits import Hindrance
from ..report import NOT_ASKED_FOR, TELEPORTED, LayerReport, frozen_text

REFITS = LAST, ALL = ("last", "all")
AUTO = "auto"
RIDGES = [10 ** (quarter / 4) for quarter in range(-24, 9)]
"""The λ that "auto" chooses from, as shares of the mean eigenvalue of the centred BᵀB."""
NOTICED = 1.1
"""By what factor the cross-validation error may exceed its least."""
SPREAD_ZERO = "its pre-activations do not vary over the samples"


@dataclass(frozen=True)
class Standardise:
    """Bring the pre-activations of the hidden layers to mean m and spread τ, and keep what the network computes.

    Args:
        spread: τ, the standard deviation of a hidden layer's pre-activations, one number a layer; "auto" is that of the
            activation (`Activation.spread`). A larger one learns faster, a smaller one is less sensitive to noise.
        refit: "last" keeps the outputs on the batch exactly and takes at most as many samples as the output layer's
            input has columns; "all" keeps them approximately on all data, and takes some hundreds of samples.
        ridge: λ of refit="all" as a share of the mean eigenvalue of the features' covariance; "auto" chooses it for
            each layer by generalized cross-validation.
        least_kept: with refit="all", the share of the predictions on the batch, and on a holdout, that must stay:
            classes for integer targets, else 1 − ‖z' − z‖ / ‖z − mean z‖ of the outputs z. `Guards.drift_tol` does not
            apply there.

    Raises:
        TypeError, ValueError: an argument is not what is said above.
    """

    spread: float | str = AUTO
    refit: str = LAST
    ridge: float | str = AUTO
    least_kept: float = 0.9

    usual_change: ClassVar[float] = 25.0
    group: ClassVar[str] = "gl"
    looks_ahead: ClassVar[bool] = False
    reads_step: ClassVar[bool] = False
    objective: ClassVar[str] = "best_decrease"

    def __post_init__(self) -> None:
        for name, value in (("spread", self.spread), ("ridge", self.ridge)):
            if isinstance(value, str):
                check_name(name, value, (AUTO,))
            else:
                object.__setattr__(self, name, check_number(name, value, above=0.0))
        check_name("refit", self.refit, REFITS)
        least = check_number("least_kept", self.least_kept, at_least=0.0)
        if least > 1:
            raise ValueError(f"least_kept must be a share from 0 to 1, got {self.least_kept!r}")
        object.__setattr__(self, "least_kept", least)

    def aim(self, activation: Activation) -> tuple[float, float]:
        """τ and m before this activation; before a σ(αz + β) + c it is αz + β that gets the τ of σ, and mean 0."""
        base, rate, shift = activation, 1.0, 0.0
        if isinstance(activation, Scaled):
            base, rate, shift = activation.base, activation.rate, activation.shift
        return (base.spread / abs(rate) if isinstance(self.spread, str) else self.spread), -shift / rate


@dataclass(frozen=True)
class Standardised:
    """Weights with the pre-activations that they produce on the batch, and what makes them useless where it holds."""

    network: Network
    outputs: tuple[Tensor, ...]
    hindrances: tuple[Hindrance, ...]


def standardise(problem: Problem, rule: Standardise, moved: Sequence[bool]) -> Standardised:
    """The new weights. moved: of each weight layer, whether the pre-activations behind it are standardised.

    It reads nothing back from the device, but for `torch.linalg.eigh` in refit="all".
    """
    network = problem.network
    weights, biases, outputs = list[Tensor](), list[Tensor | None](), list[Tensor]()
    hindrances: list[Hindrance] = []
    changed = False  # whether the layer's input has
    layers = zip(network.befores, network.weights, network.biases, problem.outputs, moved, strict=True)
    for index, (before, weight, bias, old, moves) in enumerate(layers, start=1):
        output = old
        if changed:
            assert before is not None
            inputs = before.forward(outputs[-1])
            if rule.refit == ALL:
                weight, bias = fit_ridge(inputs, old, bias, rule.ridge)
            elif index == len(network):
                weight, bias, info = _absorb(network, inputs, old, weight, bias)
                hindrances.append((info != 0, "the samples are not independent in the output layer's input"))
            output = F.linear(inputs, weight, bias)
        if moves:
            spread, centre = rule.aim(network.activations[index - 1])
            shift = None if bias is None else output.mean(0)
            centred = output if shift is None else output - shift
            size = (dot(centred, centred) / centred.numel()).sqrt()
            hindrances.append((size == 0, f"hidden layer {index}: {SPREAD_ZERO}"))
            factor = (spread / size).to(output.dtype)
            weight, output = weight * factor, centred * factor
            if bias is not None and shift is not None:
                bias, output = (bias - shift) * factor + centre, output + centre
            changed = True
        weights.append(weight)
        biases.append(bias)
        outputs.append(output)
    found = replace(network, weights=tuple(weights), biases=tuple(biases))
    return Standardised(found, tuple(outputs), tuple(hindrances))


def _absorb(
    network: Network, inputs: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The least change of W, b that makes the inputs' image the target, and the info of the factorization.

    It is corrected once more, so that the logits keep the precision of the arithmetic, not of P.
    """
    found = factorize(inputs, bias is not None, network.products)
    for _ in range(2):
        weight, bias = found.update(weight, bias, target - F.linear(inputs, weight, bias))
    return weight, bias, found.info


def fit_ridge(
    inputs: Tensor, target: Tensor, bias: Tensor | None, ridge: float | str
) -> tuple[Tensor, Tensor | None]:
    """V (c×d) and v (c), None where `bias` is, that minimise ‖T − B Vᵀ − 1vᵀ‖² + λ‖V‖²; float64 inside.

    inputs: B (n×d). target: T (n×c). ridge: λ as a share of the mean eigenvalue of BᵀB, centred with bias, or "auto".
    """
    b, t = inputs.double(), target.double()
    mean_b, mean_t = (b.mean(0), t.mean(0)) if bias is not None else (torch.zeros_like(b[0]), torch.zeros_like(t[0]))
    b, t = b - mean_b, t - mean_t
    wide = len(b) < b.shape[1]  # then the eigenvectors of B Bᵀ are the shorter ones
    values, vectors = torch.linalg.eigh(b @ b.T if wide else b.T @ b)
    values = values.clamp(min=0)
    shares = vectors.T @ (t if wide else b.T @ t)  # of T, or BᵀT, along the eigenvectors
    unit = values.sum() / b.shape[1]
    if isinstance(ridge, str):
        squares = shares.square().sum(1)
        squares = squares if wide else torch.where(values > 0, squares / values, 0)
        penalty = _choose_ridge(values, squares, t, unit, fitted=int(bias is not None))
    else:
        penalty = ridge * unit
    inner = vectors @ (shares / (values + penalty)[:, None])
    weight = (b.T @ inner if wide else inner).T
    new_bias = None if bias is None else (mean_t - weight @ mean_b).to(bias.dtype)
    return weight.to(inputs.dtype), new_bias


def _choose_ridge(values: Tensor, squares: Tensor, target: Tensor, unit: Tensor, fitted: int) -> Tensor:
    """The largest λ whose generalized cross-validation error is at most `NOTICED` times the least: a scalar.

    squares: r². fitted: 1 where v is fitted too, else 0.

    With the eigenvalues e of BᵀB and the squares r² of the target along the left singular vectors of B,
    ‖T − T̂‖² = ‖T‖² − Σ r² + Σ r² (λ/(e + λ))² and tr H = Σ e/(e + λ), plus 1 for v.
    """
    penalties = torch.tensor(RIDGES, dtype=values.dtype, device=values.device) * unit
    left = penalties[:, None] / (values + penalties[:, None])  # what λ leaves of each component
    residual = (dot(target, target) - squares.sum()).clamp(min=0) + (squares * left.square()).sum(1)
    freedom = 1 - (fitted + (1 - left).sum(1)) / len(target)
    error = torch.where(freedom > 0, residual / freedom.square(), torch.inf)
    return torch.where(error <= NOTICED * error.min(), penalties, 0).max()


def shares_kept(problem: Problem, around: Surroundings, network: Network, outputs: Sequence[Tensor]) -> Tensor:
    """The share of the predictions that new weights keep on the batch, and on the holdout if there is one: float64."""
    classes = not problem.loss.targets.is_floating_point() and outputs[-1].shape[1] > 1
    shares = [share_kept(problem.outputs[-1], outputs[-1], classes)]
    if around.holdout is not None:
        samples, _ = around.holdout
        shares.append(share_kept(around.others.outputs[-1][: around.held], network.forward(samples)[-1], classes))
    return torch.stack(shares)


def share_kept(before: Tensor, after: Tensor, classes: bool) -> Tensor:
    """Of equal classes, or 1 − ‖z' − z‖ / ‖z − mean z‖ of the outputs z (n×c) before and z' after: a float64 scalar."""
    if classes:
        return (before.argmax(1) == after.argmax(1)).double().mean()
    change, spread = after - before, before - before.mean(0)
    return 1 - (dot(change, change) / dot(spread, spread)).sqrt()


def plan_standardise(
    problem: Problem, layers: Sequence[int] | None, rule: Standardise
) -> tuple[list[bool], tuple[LayerReport, ...]]:
    """Of each weight layer whether the pre-activations behind it are standardised, and a report on each hidden layer.

    layers: the hidden layers (1..m) that are asked for; None: all that can be.

    Raises:
        TeleportError: there is none, one that `layers` names cannot be, or the batch is too large for refit="last".
    """
    network, n = problem.network, len(problem.samples)
    refusals = _refusals(problem.frozen, layers, rule)
    columns = network.weights[-1].shape[1] + (network.biases[-1] is not None)
    if (obstacle := _obstacle(refusals, layers, n, columns, rule)) is not None:
        raise TeleportError(f"batch: {obstacle}")
    moved = [refusal is None for refusal in refusals]
    reports = tuple(
        LayerReport(index, n, len(weight), None, None, refusal is None, refusal or TELEPORTED, _group(refusal, rule))
        for index, (refusal, weight) in enumerate(zip(refusals, network.weights, strict=False), start=1)
    )
    return [*moved, False], reports


def check_standardisable(chain: Chain, layers: Sequence[int] | None, n: int, rule: Standardise) -> None:
    """Raise ValueError if no batch of `n` samples lets the rule standardise the hidden `layers` (1..m; None: any)."""
    count = len(chain.linears)
    refusals = _refusals([chain.frozen(place) for place in range(count)], layers, rule)
    if (obstacle := _obstacle(refusals, layers, n, chain.columns(count), rule)) is not None:
        raise ValueError(f"model can never be teleported by Standardise with {n} samples: {obstacle}")


def _group(refusal: str | None, rule: Standardise) -> str | None:
    return rule.group if refusal is None else None


def _refusals(
    frozen: Sequence[str | None], layers: Sequence[int] | None, rule: Standardise
) -> list[str | None]:
    """Why each hidden layer is not standardised, or None. frozen: of each weight layer, a parameter that is."""
    found: list[str | None] = []
    for index in range(1, len(frozen)):
        behind = frozen[index:] if rule.refit == ALL else frozen[-1:]
        name = next((name for name in (frozen[index - 1], *behind) if name is not None), None)
        asked = layers is None or index in layers
        found.append(NOT_ASKED_FOR if not asked else None if name is None else frozen_text(name))
    return found


def _obstacle(
    refusals: Sequence[str | None], layers: Sequence[int] | None, n: int, columns: int, rule: Standardise
) -> str | None:
    """What keeps the rule from standardising what it was asked for. columns: those of the output layer's input."""
    frozen = {index: text for index, text in enumerate(refusals, start=1) if text not in (None, NOT_ASKED_FOR)}
    if None not in refusals or (layers is not None and frozen):
        return "; ".join(f"hidden layer {index}: {text}" for index, text in frozen.items())
    if rule.refit == LAST and n > columns:
        return (
            f'expected at most {columns} samples for refit="last", as many as the output layer\'s input has columns, '
            f'got {n}: take fewer, or refit="all"'
        )
    return None
