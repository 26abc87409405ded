"""Symmetries that hold on every input: what they keep, their gradient, where they are found, what they refuse."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import make_batch, snapshot, unchanged
from teleports import UNBOUNDED, make_teleporter, teleport_mlp
from torch import Tensor, nn

import symtele_cuda as st
from symtele_cuda.model.whole import WholeModel
from symtele_cuda.orbits.exact import LARGEST_RATE, ExactOrbit

MODULES = {"relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(0.1), "identity": nn.Identity, "tanh": nn.Tanh}
OBJECTIVES = {"grad_norm": st.GradNorm(), "lookahead": st.Lookahead(0.2)}


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


class Blocks(nn.Module):
    """No chain: two MLPs with a residual around each, and a normalisation with buffers behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = make_model([12, 9, 12], ["relu"])
        self.second = make_model([12, 10, 12], ["identity"])
        self.norm, self.head = nn.BatchNorm1d(12).double(), nn.Linear(12, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return self.head(self.norm(x + self.second(x)))


def relative(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).norm() / expected.norm()).detach())


def make_orbit(model: nn.Module, batch: tuple[Tensor, Tensor], objective: Any, loss_fn: Any = None) -> ExactOrbit:
    whole = WholeModel.make(model, batch, loss_fn, None)
    return ExactOrbit.make(whole.values, whole.losses, st.find_sites(model), objective, torch.float64)


def random_point(orbit: ExactOrbit) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)

    def near(g: Tensor) -> Tensor:
        noise = 0.1 * torch.randn(g.shape, generator=generator, dtype=g.dtype)
        return noise.exp() if g.dim() == 1 else g + noise

    return tuple(map(near, orbit.start()))


# --- what is kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 60])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "leaky", "identity"])
@pytest.mark.parametrize("options", [dict(), dict(objective="lookahead", lr=0.1)], ids=str)
def test_the_diagonal_group_keeps_the_function_on_every_input(options, activation, bias, n):
    model = make_model([12, 9, 8, 5], [activation] * 2, bias=bias)
    others = 3 * make_batch(500, 12, 5, seed=7)[0]
    before, weights = model(others).detach(), snapshot(model)
    report = teleport_mlp(model, make_batch(n, 12, 5), group="positive_diagonal", **options)
    assert report.accepted and not unchanged(model, weights)
    assert float((model(others).detach() - before).abs().max()) <= 1e-12 * float(before.abs().max())
    assert [(layer.group, layer.teleported) for layer in report.layers] == [("positive_diagonal", True)] * 2
    assert all(layer.rank is None and layer.condition is None for layer in report.layers)


@pytest.mark.parametrize("activation", ["relu", "leaky"])
def test_weights_are_those_of_positive_diagonal_matrices(activation):
    model = make_model([12, 9, 5], [activation])
    before = copy.deepcopy(model)
    teleport_mlp(model, make_batch(30, 12, 5), group="positive_diagonal")
    scales = model[0].weight[:, :1] / before[0].weight[:, :1]
    assert (scales > 0).all() and scales.max() > 1.01 * scales.min()
    torch.testing.assert_close(model[0].weight, scales * before[0].weight, rtol=1e-13, atol=0)
    torch.testing.assert_close(model[0].bias, scales[:, 0] * before[0].bias, rtol=1e-13, atol=0)
    torch.testing.assert_close(model[2].weight, before[2].weight / scales[:, 0], rtol=1e-13, atol=0)
    assert torch.equal(model[2].bias, before[2].bias)


@pytest.mark.parametrize("objective", ["grad_norm", "lookahead"])
def test_any_model_keeps_its_function_and_its_buffers(objective):
    model = Blocks()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    others = make_batch(100, 12, 5, seed=4)[0]
    before = copy.deepcopy(model)(others)
    method = st.Ascent(objective, lr=0.1, steps=6)
    report = st.teleport(model, make_batch(20, 12, 5), sites=st.find_sites(model), method=method, guards=UNBOUNDED)
    assert report.accepted and report.steps > 1 and report.layers == ()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert relative(model(others), before) <= 1e-10
    assert report.drift <= 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 0.03)])
def test_lower_precision_keeps_the_function_to_its_rounding(dtype, tolerance):
    # Some ten products with rounded factors a weight in float32, one rounding to eight bits in bfloat16.
    model, (x, y) = make_model([12, 9, 8, 5], ["relu", "leaky"], dtype=dtype), make_batch(30, 12, 5, dtype=dtype)
    others = make_batch(100, 12, 5, dtype=dtype, seed=4)[0]
    before = copy.deepcopy(model).double()(others.double())
    report = teleport_mlp(model, (x, y), group="positive_diagonal", drift_tol=0.05)
    assert report.accepted
    assert relative(model.double()(others.double()), before) <= tolerance


# --- the gradient -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Blocks, lambda: make_model([12, 9, 8, 7, 5], ["relu", "identity", "leaky"])])
def test_the_gradient_at_a_point_is_that_of_the_moved_parameters(make: Callable[[], nn.Module]):
    orbit = make_orbit(make(), make_batch(20, 12, 5), st.GradNorm())
    point = random_point(orbit)
    leaves = [value.requires_grad_() for value in orbit.at(point, orbit.parameters)]
    expected = torch.autograd.grad(orbit.losses.batch(leaves), leaves)
    for got, wanted in zip(orbit.gradients_at(point), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 1e-2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_value_is_the_objective_s_own_and_its_gradient_the_difference_quotient(objective, decay):
    model = Blocks()

    def decayed(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + decay * sum(p.square().sum() for p in model.parameters())

    orbit = make_orbit(model, make_batch(20, 12, 5), OBJECTIVES[objective], decayed if decay else None)
    assert orbit.losses.weight_terms == (decay > 0)
    point = random_point(orbit)
    evaluation = orbit.evaluate(point)
    leaves = [value.requires_grad_() for value in orbit.at(point, orbit.parameters)]
    expected = OBJECTIVES[objective].value(orbit.losses.batch, leaves)
    assert float(evaluation.value) == pytest.approx(expected.item(), rel=1e-9)
    direction = orbit.direction(point, evaluation)
    step, slope = 1e-6 / direction.norm, float(direction.norm) ** 2
    above, below = (float(orbit.evaluate(orbit.advance(point, direction, s)[0]).value) for s in (step, -step))
    assert (above - below) / (2 * float(step)) == pytest.approx(slope, rel=1e-5)


def test_no_element_changes_too_much_in_one_step():
    orbit = make_orbit(Blocks(), make_batch(20, 12, 5), st.GradNorm())
    start = orbit.start()
    direction = orbit.direction(start, orbit.evaluate(start))
    lengths = [t.abs().max() if t.dim() == 1 else t.norm() for t in direction.generators]
    sizes = [length / LARGEST_RATE[t.dim()] for t, length in zip(direction.generators, lengths, strict=True)]
    for wanted in (1e6, -1e6):
        limit = float(orbit.limit(start, direction, torch.tensor(wanted, dtype=torch.float64)))
        assert abs(limit) * float(max(sizes)) == pytest.approx(1.0, rel=1e-12) and limit * wanted > 0
    small = torch.tensor(1e-9, dtype=torch.float64)
    assert orbit.limit(start, direction, small) == small


def test_an_ascent_without_a_cap_stays_within_a_factor_e_at_every_step():
    model, steps = make_model([12, 9, 8, 5], ["relu", "leaky"]), 6
    before = copy.deepcopy(model)
    report = teleport_mlp(model, make_batch(30, 12, 5), group="positive_diagonal", max_growth=math.inf, steps=steps)
    logarithms = (model[0].bias / before[0].bias).detach().log()
    assert report.accepted and float(logarithms.abs().max()) <= report.steps * (1 + 1e-9)


# --- the search ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(max_growth=3.0), dict(objective="lookahead", lr=0.05)], ids=str)
def test_the_search_improves_the_objective(options):
    model, (x, y) = make_model([12, 9, 8, 5], ["relu", "leaky"]), make_batch(30, 12, 5)
    report = teleport_mlp(model, (x, y), group="positive_diagonal", **options)
    assert report.accepted and report.steps > 1
    if "lr" in options:
        assert report.objective_after < 0.999 * report.objective_before
    else:
        assert 1.05 * report.grad_norm_before < report.grad_norm_after <= 3.0 * report.grad_norm_before * (1 + 1e-9)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert report.grad_norm_after == pytest.approx(norm, rel=1e-9)


def test_the_guards_count():
    batch, sites = make_batch(30, 12, 5), st.find_sites(make_model([12, 9, 5], ["relu"]))
    for guards, text in (
        (st.Guards(max_weight_change=1e-9), "of its norm, more than max_weight_change"),
        (st.Guards(min_gain=1e6), "less than min_gain asks for"),
    ):
        model = make_model([12, 9, 5], ["relu"])
        before = snapshot(model)
        report = st.teleport(model, batch, sites=sites, method=st.Ascent("lookahead", lr=0.05), guards=guards)
        assert not report.accepted and text in report.reason and unchanged(model, before)


def test_the_holdout_keeps_its_loss_and_must_gain_from_the_step_ahead():
    model, holdout = make_model([12, 9, 5], ["relu"]), make_batch(20, 12, 5, seed=5)
    guards = st.Guards(holdout=holdout, holdout_tol=1e-9, max_weight_change=math.inf)
    report = st.teleport_mlp(model, make_batch(30, 12, 5), method=st.Ascent(group="positive_diagonal"), guards=guards)
    assert report.accepted and report.holdout_after == pytest.approx(report.holdout_before, rel=1e-12)
    method, steps = st.Ascent("lookahead", lr=0.02, group="positive_diagonal"), []
    for tolerance in (math.inf, 0.1):
        opposite = replace(guards, holdout=(holdout[0], (holdout[1] + 1) % 5), holdout_tol=tolerance)
        model = make_model([12, 9, 5], ["relu"])
        steps.append(st.teleport_mlp(model, holdout, method=method, guards=opposite).steps)
    assert 0 < steps[1] < steps[0]  # what the later ones gain on the batch the step ahead loses on the holdout


def test_a_loss_with_weight_terms_counts_and_keeps_its_data_term():
    model, (x, y) = make_model([12, 9, 8, 5], ["relu", "leaky"]), make_batch(30, 12, 5)
    others = make_batch(100, 12, 5, seed=4)[0]
    before = model(others)

    def decayed(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + 1e-3 * sum(p.square().sum() for p in model.parameters())

    for call in (
        lambda: teleport_mlp(model, (x, y), decayed, group="positive_diagonal", objective="lookahead", lr=0.05),
        lambda: st.teleport(
            model, (x, y), decayed, sites=st.find_sites(model), method=st.Ascent("lookahead", lr=0.05), guards=UNBOUNDED
        ),
    ):
        report = call()
        assert report.accepted and report.objective_after < report.objective_before and report.drift <= 1e-10
        assert report.loss_after == pytest.approx(decayed(model(x), y).item(), rel=1e-9)
        assert relative(model(others), before) <= 1e-10


def test_layers_that_are_not_named_or_not_homogeneous_stay():
    model = make_model([12, 9, 8, 7, 5], ["relu", "tanh", "relu"])
    report = teleport_mlp(model, make_batch(40, 12, 5), group="positive_diagonal")
    assert [layer.group for layer in report.layers] == ["positive_diagonal", None, "positive_diagonal"]
    assert report.layers[1].reason == "tanh is not positively homogeneous"
    report = teleport_mlp(model, make_batch(40, 12, 5), group="positive_diagonal", layers=[3])
    assert [layer.group for layer in report.layers] == [None, None, "positive_diagonal"]
    assert report.layers[0].reason == "not asked for"


# --- sites --------------------------------------------------------------------------------------------------------


def scales(up: str, down: str, units: int, name: str = "Scales") -> st.Site:
    axes = st.Axis(f"{up}.weight", 0), st.Axis(f"{up}.bias", 0), st.Axis(f"{down}.weight", 1, power=-1)
    return st.Site(name, "positive diagonal", axes, units)


def test_sites_are_found_in_chains_and_in_their_parts():
    sites = st.find_sites(Blocks())
    pair = st.Axis("second.0.weight", 0), st.Axis("second.0.bias", 0), st.Axis("second.2.weight", 1, power=-1)
    assert list(sites) == [scales("first.0", "first.2", 9), st.Site("LinearPair", "GL", pair, 10)]
    assert str(sites).splitlines() == [
        "site        group                 exact on     parameters",
        "Scales      positive diagonal(9)  every input  first.0.weight, first.0.bias, first.2.weight",
        "LinearPair  GL(10)                every input  second.0.weight, second.0.bias, second.2.weight",
    ]
    assert len(st.find_sites(make_model([12, 9, 5], ["tanh"]))) == 0


def test_no_site_has_a_parameter_that_is_frozen():
    model = make_model([12, 9, 8, 7, 5], ["relu"] * 3)
    model[0].weight.requires_grad_(False)
    sites = st.find_sites(model)
    assert [site.names[0] for site in sites] == ["2.weight", "4.weight"]
    assert "it would change '0.weight', which is frozen" in str(sites)
    with pytest.raises(ValueError, match=r"sites must name trainable parameters of the model, got \['0.weight'\]"):
        st.teleport(model, make_batch(8, 12, 5), sites=[st.Scales("0", "2")])


@pytest.mark.parametrize("objective", ["grad_norm", "lookahead"])
def test_a_site_of_the_caller_s_own_is_a_group_and_axes(objective):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).double()
    x, y = torch.randn(10, 1, 8, 8).double(), torch.randint(3, (10,))
    others = torch.randn(5, 1, 9, 9).double()
    before = model(others)
    method = st.Ascent(objective, lr=0.5)
    report = st.teleport(model, (x, y), sites=[scales("0", "2", 6, "mine")], method=method, guards=UNBOUNDED)
    assert report.accepted and report.steps > 1
    assert relative(model(others), before) <= 1e-12


# --- refusals -----------------------------------------------------------------------------------------------------


def with_site(model: nn.Module) -> dict[str, Any]:
    return {"sites": st.find_sites(model)}


X, Y = make_batch(8, 12, 5)
REFUSALS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, Any], dict[str, Any], type[Exception], str]] = {
    "model": (lambda: "model", (X, Y), {"sites": []}, TypeError, "model must be a torch.nn.Module, got str"),
    "no site": (Blocks, (X, Y), {"sites": []}, st.TeleportError, "sites: expected at least one place"),
    "no sites": (Blocks, (X, Y), {"sites": ["first"]}, TypeError, "sites must be Sites, or declare them .*, got str"),
    "one site": (Blocks, (X, Y), {"sites": st.Scales("first.0", "first.2")}, TypeError, "sequence .* got Scales"),
    "other names": (Blocks, (X, Y), {"sites": [st.Scales("a", "b")]}, ValueError, "got 'a', which fits none"),
    "no symmetry": (Blocks, (X, Y), {"sites": [st.LinearPair("first.0", "first.2")]}, st.TeleportError, "of first"),
    "overlap": (Blocks, (X, Y), {"sites": [st.Scales("first.0", "first.2")] * 2}, ValueError, "must not overlap"),
    "heads": (Blocks, (X, Y), {"sites": [st.LinearPair("second.0", "second.2", 3)]}, ValueError, "heads must divide"),
    "published": (Blocks, (X, Y), {"method": st.Published(0.1)}, TypeError, "method must be an Ascent, got Published"),
    "guards": (Blocks, (X, Y), {"guards": 0.1}, TypeError, "guards must be Guards, got float"),
    "lookahead without lr": (Blocks, (X, Y), {"method": st.Ascent("lookahead")}, ValueError, "lr must be given"),
    "batch": (Blocks, (X, [0]), {}, TypeError, r"batch must be a pair \(inputs, targets\) of tensors, got tuple"),
    "targets": (Blocks, (X, Y + 3), {}, ValueError, r"targets must be class indices in 0..4"),
    "NaN": (Blocks, (X * math.nan, Y), {}, ValueError, "loss_fn must be finite on the batch, got nan"),
    "holdout": (
        Blocks,
        (X, Y),
        {"guards": st.Guards(holdout=(X, Y.double()))},
        ValueError,
        "holdout|targets",
    ),
    "loss": (Blocks, (X, Y), {"loss_fn": "mse"}, TypeError, "loss_fn must be callable .* got str"),
    "loss, no scalar": (Blocks, (X, Y), {"loss_fn": lambda o, t: o}, ValueError, "must return a scalar tensor"),
    "dropout": (
        lambda: nn.Sequential(Blocks(), nn.Dropout(0.5)),
        (X, Y),
        {},
        ValueError,
        "model must compute the same twice, got '1', a Dropout with p = 0.5 in training mode",
    ),
    "mixed": (lambda: mixed(Blocks()), (X, Y), {}, TypeError, "float of the dtype of all others, got torch.float16"),
    "NaN weights": (
        lambda: broken(Blocks()),
        (X, Y),
        {},
        ValueError,
        "parameter 'head.bias' must be finite",
    ),
}


def mixed(model: nn.Module) -> nn.Module:
    model.head.half()
    return model


def broken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.head.bias[0] = math.nan
    return model


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_named_and_nothing_changes(name):
    make, batch, options, error, text = REFUSALS[name]
    model = make()
    arguments = options if "sites" in options else with_site(model) | options
    before, state = snapshot(model) if isinstance(model, nn.Module) else [], torch.get_rng_state()
    with pytest.raises(error, match=text):
        st.teleport(model, batch, **arguments)
    assert name in ("NaN weights", "model") or unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


def held_by(model: nn.Module) -> list[list[int]]:
    """Which objects the modules have as parameters and buffers."""
    return [[*map(id, (*module._parameters.values(), *module._buffers.values()))] for module in model.modules()]


def test_inside_inference_mode_it_refuses():
    model = Blocks()
    with torch.inference_mode(), pytest.raises(st.TeleportError, match="inference_mode"):
        st.teleport(model, (X, Y), **with_site(model))


@pytest.mark.parametrize("k", range(1, 12))
def test_an_interrupt_in_the_model_s_forward_leaves_it_whole(k):
    model, calls = Blocks(), []
    objects = held_by(model)

    def strike(*_: object) -> None:
        calls.append(1)
        if len(calls) == k:
            raise KeyboardInterrupt

    sites, before = st.find_sites(model), snapshot(model)
    model.head.register_forward_pre_hook(strike)
    with pytest.raises(KeyboardInterrupt):
        st.teleport(model, (X, Y), sites=sites, method=st.Ascent("lookahead", lr=0.1))
    assert unchanged(model, before)
    assert held_by(model) == objects


# --- the teleporter -----------------------------------------------------------------------------------------------


def test_the_automatic_batch_is_not_shrunk_by_layers_that_scale():
    model = make_model([30, 4, 3, 3], ["leaky", "leaky"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    teleporter = make_teleporter(
        model, optimizer, schedule=st.Schedule([0]), holdout_size=0, group="positive_diagonal", min_gain=0.0
    )
    x, y = make_batch(200, 30, 3)
    assert teleporter.step((x[:-1], y[:-1]), epoch=0) is None
    report = teleporter.step((x[-1:], y[-1:]), epoch=0)
    assert report is not None and report.layers[0].n == 200 and report.accepted


def test_a_model_without_scales_is_refused_at_construction():
    model = make_model([12, 9, 5], ["tanh"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ValueError, match=r"can never be teleported by group='positive_diagonal'.*layer 1"):
        make_teleporter(model, optimizer, group="positive_diagonal")


def test_a_report_with_groups_survives_the_state_dict():
    def teleporter() -> st.Teleporter:
        model = make_model([30, 4, 3, 3], ["leaky", "tanh"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        options = {"schedule": st.Schedule([0]), "batch_size": 40, "holdout_size": 0, "group": "positive_diagonal"}
        return make_teleporter(model, optimizer, **options)

    first, resumed = teleporter(), teleporter()
    assert first.step(make_batch(40, 30, 3), epoch=0) is not None
    resumed.load_state_dict(first.state_dict())
    assert resumed.reports == first.reports
    assert [layer["group"] for layer in asdict(resumed.reports[0])["layers"]] == ["positive_diagonal", None]
