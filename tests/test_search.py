"""The trust region and the fixed step, on scripted objective values: with decisions on the host and on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from networks import make_batch, make_mlp

from symtele_cuda.model.chain import read_chain
from symtele_cuda.model.problem import Problem
from symtele_cuda.orbits.action import Gradient, Plan, State, initial_state
from symtele_cuda.orbits.activation_space import Evaluation
from symtele_cuda.orbits.batch_plan import make_plan, match_inputs
from symtele_cuda.search import device as device_search
from symtele_cuda.search import trust_region as search
from symtele_cuda.search.trust_region import Bounds, Search, SearchResult

START = 1.0

FIRST_RADIUS = 0.02
NO_BOUNDS = Bounds(figures=lambda state: [], limits=(), texts=())


@dataclass
class ScriptedPath:
    """Says the values it is given, one a state, whatever the state; the gradient is a constant, or zero."""

    values: Iterator[float]
    inputs: torch.Tensor

    def evaluate(self, state: State) -> Evaluation:
        value = torch.tensor(next(self.values), dtype=torch.float64)
        return Evaluation(value, lambda: Gradient((None, self.inputs), (None, None), ((), ())))


def set_up() -> tuple[Problem, Plan, State]:
    model = make_mlp([20, 24, 5])
    with torch.no_grad():
        problem = Problem.make(model, read_chain(model), make_batch(12, 20, 5), None)
        matches = match_inputs(problem)
        plan, _ = make_plan(problem, matches, None, action="least_change", inverse="exact", group_steps=False)
        return problem, plan, initial_state(problem.network, plan, problem.outputs, matches)


@pytest.fixture(params=["host", "device"], autouse=True)
def where(request: pytest.FixtureRequest) -> str:
    """Where the decisions are taken; every test runs both ways."""
    return request.param


def ascend(where: str, search_: Search, state: State, evaluation: Evaluation, cap: float, bounds: Bounds):
    if where == "host":
        return search.ascend(search_, state, evaluation, cap=cap, bounds=bounds)
    trace = device_search.ascend(search_, state, evaluation, cap=cap, bounds=bounds, ended=torch.tensor(False))
    return trace.result([row.tolist() for row in trace.rows], bounds.texts)


def ascend_fixed(where: str, search_: Search, state: State, evaluation: Evaluation, step_size: float):
    if where == "host":
        return search.ascend_fixed(search_, state, evaluation, step_size=step_size)
    trace = device_search.ascend_fixed(search_, state, evaluation, step_size=step_size)
    return trace.result([row.tolist() for row in trace.rows], [])


def run(where: str, values: list[float], *, maximise=True, cap=math.inf, bounds=NO_BOUNDS, scale=1e-3) -> SearchResult:
    problem, plan, state = set_up()
    path = ScriptedPath(iter([START, *values]), scale * torch.ones_like(state.inputs[1]))
    search_ = Search(path, problem.network, plan, maximise, steps=len(values), first_radius=FIRST_RADIUS)
    return ascend(where, search_, state, path.evaluate(state), cap, bounds)


def sizes(result: SearchResult) -> list[float]:
    """The steps tried, in units of the first."""
    return [record.size / result.records[0].size for record in result.records]


@pytest.mark.parametrize("maximise", [True, False])
def test_the_radius_grows_on_success_and_shrinks_on_failure(where, maximise):
    better, worse = ([2.0, 3.0, 4.0, 5.0], 0.0) if maximise else ([0.9, 0.8, 0.7, 0.6], 9.0)
    result = run(where, [better[0], better[1], worse, *better[2:]], maximise=maximise)
    assert [record.accepted for record in result.records] == [True, True, False, True, True]
    assert sizes(result)[2] / sizes(result)[1] > 0  # one direction throughout
    lengths = [abs(record.size) * length(result, k) for k, record in enumerate(result.records)]
    factors = [1.0, search.GROWTH, search.GROWTH, search.SHRINKAGE, search.LATER_GROWTH]
    assert lengths == pytest.approx([lengths[0] * math.prod(factors[: k + 1]) for k in range(5)], rel=1e-9)
    assert len(result.waypoints) == 1 + len(better)
    assert math.copysign(1, result.records[0].size) == (1 if maximise else -1)
    assert result.reason == "all steps taken"


def length(result: SearchResult, k: int) -> float:
    """‖(B Bᵀ) ∂f/∂B‖ at the state from which step k was tried."""
    _, _, state = set_up()
    accepted = sum(record.accepted for record in result.records[:k])
    targets = result.waypoints[accepted].targets[0]
    batch = torch.nn.functional.leaky_relu(targets, 0.1)
    return float((batch @ batch.T @ (1e-3 * torch.ones_like(state.inputs[1]))).norm())


def test_the_first_radius_is_a_share_of_the_activations_norm(where):
    result = run(where, [2.0])
    _, _, state = set_up()
    assert abs(result.records[0].size) * length(result, 0) == pytest.approx(
        FIRST_RADIUS * float(state.inputs[1].norm()), rel=1e-9
    )


def test_what_is_not_finite_is_refused(where):
    result = run(where, [math.nan, math.inf, 2.0])
    assert [record.note for record in result.records] == ["not finite", "not finite", "accepted"]


def test_the_growth_cap_refuses_what_is_above_and_ends_the_search_just_below(where):
    result = run(where, [5.0, 1.5, 3.99], cap=4.0)
    assert [record.note for record in result.records] == ["above the growth cap", "accepted", "accepted"]
    assert result.reason == "growth cap reached"
    # log 4 / log 5 of the way, less three percent: a line through the logarithms.
    assert sizes(result)[1] == pytest.approx(0.97 * math.log(4) / math.log(5), rel=1e-9)


def test_a_bound_s_words_are_the_reason(where):
    losses = iter([9.0, math.nan, 1.0])
    bounds = Bounds(
        figures=lambda state: [torch.tensor(next(losses), dtype=torch.float64)],
        limits=((0.0, 5.0),),
        texts=(lambda value: f"the loss rose to {value:g}",),
    )
    result = run(where, [2.0, 3.0, 4.0], bounds=bounds)
    assert [record.note for record in result.records] == ["the loss rose to 9", "the loss rose to nan", "accepted"]


def test_a_search_without_an_acceptable_step_ends_early(where):
    result = run(where, [0.0] * 50)
    assert len(result.records) < 15 and result.reason == "no trial step improved the objective"
    assert len(result.waypoints) == 1


@pytest.mark.parametrize(("scale", "reason"), [(0.0, "is zero"), (math.nan, "not finite")])
def test_a_gradient_that_leads_nowhere_ends_the_search(where, scale, reason):
    result = run(where, [2.0], scale=scale)
    assert result.records == () and reason in result.reason


@pytest.mark.parametrize("maximise", [True, False])
def test_fixed_steps_are_taken_whatever_the_objective_says_until_it_is_not_finite(where, maximise):
    problem, plan, state = set_up()
    path = ScriptedPath(iter([START, 0.5, 2.0, math.inf, 1.0, 1.0]), 1e-3 * torch.ones_like(state.inputs[1]))
    five_steps = Search(path, problem.network, plan, maximise, steps=5, first_radius=FIRST_RADIUS)
    result = ascend_fixed(where, five_steps, state, path.evaluate(state), 1e-4)
    assert [record.accepted for record in result.records] == [True, True, False]
    assert {record.size for record in result.records} == {1e-4 if maximise else -1e-4}
    assert "not finite" in result.reason and len(result.waypoints) == 3
