"""What README and docs/search.md say that a teleport does not keep: each is seen to change, where the outputs stay."""

from __future__ import annotations

import torch
from models import CASES, Model, behind_tanh
from teleports import make_teleporter, teleport_mlp
from torch import Tensor, nn

BATCH = CASES["SELU"].batch()


def teleported(model: nn.Module, part: nn.Module | None = None) -> None:
    """Teleport the model, or a part that gets the same input, and see that its outputs on the batch stay."""
    moved = part or model
    before = moved(BATCH[0]).detach()
    assert teleport_mlp(moved, BATCH, steps=3).accepted
    torch.testing.assert_close(moved(BATCH[0]).detach(), before, rtol=1e-8, atol=1e-8)


def test_another_head_on_the_trunk_moves_unless_both_are_one_linear() -> None:
    model = behind_tanh(lambda m, z: z)
    head = nn.Linear(14, 2).double()

    def other_outputs(x: Tensor) -> Tensor:
        return head(torch.tanh(model.b(torch.tanh(model.a(x))))).detach()

    before = other_outputs(BATCH[0])
    teleported(model)
    assert (other_outputs(BATCH[0]) - before).abs().max() > 1e-3

    both = behind_tanh(lambda m, z: z, outputs=6)  # four outputs of one head, two of the other
    teleported(both)


def test_weights_that_were_pruned_are_zero_no_more() -> None:
    model = behind_tanh(lambda m, z: z)
    zero = model.b.weight.abs() < model.b.weight.abs().median()
    with torch.no_grad():
        model.b.weight[zero] = 0.0
    teleported(model)
    assert not bool((model.b.weight[zero] == 0).any())


def test_derivatives_with_respect_to_the_input_change() -> None:
    def slopes(model: Model) -> Tensor:
        x = BATCH[0].clone().requires_grad_()
        return torch.autograd.grad(model(x).sum(), x)[0]

    model = behind_tanh(lambda m, z: z)
    before = slopes(model)
    teleported(model)
    assert (slopes(model) - before).norm() > 1e-3 * before.norm()


def test_lbfgs_takes_a_rate_and_a_reset() -> None:
    """It keeps differences of gradients at the old weights, which "reset" empties; its own step is not read."""
    model, (x, y) = behind_tanh(lambda m, z: z), BATCH
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    options = {"batch_size": len(x), "holdout_size": 0, "optimizer_state": "reset", "min_gain": 0.0}
    teleporter = make_teleporter(model, optimizer, lr=0.1, **options)
    optimizer.step(closure)
    assert any("old_dirs" in state for state in optimizer.state.values())
    report = teleporter.step((x, y), epoch=0)
    assert report is not None and report.accepted
    assert not any("old_dirs" in state for state in optimizer.state.values())
    before = closure().item()
    optimizer.step(closure)
    assert closure().item() < before


def test_the_slope_of_a_prelu_is_not_moved_and_not_counted() -> None:
    model = CASES["PReLU"].make()
    x, y = BATCH
    loss = nn.functional.cross_entropy(model(x), y)
    own = [parameter for name, parameter in model.named_parameters() if name != "act.weight"]
    gradients = torch.autograd.grad(loss, own)
    report = teleport_mlp(model, (x, y), steps=2)
    whole = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
    assert abs(report.grad_norm_before - whole) < 1e-12 * whole
    assert model.act.weight.tolist() == [0.25]
