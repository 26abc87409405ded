"""The trust region on scripted objective values: with decisions on the host and on the device."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from climbs import make_orbit
from operators import SOURCE

from symtele_cuda import Ascent, Guards
from symtele_cuda.guards import Bounds
from symtele_cuda.kernels.judgement import RULES
from symtele_cuda.orbits import Evaluation
from symtele_cuda.orbits.batch import BatchOrbit
from symtele_cuda.orbits.layers import BatchPoint
from symtele_cuda.orbits.passes import LayerGradient
from symtele_cuda.search import device
from symtele_cuda.search import trust_region as host
from symtele_cuda.search.trust_region import Search, SearchResult

START = 1.0

FIRST_RADIUS = 0.02
NO_BOUNDS = Bounds((), ())


@dataclass(frozen=True)
class Scripted:
    """An objective that has the values it is given, one a point, whatever the point; the gradient is a constant."""

    maximise: bool
    values: Iterator[float]
    gradient: torch.Tensor

    def value(self, loss_of, parameters):
        raise AssertionError("activation space knows it")

    def evaluate(self, point: BatchPoint, output_delta: torch.Tensor) -> Evaluation:
        value = torch.tensor(next(self.values), dtype=torch.float64)
        return Evaluation(value, lambda: [LayerGradient(self.gradient, None, ())])


@dataclass(frozen=True)
class ScriptedOrbit(BatchOrbit):
    """An orbit whose points have the figures that it is given."""

    scripted: list[Iterator[float]] = field(default_factory=list)

    def figures(self, point: BatchPoint) -> list[torch.Tensor]:
        return [torch.tensor(next(figures), dtype=torch.float64) for figures in self.scripted]


@pytest.fixture(params=["host", "device"], autouse=True)
def where(request: pytest.FixtureRequest) -> str:
    """Where the decisions are taken; every test runs both ways."""
    return request.param


@torch.no_grad()
def run(
    where: str, values: list[float], *, maximise=True, cap=math.inf, bounds=NO_BOUNDS, figures=(), scale=1e-3
) -> SearchResult:
    plain = make_orbit([20, 24, 5])
    gradient = scale * torch.ones_like(plain.matches[1].inputs)
    objective = Scripted(maximise, iter([START, *values]), gradient)
    fields = plain.problem, plain.around, plain.matches, plain.plans, objective
    orbit = ScriptedOrbit(*fields, scripted=[iter(found) for found in figures])
    if where == "host":
        return host.ascend(Search(orbit, maximise, len(values), FIRST_RADIUS, cap, bounds))
    work = device.Climb(orbit, Ascent(steps=len(values), first_radius=FIRST_RADIUS), Guards(), False)
    trace = device.ascend(work, bounds, cap, torch.tensor(False))
    return trace.result([row.tolist() for row in trace.rows], bounds.texts)


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
    factors = [1.0, RULES.growth, RULES.growth, RULES.shrinkage, RULES.later_growth]
    assert lengths == pytest.approx([lengths[0] * math.prod(factors[: k + 1]) for k in range(5)], rel=1e-9)
    assert len(result.waypoints) == 1 + len(better)
    assert math.copysign(1, result.records[0].size) == (1 if maximise else -1)
    assert result.reason == "all steps taken"


def length(result: SearchResult, k: int) -> float:
    """‖(B Bᵀ) ∂f/∂B‖ at the point from which step k was tried."""
    accepted = sum(record.accepted for record in result.records[:k])
    batch = torch.nn.functional.leaky_relu(result.waypoints[accepted][1].source, 0.1)
    return float((batch @ batch.T @ (1e-3 * torch.ones_like(batch))).norm())


def test_the_first_radius_is_a_share_of_the_activations_norm(where):
    result = run(where, [2.0])
    norm = float(make_orbit([20, 24, 5]).matches[1].inputs.norm())
    assert abs(result.records[0].size) * length(result, 0) == pytest.approx(FIRST_RADIUS * norm, rel=1e-9)


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
    bounds = Bounds((5.0,), (lambda value: f"the loss rose to {value:g}",))
    result = run(where, [2.0, 3.0, 4.0], bounds=bounds, figures=[[9.0, math.nan, 1.0]])
    assert [record.note for record in result.records] == ["the loss rose to 9", "the loss rose to nan", "accepted"]


def test_a_search_without_an_acceptable_step_ends_early(where):
    result = run(where, [0.0] * 50)
    assert len(result.records) < 15 and result.reason == "no trial step improved the objective"
    assert len(result.waypoints) == 1


@pytest.mark.parametrize(("scale", "reason"), [(0.0, "is zero"), (math.nan, "not finite")])
def test_a_gradient_that_leads_nowhere_ends_the_search(where, scale, reason):
    result = run(where, [2.0], scale=scale)
    assert result.records == () and reason in result.reason


def test_the_rules_have_the_kernel_s_names_in_its_order() -> None:
    header = SOURCE.with_name("kernels.h").read_text()
    body = header.split("struct JudgeRules {")[1].split("}")[0]
    assert tuple(re.findall(r"double (\w+);", body)) == RULES._fields
