"""The page on symmetries says what the committed numbers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import evidence_tables
from bench.evidence_files import read
from experiments.gpt.results import SETTINGS
from experiments.gpt.runs import ALWAYS, MUON, PLAIN, RANDOM, ROTATED, SOAP, SOAP_START

PAGE = " ".join((Path(__file__).parents[1] / evidence_tables.SYMMETRIES).read_text(encoding="utf-8").split())
DOCUMENT = read(evidence_tables.FOLDER / "transformer.json")
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    setting: {row["arm"]: row for row in DOCUMENT["rows"] if row["setting"] == setting} for setting in SETTINGS
}
SMALL, LARGE, LONG = SETTINGS


def says(sentence: str, *values: object) -> None:
    """Whether the page has the sentence with these values."""
    expected = sentence.format(*values)
    assert expected in PAGE, expected


@pytest.mark.parametrize("setting", SETTINGS)
def test_rotations_save_at_least_15_percent_of_the_steps_and_of_the_time(setting: str) -> None:
    ours, plain = ROWS[setting][ROTATED], ROWS[setting][PLAIN]
    assert ours["steps_to"] <= 0.85 and ours["time_to"] <= 1.0 and ours["last"] < plain["last"]


def test_random_rotations_gain_nothing_and_all_keep_the_logits() -> None:
    for setting in (SMALL, LARGE):
        control, plain = ROWS[setting][RANDOM], ROWS[setting][PLAIN]
        assert abs(control["last"] - plain["last"]) <= 2 * (control["spread"] + plain["spread"])
        assert control["last"] - ROWS[setting][ROTATED]["last"] > 2 * (control["spread"] + plain["spread"])
    assert max(row["inexact"] for rows in ROWS.values() for row in rows.values()) < 1e-5


def test_each_run_is_on_record_and_each_arm_is_compared_at_its_best() -> None:
    for setting, rows in ROWS.items():
        width, steps = SETTINGS[setting].width, SETTINGS[setting].steps
        for arm, row in rows.items():
            own = [run for run in DOCUMENT["runs"] if (run["width"], run["steps"], run["arm"]) == (width, steps, arm)]
            tuned = [run for run in own if run["seed"] == 0 and run["last"] is not None]
            beside = [run for run in tuned if (run["warm_up"], run["beta2"]) == (row["warm_up"], row["beta2"])]
            losses = {run["lr"]: run["last"] for run in beside}
            assert min(losses, key=losses.__getitem__) == row["lr"]
            assert min(losses) < row["lr"] < max(losses), (setting, arm)
            # One after the other: all three together may do a little better on that seed.
            assert losses[row["lr"]] <= min(run["last"] for run in tuned) + 0.03
            assert len({run["seed"] for run in own}) == 4


def test_what_the_page_says() -> None:
    def shares(arm: str, form: str = "{:.0f}") -> list[str]:
        return [form.format(100 * rows[arm]["steps_to"]) for rows in ROWS.values() if arm in rows]

    says("SOAP needs {}, {} and {} %", *shares(SOAP))
    says("Muon {} and {} %", *shares(MUON))
    says("rotated in the first 200 steps it needs {}, {} and {} %", *shares(ROTATED))
    says("Rotating all along makes it {} and {} %", *shares(ALWAYS))
    says("SOAP in the first 200 steps and AdamW afterwards** needs {}, {} and {} %", *shares(SOAP_START))
    times = [rows[ROTATED]["time_to"] for rows in ROWS.values()]
    says("{:.0f}, {:.0f} and {:.0f} % of the time", *(100 * time for time in times))
