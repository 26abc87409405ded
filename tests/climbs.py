"""Small orbits of a batch for the tests of points, objectives, searches and graphs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from networks import make_batch, make_mlp
from torch import Tensor

import symtele_cuda as st
from symtele_cuda.model.objective import Objective
from symtele_cuda.model.problem import Problem
from symtele_cuda.model.reader import read_chain
from symtele_cuda.model.surroundings import Surroundings
from symtele_cuda.orbits.batch import BatchOrbit
from symtele_cuda.orbits.batch_plan import make_plan, match_inputs
from symtele_cuda.search.device import Climb


@torch.no_grad()
def make_orbit(
    dims: list[int],
    activation: str = "leaky_relu",
    *,
    n: int = 12,
    seed: int = 0,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    layers: list[int] | None = None,
    objective: Objective | None = None,
    holdout: bool = False,
    bounds_noise: bool = False,
) -> BatchOrbit:
    """The orbit of an MLP of these widths on n samples, under the objective ‖∇L‖² unless another is given."""

    def batch(size: int, seed: int) -> tuple[Tensor, Tensor]:
        x, y = make_batch(size, dims[0], dims[-1], seed=seed)
        return x.to(dtype), y

    model = make_mlp(dims, activation, bias=bias).to(dtype)
    chain = read_chain(model)
    problem = Problem.make(model, chain, batch(n, seed), None)
    around = Surroundings.make(chain, batch(30, seed + 1) if holdout else None, problem)
    matches = tuple(match_inputs(problem, layers))
    plans, _ = make_plan(problem, matches, layers)
    return BatchOrbit(problem, around, matches, plans, objective or st.GradNorm(), bounds_noise)


def make_climb(dims: list[int], activation: str = "leaky_relu", **options: Any) -> Climb:
    """An orbit with what a search of it is to do; flat options, bounds off unless they are given."""
    known = ("n", "seed", "bias", "dtype", "layers", "holdout")
    own = {name: options.pop(name) for name in known if name in options}
    guards = {"max_weight_change": math.inf, "max_sensitivity": math.inf}
    names = ("drift_tol", "holdout_tol", "min_gain", "max_weight_change", "max_sensitivity")
    guards |= {name: options.pop(name) for name in names if name in options}
    ascent, kept = st.Ascent(**{"lr": 0.1, "steps": 8} | options), st.Guards(**guards)
    bounded = math.isfinite(kept.max_sensitivity)
    orbit = make_orbit(dims, activation, objective=ascent.make_objective(), bounds_noise=bounded, **own)
    return Climb.make(orbit, ascent, kept)


def with_products(climb: Climb, products: Any) -> Climb:
    """The same computed by other products."""
    problem = climb.orbit.problem
    problem = replace(problem, network=replace(problem.network, products=products))
    return replace(climb, orbit=replace(climb.orbit, problem=problem))
