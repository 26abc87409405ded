"""The study: its jobs, the files of their records, what is computed from made-up records, and small real runs."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from experiments import __main__ as command_line
from experiments.data import load_diabetes
from experiments.study import program, results, runner, tables
from experiments.study.jobs import (
    DEFAULTS,
    FULL,
    MAIN_ARMS,
    NUDGE,
    PLAIN,
    QUICK,
    TELEPORTED,
    Job,
    Study,
    state_arms,
)
from experiments.study.measure import LATER, measure, train_loss
from experiments.study.problems import PROBLEMS, Problem, fingerprint, load, make_task
from experiments.study.records import Check, Line, Record, Teleport, Validation, read_line, write_line
from experiments.study.store import Store
from experiments.study.summary import load_summaries, save_summaries, summarise
from experiments.training import OPTIMIZERS, BoundedTeleports, TeleportSettings, start, train
from symtele_cuda import Schedule, Teleporter, TeleportError, teleporter

EXTRAS = ("matplotlib", "sklearn", "tqdm")
needs_extras = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in EXTRAS), reason="needs symtele_cuda[demo]"
)
ROOT = Path(__file__).resolve().parents[1]

TINY = Problem("digits", "digits", (16,), batch_size=40, epochs=2, check_every=4, samples=400)
TINY_STUDY = Study(TINY, {"sgd": (0.01,)}, targets=(2.0, 1e-9), seconds=(1.0, 1.0), seeds=(1,), state_seeds=(1,))
LADDER = Study(
    TINY, {"sgd": (0.1, 0.3, 1.0), "adam": (0.01, 0.1)}, targets=(1.0, 0.5), seconds=(9.0, 1.0), seeds=(1, 2)
)


def made_up(losses: Sequence[float], teleports: Sequence[Teleport] = (), accuracy: float = 0.9) -> Record:
    """A record with a check every 10 iterations and two seconds, ten of which are an epoch's half."""
    checks = tuple(Check(10 * index, 2.0 * index, loss) for index, loss in enumerate(losses))
    return Record(20, checks, (Validation(0.7, 0.5), Validation(0.5, accuracy)), tuple(teleports), refused=0)


def all_records(study: Study, plain: Record, teleported: Record) -> dict[Job, Record]:
    """Those of the first jobs, and of the nudged ones of all rates."""
    jobs = {replace(job, teleports=NUDGE) for job in study.main_jobs()} | set(study.first_jobs())
    return {job: plain if job.teleports is None else teleported for job in jobs}


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_a_key_depends_on_every_setting() -> None:
    job = Job(TINY, "sgd", 0.1, DEFAULTS, 0)
    others = [
        replace(job, problem=replace(TINY, widths=(17,))),
        replace(job, problem=replace(TINY, check_every=5)),
        replace(job, optimizer="adam"),
        replace(job, lr=0.2),
        replace(job, teleports=None),
        replace(job, teleports=replace(DEFAULTS, margin=3.0)),
        replace(job, seed=1),
    ]
    assert len({job.key, *(other.key for other in others)}) == 1 + len(others)
    assert replace(job, teleports=TeleportSettings()).key == job.key


def test_the_bounded_teleports_have_the_defaults_of_the_library_and_the_study_s_have_no_bounds() -> None:
    own = {name: parameter.default for name, parameter in inspect.signature(Teleporter).parameters.items()}
    suited = teleporter.CAREFUL.suited_to(teleporter.LOOK_AHEAD)
    defaults = own | vars(teleporter.LOOK_AHEAD) | vars(suited) | {"schedule": teleporter.EARLY, "layers": "last"}
    bounded, names = BoundedTeleports(), {field.name for field in fields(BoundedTeleports)}
    assert Schedule(bounded.epochs, bounded.teleports_per_epoch) == defaults["schedule"]
    for name in names - {"epochs", "teleports_per_epoch", "action", "inverse", "step_size"}:
        assert getattr(bounded, name) == defaults[name], name
    assert bounded.method == teleporter.LOOK_AHEAD
    assert bounded.bounds == (defaults["max_weight_change"], defaults["max_sensitivity"])
    assert DEFAULTS.bounds == (math.inf, math.inf)
    others = {field.name for field in fields(TeleportSettings)} - {"steps", "first_radius"}
    assert all(getattr(DEFAULTS, name) == getattr(bounded, name) for name in others)


@pytest.mark.parametrize("studies", [FULL, QUICK])
def test_every_problem_has_every_optimizer(studies: dict[str, Study]) -> None:
    briefly = {name for name, study in studies.items() if study.brief}
    assert briefly == {"mnist-512-muon"}
    assert set(studies["mnist-512"].rates) | set(studies["mnist-512-muon"].rates) == set(OPTIMIZERS)
    assert all(set(studies[name].rates) == set(OPTIMIZERS) for name in studies if not name.startswith("mnist-512"))


@pytest.mark.parametrize("study", [*FULL.values(), *QUICK.values()], ids=lambda study: study.problem.name)
def test_the_grid_has_every_rate_arm_and_seed_once(study: Study) -> None:
    jobs = study.first_jobs()
    keys = [job.key for job in jobs]
    assert len(set(keys)) == len(keys)
    main = {(job.optimizer, job.lr, job.teleports, job.seed) for job in study.main_jobs()}
    rates = sum(len(rates) for rates in study.rates.values())
    assert len(main) == rates * len(MAIN_ARMS) * (1 if study.brief else 1 + len(study.seeds))
    for ladder in study.rates.values():
        assert list(ladder) == sorted(set(ladder))
        assert len(ladder) >= (5 if study in FULL.values() else 2)
    assert study.tuning_seed not in study.seeds and set(study.state_seeds) <= set(study.seeds)
    state = set(study.state_jobs()) - set(study.main_jobs())
    if study.brief:
        assert state == set()
        return
    # one of the ways with the state is the default, so that its runs are main runs
    assert {job.teleports for job in state} == set(state_arms("momentum").values()) - set(MAIN_ARMS.values())
    # Adam's lookahead is along its next step by default
    own_step = {job.optimizer for job in state if job.teleports.objective == "next_step"}
    assert own_step == {"momentum", "muon"} & set(study.rates)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_record_survives_its_line() -> None:
    teleport = Teleport(20, 0.25, True, 1.0, 1.5, math.nan)
    record = made_up([2.0, 1.0, 0.123456789, math.nan], [teleport], accuracy=math.nan)
    line = write_line(Job(TINY, "sgd", 0.1, DEFAULTS, 3), "data", "torch", record)
    read = read_line(line)
    assert "\n" not in line and "NaN" not in line
    assert (read.key, read.data, read.made) == (Job(TINY, "sgd", 0.1, DEFAULTS, 3).key, "data", "torch")
    assert [check.train_loss for check in read.record.checks[:3]] == [2.0, 1.0, 0.12346]
    assert math.isnan(read.record.final.train_loss) and math.isnan(read.record.validations[1].accuracy)
    assert read.record.checks[1] == record.checks[1] and read.record.validations[0] == record.validations[0]
    assert repr(read.record.teleports) == repr(record.teleports)


def test_a_run_that_was_cut_short_is_the_plain_one_and_its_refusals(tmp_path: Path) -> None:
    plain_job = Job(TINY, "sgd", 0.1, None, 3)
    job = replace(plain_job, teleports=DEFAULTS)
    plain = made_up([2.0, 1.0, 0.5, 0.25])
    refusals = [Teleport(at, seconds, False, 1.5, 1.5, math.nan) for at, seconds in ((0, 0.5), (10, 0.25))]
    short = replace(made_up([2.0, 1.0], refusals), validations=(Validation(0.7, 0.5),), cut_short=True)
    store = Store(tmp_path, "digits")
    store.append(job, "data", "torch", short)
    assert '"cut_short":true' in store.path.read_text() and store.missing([job], "data") == []
    assert store.of([job]) == {}  # what it goes on as is not there
    store.append(plain_job, "data", "torch", plain)
    assert '"cut_short"' not in store.path.read_text().splitlines()[1]
    record = store.of([job])[job].record
    assert [check.seconds for check in record.checks] == [0.0, 2.5, 4.75, 6.75]
    assert [check.train_loss for check in record.checks] == [2.0, 1.0, 0.5, 0.25]
    assert (record.validations, record.accepted, record.cut_short) == (plain.validations, [], False)
    assert record.teleport_share == pytest.approx(0.75 / 6.75)
    other = replace(job, seed=4)
    store.append(other, "data", "torch", replace(short, checks=made_up([2.0, 1.1]).checks))
    store.append(replace(plain_job, seed=4), "data", "torch", plain)
    with pytest.raises(ValueError, match=r"seed 4: a run without a teleport must have .* got 1\.1 for 1\.0 after 10"):
        store.of([job, other])


def test_a_store_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    first, second, third = (Job(TINY, "sgd", 0.1, None, seed) for seed in range(3))
    record = made_up([2.0, 1.0])
    store = Store(tmp_path, "digits")
    assert store.missing([first, second], "data") == [first, second]
    store.append(first, "data", "torch", record)
    store.append(second, "data", "torch", record)
    text = store.path.read_bytes()
    store.path.write_bytes(text[:-20])

    again = Store(tmp_path, "digits")
    assert again.cut == len(text.splitlines()[1]) + 1 - 20
    assert again.missing([first, second, third], "data") == [second, third]
    again.append(third, "data", "torch", record)
    last = Store(tmp_path, "digits")
    assert last.cut == 0
    assert set(last.of([first, second, third])) == {first, third}


def test_a_record_counts_for_its_settings_and_its_data_only(tmp_path: Path) -> None:
    job = Job(TINY, "sgd", 0.1, None, 0)
    store = Store(tmp_path, "digits")
    store.append(job, "old data", "torch", made_up([2.0, 1.0]))
    assert store.missing([job], "old data") == []
    assert store.missing([job], "new data") == [job]
    changed = replace(job, problem=replace(TINY, epochs=3))
    assert store.missing([changed], "old data") == [changed]
    assert store.of([changed]) == {}


def test_records_of_different_data_are_not_mixed(tmp_path: Path) -> None:
    jobs = [Job(TINY, "sgd", 0.1, None, seed) for seed in range(2)]
    store = Store(tmp_path, "digits")
    for job, data in zip(jobs, ("old", "new"), strict=True):
        store.append(job, data, "torch", made_up([2.0, 1.0]))
    with pytest.raises(ValueError, match="must hold runs on one set of data, got new; old"):
        store.of(jobs)


@pytest.mark.parametrize("line", ["nonsense", "{}", "[1]", '{"key": 1, "checks": {}}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    good = write_line(Job(TINY, "sgd", 0.1, None, 0), "data", "torch", made_up([1.0]))
    (tmp_path / "study-digits.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=r"study-digits\.jsonl, line 2: expected the record of a run"):
        Store(tmp_path, "digits")


# --- results ---------------------------------------------------------------------------------------------------------


def test_the_best_rate_is_the_one_with_the_lowest_finite_loss_on_the_tuning_seed() -> None:
    records = all_records(LADDER, made_up([2.0, 1.0]), made_up([2.0, 1.5]))

    def tuned(optimizer: str, lr: float, arm: str, record: Record) -> None:
        records[Job(TINY, optimizer, lr, MAIN_ARMS[arm], LADDER.tuning_seed)] = record

    tuned("sgd", 0.3, PLAIN, made_up([2.0, 0.4]))
    tuned("sgd", 1.0, PLAIN, made_up([2.0, math.nan]))
    tuned("sgd", 1.0, TELEPORTED, made_up([2.0, 0.1]))
    assert results.choose_rate(LADDER, records, "sgd", PLAIN) == results.Choice(0.3, "")
    assert results.choose_rate(LADDER, records, "sgd", TELEPORTED) == results.Choice(1.0, "highest")
    for lr in LADDER.rates["adam"]:
        tuned("adam", lr, PLAIN, made_up([2.0, 2.5]))  # above the start: diverged, though finite
    assert results.choose_rate(LADDER, records, "adam", PLAIN) == results.Choice(None, "")
    outcomes = results.worth(LADDER, records)
    (adam,) = (outcome for outcome in outcomes if (outcome.optimizer, outcome.arm) == ("adam", PLAIN))
    assert adam.train_loss.count == 0 and adam.train_loss.of == 2


def test_time_to_a_loss_is_that_of_the_first_check_with_it() -> None:
    record = made_up([2.0, 1.0, 0.4, 0.6])
    assert results.time_to(record, 1.0) == (2.0, 0.5)
    assert results.time_to(record, 0.5) == (4.0, 1.0)
    assert all(map(math.isnan, results.time_to(record, 0.1)))


def test_numbers_have_no_exponent_that_their_digits_do_not_need() -> None:
    shown = [tables._spread(results.Spread(mean, deviation, 2, 2)) for mean, deviation in ((136.4, 9.6), (0.0123, 14))]
    assert shown == ["136 ± 10", "0.0123 ± 14"]


def test_spreads_say_how_many_got_there() -> None:
    spread = results.spread([1.0, 3.0, math.nan])
    assert (spread.mean, spread.count, spread.of) == (2.0, 2, 3)
    assert spread.deviation == pytest.approx(math.sqrt(2))
    assert math.isnan(results.spread([math.nan]).mean)


def test_outcomes_are_of_the_seeds_that_did_not_choose_the_rate() -> None:
    records = all_records(LADDER, made_up([2.0, 1.0, 0.8]), made_up([2.0, 1.0, 0.5]))
    for seed, losses in ((0, [2.0, 0.1, 0.1]), (1, [2.0, 0.9, 0.4]), (2, [2.0, 1.1, 0.6])):
        records[Job(TINY, "sgd", 0.3, DEFAULTS, seed)] = made_up(losses)
    outcome = next(entry for entry in results.worth(LADDER, records) if entry.arm == TELEPORTED)
    assert outcome.choice == results.Choice(0.3, "")
    assert outcome.train_loss == results.Spread(0.5, pytest.approx(math.sqrt(0.02)), 2, 2)
    first, second = outcome.targets
    assert (first.loss, first.seconds.mean, first.epochs.mean) == (1.0, 3.0, 0.75)
    assert (second.loss, second.seconds.mean, second.seconds.count, second.seconds.of) == (0.5, 4.0, 1, 2)


def test_a_verdict_is_between_optimizers_that_got_there_on_every_seed() -> None:
    records = all_records(LADDER, made_up([2.0, 1.0, 0.8]), made_up([2.0, 1.1, 0.4]))
    for lr in LADDER.rates["adam"]:
        for seed in (0, 1, 2):
            records[Job(TINY, "adam", lr, DEFAULTS, seed)] = made_up([2.0, 0.9, 0.45 if seed == 1 else 0.55])
    outcomes = results.worth(LADDER, records)
    verdicts = {verdict.quantity: verdict for verdict in results.verdicts(LADDER, outcomes)}
    first, second = verdicts["seconds to train loss 1"], verdicts["seconds to train loss 0.5"]
    assert first.plain is not None and first.teleported is not None and second.teleported is not None
    assert (first.plain.value.mean, first.teleported.optimizer, first.ratio) == (2.0, "adam", 1.0)
    assert second.plain is None and second.teleported.optimizer == "sgd" and math.isnan(second.ratio)
    assert verdicts["train loss at the end"].ratio == pytest.approx(0.5)
    error = verdicts["validation error"].plain
    assert error is not None and error.value.mean == pytest.approx(0.1)


def test_no_accuracy_no_verdict_on_it() -> None:
    record = replace(made_up([2.0, 1.0]), validations=(Validation(0.5, math.nan),))
    outcomes = results.worth(LADDER, all_records(LADDER, record, record))
    assert "validation error" not in {verdict.quantity for verdict in results.verdicts(LADDER, outcomes)}


def test_the_worst_ratio_is_of_mean_curves_after_the_last_teleport() -> None:
    early, late = (Teleport(iteration, 0.1, True, 1.0, 1.1, 0.9) for iteration in (5, 15))
    plain = [made_up([2.0, 1.0, 0.8, 0.4]), made_up([2.0, 1.0, 0.8, 0.4])]
    teleported = [made_up([2.0, 9.0, 0.7, 0.3], [early]), made_up([2.0, 9.0, 1.3, 0.5], [early, late])]
    ratio, epoch, loss = results.worst_ratio(plain, teleported)
    assert (ratio, epoch, loss) == (pytest.approx(1.0 / 0.8), 1.0, pytest.approx(0.8))
    assert all(map(math.isnan, results.worst_ratio(plain, plain)))  # no teleport
    after_all = replace(late, iteration=30)
    assert all(map(math.isnan, results.worst_ratio(plain, [made_up([2.0, 1.0, 0.8, 0.4], [after_all])] * 2)))
    vanished = [made_up([2.0, 1.0, 0.0, 0.0])] * 2
    assert results.worst_ratio(vanished, teleported)[0] == math.inf


def test_harm_counts_what_diverged_only_with_teleports() -> None:
    teleport = Teleport(5, 0.1, True, 1.0, 1.1, 0.9)
    refused = replace(teleport, accepted=False)
    records = all_records(LADDER, made_up([2.0, 1.0, 0.5]), made_up([2.0, 1.0, 0.505], [teleport]))
    for lr, teleports, losses in (
        (0.1, DEFAULTS, [2.0, 1.0, 2.1]),
        (0.3, None, [2.0, math.nan]),
        (1.0, DEFAULTS, [2.0, 1.03, 0.515]),
    ):
        for seed in (1,) if lr < 1 else (1, 2):
            records[Job(TINY, "sgd", lr, teleports, seed)] = made_up(losses, [teleport, refused] if teleports else [])
    first, second, third = results.no_harm(LADDER, records)[:3]
    assert (first.plain_diverged, first.teleported_diverged, first.harmed_seeds) == (0, 1, 1)
    assert first.teleports == third.teleports == 2
    assert first.ratio == pytest.approx(1.01) and not first.curve_is_higher
    assert (second.plain_diverged, second.teleported_diverged, second.harmed_seeds) == (1, 0, 0)
    assert third.ratio == pytest.approx(1.03) and third.curve_is_higher
    text = tables.harm_table([first, second, third])
    assert "**1 of 2**" in text and "**1.030**" in text and "**1.010**" not in text
    assert third.by_chance == pytest.approx(1.01) and third.beyond_chance
    lucky = replace(third, by_chance=1.04)
    assert lucky.curve_is_higher and not lucky.beyond_chance and "**1.030**" not in tables.harm_table([lucky])
    still = replace(second, teleports=0, by_chance=math.nan)
    sentence = tables.harm_sentence([first, still, lucky])
    assert sentence.startswith("1 of 6 runs diverged only with teleports. Something was teleported at 2 of 3 rates.")
    assert "next to nothing, it was at 1. At 0 it was higher than both." in sentence


def test_the_rate_table_has_share_rises_and_what_is_left_of_them() -> None:
    made = [
        Teleport(5, 0.1, True, 1.0, 1.1, 0.9),
        Teleport(6, 0.1, True, 1.0, 1.3, 1.05),
        Teleport(7, 0.1, False, 1.0, 1.0, 1.2),  # rejected: nothing rose
        Teleport(8, 0.1, True, 1.0, 1.2, math.nan),
    ]
    records = all_records(LADDER, made_up([2.0, 1.0, 0.8, 0.7]), made_up([2.0, 0.6, 0.5, 0.4], made, accuracy=0.95))
    records[Job(TINY, "sgd", 0.1, DEFAULTS, 2)] = made_up([2.0, 1.0, 0.9, 0.75], made)
    records |= {Job(TINY, "adam", 0.01, DEFAULTS, seed): made_up([2.0, 1.0]) for seed in (1, 2)}
    rates = results.by_rate(LADDER, records)
    assert [(rate.optimizer, rate.lr) for rate in rates] == [
        ("sgd", 0.1),
        ("sgd", 0.3),
        ("sgd", 1.0),
        ("adam", 0.01),
        ("adam", 0.1),
    ]
    rate = rates[0]
    assert (rate.share.mean, rate.share.count, rate.share.of) == (pytest.approx(1 / 3), 1, 2)
    assert (rate.mean_rise, rate.largest_rise) == (pytest.approx(0.2), pytest.approx(0.3))
    assert (rate.gone, rate.teleports) == (2, 6)
    assert rate.teleported_accuracy.mean == pytest.approx(0.925)
    table = tables.rate_table(rates)
    assert "| sgd, 0.1 | 0.7 ± 0 | 0.575 ± 0.2 | 33.3 ± 0 % (1 of 2) |" in table
    assert "| adam, 0.1 |" in table and "| adam, 0.01 |" not in table  # nothing was teleported there


def test_states_are_compared_at_the_rates_in_the_middle() -> None:
    study = replace(LADDER, rates={"momentum": (0.1, 0.2, 0.3)}, state_seeds=(1, 2))
    records = all_records(study, made_up([2.0, 1.0]), made_up([2.0, 0.5]))
    for seed in (1, 2):
        settings = replace(DEFAULTS, optimizer_state="reset")
        records[Job(TINY, "momentum", 0.2, settings, seed)] = made_up([2.0, 0.25])
    (entry,) = results.states(study, records)
    assert (entry.optimizer, entry.lr) == ("momentum", 0.2)
    assert {arm: spread.mean for arm, spread in entry.losses.items()} == {
        PLAIN: 1.0,
        "keep": 0.5,
        "reset": 0.25,
        "any gain": 0.5,
        "next step": 0.5,
    }


def test_only_optimizers_with_all_their_runs_are_reported() -> None:
    records = all_records(LADDER, made_up([2.0, 1.0]), made_up([2.0, 0.5]))
    assert results.complete(LADDER, records) == LADDER
    without_state = dict(records)
    del without_state[next(job for job in LADDER.state_jobs() if job.optimizer == "adam")]
    assert set(results.complete(LADDER, without_state).rates) == {"sgd"}
    nudged = Job(TINY, "sgd", 0.3, NUDGE, 2)
    del records[nudged]
    assert results.complete(LADDER, records) == LADDER  # nothing was teleported at this rate
    records[Job(TINY, "sgd", 0.3, DEFAULTS, 1)] = made_up([2.0, 0.5], [Teleport(0, 0.1, True, 2.0, 1.9, math.nan)])
    assert set(results.complete(LADDER, records).rates) == {"adam"}
    assert results.following_jobs(LADDER, records) == [replace(nudged, seed=1), nudged]


def test_rates_at_which_teleports_seem_to_do_harm_are_looked_at_again() -> None:
    teleport = [Teleport(0, 0.1, True, 2.0, 1.9, math.nan)]
    records = all_records(LADDER, made_up([2.0, 1.0]), made_up([2.0, 0.9]))
    for lr, nudged in ((0.1, 1.2), (0.3, 1.0)):  # above the plain curve at both, above the nudged one at the second
        for seed in LADDER.seeds:
            records[Job(TINY, "sgd", lr, DEFAULTS, seed)] = made_up([2.0, 1.1], teleport)
            records[Job(TINY, "sgd", lr, NUDGE, seed)] = made_up([2.0, nudged], teleport)
    again = results.looked_at_again(LADDER, records)
    assert again.all_rates() == [("sgd", 0.3)] and again.seeds == LADDER.fresh_seeds
    fresh = [
        Job(TINY, "sgd", 0.3, teleports, seed) for teleports in (None, DEFAULTS, NUDGE) for seed in LADDER.fresh_seeds
    ]
    assert [job for job in results.following_jobs(LADDER, records) if job not in records] == fresh
    assert set(results.complete(LADDER, records).rates) == {"adam"}
    lacking = dict(records)
    del lacking[Job(TINY, "sgd", 0.1, NUDGE, 1)]
    assert not set(fresh) & set(results.following_jobs(LADDER, lacking))  # chance is not known yet
    losses = {None: 1.0, DEFAULTS: 0.5, NUDGE: 1.0}
    records |= {job: made_up([2.0, losses[job.teleports]], [] if job.teleports is None else teleport) for job in fresh}
    assert results.complete(LADDER, records) == LADDER
    (harm,) = results.no_harm(again, records)
    assert (harm.lr, harm.seeds, harm.ratio, harm.beyond_chance) == (0.3, 20, 0.5, False)
    store_lines = {job: Line(job.key, "data", "torch", record) for job, record in records.items()}
    text = tables.section(summarise(LADDER, store_lines))
    assert (
        "### Harm beyond chance, looked at again on seeds 6 to 25" in text
        and "| sgd, 0.3 | 20 | 0 of 20 | 0 of 20 | 0.500 |" in text
    )


def test_a_brief_study_runs_all_seeds_at_the_best_rates_alone() -> None:
    study = replace(LADDER, rates={"muon": (0.1, 0.2, 0.3)}, brief=True)
    losses = {None: {0.1: 0.9, 0.2: 0.5, 0.3: 0.7}, DEFAULTS: {0.1: 0.8, 0.2: 0.6, 0.3: 0.4}}
    records = {job: made_up([2.0, losses[job.teleports][job.lr]]) for job in study.first_jobs()}
    assert {job.seed for job in records} == {study.tuning_seed} and len(records) == 6
    assert set(results.complete(study, records).rates) == set()
    following = results.following_jobs(study, records)
    assert {(job.lr, job.teleports, job.seed) for job in following} == {
        (lr, teleports, seed) for lr, teleports in ((0.2, None), (0.3, DEFAULTS)) for seed in study.seeds
    }
    records |= {job: made_up([2.0, 0.25]) for job in following}
    assert results.complete(study, records) == study
    plain, teleported = results.worth(study, records)
    assert (plain.choice.lr, teleported.choice.lr) == (0.2, 0.3)
    assert plain.train_loss == teleported.train_loss == results.Spread(0.25, 0.0, 2, 2)
    assert results.no_harm(study, records) == results.by_rate(study, records) == results.states(study, records) == []
    tunings = results.tuning(study, records)
    assert tunings[0] == results.Tuning("muon", 0.1, 0.9, 0.8, teleports=0) and len(tunings) == 3
    assert "| muon, 0.3 | 0 | 0.7 | 0.4 |" in tables.tuning_table(tunings)
    assert results.tuning(LADDER, all_records(LADDER, made_up([2.0]), made_up([2.0]))) == []


def test_the_page_is_made_from_the_summary_file(tmp_path: Path) -> None:
    store = Store(tmp_path, "digits")
    records = all_records(LADDER, made_up([2.0, 1.0, 0.8]), made_up([2.0, 1 / 3, 0.2]))
    made = [Teleport(0, 0.1, True, 2.0, 1.9, math.nan)]
    records |= {Job(TINY, "sgd", 0.3, DEFAULTS, seed): made_up([2.0, 1 / 3, 0.2], made) for seed in LADDER.seeds}
    for job, record in records.items():
        store.append(job, "made-up data", "torch", record)
    summary = summarise(LADDER, store.of(records))
    path = save_summaries(tmp_path / "study.json", [LADDER], [summary])
    (loaded,) = load_summaries(path)
    assert tables.page([loaded]) == tables.page([summary])
    assert loaded.worth[1].train_loss == results.Spread(0.2, 0.0, 2, 2)
    assert loaded.made == {"torch": len(LADDER.first_jobs()) + 2}  # nudged at one rate, on two seeds
    assert math.isnan(loaded.harm[0].ratio)  # no teleport in these records
    assert (loaded.by_rate[1].lr, loaded.by_rate[1].teleports) == (0.3, 2)
    for heading in (
        "## digits",
        "### Every optimizer at its best rate",
        "### Harm",
        "### Rate by rate",
        "### The optim",
    ):
        assert heading in tables.page([loaded])


# --- runs ------------------------------------------------------------------------------------------------------------


@needs_extras
def test_measuring_leaves_the_training_as_it_is() -> None:
    task = make_task(TINY, load(TINY, None), seed=3)
    for teleports in (None, replace(DEFAULTS, batch_size=40, teleports_per_epoch=2)):
        job = Job(TINY, "sgd", 0.1, teleports, 3)
        record = measure(job, task)
        expected = train(task, job.training, teleports, "run", seed=3)
        assert [check.iteration for check in record.checks] == [0, 4, 8, 12, 16]
        assert record.iterations_per_epoch == 8
        for check, epoch in zip(record.checks[::2], expected.epochs, strict=True):
            assert check.train_loss == pytest.approx(epoch.train_loss, rel=1e-6)
        for ours, theirs in zip(record.validations, expected.epochs[1:], strict=True):
            assert (ours.loss, ours.accuracy) == (theirs.validation_loss, theirs.validation_accuracy)
        seconds = [check.seconds for check in record.checks]
        assert seconds[0] == 0 and seconds == sorted(seconds)


@needs_extras
def test_a_teleport_is_measured_on_the_whole_training_set() -> None:
    problem = replace(TINY, samples=1797, batch_size=40, check_every=36, epochs=5)
    task = make_task(problem, load(problem, None), seed=0)
    settings = replace(DEFAULTS, epochs=(1,), batch_size=40, teleports_per_epoch=1, holdout_size=0)
    record = measure(Job(problem, "sgd", 0.05, settings, 0), task)
    (teleport,) = record.teleports
    losses = {check.iteration: check.train_loss for check in record.checks}
    assert teleport.accepted and teleport.iteration == record.iterations_per_epoch == 36
    assert teleport.loss_before == losses[36]
    assert 0 < abs(teleport.loss_after / teleport.loss_before - 1) < 0.5
    assert losses[144] < teleport.loss_later < losses[108] and 108 < 36 + LATER < 144
    assert 0 < teleport.seconds < record.final.seconds


@needs_extras
def test_a_diverging_run_ends_at_the_check_that_sees_it() -> None:
    task = make_task(TINY, load(TINY, None), seed=0)
    for check_every in (4, 100):  # the second sees it at the teleporter's refusal of weights that are not finite
        problem = replace(TINY, check_every=check_every)
        record = measure(Job(problem, "sgd", 1e30, DEFAULTS, 0), task)
        assert (record.diverged and math.isnan(record.final.train_loss)) or math.isinf(record.final.train_loss)
        assert record.final.iteration <= 8 and not record.teleports


@needs_extras
def test_a_teleport_that_cannot_be_done_is_counted_and_any_other_error_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = make_task(TINY, load(TINY, None), seed=0)
    errors: dict[str, type[Exception]] = {"raised": TeleportError}

    def failing(*_: object, **__: object) -> None:
        raise errors["raised"]("no")

    monkeypatch.setattr(Teleporter, "step", failing)
    record = measure(Job(TINY, "sgd", 0.1, DEFAULTS, 0), task)
    assert record.refused == 8 and record.final.iteration == 16 and not record.teleports
    errors["raised"] = ValueError
    with pytest.raises(ValueError, match="no"):
        measure(Job(TINY, "sgd", 0.1, DEFAULTS, 0), task)


@needs_extras
def test_a_run_without_a_teleport_is_cut_short_and_completed_by_the_plain_one(tmp_path: Path) -> None:
    """What is left out is what would come: the completed run is the one in full, but for its seconds."""
    problem = replace(TINY, samples=1797, epochs=3)
    task = make_task(problem, load(problem, None), seed=0)
    store = Store(tmp_path, "digits")
    for optimizer in ("sgd", "muon"):
        for accepts, gain in ((False, 1e6), (True, 0.0)):
            job = Job(problem, optimizer, 0.02, replace(DEFAULTS, min_gain=gain), 0)
            full, record = measure(job, task), measure(job, task, in_full=False)
            assert bool(full.accepted) == bool(record.accepted) == accepts and record.teleports
            assert record.cut_short == (not accepts) and not full.cut_short
            assert len(record.validations) == (3 if accepts else 1)
            for one in (job, replace(job, teleports=None)):
                if store.missing([one], "data"):
                    store.append(one, "data", "torch", record if one == job else measure(one, task, in_full=False))
            completed, whole = store.of([job])[job].record, read_line(write_line(job, "data", "torch", full)).record
            assert [(check.iteration, check.train_loss) for check in completed.checks] == [
                (check.iteration, check.train_loss) for check in whole.checks
            ]
            assert completed.validations == whole.validations
            plain = store.of([replace(job, teleports=None)])[replace(job, teleports=None)].record
            if not accepts:
                asked = sum(teleport.seconds for teleport in record.teleports)
                assert completed.final.seconds == pytest.approx(plain.final.seconds + asked, rel=1e-4)


@needs_extras
def test_the_train_loss_is_that_of_one_large_batch() -> None:
    problem = PROBLEMS["digits"]
    task = make_task(problem, load(problem, None), seed=0)
    trainee = start(task, Job(problem, "sgd", 0.1, None, 0).training, None, seed=0)
    with torch.no_grad():
        whole = task.loss_fn(trainee.model(task.train.inputs), task.train.targets).item()
    assert len(task.train) > 1000  # more than a chunk
    assert train_loss(trainee) == pytest.approx(whole, rel=1e-6)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in trainee.model.named_parameters()}
    assert train_loss(trainee, zeros) == pytest.approx(math.log(10), rel=1e-6)


@needs_extras
def test_a_regression_is_standardised_on_its_training_part() -> None:
    problem = PROBLEMS["diabetes"]
    dataset = load(problem, None)
    task = make_task(problem, dataset, seed=2)
    assert task.dims == (10, 64, 64, 1) and len(task.train) + len(task.validation) == 442
    for column in (task.train.inputs.double(), task.train.targets.double()):
        assert column.mean(dim=0).abs().max() < 1e-5
        assert (column.std(dim=0, correction=0) - 1).abs().max() < 1e-5
    assert task.validation.inputs.mean(dim=0).abs().max() > 1e-3
    record = measure(Job(replace(problem, epochs=1), "sgd", 0.01, None, 0), task)
    assert math.isnan(record.validations[0].accuracy) and record.final.train_loss < record.checks[0].train_loss


@needs_extras
def test_a_fingerprint_is_of_the_data() -> None:
    dataset = load_diabetes()
    changed = replace(dataset, inputs=dataset.inputs + 1)
    assert fingerprint(dataset) == fingerprint(load_diabetes()) != fingerprint(changed)


# --- the program -----------------------------------------------------------------------------------------------------


def run_study(*arguments: object) -> int:
    return command_line.main(["study", *map(str, arguments)])


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Runs of TINY_STUDY alone, in this process; the jobs that have run."""
    ran: list[Job] = []

    def run_jobs(jobs: dict[Job, float], data_dir: Path | None, processes: int):
        for job in jobs:
            ran.append(job)
            yield job, runner.run_job(job, data_dir)

    monkeypatch.setattr(program, "run_jobs", run_jobs)
    monkeypatch.setattr(command_line, "QUICK", {"digits": TINY_STUDY})
    return ran


@needs_extras
def test_study_command(tmp_path: Path, in_process: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_study("--quick", "--problem", "digits", "--out", tmp_path) == 0
    assert len(in_process) == 5
    main = {(teleports, seed) for teleports in MAIN_ARMS.values() for seed in (0, 1)}
    assert {(job.teleports, job.seed) for job in in_process} == main | {(NUDGE, 1)}
    printed = capsys.readouterr().out
    page = (tmp_path / "study.md").read_text()
    assert page.strip() in printed and tables.page(load_summaries(tmp_path / "study.json")) == page.strip()
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len((tmp_path / "study-digits.jsonl").read_text().splitlines()) == 5

    (tmp_path / "study.md").unlink()
    assert run_study("--quick", "--tables", "--out", tmp_path) == 0
    assert (tmp_path / "study.md").read_text() == page and len(in_process) == 5


@needs_extras
def test_study_resumes(tmp_path: Path, in_process: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_study("--quick", "--problem", "digits", "--out", tmp_path) == 0
    path = tmp_path / "study-digits.jsonl"
    text = path.read_text()
    path.write_text(text[:-7])
    done = len(in_process)
    assert run_study("--quick", "--problem", "digits", "--out", tmp_path) == 0
    assert in_process[done:] == in_process[done - 1 : done]
    assert "dropped the last line, which an interruption has cut off" in capsys.readouterr().err
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(set(keys)) == len(keys) == 5


@needs_extras
def test_failed_runs_do_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    def run_jobs(jobs: dict[Job, float], data_dir: Path | None, processes: int):
        for job in jobs:
            bad = job.seed == TINY_STUDY.tuning_seed and job.teleports is None
            yield job, TeleportError("no way") if bad else runner.run_job(job, data_dir)

    monkeypatch.setattr(program, "run_jobs", run_jobs)
    assert run_study("--quick", "--out", tmp_path) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 4 runs failed, the first (digits sgd 0.01 plain, seed 0) with: no way" in message
    assert len((tmp_path / "study-digits.jsonl").read_text().splitlines()) == 3  # all but those that depend on it


@needs_extras
def test_processes_hand_back_records_and_errors() -> None:
    good = Job(TINY, "sgd", 0.1, None, 0)
    bad = replace(good, problem=replace(TINY, name="mnist-512", data="mnist"))
    finished = dict(runner.run_jobs([bad, good], None, processes=1))
    assert isinstance(finished[bad], ValueError) and "--data-dir must name a folder" in str(finished[bad])
    record, here = finished[good], runner.run_job(good, None)
    assert isinstance(record, Record) and len(record.checks) == len(here.checks)
    assert record.final.train_loss == pytest.approx(here.final.train_loss, rel=1e-4)


@needs_extras
@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a group of processes")
def test_an_interrupted_study_ends_cleanly_and_goes_on(tmp_path: Path) -> None:
    words = ("-m", "experiments", "study", "--quick", "--problem", "digits", "--optimizer", "sgd", "--out", tmp_path)
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # Tests that a shell runs in the background ignore the signal, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    path = tmp_path / "study-digits.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    finished = path.read_text().count("\n")
    study = QUICK["digits"].only(["sgd"])
    assert process.returncode == 130 and errors.endswith(b"interrupted\n") and b"Traceback" not in errors
    assert 1 <= finished < len(study.first_jobs())

    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    store = Store(tmp_path, "digits")
    records = {job: line.record for job, line in store.of(study.first_jobs()).items()}
    jobs = [*study.first_jobs(), *results.following_jobs(study, records)]
    assert sorted(line.key for line in store.lines) == sorted(job.key for job in jobs)


@needs_extras
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--problem", "mnist-512"), "--data-dir must name a folder of files in MNIST's format"),
        (("--problem", "mnist-128", "--data-dir", "no/such/folder"), "no such folder: no/such/folder"),
        (("--tables",), "must hold all runs of at least one problem and optimizer, got none"),
    ],
)
def test_errors_are_one_line_and_exit_2(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_study(*arguments, "--out", tmp_path) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--processes", "0"), "--processes: must be a whole number >= 1, got '0'"),
        (("--problem", "cifar"), "invalid choice: 'cifar'"),
        (("--optimizer", "newton"), "invalid choice: 'newton'"),
    ],
)
def test_bad_options_exit_2(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_study(*arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_problems_that_need_a_folder_are_left_out_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    names = [study.problem.name for study in program.select(FULL, None, ["sgd"], None)]
    assert names == ["digits", "diabetes"]
    assert "left out without --data-dir: mnist-512, mnist-512-muon, mnist-128" in capsys.readouterr().err
    chosen = {study.problem.name: set(study.rates) for study in program.select(FULL, None, ["sgd"], Path())}
    assert chosen == {name: {"sgd"} for name in FULL if name != "mnist-512-muon"}
