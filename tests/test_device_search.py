"""The search with its decisions on the device: the same steps as on the host, and nothing read back before the end."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from networks import ACTIVATIONS, make_batch, make_mlp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from symtele_cuda.kernels import extension
from symtele_cuda.kernels import library as kernels
from symtele_cuda.kernels import torch_kernels as products
from symtele_cuda.model.chain import read_chain
from symtele_cuda.model.pieces import Affine, InTurn, LogSoftmax
from symtele_cuda.model.problem import Problem
from symtele_cuda.orbits import batch_plan as planning
from symtele_cuda.orbits.action import Waypoint
from symtele_cuda.orbits.batch_plan import make_plan, match_inputs
from symtele_cuda.search import device as device_search
from symtele_cuda.search.trust_region import STEPS_LONG_ENOUGH, SearchResult
from symtele_cuda.settings import make_options
from symtele_cuda.surroundings import Surroundings
from symtele_cuda.task import Found, Task
from symtele_cuda.teleport import _find_on_host

DEFAULTS = dict(
    objective="grad_norm",
    lr=0.1,
    margin=4.0,
    steps=8,
    step_size="auto",
    first_radius=0.02,
    max_growth=2.0,
    action="least_change",
    metric="euclidean",
    inverse="exact",
    group="gl",
    layers=None,
    drift_tol=1e-4,
    holdout_tol=0.05,
    min_gain=0.0,
    max_weight_change=math.inf,
    max_sensitivity=math.inf,
    backend="auto",
)


def make_task(dims: list[int], activation: str = "leaky_relu", *, n: int = 12, seed: int = 0, **changes) -> Task:
    dtype = changes.pop("dtype", torch.float64)
    holdout = changes.pop("holdout", False)
    model = make_mlp(dims, activation, bias=changes.pop("bias", True)).to(dtype)
    options = make_options(**{**DEFAULTS, **changes}, hidden_layers=len(dims) - 2)

    def batch(size: int, seed: int) -> tuple[Tensor, Tensor]:
        x, y = make_batch(size, dims[0], dims[-1], seed=seed)
        return x.to(dtype), y

    with torch.no_grad():
        chain = read_chain(model)
        problem = Problem.make(model, chain, batch(n, seed), None)
        around = Surroundings.make(chain, batch(30, seed + 1) if holdout else None, problem)
        matches = match_inputs(problem)
        plan, _ = make_plan(
            problem,
            matches,
            options.layers,
            action=options.action,
            inverse=options.inverse,
            group_steps=options.step_size is not None,
            group=options.group,
        )
    return Task(problem, around, tuple(matches), plan, options)


def find(task: Task) -> tuple[Found, Found]:
    """What the host finds and what the device finds."""
    with torch.no_grad():
        return _find_on_host(task), device_search.find(task)


def assert_same(host: SearchResult, device: SearchResult, rel: float = 1e-9) -> None:
    assert [record.note for record in device.records] == [record.note for record in host.records]
    assert device.reason == host.reason
    for ours, theirs in zip(device.records, host.records, strict=True):
        assert ours.accepted == theirs.accepted
        assert ours.size == pytest.approx(theirs.size, rel=rel)
        assert ours.objective == pytest.approx(theirs.objective, rel=rel, nan_ok=True)
    for ours, theirs in zip(device.waypoints, host.waypoints, strict=True):
        for got, expected in zip(_tensors_of(ours), _tensors_of(theirs), strict=True):
            assert (got is None) == (expected is None)
            if got is not None:
                torch.testing.assert_close(got, expected, rtol=rel, atol=rel)


def _tensors_of(point: Waypoint) -> tuple[Tensor | None, ...]:
    return (*point.targets, *point.references, *point.offsets)


CASES = {
    "grad_norm": dict(),
    "no cap": dict(max_growth=math.inf, steps=10),
    "lookahead": dict(objective="lookahead", lr=0.5),
    "lookahead, gain wanted": dict(objective="lookahead", lr=0.05, min_gain=2.0),
    "lookahead, step too long": dict(objective="lookahead", lr=100.0, min_gain=2.0),
    "paper": dict(action="paper"),
    "one layer": dict(layers=[2]),
    "fixed step": dict(step_size=1e-3),
    "fixed step, paper": dict(step_size=1e-3, action="paper", inverse="first_order"),
    "noise": dict(max_sensitivity=1.02, max_growth=math.inf),
    "noise and holdout": dict(holdout=True, max_sensitivity=1.05, max_growth=math.inf),
    "holdout": dict(holdout=True, holdout_tol=0.001, max_growth=math.inf),
    "no bias": dict(bias=False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_same_steps_as_on_the_host(case, activation):
    host, device = find(make_task([20, 24, 22, 5], activation, **CASES[case]))
    assert_same(host.result, device.result)
    assert device.before == host.before


@pytest.mark.parametrize("case", ["grad_norm", "lookahead", "fixed step"])
@pytest.mark.parametrize("inverse", ["exact", "first_order"])
@pytest.mark.parametrize("dims", [[20, 9, 11, 5], [20, 24, 7, 22, 5]], ids=str)
def test_the_same_steps_with_narrow_layers(dims, inverse, case):
    host, device = find(make_task(dims, "softplus", n=15, inverse=inverse, drift_tol=1e-2, **CASES[case]))
    assert len(host.result.records) > 1
    assert_same(host.result, device.result, rel=1e-7)


def test_refusals_cap_and_ends_are_met_in_these_cases():
    """The cases above compare what they claim to compare."""
    notes, reasons = set(), set()
    for case in CASES.values():
        result = find(make_task([20, 24, 22, 5], **case))[0].result
        notes |= {record.note.split(" from ")[0] for record in result.records}
        reasons.add(result.reason)
    assert {"accepted", "above the growth cap", "the holdout loss rose"} <= notes
    assert {"growth cap reached", "all steps taken", STEPS_LONG_ENOUGH} <= reasons


def test_the_last_candidate_is_the_last_accepted_state_s():
    task = make_task([20, 24, 22, 5], max_growth=math.inf)
    host, device = find(task)
    last = host.result.waypoints[-1]
    with torch.no_grad():
        expected = task.candidate(host.start, last)
    for got, weight in zip(device.last.network.weights, expected.network.weights, strict=True):
        torch.testing.assert_close(got, weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(device.last.measured, expected.measured, rtol=1e-9, atol=0)
    assert not any(flag for flag, _ in device.last.hindrances)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a build without CUDA")
@pytest.mark.parametrize("case", ["grad_norm", "lookahead", "lookahead, gain wanted", "holdout", "fixed step, paper"])
@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
def test_nothing_is_read_back_and_everything_stays_on_the_device(case, activation):
    """With fake tensors on a CUDA device any read-back raises, and so does a tensor left on another device."""
    task = make_task([20, 24, 22, 5], activation, **CASES[case])
    tensors = task.tensors()
    with FakeTensorMode(), torch.no_grad():
        fake = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]
        program = device_search.run_program(task.with_tensors(fake))
    assert program.rows.device.type == "cuda" and program.rows.shape[0] == task.options.steps
    assert all(weight.device.type == "cuda" for weight in program.last.network.weights)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a build without CUDA")
def test_the_layers_inputs_are_factorized_without_a_read_back_too():
    with FakeTensorMode(), torch.no_grad():
        inputs = tuple(torch.empty(12, width, device="cuda") for width in (20, 24, 9))
        factors = planning._factorize(planning._Batches(inputs, (True, True, True), (True, True, True), products))
    assert factors.figures.shape == (2, 2) and factors.figures.device.type == "cuda"
    assert [len(gram) for gram in factors.grams] == [12, 12, 12]


@pytest.mark.skipif(extension.unavailable_reason() is not None, reason=f"{extension.unavailable_reason()}")
@pytest.mark.parametrize("case", ["grad_norm", "lookahead", "lookahead, gain wanted", "holdout", "fixed step, paper"])
def test_the_compiled_operators_take_every_operand_of_the_search(case):
    """With their twins as CPU kernels the same steps, and with fake CUDA tensors shapes and devices that fit."""
    task = make_task([20, 24, 22, 5], "softplus", **CASES[case])
    compiled = replace(
        task, problem=replace(task.problem, network=replace(task.problem.network, products=kernels._compiled()))
    )
    with torch.no_grad():
        expected, got = (device_search.find(which) for which in (task, compiled))
    assert_same(expected.result, got.result, rel=1e-12)
    assert got.backend.startswith("cuda kernels on cpu")
    tensors = task.tensors()
    with FakeTensorMode(), torch.no_grad():
        fake = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]
        program = device_search.run_program(compiled.with_tensors(fake))
    assert program.rows.device.type == "cuda"


def test_no_graph_holds_tensors_that_the_model_applies_to_its_outputs() -> None:
    """It would go on with those that it was captured with, where the next teleport has others."""
    task = make_task([20, 24, 22, 5], dtype=torch.float32)
    texts = []
    for output in (Affine(2.0), Affine(torch.ones(5)), InTurn((Affine(offset=torch.ones(5)), LogSoftmax()))):
        loss = replace(task.problem.loss, output=output)
        texts.append(replace(task, problem=replace(task.problem, loss=loss)).obstacle())
    assert texts[0] == task.obstacle()
    assert texts[1] == texts[2] == "tensors of the model are applied to its outputs, which a graph would not read anew"
