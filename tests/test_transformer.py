"""The experiment on a small Transformer: tuning on made-up losses, the text, the rotations of its arms."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.gpt import results
from experiments.gpt.model import SYMBOLS, Text, draw
from experiments.gpt.runs import ALWAYS, ARMS, PLAIN, RANDOM, ROTATED, Job, Outcome, run_job

TEXT = Text(*(torch.randint(SYMBOLS, (2000,), generator=torch.Generator().manual_seed(k)).byte() for k in (0, 1)))
JOB = Job(width=32, steps=20, arm=PLAIN, lr=3e-3, warm_up=5, beta2=0.95, seed=0)


def made_up(best: Job, tried: list[Job]) -> results.Work:
    """Losses that are least at the rate, warm-up and β₂ of `best`."""

    def work(job: Job) -> Outcome:
        tried.append(job)
        away = abs(math.log2(job.lr / best.lr)) + (job.warm_up != best.warm_up) + (job.beta2 != best.beta2)
        return Outcome(job, (2.0, 1.0 + away), 1.0, 0.0, 0.0)

    return work


@pytest.mark.parametrize("lr", [0.75e-3, 3e-3, 4.8e-2])
def test_tuning_finds_the_best_of_all_three_and_goes_beyond_its_edges(lr: float) -> None:
    setting, tried = results.SETTINGS["d = 64"], list[Job]()
    best = replace(JOB, width=64, steps=400, lr=lr, warm_up=20, beta2=0.99)
    assert results.tune(made_up(best, tried), setting, PLAIN, None) == best
    rates = {job.lr for job in tried}
    assert min(rates) < lr < max(rates) and {job.warm_up for job in tried} == {20, 50, 120, 200}


def test_the_other_settings_tune_the_rate_alone() -> None:
    tried = list[Job]()
    first = replace(JOB, width=64, steps=400, lr=6e-3, warm_up=20, beta2=0.99)
    best = replace(first, width=128, steps=300, lr=1.5e-3)
    assert results.tune(made_up(best, tried), results.SETTINGS["d = 128"], PLAIN, first) == best
    assert {(job.warm_up, job.beta2) for job in tried} == {(20, 0.99)}
    assert results.tune(made_up(replace(best, lr=1e-9), tried), results.SETTINGS["d = 128"], PLAIN, first).lr > 1e-9


def test_steps_to_a_loss_are_linear_between_two_looks() -> None:
    assert results.steps_to(1.5, (3.0, 2.0, 1.0)) == pytest.approx(50.0)
    assert results.steps_to(2.0, (3.0, 2.0, 1.0)) == 40.0
    assert results.steps_to(3.5, (3.0, 2.0)) == 20.0
    assert results.steps_to(0.5, (3.0, 2.0)) == math.inf


def test_a_row_compares_with_the_last_loss_of_adamw() -> None:
    plain = [Outcome(replace(JOB, steps=60), (3.0, 2.0, last), 6.0, 0.0, 0.0) for last in (1.0, 2.0)]
    ours = [Outcome(replace(JOB, steps=60, arm=ROTATED), (3.0, 2.0, 0.0), 12.0, 3.0, 1e-7)] * 2
    rows = list(results.describe("made up", {PLAIN: plain, ROTATED: ours}, {PLAIN: 2.0, ROTATED: 3.0}))
    assert (rows[0].last, rows[0].steps_to) == (1.5, (60 + 40) / 2 / 60)
    assert rows[1].steps_to == (50 + 40) / 2 / 60  # each seed's own loss
    assert (rows[1].step_time, rows[1].time_to) == (1.5, 1.5 * rows[1].steps_to)
    assert (rows[1].rotating, rows[1].inexact) == (0.25, 1e-7)


def test_what_ends_early_is_as_fast_as_adamw_afterwards() -> None:
    plain = [Outcome(replace(JOB, steps=400), tuple(2.0 - 0.01 * k for k in range(20)), 1.0, 0.0, 0.0)]
    rows = {}
    for arm in (ROTATED, ALWAYS):
        found = {PLAIN: plain, arm: [replace(plain[0], job=replace(plain[0].job, arm=arm))]}
        rows[arm] = list(results.describe("made up", found, {PLAIN: 1.0, arm: 1.2}))[1]
    assert rows[ROTATED].time_to == pytest.approx((200 * 1.2 + 200) / 400)
    assert rows[ALWAYS].time_to == pytest.approx(1.2)


def test_the_text_is_of_the_standard_library_and_the_same_every_time() -> None:
    text = Text.of_standard_library()
    assert len(text.train) > 15 * len(text.validation) > 1_000_000
    assert text.train.max() < SYMBOLS and torch.equal(text.train, Text.of_standard_library().train)
    x, y = draw(text.train, 3, 8, torch.Generator().manual_seed(0))
    assert x.shape == (3, 8) and torch.equal(x[:, 1:], y[:, :-1])


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_learns_and_rotations_keep_the_logits(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "SOAP" in arm:
        pytest.importorskip("pytorch_optimizer", reason="SOAP is in pytorch_optimizer")
    monkeypatch.setattr("experiments.gpt.runs.EARLY", 10)
    outcome = run_job(replace(JOB, arm=arm, steps=40), TEXT)
    assert len(outcome.losses) == 2 and all(map(math.isfinite, outcome.losses)) and outcome.seconds > 0
    rotated = ARMS[arm].until > 0
    assert (0 < outcome.inexact < 1e-5) == rotated and (outcome.rotating > 0) == rotated
    assert (arm in (RANDOM, ROTATED)) <= rotated


def test_a_run_is_the_same_again_and_is_taken_from_the_record(tmp_path: Path) -> None:
    plan = results.Plan(["d = 128"], [PLAIN], seeds=1, steps=20)
    small = {"d = 128": results.Setting("d = 128", 32, 20)}
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "SETTINGS", small)
        patch.setattr(results, "RATES", (3e-3, 6e-3))
        patch.setattr(results, "MOST_RATES", 2)
        first = results.run(TEXT, plan, tmp_path, said.append)
        count = len((tmp_path / "transformer.jsonl").read_text().splitlines())
        assert count == 3
        assert results.run(TEXT, plan, tmp_path, said.append) == first
        assert len((tmp_path / "transformer.jsonl").read_text().splitlines()) == count
