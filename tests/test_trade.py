"""What a teleport costs and gains, option by option: the figures of the trade, and the command."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import trade
from experiments.data import Dataset
from experiments.study.jobs import DEFAULTS, FOR_ANY_GAIN
from experiments.study.problems import Problem
from experiments.study.records import Check, Record, Teleport, Validation

needs_extras = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("matplotlib", "tqdm")),
    reason="needs symtele_cuda[demo]",
)
PROBLEM = Problem("small", "digits", (52, 52), batch_size=20, epochs=2, check_every=50)


def make_record(train_loss: float, *teleports: tuple[bool, float, float]) -> Record:
    return Record(
        4,
        (Check(0, 0.0, 2.0), Check(4, 1.0, train_loss)),
        (Validation(3 * train_loss, 0.5),),
        tuple(Teleport(1, 0.1, accepted, before, after, math.nan) for accepted, before, after in teleports),
        refused=0,
    )


def test_the_rises_are_those_of_the_accepted_teleports_of_all_seeds() -> None:
    records = [make_record(0.5, (True, 2.0, 2.1), (False, 1.0, 9.0)), make_record(0.3, (True, 1.0, 0.9))]
    found = trade._trade(0.1, "holdout_tol 0.03", records)
    assert found.rises == pytest.approx((0.05, -0.1)) and found.worst_rise == pytest.approx(0.05)
    assert found.time_shares == pytest.approx((0.2, 0.1))
    assert found.train_losses == (0.5, 0.3) and found.validation_losses == pytest.approx((1.5, 0.9))
    assert trade._trade(0.1, trade.PLAIN, [make_record(0.5)]).worst_rise == 0.0


def test_the_guards_differ_in_their_tolerance_alone() -> None:
    assert [settings.holdout_tol for settings in trade.guards().values()] == list(trade.TOLERANCES)
    assert list(trade.guards())[-1] == trade.UNGUARDED
    assert {replace(settings, holdout_tol=0.0) for settings in trade.guards().values()} == {
        replace(DEFAULTS, holdout_tol=0.0)
    }


def test_every_variant_is_another_one() -> None:
    settings = list(trade.variants().values())
    assert settings[0] is None and len(set(settings)) == len(settings)
    assert all(other != DEFAULTS for other in trade.OTHERS.values())


@needs_extras
def test_a_run_leaves_table_figure_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trade, "DEFAULTS", FOR_ANY_GAIN)  # so that the holdout alone refuses teleports
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1500, 60, generator=generator)
    dataset = Dataset("noise", inputs, inputs[:, :3].argmax(dim=1))
    finished: list[str] = []
    table = trade.run(dataset, PROBLEM, [0.05], [0], tmp_path, finished.append)
    assert len(finished) == len(trade.variants()) and all(variant in table for variant in trade.variants())
    assert (tmp_path / "trade.png").stat().st_size > 0
    trades = {entry["variant"]: entry for entry in json.loads((tmp_path / "trade.json").read_text())["trades"]}
    assert trades[trade.PLAIN]["rises"] == []
    free, strict = (trades[guard] for guard in (trade.UNGUARDED, "holdout_tol 0.003"))
    assert len(free["rises"]) == 3 and max(free["rises"]) > max(strict["rises"], default=0.0)
    assert free["train_losses"] != trades[trade.PLAIN]["train_losses"]
