"""The records of a study on disk: one file of lines for each problem, which grows by a line with every finished run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from experiments.study.jobs import Job
from experiments.study.records import Line, Record, completed, read_line, write_line


class Store:
    """`<folder>/study-<problem>.jsonl`. What an interrupted write left of a line is cut off when the file is opened.

    Attributes:
        lines: what the file holds.
        cut: how many characters of an unfinished line were dropped.
    """

    def __init__(self, folder: Path, problem: str) -> None:
        """Read the file, if there is one.

        Raises:
            ValueError: a finished line is not the record of a run.
        """
        self.path = folder / f"study-{problem}.jsonl"
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        finished, end, unfinished = text.rpartition("\n")
        self.cut = len(unfinished)
        if self.cut:
            os.truncate(self.path, len((finished + end).encode()))
        whole = finished.split("\n") if finished else []
        self.lines = [self._read(number, line) for number, line in enumerate(whole, start=1)]

    def append(self, job: Job, data: str, made: str, record: Record) -> None:
        """Write one finished run, and keep it as it will be read again."""
        line = write_line(job, data, made, record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.lines.append(read_line(line))

    def missing(self, jobs: Iterable[Job], data: str) -> list[Job]:
        """The jobs without a record on the data with this fingerprint."""
        done = {line.key for line in self.lines if line.data == data}
        return [job for job in jobs if job.key not in done]

    def of(self, jobs: Iterable[Job]) -> dict[Job, Line]:
        """What the file holds of the jobs, runs that were cut short completed if the plain ones are there.

        Raises:
            ValueError: they ran on different data, or a run that was cut short does not begin as the plain one.
        """
        wanted = {job.key: job for job in jobs}
        lines = {wanted[line.key]: line for line in self.lines if line.key in wanted}
        data = sorted({line.data for line in lines.values()})
        if len(data) > 1:
            raise ValueError(f"{self.path} must hold runs on one set of data, got {'; '.join(data)}: remove the others")
        whole = {line.key: line.record for line in self.lines if not line.record.cut_short}
        return {job: full for job, line in lines.items() if (full := self._whole(job, line, whole)) is not None}

    def _whole(self, job: Job, line: Line, whole: Mapping[str, Record]) -> Line | None:
        """The line with all of its run; None if that takes a plain run that is not there."""
        if not line.record.cut_short:
            return line
        plain = whole.get(replace(job, teleports=None).key)
        if plain is None:
            return None
        try:
            return replace(line, record=completed(line.record, plain))
        except ValueError as error:
            raise ValueError(f"{self.path}, {job}: {error}") from error

    def _read(self, number: int, line: str) -> Line:
        try:
            return read_line(line)
        except ValueError as error:
            raise ValueError(f"{self.path}, line {number}: {error}") from error
