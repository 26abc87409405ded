"""The search with its decisions on the device: the same steps as on the host, and nothing read back before the end."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from climbs import make_climb, with_products
from networks import ACTIVATIONS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from symtele_cuda.guards import STEPS_LONG_ENOUGH, Bounds, is_futile
from symtele_cuda.kernels import extension, graphs
from symtele_cuda.kernels import library as kernels
from symtele_cuda.kernels import torch_kernels as products
from symtele_cuda.measure import Measurement
from symtele_cuda.model.pieces import Affine, InTurn, LogSoftmax
from symtele_cuda.orbits import Candidate, batch_plan
from symtele_cuda.search import device
from symtele_cuda.search.device import Climb
from symtele_cuda.search.trust_region import Search, SearchResult, ascend


@torch.no_grad()
def on_host(work: Climb) -> SearchResult:
    orbit, ascent, guards = work.orbit, work.ascent, work.guards
    before = orbit.read(orbit.measure_start())
    if is_futile(guards, work.futile_if_flat, before):
        return SearchResult((orbit.waypoint(orbit.start()),), (), STEPS_LONG_ENOUGH)
    bounds = Bounds.make(guards, before.sensitivity, before.holdout)
    cap = float(ascent.cap(orbit.objective, before.gradient_norm))
    return ascend(Search(orbit, orbit.objective.maximise, ascent.steps, ascent.first_radius, cap, bounds))


@torch.no_grad()
def on_device(work: Climb) -> tuple[Measurement, SearchResult, Candidate]:
    return device.read_back(work.guards, device.run_program(work))


def assert_same(host: SearchResult, device: SearchResult, rel: float = 1e-9) -> None:
    assert [record.note for record in device.records] == [record.note for record in host.records]
    assert device.reason == host.reason
    for ours, theirs in zip(device.records, host.records, strict=True):
        assert ours.accepted == theirs.accepted
        assert ours.size == pytest.approx(theirs.size, rel=rel)
        assert ours.objective == pytest.approx(theirs.objective, rel=rel, nan_ok=True)
    for ours, theirs in zip(device.waypoints, host.waypoints, strict=True):
        for got, expected in zip(graphs.tensors_of(ours), graphs.tensors_of(theirs), strict=True):
            torch.testing.assert_close(got, expected, rtol=rel, atol=rel)


CASES: dict[str, dict[str, Any]] = {
    "grad_norm": dict(),
    "no cap": dict(max_growth=math.inf, steps=10),
    "lookahead": dict(objective="lookahead", lr=0.5),
    "lookahead, gain wanted": dict(objective="lookahead", lr=0.05, min_gain=2.0),
    "lookahead, step too long": dict(objective="lookahead", lr=100.0, min_gain=2.0),
    "one layer": dict(layers=[2]),
    "noise": dict(max_sensitivity=1.02, max_growth=math.inf),
    "noise and holdout": dict(holdout=True, max_sensitivity=1.05, max_growth=math.inf),
    "holdout": dict(holdout=True, holdout_tol=0.001, max_growth=math.inf),
    "no bias": dict(bias=False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_same_steps_as_on_the_host(case, activation):
    work = make_climb([20, 24, 22, 5], activation, **CASES[case])
    before, result, _ = on_device(work)
    assert_same(on_host(work), result)
    assert before == work.orbit.read(work.orbit.measure_start())


@pytest.mark.parametrize("case", ["grad_norm", "lookahead"])
@pytest.mark.parametrize("dims", [[20, 9, 11, 5], [20, 24, 7, 22, 5]], ids=str)
def test_the_same_steps_with_narrow_layers(dims, case):
    work = make_climb(dims, "softplus", n=15, **CASES[case])
    host = on_host(work)
    assert len(host.records) > 1
    assert_same(host, on_device(work)[1], rel=1e-7)


def test_refusals_cap_and_ends_are_met_in_these_cases():
    """The cases above compare what they claim to compare."""
    notes, reasons = set(), set()
    for case in CASES.values():
        result = on_host(make_climb([20, 24, 22, 5], **case))
        notes |= {record.note.split(" from ")[0] for record in result.records}
        reasons.add(result.reason)
    assert {"accepted", "above the growth cap", "the holdout loss rose"} <= notes
    assert {"growth cap reached", "all steps taken", STEPS_LONG_ENOUGH} <= reasons


def test_the_last_candidate_is_the_last_accepted_point_s():
    work = make_climb([20, 24, 22, 5], max_growth=math.inf)
    _, _, last = on_device(work)
    with torch.no_grad():
        expected = work.orbit.weights(on_host(work).waypoints[-1])
    for got, weight in zip(last.parameters, expected.parameters, strict=True):
        torch.testing.assert_close(got, weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last.measured, expected.measured, rtol=1e-9, atol=0)
    assert not any(flag for flag, _ in last.hindrances)


def judge_of_any_tensors(control: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """What `judge` returns, as far as shapes go: its twin reads numbers back, the kernel does not."""
    return control.new_empty((), dtype=torch.bool), control.new_empty(6)


TWINS = SimpleNamespace(**{name: getattr(products, name) for name in dir(products)} | {"judge": judge_of_any_tensors})


def on_fake_device(work: Climb) -> device.Program:
    """The program on tensors without data that are said to be on a GPU: what reads one back raises."""
    with FakeTensorMode(), torch.no_grad():
        fake = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in graphs.tensors_of(work)]
        return device.run_program(graphs.with_tensors(work, iter(fake)))


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a build without CUDA")
@pytest.mark.parametrize("case", ["grad_norm", "lookahead", "lookahead, gain wanted", "holdout"])
@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
def test_nothing_is_read_back_and_everything_stays_on_the_device(case, activation):
    """With fake tensors on a CUDA device any read-back raises, and so does a tensor left on another device."""
    work = make_climb([20, 24, 22, 5], activation, **CASES[case])
    program = on_fake_device(with_products(work, TWINS))
    assert program.rows.device.type == "cuda" and program.rows.shape[0] == work.ascent.steps
    assert all(parameter.device.type == "cuda" for parameter in program.last.parameters)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a build without CUDA")
def test_the_layers_inputs_are_factorized_without_a_read_back_too():
    with FakeTensorMode(), torch.no_grad():
        inputs = tuple(torch.empty(12, width, device="cuda") for width in (20, 24, 9))
        factors = batch_plan._factorize(batch_plan._Batches(inputs, (True, True, True), (True, True, True), products))
    assert factors.figures.shape == (2, 2) and factors.figures.device.type == "cuda"
    assert [len(gram) for gram in factors.grams] == [12, 12, 12]


@pytest.mark.skipif(extension.unavailable_reason() is not None, reason=f"{extension.unavailable_reason()}")
@pytest.mark.parametrize("case", ["grad_norm", "lookahead", "lookahead, gain wanted", "holdout"])
def test_the_compiled_operators_take_every_operand_of_the_search(case):
    """With their twins as CPU kernels the same steps, and with fake CUDA tensors shapes and devices that fit."""
    work = make_climb([20, 24, 22, 5], "softplus", **CASES[case])
    compiled = with_products(work, kernels._compiled())
    assert_same(on_device(work)[1], on_device(compiled)[1], rel=1e-12)
    assert on_fake_device(compiled).rows.device.type == "cuda"


def test_no_graph_holds_tensors_that_the_model_applies_to_its_outputs() -> None:
    """It would go on with those that it was captured with, where the next teleport has others."""
    work = make_climb([20, 24, 22, 5], dtype=torch.float32)
    problem, texts = work.orbit.problem, []
    for output in (Affine(2.0), Affine(torch.ones(5)), InTurn((Affine(offset=torch.ones(5)), LogSoftmax()))):
        changed = replace(problem, loss=replace(problem.loss, output=output))
        texts.append(replace(work, orbit=replace(work.orbit, problem=changed)).obstacle())
    assert texts[0] == work.obstacle()
    assert texts[1] == texts[2] == "tensors of the model are applied to its outputs, which a graph would not read anew"
