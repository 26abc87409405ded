"""The study from its beginning to its end: train what has no record yet, then make tables, figure and summary."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import processor, require_extra
from experiments.study import figure, tables
from experiments.study.jobs import Job, Study
from experiments.study.problems import Problem, fingerprint, load
from experiments.study.results import Records, begun, complete, following_jobs
from experiments.study.runner import run_jobs
from experiments.study.store import Store
from experiments.study.summary import save_summaries, summarise

PROGRESS = "{desc}{percentage:.0f}%|{bar}| {elapsed}<{remaining}"


class StudyError(RuntimeError):
    """Runs of the study failed; the records of the others are kept."""


def select(
    studies: Mapping[str, Study],
    problems: Collection[str] | None,
    optimizers: Collection[str] | None,
    data_dir: Path | None,
) -> list[Study]:
    """The studies of the problems that are named, with the optimizers that are named; None: of all.

    Problems that nobody named and that need a folder of data are left out, with a message, if there is none.
    """
    chosen = [studies[name] for name in (studies if problems is None else problems)]
    if problems is None and data_dir is None:
        absent = [study.problem.name for study in chosen if study.problem.needs_folder]
        chosen = [study for study in chosen if not study.problem.needs_folder]
        _say(f"left out without --data-dir: {', '.join(absent)}")
    if optimizers is not None:
        chosen = [study.only(optimizers) for study in chosen]
    return [study for study in chosen if study.rates]


def train(studies: Sequence[Study], data_dir: Path | None, out: Path, processes: int) -> None:
    """Run every job of the studies that has no record in `out`, the longest first; append its record there at once.

    Raises:
        StudyError: runs failed; all others have been done but those that depend on these.
        ValueError, FileNotFoundError: the data cannot be loaded, or a file in `out` holds something else.
    """
    stores = {study.problem: _open(out, study) for study in studies}
    data = {study.problem: fingerprint(load(study.problem, data_dir)) for study in studies}
    made = f"torch {torch.__version__}, {processes} processes of one thread on {processor()}"
    failed: list[tuple[Job, Exception]] = []
    tried: set[Job] = set()
    while seconds := _todo(studies, stores, data, tried):
        tried |= seconds.keys()
        with _progress(seconds, processes) as bar:
            for job, outcome in run_jobs(seconds, data_dir, processes):
                if isinstance(outcome, Exception):
                    failed.append((job, outcome))
                else:
                    stores[job.problem].append(job, data[job.problem], made, outcome)
                bar.set_description(str(job), refresh=False)
                bar.update(seconds[job])
    if failed:
        job, error = failed[0]
        raise StudyError(f"{len(failed)} of {len(tried)} runs failed, the first ({job}) with: {error}") from error


def report(studies: Iterable[Study], out: Path) -> str:
    """Tables, figure and summary of the problems and optimizers of which `out` holds every run; returns the tables.

    Writes study.md, study.png and, last, study.json.

    Raises:
        ValueError: there is none.
    """
    parts: list[tuple[Study, Records]] = []
    summaries, missing = [], []
    for study in studies:
        store = _open(out, study)
        lines = store.of(known_jobs(study, store))
        records = {job: line.record for job, line in lines.items()}
        whole = complete(study, records)
        lacking = ", ".join(optimizer for optimizer in study.rates if optimizer not in whole.rates)
        missing += [f"{study.problem.name} ({lacking})"] if lacking else []
        if whole.rates:
            parts.append((whole, records))
            summaries.append(summarise(whole, lines))
    if missing:
        _say(f"not in the tables, because runs are missing: {', '.join(missing)}")
    if not parts:
        raise ValueError(f"--out must hold all runs of at least one problem and optimizer, got none in {out}")
    text = tables.page(summaries)
    (out / "study.md").write_text(text + "\n", encoding="utf-8")
    figure.draw(out / "study.png", parts)
    save_summaries(out / "study.json", [study for study, _ in parts], summaries)
    return text


def known_jobs(study: Study, store: Store) -> list[Job]:
    """The first jobs and, of the optimizers that have all records of these, those that follow from what is there."""
    jobs = dict.fromkeys(study.first_jobs())
    count = 0
    while count < len(jobs):
        count = len(jobs)
        records = {job: line.record for job, line in store.of(jobs).items()}
        jobs |= dict.fromkeys(following_jobs(begun(study, records), records))
    return list(jobs)


def _todo(
    studies: Iterable[Study],
    stores: Mapping[Problem, Store],
    data: Mapping[Problem, str],
    tried: Collection[Job],
) -> dict[Job, float]:
    """The jobs without a record that have not been tried, the longest first, with their estimated seconds."""
    estimates = {
        job: study.estimate(job)
        for study in studies
        for job in stores[study.problem].missing(known_jobs(study, stores[study.problem]), data[study.problem])
        if job not in tried
    }
    return dict(sorted(estimates.items(), key=lambda entry: -entry[1]))


def _progress(seconds: Mapping[Job, float], processes: int) -> Any:
    """A bar over the estimated seconds of all runs, so that its own estimate knows the long from the short."""
    total = sum(seconds.values())
    _say(f"{len(seconds)} runs to do, about {total / processes / 60:.0f} minutes with {processes} processes")
    return require_extra("tqdm").tqdm(total=total, bar_format=PROGRESS, dynamic_ncols=True, delay=0.1)


def _open(out: Path, study: Study) -> Store:
    store = Store(out, study.problem.name)
    if store.cut:
        _say(f"{store.path}: dropped the last line, which an interruption has cut off")
    return store


def _say(message: str) -> None:
    print(message, file=sys.stderr)
