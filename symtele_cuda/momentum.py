"""What becomes of an optimizer's first moments when the weights are teleported: they move as gradients do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import TeleportError
from .kernels.pinv import MAX_CONDITION, append_ones, pinv_factor
from .model.chain import Chain, check_inputs
from .model.problem import begin, layer_inputs, read_network
from .optimizers import holder_of, kind_of
from .report import TeleportReport
from .settings import GL, POSITIVE_DIAGONAL
from .transaction import Transaction

FIRST_MOMENTS: dict[type[torch.optim.Optimizer], str | None] = {
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
    if kind_of(optimizer, FIRST_MOMENTS) is None:
        raise ValueError(
            f"optimizer must be one of {', '.join(known.__name__ for known in FIRST_MOMENTS)} for "
            f'optimizer_state="transport", got {type(optimizer).__name__}'
        )


def with_momentum(
    transaction: Transaction,
    chain: Chain,
    optimizers: Sequence[torch.optim.Optimizer],
    x: Tensor,
    teleport: Callable[[], TeleportReport],
) -> TeleportReport:
    """Run `teleport`, a teleport of `chain` on the samples `x`, and if it is accepted move the first moments with it.

    A weight layer's gradient is δᵀ [B, 1]. Where its input B moved to B' = B gᵀ, the share of the weights becomes
    δᵀ B gᵀ, and so the moment M goes to M gᵀ.

    Of GL the g is the least one, in the sense of ‖g̃ᵀ − I‖_F, that does it on the batch, for g̃ over [B, 1], whose last
    column stays:

        M' = M + [M, m_b] [B, 1]⁺ (B' − B),   m_b' = m_b

    with the moment m_b of the bias; without one [B, 1] is B. This is exact for a moment of gradients on the batch
    itself where the rows of [B, 1] are independent. Where the batch has more samples than [B, 1] has columns, it is the
    least-squares g, exact if there is one that maps B to B'. δ moves as well, in the layers before the last, but by no
    linear map: that is not followed.

    The positive diagonal group acts on every input alike, Y' = Y D on the pre-activations too, so it is followed
    exactly: M' = M D in the layer behind, and as δ becomes δ D⁻¹, M' = D⁻¹ M and m_b' = D⁻¹ m_b in the layer before.
    (A unit with Y = 0 on the whole batch counts as not scaled.)

    Second moments stay, as do parameters without a state.

    Args:
        optimizers: each as for `check_first_moment_known`.
        x: the samples as for `teleport_mlp`.
        teleport: changes nothing but the model's parameters.

    Returns:
        The report of `teleport`.

    Raises:
        TeleportError: the inputs of a layer behind one that GL moved have no full rank, or are too ill-conditioned for
            the dtype. After it, as after any error in the transaction, model and state are what they were.
    """
    begin(transaction, chain)
    moments = _first_moments(optimizers, chain)
    before = _observe(chain, x)
    report = teleport()
    if report.accepted:
        _transport(transaction, moments, before, _observe(chain, x), [layer.group for layer in report.layers])
    return report


@dataclass(frozen=True)
class _Moments:
    """The first moments of one weight layer; None where the optimizer has none yet, or the layer no bias."""

    weight: Tensor | None
    bias: Tensor | None


def _first_moments(optimizers: Sequence[torch.optim.Optimizer], chain: Chain) -> list[_Moments]:
    holders = holder_of(optimizers)

    def moment(parameter: Tensor | None) -> Tensor | None:
        if parameter is None or id(parameter) not in holders:
            return None
        optimizer, _ = holders[id(parameter)]
        kind = kind_of(optimizer, FIRST_MOMENTS)
        assert kind is not None
        return optimizer.state.get(parameter, {}).get(FIRST_MOMENTS[kind])

    return [_Moments(moment(linear.weight), moment(linear.bias)) for linear in chain.linears]


@dataclass(frozen=True)
class _Activations:
    """B_0, …, B_m and Y_0, …, Y_m of the model on the samples, in the dtype of the search."""

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]


def _observe(chain: Chain, x: Tensor) -> _Activations:
    network = read_network(chain)
    samples = check_inputs(chain, x, "x").to(network.weights[0].dtype)
    outputs = network.forward(samples)
    return _Activations(layer_inputs(network, samples, outputs), outputs)


def _transport(
    transaction: Transaction,
    moments: Sequence[_Moments],
    before: _Activations,
    after: _Activations,
    groups: Sequence[str | None],
) -> None:
    """Write the new moments into the old ones; groups: what has moved the hidden layers."""
    moved = list(moments)
    for index, group in enumerate(groups):
        behind = index + 1
        if group == GL:
            moved[behind] = _mapped(moved[behind], before.inputs[behind], after.inputs[behind], behind)
        elif group == POSITIVE_DIAGONAL:
            scales = _scales(before.outputs[index], after.outputs[index])
            moved[index], moved[behind] = _scaled(moved[index], moved[behind], scales)
    changed = [(old, new) for pair in zip(moments, moved, strict=True) for old, new in _replaced(*pair)]
    if changed:
        transaction.write([old for old, _ in changed], [new for _, new in changed])


def _replaced(old: _Moments, new: _Moments) -> list[tuple[Tensor, Tensor]]:
    """The moments for which there are new ones, and these."""
    pairs = ((old.weight, new.weight), (old.bias, new.bias))
    return [(was, now) for was, now in pairs if was is not None and now is not None and was is not now]


def _mapped(moments: _Moments, before: Tensor, after: Tensor, layer: int) -> _Moments:
    """M + [M, m_b] [B, 1]⁺ (B' − B) for the inputs B of weight layer `layer` (0-based)."""
    if moments.weight is None:
        return moments
    weight = moments.weight.to(before.dtype)
    extended, columns = weight, before
    if moments.bias is not None:
        extended = torch.cat([weight, moments.bias.to(before.dtype)[:, None]], dim=1)
        columns = append_ones(before)
    return replace(moments, weight=weight + (extended @ _pseudo_inverse(columns, layer)) @ (after - before))


def _pseudo_inverse(inputs: Tensor, layer: int) -> Tensor:
    """H̃⁺ (d̃×n) of the inputs H̃ (n×d̃) of a weight layer, as P(H̃)ᵀ or, of more rows than columns, as P(H̃ᵀ)."""
    wide = len(inputs) <= inputs.shape[1]
    found = pinv_factor(inputs if wide else inputs.T, bias=False)
    if found.factor is None:
        raise TeleportError(
            f'optimizer_state="transport": the inputs of weight layer {layer + 1} must have full rank on the batch and '
            f"a condition number up to {MAX_CONDITION[inputs.dtype]:g}, got shape {tuple(inputs.shape)}, rank "
            f"{found.rank} and condition number {found.condition:.2g}"
        )
    return found.factor.T if wide else found.factor


def _scales(before: Tensor, after: Tensor) -> Tensor:
    """The diagonal of D in Y' = Y D, by least squares; 1 where a column of Y is zero."""
    squares = before.square().sum(0)
    return torch.where(squares == 0, 1.0, (before * after).sum(0) / squares)


def _scaled(producing: _Moments, behind: _Moments, scales: Tensor) -> tuple[_Moments, _Moments]:
    """D⁻¹ [M, m_b] of the layer that produces the scaled activations, and M D of the layer behind them."""
    weight, bias = producing.weight, producing.bias
    return (
        _Moments(
            None if weight is None else weight / scales[:, None],
            None if bias is None else bias / scales,
        ),
        replace(behind, weight=None if behind.weight is None else behind.weight * scales),
    )
