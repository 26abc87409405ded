"""The study's results as Markdown: every table a function of the results, and the page of them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from experiments.study.jobs import ANY_GAIN, NEXT_STEP, PLAIN, STATES, TELEPORTED
from experiments.study.results import (
    HARMLESS_RATIO,
    Best,
    Choice,
    Harm,
    Outcome,
    Rate,
    Spread,
    States,
    Target,
    Tuning,
    Verdict,
)
from experiments.study.summary import Summary

NONE = "-"
HEAD = """# Is it worth it?

Training without and with teleports, the defaults of `Teleporter`: three in epoch 0. The rate of every optimizer is
chosen by the train loss at the end on a seed of its own, without and with teleports separately; all numbers are of the
other seeds, mean ± standard deviation, where a share such as (3 of 5) says that the others did not get there. Seconds
are of training with its teleports, without the measurements; losses are looked at every so many iterations, and a time
to a loss is that of the first look at which it was no larger. ≤ and ≥: the rate is the lowest or the highest tried.
A run that refuses all its teleports is the plain one over again, and is trained no further than epoch 0: its losses are
those of the plain run of its seed, and its seconds that run's and those of its own refusals.
"""
EDGES = {"": "", "lowest": "≤ ", "highest": "≥ "}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub-flavoured table, numbers to the right."""
    lines = [header, ["---", *("--:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(summaries: Iterable[Summary]) -> str:
    """All tables, problem by problem."""
    return "\n\n".join([HEAD.rstrip(), *(section(summary) for summary in summaries)])


def section(summary: Summary) -> str:
    """The tables of one problem."""
    made = "; ".join(f"{count} runs: {by}" for by, count in summary.made.items())
    parts = [
        f"## {summary.problem}",
        f"Data: {summary.data}. Seeds {_list(summary.seeds)}. Made by {made}.",
        verdict_table(summary.verdicts),
        "### Every optimizer at its best rate",
        worth_table(summary.worth),
    ]
    if summary.tuning:
        parts += ["### Every rate, on the seed that chooses", tuning_table(summary.tuning)]
    if summary.harm:
        parts += ["### Harm", harm_sentence(summary.harm), harm_table(summary.harm)]
    if summary.fresh_harm:
        parts += [
            f"### Harm beyond chance, looked at again on seeds {_span(summary.fresh_seeds)}",
            harm_table(summary.fresh_harm),
            rate_table(summary.fresh_by_rate),
        ]
    if any(rate.teleports for rate in summary.by_rate):
        parts += ["### Rate by rate, where something was teleported", rate_table(summary.by_rate)]
    if summary.states:
        parts += [
            f"### The optimizer's state and step, seeds {_list(summary.state_seeds)}",
            state_table(summary.states),
        ]
    return "\n\n".join(parts)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    rows = [
        [verdict.quantity, _best(verdict.plain), _best(verdict.teleported), _number(verdict.ratio, ".2f")]
        for verdict in verdicts
    ]
    return markdown(("best of all optimizers", PLAIN, TELEPORTED, "teleported / plain"), rows)


def worth_table(outcomes: Sequence[Outcome]) -> str:
    """A row for each optimizer and arm; ≤ or ≥ before a rate: it is the lowest or highest tried."""
    targets = [target.loss for target in outcomes[0].targets]
    measured = any(outcome.norm is not None for outcome in outcomes)  # not in records of before
    header = (
        "optimizer",
        "rate",
        *(f"s (epochs) to {loss:g}" for loss in targets),
        "train loss",
        "validation loss",
        "accuracy",
        *(("accuracy under noise", "‖W‖") if measured else ()),
        "s in all",
    )
    rows = [
        [
            f"{outcome.optimizer}, {outcome.arm}",
            _rate(outcome.choice),
            *(_target(target) for target in outcome.targets),
            _spread(outcome.train_loss),
            _spread(outcome.validation_loss),
            _spread(outcome.accuracy, percent=True),
            *((_known(outcome.noise_accuracy, percent=True), _known(outcome.norm)) if measured else ()),
            _spread(outcome.seconds),
        ]
        for outcome in outcomes
    ]
    return markdown(header, rows)


def tuning_table(tunings: Sequence[Tuning]) -> str:
    """A row for each optimizer and rate."""
    rows = [
        [
            f"{tuning.optimizer}, {tuning.lr:g}",
            str(tuning.teleports),
            _number(tuning.plain_loss, ".3g"),
            _number(tuning.teleported_loss, ".3g"),
        ]
        for tuning in tunings
    ]
    return markdown(("optimizer, rate", "teleports", "train loss, plain", "teleported"), rows)


def harm_table(harms: Sequence[Harm]) -> str:
    """A row for each optimizer and rate; harm, and what is worse than chance makes it, is in bold."""
    header = (
        "optimizer, rate",
        "teleports",
        "plain runs diverged",
        "teleported",
        "worst train loss, teleported / plain",
        "by chance",
        "at epoch",
        "plain loss there",
    )
    rows = [
        [
            f"{harm.optimizer}, {harm.lr:g}",
            str(harm.teleports),
            f"{harm.plain_diverged} of {harm.seeds}",
            _bold(f"{harm.teleported_diverged} of {harm.seeds}", harm.harmed_seeds > 0),
            _bold(_number(harm.ratio, ".3f"), harm.beyond_chance),
            _number(harm.by_chance, ".3f"),
            _number(harm.epoch, ".3g"),
            _number(harm.plain_loss, ".2g"),
        ]
        for harm in harms
    ]
    return markdown(header, rows)


def harm_sentence(harms: Sequence[Harm]) -> str:
    """How many of the rates did harm."""
    diverged = sum(harm.harmed_seeds for harm in harms)
    made = [harm for harm in harms if harm.teleports]
    higher = sum(harm.curve_is_higher for harm in made)
    by_chance = sum(harm.by_chance > HARMLESS_RATIO for harm in made)
    beyond = sum(harm.beyond_chance for harm in made)
    return (
        f"{diverged} of {sum(harm.seeds for harm in harms)} runs diverged only with teleports. Something was "
        f"teleported at {len(made)} of {len(harms)} rates. At {higher} of these the mean train loss was somewhere "
        "after the teleports more than 2 % above the plain one; with teleports of a thousandth of the length, which "
        f"change next to nothing, it was at {by_chance}. At {beyond} it was higher than both."
    )


def rate_table(rates: Sequence[Rate]) -> str:
    """A row for each optimizer and rate with teleports: without one the runs are the plain ones over again."""
    header = (
        "optimizer, rate",
        "train loss, plain",
        "teleported",
        "time to plain's last loss, share of plain's",
        "accuracy, plain",
        "teleported",
        "rise at a teleport, mean",
        "largest",
        "gone 100 iterations later",
    )
    rows = [
        [
            f"{rate.optimizer}, {rate.lr:g}",
            _spread(rate.plain_loss),
            _spread(rate.teleported_loss),
            _spread(rate.share, percent=True),
            _spread(rate.plain_accuracy, percent=True),
            _spread(rate.teleported_accuracy, percent=True),
            _number(rate.mean_rise, ".1%"),
            _number(rate.largest_rise, ".1%"),
            f"{rate.gone} of {rate.teleports}",
        ]
        for rate in rates
        if rate.teleports
    ]
    return markdown(header, rows)


def state_table(states: Sequence[States]) -> str:
    """A row for each optimizer and rate: the train loss at the end; "keep" for a way that is the same as keep."""
    arms = (PLAIN, *STATES, ANY_GAIN, NEXT_STEP)
    rows = [
        [
            f"{entry.optimizer}, {entry.lr:g}",
            *(_spread(entry.losses[arm]) if arm in entry.losses else "keep" for arm in arms),
        ]
        for entry in states
    ]
    return markdown(("optimizer, rate", *arms), rows)


def _list(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))


def _span(seeds: Sequence[int]) -> str:
    return f"{seeds[0]} to {seeds[-1]}"


def _best(best: Best | None) -> str:
    return "not reached" if best is None else f"{_spread(best.value)} ({best.optimizer}, {best.lr:g})"


def _rate(choice: Choice) -> str:
    if choice.lr is None:
        return NONE
    return f"{EDGES[choice.edge]}{choice.lr:g}"


def _target(target: Target) -> str:
    if target.seconds.count == 0:
        return NONE
    return f"{_spread(target.seconds)} ({target.epochs.mean:.3g})"


def _spread(spread: Spread, percent: bool = False) -> str:
    """mean ± deviation, and over how many of the seeds if not all."""
    if spread.count == 0:
        return NONE
    scale, unit = (100, " %") if percent else (1, "")
    mean, deviation = _digits(scale * spread.mean, 3), _digits(scale * spread.deviation, 1)
    share = "" if spread.count == spread.of else f" ({spread.count} of {spread.of})"
    return f"{mean} ± {deviation}{unit}{share}"


def _known(spread: Spread | None, percent: bool = False) -> str:
    return NONE if spread is None else _spread(spread, percent)


def _digits(value: float, digits: int) -> str:
    """To so many significant digits, or all those before the point."""
    short = f"{value:.{digits}g}"
    return f"{value:.0f}" if abs(float(short)) >= 10**digits else short


def _number(value: float, form: str) -> str:
    return NONE if math.isnan(value) else format(value, form)


def _bold(text: str, condition: bool) -> str:
    return f"**{text}**" if condition else text
