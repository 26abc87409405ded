"""The positive diagonal group, alone and beside GL: what it keeps, its gradient, its search, what `group` chooses."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from networks import make_batch, snapshot, unchanged
from test_device_search import DEFAULTS, assert_same
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import symtele_cuda as st
from symtele_cuda.model.chain import read_chain
from symtele_cuda.model.network import parameter_list
from symtele_cuda.model.problem import Problem
from symtele_cuda.model.samples import layers_to_match
from symtele_cuda.objectives import GradNorm, Lookahead
from symtele_cuda.orbits.action import (
    OtherSamples,
    State,
    advance,
    domain_limit,
    form_weights,
    predict,
    scale_limit,
    steepest_direction,
    weights_of,
)
from symtele_cuda.orbits.activation_space import Evaluation
from symtele_cuda.orbits.batch_plan import make_plan, match_inputs, observe_inputs
from symtele_cuda.orbits.paths import FastPath, GeneralPath
from symtele_cuda.search import device as device_search
from symtele_cuda.search.trust_region import holding
from symtele_cuda.settings import make_options
from symtele_cuda.surroundings import Surroundings
from symtele_cuda.task import Task
from symtele_cuda.teleport import _find_on_host

MODULES = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "identity": nn.Identity,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
}
OBJECTIVES = {"grad_norm": GradNorm(), "lookahead": Lookahead(0.2)}
# Widths, activations, n and group, with the groups that move the hidden layers. Between them every neighbourhood of a
# scaled layer occurs: layers that absorb, thin and wide, that are carried, and that only scale, before and behind it.
CASES: dict[str, tuple[list[int], list[str], int, str, list[str]]] = {
    "all scaled": ([20, 9, 8, 5], ["relu", "leaky"], 12, "positive_diagonal", ["positive_diagonal"] * 2),
    "all scaled, wide": ([20, 24, 22, 5], ["identity", "relu"], 12, "positive_diagonal", ["positive_diagonal"] * 2),
    "more samples than columns": ([6, 9, 8, 5], ["leaky", "relu"], 40, "auto", ["positive_diagonal"] * 2),
    "narrow behind wide": ([30, 4, 3, 3], ["leaky", "leaky"], 8, "auto", ["gl", "positive_diagonal"]),
    "between": ([20, 24, 30, 26, 5], ["leaky", "relu", "leaky"], 12, "auto", ["gl", "positive_diagonal", "gl"]),
    "between, thin": ([20, 24, 6, 26, 5], ["leaky", "relu", "tanh"], 12, "auto", ["gl", "positive_diagonal", None]),
    "curved": ([20, 24, 30, 26, 5], ["tanh", "relu", "softplus"], 12, "auto", ["gl", "positive_diagonal", "gl"]),
    "around": (
        [20, 40, 24, 22, 5],
        ["relu", "leaky", "relu"],
        12,
        "auto",
        ["positive_diagonal", "gl", "positive_diagonal"],
    ),
    "relu, thin output": ([20, 40, 24, 5], ["relu", "leaky"], 12, "auto", ["positive_diagonal", "gl"]),
}
every_case = pytest.mark.parametrize("case", CASES)
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)
either_action = pytest.mark.parametrize("action", ["least_change", "paper"])


def make_model(dims: list[int], activations: list[str], *, bias: bool = True, dtype=torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for (d_in, d_out), name in itertools.zip_longest(itertools.pairwise(dims), activations):
        linear = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=bias, dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(1.4 * torch.randn(d_out, d_in, generator=generator) / d_in**0.5)
            if bias:
                linear.bias.copy_(0.3 * torch.randn(d_out, generator=generator))
        layers += [linear] if name is None else [linear, MODULES[name]()]
    return nn.Sequential(*layers)


def make_task(case: str, *, bias: bool = True, holdout: bool = False, **changes: object) -> Task:
    dims, activations, n, group, _ = CASES[case]
    model = make_model(dims, activations, bias=bias)
    options = make_options(**{**DEFAULTS, "group": group, **changes}, hidden_layers=len(dims) - 2)
    with torch.no_grad():
        chain = read_chain(model)
        problem = Problem.make(model, chain, make_batch(n, dims[0], dims[-1]), None)
        around = Surroundings.make(chain, make_batch(30, dims[0], dims[-1], seed=9) if holdout else None, problem)
        matches = (observe_inputs if options.group == "positive_diagonal" else match_inputs)(problem)
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


def fast_path(task: Task, objective: str) -> FastPath:
    problem = task.problem
    return FastPath(problem.network, task.plan, OBJECTIVES[objective], problem.loss, problem.output_delta)


def walk(task: Task, steps: int = 2) -> State:
    """A state some way along the orbit."""
    network, plan = task.problem.network, task.plan
    state, path = task.start(), fast_path(task, "grad_norm")
    for _ in range(steps):
        direction = steepest_direction(network, plan, state, path.evaluate(state).gradient())
        norm = sum(float(b.square().sum()) for b in state.inputs[1:]) ** 0.5
        size = domain_limit(network, state, direction, 0.02 * norm / direction.norm)
        state, hindrances = advance(network, plan, state, direction, size)
        assert holding(hindrances) is None
    return state


def relative(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).norm() / expected.norm()).detach())


# --- the action ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 60])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "leaky", "identity"])
@pytest.mark.parametrize("options", [dict(), dict(objective="lookahead", lr=0.1), dict(step_size=1e-3)], ids=str)
def test_the_diagonal_group_keeps_the_function_on_every_input(options, activation, bias, n):
    model = make_model([12, 9, 8, 5], [activation] * 2, bias=bias)
    x, y = make_batch(n, 12, 5)
    others = 3 * make_batch(500, 12, 5, seed=7)[0]
    before, weights = model(others).detach(), snapshot(model)
    report = st.teleport_mlp(model, (x, y), group="positive_diagonal", **options)
    assert report.accepted and not unchanged(model, weights)
    assert float((model(others).detach() - before).abs().max()) <= 1e-12 * float(before.abs().max())
    assert [(layer.group, layer.teleported) for layer in report.layers] == [("positive_diagonal", True)] * 2
    assert all(layer.rank is None and layer.condition is None for layer in report.layers)


@pytest.mark.parametrize("activation", ["relu", "leaky"])
def test_weights_are_those_of_positive_diagonal_matrices(activation):
    model = make_model([12, 9, 5], [activation])
    before = copy.deepcopy(model)
    st.teleport_mlp(model, make_batch(30, 12, 5), group="positive_diagonal")
    scales = model[0].weight[:, :1] / before[0].weight[:, :1]
    assert (scales > 0).all() and scales.max() > 1.01 * scales.min()
    torch.testing.assert_close(model[0].weight, scales * before[0].weight, rtol=1e-13, atol=0)
    torch.testing.assert_close(model[0].bias, scales[:, 0] * before[0].bias, rtol=1e-13, atol=0)
    torch.testing.assert_close(model[2].weight, before[2].weight / scales[:, 0], rtol=1e-13, atol=0)
    assert torch.equal(model[2].bias, before[2].bias)


@every_case
@either_action
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_state_its_weights_and_its_predictions_agree(case, action, bias):
    task = make_task(case, action=action, bias=bias)
    network, plan, start, state = task.problem.network, task.plan, task.start(), walk(task)
    formed, outputs, hindrances = form_weights(network, plan, start, state.waypoint)
    assert holding(hindrances) is None and any(plan.scaled)
    assert relative(outputs[-1], task.problem.outputs[-1]) <= 1e-10
    for output, target in zip(outputs, state.targets, strict=True):
        assert relative(output, target) <= 1e-9
    for first, second in zip(parameter_list(weights_of(network, plan, state)), parameter_list(formed), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-9)
    others = make_batch(30, network.weights[0].shape[1], 5, seed=9)[0]
    predicted = predict(network, plan, state, OtherSamples.make(network, others, task.problem.samples))
    assert relative(predicted, formed.forward(others)[-1]) <= 1e-8


# --- the gradient -------------------------------------------------------------------------------------------------


def dense_objective(task: Task, state: State, scales: dict[int, Tensor], objective: str) -> Tensor:
    """The objective, by double backward, of the weights at `state` with B_l scaled by exp s_l, P by SVD."""
    network, plan = task.problem.network, task.plan
    parameters: list[Tensor] = []
    for layer, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        left = scales[layer + 1].exp() if layer + 1 in scales else torch.ones(len(weight), dtype=weight.dtype)
        right = scales[layer].exp() if layer in scales else torch.ones(weight.shape[1], dtype=weight.dtype)
        reference, offset = state.references[layer], state.offsets[layer]
        reference = torch.zeros_like(weight) if reference is None else reference * left[:, None] / right
        offset = torch.zeros(len(weight), dtype=weight.dtype) if offset is None else offset * left
        if plan.absorbs[layer]:
            batch = state.inputs[layer] * right
            extended = batch if bias is None else torch.cat([batch, torch.ones_like(batch[:, :1])], 1)
            residual = state.targets[layer] * left - F.linear(batch, reference, offset)
            change = residual.T @ torch.linalg.pinv(extended).T
            columns = weight.shape[1]
            reference, offset = reference + change[:, :columns], offset + change[:, columns:].sum(1)
        parameters += [reference] if bias is None else [reference, offset]
    loss_of = task.problem.loss_of
    parameters = [p if p.requires_grad else p.clone().requires_grad_() for p in parameters]
    return OBJECTIVES[objective].value(loss_of, parameters)


@every_case
@every_objective
@either_action
@pytest.mark.parametrize("bias", [True, False])
def test_the_rates_of_the_scales_are_the_gradient_through_formed_weights(case, objective, action, bias):
    task = make_task(case, action=action, bias=bias)
    network, plan = task.problem.network, task.plan
    with torch.no_grad():
        state = walk(task)
        evaluation = fast_path(task, objective).evaluate(state)
        direction = steepest_direction(network, plan, state, evaluation.gradient())
    scales = {
        layer: torch.zeros(state.inputs[layer].shape[1], dtype=torch.float64, requires_grad=True)
        for layer in range(1, len(network))
        if plan.scaled[layer - 1]
    }
    value = dense_objective(task, state, scales, objective)
    assert float(evaluation.value) == pytest.approx(value.item(), rel=1e-9)
    assert list(direction.scales) == list(scales) != []
    for (layer, got), expected in zip(
        direction.scales.items(), torch.autograd.grad(value, list(scales.values())), strict=True
    ):
        assert relative(got, expected) <= 1e-9, f"layer {layer}"


@every_case
@every_objective
@either_action
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_fast_path_equals_general_path(case, objective, action, bias):
    task = make_task(case, action=action, bias=bias)
    network, plan, state = task.problem.network, task.plan, walk(task)
    general = GeneralPath(task.problem, plan, OBJECTIVES[objective])

    def explore(evaluation: Evaluation) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
        direction = steepest_direction(network, plan, state, evaluation.gradient())
        return evaluation.value, direction.scales, {layer: step.change for layer, step in direction.steps.items()}

    (value, *ours), (expected_value, *theirs) = (
        explore(fast_path(task, objective).evaluate(state)),
        explore(general.evaluate(state)),
    )
    assert float(value) == pytest.approx(float(expected_value), rel=1e-9)
    for got, expected in zip(ours, theirs, strict=True):
        assert list(got) == list(expected)
        for layer in got:
            assert relative(got[layer], expected[layer]) <= 1e-9, f"layer {layer}"


@every_case
@every_objective
@torch.no_grad()
def test_a_small_step_changes_the_objective_as_the_gradient_says(case, objective):
    task = make_task(case)
    network, plan, state, path = task.problem.network, task.plan, walk(task), fast_path(task, objective)
    evaluation = path.evaluate(state)
    gradient = evaluation.gradient()
    full = steepest_direction(network, plan, state, gradient)
    scales_only = replace(full, steps={})
    slope = sum(float(rates.square().sum()) for rates in full.scales.values())
    step = 1e-5 / max(float(rates.abs().max()) for rates in full.scales.values())
    values = []
    for size in (step, -step):
        moved, hindrances = advance(network, plan, state, scales_only, torch.tensor(size, dtype=torch.float64))
        assert holding(hindrances) is None
        values.append(float(path.evaluate(moved).value))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-5)


@torch.no_grad()
def test_no_scale_changes_by_more_than_a_factor_e_in_one_step():
    task = make_task("around")
    state = task.start()
    direction = steepest_direction(
        task.problem.network, task.plan, state, fast_path(task, "grad_norm").evaluate(state).gradient()
    )
    largest = max(float(rates.abs().max()) for rates in direction.scales.values())
    for size in (1e6, -1e6):
        limit = scale_limit(direction, torch.tensor(size, dtype=torch.float64))
        assert float(limit) * largest == pytest.approx(size / abs(size), rel=1e-12)
    small = torch.tensor(0.5 / largest, dtype=torch.float64)
    assert scale_limit(direction, small) == small
    unscaled = make_task("around", layers=[2])
    assert not unscaled.plan.scaled[0] and scale_limit(replace(direction, scales={}), 5 * small) == 5 * small


def test_an_ascent_without_a_cap_stays_within_the_factor_at_every_step():
    model, steps = make_model([12, 9, 8, 5], ["relu", "leaky"]), 6
    before = copy.deepcopy(model)
    report = st.teleport_mlp(model, make_batch(30, 12, 5), group="positive_diagonal", max_growth=math.inf, steps=steps)
    logarithms = (model[0].bias / before[0].bias).detach().log()
    assert report.accepted and float(logarithms.abs().max()) <= report.steps * (1 + 1e-9)
    report = st.teleport_mlp(before, make_batch(30, 12, 5), group="positive_diagonal", step_size=1e9, steps=1)
    assert "shortened" in report.trace[0].note


# --- the search ---------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("options", [dict(max_growth=3.0), dict(objective="lookahead", lr=0.05)], ids=str)
def test_the_search_improves_the_objective_and_reports_each_layer_s_group(case, options):
    dims, activations, n, group, expected = CASES[case]
    model = make_model(dims, activations)
    x, y = make_batch(n, dims[0], dims[-1])
    before = model(x)
    report = st.teleport_mlp(model, (x, y), group=group, **options)
    assert report.accepted and report.steps > 1
    if "lr" in options:
        assert report.objective_after < 0.999 * report.objective_before
    else:
        assert 1.05 * report.grad_norm_before < report.grad_norm_after <= 3.0 * report.grad_norm_before * (1 + 1e-9)
    assert relative(model(x), before) <= 1e-9
    assert [layer.group for layer in report.layers] == expected
    assert [layer.teleported for layer in report.layers] == [name is not None for name in expected]


@pytest.mark.parametrize(("n", "expected"), [(8, ["gl", "positive_diagonal"]), (50, ["positive_diagonal"] * 2)])
def test_auto_teleports_a_narrow_network_in_every_layer(n, expected):
    model, batch = make_model([30, 4, 3, 3], ["leaky", "leaky"]), make_batch(n, 30, 3)
    report = st.teleport_mlp(model, batch, group="auto", objective="lookahead", lr=0.1)
    assert report.accepted and [layer.group for layer in report.layers] == expected


def test_where_gl_takes_every_layer_auto_is_gl():
    models = [make_model([20, 24, 22, 5], ["leaky", "tanh"]) for _ in range(2)]
    for model, group in zip(models, ("gl", "auto"), strict=True):
        report = st.teleport_mlp(model, make_batch(12, 20, 5), group=group)
        assert [layer.group for layer in report.layers] == ["gl", "gl"]
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_layers_that_are_not_named_or_not_homogeneous_stay():
    model = make_model([12, 9, 8, 7, 5], ["relu", "tanh", "relu"])
    report = st.teleport_mlp(model, make_batch(40, 12, 5), group="positive_diagonal")
    assert [layer.group for layer in report.layers] == ["positive_diagonal", None, "positive_diagonal"]
    assert report.layers[1].reason == "tanh is not positively homogeneous"
    report = st.teleport_mlp(model, make_batch(40, 12, 5), group="auto", layers=[3])
    assert [layer.group for layer in report.layers] == [None, None, "positive_diagonal"]
    assert report.layers[0].reason == "not asked for"


def test_the_holdout_keeps_its_loss_under_the_diagonal_group():
    model, holdout = make_model([12, 9, 5], ["relu"]), make_batch(20, 12, 5, seed=5)
    report = st.teleport_mlp(model, make_batch(30, 12, 5), group="positive_diagonal", holdout=holdout, holdout_tol=0.0)
    assert report.holdout_after == pytest.approx(report.holdout_before, rel=1e-12)


def test_a_loss_with_weight_terms_takes_the_general_path():
    model, (x, y) = make_model([12, 9, 8, 5], ["relu", "leaky"]), make_batch(30, 12, 5)
    others = make_batch(100, 12, 5, seed=4)[0]
    before = model(others)

    def decayed(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + 1e-3 * sum(p.square().sum() for p in model.parameters())

    report = st.teleport_mlp(model, (x, y), decayed, group="positive_diagonal", objective="lookahead", lr=0.05)
    assert report.accepted and report.objective_after < report.objective_before
    assert relative(model(others), before) <= 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 0.03)])
def test_lower_precision_keeps_the_function_to_its_rounding(dtype, tolerance):
    # Some ten products with rounded factors a weight in float32, one rounding to eight bits in bfloat16.
    model, (x, y) = make_model([12, 9, 8, 5], ["relu", "leaky"], dtype=dtype), make_batch(30, 12, 5, dtype=dtype)
    others = make_batch(100, 12, 5, dtype=dtype, seed=4)[0]
    before = copy.deepcopy(model).double()(others.double())
    report = st.teleport_mlp(model, (x, y), group="positive_diagonal", drift_tol=0.05)
    assert report.accepted
    assert relative(model.double()(others.double()), before) <= tolerance


SEARCHES = {
    "grad_norm": dict(),
    "lookahead": dict(objective="lookahead", lr=0.5),
    "paper": dict(action="paper"),
    "fixed step": dict(step_size=1e-4),
    "holdout": dict(holdout=True, holdout_tol=0.01, max_growth=10.0),
    "first order": dict(inverse="first_order", drift_tol=1e-2),
}


@every_case
@pytest.mark.parametrize("search", SEARCHES)
@torch.no_grad()
def test_the_search_on_the_device_takes_the_same_steps(case, search):
    task = make_task(case, **SEARCHES[search])
    host, device = _find_on_host(task), device_search.find(task)
    assert len(host.result.records) > 1
    assert_same(host.result, device.result, rel=1e-7)
    last = host.result.waypoints[-1]
    for got, weight in zip(
        parameter_list(device.last.network), parameter_list(task.candidate(host.start, last).network), strict=True
    ):
        torch.testing.assert_close(got, weight, rtol=1e-6, atol=1e-8)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a build without CUDA")
@every_case
@pytest.mark.parametrize("search", SEARCHES)
def test_nothing_is_read_back_from_the_device(case, search):
    task = make_task(case, **SEARCHES[search])
    tensors = task.tensors()
    with FakeTensorMode(), torch.no_grad():
        fake = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]
        program = device_search.run_program(task.with_tensors(fake))
    assert program.rows.device.type == "cuda" and program.rows.shape[0] == task.options.steps


def test_plans_by_different_groups_have_graphs_of_their_own():
    signatures = {
        make_task("all scaled, wide", group=group, layers=[1]).signature() for group in ("gl", "positive_diagonal")
    }
    assert len(signatures) == 2


# --- the teleporter -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "activations", "group", "expected"),
    [
        ([784, 16, 10, 10], ["leaky", "leaky"], "gl", [1, 2]),
        ([784, 16, 10, 10], ["leaky", "leaky"], "auto", [1]),
        ([784, 16, 10, 10], ["leaky", "leaky"], "positive_diagonal", []),
        ([784, 16, 10, 10], ["relu", "tanh"], "auto", [2]),  # tanh has nothing but GL
        ([30, 60, 49, 48, 10], ["leaky", "relu", "leaky"], "auto", [3]),
        ([30, 60, 48, 10], ["leaky", "leaky"], "auto", [2]),
    ],
)
def test_which_layers_a_batch_is_to_match(dims, activations, group, expected):
    assert layers_to_match(read_chain(make_model(dims, activations)), None, group) == expected


@pytest.mark.parametrize(("group", "wanted"), [("positive_diagonal", 200), ("auto", 200), ("gl", 5)])
def test_the_automatic_batch_is_not_shrunk_by_layers_that_scale(group, wanted):
    model = make_model([30, 4, 3, 3], ["leaky", "leaky"])
    teleporter = st.Teleporter(
        model, torch.optim.SGD(model.parameters(), lr=0.05), schedule=st.Schedule([0]), holdout_size=0, group=group
    )
    x, y = make_batch(wanted, 30, 3)
    assert teleporter.step((x[:-1], y[:-1]), epoch=0) is None
    report = teleporter.step((x[-1:], y[-1:]), epoch=0)
    assert report is not None and (group == "gl" or report.layers[0].n == wanted)


def test_a_report_with_groups_survives_the_state_dict():
    def make_teleporter() -> st.Teleporter:
        model = make_model([30, 4, 3, 3], ["leaky", "tanh"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        return st.Teleporter(
            model, optimizer, schedule=st.Schedule([0]), batch_size=40, holdout_size=0, group="positive_diagonal"
        )

    teleporter, resumed = make_teleporter(), make_teleporter()
    assert teleporter.step(make_batch(40, 30, 3), epoch=0) is not None
    resumed.load_state_dict(teleporter.state_dict())
    assert resumed.reports == teleporter.reports
    assert [layer["group"] for layer in asdict(resumed.reports[0])["layers"]] == ["positive_diagonal", None]
