"""The study of optimizers trained another time, run by run beside the committed records.

    python -m bench.evidence_again FOLDER [--out FILE]

FOLDER holds what `python -m bench.evidence --only study --again` has written in another checkout: study.json and
study-*.jsonl. A run is the same if all its losses, accuracies and teleports are, to the last digit kept; its seconds
are those of its training, teleports included. Runs that were cut short are completed by the plain ones, so that they
can be held against the same runs in full.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.evidence_files import read
from bench.harness import RESULTS, write_json
from experiments.study.jobs import FULL, Job, Study
from experiments.study.program import known_jobs
from experiments.study.records import Line, Record
from experiments.study.store import Store

COMMITTED = RESULTS / "evidence"


def compare(committed: Path, other: Path) -> dict[str, Any]:
    """By problem: how many runs both folders hold, how many are the same, and how many times as long the other took.

    Raises:
        ValueError: they have no run of a problem in common.
    """
    problems = {}
    for study in FULL.values():
        ours, theirs = (lines_of(study, folder) for folder in (committed, other))
        both = ours.keys() & theirs.keys()
        if not both:
            raise ValueError(f"{other} must hold runs of {study.problem.name} that {committed} holds too, got none")
        factors = [theirs[job].record.final.seconds / ours[job].record.final.seconds for job in both]
        problems[study.problem.name] = {
            "runs": len(both),
            "same": sum(outcome_of(ours[job]) == outcome_of(theirs[job]) for job in both),
            "in one alone": len(ours.keys() ^ theirs.keys()),
            "seconds, other / committed": {
                "least": min(factors),
                "median": statistics.median(factors),
                "largest": max(factors),
            },
        }
    return problems


def lines_of(study: Study, folder: Path) -> dict[Job, Line]:
    """All that the folder holds of the study."""
    store = Store(folder, study.problem.name)
    return store.of(known_jobs(study, store))


def outcome_of(line: Line) -> tuple[str, Record]:
    """All of a run but its time. What is not finite is equal here: a line read has one NaN for all.

    A refusal wrote nothing: a run that was cut short has not looked at the loss a while after it.
    """
    record = line.record
    checks = tuple(replace(check, seconds=0.0) for check in record.checks)
    teleports = tuple(
        replace(teleport, seconds=0.0, loss_later=teleport.loss_later if teleport.accepted else 0.0)
        for teleport in record.teleports
    )
    return line.data, replace(record, checks=checks, teleports=teleports)


def main(arguments: argparse.Namespace) -> None:
    study = read(arguments.folder / "study.json")
    document = {
        "benchmark": "again",
        "machine": next(iter(study["summaries"][0]["made"])),
        "minutes": study["minutes"],
        "problems": compare(COMMITTED, arguments.folder),
    }
    write_json(arguments.out, document)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The study trained another time, beside the committed one.")
    parser.add_argument("folder", type=Path, help="the results of the other")
    parser.add_argument("--out", type=Path, default=RESULTS / "again.json", help="the JSON file to write")
    return parser.parse_args(words)


if __name__ == "__main__":
    main(parse())
