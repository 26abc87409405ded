"""The twin against what the formula promises, and against the formula written out another way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from symtele_cuda.activations import ELU, LeakyReLU, Sigmoid, Tanh
from symtele_cuda.operator.reference import teleport_layer

ACTIVATIONS = [LeakyReLU(0.1), Tanh(), Sigmoid(), ELU(0.5)]
ACTIONS = ["least_change", "paper"]


def layer(n: int = 4, d_in: int = 6, d_out: int = 3, bias: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(s, d_in, generator=generator, dtype=torch.float64) / 2 for s in (d_out, n))
    # Positive with row sums below one: B = σ(Z) gᵀ stays in every domain.
    g = 0.6 * torch.eye(d_out, dtype=torch.float64) + 0.1 * torch.rand(d_out, d_out, generator=generator).double()
    offset = torch.randn(d_out, generator=generator, dtype=torch.float64) / 2
    return weight, inputs, g, offset if bias else None


def activations_of(weight: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(inputs, weight, bias)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_new_layer_gives_the_moved_activations(activation, action: str, bias: bool) -> None:
    weight, inputs, g, offset = layer(bias=bias)
    new_weight, new_bias = teleport_layer(weight, inputs, g, offset, activation, action)
    moved = activation.forward(activations_of(weight, inputs, offset)) @ g.T
    assert (new_bias is None) == (offset is None)
    torch.testing.assert_close(
        activation.forward(activations_of(new_weight, inputs, new_bias)), moved, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("bias", [False, True])
def test_least_change_is_the_smallest_change(bias: bool) -> None:
    """The change of [W, b] has no component orthogonal to the batch: any other solution adds one."""
    weight, inputs, g, offset = layer(bias=bias)
    new_weight, new_bias = teleport_layer(weight, inputs, g, offset, Tanh(), "least_change")
    change, batch = new_weight - weight, inputs
    if new_bias is not None and offset is not None:
        change = torch.cat([change, (new_bias - offset).unsqueeze(1)], dim=1)
        batch = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    onto_batch = torch.linalg.pinv(batch) @ batch
    torch.testing.assert_close(change @ onto_batch, change, rtol=1e-12, atol=1e-12)


def test_paper_is_the_published_formula() -> None:
    """W' = σ⁻¹(g σ(W h)) h⁺ with h = Hᵀ, one sample a column (Zhao et al. 2022, eq. 8)."""
    weight, inputs, g, _ = layer(bias=False)
    h = inputs.T
    expected = torch.atanh(g @ torch.tanh(weight @ h)) @ torch.linalg.pinv(h)
    new_weight, _ = teleport_layer(weight, inputs, g, None, Tanh(), "paper")
    torch.testing.assert_close(new_weight, expected, rtol=1e-12, atol=1e-12)


def test_paper_projects_at_the_identity_and_least_change_does_not() -> None:
    weight, inputs, g, _ = layer(bias=False)
    identity = torch.eye(len(g), dtype=torch.float64)
    projected = weight @ torch.linalg.pinv(inputs) @ inputs
    by_paper, _ = teleport_layer(weight, inputs, identity, None, LeakyReLU(), "paper")
    by_least_change, _ = teleport_layer(weight, inputs, identity, None, LeakyReLU(), "least_change")
    torch.testing.assert_close(by_paper, projected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(by_least_change, weight, rtol=1e-12, atol=1e-12)
    assert (by_paper - weight).norm() > 0.1 * weight.norm()


@pytest.mark.parametrize("action", ACTIONS)
def test_inputs_are_data(action: str) -> None:
    weight, inputs, g, offset = layer()
    inputs.requires_grad_()
    g.requires_grad_()
    new_weight, _ = teleport_layer(weight, inputs, g, offset, Tanh(), action)
    by_inputs, by_g = torch.autograd.grad(new_weight.sum(), (inputs, g), allow_unused=True)
    assert by_inputs is None
    assert by_g.abs().sum() > 0


def test_unknown_action() -> None:
    weight, inputs, g, offset = layer()
    with pytest.raises(ValueError, match="action must be 'least_change' or 'paper', got 'least'"):
        teleport_layer(weight, inputs, g, offset, Tanh(), "least")
