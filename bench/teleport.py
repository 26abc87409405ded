"""A whole teleport of ten steps against the published algorithm, in forward+backward passes on the same batch.

    python -m bench.teleport [--shape NAME ...] [--threads 1] [--rounds 5] [--device cpu] [--out FILE]

Timed from the call of `teleport_mlp` to its return, so with its set-up and the writing of the parameters. The growth
cap is off, for the search to take all of its steps. Before anything is timed, every contestant's result is checked in
float64: the loss on the batch has not drifted, and the objective has improved.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import symtele_cuda.teleport
from bench.baselines import published_teleport
from bench.harness import (
    UNIT,
    Check,
    Contestant,
    add_timing_options,
    all_passed,
    compare,
    make_parser,
    run_shapes,
)
from bench.memory import AllocationRecorder
from symtele_cuda.activations import LeakyReLU

STEPS = 10
SLOPE = 0.1
LOOKAHEAD_LR = 0.01
LOOKAHEAD_MARGIN = 4.0
PUBLISHED_RATE = 0.01
GRAD_NORM, LOOKAHEAD = "teleport grad_norm", "teleport lookahead"
# The published algorithm as its authors' program differentiates, and in the leaner reading of its formula.
PUBLISHED, PUBLISHED_LEAN = "published algorithm", "published algorithm, lean reading"

# Of our teleports; the published one drifts with the square of its step, for which 1e-3 is generous.
MAX_DRIFT, MAX_PUBLISHED_DRIFT = 1e-5, 1e-3
MAX_LOOKAHEAD_RATIO = 1.5


@dataclass(frozen=True)
class Shape:
    """A network, a batch size and what is asked there: units a teleport may cost, and how much faster it must be."""

    dims: tuple[int, ...]
    n: int
    must_units: float
    aim_units: float
    must_speedup: float | None = None


SHAPES = {
    "mlp-784-512-512-10-n20": Shape((784, 512, 512, 10), 20, must_units=17, aim_units=12, must_speedup=15),
    "mlp-784-512-512-10-n200": Shape((784, 512, 512, 10), 200, must_units=33, aim_units=22, must_speedup=6),
    "mlp-784-128-128-10-n100": Shape((784, 128, 128, 10), 100, must_units=35, aim_units=22),
    "mlp-1024-1024-1024-10-n512": Shape((1024, 1024, 1024, 10), 512, must_units=48, aim_units=30, must_speedup=5),
}


@dataclass(frozen=True)
class Problem:
    """A network without biases at torch's own initial range, pixels in [0, 1] and random classes."""

    model: nn.Sequential
    x: Tensor
    y: Tensor

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y

    @property
    def weights(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def clone(self) -> Problem:
        return replace(self, model=copy.deepcopy(self.model))

    def double(self) -> Problem:
        return Problem(copy.deepcopy(self.model).double(), self.x.double(), self.y)

    def gradients(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.loss(), self.weights)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)


def make_problem(dims: Sequence[int], n: int, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(dims):
        linear = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=False)
        nn.init.uniform_(linear.weight, -1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
        layers += [linear, nn.LeakyReLU(SLOPE)]
    x = torch.rand(n, dims[0], generator=generator)
    y = torch.randint(dims[-1], (n,), generator=generator)
    return Problem(nn.Sequential(*layers[:-1]).to(device), x.to(device), y.to(device))


def our_teleport(problem: Problem, objective: str) -> symtele_cuda.TeleportReport:
    return symtele_cuda.teleport_mlp(
        problem.model,
        problem.batch,
        objective=objective,
        lr=LOOKAHEAD_LR if objective == "lookahead" else None,
        margin=LOOKAHEAD_MARGIN,
        steps=STEPS,
        max_growth=math.inf,
    )


def their_teleport(problem: Problem, through_weights: bool) -> None:
    """The published algorithm, written into the model as ours is."""
    result = published_teleport(
        problem.weights, problem.x, problem.y, F.cross_entropy, LeakyReLU(SLOPE), STEPS, PUBLISHED_RATE, through_weights
    )
    with torch.no_grad():
        for parameter, weight in zip(problem.weights, result.weights, strict=True):
            parameter.copy_(weight)


def grad_norm(problem: Problem) -> float:
    """‖∇L‖ on the batch."""
    return math.sqrt(sum(gradient.square().sum().item() for gradient in problem.gradients()))


def loss_after_step(problem: Problem) -> float:
    """The loss on the batch after one gradient step as long as the lookahead's."""
    ahead, gradients = problem.clone(), problem.gradients()
    with torch.no_grad():
        for parameter, gradient in zip(ahead.weights, gradients, strict=True):
            parameter.sub_(gradient, alpha=LOOKAHEAD_LR * LOOKAHEAD_MARGIN)
    return ahead.loss().item()


def check_correct(start: Problem) -> tuple[dict[str, Check], dict[str, Any]]:
    """What must hold before a speed is worth reporting, judged from the parameters alone; and what our searches did."""
    ascended, looked_ahead, theirs = start.clone(), start.clone(), start.clone()
    reports = {
        GRAD_NORM: our_teleport(ascended, "grad_norm"),
        LOOKAHEAD: our_teleport(looked_ahead, "lookahead"),
    }
    their_teleport(theirs, through_weights=True)
    ascended, looked_ahead, theirs, before = (p.double() for p in (ascended, looked_ahead, theirs, start))
    loss = before.loss().item()

    def drift(problem: Problem) -> float:
        return abs(problem.loss().item() - loss) / abs(loss)

    growth = grad_norm(ascended) / grad_norm(before)
    checks = {
        f"{GRAD_NORM}, loss drift": Check(drift(ascended), at_most=MAX_DRIFT),
        f"{GRAD_NORM}, growth of the gradient": Check(growth, at_least=1.0),
        f"{LOOKAHEAD}, loss drift": Check(drift(looked_ahead), at_most=MAX_DRIFT),
        f"{LOOKAHEAD}, loss after a step, relative": Check(
            loss_after_step(looked_ahead) / loss_after_step(before), at_most=1.0
        ),
        f"{PUBLISHED}, loss drift": Check(drift(theirs), at_most=MAX_PUBLISHED_DRIFT),
    }
    for name, report in reports.items():
        checks[f"{name}, steps"] = Check(len(report.trace), at_least=STEPS, note=report.reason)
    searches = {
        name: {"accepted steps": report.steps, "trace": report.trace, "seconds": report.seconds}
        for name, report in reports.items()
    }
    return checks, searches


def largest_search_allocation(start: Problem, objective: str) -> AllocationRecorder:
    """The tensors that the search allocates, between the set-up and the writing of the parameters."""
    recorder = AllocationRecorder()
    search = symtele_cuda.teleport.ascend

    def recorded(*args: Any, **kwargs: Any) -> Any:
        with recorder:
            return search(*args, **kwargs)

    with patch.object(symtele_cuda.teleport, "ascend", recorded):
        our_teleport(start.clone(), objective)
    return recorder


def check_memory(start: Problem, shape: Shape) -> dict[str, Check]:
    """No tensor of the search has more than n × max(d_k, n) elements, d_k the width of a hidden layer."""
    bound = shape.n * max(*shape.dims[1:-1], shape.n)
    checks = {}
    for name, objective in ((GRAD_NORM, "grad_norm"), (LOOKAHEAD, "lookahead")):
        recorder = largest_search_allocation(start, objective)
        checks[f"{name}, largest tensor of the search, elements"] = Check(
            recorder.largest_elements if recorder.allocations else None,
            at_most=bound,
            note=f"by {recorder.largest_operator}, of {recorder.allocations} allocations",
        )
    return checks


def measure(shape: Shape, rounds: int, device: torch.device) -> dict[str, Any]:
    """One shape's entry of the JSON file; without timings where a check fails."""
    start = make_problem(shape.dims, shape.n, device)
    checks, searches = check_correct(start)
    result: dict[str, Any] = {"shape": shape, "checks": checks, "searches": searches}
    if not all_passed(checks):
        return result
    contestants = {
        UNIT: Contestant(lambda _: start.gradients()),
        GRAD_NORM: Contestant(lambda problem: our_teleport(problem, "grad_norm"), start.clone),
        LOOKAHEAD: Contestant(lambda problem: our_teleport(problem, "lookahead"), start.clone),
        PUBLISHED: Contestant(lambda problem: their_teleport(problem, through_weights=True), start.clone),
        PUBLISHED_LEAN: Contestant(lambda problem: their_teleport(problem, through_weights=False), start.clone),
    }
    timings = compare(contestants, rounds, device)
    units = timings[GRAD_NORM].units
    requirements = {
        "units, must": Check(units, at_most=shape.must_units),
        "units, aim": Check(units, at_most=shape.aim_units),
        "lookahead / grad_norm": Check(timings[LOOKAHEAD].units / units, at_most=MAX_LOOKAHEAD_RATIO),
        "faster than published, times": Check(timings[PUBLISHED].units / units, at_least=shape.must_speedup),
        "faster than published in the lean reading, times": Check(timings[PUBLISHED_LEAN].units / units),
    }
    requirements |= check_memory(start, shape)
    return result | {"timings": timings, "requirements": requirements}


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    return run_shapes(
        "teleport",
        lambda name: measure(SHAPES[name], arguments.rounds, arguments.device),
        arguments,
        settings={
            "steps": STEPS,
            "rounds": arguments.rounds,
            "lookahead": {"lr": LOOKAHEAD_LR, "margin": LOOKAHEAD_MARGIN},
            "published rate": PUBLISHED_RATE,
            "negative slope": SLOPE,
            "max_growth": "off",
        },
    )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("A ten-step teleport against the published algorithm.", SHAPES, "bench/results/teleport.json")
    add_timing_options(parser, rounds=5)
    return parser.parse_args(words)


if __name__ == "__main__":
    main(parse())
