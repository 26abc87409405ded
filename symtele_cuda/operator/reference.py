"""The plain-torch twin of the operator: the formulas as they are written, differentiated by autograd.

It is the oracle of the tests and takes no care of speed: the pseudo-inverse is an SVD in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import Activation


def teleport_layer(
    weight: Tensor, inputs: Tensor, g: Tensor, bias: Tensor | None, activation: Activation, action: str
) -> tuple[Tensor, Tensor | None]:
    """[W', b'] = [R, r] + (Y − H Rᵀ − r)ᵀ P with Z = H Wᵀ + b, Y = σ⁻¹(σ(Z) gᵀ), P = ([H, 1]⁺)ᵀ.

    R, r = W, b for action="least_change" and 0, 0 for action="paper" (Zhao et al. 2022, eq. 8). Without bias b, r and
    the column of ones are absent. Differentiable any number of times in weight, g and bias; inputs are data.

    Args:
        weight: W (d_out×d_in).
        inputs: H (n×d_in), n ≤ d_in + 1 (n ≤ d_in without bias), [H, 1] of full row rank.
        g: d_out×d_out.
        bias: b (d_out) or None.
        activation: σ.
        action: "least_change" or "paper".

    Returns:
        W' (d_out×d_in) and b' (d_out), None without bias.
    """
    inputs = inputs.detach()
    ones = inputs.new_ones(len(inputs), 1)
    offset = torch.zeros_like(weight[:, 0]) if bias is None else bias
    extended = inputs if bias is None else torch.cat([inputs, ones], dim=1)
    factor = torch.linalg.pinv(extended.double()).T.to(inputs.dtype)

    z = inputs @ weight.T + offset
    y = activation.inverse(activation.forward(z) @ g.T)
    reference, reference_offset = _reference(weight, offset, action)
    change = (y - inputs @ reference.T - reference_offset).T @ factor

    columns = weight.shape[1]
    new_weight = reference + change[:, :columns]
    return new_weight, None if bias is None else reference_offset + change[:, columns]


def _reference(weight: Tensor, offset: Tensor, action: str) -> tuple[Tensor, Tensor]:
    if action == "least_change":
        return weight, offset
    if action == "paper":
        return torch.zeros_like(weight), torch.zeros_like(offset)
    raise ValueError(f"action must be 'least_change' or 'paper', got {action!r}")
