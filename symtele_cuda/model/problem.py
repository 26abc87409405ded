"""A model and a batch, read and checked: what a teleport works on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import TeleportError
from ..kernels import torch_kernels as torch_products
from ..kernels.library import Products
from ..transaction import Transaction
from .chain import Chain, as_constant, check_batch, check_parameters
from .loss import (
    BatchLoss,
    Losses,
    LossFunction,
    LossModule,
    LossOfParameters,
    check_default_targets,
    default_loss,
    examine,
)
from .network import Network, parameter_list


@dataclass(frozen=True)
class Problem:
    """A model and a batch, read and checked: everything that the search needs of them.

    outputs: the pre-activations Y_l; output_delta: ∂L/∂logits; trainable: of each of the `parameter_list`, whether the
    optimizer moves it; frozen: of each weight layer, the name of a parameter that it does not move; loss_of: the loss
    as a function of all parameters, and weight_terms whether it depends on them other than through the logits.
    """

    network: Network
    samples: Tensor
    outputs: tuple[Tensor, ...]
    loss: BatchLoss
    output_delta: Tensor
    trainable: tuple[bool, ...]
    frozen: tuple[str | None, ...]
    loss_of: LossOfParameters = field(compare=False)
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
        """Raises TeleportError inside torch.inference_mode(); TypeError, ValueError where batch or loss do not fit."""
        if torch.is_inference_mode_enabled():
            raise TeleportError(
                "teleport_mlp cannot run inside torch.inference_mode(), expected torch.no_grad() or neither"
            )
        network = replace(read_network(chain), products=products)
        dtype = network.weights[0].dtype
        samples, targets = prepare(chain, batch, dtype)
        outputs = tuple(network.forward(samples))
        if loss_fn is None:
            check_default_targets(targets, chain.output.forward(outputs[-1]).shape)
        elif not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable as loss_fn(outputs, targets), got {type(loss_fn).__name__}")
        loss = BatchLoss(loss_fn or default_loss(targets), targets, chain.output, default=loss_fn is None)
        parameters = [parameter for _, parameter in chain.named_parameters()]
        at_start = examine(loss, outputs[-1], parameters)
        loss_of = _loss_of_parameters(model, chain, loss.function, as_constant(batch[0]).to(dtype), targets)
        if at_start.weight_terms:
            _check_reaches_weights(loss_of, network, parameters)
        return cls(
            network=network,
            samples=samples,
            outputs=outputs,
            loss=loss,
            output_delta=at_start.gradient,
            trainable=tuple(parameter.requires_grad for parameter in parameters),
            frozen=tuple(map(chain.frozen, range(len(chain.linears)))),
            loss_of=loss_of,
            weight_terms=at_start.weight_terms,
            parameter_dtype=parameters[0].dtype,
        )

    @property
    def sees_logits_alone(self) -> bool:
        """Whether loss and gradient follow from the logits, for all weights: what activation space can do."""
        return not self.weight_terms and all(self.trainable)

    def frozen_beside(self, index: int) -> list[str]:
        """The names of frozen parameters in the weight layers on both sides of hidden layer `index` (1..m)."""
        return [name for name in self.frozen[index - 1 : index + 1] if name is not None]

    def leaves(self, network: Network) -> list[Tensor]:
        """The trainable ones of the `parameter_list` of `network`, as leaves of their own memory."""
        pairs = zip(parameter_list(network), self.trainable, strict=True)
        return [tensor.detach().clone().requires_grad_() for tensor, trainable in pairs if trainable]

    def merge(self, network: Network, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The `parameter_list` of `network` with others in the place of the trainable ones."""
        replacements = iter(leaves)
        pairs = zip(parameter_list(network), self.trainable, strict=True)
        return [next(replacements) if trainable else tensor for tensor, trainable in pairs]

    def losses(self, holdout: tuple[Tensor, BatchLoss] | None) -> Losses:
        """The losses as functions of the trainable parameters. holdout: its samples and its loss, if there is one."""

        def logits(leaves: Sequence[Tensor], samples: Tensor) -> Tensor:
            return self.network.with_parameters(self.merge(self.network, leaves)).forward(samples)[-1]

        def on(samples: Tensor, loss: BatchLoss) -> LossOfParameters:
            return lambda leaves: loss.value(logits(leaves, samples))

        on_batch = self.loss_of_trainable(self.network)
        on_holdout = None if holdout is None else on(*holdout)
        return Losses(on_batch, on(self.samples, self.loss), on_holdout, self.weight_terms)

    def rounded(self, network: Network, outputs: Sequence[Tensor]) -> tuple[Network, Sequence[Tensor]]:
        """A network rounded to the dtype of the model's parameters, held in its own dtype, and its pre-activations."""
        if self.parameter_dtype == self.samples.dtype:
            return network, outputs
        rounded = [tensor.to(self.parameter_dtype).to(tensor.dtype) for tensor in parameter_list(network)]
        network = network.with_parameters(rounded)
        return network, network.forward(self.samples)

    def loss_of_trainable(self, network: Network) -> LossOfParameters:
        """The loss as a function of the trainable ones alone, the others being those of `network`."""
        return lambda leaves: self.loss_of(self.merge(network, leaves))


def prepare(chain: Chain, batch: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x, y) checked, x as the first Linear gets it; both in the dtype of the search where they had the model's."""
    samples, targets = check_batch(chain, batch)
    if targets.is_floating_point() and targets.dtype == samples.dtype:
        targets = targets.to(dtype)
    return samples.to(dtype), targets


def begin(transaction: Transaction, chain: Chain) -> None:
    """Before all that computes with the chain: check it, and compute on its device, without gradients and autocast.

    Where the work raises, its modules hold their own parameter objects again: the loss with other weights swaps tensors
    into the live model.

    Raises:
        TypeError, ValueError: as `check_parameters`.
    """
    transaction.compute_on(chain.linears[0].weight.device)
    check_parameters(chain)
    for linear in chain.linears:
        transaction.on_failure(functools.partial(linear._parameters.update, dict(linear._parameters)))


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


def _loss_of_parameters(
    model: nn.Module, chain: Chain, loss_fn: LossFunction, x: Tensor, y: Tensor
) -> LossOfParameters:
    """The loss on the batch as a function of the list of weights and biases."""
    names = [f"model.{name}" for name, _ in chain.named_parameters()]

    def loss_of(parameters: Sequence[Tensor]) -> Tensor:
        module = LossModule(model, loss_fn)
        return functional_call(module, dict(zip(names, parameters, strict=True)), (x, y))

    return loss_of


def _check_reaches_weights(loss_of: LossOfParameters, network: Network, originals: list[nn.Parameter]) -> None:
    """Raise if the loss reads the parameters past the model, where other weights cannot be put in their place."""
    with torch.enable_grad():
        value = loss_of(parameter_list(network, requires_grad=True))
        trainable = [parameter for parameter in originals if parameter.requires_grad]
        found = torch.autograd.grad(value, trainable, allow_unused=True) if value.requires_grad else ()
    if any(gradient is not None for gradient in found):
        raise ValueError(
            "loss_fn must read the weights through the model (as model.parameters() when it is called), "
            "got one that holds parameter tensors of its own"
        )
