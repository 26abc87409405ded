"""Runs jobs in processes of one thread each, and hands over their records as they finish."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

from experiments.data import Dataset
from experiments.study.jobs import Job
from experiments.study.measure import measure
from experiments.study.problems import Problem, load, make_task
from experiments.study.records import Record


def run_job(job: Job, data_dir: Path | None) -> Record:
    """One run, in this process, as far as it is not the plain one over again."""
    return measure(job, make_task(job.problem, _dataset(job.problem, data_dir), job.seed), in_full=False)


def run_jobs(jobs: Iterable[Job], data_dir: Path | None, processes: int) -> Iterator[tuple[Job, Record | Exception]]:
    """The jobs with their records, or with what went wrong, in the order in which they finish.

    An interrupt, or closing the iterator, ends the processes with what they are at.
    """
    with _pool(processes) as pool:
        pending: dict[Future[Record], Job] = {pool.submit(run_job, job, data_dir): job for job in jobs}
        for future in as_completed(pending):
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            yield pending[future], future.result() if error is None else error


@lru_cache
def _dataset(problem: Problem, data_dir: Path | None) -> Dataset:
    return load(problem, data_dir)


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes do not outlive the context, whatever they are at."""
    strangers = set(multiprocessing.active_children())
    # A forked child may hang in a thread pool of its parent's.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in set(multiprocessing.active_children()) - strangers:
            worker.terminate()
            worker.join()


def _start_worker() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # second moments that fade below 1e-38 make a step take three times as long
    # Ctrl-C reaches the whole group of processes: a worker ends without a traceback, the parent has the say.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
