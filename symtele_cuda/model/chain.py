"""A model read as a chain, and the checks of its parameters and of a batch for it; `reader` reads one.

    x ↦ o(Z_M),   Z_k = H_{k−1} W_kᵀ + b_k,   H_k = σ_k(Z_k),   H_0 = i(x)
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation
from .pieces import Affine, Flatten, Piece


@dataclass(frozen=True)
class Chain:
    """M Linear layers in the order of the forward pass, and what is between them.

    linears: the M weight layers; names: their qualified names in the model.
    activations: the m = M − 1 hidden activations, σ_k after linears[k−1]; Identity where two Linears are adjacent.
    output: what is applied to the logits Z_M, Identity if nothing is.
    inputs: what is applied, one after the other, to the model's input before the first layer.
    """

    linears: tuple[nn.Linear, ...]
    activations: tuple[Activation, ...]
    output: Piece
    names: tuple[str, ...]
    inputs: tuple[Affine | Flatten, ...] = ()

    @property
    def flattens(self) -> bool:
        """Whether the model flattens its input's trailing dimensions before the first layer."""
        return any(isinstance(piece, Flatten) for piece in self.inputs)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(qualified name, parameter) of all weight layers: weight, bias, weight, ...

        By name: a Linear may have registered its bias first, as `prune.remove` leaves it.
        """
        for where, linear in zip(self.names, self.linears, strict=True):
            for name in ("weight", "bias"):
                parameter = linear._parameters.get(name)
                if parameter is not None:
                    yield f"{where}.{name}", parameter

    def frozen(self, layer: int) -> str | None:
        """The name of a parameter of weight layer `layer` (0-based) that does not require a gradient, or None."""
        own = self.linears[layer]._parameters.values()
        frozen = {id(parameter) for parameter in own if parameter is not None and not parameter.requires_grad}
        return next((name for name, parameter in self.named_parameters() if id(parameter) in frozen), None)

    def frozen_beside(self, index: int) -> list[str]:
        """The names of frozen parameters in the weight layers on both sides of hidden layer `index` (1..m)."""
        return [name for name in map(self.frozen, (index - 1, index)) if name is not None]

    def columns(self, index: int) -> int:
        """The columns of the input of hidden layer `index` (1..m), the bias' column included."""
        linear = self.linears[index - 1]
        return linear.weight.shape[1] + (linear.bias is not None)


def mark_of(model: nn.Module) -> tuple[Any, ...]:
    """What a chain depends on besides the parameters of its Linear layers: where it is the same, so is the chain.

    Of every module its place, identity, mode, hooks, plain attributes, and the tensors that are no parameters of a
    Linear, by identity and version.
    """
    return tuple((name, *_mark_of_module(module)) for name, module in model.named_modules(remove_duplicate=False))


def _mark_of_module(module: nn.Module) -> tuple[Any, ...]:
    plain = tuple((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, torch.dtype)))
    hooks = (*map(id, module._forward_pre_hooks.values()), *map(id, module._forward_hooks.values()))
    own = {} if isinstance(module, nn.Linear) else module._parameters
    others = ((k, t) for k, t in (*own.items(), *module._buffers.items()) if t is not None)
    constants = ((k, v) for k, v in vars(module).items() if isinstance(v, Tensor))
    tensors = tuple((k, id(t), None if t.is_inference() else t._version) for k, t in (*others, *constants))
    present = tuple(k for k, p in module._parameters.items() if p is not None)
    return id(module), type(module), "forward" in vars(module), plain, hooks, tensors, present


def check_same_structure(before: Chain, now: Chain) -> None:
    """Raise ValueError, which names the difference, unless two chains have layers of the same shapes and kinds."""
    for old, new in itertools.zip_longest(_describe(before), _describe(now), fillvalue="nothing"):
        if old != new:
            raise ValueError(f"model must keep the structure that it had at first, got {new} in the place of {old}")


def _describe(chain: Chain) -> list[str]:
    """A text for each of its layers and activations."""
    parts = []
    for where, linear, activation in zip(chain.names, chain.linears, (*chain.activations, chain.output), strict=True):
        rows, columns = linear.weight.shape
        bias = "" if linear.bias is not None else " without bias"
        parts += [f"{where!r}, a Linear from {columns} to {rows}{bias}", f"{activation} behind {where!r}"]
    return parts


def check_layers(layers: Sequence[int], hidden_layers: int) -> tuple[int, ...]:
    """`layers` as a tuple; raise unless they are distinct hidden layer numbers 1..hidden_layers."""
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a sequence of hidden layer numbers 1..{hidden_layers}, got {layers!r}")
    named = tuple(layers)
    if not named or len(set(named)) != len(named) or not all(_is_layer(k, hidden_layers) for k in named):
        raise ValueError(f"layers must be distinct hidden layer numbers in 1..{hidden_layers}, got {list(layers)}")
    return named


def _is_layer(value: object, hidden_layers: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 1 <= int(value) <= hidden_layers


def check_parameters(chain: Chain) -> None:
    """Raise unless all weight layers can be computed with, and rewritten in place.

    Their parameters must be plain dense tensors of one floating dtype (16 bits or more) on one device (not meta),
    finite, contiguous, not made in torch.inference_mode(), no two of them sharing memory. TypeError for wrong kinds of
    tensors and dtypes, ValueError otherwise; the message has the parameter's qualified name.
    """
    parameters = list(chain.named_parameters())
    for name, parameter in parameters:
        _check_kind(name, parameter)
        _check_same_kind(name, parameter, *parameters[0])
    for where, linear in zip(chain.names, chain.linears, strict=True):
        _check_shapes(where, linear)
    _check_untied(parameters)
    for name, parameter in parameters:
        _check_writable(name, parameter)
    if not _all_finite(parameter for _, parameter in parameters):
        name = next(name for name, parameter in parameters if not _all_finite([parameter]))
        raise ValueError(f"parameter {name!r} must be finite, got NaN or Inf")


def check_batch(chain: Chain, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(x, y) of a batch that fits the chain; x is returned as by `check_inputs`.

    y: a tensor of n targets on the same device; its dtype and range are the loss's affair.
    """
    inputs, targets = _check_pair(batch)
    flat = check_inputs(chain, inputs, "batch inputs")
    _check_placed(chain, targets, "batch targets")
    if targets.dim() == 0 or len(targets) != len(flat):
        raise ValueError(
            f"batch targets must have one entry for each of n={len(flat)} inputs, got shape {tuple(targets.shape)}"
        )
    return flat, as_constant(targets)


def as_constant(data: Tensor) -> Tensor:
    """The tensor without its graph, as one that autograd can save: a copy where inference mode has made it."""
    return data.clone() if data.is_inference() else data.detach()


def check_inputs(chain: Chain, inputs: Tensor, argument: str) -> Tensor:
    """Samples as the first Linear gets them (n, d_0), detached: with what the model does before it (`Chain.inputs`).

    inputs: (n, d_0), or (n, ...) for a model that flattens, of the model's dtype and device, finite there, n ≥ 1;
    `argument` is their name in the errors, TypeError for wrong kinds of tensors and dtypes, ValueError otherwise.
    """
    _check_placed(chain, inputs, argument)
    weight = chain.linears[0].weight
    if inputs.dtype != weight.dtype:
        raise TypeError(f"{argument} must have the model's dtype {weight.dtype}, got {inputs.dtype}")
    _check_real(argument, inputs)
    flat = as_constant(inputs)
    for piece in chain.inputs:
        if isinstance(piece, Affine) and not piece.fits(tuple(flat.shape[1:])):
            shapes = " and ".join(str(tuple(constant.shape)) for constant in piece.tensors)
            raise ValueError(
                f"{argument} must be samples whose shape the model's constants of shape {shapes} broadcast to, "
                f"got samples of shape {tuple(flat.shape[1:])}"
            )
        flat = piece.forward(flat)
    features = weight.shape[1]
    if flat.dim() != 2 or flat.shape[1] != features:
        hint = "" if chain.flattens or flat.dim() <= 2 else " (the model has no Flatten before its first Linear)"
        raise ValueError(f"{argument} must have shape (n, d_in={features}), got {tuple(inputs.shape)}{hint}")
    if len(flat) == 0:
        raise ValueError(f"{argument} must hold at least one sample, got 0")
    if not _all_finite([flat]):
        raise ValueError(f"{argument} must be finite, got NaN or Inf")
    return flat


# --- checks of single tensors -------------------------------------------------------------------------------------


def _check_kind(name: str, parameter: nn.Parameter) -> None:
    if type(parameter) is not nn.Parameter:
        raise TypeError(f"parameter {name!r} must be a plain torch.nn.Parameter, got {type(parameter).__name__}")
    if parameter.layout != torch.strided:
        raise TypeError(f"parameter {name!r} must be a dense tensor, got layout {parameter.layout}")
    if parameter.is_meta:
        raise ValueError(f"parameter {name!r} must hold data, got a tensor on the meta device")
    if parameter.numel() == 0:
        raise ValueError(f"parameter {name!r} must have elements, got shape {tuple(parameter.shape)}")
    _check_real(f"parameter {name!r}", parameter)


def _check_shapes(where: str, linear: nn.Linear) -> None:
    weight, bias = linear.weight, linear.bias
    if weight.dim() != 2:
        raise ValueError(f"parameter '{where}.weight' must be a matrix, got shape {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"parameter '{where}.bias' must have shape ({weight.shape[0]},), one element a row of the weight, "
            f"got {tuple(bias.shape)}"
        )


def _check_real(argument: str, tensor: Tensor) -> None:
    """Raise for dtypes without the arithmetic of real numbers, such as float8."""
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{argument} must be of a real floating dtype, got {tensor.dtype} (known are "
            f"{', '.join(map(str, _DTYPES))})"
        )


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_placed(chain: Chain, tensor: Tensor, argument: str) -> None:
    """Raise unless `tensor` is a dense tensor on the model's device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{argument} must be a dense tensor, got layout {tensor.layout}")
    device = chain.linears[0].weight.device
    if tensor.device != device:
        raise ValueError(f"{argument} must be on the model's device {device}, got {tensor.device}")


def _check_same_kind(name: str, parameter: nn.Parameter, first_name: str, first: nn.Parameter) -> None:
    if parameter.dtype != first.dtype:
        raise TypeError(
            f"parameter {name!r} must have the dtype {first.dtype} of {first_name!r}, got {parameter.dtype}"
        )
    if parameter.device != first.device:
        raise ValueError(
            f"parameter {name!r} must be on the device {first.device} of {first_name!r}, got {parameter.device}"
        )


def _check_writable(name: str, parameter: nn.Parameter) -> None:
    if parameter.is_inference():
        raise ValueError(
            f"parameter {name!r} must be one that autograd can follow, got one made in torch.inference_mode()"
        )
    if not parameter.is_contiguous():
        raise ValueError(f"parameter {name!r} must be contiguous, got strides {parameter.stride()}")


def _check_untied(parameters: list[tuple[str, nn.Parameter]]) -> None:
    """Raise if two parameters overlap in memory; disjoint slices of one buffer are no tie."""
    extents = sorted((*_extent(parameter), index) for index, (_, parameter) in enumerate(parameters))
    for (_, end, index), (start, _, other) in itertools.pairwise(extents):
        if start < end:
            first, second = (parameters[i][0] for i in sorted((index, other)))
            raise ValueError(f"parameters must not be tied, got {first!r} and {second!r} sharing memory")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor's elements and the one behind the last."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all elements are finite: by their sums, one pass and one transfer, and one by one if a sum overflows."""
    listed = [tensor.detach() for tensor in tensors]
    if all(math.isfinite(total) for total in torch.stack([tensor.sum() for tensor in listed]).tolist()):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in listed)


def _check_pair(batch: object) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(f"batch must be a pair (inputs, targets) of tensors, got {type(batch).__name__}{size}")
    return batch[0], batch[1]
