"""One layer's transform and its gradient ∂f/∂g: the operator, its plain-torch twin, and the SVD pseudo-inverse.

    python -m bench.layer [--shape NAME ...] [--threads 1] [--rounds 9] [--device cpu] [--out FILE]

f = ⟨V, W'⟩ with a fixed V. All compute the published action (R = 0), so that their results are the same, and are
checked against the twin in float64 before anything is timed. The unit is one forward+backward of the layer on the same
batch.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.baselines import act_on_layer
from bench.harness import (
    UNIT,
    Check,
    Contestant,
    add_timing_options,
    all_passed,
    compare,
    make_parser,
    relative_difference,
    run_shapes,
)
from symtele_cuda import reference, teleport_layer
from symtele_cuda.activations import LeakyReLU

ACTIVATION = LeakyReLU(0.1)
OPERATOR, TWIN, SVD = "teleport_layer", "reference by autograd", "SVD pseudo-inverse by autograd"

# Against float64, in the 2-norm. W' loses κ(H)·6e-8, with κ below a few hundred here. ∂f/∂g jumps besides where
# rounding carries an activation over the kink of LeakyReLU and its slope changes tenfold: 4e-3 for one of 500,000.
MAX_DIFFERENCE = {"W'": 1e-4, "∂f/∂g": 2e-2}


@dataclass(frozen=True)
class Shape:
    n: int
    d_in: int
    d_out: int


SHAPES = {
    "n20-784-512": Shape(20, 784, 512),
    "n100-128-128": Shape(100, 128, 128),
    "n200-784-512": Shape(200, 784, 512),
    "n200-512-512": Shape(200, 512, 512),
    "n512-1024-1024": Shape(512, 1024, 1024),
}


@dataclass(frozen=True)
class Problem:
    weight: Tensor
    inputs: Tensor
    generator: Tensor  # T of g = I + T
    cotangent: Tensor  # V

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(*(t.to(dtype) for t in (self.weight, self.inputs, self.generator, self.cotangent)))

    def group_element(self) -> Tensor:
        """g as a leaf that asks for its gradient."""
        identity = torch.eye(len(self.generator), dtype=self.generator.dtype, device=self.generator.device)
        return (identity + self.generator).requires_grad_()


Result = tuple[Tensor, Tensor]
"""W' and ∂f/∂g."""


def make_problem(shape: Shape, device: torch.device) -> Problem:
    """Inputs as an activation leaves them, weights of torch's own initial size, g a tenth away from I."""
    source = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=source).to(device)

    return Problem(
        weight=normal(shape.d_out, shape.d_in) / math.sqrt(3 * shape.d_in),
        inputs=ACTIVATION.forward(normal(shape.n, shape.d_in)),
        generator=normal(shape.d_out, shape.d_out) * (0.1 / math.sqrt(shape.d_out)),
        cotangent=normal(shape.d_out, shape.d_in),
    )


def by_operator(problem: Problem) -> Result:
    g = problem.group_element()
    moved, _ = teleport_layer(problem.weight, problem.inputs, g, activation=ACTIVATION, action="paper")
    return moved, torch.autograd.grad(moved, g, problem.cotangent)[0]


def by_reference(problem: Problem) -> Result:
    g = problem.group_element()
    moved, _ = reference.teleport_layer(problem.weight, problem.inputs, g, None, ACTIVATION, "paper")
    return moved, torch.autograd.grad(moved, g, problem.cotangent)[0]


def by_svd(problem: Problem) -> Result:
    generator = problem.generator.detach().requires_grad_()
    inverse = torch.linalg.pinv(problem.inputs)
    moved = act_on_layer(problem.weight, problem.inputs, inverse, generator, ACTIVATION)
    return moved, torch.autograd.grad(moved, generator, problem.cotangent)[0]


METHODS: dict[str, Callable[[Problem], Result]] = {OPERATOR: by_operator, TWIN: by_reference, SVD: by_svd}


def forward_backward(problem: Problem) -> tuple[Tensor, ...]:
    """The unit: σ(H Wᵀ) and the gradients that training asks of a layer, for W and H."""
    weight, inputs = (tensor.detach().requires_grad_() for tensor in (problem.weight, problem.inputs))
    outputs = ACTIVATION.forward(inputs @ weight.T)
    return torch.autograd.grad(outputs, (weight, inputs), torch.ones_like(outputs))


def check_correct(problem: Problem) -> dict[str, Check]:
    expected = by_reference(problem.to(torch.float64))
    return {
        f"{name}, {what}, relative difference": Check(relative_difference(value, truth), at_most=bound)
        for name, method in METHODS.items()
        for (what, bound), value, truth in zip(MAX_DIFFERENCE.items(), method(problem), expected, strict=True)
    }


def measure(shape: Shape, rounds: int, device: torch.device) -> dict[str, Any]:
    """One shape's entry of the JSON file; without timings where a check fails."""
    problem = make_problem(shape, device)
    checks = check_correct(problem)
    result: dict[str, Any] = {"shape": shape, "checks": checks}
    if not all_passed(checks):
        return result
    contestants = {UNIT: Contestant(forward_backward, lambda: problem)}
    contestants |= {name: Contestant(method, lambda: problem) for name, method in METHODS.items()}
    timings = compare(contestants, rounds, device)
    faster = {f"{name} / {OPERATOR}": timings[name].units / timings[OPERATOR].units for name in (TWIN, SVD)}
    return result | {"timings": timings, "ratios": faster}


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    return run_shapes(
        "layer",
        lambda name: measure(SHAPES[name], arguments.rounds, arguments.device),
        arguments,
        settings={"rounds": arguments.rounds, "activation": ACTIVATION.name, "negative slope": ACTIVATION.parameter},
    )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("One layer's transform and its gradient.", SHAPES, "bench/results/layer.json")
    add_timing_options(parser, rounds=9)
    return parser.parse_args(words)


if __name__ == "__main__":
    main(parse())
