"""The experiment on starts: what the arms do, how runs are told, compared and resumed, and its tables."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("sklearn", reason="needs symtele_cuda[demo]")

from bench import starts_tables
from bench.evidence_files import as_text
from experiments.data import load_diabetes, load_digits
from experiments.side_by_side import Apart, SideBySide, make_mlp
from experiments.starts import results
from experiments.starts.arms import (
    ALL,
    ALL_ANYWAY,
    ARMS,
    EACH,
    LOOKAHEAD,
    PLAIN,
    TRAINED,
    TRAINED_ANYWAY,
    initialise,
)
from experiments.starts.problems import NOISE_LEVEL, OPTIMIZERS, PROBLEMS
from experiments.starts.runs import Job, Look, Outcome, Runs, Teleport, restore, run_job

SEEDS = (7, 8)
JOB = Job("digits", "LeakyReLU 0.1", "sgd", PLAIN, 0.1, 3, SEEDS)


# --- arms and runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", PROBLEMS["digits"].arms["sgd"])
def test_every_start_of_a_seed_has_the_same_data_and_trains(arm: str) -> None:
    job = replace(JOB, arm=arm)
    plain, runs = Runs(JOB, load_digits()), Runs(job, load_digits())
    assert torch.equal(runs.x, plain.x) and torch.equal(runs.noise, plain.noise)
    outcome = run_job(job, load_digits())
    losses = [look.train for look in outcome.looks]
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))
    expected = [(seed, epoch) for epoch in range(job.epochs) if epoch in ARMS[arm].before for seed in SEEDS]
    assert [(teleport.seed, teleport.epoch) for teleport in outcome.teleports] == expected
    assert (outcome.epoch_seconds > 0) == bool(expected)
    as_is = json.dumps(asdict(outcome))
    assert json.dumps(asdict(restore(json.loads(as_is)))) == as_is


def test_a_teleport_is_made_whatever_the_guards_say_and_tells_what_they_look_at() -> None:
    job = replace(JOB, activation="tanh", optimizer="momentum", lr=0.05)
    held, made = (run_job(replace(job, arm=arm), load_digits()) for arm in (TRAINED, TRAINED_ANYWAY))
    assert all(teleport.accepted for teleport in made.teleports)
    refused = [k for k, teleport in enumerate(held.teleports) if "holdout loss rose" in teleport.reason]
    assert refused  # else this test says nothing
    assert held.looks[2] == made.looks[2]
    for k, (one, other) in enumerate(zip(held.teleports, made.teleports, strict=True)):
        assert (other.rise > 0.03) == (k in refused) and 0 < other.kept <= 1
        assert other.gain > 0 and other.noise > 0 and other.change > 0
        assert math.isnan(one.rise) == (k in refused)
        assert (held.looks[3].of(k) == made.looks[3].of(k)) == (k not in refused)


def test_a_network_that_has_diverged_is_left_alone() -> None:
    outcome = run_job(replace(JOB, arm=EACH, lr=1e4), load_digits())
    assert not any(map(math.isfinite, outcome.looks[-1].train))
    assert {teleport.epoch for teleport in outcome.teleports} == {0}


def test_the_lookahead_is_made_at_the_rate_of_the_run_on_samples_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Recorder:
        def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, method: Any) -> None:
            assert method.objective == "lookahead" and method.lr is None
            seen.append([optimizer.param_groups[0]["lr"]])

        def refresh(self, batch: Any, *, holdout: Any) -> None:
            seen[-1] += [batch[0], holdout[0]]

    monkeypatch.setattr("symtele_cuda.Teleporter", Recorder)
    monkeypatch.setattr(Teleport, "make", lambda *_: None)
    runs = Runs(replace(JOB, arm=LOOKAHEAD, lr=0.3), load_digits())
    for epoch in (1, 2, 3):
        runs.teleport(epoch)
    of_one = seen[:: len(SEEDS)]
    assert [found[0] for found in of_one] == [0.3] * 3
    samples = torch.cat([part for found in of_one for part in found[1:]])
    assert len(samples) == 1200 and torch.equal(samples, runs.x[0, :1200])


def test_lsuv_gives_every_layer_outputs_of_variance_one() -> None:
    model, x = make_mlp((6, 32, 32, 5), nn.Tanh), torch.randn(100, 6)
    initialise(model, "LSUV", "tanh", x)
    for module in model:
        x = module(x)
        if isinstance(module, nn.Linear):
            assert x.std().item() == pytest.approx(1.0, rel=1e-4)


def test_a_regression_is_of_standardised_columns_and_has_no_accuracy() -> None:
    runs = Runs(replace(JOB, problem="diabetes", activation="tanh"), load_diabetes())
    for values in (runs.x, runs.y):
        torch.testing.assert_close(values.mean(1), torch.zeros_like(values[:, 0]), rtol=0, atol=1e-5)
        torch.testing.assert_close(values.std(1, correction=0), torch.ones_like(values[:, 0]), rtol=1e-4, atol=0)
    runs.train()
    look = runs.look()
    runs.networks.read(runs.models)
    errors = [F.mse_loss(model(x), y).item() for model, x, y in zip(runs.models, runs.x, runs.y, strict=True)]
    assert look.train == pytest.approx(errors, rel=1e-5)
    assert all(map(math.isnan, (*look.accuracy, *look.noisy)))


def test_networks_that_are_kept_apart_compute_what_stacked_ones_do() -> None:
    models = [make_mlp((6, 5, 4, 3), nn.Tanh) for _ in range(3)]
    apart, stacked, x = Apart(models), SideBySide(models), torch.randn(3, 4, 6)
    torch.testing.assert_close(apart(x), stacked(x))
    for one, other in zip(apart.stacked, stacked.stacked, strict=True):
        assert torch.equal(one, other)


def test_muon_is_for_the_hidden_matrices_and_no_network_sees_another() -> None:
    networks = Apart([make_mlp((6, 5, 4, 3), nn.Tanh) for _ in range(2)])
    muon, adamw = OPTIMIZERS["muon"](networks, 0.01)
    shapes = [[tuple(p.shape) for p in one.param_groups[0]["params"]] for one in (muon, adamw)]
    assert shapes[0] == [(5, 6), (4, 5)] * 2 and sorted(shapes[1]) == sorted([(5,), (4,), (3, 4), (3,)] * 2)
    job = replace(JOB, problem="digits, Muon", optimizer="muon", lr=0.005, epochs=1)
    together, alone = run_job(job, load_digits()), run_job(replace(job, seeds=SEEDS[:1]), load_digits())
    assert together.looks[1].train[0] == pytest.approx(alone.looks[1].train[0], rel=1e-3)
    assert together.looks[1].train[0] < together.looks[0].train[0] / 2


# --- results ----------------------------------------------------------------------------------------------------------


def make_outcome(lr: float, *losses: float, teleports: Sequence[Teleport] = (), seconds: float = 0.0) -> Outcome:
    job = Job("digits", "tanh", "sgd", PLAIN, lr, len(losses) - 1, (0,))
    looks = tuple(Look((loss,), (loss,), (1 - loss / 10,), (0.5,), (3.0,)) for loss in losses)
    return Outcome(job, looks, tuple(teleports), seconds)


def make_teleport(seconds: float, accepted: bool = True) -> Teleport:
    return Teleport(0, 0, accepted, "", seconds, *(math.nan,) * 5)


def test_the_epochs_to_a_loss_are_between_two_looks_by_its_logarithm() -> None:
    assert results.epochs_to(0.1, [1.0, 0.01, 0.001]) == pytest.approx(0.5)
    assert results.epochs_to(0.1, [1.0, 0.4, 0.2]) == math.inf
    (run,) = results.runs_of(make_outcome(0.1, 1.0, 0.1, 0.01, 0.02))
    assert run.epochs == pytest.approx((1.0, 1.0 + math.log(0.1 / 0.03) / math.log(10), 2.0))
    assert (run.train, run.lowest, run.final) == (0.02, 0.01, 0.02)
    share = math.log(0.1 / NOISE_LEVEL) / math.log(10)
    assert run.clean == pytest.approx(100 * (0.99 + share * (0.999 - 0.99)))


def test_the_best_rate_is_looked_for_beyond_the_last_one() -> None:
    tried = []

    def work(lr: float) -> Outcome:
        tried.append(lr)
        return make_outcome(lr, 1.0, 0.01 if lr == pytest.approx(0.2 * results.FACTOR**3) else 1 / lr)

    outcomes = results.at_its_rates(work, 0.2)
    assert max(tried) == pytest.approx(0.2 * results.FACTOR**4) and len(outcomes) == 7
    assert results.describe(outcomes).lr == pytest.approx(0.2 * results.FACTOR**3)


def test_the_cost_of_the_teleports_is_told_in_epochs() -> None:
    three = [make_teleport(1.0), make_teleport(9.0, accepted=False), make_teleport(2.0)]
    assert results.cost(make_outcome(0.1, 1.0, 0.1, teleports=three, seconds=4.0)) == 3 * 2.0 / 4.0
    row = results.describe([make_outcome(0.1, 1.0, 0.1, teleports=three, seconds=s) for s in (2.0, 4.0, 8.0)])
    assert (row.teleports, row.refused, row.cost) == (3, 1, 1.5)
    assert results.describe([make_outcome(0.1, 1.0, 0.1)]).cost == 0


def test_records_are_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(PROBLEMS["digits, Muon"], activations=("tanh",), arms={"sgd": (PLAIN, ALL)})
    monkeypatch.setitem(PROBLEMS, "digits, Muon", few)
    arguments: tuple[Any, ...] = ({"digits, Muon": load_digits()}, 1, 1, tmp_path, lambda _: None)
    results.run(*arguments)
    first = json.loads((tmp_path / "starts.json").read_text())
    assert len((tmp_path / "starts.jsonl").read_text().splitlines()) == sum(len(run["rates"]) for run in first["runs"])
    assert [row["arm"] for row in first["rows"]] == [PLAIN, ALL]
    assert "rise" in first["runs"][1]["rates"][0] and "rise" not in first["runs"][0]["rates"][0]
    monkeypatch.setattr(results, "run_job", None)  # nothing is left to run
    results.run(*arguments)
    assert json.loads((tmp_path / "starts.json").read_text()) == first


# --- tables -----------------------------------------------------------------------------------------------------------


def make_entry(arm: str, lr: float = 0.1, problem: str = "digits", **figures: list[Any]) -> dict[str, Any]:
    figures = {"epochs": [[1.0, 2.0, None]] * 5, "train": [0.1] * 5, "lowest": [0.2] * 5} | figures
    setting = {"problem": problem, "activation": "tanh", "optimizer": "sgd", "arm": arm}
    return setting | {"rates": [{"lr": lr} | figures]}


def make_document(*entries: dict[str, Any]) -> dict[str, Any]:
    levels = {entry["problem"]: [0.1, 0.03, 0.01] for entry in entries}
    return {"experiment": "starts", "settings": {"levels": levels}, "rows": [], "runs": list(entries)}


def compare(train: list[float | None], plain: list[float | None]) -> starts_tables.Comparison:
    document = make_document(make_entry(PLAIN, train=plain), make_entry(ALL, train=train))
    (pair,) = starts_tables.pairs_of([document], ALL)
    return starts_tables.Comparison.make(pair, "train")


def test_worse_is_what_a_paired_t_test_says() -> None:
    plain = [0.1, 0.2, 0.3, 0.4, 0.5]
    up = compare([value * factor for value, factor in zip(plain, (1.1, 1.2, 1.3, 1.2, 1.1), strict=True)], plain)
    logs = [math.log(factor) for factor in (1.1, 1.2, 1.3, 1.2, 1.1)]
    assert up.t == pytest.approx(statistics.fmean(logs) / (statistics.stdev(logs) / math.sqrt(5)))
    assert up.ratio == pytest.approx(statistics.geometric_mean((1.1, 1.2, 1.3, 1.2, 1.1)))
    assert up.is_worse and not up.is_better
    down = compare([value / 2 for value in plain[:4]] + [0.26], plain)
    assert down.is_better and not down.is_worse
    chance = compare([0.2, 0.1, 0.4, 0.3, 0.5], plain)
    assert not chance.is_worse and not chance.is_better


def test_runs_that_diverge_with_the_arm_alone_are_worse() -> None:
    lost = compare([0.05, 0.1, 0.1, None, None], [0.1, 0.2, 0.2, 0.2, None])
    assert (lost.lost, lost.seeds, lost.ratio) == (1, 3, pytest.approx(0.5))
    assert lost.is_worse and not lost.is_better and str(lost) == "0.1 (×0.50, 1 more diverge)"
    assert str(compare([None] * 5, [0.1] * 5)) == "0.1 (5 more diverge)"
    saved = compare([0.1] * 5, [None, *[0.1] * 4])
    assert saved.is_better and not saved.is_worse


def test_the_epochs_are_compared_at_the_lowest_level_that_both_reach() -> None:
    plain = [[2.0, 4.0, None], [2.0, None, None], [None] * 3, [1.0, 2.0, 8.0], [2.0, 4.0, 5.0]]
    ours = [[1.0, 3.0, 4.0], [1.0, 1.5, 2.0], [1.0, 2.0, 3.0], [2.0, 4.0, 4.0], [None] * 3]
    document = make_document(make_entry(PLAIN, epochs=plain), make_entry(ALL, epochs=ours))
    (pair,) = starts_tables.pairs_of([document], ALL)
    assert pair.epoch_ratios() == pytest.approx([0.75, 0.5, math.nan, 0.5, math.nan], nan_ok=True)


def test_rates_that_one_arm_alone_was_run_at_are_not_compared() -> None:
    document = make_document(make_entry(PLAIN, lr=0.1), make_entry(ALL, lr=0.2), make_entry(ALL, problem="mnist"))
    assert starts_tables.pairs_of([document], ALL) == []


def test_a_guard_divides_the_runs_into_those_that_it_refuses_and_the_others() -> None:
    plain = make_entry(PLAIN)
    figures = {"rise": [0.01, 0.02, 0.05, 0.2, None], "gain": [1.0, 1.0, 1.0, None, None], "noise": [1.0] * 4 + [None]}
    figures |= {"change": [1.0] * 4 + [None], "kept": [0.95, 0.95, 0.95, 0.85, None]}
    ours = make_entry(TRAINED_ANYWAY, train=[0.05, 0.05, 0.2, None, 7.0], lowest=[0.1, 0.1, 0.4, 0.8, 7.0], **figures)
    ((where, pairs),) = starts_tables.guarded([make_document(plain, ours)]).items()
    assert where == "digits, tanh, after two epochs"
    refused, passed = starts_tables.judge(starts_tables.GUARDS[0], pairs)
    assert refused.train == (2.0, math.inf) and passed.train == (0.5, 0.5)
    assert refused.cells() == ["2, 1 diverge", "×1.00", "×2.00", f"×{math.sqrt(8):.2f}"]
    kept = starts_tables.judge(starts_tables.GUARDS[-1], pairs)
    assert kept[0].train == (math.inf,) and len(kept[1].train) == 3
    gain = starts_tables.judge(starts_tables.GUARDS[1], pairs)  # infinite where no step lowered the loss before
    assert len(gain[0].train) == 0 and len(gain[1].train) == 4


def test_at_the_start_the_guards_are_judged_by_the_arm_without_them_where_there_is_one() -> None:
    documents = [make_document(*(make_entry(arm, problem=name) for arm in (PLAIN, ALL))) for name in ("one", "other")]
    documents[1]["runs"].append(make_entry(ALL_ANYWAY, problem="other", train=[0.3] * 5))
    found = starts_tables.guarded(documents)
    assert list(found) == ["one, tanh, at the start", "other, tanh, at the start"]
    ratios = [pair.ratios("train") for pairs in found.values() for pair in pairs]
    assert ratios == [pytest.approx([1.0] * 5), pytest.approx([3.0] * 5)]


@pytest.mark.parametrize("make", [starts_tables.default_table, starts_tables.guards_table])
def test_tables_are_of_all_files_on_starts(make: Callable[[Path], str], tmp_path: Path) -> None:
    figures = {name: [0.5] * 5 for name in results.FIGURES}
    for name, problem in (("starts-a", "mnist"), ("starts-b", "digits")):
        ours = make_entry(ALL, problem=problem, train=[0.2] * 5, **figures)
        document = make_document(make_entry(PLAIN, problem=problem), ours)
        (tmp_path / f"{name}.json").write_text(as_text(document), encoding="utf-8")
    lines = make(tmp_path).splitlines()[2:]
    assert [*dict.fromkeys(re.split("[,:]", line)[0] for line in lines)] == ["| digits", "| mnist"]
    assert all("×2.00" in line for line in lines)
