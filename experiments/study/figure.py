"""The study's figure: train loss against wall-clock, a panel for each problem."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments import figures
from experiments.study.jobs import MAIN_ARMS, PLAIN, TELEPORTED, Study
from experiments.study.records import Record
from experiments.study.results import Records, chosen_records, final_losses, spread
from experiments.training import OPTIMIZERS

SHOWN = 3  # optimizers of a panel
COLOURS = dict(zip(OPTIMIZERS, figures.COLOURS[1:], strict=True))
DASHES = {PLAIN: (0, (4, 2)), TELEPORTED: "-"}


def draw(path: Path, parts: Sequence[tuple[Study, Records]]) -> Path:
    """For each problem the best optimizers at their best rates, dashed without and solid with teleports."""
    panels = [
        figures.Panel("wall-clock (s)", "train loss", _series(study, records), study.problem.name, x_scale="log")
        for study, records in parts
    ]
    return figures.curves(path, f"the best {SHOWN} optimizers at their best rates", panels)


def _series(study: Study, records: Records) -> list[figures.Series]:
    return [
        _curve(f"{optimizer}, {arm}", chosen, COLOURS[optimizer], DASHES[arm])
        for optimizer in best_optimizers(study, records)
        for arm in MAIN_ARMS
        for chosen in [_finished(chosen_records(study, records, optimizer, arm))]
        if chosen
    ]


def best_optimizers(study: Study, records: Records) -> list[str]:
    """The `SHOWN` optimizers with the lowest mean train loss at the end, in the better of their arms."""

    def loss(optimizer: str) -> float:
        means = (spread(final_losses(chosen_records(study, records, optimizer, arm))).mean for arm in MAIN_ARMS)
        return min((mean for mean in means if not math.isnan(mean)), default=math.inf)

    return sorted(study.rates, key=loss)[:SHOWN]


def _finished(chosen: Sequence[Record]) -> list[Record]:
    return [record for record in chosen if not record.diverged]


def _curve(label: str, chosen: Sequence[Record], colour: str, dashes: object) -> figures.Series:
    """The runs' losses over the median of their times, without the start, which a logarithmic axis has no place for."""
    times = zip(*([check.seconds for check in record.checks[1:]] for record in chosen), strict=True)
    losses = [[check.train_loss for check in record.checks[1:]] for record in chosen]
    return figures.Series(label, [statistics.median(seconds) for seconds in times], losses, (), colour, dashes)
