"""From where a network is trained: its initialisation, and its teleports."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import symtele_cuda as st
from symtele_cuda.schedule import Batch
from symtele_cuda.teleporter import LOOK_AHEAD, WORTHWHILE

GAINS = {"LeakyReLU 0.1": math.sqrt(2 / 1.01), "tanh": 5 / 3, "sigmoid": 4.0}
HALVES = {"LeakyReLU 0.1": 1.0, "tanh": 1.0, "sigmoid": 2.0}
SAMPLES = 200  # of a teleport, and as many behind them of its holdout
LEAST = 1e-9  # a `min_gain` that refuses nothing but has the best decrease measured
UNGUARDED = st.Guards(holdout_tol=math.inf, min_gain=LEAST, max_weight_change=math.inf, max_sensitivity=math.inf)


@dataclass(frozen=True)
class Samples:
    """Those of one network: for training and for validation."""

    train: Batch
    validation: Batch

    def part(self, start: int, count: int) -> Batch:
        """So many training samples."""
        return self.train[0][start : start + count], self.train[1][start : start + count]

    def half_of_validation(self) -> Batch:
        half = len(self.validation[0]) // 2
        return self.validation[0][:half], self.validation[1][:half]


@dataclass(frozen=True)
class Moment:
    """When a network is teleported: before which epoch, at which rate, behind which activation.

    rate: that of plain gradient steps, which the Teleporter's guard reads off SGD; None for other optimizers.
    """

    epoch: int
    lr: float
    activation: str
    rate: float | None


Teleport = Callable[[nn.Sequential, Samples, Moment], st.TeleportReport]


def standardise(
    model: nn.Sequential, samples: Samples, moment: Moment, *, guarded: bool = True, **options: Any
) -> st.TeleportReport:
    """Standardise with refit="all" on the first samples, as a Teleporter would, with those behind them as the holdout.

    A network that is trained is standardised on all samples, and held to the first half of the validation's: its
    training samples are no fresh ones. Neither a gain nor the steps of its rate are asked of it. guarded: False,
    whatever the guards would say.
    """
    trained = moment.epoch > 0
    batch = samples.train if trained else samples.part(0, SAMPLES)
    holdout = samples.half_of_validation() if trained else samples.part(SAMPLES, SAMPLES)
    guards = replace(WORTHWHILE, min_gain=0.0) if trained else replace(WORTHWHILE, rate=moment.rate)
    guards = replace(guards if guarded else UNGUARDED, holdout=holdout)
    method = st.Standardise(refit="all", least_kept=0.0, **options)
    return st.teleport_mlp(model, batch, method=method, guards=guards)


def standardise_exactly(model: nn.Sequential, samples: Samples, moment: Moment) -> st.TeleportReport:
    """With refit="last" on half of the samples, with a holdout behind them and without a bound on noise."""
    guards = replace(WORTHWHILE, holdout=samples.part(SAMPLES // 2, SAMPLES), max_sensitivity=math.inf)
    return st.teleport_mlp(model, samples.part(0, SAMPLES // 2), method=st.Standardise(), guards=guards)


def halve_spread(model: nn.Sequential, samples: Samples, moment: Moment) -> st.TeleportReport:
    return standardise(model, samples, moment, spread=HALVES[moment.activation])


def look_ahead(model: nn.Sequential, samples: Samples, moment: Moment) -> st.TeleportReport:
    """The Teleporter's own search for SGD, on samples that no epoch before has had."""
    teleporter = st.Teleporter(model, torch.optim.SGD(model.parameters(), moment.lr), method=LOOK_AHEAD)
    start = 2 * SAMPLES * moment.epoch
    return teleporter.refresh(samples.part(start, SAMPLES), holdout=samples.part(start + SAMPLES, SAMPLES))


@dataclass(frozen=True)
class Arm:
    """init: an initialisation, None is PyTorch's. before: the epochs that a teleport precedes."""

    init: str | None = None
    teleport: Teleport | None = None
    before: range = range(0)


PLAIN, LAST, ALL = "plain", "standardise, exact", "standardise"
INITS = ("He or Glorot", "orthogonal", "LSUV")
ON_BEST = "orthogonal, then standardise"
SMALL = "standardise, spread halved"
TRAINED = "standardise after two epochs"
ALL_ANYWAY, TRAINED_ANYWAY = "standardise, unguarded", "standardise after two epochs, unguarded"
EACH, EACH_ANYWAY = "standardise before every epoch", "standardise before every epoch, unguarded"
LOOKAHEAD = "lookahead, three teleports"
SPREADS = {f"standardise, spread {spread}": float(spread) for spread in (1, 2, 4)}
_unguarded = partial(standardise, guarded=False)
ARMS = {
    PLAIN: Arm(),
    **{name: Arm(name) for name in INITS},
    LAST: Arm(None, standardise_exactly, range(1)),
    ALL: Arm(None, standardise, range(1)),
    SMALL: Arm(None, halve_spread, range(1)),
    ON_BEST: Arm("orthogonal", standardise, range(1)),
    TRAINED: Arm(None, standardise, range(2, 3)),
    EACH: Arm(None, standardise, range(sys.maxsize)),
    ALL_ANYWAY: Arm(None, _unguarded, range(1)),
    TRAINED_ANYWAY: Arm(None, _unguarded, range(2, 3)),
    EACH_ANYWAY: Arm(None, _unguarded, range(sys.maxsize)),
    LOOKAHEAD: Arm(None, look_ahead, range(3)),
    **{name: Arm(None, partial(standardise, spread=spread), range(1)) for name, spread in SPREADS.items()},
}


def initialise(model: nn.Sequential, kind: str, activation: str, x: Tensor) -> None:
    """He et al. 2015 or, behind tanh and sigmoid, Glorot and Bengio 2010; orthogonal; LSUV (Mishkin and Matas 2016).

    Each has the gain of its activation, 4 behind sigmoid (Glorot and Bengio), and no biases.
    """
    linears = [module for module in model if isinstance(module, nn.Linear)]
    for linear in linears:
        gain = GAINS[activation] if linear is not linears[-1] else 1.0
        nn.init.zeros_(linear.bias)
        if kind != "He or Glorot":
            nn.init.orthogonal_(linear.weight, 1.0 if kind == "LSUV" else gain)
        elif activation == "LeakyReLU 0.1":
            nn.init.normal_(linear.weight, 0.0, gain / math.sqrt(linear.weight.shape[1]))
        else:
            nn.init.xavier_uniform_(linear.weight, gain)
    if kind == "LSUV":
        _unit_variance(model, x)


@torch.no_grad()
def _unit_variance(model: nn.Sequential, x: Tensor) -> None:
    """Scale the weights so that each layer's outputs on x have variance 1."""
    for module in model:
        if isinstance(module, nn.Linear):
            module.weight.div_(module(x).std())
        x = module(x)
