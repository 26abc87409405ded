"""A whole teleport of ten steps against the published algorithm, in forward+backward passes on the same batch.

    python -m bench.teleport [--device cpu] [--shape NAME ...] [--threads 1] [--rounds 5] [--out FILE]

Timed from the call of `teleport_mlp` to its return, so with its set-up and the writing of the parameters. The growth
cap is off, for the search to take all of its steps. One step costs a tenth of what twenty cost more than ten. Before
anything is timed, every contestant's result is checked in float64: the loss on the batch has not drifted, and the
objective has improved. What the first call of a shape costs more, once, stands by itself.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import symtele_cuda
from bench.baselines import published_teleport
from bench.harness import (
    UNIT,
    Check,
    Contestant,
    Timing,
    add_rounds,
    all_passed,
    begin,
    compare,
    make_parser,
    read_arguments,
    run_shapes,
)
from bench.memory import AllocationRecorder
from symtele_cuda.activations import LeakyReLU

STEPS = 10
SLOPE = 0.1
LOOKAHEAD_LR = 0.01
LOOKAHEAD_MARGIN = 4.0
UNBOUNDED = symtele_cuda.Guards(max_weight_change=math.inf, max_sensitivity=math.inf)
PUBLISHED_RATE = 0.01
GRAD_NORM, LOOKAHEAD = "teleport grad_norm", "teleport lookahead"
# In closed form, and the units that they may cost.
STANDARDISE = {"standardise, refit last": ("last", 3.0), "standardise, refit all": ("all", 8.0)}
LONGER_STEPS, LONGER = 2 * STEPS, f"teleport grad_norm, {2 * STEPS} steps"
# The published algorithm as its authors' program differentiates, and in the leaner reading of its formula.
PUBLISHED, PUBLISHED_LEAN = "published algorithm", "published algorithm, lean reading"

# The first two bound our teleports. Twenty steps without a cap reach where float32's rounding shows, and ten steps on a
# batch as large as the layers go beyond. The published teleport drifts with the square of its step: 1e-3 is generous.
MAX_DRIFT, MAX_LONGER_DRIFT, MAX_PUBLISHED_DRIFT = 1e-5, 1e-4, 1e-3
MAX_LOOKAHEAD_RATIO = 1.5


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(SLOPE),
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
}


@dataclass(frozen=True)
class Shape:
    """A network, a batch size and what is asked there.

    must_units, aim_units: units a teleport may cost; must_seconds: seconds; must_step_units: units one step may cost;
    must_speedup: how much faster it must be than the published algorithm, which is left out where it takes minutes.
    orthogonal: samples and weights have orthonormal rows, so that a batch as large as the layers can be matched.
    """

    dims: tuple[int, ...]
    n: int
    must_units: float | None = None
    aim_units: float | None = None
    must_speedup: float | None = None
    must_seconds: float | None = None
    must_step_units: float | None = None
    activation: str = "leaky_relu"
    published: bool = True
    orthogonal: bool = False


SHAPES = {
    "mlp-784-512-512-10-n20": Shape((784, 512, 512, 10), 20, must_units=17, aim_units=12, must_speedup=15),
    "mlp-784-512-512-10-n200": Shape((784, 512, 512, 10), 200, must_units=33, aim_units=22, must_speedup=6),
    "mlp-784-128-128-10-n100": Shape((784, 128, 128, 10), 100, must_units=35, aim_units=22),
    "mlp-1024-1024-1024-10-n512": Shape((1024, 1024, 1024, 10), 512, must_units=48, aim_units=30, must_speedup=5),
}

_MNIST, _CIFAR, _WIDE = (784, 512, 512, 10), (3072, 1024, 1024, 10), (4096, 4096, 4096, 1000)
# In the order in which they are measured, should the time not suffice for all.
CUDA_SHAPES = {
    "mlp-784-512-512-10-n200": Shape(_MNIST, 200, must_speedup=300, must_seconds=3e-3, must_step_units=1.0),
    "mlp-3072-1024-1024-10-n512": Shape(_CIFAR, 512, must_step_units=1.0, published=False),
    "mlp-4096-4096-4096-1000-n1024": Shape(_WIDE, 1024, must_step_units=1.0, published=False),
    "mlp-4096-4096-4096-1000-n4096": Shape(_WIDE, 4096, must_step_units=1.0, published=False, orthogonal=True),
    "mlp-784-512-512-10-n200-tanh": Shape(_MNIST, 200, must_step_units=1.0, activation="tanh", published=False),
    "mlp-784-512-512-10-n200-softplus": Shape(_MNIST, 200, must_step_units=1.0, activation="softplus", published=False),
    "mlp-784-512-512-10-n20": Shape(_MNIST, 20, must_step_units=1.0),
}
REGISTRY = {"cpu": SHAPES, "cuda": CUDA_SHAPES}


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


def make_problem(shape: Shape, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(shape.dims):
        linear = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=False)
        nn.init.uniform_(linear.weight, -1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
        layers += [linear, ACTIVATIONS[shape.activation]()]
    x = torch.rand(shape.n, shape.dims[0], generator=generator)
    y = torch.randint(shape.dims[-1], (shape.n,), generator=generator)
    problem = Problem(nn.Sequential(*layers[:-1]).to(device), x.to(device), y.to(device))
    return orthogonalise(problem) if shape.orthogonal else problem


def orthogonalise(problem: Problem) -> Problem:
    """The same with orthonormal rows, those of the samples times √d_0 / 2 for elements of the size of pixels."""
    with torch.no_grad():
        for weight in problem.weights:
            weight.copy_(torch.linalg.qr(weight.T).Q.T)
    centred = problem.x - problem.x.mean()
    return replace(problem, x=torch.linalg.qr(centred.T).Q.T.contiguous() * (math.sqrt(centred.shape[1]) / 2))


def our_teleport(problem: Problem, objective: str, steps: int = STEPS) -> symtele_cuda.TeleportReport:
    lr = LOOKAHEAD_LR if objective == "lookahead" else None
    method = symtele_cuda.Ascent(objective, lr, LOOKAHEAD_MARGIN, steps, max_growth=math.inf)
    return symtele_cuda.teleport_mlp(problem.model, problem.batch, method=method, guards=UNBOUNDED)


def standardising(problem: Problem, refit: str) -> symtele_cuda.TeleportReport:
    method = symtele_cuda.Standardise(refit=refit, least_kept=0.0)
    return symtele_cuda.teleport_mlp(problem.model, problem.batch, method=method, guards=UNBOUNDED)


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


def check_correct(start: Problem, shape: Shape) -> tuple[dict[str, Check], dict[str, Any]]:
    """What must hold before a speed is worth reporting, judged from the parameters alone; and what our searches did."""
    start.gradients()  # the device's own start is nobody's first call
    searches = {GRAD_NORM: ("grad_norm", STEPS), LOOKAHEAD: ("lookahead", STEPS), LONGER: ("grad_norm", LONGER_STEPS)}
    # On a GPU the first call of a kind runs kernel by kernel, the second captures a graph, the others replay it.
    firsts = {name: our_teleport(start.clone(), *search) for name, search in searches.items()}
    moved = {name: start.clone() for name in searches}
    reports = {name: our_teleport(moved[name], *search) for name, search in searches.items()}
    before = start.double()
    loss = before.loss().item()

    def drift(problem: Problem) -> float:
        return abs(problem.double().loss().item() - loss) / abs(loss)

    allowed: dict[str, float | None] = {GRAD_NORM: MAX_DRIFT, LOOKAHEAD: MAX_DRIFT, LONGER: MAX_LONGER_DRIFT}
    if shape.orthogonal:
        allowed |= {GRAD_NORM: None, LONGER: None}
    checks = {f"{name}, loss drift": Check(drift(moved[name]), at_most=bound) for name, bound in allowed.items()}
    for name in (GRAD_NORM, LONGER):
        growth = grad_norm(moved[name].double()) / grad_norm(before)
        checks[f"{name}, growth of the gradient"] = Check(growth, at_least=1.0)
    ahead = loss_after_step(moved[LOOKAHEAD].double()) / loss_after_step(before)
    checks[f"{LOOKAHEAD}, loss after a step, relative"] = Check(ahead, at_most=1.0)
    if shape.published:
        theirs = start.clone()
        their_teleport(theirs, through_weights=True)
        checks[f"{PUBLISHED}, loss drift"] = Check(drift(theirs), at_most=MAX_PUBLISHED_DRIFT)
    for name, (refit, _) in STANDARDISE.items():
        standardised = start.clone()
        report = standardising(standardised, refit)
        bound = MAX_DRIFT if refit == "last" else None
        checks[f"{name}, loss drift"] = Check(drift(standardised), at_most=bound, note=report.reason)
    for name, report in reports.items():
        steps = LONGER_STEPS if name == LONGER else STEPS
        checks[f"{name}, steps"] = Check(len(report.trace), at_least=steps, note=report.reason)
    return checks, {name: describe(firsts[name], report) for name, report in reports.items()}


def describe(first: symtele_cuda.TeleportReport, report: symtele_cuda.TeleportReport) -> dict[str, Any]:
    return {
        "accepted steps": report.steps,
        "layers": [layer.reason for layer in report.layers],
        "trace": report.trace,
        "backend": report.backend,
        "seconds of the first call": first.seconds,
        "seconds of the second call": report.seconds,
    }


def largest_search_allocation(start: Problem, objective: str) -> AllocationRecorder:
    """The tensors that the search allocates, between the set-up and the writing of the parameters."""
    recorder = AllocationRecorder()
    module = importlib.import_module("symtele_cuda.teleport")  # the package has a function of this name
    search = module.ascend

    def recorded(*args: Any, **kwargs: Any) -> Any:
        with recorder:
            return search(*args, **kwargs)

    with patch.object(module, "ascend", recorded):
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


def peak_memory(start: Problem) -> dict[str, Check]:
    """What a call takes of the device's memory beyond the model and the batch."""
    checks = {}
    for name, objective in ((GRAD_NORM, "grad_norm"), (LOOKAHEAD, "lookahead")):
        problem = start.clone()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        our_teleport(problem, objective)
        checks[f"{name}, peak memory, MiB"] = Check((torch.cuda.max_memory_allocated() - held) / 2**20)
    return checks


def contestants_for(start: Problem, shape: Shape) -> dict[str, Contestant]:
    def teleporting(objective: str, steps: int) -> Contestant:
        return Contestant(lambda problem: our_teleport(problem, objective, steps), start.clone, reads_back=True)

    def publishing(through_weights: bool) -> Contestant:
        return Contestant(lambda problem: their_teleport(problem, through_weights), start.clone, reads_back=True)

    contestants = {
        UNIT: Contestant(lambda _: start.gradients()),
        GRAD_NORM: teleporting("grad_norm", STEPS),
        LOOKAHEAD: teleporting("lookahead", STEPS),
        LONGER: teleporting("grad_norm", LONGER_STEPS),
    }
    for name, (refit, _) in STANDARDISE.items():
        contestants[name] = Contestant(partial(standardising, refit=refit), start.clone, reads_back=True)
    if shape.published:
        contestants |= {PUBLISHED: publishing(True), PUBLISHED_LEAN: publishing(False)}
    return contestants


def judge(shape: Shape, timings: Mapping[str, Timing]) -> dict[str, Check]:
    ours = timings[GRAD_NORM]
    step = (timings[LONGER].units - ours.units) / (LONGER_STEPS - STEPS)
    requirements = {
        "units, must": Check(ours.units, at_most=shape.must_units),
        "units, aim": Check(ours.units, at_most=shape.aim_units),
        "seconds": Check(ours.seconds, at_most=shape.must_seconds),
        "seconds, lookahead": Check(timings[LOOKAHEAD].seconds, at_most=shape.must_seconds),
        "units of one step": Check(step, at_most=shape.must_step_units),
        "lookahead / grad_norm": Check(timings[LOOKAHEAD].units / ours.units, at_most=MAX_LOOKAHEAD_RATIO),
    }
    requirements |= {
        f"{name}, units": Check(timings[name].units, at_most=units) for name, (_, units) in STANDARDISE.items()
    }
    if shape.published:
        speedup, lean = (timings[name].units / ours.units for name in (PUBLISHED, PUBLISHED_LEAN))
        requirements["faster than published, times"] = Check(speedup, at_least=shape.must_speedup)
        requirements["faster than published in the lean reading, times"] = Check(lean)
    return requirements


def measure(shape: Shape, rounds: int, device: torch.device) -> dict[str, Any]:
    """One shape's entry of the JSON file; without timings where a check fails."""
    start = make_problem(shape, device)
    checks, searches = check_correct(start, shape)
    result: dict[str, Any] = {"shape": shape, "checks": checks, "searches": searches}
    if not all_passed(checks):
        return result
    timings = compare(contestants_for(start, shape), rounds, device)
    memory = peak_memory(start) if device.type == "cuda" else check_memory(start, shape)
    return result | {"timings": timings, "requirements": judge(shape, timings) | memory}


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    begin(arguments)
    registry = REGISTRY[arguments.device.type]
    return run_shapes(
        "teleport",
        lambda name: measure(registry[name], arguments.rounds, arguments.device),
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
    parser = make_parser("A ten-step teleport against the published algorithm.", REGISTRY)
    add_rounds(parser, 5)
    return read_arguments(parser, REGISTRY, "teleport", words)


if __name__ == "__main__":
    main(parse())
