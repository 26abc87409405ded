"""The optimizers of a loop: wrapped, several, subclasses, and gradients that wait for their step."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from networks import make_batch, make_mlp, snapshot, unchanged
from teleports import make_teleporter
from torch import Tensor, nn

from symtele_cuda.optimizers import PendingGradients, kind_of, unwrap

KNOWN = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


@dataclass
class Wrapper:
    optimizer: object


class Inheriting(torch.optim.AdamW):
    pass


class Overriding(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


def make_model(seed: int = 0) -> nn.Sequential:
    return make_mlp([6, 16, 14, 3], "tanh", seed=seed)


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    F.cross_entropy(model(batch[0]), batch[1]).backward()


def test_kinds_go_by_the_step_that_is_inherited():
    parameters = list(make_model().parameters())
    assert kind_of(Inheriting(parameters), KNOWN) is torch.optim.AdamW
    assert kind_of(torch.optim.Adam(parameters), KNOWN) is torch.optim.Adam
    assert kind_of(Overriding(parameters, lr=0.1), KNOWN) is None
    assert kind_of(torch.optim.RMSprop(parameters), KNOWN) is None


def test_wrappers_and_sequences_are_looked_through():
    parameters = list(make_model().parameters())
    first, second = torch.optim.SGD(parameters[:3], lr=0.1), torch.optim.Adam(parameters[3:])
    assert unwrap(first) == (first,)
    assert unwrap([Wrapper(first), Wrapper(Wrapper(second))]) == (first, second)


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (None, TypeError, "a wrapper that holds one in .optimizer, or a sequence of them, got NoneType"),
        (Wrapper(3), TypeError, "got Wrapper"),
        ([], ValueError, "got an empty sequence"),
    ],
)
def test_what_is_no_optimizer(wrong, error, text):
    with pytest.raises(error, match=text):
        unwrap(wrong)


def test_several_optimizers_train_and_teleport_a_model_with_biases():
    """Muon takes matrices only, so the biases have an optimizer of their own."""
    model, batch = make_model().float(), make_batch(12, 6, 3, dtype=torch.float32)
    matrices = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-3, weight_decay=0.0)
    biases = torch.optim.AdamW([p for p in model.parameters() if p.ndim == 1], lr=1e-3)
    options = dict(batch_size=6, holdout_size=6, min_gain=0.0, holdout_tol=math.inf)
    teleporter = make_teleporter(model, [matrices, biases], **options)
    report = teleporter.step(batch, epoch=0)
    assert report is not None and report.accepted and report.objective_after < report.objective_before
    backward(model, batch)
    matrices.step(), biases.step()


def test_each_parameter_is_held_once():
    model = make_model()
    everything = torch.optim.SGD(model.parameters(), lr=0.1)
    biases = torch.optim.SGD([p for p in model.parameters() if p.ndim == 1], lr=0.1)
    with pytest.raises(ValueError, match=r"got several optimizers that hold \['0.bias', '2.bias', '4.bias'\]"):
        make_teleporter(model, [everything, biases])


@pytest.mark.parametrize("change", ["assign", "emptied", "added"])
def test_parameters_that_the_optimizer_no_longer_holds_are_named(change):
    model, batch = make_model(), make_batch(12, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    teleporter = make_teleporter(model, optimizer, batch_size=6, holdout_size=6)
    if change == "assign":
        model.load_state_dict(make_model(1).state_dict(), assign=True)
    elif change == "emptied":
        optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
    else:
        model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"added or replaced later|holds none of them"):
        teleporter.step(batch, epoch=0)
    assert unchanged(model, before) and teleporter.reports == []


# --- gradients that no step has used ------------------------------------------------------------------------------


def test_gradients_are_pending_from_backward_to_step():
    model, batch = make_model(), make_batch(12, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pending = PendingGradients(model, [optimizer])
    for set_to_none in (True, False, True):
        optimizer.zero_grad(set_to_none=set_to_none)
        gc.collect()  # a new gradient may lie where the old one lay
        assert not pending
        backward(model, batch)
        assert pending
        backward(model, batch)
        assert pending
        optimizer.step()
        assert not pending


def test_gradients_from_before_it_was_made_are_used_ones():
    model, batch = make_model(), make_batch(12, 6, 3)
    backward(model, batch)
    pending = PendingGradients(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    assert not pending
    backward(model, batch)
    assert pending


def test_hooks_go_with_the_teleporter():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    teleporter = make_teleporter(model, optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    del teleporter
    gc.collect()
    assert len(optimizer._optimizer_step_post_hooks) == 0


def test_under_accumulation_a_teleport_waits_for_the_next_boundary():
    model, batches = make_model(), [make_batch(4, 6, 3, seed=seed) for seed in range(12)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    teleporter = make_teleporter(model, optimizer, batch_size=4, holdout_size=2, min_gain=0.0)
    teleported = []
    for number, batch in enumerate(batches):
        before = snapshot(model)
        if teleporter.step(batch, epoch=0) is not None:
            teleported.append(number)
        else:
            assert unchanged(model, before)
        backward(model, batch)
        if number % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert teleported == [4, 8]  # two batches make a teleport; from 1 on, gradients of the old weights were waiting


def test_a_skipped_step_of_a_grad_scaler_leaves_gradients_pending():
    model, batch = make_model(), make_batch(12, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    teleporter = make_teleporter(model, optimizer, batch_size=6, holdout_size=6, min_gain=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(F.cross_entropy(model(batch[0]), batch[1])).backward()
    model[0].weight.grad[0, 0] = torch.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)  # finds Inf and steps nowhere
    scaler.update()
    assert teleporter.step(batch, epoch=0) is None
    optimizer.zero_grad()
    assert teleporter.step(batch, epoch=0) is not None


def test_an_epoch_without_a_boundary_is_a_warning():
    model, batch = make_model(), make_batch(12, 6, 3)
    teleporter = make_teleporter(model, torch.optim.SGD(model.parameters(), lr=0.1), batch_size=6, holdout_size=6)
    backward(model, batch)
    assert teleporter.step(batch, epoch=0) is None
    with pytest.warns(UserWarning, match="epoch 0 had gradients that no optimizer step had used"):
        teleporter.step(batch, epoch=1)
