"""The study in short: for each problem what its tables say, as one JSON file to keep."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from experiments.records import save_json
from experiments.study import results
from experiments.study.jobs import DEFAULTS, Job, Study
from experiments.study.records import Line, rounded


@dataclass(frozen=True)
class Summary:
    """The results of one problem. made: what has computed how many of the runs. fresh_harm, fresh_by_rate: of the rates
    that were looked at again, on the fresh seeds."""

    problem: str
    data: str
    made: Mapping[str, int]
    rates: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    state_seeds: tuple[int, ...]
    fresh_seeds: tuple[int, ...]
    verdicts: tuple[results.Verdict, ...]
    worth: tuple[results.Outcome, ...]
    tuning: tuple[results.Tuning, ...]
    harm: tuple[results.Harm, ...]
    by_rate: tuple[results.Rate, ...]
    fresh_harm: tuple[results.Harm, ...]
    fresh_by_rate: tuple[results.Rate, ...]
    states: tuple[results.States, ...]


def summarise(study: Study, lines: Mapping[Job, Line]) -> Summary:
    """The results of a study that is complete in these lines, rounded as the file keeps them."""
    records = {job: line.record for job, line in lines.items()}
    outcomes = results.worth(study, records)
    again = results.looked_at_again(study, records)
    own = [lines[job] for job in (*study.first_jobs(), *results.following_jobs(study, records))]
    summary = Summary(
        problem=study.problem.name,
        data=own[0].data,
        made=dict(Counter(line.made for line in own)),
        rates=study.rates,
        seeds=study.seeds,
        state_seeds=study.state_seeds,
        fresh_seeds=study.fresh_seeds,
        verdicts=tuple(results.verdicts(study, outcomes)),
        worth=tuple(outcomes),
        tuning=tuple(results.tuning(study, records)),
        harm=tuple(results.no_harm(study, records)),
        by_rate=tuple(results.by_rate(study, records)),
        fresh_harm=tuple(results.no_harm(again, records)),
        fresh_by_rate=tuple(results.by_rate(again, records)),
        states=tuple(results.states(study, records)),
    )
    return _restored(Summary, _plain(asdict(summary)))


def save_summaries(path: Path, studies: Iterable[Study], summaries: Iterable[Summary]) -> Path:
    settings = {"problems": [study.problem for study in studies], "teleports": DEFAULTS}
    return save_json(path, "study", settings, summaries=[_plain(asdict(summary)) for summary in summaries])


def load_summaries(path: Path) -> list[Summary]:
    """The inverse of `save_summaries`, up to rounding."""
    return summaries_of(json.loads(path.read_text(encoding="utf-8")))


def summaries_of(document: Mapping[str, Any]) -> list[Summary]:
    """The summaries in the content of such a file."""
    return [_restored(Summary, entry) for entry in document["summaries"]]


def _plain(value: Any) -> Any:
    """Rounded, NaN as null, and Inf as text, which `float` reads."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return rounded(value)


def _restored(kind: Any, value: Any) -> Any:
    """`value` of a JSON file as the type `kind` of a field."""
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        known = (field.name for field in fields(kind) if field.default is MISSING or field.name in value)
        return kind(**{name: _restored(kinds[name], value[name]) for name in known})  # type: ignore[operator]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple:
        return tuple(_restored(inner[0], item) for item in value)
    if origin is Mapping:
        return {key: _restored(inner[1], item) for key, item in value.items()}
    if origin is UnionType:
        return None if value is None else _restored(inner[0], value)
    if kind is float:
        return math.nan if value is None else float(value)
    return value
