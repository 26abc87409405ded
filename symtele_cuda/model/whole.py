"""Any model and a batch, read and checked: what a symmetry that holds on every input needs of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..activations import Identity
from ..errors import TeleportError
from ..sites.exactness import floating_outputs
from ..transaction import Transaction
from .chain import as_constant
from .loss import BatchLoss, Losses, LossFunction, LossModule, check_default_targets, default_loss, examine

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def as_computed(value: Tensor) -> Tensor:
    """16-bit values in float32, in which all is computed; others as they are."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


@dataclass(frozen=True)
class WholeModel:
    """The trainable parameters of a model by their names, and its losses as functions of the list of them."""

    parameters: dict[str, nn.Parameter]
    losses: Losses
    on_batch: _LossOf

    @classmethod
    def make(
        cls,
        model: nn.Module,
        batch: tuple[Tensor, Tensor],
        loss_fn: LossFunction | None,
        holdout: tuple[Tensor, Tensor] | None,
    ) -> WholeModel:
        """Raises TypeError or ValueError where model, batch, loss or holdout are not what `teleport` says."""
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        _check_model(model, parameters)
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable as loss_fn(outputs, targets), got {type(loss_fn).__name__}")
        x, y = _check_pair(batch, "batch")
        on_batch = _LossOf(model, tuple(parameters), x, y, loss_fn or default_loss(y))
        weight_terms = on_batch.check("batch", default=loss_fn is None)
        on_holdout = None
        if holdout is not None:
            on_holdout = _LossOf(model, tuple(parameters), *_check_pair(holdout, "holdout"), on_batch.function)
            on_holdout.check("holdout", default=loss_fn is None)
        losses = Losses(on_batch, on_batch.with_own_weight_terms, on_holdout, weight_terms)
        return cls(parameters, losses, on_batch)

    @property
    def values(self) -> dict[str, Tensor]:
        """The parameters as they are computed with."""
        return {name: as_computed(parameter.detach()) for name, parameter in self.parameters.items()}

    def outputs(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """What the model makes of the batch with some of its parameters replaced: all floating tensors of it."""
        values = list((self.values | dict(parameters)).values())
        return floating_outputs(self.on_batch.outputs(values))


def begin_whole(transaction: Transaction, model: nn.Module) -> None:
    """Before all that computes with a model: compute on its device, without gradients and autocast.

    Where the work raises, its modules hold their own parameters and buffers again: the loss with other weights swaps
    tensors into the live model.

    Raises:
        TypeError: `model` is no module.
        TeleportError: inside torch.inference_mode().
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if torch.is_inference_mode_enabled():
        raise TeleportError("teleport cannot run inside torch.inference_mode(), expected torch.no_grad() or neither")
    transaction.compute_on(next((parameter.device for parameter in model.parameters()), torch.device("cpu")))
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            transaction.on_failure(functools.partial(held.update, dict(held)))


@dataclass(frozen=True)
class _LossOf:
    """The loss on samples as a function of the list of parameters `names`; the model's buffers stay what they are."""

    model: nn.Module
    names: tuple[str, ...]
    x: Tensor
    y: Tensor
    function: LossFunction

    def __call__(self, parameters: Sequence[Tensor]) -> Tensor:
        return functional_call(LossModule(self.model, self.function), self._state(parameters), (self.x, self.y))

    def with_own_weight_terms(self, parameters: Sequence[Tensor]) -> Tensor:
        return self.function(self.outputs(parameters), self.y)

    def check(self, argument: str, default: bool) -> bool:
        """Raise unless the loss is a finite scalar at the model's own parameters; whether it has weight terms."""
        own = dict(self.model.named_parameters())
        parameters = [own[name] for name in self.names]
        outputs = self.outputs([as_computed(parameter.detach()) for parameter in parameters])
        if default:
            if not isinstance(outputs, Tensor):
                kind = type(outputs).__name__
                raise TypeError(f"loss_fn must be given for a model that returns no tensor, got None for a {kind}")
            check_default_targets(self.y, outputs.shape)
        return examine(
            BatchLoss(self.function, self.y, Identity(), default), outputs, parameters, argument
        ).weight_terms

    def outputs(self, parameters: Sequence[Tensor]) -> Any:
        state = {name.removeprefix("model."): tensor for name, tensor in self._state(parameters).items()}
        return functional_call(self.model, state, (self.x,))

    def _state(self, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        """Parameters and copies of the buffers, by their names in a `LossModule`."""
        buffers = {f"model.{name}": as_computed(buffer).clone() for name, buffer in self.model.named_buffers()}
        return buffers | {f"model.{name}": tensor for name, tensor in zip(self.names, parameters, strict=True)}


def _check_model(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    if not parameters:
        raise ValueError("model must have a parameter that requires a gradient, got none")
    first, *_ = parameters.values()
    for name, parameter in parameters.items():
        if type(parameter) is not nn.Parameter:
            raise TypeError(f"parameter {name!r} must be a plain torch.nn.Parameter, got {type(parameter).__name__}")
        if parameter.dtype not in DTYPES or parameter.dtype != first.dtype:
            raise TypeError(f"parameter {name!r} must be a float of the dtype of all others, got {parameter.dtype}")
        if parameter.is_inference():
            raise ValueError(
                f"parameter {name!r} must be one that autograd can follow, got one made in torch.inference_mode()"
            )
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"parameter {name!r} must be finite, got NaN or Inf")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"model must compute the same twice, got {name!r}, a {type(module).__name__} with p = {module.p} in "
                "training mode: teleport in eval mode, or set p = 0"
            )


def _check_pair(batch: object, argument: str) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
        raise TypeError(f"{argument} must be a pair (inputs, targets) of tensors, got {type(batch).__name__}")
    return as_computed(as_constant(batch[0])), as_constant(batch[1])
