"""The experiment on plasticity: networks side by side, what the arms do, how runs are told and resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="needs symtele_cuda[demo]")

from experiments import plasticity
from experiments.data import Dataset, load_digits
from experiments.plasticity import ARMS, Learners, Task
from experiments.side_by_side import SideBySide, make_mlp
from symtele_cuda.guards import STANDARDISED

SEEDS = (7, 8)


def digits() -> Dataset:
    return load_digits().take(torch.arange(900))


@pytest.mark.parametrize("layer_norm", [False, True])
def test_networks_side_by_side_compute_what_each_does(layer_norm: bool) -> None:
    models = [make_mlp((6, 5, 5, 3), nn.Tanh, layer_norm) for _ in range(3)]
    networks = SideBySide(models)
    x = torch.randn(3, 4, 6)
    expected = torch.stack([model(one) for model, one in zip(models, x, strict=True)])
    torch.testing.assert_close(networks(x), expected)
    others = [make_mlp((6, 5, 5, 3), nn.Tanh, layer_norm) for _ in range(3)]
    networks.read(others)
    torch.testing.assert_close(torch.stack([m(one) for m, one in zip(others, x, strict=True)]), expected)
    networks.write(models[::-1])
    torch.testing.assert_close(networks(x)[0], models[2](x[0]))


def make_learners(arm: str) -> tuple[Learners, Task]:
    torch.manual_seed(0)
    learners = Learners("LeakyReLU 0.01", 1e-2, ARMS[arm], SEEDS, 64)
    x, y = torch.randn(2, 200, 64), torch.randint(10, (2, 200))
    task = Task(x, y, x, y)
    learners.learn(task, 2)
    return learners, task


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_acts_and_what_should_stay_stays(arm: str) -> None:
    learners, task = make_learners(arm)
    before, weights = learners.logits(task.x), [p.detach().clone() for p in learners.networks.parameters()]
    learners.act(task)
    after = learners.logits(task.x)
    if arm in ("optimizer reset", "plasticity injection") or ARMS[arm].act is None:
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    if arm == plasticity.FRESH:
        assert not any(map(torch.equal, learners.networks.parameters(), weights))
    assert bool(learners.optimizer.state) == (ARMS[arm].act is None)
    learners.learn(task, 1)


def test_redo_gives_new_weights_to_dormant_units_alone() -> None:
    learners, task = make_learners("ReDo 0.1")
    with torch.no_grad():
        for stack in (learners.networks.stacked[0], learners.networks.stacked[1]):
            stack[:, :3] = 0.0  # the first three units of the first layer are 0 everywhere
    before = learners.networks.stacked[0].detach().clone()
    learners.act(task)
    after = learners.networks.stacked[0].detach()
    outgoing = learners.networks.stacked[2].detach()[:, :, :3]
    assert (after[:, :3] != 0).all()
    assert (outgoing == 0).all(-1).double().mean() > 0.5  # the others are of units that have got new weights themselves
    assert (after[:, 3:] == before[:, 3:]).all(-1).double().mean() > 0.9


def test_standardise_keeps_most_predictions() -> None:
    learners, task = make_learners("standardise, whatever is kept")
    before = learners.logits(task.x).argmax(-1)
    learners.act(task)
    assert learners.reasons == [STANDARDISED] * 2
    assert (learners.logits(task.x).argmax(-1) == before).double().mean() > 0.8


@pytest.mark.parametrize("protocol", plasticity.PROTOCOLS)
def test_the_tasks_are_what_their_protocols_say(protocol: str) -> None:
    data = plasticity._draw(digits(), torch.Generator().manual_seed(0))
    first, second = (plasticity.PROTOCOLS[protocol].make(data, k, torch.Generator().manual_seed(k)) for k in (0, 1))
    if protocol == "relabelled":
        pairs = {(int(old), int(new)) for old, new in zip(data.y, first.y, strict=True)}
        assert len(pairs) == 10 and not torch.equal(first.y, second.y)
    elif protocol == "random labels":
        assert first.test_x is data.x and len(first.y.unique()) == 10
    elif protocol == "permuted inputs":
        assert torch.equal(first.x.sort(1).values, data.x.sort(1).values) and not torch.equal(first.x, data.x)
    elif protocol == "more classes":
        assert int(first.y.max()) == 1 and int(second.y.max()) == 3 and int(first.test_y.min()) == -1
    else:
        assert len(first.x) == len(data.x) // 2 and len(second.x) == len(data.x)


def test_a_job_is_the_same_again_and_is_told_in_a_row(tmp_path: Path) -> None:
    job = plasticity.Job("relabelled", "tanh", "optimizer reset", 4e-3, 3, SEEDS)
    one, other = plasticity.run_job(job, digits()), plasticity.run_job(job, digits())
    assert one == other and len(one.accuracies) == 2 and len(one.kept_others[0]) == 2
    row = plasticity.describe(one)
    assert row.kept == 100 and row.last == pytest.approx(50 * sum(sum(run[1:]) for run in one.accuracies) / 2)
    slower = replace(row, lr=1e-3, last=row.last - 1)
    assert plasticity.best_of([slower, row]) == [row]
    assert row.arm in plasticity.table([row])


def test_records_are_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs symtele_cuda[experiments]")
    jobs = plasticity.jobs(1, ["more classes"], tasks=2)[:2]
    plasticity.run(digits(), jobs, tmp_path, lambda _: None)
    assert len((tmp_path / "plasticity.jsonl").read_text().splitlines()) == 2
    first = json.loads((tmp_path / "plasticity.json").read_text())
    monkeypatch.setattr(plasticity, "run_job", None)  # nothing is left to run
    plasticity.run(digits(), jobs, tmp_path, lambda _: None)
    assert json.loads((tmp_path / "plasticity.json").read_text()) == first
