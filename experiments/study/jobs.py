"""The jobs of the study: which training runs a grid of rates, arms and seeds consists of, and what each is known by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product

from experiments.study.problems import PROBLEMS, Problem
from experiments.training import TeleportSettings, TrainingSettings

PLAIN, TELEPORTED = "plain", "teleported"
DEFAULTS = TeleportSettings()
STATES = ("keep", "reset")

# What the least gain does where a rate is about right.
ANY_GAIN = "any gain"
FOR_ANY_GAIN = replace(DEFAULTS, min_gain=0.0)

# Teleports of a thousandth of the length: nothing to speak of, but two runs that differ by it part within some epochs,
# so that it shows how far a teleported run comes from the plain one by chance.
NUDGE = replace(FOR_ANY_GAIN, steps=1, first_radius=1e-3)

MAIN_ARMS: dict[str, TeleportSettings | None] = {PLAIN: None, TELEPORTED: DEFAULTS}
# The optimizers whose state a teleport may leave behind.
STATE_OPTIMIZERS = ("momentum", "adam", "muon")
# Those of them for which "lookahead" is a gradient step: for the others it is their next step anyway.
NEXT_STEP = "next step"
ALONG_NEXT_STEP = replace(DEFAULTS, objective="next_step")
GRADIENT_STEPPERS = ("momentum", "muon")
_NAMES = {NUDGE: "nudged", ALONG_NEXT_STEP: f"teleported, {NEXT_STEP}", FOR_ANY_GAIN: f"teleported, {ANY_GAIN}"}


def state_arms(optimizer: str) -> dict[str, TeleportSettings | None]:
    """The ways with an optimizer's state, teleports for any gain, and the lookahead in which the state counts as it
    stands."""
    arms: dict[str, TeleportSettings | None] = {PLAIN: None}
    arms |= {state: replace(DEFAULTS, optimizer_state=state) for state in STATES}
    arms[ANY_GAIN] = FOR_ANY_GAIN
    return arms | ({NEXT_STEP: ALONG_NEXT_STEP} if optimizer in GRADIENT_STEPPERS else {})


@dataclass(frozen=True)
class Job:
    """One training run. `key` stands for all that its result depends on but the data and the code."""

    problem: Problem
    optimizer: str
    lr: float
    teleports: TeleportSettings | None
    seed: int

    @property
    def training(self) -> TrainingSettings:
        return TrainingSettings(self.problem.epochs, self.problem.batch_size, self.optimizer, self.lr)

    @property
    def key(self) -> str:
        """The beginning of a hash of all settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def arm(self) -> str:
        """What is done with the weights and the optimizer's state, in words."""
        if self.teleports is None:
            return PLAIN
        return _NAMES.get(self.teleports) or f"teleported, state {self.teleports.optimizer_state}"

    def __str__(self) -> str:
        return f"{self.problem.name} {self.optimizer} {self.lr:g} {self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """The part of the study that belongs to one problem.

    rates: of every optimizer, rising. targets: the train losses, falling, whose time is compared. The rate of an arm is
    chosen on `tuning_seed` and judged on `seeds`; what becomes of the optimizer's state is compared on `state_seeds`;
    rates at which teleports seem to do harm are looked at again on `fresh_seeds`.
    brief: no more than that choice and that judgement, without what needs all seeds at all rates: harm, and the state.
    seconds: of about one run on one core, with Muon and with any other optimizer: for the order of the jobs and the
    estimates of the time that is left.
    """

    problem: Problem
    rates: Mapping[str, tuple[float, ...]]
    targets: tuple[float, ...]
    seconds: tuple[float, float]
    tuning_seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    state_seeds: tuple[int, ...] = (1, 2, 3)
    fresh_seeds: tuple[int, ...] = tuple(range(6, 26))
    brief: bool = False

    def main_jobs(self) -> Iterator[Job]:
        """All rates, without and with teleports, all seeds; of a brief study the tuning seed alone."""
        seeds = (self.tuning_seed, *(() if self.brief else self.seeds))
        for optimizer, rates in self.rates.items():
            yield from self._jobs(optimizer, rates, MAIN_ARMS, seeds)

    def state_jobs(self) -> Iterator[Job]:
        """The ways with the optimizer's state and step, at the rates in the middle; some are main jobs too."""
        for optimizer in self.state_optimizers():
            yield from self._jobs(optimizer, self.state_rates(optimizer), state_arms(optimizer), self.state_seeds)

    def all_rates(self) -> list[tuple[str, float]]:
        """(optimizer, rate)."""
        return [(optimizer, lr) for optimizer, rates in self.rates.items() for lr in rates]

    def state_optimizers(self) -> list[str]:
        return [] if self.brief else [optimizer for optimizer in STATE_OPTIMIZERS if optimizer in self.rates]

    def state_rates(self, optimizer: str) -> tuple[float, ...]:
        """The rates of `optimizer` without the smallest and the largest, or all if that leaves none."""
        rates = self.rates[optimizer]
        return rates[1:-1] or rates

    def first_jobs(self) -> list[Job]:
        """Main and state jobs, each once; which others follow is in their records (`results.following_jobs`)."""
        return list(dict.fromkeys((*self.main_jobs(), *self.state_jobs())))

    def estimate(self, job: Job) -> float:
        """Seconds of about one run on one core."""
        muon, other = self.seconds
        return muon if job.optimizer == "muon" else other

    def only(self, optimizers: Iterable[str]) -> Study:
        kept = set(optimizers)
        return replace(self, rates={name: rates for name, rates in self.rates.items() if name in kept})

    def _jobs(
        self,
        optimizer: str,
        rates: Iterable[float],
        arms: Mapping[str, TeleportSettings | None],
        seeds: Iterable[int],
    ) -> Iterator[Job]:
        for lr, seed, teleports in product(rates, seeds, arms.values()):
            yield Job(self.problem, optimizer, lr, teleports, seed)


_TENTHS = (0.001, 0.003, 0.01, 0.03, 0.1)
_ADAPTIVE = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_HIGH_ADAPTIVE = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Rates around the best ones of short looks at the tuning seed. Seconds: measured. Muon is not on mnist-512 but briefly,
# and for fewer epochs, on mnist-512-muon: its orthogonalization of these matrices is some fifty times the work of a
# batch of 20 samples, and the whole grid of this one optimizer would take several times as long as all the others'.
FULL = {
    study.problem.name: study
    for study in (
        Study(
            PROBLEMS["digits"],
            rates={
                "sgd": (0.03, 0.1, 0.2, 0.3, 0.6, 1.0),
                "momentum": (0.003, 0.01, 0.03, 0.06, 0.1),
                "adagrad": (0.003, 0.01, 0.03, 0.1, 0.3),
                "rmsprop": _ADAPTIVE,
                "adam": _HIGH_ADAPTIVE,
                "adamw": _HIGH_ADAPTIVE,
                "muon": _TENTHS,
            },
            targets=(0.1, 0.03, 0.01),
            seconds=(5, 1.5),
        ),
        Study(
            PROBLEMS["mnist-512"],
            rates={
                "sgd": (0.002, 0.01, 0.03, 0.1, 0.2, 0.3),
                "momentum": _TENTHS,
                "adagrad": _TENTHS,
                "rmsprop": _ADAPTIVE,
                "adam": _ADAPTIVE,
                "adamw": _ADAPTIVE,
            },
            targets=(0.1, 0.03, 0.01),
            seconds=(900, 16),
        ),
        Study(
            PROBLEMS["mnist-512-muon"],
            rates={"muon": (0.001, 0.003, 0.006, 0.01, 0.02)},
            targets=(0.1, 0.03, 0.01),
            seconds=(120, 6),
            brief=True,
        ),
        Study(
            PROBLEMS["mnist-128"],
            rates={
                "sgd": (0.03, 0.1, 0.3, 0.6, 1.0),
                "momentum": (0.01, 0.03, 0.1, 0.2, 0.3),
                "adagrad": (0.003, 0.01, 0.03, 0.1, 0.3),
                "rmsprop": _ADAPTIVE,
                "adam": _HIGH_ADAPTIVE,
                "adamw": _HIGH_ADAPTIVE,
                "muon": _TENTHS,
            },
            targets=(0.1, 0.03, 0.01),
            seconds=(12, 3.3),
        ),
        Study(
            PROBLEMS["diabetes"],
            rates={
                "sgd": (0.01, 0.03, 0.1, 0.3, 0.6),
                "momentum": (0.003, 0.01, 0.03, 0.1, 0.3),
                "adagrad": (0.003, 0.01, 0.03, 0.1, 0.3),
                "rmsprop": _ADAPTIVE,
                "adam": _HIGH_ADAPTIVE,
                "adamw": _HIGH_ADAPTIVE,
                "muon": _TENTHS,
            },
            targets=(0.4, 0.3, 0.2),  # of the variance of the target on the training set
            seconds=(1.5, 0.6),
        ),
    )
}


def _quick(study: Study) -> Study:
    """A small study of the same problem: a few samples, two epochs, two rates, two seeds."""
    problem = replace(study.problem, samples=500, epochs=2, check_every=5)
    rates = {name: ladder[len(ladder) // 2 - 1 :][:2] for name, ladder in study.rates.items()}
    few = replace(study, seeds=(1, 2), state_seeds=(1,), fresh_seeds=(3, 4))
    return replace(few, problem=problem, rates=rates, seconds=(1.5, 0.5))


QUICK = {name: _quick(study) for name, study in FULL.items()}
