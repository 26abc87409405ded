"""One layer's transform and its gradient ∂f/∂g: the operator, with and without its checks, and the formula with a
Cholesky factor, with an SVD in float64 (its plain-torch twin) and with one in the dtype of the layer.

    python -m bench.layer [--device cpu] [--shape NAME ...] [--threads 1] [--rounds 9] [--out FILE]

f = ⟨V, W'⟩ with a fixed V. All compute the published action (R = 0), so that their results are the same, and are
checked in float64 before anything is timed. The unit is one forward+backward of the layer on the same batch.

On a GPU also the operator on torch's own kernels, the formula with a Cholesky factor compiled by torch, and what share
of the time the counted work must take at the ceilings of the same run (see `bench.roofline`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.baselines import act_on_layer
from bench.harness import (
    UNIT,
    Check,
    Contestant,
    Timing,
    add_rounds,
    all_passed,
    begin,
    compare,
    in_turn,
    make_parser,
    read_arguments,
    relative_difference,
    run_shapes,
)
from bench.roofline import DTYPES, FLOAT32, FLOAT64, TF32, Ceilings, layer_work, measure_ceilings, precision
from symtele_cuda import teleport_layer
from symtele_cuda.activations import Activation, make_activation
from symtele_cuda.operator import reference

OPERATOR, TWIN, SVD = "teleport_layer", "reference by autograd", "SVD pseudo-inverse by autograd"
UNCHECKED = "teleport_layer, check=False"
ON_TORCH, EAGER, COMPILED = "teleport_layer, backend torch", "Cholesky by autograd", "Cholesky by autograd, compiled"

# Against float64, in the 2-norm. W' loses κ(H)·u, with κ below a few hundred here. ∂f/∂g jumps besides where
# rounding carries an activation over the kink of LeakyReLU and its slope changes tenfold: 4e-3 for one of 500,000, and
# in TF32 that is one in a thousand.
MAX_DIFFERENCE = {
    FLOAT32: {"W'": 1e-4, "∂f/∂g": 2e-2},
    TF32: {"W'": 1e-1, "∂f/∂g": 5e-1},
    FLOAT64: {"W'": 1e-10, "∂f/∂g": 1e-6},
}

# An SVD of more rows than this takes seconds on a GPU; the float64 operator on torch's kernels is the truth there.
LARGEST_SVD = 200
MUST_NOT_SLOWER, MUST_SMALL, MUST_COMPILED, MUST_SHARE = 1.0, 3.0, 1.3, 0.8
LARGEST_SMALL = 512  # of the sizes where MUST_SMALL is asked


@dataclass(frozen=True)
class Shape:
    """orthogonal: H has orthonormal rows, as many random ones as columns being too badly conditioned to be matched.

    compiled: the operator is compared with the formula that torch compiles, which takes long, and with nothing else.
    """

    n: int
    d_in: int
    d_out: int
    activation: str = "leaky_relu"
    precision: str = FLOAT32
    orthogonal: bool = False
    compiled: bool = False

    @property
    def sigma(self) -> Activation:
        return make_activation(self.activation)

    @property
    def largest(self) -> int:
        return max(self.n, self.d_in, self.d_out)


SHAPES = {
    "n8-16-16": Shape(8, 16, 16),
    "n20-784-512": Shape(20, 784, 512),
    "n100-128-128": Shape(100, 128, 128),
    "n200-784-512": Shape(200, 784, 512),
    "n200-512-512": Shape(200, 512, 512),
    "n512-1024-1024": Shape(512, 1024, 1024),
}
# In the order in which they are measured, should the time not suffice for all: the small ones, and those against what
# torch compiles, come last.
_EAGER_SHAPES = {
    "n1024-4096-4096": Shape(1024, 4096, 4096),
    "n1024-4096-4096-tanh": Shape(1024, 4096, 4096, activation="tanh"),
    "n1024-4096-4096-softplus": Shape(1024, 4096, 4096, activation="softplus"),
    "n1024-4096-4096-tf32": Shape(1024, 4096, 4096, precision=TF32),
    "n1024-4096-4096-float64": Shape(1024, 4096, 4096, precision=FLOAT64),
    "n1024-4096-1000": Shape(1024, 4096, 1000),
    "n1024-2048-2048": Shape(1024, 2048, 2048),
    "n512-3072-1024": Shape(512, 3072, 1024),
    "n512-1024-1024": Shape(512, 1024, 1024),
    "n4096-4096-4096": Shape(4096, 4096, 4096, orthogonal=True),
    "n4096-4096-4096-tf32": Shape(4096, 4096, 4096, precision=TF32, orthogonal=True),
    "n2048-16384-16384": Shape(2048, 16384, 16384),
    "n2048-16384-16384-tf32": Shape(2048, 16384, 16384, precision=TF32),
    "n200-784-512": Shape(200, 784, 512),
    "n200-512-512": Shape(200, 512, 512),
    "n200-512-512-tanh": Shape(200, 512, 512, activation="tanh"),
    "n200-512-512-softplus": Shape(200, 512, 512, activation="softplus"),
    "n20-784-512": Shape(20, 784, 512),
    "n20-512-512": Shape(20, 512, 512),
    "n8-16-16": Shape(8, 16, 16),
}
CUDA_SHAPES = _EAGER_SHAPES | {
    f"{name}-compiled": replace(shape, compiled=True)
    for name, shape in _EAGER_SHAPES.items()
    if shape.largest <= 2048 and shape.activation == "leaky_relu"
}
REGISTRY = {"cpu": SHAPES, "cuda": CUDA_SHAPES}


@dataclass(frozen=True)
class Problem:
    weight: Tensor
    inputs: Tensor
    generator: Tensor  # T of g = I + T
    cotangent: Tensor  # V
    sigma: Activation

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.inputs, self.generator, self.cotangent

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        weight, inputs, generator, cotangent = (change(tensor) for tensor in self.tensors)
        return Problem(weight, inputs, generator, cotangent, self.sigma)

    def group_element(self) -> Tensor:
        """g as a leaf that asks for its gradient."""
        identity = torch.eye(len(self.generator), dtype=self.generator.dtype, device=self.generator.device)
        return (identity + self.generator).requires_grad_()


Result = tuple[Tensor, Tensor]
"""W' and ∂f/∂g."""


def make_problem(shape: Shape, device: torch.device) -> Problem:
    """Inputs as an activation leaves them, weights of torch's own initial size, g a tenth away from I.

    Where σ⁻¹ has a domain g averages, so that nothing leaves it.
    """
    source = torch.Generator(device).manual_seed(0)
    sigma = shape.sigma

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=source, device=device)

    problem = Problem(
        weight=normal(shape.d_out, shape.d_in) / math.sqrt(3 * shape.d_in),
        inputs=sigma.forward(normal(shape.n, shape.d_in)),
        generator=normal(shape.d_out, shape.d_out) * (0.1 / math.sqrt(shape.d_out)),
        cotangent=normal(shape.d_out, shape.d_in),
        sigma=sigma,
    )
    if shape.orthogonal:
        basis = torch.linalg.qr(problem.inputs.T).Q.T
        problem = replace(problem, inputs=basis.contiguous() * math.sqrt(shape.d_in))
    if sigma.bounded:
        mixing = problem.generator.abs()
        identity = torch.eye(shape.d_out, device=device)
        problem = replace(problem, generator=0.3 * mixing / mixing.sum(1, keepdim=True) - 0.4 * identity)
    return problem.map(lambda tensor: tensor.to(DTYPES[shape.precision]))


def by_operator(problem: Problem, backend: str = "auto", check: bool = True) -> Result:
    g = problem.group_element()
    moved, _ = teleport_layer(
        problem.weight, problem.inputs, g, activation=problem.sigma, action="paper", backend=backend, check=check
    )
    return moved, torch.autograd.grad(moved, g, problem.cotangent)[0]


def by_reference(problem: Problem) -> Result:
    g = problem.group_element()
    moved, _ = reference.teleport_layer(problem.weight, problem.inputs, g, None, problem.sigma, "paper")
    return moved, torch.autograd.grad(moved, g, problem.cotangent)[0]


def by_svd(problem: Problem) -> Result:
    generator = problem.generator.detach().requires_grad_()
    inverse = torch.linalg.pinv(problem.inputs)
    moved = act_on_layer(problem.weight, problem.inputs, inverse, generator, problem.sigma)
    return moved, torch.autograd.grad(moved, generator, problem.cotangent)[0]


def act_by_cholesky(weight: Tensor, inputs: Tensor, g: Tensor, sigma: Activation) -> Tensor:
    """W' as one would write it: P from the Cholesky factor of H Hᵀ, in float64 for float32's sake."""
    exact = inputs.double()
    triangle = torch.linalg.cholesky_ex(exact @ exact.T).L
    factor = (torch.cholesky_inverse(triangle) @ exact).to(inputs.dtype)
    return sigma.inverse(sigma.forward(inputs @ weight.T) @ g.T).T @ factor


def by_cholesky(problem: Problem, act: Callable[..., Tensor] = act_by_cholesky) -> Result:
    g = problem.group_element()
    moved = act(problem.weight, problem.inputs, g, problem.sigma)
    return moved, torch.autograd.grad(moved, g, problem.cotangent)[0]


Methods = dict[str, Callable[[Problem], Result]]
METHODS: Methods = {
    OPERATOR: by_operator,
    UNCHECKED: partial(by_operator, check=False),
    EAGER: by_cholesky,
    TWIN: by_reference,
    SVD: by_svd,
}


def methods_for(shape: Shape, device: torch.device) -> Methods:
    """Who is timed; on a GPU the SVDs only where they end soon."""
    if device.type == "cpu":
        return METHODS
    if shape.compiled:
        torch.compiler.reset()  # its cache holds few shapes of one function
        return {
            OPERATOR: by_operator,
            COMPILED: partial(by_cholesky, act=torch.compile(act_by_cholesky, dynamic=False)),
        }
    methods: Methods = {OPERATOR: by_operator, ON_TORCH: partial(by_operator, backend="torch"), EAGER: by_cholesky}
    if shape.n <= LARGEST_SVD:
        methods |= {TWIN: by_reference, SVD: by_svd}
    return methods


def forward_backward(problem: Problem) -> tuple[Tensor, ...]:
    """The unit: σ(H Wᵀ) and the gradients that training asks of a layer, for W and H."""
    weight, inputs = (tensor.detach().requires_grad_() for tensor in (problem.weight, problem.inputs))
    outputs = problem.sigma.forward(inputs @ weight.T)
    return torch.autograd.grad(outputs, (weight, inputs), torch.ones_like(outputs))


def truth_of(problem: Problem) -> Result:
    exact = problem.map(Tensor.double)
    by_twin = problem.inputs.device.type == "cpu" or len(problem.inputs) <= LARGEST_SVD
    return by_reference(exact) if by_twin else by_operator(exact, backend="torch")


def check_correct(problem: Problem, methods: Methods, bounds: dict[str, float]) -> dict[str, Check]:
    expected = truth_of(problem)
    return {
        f"{name}, {what}, relative difference": Check(relative_difference(value, truth), at_most=bound)
        for name, method in methods.items()
        for (what, bound), value, truth in zip(bounds.items(), method(problem), expected, strict=True)
    }


def without_failures(methods: Methods, problem: Problem) -> tuple[Methods, dict[str, str]]:
    """The methods less the opponents that this machine cannot run, and why it cannot: torch.compile wants compilers."""
    running, failures = dict[str, Callable[[Problem], Result]](), dict[str, str]()
    for name, method in methods.items():
        try:
            method(problem)
        except Exception as error:
            if name == OPERATOR:
                raise
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            running[name] = method
    return running, failures


def measure(shape: Shape, rounds: int, device: torch.device) -> dict[str, Any]:
    """One shape's entry of the JSON file; without timings where a check fails."""
    problem = make_problem(shape, device)
    with precision(shape.precision):
        methods, failures = without_failures(methods_for(shape, device), problem)
        checks = check_correct(problem, methods, MAX_DIFFERENCE[shape.precision])
        result: dict[str, Any] = {"shape": shape, "checks": checks, "left out": failures}
        if not all_passed(checks):
            return result
        size = sum(tensor.nbytes for tensor in problem.tensors)
        prepare = in_turn(problem, lambda original: original.map(Tensor.clone), size, device)
        contestants = {UNIT: Contestant(forward_backward, prepare)}
        contestants |= {name: Contestant(method, prepare) for name, method in methods.items()}
        timings = compare(contestants, rounds, device)
    faster = {
        f"{name} / {OPERATOR}": timings[name].units / timings[OPERATOR].units for name in methods if name != OPERATOR
    }
    result |= {"timings": timings, "ratios": faster}
    return result if device.type == "cpu" else result | judge(shape, timings, ceilings_of(device))


@cache
def ceilings_of(device: torch.device) -> Ceilings:
    """Measured once a run."""
    return measure_ceilings(device, rounds=5)


def judge(shape: Shape, timings: dict[str, Timing], ceilings: Ceilings) -> dict[str, Any]:
    """What is asked of the operator on a GPU: of its time against torch's, and against the work at the ceilings."""
    seconds = {name: timing.seconds for name, timing in timings.items()}
    least = layer_work(shape.n, shape.d_in, shape.d_out, shape.precision).seconds(ceilings)
    must = MUST_SMALL if shape.largest <= LARGEST_SMALL else MUST_NOT_SLOWER
    requirements = {
        f"faster than {name}, times": Check(seconds[name] / seconds[OPERATOR], at_least=at_least)
        for name, at_least in ((ON_TORCH, must), (EAGER, must), (COMPILED, MUST_COMPILED))
        if name in seconds
    }
    requirements["share of the ceilings"] = Check(
        least / seconds[OPERATOR], at_least=MUST_SHARE if min(shape.d_in, shape.d_out) >= 4096 else None
    )
    return {"seconds at the ceilings": least, "requirements": requirements}


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    begin(arguments)
    registry, device = REGISTRY[arguments.device.type], arguments.device
    settings: dict[str, Any] = {"rounds": arguments.rounds, "negative slope": make_activation("leaky_relu").parameter}
    if device.type == "cuda":
        settings["ceilings"] = ceilings_of(device)
    return run_shapes(
        "layer", lambda name: measure(registry[name], arguments.rounds, device), arguments, settings=settings
    )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("One layer's transform and its gradient.", REGISTRY)
    add_rounds(parser, 9)
    return read_arguments(parser, REGISTRY, "layer", words)


if __name__ == "__main__":
    main(parse())
