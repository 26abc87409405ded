"""The guards compared: the Hessian's largest eigenvalue, what undoes a teleport, the outcomes, and the command."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from networks import make_mlp, snapshot, unchanged
from teleports import make_teleporter
from torch import Tensor

from experiments import guards
from experiments.__main__ import main
from experiments.study.records import Check, Record, Teleport, Validation
from symtele_cuda import Schedule, Teleporter

needs_extras = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("matplotlib", "tqdm", "sklearn")),
    reason="needs symtele_cuda[demo]",
)


def quadratic(eigenvalues: list[float]) -> tuple[Tensor, list[Tensor]]:
    """½ wᵀ H w with H of these eigenvalues, w in two pieces; and w."""
    generator = torch.Generator().manual_seed(0)
    n = len(eigenvalues)
    axes, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    hessian = axes @ torch.tensor(eigenvalues, dtype=torch.float64).diag() @ axes.T
    pieces = [torch.ones(2, requires_grad=True, dtype=torch.float64), torch.ones(n - 2, 1, dtype=torch.float64)]
    pieces[1].requires_grad_()
    w = torch.cat([piece.flatten() for piece in pieces])
    return w @ hessian @ w / 2, pieces


def test_the_largest_eigenvalue_is_the_largest_and_not_the_largest_in_size() -> None:
    loss, parameters = quadratic([-9.0, 0.5, 1.0, 2.0, 3.0, 4.0])
    assert guards.largest_eigenvalue(loss, parameters) == pytest.approx(4.0, rel=1e-10)  # 6 of 10 steps fill the space


def test_the_largest_eigenvalue_of_a_network_is_that_of_its_hessian() -> None:
    model = make_mlp([4, 6, 5, 3])
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    parameters = list(model.parameters())

    def loss_of(vector: Tensor) -> Tensor:
        values = dict(zip(dict(model.named_parameters()), split(vector, parameters), strict=True))
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    vector = torch.nn.utils.parameters_to_vector(parameters).detach()
    expected = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss_of, vector))[-1].item()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    assert guards.largest_eigenvalue(loss, parameters, steps=40) == pytest.approx(expected, rel=1e-6)
    assert 0.9 * expected < guards.largest_eigenvalue(loss, parameters) <= expected * (1 + 1e-6)


def split(vector: Tensor, like: list[torch.nn.Parameter]) -> list[Tensor]:
    parts = vector.split([parameter.numel() for parameter in like])
    return [part.view_as(parameter) for part, parameter in zip(parts, like, strict=True)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_teleport_into_a_place_too_curved_for_the_rate_is_undone(momentum: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 30, generator=generator, dtype=torch.float64)
    batch = x, torch.arange(60) % 5
    kept, undone = 0, 0
    for lr in (0.03, 0.3, 1.0, 3.0, 10.0):
        own, other = make_mlp([30, 40, 36, 5]), make_mlp([30, 40, 36, 5])
        free, guarded = (
            make_teleporter(
                model,
                torch.optim.SGD(model.parameters(), lr, momentum=momentum),
                torch.nn.functional.cross_entropy,
                kind=kind,
                schedule=Schedule((0,), 1),
                batch_size=30,
                holdout_size=30,
                holdout_tol=float("inf"),
                min_gain=0.0,
            )
            for kind, model in ((Teleporter, own), (guards.HessianGuarded, other))
        )
        before = snapshot(other)
        first = products(own, batch, lr, momentum)
        assert free.step(batch, epoch=0).accepted
        report = guarded.step(batch, epoch=0)
        if products(own, batch, lr, momentum) <= max(first, 1.0):
            kept += 1
            assert report.accepted and unchanged(other, snapshot(own))
        else:
            undone += 1
            assert not report.accepted and "eigenvalue" in report.reason and unchanged(other, before)
    assert kept > 0 and undone > 0


def products(model: torch.nn.Module, batch: tuple[Tensor, Tensor], lr: float, momentum: float) -> float:
    """η λ over the largest with which heavy-ball steps are stable."""
    loss = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    return lr * guards.largest_eigenvalue(loss, list(model.parameters())) / (2 + 2 * momentum)


def record(losses: list[float], *accepted: bool) -> Record:
    return Record(
        2,
        tuple(Check(2 * index, float(index), loss) for index, loss in enumerate(losses)),
        (Validation(1.0, 0.5),),
        tuple(Teleport(1, 0.1, each, 1.0, 1.0, 1.0) for each in accepted),
        refused=0,
    )


def test_an_outcome_is_of_the_means_of_the_seeds_that_diverged_in_neither_arm() -> None:
    plain = [record([2.0, 1.0, 0.5]), record([2.0, 1.0, 0.3]), record([2.0, 1.0, 3.0])]
    guarded = [record([2.0, 1.5, 0.2], True, False), record([2.0, 1.0, 9.0], True), record([2.0, 1.0, 0.1], True)]
    found = guards._outcome("sgd", 0.1, "none", plain, guarded)
    assert (found.teleports, found.diverged) == (3, 1)
    assert found.worst == pytest.approx(1.5)
    assert found.plain_loss == pytest.approx(0.4) and found.train_loss == pytest.approx(0.15)
    assert found.time_share == pytest.approx((0.2 + 0.1 + 0.1) / 2 / 3)


def test_the_guards_differ_in_what_their_names_say() -> None:
    free, holdout, gain, both = (guards.GUARDS[name].teleports for name in list(guards.GUARDS) if name != "Hessian")
    assert (free.min_gain, holdout.min_gain) == (0.0, 0.0) and gain.min_gain == both.min_gain > 0
    assert free.holdout_tol == gain.holdout_tol == float("inf") and holdout.holdout_tol == both.holdout_tol < 1
    assert guards.GUARDS["Hessian"] == guards.Guard(free, guards.HessianGuarded)


@needs_extras
def test_guards_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "RATES", {"sgd": (0.3, 1.0), "momentum": (0.03,)})
    assert main(["guards", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "guards.json").read_text())
    assert (tmp_path / "guards.png").stat().st_size > 0
    outcomes = document["outcomes"]
    assert [(o["optimizer"], o["lr"], o["guard"]) for o in outcomes] == [
        (optimizer, lr, name) for optimizer, rates in guards.RATES.items() for lr in rates for name in guards.GUARDS
    ]
    assert all(0 <= outcome["teleports"] <= 3 for outcome in outcomes)
    assert sum(outcome["teleports"] for outcome in outcomes if outcome["guard"] == "none") > 0
    assert all(name in capsys.readouterr().out for name in ["least gain"])
