"""What the records of a study say: the chosen rates, the time to given losses, the harm, and what a teleport costs.

All functions are of the records alone, so that tables and figure are made again without training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from experiments.study.jobs import (
    MAIN_ARMS,
    NUDGE,
    PLAIN,
    TELEPORTED,
    Job,
    Study,
    state_arms,
)
from experiments.study.records import Check, Record, Teleport
from experiments.training import TeleportSettings

HARMLESS_RATIO = 1.02  # of mean train losses, teleported over plain

Records = Mapping[Job, Record]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of the `count` finite values among `of`: NaN of none, deviation 0 of one."""

    mean: float
    deviation: float
    count: int
    of: int


@dataclass(frozen=True)
class Choice:
    """The best rate of an arm; lr is None where every run on the tuning seed diverged.

    edge: "lowest" or "highest" of the rates, so that a better one may lie outside, or "".
    """

    lr: float | None
    edge: str


@dataclass(frozen=True)
class Target:
    """Seconds and epochs to the first check with a train loss of at most `loss`, over the seeds that got there."""

    loss: float
    seconds: Spread
    epochs: Spread


@dataclass(frozen=True)
class Outcome:
    """An arm at its best rate, over the seeds that did not choose it.

    noise_accuracy: on the validation set with noise in the inputs; norm: ‖W‖. None where the records do not have them.
    """

    optimizer: str
    arm: str
    choice: Choice
    targets: tuple[Target, ...]
    train_loss: Spread
    validation_loss: Spread
    accuracy: Spread
    seconds: Spread
    noise_accuracy: Spread | None = None
    norm: Spread | None = None


@dataclass(frozen=True)
class Best:
    """The optimizer with the best value of an arm, and its rate."""

    optimizer: str
    lr: float | None
    value: Spread


@dataclass(frozen=True)
class Verdict:
    """The best plain optimizer and the best teleported one by one quantity, the lower the better; None: none has it."""

    quantity: str
    plain: Best | None
    teleported: Best | None

    @property
    def ratio(self) -> float:
        """Teleported over plain; NaN unless both have a value."""
        if self.plain is None or self.teleported is None:
            return math.nan
        return _ratio(self.teleported.value.mean, self.plain.value.mean)


@dataclass(frozen=True)
class Harm:
    """Teleported against plain at one rate: how many of the seeds diverged, and where after the last teleport the mean
    train-loss curve is worst.

    teleports: accepted ones, in all the seeds' runs together; without one they are the plain runs over again.
    ratio: of the means over the seeds that diverged in neither arm, NaN without one; epoch, plain_loss: at that check.
    by_chance: the ratio of runs with teleports that are none, `jobs.NUDGE`, in the place of the teleported ones, NaN
    where those have made no teleport.
    """

    optimizer: str
    lr: float
    seeds: int
    teleports: int
    plain_diverged: int
    teleported_diverged: int
    harmed_seeds: int
    ratio: float
    epoch: float
    plain_loss: float
    by_chance: float

    @property
    def curve_is_higher(self) -> bool:
        """Whether the mean train-loss curve is somewhere more than 2 % above the plain one."""
        return self.ratio > HARMLESS_RATIO

    @property
    def beyond_chance(self) -> bool:
        """Whether it is, and higher than the curve of runs that differ from the plain ones by a nudge."""
        return self.curve_is_higher and not self.ratio <= self.by_chance


@dataclass(frozen=True)
class Rate:
    """Teleported against plain at one rate: losses, accuracy, wall-clock and what the teleports did to the train loss.

    share: seconds of the teleported run to the plain run's last train loss, over all seconds of the plain run.
    rises: the mean and the largest relative rise of the train loss at a teleport; gone: after how many of the teleports
    it was back at or below its value right before, `measure.LATER` iterations later.
    """

    optimizer: str
    lr: float
    plain_loss: Spread
    teleported_loss: Spread
    plain_accuracy: Spread
    teleported_accuracy: Spread
    share: Spread
    mean_rise: float
    largest_rise: float
    teleports: int
    gone: int


@dataclass(frozen=True)
class States:
    """The train loss at the end with every way with the optimizer's state and step, and without teleports."""

    optimizer: str
    lr: float
    losses: Mapping[str, Spread]


@dataclass(frozen=True)
class Tuning:
    """The train loss at the end at one rate, on the seed that chooses among the rates; NaN where the run diverged."""

    optimizer: str
    lr: float
    plain_loss: float
    teleported_loss: float
    teleports: int


def worth(study: Study, records: Records) -> list[Outcome]:
    """Every optimizer's two arms, each at its own best rate."""
    return [_outcome(study, records, optimizer, arm) for optimizer in study.rates for arm in MAIN_ARMS]


def choose_rate(study: Study, records: Records, optimizer: str, arm: str) -> Choice:
    """The rate with the lowest train loss at the end on the tuning seed."""
    rates = study.rates[optimizer]
    losses = {
        lr: record.final.train_loss
        for lr in rates
        for record in _select(study, records, optimizer, lr, MAIN_ARMS[arm], (study.tuning_seed,))
        if not record.diverged
    }
    if not losses:
        return Choice(None, edge="")
    best = min(losses, key=lambda lr: losses[lr])
    return Choice(best, edge={rates[0]: "lowest", rates[-1]: "highest"}.get(best, ""))


def chosen_records(study: Study, records: Records, optimizer: str, arm: str) -> list[Record]:
    """The arm's records at its best rate, one for each of the seeds."""
    choice = choose_rate(study, records, optimizer, arm)
    if choice.lr is None:
        return []
    return _select(study, records, optimizer, choice.lr, MAIN_ARMS[arm], study.seeds)


def tuning(study: Study, records: Records) -> list[Tuning]:
    """Every optimizer at every rate of a brief study; of others, `by_rate` has all seeds."""
    found = []
    for optimizer, lr in study.all_rates() if study.brief else ():
        seed = (study.tuning_seed,)
        plain, teleported = (
            _select(study, records, optimizer, lr, MAIN_ARMS[arm], seed) for arm in (PLAIN, TELEPORTED)
        )
        (plain_loss,), (teleported_loss,) = final_losses(plain), final_losses(teleported)
        found.append(Tuning(optimizer, lr, plain_loss, teleported_loss, teleports=len(teleported[0].accepted)))
    return found


def no_harm(study: Study, records: Records) -> list[Harm]:
    """Every optimizer at every rate; nothing of a brief study."""
    return [] if study.brief else [_harm(study, records, *rate) for rate in study.all_rates()]


def looked_at_again(study: Study, records: Records) -> Study:
    """The study on its fresh seeds, with the rates at which the teleported curve is higher than the plain one and than
    chance makes it: of so many mean curves of a few runs each, some will be without any harm."""
    suspects = [(harm.optimizer, harm.lr) for harm in no_harm(study, records) if harm.beyond_chance]
    rates = {
        optimizer: tuple(lr for name, lr in suspects if name == optimizer)
        for optimizer in dict.fromkeys(name for name, _ in suspects)
    }
    return replace(study, rates=rates, seeds=study.fresh_seeds)


def by_rate(study: Study, records: Records) -> list[Rate]:
    """Every optimizer at every rate; nothing of a brief study."""
    return [] if study.brief else [_rate(study, records, *rate) for rate in study.all_rates()]


def states(study: Study, records: Records) -> list[States]:
    """The optimizers with momentum at their rates in the middle."""
    return [
        States(
            optimizer,
            lr,
            {
                arm: spread(final_losses(_select(study, records, optimizer, lr, settings, study.state_seeds)))
                for arm, settings in state_arms(optimizer).items()
            },
        )
        for optimizer in study.state_optimizers()
        for lr in study.state_rates(optimizer)
    ]


def spread(values: Iterable[float]) -> Spread:
    """Over the finite ones; the others are runs that diverged or did not get there."""
    listed = list(values)
    finite = [value for value in listed if math.isfinite(value)]
    mean = statistics.fmean(finite) if finite else math.nan
    return Spread(mean, statistics.stdev(finite) if len(finite) > 1 else 0.0, len(finite), len(listed))


def final_losses(records: Iterable[Record]) -> list[float]:
    """The train losses at the end, NaN where a run diverged."""
    return [math.nan if record.diverged else record.final.train_loss for record in records]


def time_to(record: Record, loss: float) -> tuple[float, float]:
    """(seconds, epochs) to the first check with a train loss of at most `loss`; NaN if there is none."""
    for check in record.checks:
        if check.train_loss <= loss:
            return check.seconds, check.iteration / record.iterations_per_epoch
    return math.nan, math.nan


def worst_ratio(plain: Sequence[Record], teleported: Sequence[Record]) -> tuple[float, float, float]:
    """(ratio, epoch, plain loss) where the teleported mean train-loss curve is highest above the plain one.

    Means over runs of the same checks; only the checks after the last teleport of all runs count. Without a teleport or
    a check after it: all NaN.
    """
    iterations = [teleport.iteration for record in teleported for teleport in record.teleports]
    if not iterations:
        return math.nan, math.nan, math.nan
    last = max(iterations)
    compared = [
        (_mean_loss(theirs), _mean_loss(ours), ours[0].iteration / teleported[0].iterations_per_epoch)
        for theirs, ours in zip(
            zip(*(record.checks for record in plain), strict=True),
            zip(*(record.checks for record in teleported), strict=True),
            strict=True,
        )
        if ours[0].iteration > last
    ]
    if not compared:
        return math.nan, math.nan, math.nan
    return max((_ratio(ours, theirs), epoch, theirs) for theirs, ours, epoch in compared)


def worst_of_sound(plain: Sequence[Record], others: Sequence[Record]) -> tuple[float, float, float]:
    """`worst_ratio` over the seeds that diverged in neither arm."""
    sound = [pair for pair in zip(plain, others, strict=True) if not any(record.diverged for record in pair)]
    return worst_ratio([theirs for theirs, _ in sound], [ours for _, ours in sound])


def verdicts(study: Study, outcomes: Sequence[Outcome]) -> list[Verdict]:
    """The best of all plain optimizers against the best of all teleported ones, of those that no seed kept from it."""
    quantities: dict[str, Callable[[Outcome], Spread]] = {
        f"seconds to train loss {loss:g}": partial(_seconds_to, index) for index, loss in enumerate(study.targets)
    }
    quantities["train loss at the end"] = lambda outcome: outcome.train_loss
    quantities["validation loss"] = lambda outcome: outcome.validation_loss
    if any(outcome.accuracy.count for outcome in outcomes):
        quantities["validation error"] = _error
    return [
        Verdict(quantity, *(_best(outcomes, arm, value) for arm in (PLAIN, TELEPORTED)))
        for quantity, value in quantities.items()
    ]


def following_jobs(study: Study, records: Records) -> list[Job]:
    """The jobs that depend on the records of others.

    The nudged jobs run at the rates at which something was teleported: elsewhere nothing is compared with chance. An
    optimizer that has such jobs also runs all three arms at its rates that are looked at again. A brief study runs the
    arms at their best rates, on the seeds that did not choose these rates.
    """
    if study.brief:
        arms = product(study.rates, MAIN_ARMS.items())
        runs = [
            (optimizer, choose_rate(study, records, optimizer, arm).lr, teleports)
            for optimizer, (arm, teleports) in arms
        ]
    else:
        runs = [(rate.optimizer, rate.lr, NUDGE) for rate in by_rate(study, records) if rate.teleports]
    jobs = [
        Job(study.problem, optimizer, lr, teleports, seed)
        for optimizer, lr, teleports in runs
        if lr is not None
        for seed in study.seeds
    ]
    return jobs if study.brief else jobs + _fresh_jobs(study, records, jobs)


def _fresh_jobs(study: Study, records: Records, nudged: Iterable[Job]) -> list[Job]:
    unknown = {job.optimizer for job in nudged if job not in records}
    known = study.only(optimizer for optimizer in study.rates if optimizer not in unknown)
    again = looked_at_again(known, records)
    arms = (*MAIN_ARMS.values(), NUDGE)
    return [
        Job(study.problem, optimizer, lr, teleports, seed)
        for (optimizer, lr), teleports, seed in product(again.all_rates(), arms, again.seeds)
    ]


def begun(study: Study, records: Records) -> Study:
    """The study with those of its optimizers that have the records of all first jobs."""
    return study.only(
        optimizer for optimizer in study.rates if all(job in records for job in study.only([optimizer]).first_jobs())
    )


def complete(study: Study, records: Records) -> Study:
    """The study with those of its optimizers that have all their records."""
    kept = begun(study, records)
    lacking = {job.optimizer for job in following_jobs(kept, records) if job not in records}
    return kept.only(optimizer for optimizer in kept.rates if optimizer not in lacking)


def _best(outcomes: Iterable[Outcome], arm: str, value: Callable[[Outcome], Spread]) -> Best | None:
    """The arm's optimizer with the lowest mean, of those that have a value on every seed."""
    values = [Best(outcome.optimizer, outcome.choice.lr, value(outcome)) for outcome in outcomes if outcome.arm == arm]
    reached = [best for best in values if best.value.count == best.value.of > 0]
    return min(reached, key=lambda best: best.value.mean, default=None)


def _seconds_to(index: int, outcome: Outcome) -> Spread:
    return outcome.targets[index].seconds


def _error(outcome: Outcome) -> Spread:
    return replace(outcome.accuracy, mean=1 - outcome.accuracy.mean)


def _outcome(study: Study, records: Records, optimizer: str, arm: str) -> Outcome:
    chosen = chosen_records(study, records, optimizer, arm)
    kept = [record for record in chosen if not record.diverged]
    missing = [math.nan] * (len(study.seeds) - len(kept))

    def over_seeds(values: Iterable[float]) -> Spread:
        return spread([*values, *missing])

    def if_known(values: Iterable[float]) -> Spread | None:
        found = over_seeds(values)
        return found if found.count > 0 else None

    times = {loss: [time_to(record, loss) for record in kept] for loss in study.targets}
    return Outcome(
        optimizer,
        arm,
        choose_rate(study, records, optimizer, arm),
        targets=tuple(
            Target(loss, over_seeds(seconds for seconds, _ in reached), over_seeds(epochs for _, epochs in reached))
            for loss, reached in times.items()
        ),
        train_loss=over_seeds(record.final.train_loss for record in kept),
        validation_loss=over_seeds(record.validations[-1].loss for record in kept),
        accuracy=over_seeds(record.validations[-1].accuracy for record in kept),
        seconds=over_seeds(record.final.seconds for record in kept),
        noise_accuracy=if_known(record.validations[-1].noise_accuracy for record in kept),
        norm=if_known(record.validations[-1].norm for record in kept),
    )


def _harm(study: Study, records: Records, optimizer: str, lr: float) -> Harm:
    plain, teleported = _arms(study, records, optimizer, lr)
    teleports = sum(len(ours.accepted) for ours in teleported)
    nudged = _select(study, records, optimizer, lr, NUDGE, study.seeds) if teleports else []
    pairs = list(zip(plain, teleported, strict=True))
    ratio, epoch, loss = worst_of_sound(plain, teleported)
    by_chance = worst_of_sound(plain, nudged)[0] if nudged else math.nan
    return Harm(
        optimizer,
        lr,
        len(pairs),
        teleports=teleports,
        plain_diverged=sum(theirs.diverged for theirs in plain),
        teleported_diverged=sum(ours.diverged for ours in teleported),
        harmed_seeds=sum(ours.diverged and not theirs.diverged for theirs, ours in pairs),
        ratio=ratio,
        epoch=epoch,
        plain_loss=loss,
        by_chance=by_chance,
    )


def _rate(study: Study, records: Records, optimizer: str, lr: float) -> Rate:
    plain, teleported = _arms(study, records, optimizer, lr)
    made = [teleport for record in teleported for teleport in record.accepted]
    rises = [_rise(teleport) for teleport in made]
    return Rate(
        optimizer,
        lr,
        plain_loss=spread(final_losses(plain)),
        teleported_loss=spread(final_losses(teleported)),
        plain_accuracy=spread(_final_accuracies(plain)),
        teleported_accuracy=spread(_final_accuracies(teleported)),
        share=spread(_share(theirs, ours) for theirs, ours in zip(plain, teleported, strict=True)),
        mean_rise=statistics.fmean(rises) if rises else math.nan,
        largest_rise=max(rises, default=math.nan),
        teleports=len(made),
        gone=sum(teleport.loss_later <= teleport.loss_before for teleport in made),
    )


def _share(plain: Record, teleported: Record) -> float:
    """Seconds to the plain run's last train loss over the plain run's seconds; NaN where one does not get there."""
    if plain.diverged:
        return math.nan
    seconds, _ = time_to(teleported, plain.final.train_loss)
    return seconds / plain.final.seconds


def _rise(teleport: Teleport) -> float:
    return teleport.loss_after / teleport.loss_before - 1


def _final_accuracies(records: Iterable[Record]) -> list[float]:
    return [math.nan if record.diverged else record.validations[-1].accuracy for record in records]


def _mean_loss(checks: Iterable[Check]) -> float:
    return statistics.fmean(check.train_loss for check in checks)


def _ratio(value: float, reference: float) -> float:
    """value / reference for losses, which may be exactly 0."""
    if reference == 0:
        return 1.0 if value == 0 else math.inf
    return value / reference


def _arms(study: Study, records: Records, optimizer: str, lr: float) -> tuple[list[Record], ...]:
    """(plain, teleported), each a record for each of the seeds."""
    return tuple(_select(study, records, optimizer, lr, MAIN_ARMS[arm], study.seeds) for arm in (PLAIN, TELEPORTED))


def _select(
    study: Study,
    records: Records,
    optimizer: str,
    lr: float,
    teleports: TeleportSettings | None,
    seeds: Iterable[int],
) -> list[Record]:
    return [records[Job(study.problem, optimizer, lr, teleports, seed)] for seed in seeds]
