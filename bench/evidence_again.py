"""The study of optimizers trained a second time, run by run beside the committed records of the first.

    python -m bench.evidence_again FOLDER [--out FILE]

FOLDER holds what `python -m bench.evidence --only study --again` has written in another checkout: study.json and
study-*.jsonl. A run is the same if all its losses, accuracies and teleports are, to the last digit kept; its seconds
are those of its training, teleports included.
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
from symtele_cuda.experiments.study.records import Line, Record, read_line

FIRST = RESULTS / "evidence"


def compare(first: Path, second: Path) -> dict[str, Any]:
    """By problem: how many runs both folders hold, how many are the same, and how many times as long the second took.

    Raises:
        ValueError: the folders do not hold the same runs.
    """
    problems = {}
    for path in sorted(first.glob("study-*.jsonl")):
        before, after = read_lines(path), read_lines(second / path.name)
        if before.keys() != after.keys():
            raise ValueError(f"{second / path.name} must hold the runs of {path}, got {len(after)} for {len(before)}")
        factors = [after[key].record.final.seconds / before[key].record.final.seconds for key in before]
        problems[path.stem.removeprefix("study-")] = {
            "runs": len(before),
            "same": sum(outcome_of(before[key]) == outcome_of(after[key]) for key in before),
            "seconds, second / first": {
                "least": min(factors),
                "median": statistics.median(factors),
                "largest": max(factors),
            },
        }
    return problems


def read_lines(path: Path) -> dict[str, Line]:
    """The lines of a file of records, by the keys of their jobs."""
    lines = map(read_line, path.read_text(encoding="utf-8").splitlines())
    return {line.key: line for line in lines}


def outcome_of(line: Line) -> tuple[str, Record]:
    """All of a run but its time. What is not finite is equal here: read_line has one NaN for all."""
    record = line.record
    checks = tuple(replace(check, seconds=0.0) for check in record.checks)
    teleports = tuple(replace(teleport, seconds=0.0) for teleport in record.teleports)
    return line.data, replace(record, checks=checks, teleports=teleports)


def main(arguments: argparse.Namespace) -> None:
    study = read(arguments.folder / "study.json")
    document = {
        "benchmark": "again",
        "machine": next(iter(read_lines(arguments.folder / "study-digits.jsonl").values())).made,
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
