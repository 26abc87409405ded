"""A model, a batch and a holdout, read and checked: what a teleport works on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import products as torch_products
from .action import Network, OtherSamples, parameter_list
from .errors import TeleportError
from .kernels import Products
from .loss import BatchLoss, LossFunction, check_default_targets, default_loss, examine
from .mlp import Chain, check_batch, check_parameters
from .objectives import LossOfParameters


@dataclass(frozen=True)
class Problem:
    """A model and a batch, read and checked: everything that the search needs of them.

    outputs: the pre-activations Y_l; output_delta: ∂L/∂logits; loss_of: the loss as a function of all parameters, and
    weight_terms whether it depends on them other than through the logits.
    """

    network: Network
    samples: Tensor
    outputs: tuple[Tensor, ...]
    loss: BatchLoss
    output_delta: Tensor
    loss_of: LossOfParameters
    weight_terms: bool
    parameter_dtype: torch.dtype

    @classmethod
    def make(
        cls,
        model: nn.Module,
        chain: Chain,
        batch: tuple[Tensor, Tensor],
        loss_fn: LossFunction | None,
        products: Products = torch_products,
    ) -> Problem:
        network = replace(read_network(chain), products=products)
        dtype = network.weights[0].dtype
        samples, targets = _prepare(chain, batch, dtype)
        outputs = tuple(network.forward(samples))
        if loss_fn is None:
            check_default_targets(targets, chain.output.forward(outputs[-1]).shape)
        elif not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable as loss_fn(outputs, targets), got {type(loss_fn).__name__}")
        loss = BatchLoss(loss_fn or default_loss(targets), targets, chain.output, default=loss_fn is None)
        parameters = [parameter for _, parameter in chain.named_parameters()]
        at_start = examine(loss, outputs[-1], parameters)
        loss_of = _loss_of_parameters(model, chain, loss.function, batch[0].detach().to(dtype), targets)
        if at_start.weight_terms:
            _check_reaches_weights(loss_of, network, parameters)
        return cls(
            network=network,
            samples=samples,
            outputs=outputs,
            loss=loss,
            output_delta=at_start.gradient,
            loss_of=loss_of,
            weight_terms=at_start.weight_terms,
            parameter_dtype=parameters[0].dtype,
        )


@dataclass(frozen=True)
class Holdout:
    """A second batch: its samples and its loss."""

    others: OtherSamples
    loss: BatchLoss

    @classmethod
    def make(cls, chain: Chain, batch: tuple[Tensor, Tensor], problem: Problem) -> Holdout:
        try:
            samples, targets = _prepare(chain, batch, problem.samples.dtype)
            others = OtherSamples.make(problem.network, samples, problem.samples)
            logits = others.outputs[-1]
            if problem.loss.default:
                if targets.is_floating_point() != problem.loss.targets.is_floating_point():
                    raise TypeError(
                        f"targets must be of the batch's kind {problem.loss.targets.dtype}, got {targets.dtype}"
                    )
                check_default_targets(targets, problem.loss.output.forward(logits).shape)
            loss = replace(problem.loss, targets=targets)
            if not math.isfinite(value := float(loss.value(logits))):
                raise ValueError(f"the loss must be finite, got {value}")
        except (TypeError, ValueError) as error:
            raise type(error)(f"holdout: {error}") from error
        return cls(others, loss)


def _prepare(chain: Chain, batch: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x, y) checked, x as the first Linear gets it; both in the dtype of the search where they had the model's."""
    samples, targets = check_batch(chain, batch)
    if targets.is_floating_point() and targets.dtype == samples.dtype:
        targets = targets.to(dtype)
    return samples.detach().to(dtype), targets.detach()


@contextmanager
def at_work(chain: Chain) -> Iterator[None]:
    """Around all that computes with the model: on its device, without gradients and autocast, its parameters kept.

    Raises:
        TeleportError: inside torch.inference_mode().
        TypeError, ValueError: as `check_parameters`.
    """
    if torch.is_inference_mode_enabled():
        raise TeleportError(
            "teleport_mlp cannot run inside torch.inference_mode(), expected torch.no_grad() or neither"
        )
    check_parameters(chain)
    device = chain.linears[0].weight.device
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, torch.no_grad(), torch.autocast(device.type, enabled=False), parameters_kept(chain):
        yield


@contextmanager
def parameters_kept(chain: Chain) -> Iterator[None]:
    """Whatever happens inside, the model's modules hold their own parameter objects afterwards.

    The loss with other weights swaps tensors into the live model, which an interrupt may leave there.
    """
    own = [(linear, name, parameter) for linear in chain.linears for name, parameter in linear.named_parameters()]
    try:
        yield
    finally:
        for linear, name, parameter in own:
            linear._parameters[name] = parameter


def layer_inputs(network: Network, samples: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """B_0 = X, B_1, …, B_m: the inputs of the weight layers."""
    return [samples, *(a.forward(y) for a, y in zip(network.activations, outputs, strict=False))]


def read_network(chain: Chain) -> Network:
    """The chain's weights as tensors in the dtype of the search: float64 for float64, float32 for everything else."""
    dtype = torch.float64 if chain.linears[0].weight.dtype == torch.float64 else torch.float32
    return Network(
        tuple(linear.weight.detach().to(dtype) for linear in chain.linears),
        tuple(None if linear.bias is None else linear.bias.detach().to(dtype) for linear in chain.linears),
        chain.activations,
    )


class _LossModule(nn.Module):
    """The user's loss of the user's model, so that weights can be swapped in for both at once."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss_fn(self.model(x), y)


def _loss_of_parameters(
    model: nn.Module, chain: Chain, loss_fn: LossFunction, x: Tensor, y: Tensor
) -> LossOfParameters:
    """The loss on the batch as a function of the list of weights and biases."""
    names = [f"model.{name}" for name, _ in chain.named_parameters()]

    def loss_of(parameters: Sequence[Tensor]) -> Tensor:
        module = _LossModule(model, loss_fn)
        return functional_call(module, dict(zip(names, parameters, strict=True)), (x, y))

    return loss_of


def _check_reaches_weights(loss_of: LossOfParameters, network: Network, originals: list[nn.Parameter]) -> None:
    """Raise if the loss reads the parameters past the model, where other weights cannot be put in their place."""
    with torch.enable_grad():
        value = loss_of(parameter_list(network, requires_grad=True))
        found = torch.autograd.grad(value, originals, allow_unused=True) if value.requires_grad else ()
    if any(gradient is not None for gradient in found):
        raise ValueError(
            "loss_fn must read the weights through the model (as model.parameters() when it is called), "
            "got one that holds parameter tensors of its own"
        )
