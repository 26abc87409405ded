"""Everything that docs/experiments.md shows, made again: each row is one command of `python -m experiments`.

    python -m bench.evidence --data-dir DIR [--only NAME ...] [--again] [--processes 2] [--out DIR]
    python -m bench.evidence --quick [--data-dir DIR] [--out DIR]

DIR holds MNIST's IDX files; rows that need them are left out without it. Rows run as processes of their own with one
thread each, those that use several processes themselves first and alone, then the longest first. A row whose numbers
are there, made with the same arguments on the same data, is not run again, so that an interrupted command can be given
again; where the program has changed, --again forgets them first. Rows that are the beginning of longer ones are cut out
of their numbers, last of all, where those are there.

Figures go to docs/figures, numbers, rounded to five digits, to bench/results/evidence, and the tables of
docs/experiments.md are made from these. The study's records of single runs, a line each, are kept there too: without
study.json beside them only the runs that have no record are trained. The quick profile runs every row for a few epochs
to see that it runs, and leaves all that in --out. What a row prints is in its folder there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import evidence_cut, evidence_tables
from bench.evidence_files import as_text, read
from bench.harness import RESULTS
from experiments import __main__ as command_line
from experiments import classification
from experiments.data import load_mnist

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS, STANDARDISE, SYMMETRIES, _ = evidence_tables.PAGES


@dataclass(frozen=True)
class Row:
    """One row of the page: a command and its options.

    minutes: about how long it takes with a core for each process. data: whether it needs MNIST's files. alone: whether
    it uses several processes itself. drawn: whether it has figures. quick: its further options in the quick profile.
    records: a pattern of files from which the command goes on where they are in its folder. of: the row of whose longer
    runs its own are the beginning. page: the one that shows it.
    """

    name: str
    arguments: tuple[str, ...]
    minutes: float
    data: bool = False
    alone: bool = False
    drawn: bool = True
    quick: tuple[str, ...] = ()
    records: str | None = None
    of: str | None = None
    page: str = EXPERIMENTS

    @property
    def command(self) -> str:
        """The name of the command, by which its JSON and its figures are called."""
        return self.arguments[0]

    def in_short(self) -> Row:
        return replace(self, arguments=self.arguments + self.quick, of=None)


def _mnist(name: str, minutes: float, *options: str, of: str | None = None) -> Row:
    quick = ("--epochs", "2", "--teleport-epochs", "1")
    return Row(name, ("mnist", *options), minutes, data=True, quick=quick, of=of)


def _spike(name: str, *options: str) -> Row:
    return Row(name, ("spike", *options), 4, data=True, quick=("--seeds", "1", "--epochs", "1"))


def _starts(name: str, minutes: float, *problems: str, quick: str, data: bool = False) -> Row:
    short = ("--seeds", "1", "--epochs", "1", "--problems", quick)
    arguments = ("starts", *(("--problems", *problems) if problems else ()))
    return Row(name, arguments, minutes, data=data, drawn=False, quick=short, page=STANDARDISE)


def _plasticity(name: str, suite: str, minutes: float, quick: str, drawn: bool = False, data: bool = False) -> Row:
    shorter = ("--seeds", "1", "--tasks", "2", "--protocols", quick)
    return Row(name, ("plasticity", "--suite", suite), minutes, data, drawn=drawn, quick=shorter, page=STANDARDISE)


FURTHER = ("digits, deep", "digits, deep tanh", "digits, other rules", "digits, Muon", "digits, spreads")
ROWS = (
    Row("booth", ("booth",), 0.1),
    Row("rosenbrock", ("rosenbrock",), 0.1),
    Row("regression", ("regression",), 0.4, quick=("--seeds", "1", "--epochs", "10")),
    _mnist("mnist-paper-one", 14, "--preset", "paper-one"),
    _mnist("mnist-paper-one-published", 12, "--preset", "paper-one", "--published"),
    _mnist("mnist-paper-several", 19, "--preset", "paper-several"),
    _mnist("mnist-paper-several-published", 4, "--preset", "paper-several", "--published"),
    _mnist("mnist-one", 8, "--preset", "one", of="mnist-paper-one"),
    _mnist("mnist-one-published", 8, "--preset", "one", "--published", of="mnist-paper-one-published"),
    _mnist("mnist-six", 11, "--preset", "six"),
    _mnist("mnist-six-published", 8, "--preset", "six", "--published"),
    _mnist("mnist-several", 6, "--preset", "several", of="mnist-paper-several"),
    _mnist("mnist-several-published", 2, "--preset", "several", "--published", of="mnist-paper-several-published"),
    _mnist("mnist-batch-200", 4, "--preset", "batch-200", "--both"),
    _spike("spike", "--epochs", "6", "--step-size", "0.0001"),
    _spike("spike-batch-200", "--epochs", "60", "--batch-size", "200"),
    Row("trade", ("trade",), 16, data=True, quick=("--seeds", "1", "--epochs", "1")),
    Row("guards", ("guards",), 9, quick=("--seeds", "1", "--epochs", "1")),
    Row("noise", ("noise",), 15, drawn=False, quick=("--seeds", "1", "--epochs", "1")),
    Row("noise-mnist", ("noise",), 20, data=True, drawn=False, quick=("--seeds", "1", "--epochs", "1")),
    _starts("starts", 30, "digits", quick="digits, deep"),
    _starts("starts-further", 35, *FURTHER, quick="digits, deep tanh"),
    _starts("starts-diabetes", 4, "diabetes", quick="diabetes"),
    _starts("starts-mnist", 25, quick="mnist, narrow", data=True),
    _plasticity("plasticity", "whole", 110, "more classes", drawn=True),
    _plasticity("plasticity-gradual", "gradual", 22, "gradually relabelled", drawn=True),
    _plasticity("plasticity-regression", "regression", 10, "slow regression"),
    _plasticity("plasticity-sgd", "sgd", 4, "relabelled"),
    _plasticity("plasticity-relu", "relu", 7, "relabelled"),
    _plasticity("plasticity-mnist", "short", 6, "relabelled", data=True),
    _plasticity("plasticity-control", "control", 10, "CartPole"),
    Row(
        "transformer",
        ("transformer",),
        150,
        drawn=False,
        quick=("--settings", "d = 128", "--arms", "AdamW", "eigenbasis, early", "--steps", "20", "--seeds", "1"),
        page=SYMMETRIES,
    ),
    Row("minima", ("minima",), 7, data=True, quick=("--seeds", "1", "--epochs", "2", "--teleport-epochs", "1")),
    Row(
        "study",
        ("study",),
        97,
        data=True,
        alone=True,
        quick=("--quick", "--problem", "digits", "--optimizer", "sgd"),
        records="study-*.jsonl",
    ),
)


@dataclass(frozen=True)
class Place:
    """Where rows run, where their figures and numbers go, and the data: a folder, and what it holds in words."""

    work: Path
    figures: Path
    results: Path
    data_dir: Path | None
    data: str | None

    @classmethod
    def make(cls, work: Path, quick: bool, data_dir: Path | None) -> Place:
        data = None
        if data_dir is not None:
            dataset = load_mnist(data_dir)
            data = f"{dataset.name}, {len(dataset)} samples"
        if quick:
            return cls(work, work / "figures", work / "results", data_dir, data)
        return cls(work, ROOT / "docs" / "figures", RESULTS / "evidence", data_dir, data)

    def numbers(self, row: Row) -> Path:
        return self.results / f"{row.name}.json"

    def origin(self, row: Row) -> dict[str, Any]:
        """What the numbers of a row depend on besides the program."""
        return {"row": row.name, "arguments": list(row.arguments), "data": self.data if row.data else None}


def is_done(row: Row, place: Place) -> bool:
    """Whether the numbers are there, made with the same arguments on the same data."""
    if not place.numbers(row).exists():
        return False
    found = read(place.numbers(row))
    return {key: found.get(key) for key in place.origin(row)} == place.origin(row)


def forget(rows: Sequence[Row], place: Place) -> None:
    """Delete the numbers of the rows, so that they are run again, and what they have left where they ran."""
    for row in rows:
        place.numbers(row).unlink(missing_ok=True)
        for path in _records(row, place.results):
            path.unlink()
        shutil.rmtree(place.work / row.name, ignore_errors=True)


def execute(row: Row, place: Place) -> float | None:
    """Run the command of the row; what it prints goes to files in the row's folder.

    Returns:
        The minutes of wall-clock it took; None where it went on from records, and they are not of the whole.

    Raises:
        RuntimeError: it failed; the text is the last line of its errors.
    """
    folder = place.work / row.name
    folder.mkdir(parents=True, exist_ok=True)
    for kept in _records(row, place.results):
        if not (folder / kept.name).exists():
            shutil.copyfile(kept, folder / kept.name)
    goes_on = bool(_records(row, folder))
    words = [sys.executable, "-m", "experiments", *row.arguments, "--out", str(folder)]
    if row.data:
        words += ["--data-dir", str(place.data_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    printed, errors = folder / "printed.txt", folder / "errors.txt"
    started = time.perf_counter()
    with printed.open("w", encoding="utf-8") as stdout, errors.open("w", encoding="utf-8") as stderr:
        outcome = subprocess.run(words, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr)
    if outcome.returncode != 0:
        lines = errors.read_text(encoding="utf-8").splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit code {outcome.returncode}")
    return None if goes_on else (time.perf_counter() - started) / 60


def publish(row: Row, place: Place, minutes: float | None) -> None:
    """Copy the figures and the records of the row, and then, rounded, its numbers, which so say that all is there."""
    folder = place.work / row.name
    place.figures.mkdir(parents=True, exist_ok=True)
    place.results.mkdir(parents=True, exist_ok=True)
    for figure in sorted(folder.glob(f"{row.command}*.png")):
        shutil.copyfile(figure, place.figures / figure.name.replace(row.command, row.name, 1))
    for path in _records(row, folder):
        shutil.copyfile(path, place.results / path.name)
    document = json.loads((folder / f"{row.command}.json").read_text(encoding="utf-8"))
    _write(place.numbers(row), place.origin(row) | {"minutes": minutes} | document)


def publish_beginning(row: Row, longer: Row, place: Place) -> None:
    """Cut the numbers of the row out of those of the longer one, and draw its figure."""
    options = command_line.make_parser().parse_args([*row.arguments, "--data-dir", str(place.data_dir)])
    preset = classification.PRESETS[options.preset]
    labels = classification.labelled(preset.teleports(options.algorithms))
    document = evidence_cut.cut(read(place.numbers(longer)), labels, preset.epochs)
    evidence_cut.draw(document, place.figures / f"{row.name}.png")
    _write(place.numbers(row), document | place.origin(row) | {"minutes": None, "beginning_of": longer.name})


def _write(path: Path, document: dict[str, Any]) -> None:
    """All of it or nothing."""
    partial = path.with_suffix(".partial")
    partial.write_text(as_text(document), encoding="utf-8")
    partial.replace(path)


def _records(row: Row, folder: Path) -> list[Path]:
    return sorted(folder.glob(row.records)) if row.records is not None else []


def run(rows: Sequence[Row], place: Place, processes: int) -> list[str]:
    """Run what is not done yet; the names of the rows that failed."""
    waiting = [row for row in rows if not is_done(row, place) and (place.data is not None or not row.data)]
    for row in rows:
        if row.data and place.data is None:
            _say(f"{row.name}: left out, it needs --data-dir")
        elif row not in waiting:
            _say(f"{row.name}: done before")
    together = sorted((row for row in waiting if not row.alone and row.of is None), key=lambda row: -row.minutes)
    progress = _Progress(len(waiting))
    for row in (row for row in waiting if row.alone):
        progress.ended(row, _run_row(row, place))
    with ThreadPoolExecutor(processes) as pool:
        futures = {pool.submit(_run_row, row, place): row for row in together}
        try:
            for future in as_completed(futures):
                progress.ended(futures[future], future.result())
        except KeyboardInterrupt:  # the running commands have got it too
            pool.shutdown(cancel_futures=True)
            raise
    for row in (row for row in waiting if row.of is not None):
        progress.ended(row, _run_row(row, place))
    return progress.failed


def _run_row(row: Row, place: Place) -> str | None:
    """Run and publish, or cut out of what is there; why it failed, or None."""
    longer = next((other for other in ROWS if other.name == row.of), None)
    try:
        if longer is not None and is_done(longer, place):
            _say(f"{row.name}: the beginning of {longer.name}")
            publish_beginning(row, longer, place)
        else:
            _say(f"{row.name}: {' '.join(row.arguments)}")
            publish(row, place, minutes=execute(row, place))
    except (RuntimeError, OSError, ValueError) as error:
        return str(error)
    return None


class _Progress:
    """How many of `total` rows have ended, said on stderr as they do."""

    def __init__(self, total: int) -> None:
        self.total, self.count, self.failed, self.started = total, 0, list[str](), time.perf_counter()

    def ended(self, row: Row, error: str | None) -> None:
        self.count += 1
        if error is not None:
            self.failed.append(row.name)
        minutes = (time.perf_counter() - self.started) / 60
        outcome = "done" if error is None else f"FAILED: {error}"
        _say(f"{row.name}: {outcome} ({self.count} of {self.total}, {minutes:.1f} min)")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def choose(names: Sequence[str] | None) -> list[Row]:
    """The rows with these names, and those that are the beginning of them; None: all."""
    return [row for row in ROWS if names is None or row.name in names or row.of in names]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the evidence of docs/experiments.md again.")
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST's IDX files")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[row.name for row in ROWS],
        metavar="NAME",
        help="these rows only, and those that are the beginning of them",
    )
    parser.add_argument("--quick", action="store_true", help="a few epochs of every row, into --out only")
    parser.add_argument("--again", action="store_true", help="forget the numbers of these rows first")
    parser.add_argument("--processes", type=int, default=2, help="rows at a time, by default 2")
    parser.add_argument(
        "--out", type=Path, default=Path("symtele_out") / "evidence", help="where the rows run (default: %(default)s)"
    )
    return parser.parse_args(words)


def main(arguments: argparse.Namespace) -> int:
    rows = choose(arguments.only)
    if arguments.quick:
        rows = [row.in_short() for row in rows]
    place = Place.make(arguments.out.resolve(), arguments.quick, arguments.data_dir)
    if arguments.again:
        forget(rows, place)
    failed = run(rows, place, arguments.processes)
    if not arguments.quick:
        evidence_tables.write()
    if failed:
        _say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(parse()))
