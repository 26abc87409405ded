"""Sharpness and curvature against oracles of their own, and up and down through a teleport."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from networks import make_batch, make_mlp, snapshot, unchanged
from teleports import teleport_mlp
from torch import Tensor

import symtele_cuda as st

WIDE, NARROW = [30, 40, 36, 5], [6, 4, 3, 5]
OBJECTIVES = {"sharpness": st.Sharpness, "curvature": st.Curvature}


def parameters_of(dims: list[int], bias: bool = True, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in make_mlp(dims, bias=bias, dtype=dtype).parameters()]


def loss_on(dims: list[int], bias: bool, n: int = 7):
    """Cross entropy of a LeakyReLU network on a batch as a plain function of its parameters."""
    x, y = make_batch(n, dims[0], dims[-1])

    def loss_of(parameters):
        hidden, step = x.to(parameters[0].dtype), 2 if bias else 1
        for index in range(0, len(parameters), step):
            if index:
                hidden = F.leaky_relu(hidden, 0.1)
            hidden = F.linear(hidden, parameters[index], parameters[index + 1] if bias else None)
        return F.cross_entropy(hidden, y)

    return loss_of


def no_loss(parameters):
    raise AssertionError("the curvature needs no loss")


# --- sharpness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_sharpness_is_the_mean_loss_around_the_point(bias):
    parameters, loss_of = parameters_of(NARROW, bias), loss_on(NARROW, bias)
    flat = torch.cat([p.detach().flatten() for p in parameters])
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(4):
        entries = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        direction = torch.cat([entry.flatten() for entry in entries])
        direction /= math.sqrt(float((direction**2).sum()))
        assert float(direction.norm()) == pytest.approx(1.0, rel=1e-14)
        for distance in (0.2, 1.5):
            moved = (flat + distance * direction).split([p.numel() for p in parameters])
            shaped = [part.view(p.shape) for part, p in zip(moved, parameters, strict=True)]
            losses.append(loss_of(shaped).item())
    objective = st.Sharpness(maximise=True, distances=[0.2, 1.5], directions=4, seed=3)
    assert objective.value(loss_of, parameters).item() == pytest.approx(sum(losses) / 8, rel=1e-13)


def test_far_from_the_point_many_directions_agree_with_the_trace_of_the_hessian():
    """For a quadratic loss φ − L = t²/2 · tr H / N in the mean over the sphere: directions are isotropic."""
    scales = torch.linspace(0.5, 3.0, 24, dtype=torch.float64)
    point = [torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)]
    objective = st.Sharpness(maximise=False, distances=(2.0,), directions=2000)
    value = objective.value(lambda p: 0.5 * (scales * p[0].flatten() ** 2).sum(), point)
    assert value.item() == pytest.approx(0.5 * 4.0 * float(scales.mean()), rel=0.01)


# --- curvature -------------------------------------------------------------------------------------------------------


def curve(t: Tensor, parameters: list[Tensor], generators: list[Tensor], bias: bool) -> Tensor:
    """exp(tM)·w layer by layer, by matrix exponentials, as one vector."""
    step, moved = 2 if bias else 1, []
    left = [torch.linalg.matrix_exp(t * torch.diag(m)) for m in generators]
    left.append(torch.eye(len(parameters[-step]), dtype=torch.float64))
    for layer, index in enumerate(range(0, len(parameters), step)):
        weight = left[layer] @ parameters[index]
        if layer:
            weight = weight @ torch.linalg.inv(left[layer - 1])
        moved += [weight, *([left[layer] @ parameters[index + 1]] if bias else [])]
    return torch.cat([part.flatten() for part in moved])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [[6, 4, 5], NARROW], ids=str)
def test_curvature_is_that_of_the_curve_of_the_group(dims, bias):
    parameters = [p.detach() for p in parameters_of(dims, bias)]
    generator = torch.Generator().manual_seed(5)
    curvatures = []
    for _ in range(3):
        generators = [torch.randn(d, generator=generator, dtype=torch.float64) for d in dims[1:-1]]

        def gamma(t, generators=generators):
            return curve(t, parameters, generators, bias)

        zero = torch.zeros((), dtype=torch.float64)
        velocity = torch.func.jacfwd(gamma)(zero)
        acceleration = torch.func.jacfwd(torch.func.jacfwd(gamma))(zero)
        area = (velocity @ velocity) * (acceleration @ acceleration) - (velocity @ acceleration) ** 2
        curvatures.append(float(area.sqrt() / velocity.norm() ** 3))
    value = st.Curvature(maximise=True, generators=3, seed=5).value(no_loss, parameters)
    assert value.item() == pytest.approx(sum(curvatures) / 3, rel=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_the_curves_lie_in_the_level_set_on_any_input(bias):
    parameters, loss_of = [p.detach() for p in parameters_of(NARROW, bias)], loss_on(NARROW, bias, n=50)
    generators = [torch.tensor([0.3, -1.0, 0.7, 0.1]).double(), torch.tensor([1.0, 0.2, -0.4]).double()]
    moved = curve(torch.tensor(0.8).double(), parameters, generators, bias).split([p.numel() for p in parameters])
    shaped = [part.view(p.shape) for part, p in zip(moved, parameters, strict=True)]
    assert float(loss_of(shaped)) == pytest.approx(float(loss_of(parameters)), rel=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_curvature_of_two_scalar_layers_is_that_of_the_hyperbola(seed):
    """(a e^{mt}, b e^{−mt}) runs along xy = ab, of curvature 2|ab| / (a² + b²)^{3/2} whatever m is."""
    a, b = 0.7, -1.9
    point = [torch.tensor([[a]], dtype=torch.float64), torch.tensor([[b]], dtype=torch.float64)]
    value = st.Curvature(maximise=False, seed=seed).value(no_loss, point)
    assert value.item() == pytest.approx(2 * abs(a * b) / (a * a + b * b) ** 1.5, rel=1e-12)


def test_curvature_where_the_curve_is_straight_is_zero_with_a_finite_gradient():
    """A scalar network with one weight 0: γ runs along an axis, γ'' is collinear with γ'."""
    point = [torch.tensor([[w]]).double().requires_grad_() for w in (2.0, 0.0)]
    value = st.Curvature(maximise=True).value(no_loss, point)
    gradients = torch.autograd.grad(value, point)
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_curvature_where_the_curve_stands_still_is_an_error():
    point = [torch.zeros(3, 2).double().requires_grad_(), torch.zeros(2, 3).double().requires_grad_()]
    with pytest.raises(ValueError, match="parameters must not all be zero where the group acts on them"):
        st.Curvature(maximise=True).value(no_loss, point)


def test_curvature_needs_a_hidden_layer():
    with pytest.raises(ValueError, match="parameters must hold a hidden layer, two weight matrices or more, got 1"):
        st.Curvature(maximise=True).value(no_loss, parameters_of([4, 3]))


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bias", [True, False])
def test_gradient(bias, objective):
    parameters, loss_of = parameters_of([3, 4, 3, 2], bias), loss_on([3, 4, 3, 2], bias)
    value = OBJECTIVES[objective](maximise=True, seed=1).value
    assert torch.autograd.gradcheck(lambda *tensors: value(loss_of, tensors), tuple(parameters))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_value_depends_on_the_seed_alone(objective, dtype):
    parameters, loss_of = parameters_of(NARROW, dtype=dtype), loss_on(NARROW, bias=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (
        OBJECTIVES[objective](maximise=False, seed=seed).value(loss_of, parameters) for seed in (0, 0, 1)
    )
    assert first.dtype == dtype and first.ndim == 0
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("dims", "n", "group"), [(WIDE, 20, "gl"), (NARROW, 40, "positive_diagonal")], ids=["gl", "diagonal"]
)
@pytest.mark.parametrize("maximise", [True, False], ids=["up", "down"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_teleport_moves_the_objective_the_right_way_and_keeps_the_loss(objective, maximise, dims, n, group):
    model, batch = make_mlp(dims), make_batch(n, dims[0], dims[-1])
    wanted = OBJECTIVES[objective](maximise=maximise)
    loss_of, parameters = loss_on(dims, bias=True, n=n), list(model.parameters())
    before, loss = wanted.value(loss_of, parameters).item(), loss_of(parameters).item()
    report = teleport_mlp(model, batch, objective=wanted, group=group)
    after = wanted.value(loss_of, parameters).item()
    assert report.accepted and report.drift <= 1e-12
    assert after > before if maximise else after < before
    assert report.objective_before == pytest.approx(before, rel=1e-9)
    assert report.objective_after == pytest.approx(after, rel=1e-9)
    assert loss_of(parameters).item() == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_teleport_is_deterministic(objective):
    models = [make_mlp(WIDE, dtype=torch.float32) for _ in range(2)]
    for model in models:
        batch = make_batch(20, WIDE[0], WIDE[-1], dtype=torch.float32)
        assert teleport_mlp(model, batch, objective=OBJECTIVES[objective](maximise=True), steps=3).accepted
    assert unchanged(models[0], snapshot(models[1]))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: st.Sharpness("up"), TypeError, "maximise must be a bool, got 'up' of type str"),
        (lambda: st.Curvature(1), TypeError, "maximise must be a bool, got 1 of type int"),
        (lambda: st.Sharpness(True, distances=0.1), TypeError, "distances must be a sequence of numbers > 0, got 0.1"),
        (lambda: st.Sharpness(True, distances=()), ValueError, "distances must hold at least one number > 0, got none"),
        (lambda: st.Sharpness(True, distances=[0.1, 0]), ValueError, r"distances\[1\] must be a .*number > 0, got 0"),
        (lambda: st.Sharpness(True, distances=[math.nan]), ValueError, r"distances\[0\] must be .*> 0, got nan"),
        (
            lambda: st.Sharpness(True, distances="12"),
            TypeError,
            "distances must be a sequence of numbers > 0, got '12'",
        ),
        (lambda: st.Sharpness(True, directions=0), ValueError, "directions must be >= 1, got 0"),
        (lambda: st.Sharpness(True, directions=2.0), TypeError, "directions must be an int, got 2.0 of type float"),
        (lambda: st.Sharpness(True, seed=2**63), ValueError, f"seed must be <= {2**63 - 1}, got {2**63}"),
        (lambda: st.Curvature(True, generators=0), ValueError, "generators must be >= 1, got 0"),
        (lambda: st.Curvature(True, seed=-1), ValueError, "seed must be >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named(make, error, text):
    with pytest.raises(error, match=text):
        make()
