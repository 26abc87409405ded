"""The study of optimizers trained a second time, run by run beside the committed records of the first.

    python -m bench.evidence_again FOLDER [--out FILE]

FOLDER holds what `python -m bench.evidence --only study --again` has written in another checkout: study.json and
study-*.jsonl. A run is the same if all its losses, accuracies and teleports are, to the last digit kept; its seconds
are those of its training, teleports included.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.evidence_files import read
from bench.harness import RESULTS, write_json

Record = dict[str, Any]

FIRST = RESULTS / "evidence"
# What tells a run by its settings.
NAME = ("problem", "optimizer", "lr", "arm", "seed")


def compare(first: Path, second: Path) -> dict[str, Any]:
    """By problem: how many runs both folders hold, how many are the same, and how many times as long the second took.

    Raises:
        ValueError: the folders do not hold the same runs.
    """
    problems = {}
    for path in sorted(first.glob("study-*.jsonl")):
        before, after = read_records(path), read_records(second / path.name)
        if before.keys() != after.keys():
            raise ValueError(f"{second / path.name} must hold the runs of {path}, got {len(after)} for {len(before)}")
        factors = [seconds_of(after[name]) / seconds_of(before[name]) for name in before]
        problems[path.stem.removeprefix("study-")] = {
            "runs": len(before),
            "same": sum(outcome_of(before[name]) == outcome_of(after[name]) for name in before),
            "seconds, second / first": {
                "least": min(factors),
                "median": statistics.median(factors),
                "largest": max(factors),
            },
        }
    return problems


def read_records(path: Path) -> dict[tuple[Any, ...], Record]:
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {tuple(record[key] for key in NAME): record for record in records}


def seconds_of(record: Record) -> float:
    return record["checks"]["seconds"][-1]


def outcome_of(record: Record) -> Record:
    """All of a run but its time."""
    timeless = {key: value for key, value in record.items() if key not in ("key", "made")}
    return timeless | {
        part: {key: column for key, column in record[part].items() if key != "seconds"}
        for part in ("checks", "validations", "teleports")
    }


def main(arguments: argparse.Namespace) -> None:
    study = read(arguments.folder / "study.json")
    document = {
        "benchmark": "again",
        "machine": next(iter(read_records(arguments.folder / "study-digits.jsonl").values()))["made"],
        "minutes": study["minutes"],
        "problems": compare(FIRST, arguments.folder),
    }
    write_json(arguments.out, document)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The study trained a second time, beside the first.")
    parser.add_argument("folder", type=Path, help="the results of the second")
    parser.add_argument("--out", type=Path, default=RESULTS / "again.json", help="the JSON file to write")
    return parser.parse_args(words)


if __name__ == "__main__":
    main(parse())
