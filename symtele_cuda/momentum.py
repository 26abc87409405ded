"""What becomes of an optimizer's first moments when the weights are teleported: they move as gradients do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import TeleportError
from .mlp import Chain, check_inputs, check_parameters, read_chain
from .pinv import MAX_CONDITION, append_ones, pinv_factor
from .problem import layer_inputs, read_network
from .report import TeleportReport

FIRST_MOMENTS: dict[type, str | None] = {
    torch.optim.SGD: "momentum_buffer",
    torch.optim.Adagrad: None,
    torch.optim.RMSprop: "momentum_buffer",
    torch.optim.Adam: "exp_avg",
    torch.optim.AdamW: "exp_avg",
    torch.optim.Muon: "momentum_buffer",
}
"""The entry of the state that averages steps or gradients, by optimizer; None where there is none."""


def check_first_moment_known(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless it is known which entry of the optimizer's state is its first moment."""
    if type(optimizer) not in FIRST_MOMENTS:
        raise ValueError(
            f"optimizer must be one of {', '.join(known.__name__ for known in FIRST_MOMENTS)} for "
            f'optimizer_state="transport", got {type(optimizer).__name__}'
        )


def with_momentum(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, teleport: Callable[[], TeleportReport]
) -> TeleportReport:
    """Run `teleport`, a teleport of `model` on the samples `x`, and if it is accepted move the first moments with it.

    A weight layer's gradient is δᵀ [B, 1]. Where its input B moved to B' = B gᵀ, the share of the weights becomes
    δᵀ B gᵀ, and so the moment M goes to M gᵀ. The g is the least one, in the sense of ‖g̃ᵀ − I‖_F, that does it on the
    batch, for g̃ over [B, 1], whose last column stays:

        M' = M + [M, m_b] [B, 1]⁺ (B' − B),   m_b' = m_b

    with the moment m_b of the bias; without one [B, 1] is B. This is exact for a moment of gradients on the batch
    itself where the rows of [B, 1] are independent. Where the batch has more samples than [B, 1] has columns, it is the
    least-squares g, exact if there is one that maps B to B'. δ moves as well, in the layers before the last, but by no
    linear map: that is not followed. Second moments stay, as do the moments of layers whose input has not moved, and
    parameters without a state.

    Args:
        optimizer: as for `check_first_moment_known`.
        x: the samples as for `teleport_mlp`.
        teleport: changes nothing but the model's parameters.

    Returns:
        The report of `teleport`.

    Raises:
        TeleportError: the inputs of a layer that has moved have no full rank (columns of zeros are no obstacle), or are
            too ill-conditioned for the dtype. After it, as after any error, model and state are what they were.
    """
    chain = read_chain(model)
    check_parameters(chain)
    moments = _first_moments(optimizer, chain)
    before = _layer_inputs(chain, x)
    kept: list[Tensor] = [parameter for _, parameter in chain.named_parameters()]
    kept += [moment for layer in moments for moment in (layer.weight, layer.bias) if moment is not None]
    saved = [tensor.detach().clone() for tensor in kept]
    with torch.no_grad():
        try:
            report = teleport()
            if report.accepted:
                _transport(moments, before, _layer_inputs(chain, x), [False, *(k.teleported for k in report.layers)])
        except BaseException:
            torch._foreach_copy_(kept, saved)
            raise
    return report


@dataclass(frozen=True)
class _Moments:
    """The first moments of one weight layer; None where the optimizer has none yet, or the layer no bias."""

    weight: Tensor | None
    bias: Tensor | None


def _first_moments(optimizer: torch.optim.Optimizer, chain: Chain) -> list[_Moments]:
    name = FIRST_MOMENTS[type(optimizer)]

    def moment(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else optimizer.state.get(parameter, {}).get(name)

    return [_Moments(moment(linear.weight), moment(linear.bias)) for linear in chain.linears]


def _layer_inputs(chain: Chain, x: Tensor) -> list[Tensor]:
    """B_0, …, B_m of the model as it stands, in the dtype of the search."""
    flat = check_inputs(chain, x, "x")
    with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
        network = read_network(chain)
        samples = flat.to(network.weights[0].dtype)
        return layer_inputs(network, samples, network.forward(samples))


def _transport(
    moments: Sequence[_Moments], before: Sequence[Tensor], after: Sequence[Tensor], moved: Sequence[bool]
) -> None:
    """Write M' into the moments M of the layers whose input moved, all in one call."""
    old: list[Tensor] = []
    new: list[Tensor] = []
    for index, layer in enumerate(moments):
        if moved[index] and layer.weight is not None:
            old.append(layer.weight)
            new.append(_transported(layer.weight, layer.bias, before[index], after[index], index))
    if old:
        torch._foreach_copy_(old, new)


def _transported(weight: Tensor, bias: Tensor | None, before: Tensor, after: Tensor, layer: int) -> Tensor:
    """M + [M, m_b] [B, 1]⁺ (B' − B)."""
    moment = weight.to(before.dtype)
    extended, columns = moment, before
    if bias is not None:
        extended = torch.cat([moment, bias.to(before.dtype)[:, None]], dim=1)
        columns = append_ones(before)
    return moment + (extended @ _pseudo_inverse(columns, layer)) @ (after - before)


def _pseudo_inverse(inputs: Tensor, layer: int) -> Tensor:
    """H̃⁺ (d̃×n) of the inputs H̃ (n×d̃) of a weight layer; its rows are zero where the columns of H̃ are."""
    live = (inputs != 0).any(0)
    kept = inputs[:, live]
    wide = len(kept) <= kept.shape[1]
    found = pinv_factor(kept if wide else kept.T, bias=False)
    if found.factor is None:
        raise TeleportError(
            f'optimizer_state="transport": the inputs of weight layer {layer + 1} must have full rank on the batch and '
            f"a condition number up to {MAX_CONDITION[inputs.dtype]:g}, got shape {tuple(kept.shape)}, rank "
            f"{found.rank} and condition number {found.condition:.2g}"
        )
    inverse = inputs.new_zeros(inputs.shape[1], len(inputs))
    inverse[live] = found.factor.T if wide else found.factor
    return inverse
