"""Norms on a residual stream made such that a rotation passes them; the model computes the same as before."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import TeleportError
from ..transaction import Transaction
from .action import Axis
from .declared import Stream
from .names import ModelNames
from .streams import gain_of, is_rms_norm, known_streams


def fold_norms(model: nn.Module, *, streams: Iterable[Stream] | None = None) -> None:
    """Take the gains of the RMSNorms on a residual stream into the layers that read them, in place:

    W ← W diag(γ) of every reader, γ ← 1, and γ does not train any more.

    The model computes what it did, and a rotation of the stream passes its norms. Equal gains stay as they are.

    Args:
        model: one of a known family (Llama and its like, GPT-2, ViT), or one that `streams` describe.
        streams: streams with their `norms`; default: those of the known families.

    Raises:
        TypeError, ValueError: an argument is not what is said above.
        TeleportError: there is no stream, a norm is none that can be folded, or a reader shares its weight with an
            embedding. Nothing has changed.
    """
    transaction = Transaction()
    transaction.run(lambda: _fold(model, _streams_of(model, streams), transaction))


def convert_layernorm(model: nn.Module, *, streams: Iterable[Stream] | None = None) -> None:
    """Replace the LayerNorms on a residual stream by RMSNorms, in place, and fold the gains of these, see `fold_norms`.

    LayerNorm is RMSNorm of x − mean(x): the mean is taken out of all that is written, W ← (I − 11ᵀ/d) W. The biases β
    of the norms go to the layers that read them, b ← b + W β; one without a bias gets one where β ≠ 0. The model
    computes what it did. What it learns afterwards may have a mean, which RMSNorm does not take out.

    Make the optimizer afterwards: parameters that it held are gone.

    Args, Raises: as for `fold_norms`; a `TeleportError` where a norm is no LayerNorm over one dimension.
    """
    transaction = Transaction()
    transaction.run(lambda: _convert(model, _streams_of(model, streams), transaction))


def _streams_of(model: nn.Module, streams: Iterable[Stream] | None) -> list[Stream]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    listed = known_streams(ModelNames(model)) if streams is None else list(streams)
    for stream in listed:
        if not isinstance(stream, Stream):
            raise TypeError(f"streams must be Streams, got {type(stream).__name__}")
    if not any(stream.norms for stream in listed):
        raise TeleportError("streams: expected one with its norms, got none: the model is of no family that is known")
    return listed


@torch.no_grad()
def _fold(model: nn.Module, streams: list[Stream], transaction: Transaction) -> None:
    names = ModelNames(model)
    changed, folded = dict[str, Tensor](), list[nn.Parameter]()
    for stream in streams:
        for name, readers in stream.norms_in(names):
            gain = gain_of(names.modules[name])
            if gain is None or not is_rms_norm(names.modules[name], gain):
                raise TeleportError(f"norms: expected RMSNorms with gains, got {name!r}, see convert_layernorm")
            folded.append(gain)
            if bool((gain == gain[0]).all()):
                continue
            for reader in readers:
                for axis in _untied_inputs(names, reader, "the gains"):
                    value = changed.get(axis.name, names.parameters[axis.name].detach())
                    changed[axis.name] = axis.apply(value, gain.detach())
            changed[name + ".weight"] = torch.ones_like(gain)
    parameters = [names.parameters[name] for name in changed]
    transaction.write(parameters, list(changed.values()))
    for gain in folded:
        transaction.on_failure(partial(setattr, gain, "requires_grad", gain.requires_grad))
        gain.requires_grad_(False)


@torch.no_grad()
def _convert(model: nn.Module, streams: list[Stream], transaction: Transaction) -> None:
    names = ModelNames(model)
    changed, biases, norms = dict[str, Tensor](), dict[str, Tensor](), dict[str, nn.RMSNorm]()
    for stream in streams:
        written = stream.written_axes(names)
        for name, readers in stream.norms_in(names):
            norm = names.modules[name]
            if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
                raise TeleportError(f"norms: expected LayerNorms over one dimension, got {name!r}: {norm}")
            norms[name] = _as_rms_norm(norm)
            shifted = norm.bias is not None and bool(norm.bias.any())
            for reader in readers:
                if shifted:
                    biases[reader] = _bias_for(names, reader, norm.bias.detach())
                _check_untied_or_equal(names, reader, norm, shifted)
        for axis in written:
            value = names.parameters[axis.name].detach()
            changed[axis.name] = value - value.mean(axis.dim, keepdim=True)
    transaction.write([names.parameters[name] for name in changed], list(changed.values()))
    for reader, bias in biases.items():
        _set_bias(*names.bias_of(reader), bias, transaction)
    for name, made in norms.items():
        parent, _, child = name.rpartition(".")
        _replace(names.modules[parent], child, made, transaction)
    _fold(model, streams, transaction)


def _as_rms_norm(norm: nn.LayerNorm) -> nn.RMSNorm:
    made = nn.RMSNorm(norm.normalized_shape, eps=norm.eps)
    gain = torch.ones(norm.normalized_shape) if norm.weight is None else norm.weight.detach().clone()
    made.weight = nn.Parameter(gain)
    return made.train(norm.training)


def _untied_inputs(names: ModelNames, reader: str, what: str) -> tuple[Axis, ...]:
    axes = names.inputs(reader).axes
    for axis in axes:
        if axis.name in names.tied:
            raise TeleportError(
                f"{reader!r} shares {axis.name!r} with another module, which {what} of a norm would change too: "
                "give it a weight of its own first"
            )
    return axes


def _check_untied_or_equal(names: ModelNames, reader: str, norm: nn.LayerNorm, shifted: bool) -> None:
    """Raise where the reader shares its weight, which centring changes, unless all entries of the norm are alike."""
    alike = norm.weight is None or bool((norm.weight == norm.weight[0]).all())
    if shifted or not alike:
        _untied_inputs(names, reader, "the gains and biases")


def _bias_for(names: ModelNames, reader: str, shift: Tensor) -> Tensor:
    """b + W β of a layer, or W β."""
    (axis, *others) = names.inputs(reader).axes
    if others:
        raise TeleportError(f"{reader!r} has several weights, so that the norm's bias before it cannot go there")
    owner, attribute = names.bias_of(reader)
    own = getattr(owner, attribute)
    moved = names.parameters[axis.name].detach().movedim(axis.dim, -1) @ shift
    return moved if own is None else own.detach() + moved


def _set_bias(owner: nn.Module, attribute: str, bias: Tensor, transaction: Transaction) -> None:
    own = getattr(owner, attribute)
    if own is not None:
        transaction.write([own], [bias])
        return
    transaction.on_failure(lambda: setattr(owner, attribute, None))
    setattr(owner, attribute, nn.Parameter(bias))


def _replace(parent: nn.Module, child: str, made: nn.Module, transaction: Transaction) -> None:
    old = getattr(parent, child)
    transaction.on_failure(lambda: setattr(parent, child, old))
    setattr(parent, child, made)
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0  # its fused path takes LayerNorms alone
