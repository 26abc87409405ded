"""What a report says: one line of at most 120 characters, why this outcome, and the details on demand."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
from networks import make_batch, make_mlp
from teleports import make_teleporter, teleport_mlp

from symtele_cuda import Guards, guards
from symtele_cuda.measure import Measurement
from symtele_cuda.report import LONGEST_LINE, TeleportReport

BATCH = make_batch(12, 20, 5)
GUARDS = Guards(drift_tol=1e-4, max_sensitivity=1.2345678, max_weight_change=1.2345678, min_gain=1.23456789)
START = Measurement(loss=1.2345678, data_loss=1.2345678, objective=1.2345678, gradient_norm=1.2345678)


def make_report(**options: object) -> TeleportReport:
    return teleport_mlp(make_mlp([20, 24, 22, 5]), BATCH, **{"steps": 3, **options})


@pytest.mark.parametrize(
    "reason",
    [
        guards.refusal(GUARDS, True, START, replace(START, data_loss=9.87654e12), [0.1]),
        guards.refusal(GUARDS, True, START, replace(START, data_loss=math.nan), [0.1]),
        guards.refusal(GUARDS, True, START, START, [0.1]),
        guards.on_holdout(-1.23456789e-12, 9.87654321e12),
        guards.on_noise(GUARDS, 1.23456e-9, 9.87654e9),
        guards.on_change(1.2345678, [0.1, 1.23456e9, 0.2]),
        guards.too_little_gain(GUARDS, True, replace(START, objective=-1e-9), START),
        guards.STEPS_LONG_ENOUGH,
        guards.NONE_IMPROVED,
        guards.LATER_TAKEN_BACK,
    ],
)
def test_a_refusal_fits_its_line(reason: str) -> None:
    line = str(replace(make_report(), accepted=False, reason=reason))
    assert line == f"not teleported: {reason}" and len(line) <= LONGEST_LINE


def test_an_acceptance_fits_its_line_whatever_its_figures() -> None:
    report = make_report()
    assert report.accepted and len(str(report)) <= LONGEST_LINE
    extreme = {name: -1.23456789e-123 for name in asdict(report) if name.endswith(("before", "after"))}
    assert len(str(replace(report, **extreme, weight_change=1.23456e9))) <= LONGEST_LINE


def test_a_search_without_an_accepted_step_says_why() -> None:
    worse = make_report(objective="lookahead", lr=0.5, steps=1, first_radius=1e3)
    assert not worse.accepted and worse.reason == guards.NONE_IMPROVED
    refused = make_report(max_sensitivity=1e-3, max_growth=math.inf)
    assert not refused.accepted
    assert refused.reason.startswith("no trial step was accepted: noise in the inputs would move the logits")


def test_the_reason_is_that_of_the_outcome_and_not_of_a_state_that_was_taken_back() -> None:
    free = make_report(steps=6, max_growth=math.inf)
    kept = make_report(steps=6, max_growth=math.inf, max_weight_change=0.5 * max(free.weight_changes))
    assert kept.accepted and kept.steps < free.steps
    assert kept.reason == guards.LATER_TAKEN_BACK


def test_the_details_have_every_figure_layer_and_step() -> None:
    report = make_report(holdout=make_batch(30, 20, 5, seed=3), holdout_tol=math.inf)
    text = report.describe()
    for name in ("loss on the batch", "loss on the holdout", "objective", "‖∇L‖", "sensitivity to noise", "‖ΔW‖/‖W‖"):
        assert name in text
    assert text.count("hidden layer ") == 2 and text.count("\n  step ") == len(report.trace)
    assert report.backend in text


def test_a_report_comes_back_from_a_state_as_it_was() -> None:
    model = make_mlp([20, 24, 22, 5])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one, other = (make_teleporter(model, optimizer, batch_size=12, holdout_size=0, min_gain=0.0) for _ in range(2))
    one.step(BATCH, epoch=0)
    other.load_state_dict(one.state_dict())
    assert other.reports == one.reports and len(other.reports) == 1
