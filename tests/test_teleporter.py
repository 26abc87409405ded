"""Teleporter: what it gathers, when it teleports, what becomes of the optimizer, and that a resumed run is the same."""

from __future__ import annotations

import copy
import functools
import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import snapshot, unchanged
from teleports import make_teleporter as in_loop
from teleports import teleport_mlp
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import symtele_cuda as st
from symtele_cuda.model.reader import read_chain
from symtele_cuda.model.samples import matched_samples
from symtele_cuda.teleporter import Batch

EVERY_EPOCH = st.Schedule(epochs=range(10), teleports_per_epoch=100)
# A step on so many samples is then what `teleport_mlp` does on them by its own defaults.
AS_MLP = {
    "holdout_size": 0,
    "holdout_tol": 0.05,
    "layers": None,
    "margin": 4.0,
    "min_gain": 0.0,
    "steps": 10,
    "first_radius": 0.02,
    "max_weight_change": math.inf,
    "max_sensitivity": math.inf,
}


def make_model(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 16, bias), nn.LeakyReLU(0.1), nn.Linear(16, 12, bias), nn.Tanh(), nn.Linear(12, 3, bias))
    return nn.Sequential(*layers).double()


def make_batches(count: int, size: int = 4, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 6, generator=generator, dtype=torch.float64), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def make_sgd(model: nn.Module, lr: float = 0.05, **options: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def make_teleporter(model: nn.Module, **options: object) -> st.Teleporter:
    return in_loop(model, make_sgd(model), **{"schedule": EVERY_EPOCH, "batch_size": 6, **AS_MLP, **options})


def join(batches: list[Batch], size: int | None = None) -> Batch:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs)[:size], torch.cat(targets)[:size]


def assert_same_parameters(model: nn.Module, expected: nn.Module) -> None:
    for (name, got), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(got, wanted), name


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def loss_and_gradient_norm(model: nn.Module, batch: Batch) -> tuple[float, float]:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), math.hypot(*(gradient.norm().item() for gradient in gradients))


# --- gathering and schedule ---------------------------------------------------------------------------------------


def test_teleports_on_exactly_batch_size_samples_of_successive_batches() -> None:
    model, batches = make_model(), make_batches(4)
    expected = copy.deepcopy(model)
    teleporter = make_teleporter(model)
    reports = [teleporter.step(batch, epoch=0) for batch in batches]
    assert [report is not None for report in reports] == [False, True, False, True]
    assert [report.layers[0].n for report in teleporter.reports] == [6, 6]
    assert all(report.accepted for report in teleporter.reports)
    teleport_mlp(expected, join(batches[:2], 6), objective="lookahead", lr=0.05)
    teleport_mlp(expected, join(batches[2:], 6), objective="lookahead", lr=0.05)
    assert_same_parameters(model, expected)


def test_one_large_batch_is_enough() -> None:
    model, (batch,) = make_model(), make_batches(1)
    expected = copy.deepcopy(model)
    report = make_teleporter(model, batch_size=3).step(batch, epoch=0)
    teleport_mlp(expected, (batch[0][:3], batch[1][:3]), objective="lookahead", lr=0.05)
    assert report is not None
    assert report.layers[0].n == 3
    assert_same_parameters(model, expected)


def test_gathered_samples_are_copies() -> None:
    model, batches = make_model(), make_batches(2)
    expected, wanted = copy.deepcopy(model), join(batches, 6)
    teleporter = make_teleporter(model)
    buffer_x, buffer_y = batches[0][0].clone(), batches[0][1].clone()
    for x, y in batches:
        teleporter.step((buffer_x.copy_(x), buffer_y.copy_(y)), epoch=0)
    teleport_mlp(expected, wanted, objective="lookahead", lr=0.05)
    assert_same_parameters(model, expected)


def test_schedule_and_leftovers() -> None:
    model = make_model()
    teleporter = make_teleporter(model, schedule=st.Schedule(epochs=[3, 1], teleports_per_epoch=2))
    teleported = {
        epoch: [teleporter.step(batch, epoch=epoch) is not None for batch in make_batches(5, seed=epoch)]
        for epoch in (0, 1, 2, 3)
    }
    none, two = [False] * 5, [False, True, False, True, False]
    assert teleported == {0: none, 1: two, 2: none, 3: two}


def test_leftovers_are_dropped_at_an_epochs_end() -> None:
    model, (old, first, second) = make_model(), make_batches(3)
    expected = copy.deepcopy(model)
    teleporter = make_teleporter(model)
    assert teleporter.step(old, epoch=0) is None
    assert teleporter.step(first, epoch=1) is None
    assert teleporter.step(second, epoch=1) is not None
    teleport_mlp(expected, join([first, second], 6), objective="lookahead", lr=0.05)
    assert_same_parameters(model, expected)


def test_other_epochs_do_not_even_look_at_the_batch() -> None:
    teleporter = make_teleporter(make_model(), schedule=st.Schedule(epochs=[1]))
    assert teleporter.step("no batch", epoch=0) is None  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="batch must be a pair"):
        teleporter.step("no batch", epoch=1)  # type: ignore[arg-type]


def test_images_are_gathered_in_their_own_shape() -> None:
    flat, model = make_model(), nn.Sequential(nn.Flatten(), *make_model())
    batches = make_batches(2)
    shapes = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        shapes.append(tuple(outputs.shape))
        return F.cross_entropy(outputs, targets)

    teleporter, reference = make_teleporter(model, loss_fn=loss_fn), make_teleporter(flat, loss_fn=F.cross_entropy)
    for x, y in batches:
        teleporter.step((x.view(-1, 1, 2, 3), y), epoch=0)
        reference.step((x, y), epoch=0)
    assert set(shapes) == {(6, 3)}
    assert_same_parameters(model, flat)


def test_schedule_keeps_epochs_sorted_and_once() -> None:
    assert st.Schedule(epochs=[4, 1, 4]).epochs == (1, 4)
    assert st.Schedule(epochs=range(2)) == st.Schedule(epochs=(0, 1), teleports_per_epoch=1)


# --- batch_size="auto" --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "layers", "most"),
    [(True, None, 7), (False, None, 6), (True, [2], 17), (False, [2], 16), (True, [1, 2], 7)],
)
def test_auto_gathers_what_the_widths_allow(bias: bool, layers: list[int] | None, most: int) -> None:
    model = make_model(bias)
    teleporter = make_teleporter(model, batch_size="auto", layers=layers)
    batches = make_batches(most, size=1)
    expected = copy.deepcopy(model)
    chosen = matched_samples(model, join(batches)[0], layers)
    reports = [teleporter.step(batch, epoch=0) for batch in batches]
    assert [report is not None for report in reports] == [False] * (most - 1) + [True]
    assert reports[-1].layers[0].n == len(chosen)
    x, y = join(batches)
    teleport_mlp(expected, (x[chosen], y[chosen]), objective="lookahead", lr=0.05, layers=layers)
    assert_same_parameters(model, expected)


def test_auto_gathers_at_most_200() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 256), nn.LeakyReLU(0.1), nn.Linear(256, 3))
    x, y = torch.randn(201, 300, generator=torch.Generator().manual_seed(1)), torch.zeros(201, dtype=torch.int64)
    teleporter = make_teleporter(model, batch_size="auto", steps=1)
    assert teleporter.step((x[:199], y[:199]), epoch=0) is None
    report = teleporter.step((x[199:], y[199:]), epoch=0)
    assert report is not None
    assert report.layers[0].n == len(matched_samples(model, x[:200])) <= 200


@pytest.mark.parametrize("copied", [1, 5])
def test_auto_leaves_out_samples_that_repeat(copied: int) -> None:
    (x, y), model = join(make_batches(2), 7), make_model()
    others = [row for row in range(7) if row != copied]
    x[copied] = x[0]
    expected = copy.deepcopy(model)
    report = make_teleporter(model, batch_size="auto").step((x, y), epoch=0)
    assert report is not None
    assert (report.layers[0].n, report.layers[0].rank) == (6, 6)
    teleport_mlp(expected, (x[others], y[others]), objective="lookahead", lr=0.05)
    assert_same_parameters(model, expected)


def test_auto_chooses_no_samples_where_the_step_ahead_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(*_: object) -> Tensor:
        raise AssertionError("samples were chosen")

    monkeypatch.setattr("symtele_cuda.teleporter.choose_samples", choose)
    model, batch = make_model(), join(make_batches(2), 7)
    loss, norm = loss_and_gradient_norm(model, batch)
    ahead, expected = copy.deepcopy(model), copy.deepcopy(model)
    optimizer_step(ahead, torch.optim.SGD(ahead.parameters(), lr=4.0 * 20.0), batch)
    options = {**AS_MLP, "min_gain": 2.0, "batch_size": "auto"}
    report = in_loop(model, make_sgd(model, lr=20.0), schedule=EVERY_EPOCH, **options).step(batch, epoch=0)
    assert report is not None and not report.accepted and "does not lower" in report.reason
    assert (report.loss_before, report.loss_after) == (pytest.approx(loss), report.loss_before)
    assert (report.grad_norm_before, report.grad_norm_after) == (pytest.approx(norm), report.grad_norm_before)
    assert report.objective_before == pytest.approx(loss_and_gradient_norm(ahead, batch)[0])
    assert report.objective_before > loss
    assert [(r.n, r.width, r.rank, r.teleported, r.reason) for r in report.layers] == [
        (7, 16, None, False, "no search"),
        (7, 12, None, False, "no search"),
    ]
    assert str(report) and report.seconds > 0
    assert_same_parameters(model, expected)


def test_auto_asks_muon_for_its_rate_on_all_that_was_gathered() -> None:
    model, (x, y) = make_model(bias=False), join(make_batches(2), 6)
    x[5] = x[0]
    optimizer, expected = torch.optim.Muon(model.parameters(), lr=0.01), copy.deepcopy(model)
    _, norm = loss_and_gradient_norm(model, (x, y))
    length = 0.01 * math.hypot(*(s * r**0.5 for s, r in (((16 / 6) ** 0.5, 6), (1.0, 12), (1.0, 3))))
    options = {**AS_MLP, "batch_size": "auto"}
    report = in_loop(model, optimizer, schedule=EVERY_EPOCH, **options).step((x, y), epoch=0)
    assert report is not None and report.accepted and report.layers[0].n == 5
    teleport_mlp(expected, (x[:5], y[:5]), objective="lookahead", lr=length / norm)
    for got, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, other, rtol=1e-6, atol=1e-8)


def test_auto_without_an_independent_sample_is_an_error() -> None:
    model = make_model(bias=False)
    with pytest.raises(st.TeleportError, match="x: expected a sample that is finite and not zero"):
        make_teleporter(model, batch_size="auto").step((torch.zeros(6, 6).double(), torch.zeros(6).long()), epoch=0)


# --- layers="last" ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activations", "options", "moved"),
    [
        ([nn.LeakyReLU(0.1), nn.Tanh()], {}, [2]),
        ([nn.LeakyReLU(0.1), nn.ReLU()], {}, [1]),
        ([nn.LeakyReLU(0.1), nn.ReLU()], {"group": "positive_diagonal"}, [1, 2]),
    ],
)
def test_by_default_gl_moves_the_last_hidden_layer_that_it_can(
    activations: list[nn.Module], options: dict[str, str], moved: list[int]
) -> None:
    torch.manual_seed(0)
    linears = (nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3))
    model = nn.Sequential(linears[0], activations[0], linears[1], activations[1], linears[2]).double()
    (batch,) = make_batches(1, size=6)
    teleporter = in_loop(model, make_sgd(model), batch_size=6, holdout_size=0, min_gain=0.0, **options)
    report = teleporter.step(batch, epoch=0)
    assert report is not None and report.accepted
    assert [layer.index for layer in report.layers if layer.teleported] == moved


@pytest.mark.parametrize(
    ("lr", "accepted", "reason"), [(0.01, True, "all steps taken"), (20.0, False, "does not lower")]
)
def test_by_default_the_run_goes_on_untouched_where_the_rate_is_no_smaller_than_it_should_be(lr, accepted, reason):
    model, (batch,) = make_model(), make_batches(1, size=6)
    before = copy.deepcopy(model)
    options = dict(batch_size=6, holdout_size=0, first_radius=0.2)
    report = in_loop(model, make_sgd(model, lr=lr), **options).step(batch, epoch=0)
    assert report is not None and report.accepted == accepted and reason in report.reason
    if not accepted:
        assert_same_parameters(model, before)


def test_by_default_the_inputs_of_layers_that_stay_do_not_limit_the_batch() -> None:
    model, batches = make_model(), make_batches(17, size=1)
    teleporter = in_loop(model, make_sgd(model), schedule=EVERY_EPOCH, holdout_size=0)
    reports = [teleporter.step(batch, epoch=0) for batch in batches]  # 16 columns and that of the bias; 7 in layer 1
    assert [report is not None for report in reports] == [False] * 16 + [True]


NEVER: dict[str, tuple[Callable[[nn.Sequential], object], dict[str, Any], str]] = {
    "no inverse": (lambda m: m.__setitem__(1, nn.ReLU()), {"layers": [1]}, "hidden layer 1: relu has no inverse"),
    "too narrow": (lambda m: None, {"batch_size": 18}, "hidden layer 2: 18 samples cannot be independent in .* 17"),
    "frozen": (lambda m: m[2].requires_grad_(False), {}, "hidden layer 1: it would change '2.weight', which is frozen"),
    "not homogeneous": (
        lambda m: [m.__setitem__(place, nn.Tanh()) for place in (1, 3)],
        {"group": "positive_diagonal"},
        "hidden layer 2: tanh is not positively homogeneous",
    ),
}


@pytest.mark.parametrize("name", NEVER)
def test_a_teleporter_that_can_never_teleport_says_so_when_it_is_made(name: str) -> None:
    change, options, text = NEVER[name]
    model = make_model()
    change(model)
    with pytest.raises(ValueError, match=f"model can never be teleported .*{text}"):
        in_loop(model, make_sgd(model), **{"layers": None, "batch_size": 4, "holdout_size": 0, **options})


def test_the_model_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr("symtele_cuda.teleporter.read_chain", lambda model: (read.append(1), read_chain(model))[1])
    model = make_model()
    teleporter = make_teleporter(model)
    for batch in make_batches(6):
        teleporter.step(batch, epoch=0)
        optimizer_step(model, teleporter.optimizer, batch)
    assert len(teleporter.reports) > 0 and len(read) == 1
    model.train(not model.training)  # what a forward does may depend on it
    teleporter.step(make_batches(1)[0], epoch=1)
    assert len(read) == 2


CHANGES: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "activation": (lambda m: m.__setitem__(1, nn.Tanh()), "got tanh behind '0' in the place of leaky_relu behind '0'"),
    "width": (
        lambda m: [m.__setitem__(0, nn.Linear(6, 15).double()), m.__setitem__(2, nn.Linear(15, 12).double())],
        "got '0', a Linear from 6 to 15 in the place of '0', a Linear from 6 to 16",
    ),
    "one layer less": (
        lambda m: [m.__setitem__(2, nn.Linear(16, 3).double()), m.pop(4), m.pop(3)],
        "got '2', a Linear from 16 to 3 in the place of '2', a Linear from 16 to 12",
    ),
    "a hook": (lambda m: m[0].register_forward_hook(lambda *_: None), "expected no forward hooks"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_later_change_of_the_models_structure_is_named(name: str) -> None:
    change, text = CHANGES[name]
    model = make_model()
    optimizer = make_sgd(model)
    teleporter = in_loop(model, optimizer, batch_size=4)
    change(model)
    optimizer.add_param_group({"params": [p for p in model.parameters() if not any(p is q for q in held(optimizer))]})
    with pytest.raises(ValueError, match=re.escape(text)):
        teleporter.step(make_batches(1)[0], epoch=0)


def held(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def test_one_of_several_ranks_refuses() -> None:
    """Their weights would drift apart, and DistributedDataParallel would not say so."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ValueError, match=r"got a process group of 2 ranks: .* their weights would drift apart"):
            make_teleporter(make_model())
    finally:
        torch.distributed.destroy_process_group()
    make_teleporter(make_model())


def test_an_epoch_that_goes_backwards_is_an_error() -> None:
    teleporter = make_teleporter(make_model())
    teleporter.step(make_batches(1)[0], epoch=3)
    with pytest.raises(
        ValueError, match=r"epoch must not go backwards, got 2 after 3: a new run takes a new Teleporter"
    ):
        teleporter.step(make_batches(1)[0], epoch=2)


def test_it_says_what_it_will_do() -> None:
    teleporter = make_teleporter(make_model())
    assert repr(teleporter).startswith("Teleporter(") and "so far 0 of 0 accepted" in repr(teleporter)
    for batch in make_batches(6):
        teleporter.step(batch, epoch=0)
    made = len(teleporter.reports)
    assert made > 0 and f"of {made} accepted" in repr(teleporter)


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_teleport_that_fails_is_an_error_or_a_warning(on_error: str) -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ArithmeticError("no loss today")

    model = make_model()
    before = snapshot(model)
    options = dict(batch_size=4, holdout_size=0, schedule=st.Schedule([0], 2))
    teleporter = in_loop(model, make_sgd(model), loss_fn, on_error=on_error, **options)
    for batch in make_batches(2):
        if on_error == "raise":
            with pytest.raises(ArithmeticError, match="no loss today"):
                teleporter.step(batch, epoch=0)
        else:
            with pytest.warns(UserWarning, match="a teleport failed, ArithmeticError: no loss today"):
                assert teleporter.step(batch, epoch=0) is None
    assert unchanged(model, before) and teleporter.reports == []
    assert teleporter.state_dict()["done"] == (0 if on_error == "raise" else 2)


# --- a holdout from the stream ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [6, "auto"])
def test_the_holdout_is_what_comes_behind_the_teleports_samples(batch_size: int | str) -> None:
    model, batches = make_model(), make_batches(3)
    teleporter = make_teleporter(model, batch_size=batch_size, holdout_size=5)
    own = 6 if batch_size == 6 else 7
    x, y = join(batches)
    chosen = slice(own) if batch_size == 6 else matched_samples(model, x[:own])
    expected, held = copy.deepcopy(model), (x[own : own + 5], y[own : own + 5])
    reports = [teleporter.step(batch, epoch=0) for batch in batches]
    assert [report is not None for report in reports] == [False, False, True]
    wanted = teleport_mlp(expected, (x[chosen], y[chosen]), objective="lookahead", lr=0.05, holdout=held)
    assert without_time([reports[-1]]) == without_time([wanted])
    assert wanted.holdout_before is not None
    assert_same_parameters(model, expected)


def test_by_default_the_holdout_is_of_200_samples_unless_one_is_given() -> None:
    batch = make_batches(1, size=206)[0]
    for options, size in (({}, 206), ({"holdout": (X, Y)}, 6)):
        teleporter = make_teleporter(make_model(), **({"holdout_size": "auto"} | options))
        assert teleporter.step((batch[0][: size - 1], batch[1][: size - 1]), epoch=0) is None
        report = teleporter.step((batch[0][size - 1 : size], batch[1][size - 1 : size]), epoch=0)
        assert report is not None and report.layers[0].n == 6 and report.holdout_before is not None


def test_an_epoch_with_too_few_samples_is_spoken_of() -> None:
    teleporter = make_teleporter(make_model(), holdout_size=3)
    for batch in make_batches(2):
        assert teleporter.step(batch, epoch=0) is None
    with pytest.warns(
        UserWarning, match="epoch 0 had 8 samples, fewer than the 6 of a teleport and the 3 of its holdout"
    ):
        teleporter.step(make_batches(1)[0], epoch=1)
    assert teleporter.reports == []


def test_the_holdout_from_the_stream_guards() -> None:
    batches, tolerances = make_batches(5), (0.0, float("inf"))
    strict, free = (
        make_teleporter(make_model(), holdout_size=12, holdout_tol=tolerance, steps=20) for tolerance in tolerances
    )
    for batch in batches:
        reports = [teleporter.step(batch, epoch=0) for teleporter in (strict, free)]
    guarded, unguarded = reports
    assert guarded is not None and unguarded is not None
    assert guarded.holdout_after <= guarded.holdout_before < unguarded.holdout_after


# --- resuming -----------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], dict[str, float]]] = {
    "momentum": (lambda model: make_sgd(model, momentum=0.9), {}),
    "adam": (lambda model: torch.optim.Adam(model.parameters(), lr=1e-2), {"lr": 0.1}),
    "own step": (lambda model: torch.optim.Adam(model.parameters(), lr=1e-3), {"holdout_size": 2}),
}
RESUMED = st.Schedule(epochs=[1, 2], teleports_per_epoch=2)
STEPS_PER_EPOCH = 9  # three batches a teleport: a third teleport would fit
LAST = 3 * STEPS_PER_EPOCH


class Run:
    """A training run of three epochs that can stop at any iteration and go on from what it saved."""

    def __init__(self, optimizer: str, optimizer_state: str) -> None:
        make_optimizer, options = OPTIMIZERS[optimizer]
        self.model = make_model()
        self.optimizer = make_optimizer(self.model)
        self.teleporter = in_loop(
            self.model,
            self.optimizer,
            schedule=RESUMED,
            batch_size=9,
            optimizer_state=optimizer_state,
            **(AS_MLP | options),
        )

    def train(self, start: int, stop: int) -> None:
        batches = make_batches(LAST)
        for iteration in range(start, stop):
            self.teleporter.step(batches[iteration], epoch=iteration // STEPS_PER_EPOCH)
            optimizer_step(self.model, self.optimizer, batches[iteration])

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (self.model, self.optimizer, self.teleporter)], file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        states = torch.load(io.BytesIO(saved), weights_only=True)
        for part, state in zip((self.model, self.optimizer, self.teleporter), states, strict=True):
            part.load_state_dict(state)


def without_time(reports: list[st.TeleportReport]) -> list[st.TeleportReport]:
    return [replace(report, seconds=0.0) for report in reports]


@functools.cache
def uninterrupted(optimizer: str, optimizer_state: str) -> Run:
    run = Run(optimizer, optimizer_state)
    run.train(0, LAST)
    return run


@functools.cache
def saving(optimizer: str, optimizer_state: str) -> tuple[Run, dict[int, bytes]]:
    """A run to the end that saves itself at every one of `STOPS`, and what it saved."""
    run, saved = Run(optimizer, optimizer_state), {}
    for start, stop in pairwise((0, *STOPS)):
        run.train(start, stop)
        saved[stop] = run.save()
    run.train(STOPS[-1], LAST)
    return run, saved


# Teleports happen at iterations 11, 14, 20 and 23: stop before, while gathering, right after one, behind the last.
STOPS = (3, 10, 11, 12, 13, 15, 18, 22, 25)


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("optimizer_state", ["keep", "reset"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_run_is_the_uninterrupted_run(optimizer: str, optimizer_state: str, stop: int) -> None:
    whole = uninterrupted(optimizer, optimizer_state)
    assert len(whole.teleporter.reports) == 4
    assert any(report.accepted for report in whole.teleporter.reports)

    interrupted, saved = saving(optimizer, optimizer_state)
    resumed = Run(optimizer, optimizer_state)
    resumed.load(saved[stop])
    resumed.train(stop, LAST)

    for run in (interrupted, resumed):
        assert_same_parameters(run.model, whole.model)
        assert without_time(run.teleporter.reports) == without_time(whole.teleporter.reports)
        for parameter, wanted in zip(run.model.parameters(), whole.model.parameters(), strict=True):
            state, expected = run.optimizer.state[parameter], whole.optimizer.state[wanted]
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], expected[key]) for key in state)


def test_a_report_survives_the_state_dict() -> None:
    run = Run("momentum", "keep")
    run.train(0, 12)
    (report,) = run.teleporter.reports
    other = Run("momentum", "keep")
    other.load(run.save())
    assert other.teleporter.reports == [report]
    assert str(other.teleporter.reports[0]) == str(report)


def set_entry(*path: object, value: object) -> Callable[[dict], dict]:
    """A change of a state: the entry at `path` becomes `value`."""

    def change(state: dict) -> dict:
        state = {**state, "gathered": list(map(list, state["gathered"]))}
        functools.reduce(lambda entries, key: entries[key], path[:-1], state)[path[-1]] = value
        return state

    return change


X, Y = make_batches(1)[0]
BAD_STATES: dict[str, tuple[Callable[[dict], object], type[Exception], str]] = {
    "empty": (
        lambda state: {},
        ValueError,
        r"state must have the entries \['calls', 'done', 'epoch', 'gathered', 'owed', 'reports'\], got \[\]",
    ),
    "list": (lambda state: [1], ValueError, "state must have .* got list"),
    "one entry too many": (lambda state: {**state, 1: 2}, ValueError, r"got \['1', 'calls', 'done'"),
    "epoch": (set_entry("epoch", value="1"), TypeError, "state: epoch must be an int, got '1'"),
    "negative epoch": (set_entry("epoch", value=-1), ValueError, "state: epoch must be >= 0, got -1"),
    "done": (set_entry("done", value=None), TypeError, "state: done must be an int, got None"),
    "gathered": (set_entry("gathered", value="ab"), TypeError, "state: gathered must be a list, got str"),
    "no pair": (set_entry("gathered", value=[[X]]), TypeError, "state: gathered: batch must be a pair .* length 1"),
    "no batch": (set_entry("gathered", value=[1]), TypeError, "state: gathered: "),
    "no tensor": (
        set_entry("gathered", 0, 1, value=[1]),
        TypeError,
        r"gathered: batch must be a pair \(inputs, targets\) of tensors that hold data",
    ),
    "no data": (
        set_entry("gathered", 0, 0, value=torch.empty(4, 6, device="meta")),
        TypeError,
        r"gathered: batch must be a pair \(inputs, targets\) of tensors that hold data",
    ),
    "a figure that is none": (
        set_entry("reports", 0, "loss_before", value=[1]),
        TypeError,
        r"loss_before of a TeleportReport must be of type float, got \[1\]",
    ),
    "another model's": (
        set_entry("gathered", 0, 0, value=torch.ones(4, 5).double()),
        ValueError,
        r"state: gathered: batch inputs must have shape \(n, d_in=6\), got \(4, 5\)",
    ),
    "dtype": (set_entry("gathered", 0, 0, value=X.float()), TypeError, "gathered: .* dtype torch.float64, got"),
    "unlike": (set_entry("gathered", value=[[X, Y], [X, Y.double()]]), ValueError, "must be like those gathered"),
    "reports": (set_entry("reports", value={}), TypeError, "state: reports must be a list, got dict"),
    "report": (set_entry("reports", 0, value=3), ValueError, "state: a TeleportReport must have .* got int"),
    "report without time": (
        lambda state: {**state, "reports": [{k: v for k, v in state["reports"][0].items() if k != "seconds"}]},
        ValueError,
        "state: a TeleportReport must have the entries .* got ",
    ),
    "layer": (set_entry("reports", 0, "layers", value=[{}]), ValueError, r"state: a LayerReport .* got \[\]"),
    "trace": (set_entry("reports", 0, "trace", value=None), TypeError, "report's trace must be a list, got NoneType"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_bad_state_is_refused_as_a_whole(name: str) -> None:
    change, error, text = BAD_STATES[name]
    run, other = Run("momentum", "keep"), Run("momentum", "keep")
    run.train(0, 13)
    other.train(0, 10)
    before = other.save()
    with pytest.raises(error, match=text):
        other.teleporter.load_state_dict(change(run.teleporter.state_dict()))  # type: ignore[arg-type]
    assert other.save() == before


def test_a_loaded_state_shares_no_memory_with_the_one_given() -> None:
    batches, models = make_batches(2), (make_model(), make_model())
    teleporter, reference = map(make_teleporter, models)
    reference.step(batches[0], epoch=0)
    state = reference.state_dict()
    teleporter.load_state_dict(state)
    reference.step(batches[1], epoch=0)
    state["gathered"][0][0].zero_()
    assert teleporter.step(batches[1], epoch=0) is not None
    assert_same_parameters(*models)


# --- the optimizer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_state", ["keep", "reset"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_state_is_kept_or_reset(optimizer: str, optimizer_state: str) -> None:
    run = Run(optimizer, optimizer_state)
    run.train(0, 11)
    before = copy.deepcopy(list(run.optimizer.state.values()))
    assert len(before) == 6
    report = run.teleporter.step(make_batches(LAST)[11], epoch=1)
    assert report is not None
    assert report.accepted
    after = [run.optimizer.state.get(parameter) for parameter in run.model.parameters()]
    if optimizer_state == "reset":
        assert after == [None] * 6
    else:
        assert all(torch.equal(old[key], new[key]) for old, new in zip(before, after, strict=True) for key in old)


def test_reset_waits_for_an_accepted_teleport() -> None:
    model, batches = make_model(), make_batches(2)
    optimizer = make_sgd(model, momentum=0.9)
    teleporter = in_loop(
        model,
        optimizer,
        schedule=EVERY_EPOCH,
        batch_size=4,
        optimizer_state="reset",
        objective=NeverBetter(),
        holdout_size=0,
    )
    optimizer_step(model, optimizer, batches[0])
    before = copy.deepcopy(model)
    report = teleporter.step(batches[1], epoch=0)
    assert report is not None
    assert not report.accepted
    assert len(optimizer.state) == 6
    assert_same_parameters(model, before)


class NeverBetter:
    """An objective that has the same value everywhere."""

    maximise = True

    def value(self, loss_of: Callable[[list[Tensor]], Tensor], parameters: list[Tensor]) -> Tensor:
        return 0 * loss_of(parameters)


def test_reset_leaves_other_parameters_state_alone() -> None:
    model, other, (batch,) = make_model(), nn.Parameter(torch.ones(2)), make_batches(1)
    optimizer = torch.optim.SGD([*model.parameters(), other], lr=0.05, momentum=0.9)
    other.grad = torch.ones(2)
    optimizer_step(model, optimizer, batch)
    other.grad = torch.ones(2)
    optimizer.step()
    assert other in optimizer.state
    teleporter = in_loop(model, optimizer, schedule=EVERY_EPOCH, batch_size=4, **AS_MLP, optimizer_state="reset")
    report = teleporter.step(batch, epoch=0)
    assert report is not None
    assert report.accepted
    assert list(optimizer.state) == [other]


def test_parameters_and_groups_stay_the_same_objects() -> None:
    model = make_model()
    teleporter = make_teleporter(model)
    pointers = [(id(p), p.data_ptr()) for p in model.parameters()]
    groups = [id(p) for group in teleporter.optimizer.param_groups for p in group["params"]]
    values = [p.detach().clone() for p in model.parameters()]
    for batch in make_batches(2):
        teleporter.step(batch, epoch=0)
    assert any(not torch.equal(old, new) for old, new in zip(values, model.parameters(), strict=True))
    assert [(id(p), p.data_ptr()) for p in model.parameters()] == pointers
    assert [id(p) for group in teleporter.optimizer.param_groups for p in group["params"]] == groups


# --- the rate of lookahead ----------------------------------------------------------------------------------------


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for batch in make_batches(count, seed=7):
        optimizer_step(model, optimizer, batch)


def nadam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.NAdam(model.parameters(), lr=1e-3)


OWN_STEPS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.01),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.003),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.003),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.1),
}


OTHER_STEPS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "momentum": lambda model: make_sgd(model, 0.01, momentum=0.9),
    "muon": lambda model: torch.optim.Muon(model.parameters(), lr=0.01),
}


@pytest.mark.parametrize(
    ("name", "objective"),
    [*((name, "lookahead") for name in OWN_STEPS), ("adam", "next_step"), ("momentum", "next_step")],
)
@pytest.mark.parametrize("taken", [0, 3])
def test_the_objective_is_the_loss_after_the_optimizers_own_step(name: str, objective: str, taken: int) -> None:
    model, (batch,) = make_model(), make_batches(1)
    optimizer = (OWN_STEPS | OTHER_STEPS)[name](model)
    take_steps(model, optimizer, taken)
    options = AS_MLP | {"margin": 1.0, "objective": objective}
    teleporter = in_loop(model, optimizer, schedule=EVERY_EPOCH, batch_size=4, **options)
    report = teleporter.step(batch, epoch=0)
    assert report is not None
    assert report.accepted
    assert report.objective_after < report.objective_before
    optimizer_step(model, optimizer, batch)
    assert F.cross_entropy(model(batch[0]), batch[1]).item() == pytest.approx(report.objective_after, rel=1e-10)


@pytest.mark.parametrize("options", [{}, {"margin": 2.5}])
def test_margin_makes_the_own_step_longer(options: dict[str, float]) -> None:
    model, (batch,) = make_model(), make_batches(1)
    optimizer = OWN_STEPS["adam"](model)
    take_steps(model, optimizer)
    expected = copy.deepcopy(model)
    step = st.read_step(optimizer, list(model.parameters()))
    in_loop(model, optimizer, schedule=EVERY_EPOCH, batch_size=4, **(AS_MLP | options)).step(batch, epoch=0)
    teleport_mlp(expected, batch, objective=st.OptimizerLookahead(step, options.get("margin", 4.0)))
    assert_same_parameters(model, expected)


GRADIENT_STEPS: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, 0.01),
    "dampening": ({"dampening": 0.5}, 0.01),  # which without momentum SGD does not use
    "decay": ({"weight_decay": 0.1}, 0.01),
    "momentum": ({"momentum": 0.9}, 0.1),
    "nesterov": ({"momentum": 0.75, "nesterov": True, "weight_decay": 0.1}, 0.04),
    "dampened momentum": ({"momentum": 0.9, "dampening": 0.5}, 0.05),
}


@pytest.mark.parametrize("name", GRADIENT_STEPS)
@pytest.mark.parametrize("taken", [0, 3])
def test_sgd_looks_ahead_by_the_rate_that_its_steps_come_to(name: str, taken: int) -> None:
    (options, rate), model, (batch,) = GRADIENT_STEPS[name], make_model(), make_batches(1)
    optimizer = make_sgd(model, 0.01, **options)
    take_steps(model, optimizer, taken)
    expected = copy.deepcopy(model)
    report = in_loop(model, optimizer, schedule=EVERY_EPOCH, batch_size=4, **AS_MLP).step(batch, epoch=0)
    wanted = teleport_mlp(expected, batch, objective="lookahead", lr=rate)
    assert report is not None
    assert report.objective_after == pytest.approx(wanted.objective_after, rel=1e-8)
    for got, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0}])
@pytest.mark.parametrize("loss_fn", [None, F.cross_entropy])
def test_muon_looks_ahead_by_a_gradient_step_as_long_as_its_own(
    options: dict[str, Any], loss_fn: Callable[[Tensor, Tensor], Tensor] | None
) -> None:
    model, (batch,) = make_model(bias=False), make_batches(1)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.01, **options)
    take_steps(model, optimizer)
    expected = copy.deepcopy(model)
    _, norm = loss_and_gradient_norm(expected, batch)
    scales = [0.2 * 16**0.5, 0.2 * 16**0.5, 0.2 * 12**0.5] if options else [(16 / 6) ** 0.5, 1.0, 1.0]
    length = 0.01 * math.hypot(*(s * rank**0.5 for s, rank in zip(scales, (6, 12, 3), strict=True)))
    in_loop(model, optimizer, loss_fn, schedule=EVERY_EPOCH, batch_size=4, **AS_MLP).step(batch, epoch=0)
    teleport_mlp(expected, batch, objective="lookahead", lr=length / norm)
    for got, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, other, rtol=1e-6, atol=1e-8)


def test_the_next_step_of_an_sgd_needs_no_rate_that_its_steps_come_to() -> None:
    model, (batch,) = make_model(), make_batches(1)
    optimizer = make_sgd(model, 0.01, momentum=1.0)
    options = AS_MLP | {"objective": "next_step"}
    report = in_loop(model, optimizer, schedule=EVERY_EPOCH, batch_size=4, **options).step(batch, epoch=0)
    assert report is not None
    assert report.objective_after < report.objective_before


def test_muon_with_a_bad_batch_changes_nothing() -> None:
    model, (batch,) = make_model(bias=False), make_batches(1)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.01)
    expected = copy.deepcopy(model)
    teleporter = in_loop(model, optimizer, schedule=EVERY_EPOCH, batch_size=4, **AS_MLP)
    with pytest.raises(ValueError, match=r"targets must be class indices in 0..2, got values from 3 to 3"):
        teleporter.step((batch[0], torch.full((4,), 3)), epoch=0)
    with torch.inference_mode(), pytest.raises(st.TeleportError, match="inference_mode"):
        teleporter.step(batch, epoch=0)
    assert_same_parameters(model, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_a_gradient_muon_is_not_teleported() -> None:
    model, (batch,) = make_model(bias=False), make_batches(1)
    with torch.no_grad():
        model[-1].weight.zero_()
    optimizer, expected = torch.optim.Muon(model.parameters(), lr=0.01), copy.deepcopy(model)

    def flat(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().sum()

    teleporter = in_loop(model, optimizer, flat, schedule=EVERY_EPOCH, batch_size=4, **AS_MLP)
    report = teleporter.step(batch, epoch=0)
    assert report is not None
    assert not report.accepted
    assert_same_parameters(model, expected)


def test_lr_follows_a_scheduler() -> None:
    model, batches = make_model(), make_batches(3)
    expected = copy.deepcopy(model)
    optimizer = make_sgd(model, 0.08)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.25)
    teleporter = in_loop(model, optimizer, schedule=EVERY_EPOCH, batch_size=4, **AS_MLP)
    for batch, lr in zip(batches, (0.08, 0.02, 0.005), strict=True):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        teleport_mlp(expected, batch, objective="lookahead", lr=optimizer.param_groups[0]["lr"])
        teleporter.step(batch, epoch=0)
        assert_same_parameters(model, expected)
        optimizer.step()  # without gradients nothing moves
        scheduler.step()


@pytest.mark.parametrize("name", [*OWN_STEPS, "momentum", "muon"])
def test_any_optimizers_own_step_is_waited_for(name: str) -> None:
    model, (batch,) = make_model(bias=name != "muon"), make_batches(1)
    optimizer, expected = (OWN_STEPS | OTHER_STEPS)[name](model), copy.deepcopy(model)
    lr, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], 0.0
    teleporter = in_loop(model, optimizer, schedule=EVERY_EPOCH, batch_size=4, **AS_MLP)
    assert teleporter.step(batch, epoch=0) is None
    assert_same_parameters(model, expected)
    optimizer.param_groups[0]["lr"] = lr
    assert teleporter.step(batch, epoch=0) is not None


@pytest.mark.parametrize("gathered", [0, 1])
def test_a_teleport_waits_while_lr_is_zero(gathered: int) -> None:
    model, batches = make_model(), make_batches(5)
    expected, wanted = copy.deepcopy(model), [*batches[:gathered], *batches[3:]][:2]
    optimizer = make_sgd(model, 0.05 if gathered else 0.0)
    teleporter = in_loop(model, optimizer, schedule=EVERY_EPOCH, batch_size=8, **AS_MLP)
    for batch in batches[:gathered]:
        assert teleporter.step(batch, epoch=0) is None
    optimizer.param_groups[0]["lr"] = 0.0
    assert [teleporter.step(batch, epoch=0) for batch in batches[gathered:3]] == [None] * (3 - gathered)
    assert_same_parameters(model, expected)
    optimizer.param_groups[0]["lr"] = 0.05
    reports = [teleporter.step(batch, epoch=0) for batch in batches[3:]]
    assert [report is not None for report in reports] == ([True, False] if gathered else [False, True])
    teleport_mlp(expected, join(wanted), objective="lookahead", lr=0.05)
    assert_same_parameters(model, expected)


def test_objectives_that_need_no_lr_do_not_wait_for_it() -> None:
    (batch,), model = make_batches(1), make_model()
    teleporter = in_loop(
        model, make_sgd(model, 0.0), schedule=EVERY_EPOCH, batch_size=4, **AS_MLP, objective="grad_norm"
    )
    assert teleporter.step(batch, epoch=0) is not None


def test_lr_is_the_largest_of_the_models_groups() -> None:
    model, other, (batch,) = make_model(), nn.Parameter(torch.ones(2)), make_batches(1)
    expected = copy.deepcopy(model)
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": weights}, {"params": biases, "lr": 0.07}, {"params": [other], "lr": 5.0}]
    in_loop(model, torch.optim.SGD(groups, lr=0.01), schedule=EVERY_EPOCH, batch_size=4, **AS_MLP).step(
        batch, epoch=0
    )
    teleport_mlp(expected, batch, objective="lookahead", lr=0.07)
    assert_same_parameters(model, expected)


@pytest.mark.parametrize("optimizer", [make_sgd, OTHER_STEPS["momentum"], *OWN_STEPS.values(), nadam])
def test_a_given_lr_is_used(optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    model, (batch,) = make_model(), make_batches(1)
    made = optimizer(model)
    take_steps(model, made)
    expected = copy.deepcopy(model)
    in_loop(model, made, schedule=EVERY_EPOCH, batch_size=4, **AS_MLP, lr=0.02).step(batch, epoch=0)
    teleport_mlp(expected, batch, objective="lookahead", lr=0.02)
    assert_same_parameters(model, expected)


def test_other_objectives_and_options_are_passed_on() -> None:
    model, (batch,) = make_model(), make_batches(1)
    expected = copy.deepcopy(model)
    options = {"objective": "grad_norm", "steps": 3, "max_growth": 1.5}
    teleporter = in_loop(
        model, torch.optim.Adam(model.parameters()), schedule=EVERY_EPOCH, batch_size=4, **(AS_MLP | options)
    )
    teleporter.step(batch, epoch=0)
    teleport_mlp(expected, batch, **options)
    assert_same_parameters(model, expected)


# --- what must not change, and errors -----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_mode_gradients_and_rng_are_untouched(training: bool) -> None:
    model = make_model().train(training)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    teleporter = make_teleporter(model, batch_size="auto")
    rng = torch.get_rng_state()
    reports = [teleporter.step(batch, epoch=0) for batch in make_batches(2)]
    assert reports[-1] is not None
    assert reports[-1].accepted
    assert torch.equal(rng, torch.get_rng_state())
    assert [module.training for module in model.modules()] == [training] * 6
    assert all(bool((parameter.grad == 3.0).all()) for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_error_leaves_gathering_where_it_was() -> None:
    model, batches = make_model(), make_batches(2)
    expected = copy.deepcopy(model)
    broken = True

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if broken:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, targets)

    teleporter = make_teleporter(model, loss_fn=loss_fn)
    teleporter.step(batches[0], epoch=0)
    with pytest.raises(KeyboardInterrupt):
        teleporter.step(batches[1], epoch=0)
    with pytest.raises(ValueError, match="batch inputs must have shape"):
        teleporter.step((torch.ones(4, 5, dtype=torch.float64), batches[1][1]), epoch=0)
    with pytest.raises(ValueError, match=r"batch targets must be like those gathered before.* got \(3,\)"):
        teleporter.step((batches[1][0], torch.zeros(4, 3)), epoch=0)
    assert teleporter.reports == []
    assert_same_parameters(model, expected)
    broken = False
    assert teleporter.step(batches[1], epoch=0) is not None
    teleport_mlp(expected, join(batches, 6), F.cross_entropy, objective="lookahead", lr=0.05)
    assert_same_parameters(model, expected)


def test_an_error_in_a_new_epoch_leaves_the_old_one_where_it_was() -> None:
    batches, models = make_batches(3), (make_model(), make_model())
    teleporter, reference = map(make_teleporter, models)
    for each in (teleporter, reference):
        each.step(batches[0], epoch=0)
    with pytest.raises(TypeError, match="batch must be a pair"):
        teleporter.step("no batch", epoch=1)  # type: ignore[arg-type]
    assert teleporter.state_dict()["epoch"] == 0
    for each in (teleporter, reference):
        assert each.step(batches[1], epoch=0) is not None
    assert_same_parameters(*models)


@pytest.mark.parametrize(
    ("epoch", "error", "text"),
    [
        (-1, ValueError, "epoch must be >= 0, got -1"),
        (1.0, TypeError, "epoch must be an int, got 1.0 of type float"),
        (True, TypeError, "epoch must be an int, got True of type bool"),
        (None, TypeError, "epoch must be an int, got None"),
    ],
)
def test_bad_epochs(epoch: object, error: type[Exception], text: str) -> None:
    (batch,) = make_batches(1)
    with pytest.raises(error, match=text):
        make_teleporter(make_model()).step(batch, epoch=epoch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"epochs": 3}, TypeError, "epochs must be a collection of ints >= 0, got 3"),
        ({"epochs": "12"}, TypeError, "epochs must be a collection of ints >= 0, got '12'"),
        ({"epochs": [1.0]}, TypeError, "epochs must be an int, got 1.0"),
        ({"epochs": [-1]}, ValueError, "epochs must be >= 0, got -1"),
        ({"epochs": [1], "teleports_per_epoch": 0}, ValueError, "teleports_per_epoch must be >= 1, got 0"),
        ({"epochs": [1], "teleports_per_epoch": "4"}, TypeError, "teleports_per_epoch must be an int, got '4'"),
    ],
)
def test_bad_schedules(arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        st.Schedule(**arguments)


def without_biases(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.dim() == 2], lr=0.1)


CONSTRUCTION: dict[str, tuple[Callable[[nn.Module], object], dict, type[Exception], str]] = {
    "no optimizer": (lambda m: m, {}, TypeError, r"optimizer must be a torch.optim.Optimizer, .* got Sequential"),
    "other parameters": (
        without_biases,
        {},
        ValueError,
        r"optimizer must hold .* without \['0.bias', '2.bias', '4.bias'\]",
    ),
    "unknown step without lr": (nadam, {}, ValueError, "optimizer must be one of SGD, .* got NAdam: pass lr="),
    "first radius": (make_sgd, {"first_radius": 0.0}, ValueError, "first_radius must be a finite number > 0, got 0.0"),
    "holdout size, a word": (
        make_sgd,
        {"holdout_size": "all"},
        ValueError,
        "holdout_size must be an int >= 0 or \"auto\", got 'all'",
    ),
    "holdout size": (make_sgd, {"holdout_size": -1}, ValueError, "holdout_size must be >= 0, got -1"),
    "holdout size 2.0": (make_sgd, {"holdout_size": 2.0}, TypeError, "holdout_size must be an int, got 2.0"),
    "two holdouts": (
        make_sgd,
        {"holdout_size": 3, "holdout": (X, Y)},
        ValueError,
        "holdout must not be given with holdout_size > 0, got both and holdout_size=3",
    ),
    "maximize": (
        lambda model: make_sgd(model, maximize=True),
        {},
        ValueError,
        'optimizer must minimise the loss for objective "lookahead", got one with maximize=True',
    ),
    "next step with lr": (
        make_sgd,
        {"objective": "next_step", "lr": 0.1},
        ValueError,
        'lr must not be given for objective "next_step", got 0.1',
    ),
    "momentum 1": (
        lambda model: make_sgd(model, momentum=1.0),
        {},
        ValueError,
        "optimizer must have momentum and dampening below 1, got momentum=1 and dampening=0: pass lr=",
    ),
    "dampening 1": (
        lambda model: make_sgd(model, momentum=0.9, dampening=1.0),
        {},
        ValueError,
        "optimizer must have momentum and dampening below 1, got momentum=0.9 and dampening=1: pass lr=",
    ),
    "maximize with lr": (
        lambda model: torch.optim.Adam(model.parameters(), maximize=True),
        {"lr": 0.1},
        ValueError,
        "got one with maximize=True",
    ),
    "nothing of the model": (
        lambda model: make_sgd(make_model()),
        {},
        ValueError,
        "optimizer must hold .* got one that holds none of them",
    ),
    "schedule": (make_sgd, {"schedule": [1]}, TypeError, "schedule must be a Schedule, got list"),
    "loss_fn": (make_sgd, {"loss_fn": "mse"}, TypeError, "loss_fn must be callable .* got str"),
    "batch size 0": (make_sgd, {"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
    "batch size 2.0": (make_sgd, {"batch_size": 2.0}, TypeError, "batch_size must be an int, got 2.0"),
    "batch size name": (
        make_sgd,
        {"batch_size": "all"},
        ValueError,
        "batch_size must be an int >= 1 or \"auto\", got 'all'",
    ),
    "optimizer state": (
        make_sgd,
        {"optimizer_state": "drop"},
        ValueError,
        "optimizer_state must be one of 'keep', 'reset', got 'drop'",
    ),
    "unknown option": (make_sgd, {"margins": 2.0}, TypeError, "unexpected keyword argument 'margins'"),
    "method": (make_sgd, {"method": "ascent"}, TypeError, "method must be an Ascent, .* got str"),
    "guards": (make_sgd, {"guards": 0.1}, TypeError, "guards must be Guards, got float"),
    "objective": (make_sgd, {"objective": "newton"}, ValueError, "objective must be one of .* got 'newton'"),
    "negative lr": (make_sgd, {"lr": -1.0}, ValueError, "lr must be .* got -1.0"),
    "NaN margin": (make_sgd, {"margin": float("nan")}, ValueError, "margin must be .* got nan"),
    "layers": (make_sgd, {"layers": [3]}, ValueError, r"layers must be .* 1..2, got \[3\]"),
    "layers, a word": (make_sgd, {"layers": "first"}, ValueError, "layers must be \"auto\", .* got 'first'"),
    "model": (lambda model: make_sgd(model), {"model": nn.Linear(2, 2)}, ValueError, "at least two Linear"),
}


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_bad_arguments_are_refused_at_construction(name: str) -> None:
    make_optimizer, options, error, text = CONSTRUCTION[name]
    model = make_model()
    arguments = {"model": model, "optimizer": make_optimizer(model), **options}
    with pytest.raises(error, match=text):
        in_loop(**arguments)
