"""The optimizers' next steps as functions: against the steps that they really take, and their derivatives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from teleports import teleport_mlp
from torch import Tensor, nn

import symtele_cuda as st
from symtele_cuda.objectives.next_step import muon_length, read_step, sgd_rate

SHAPES = ((5, 7), (7, 4), (5,), (4, 4))
MATRICES = SHAPES[:2] + SHAPES[3:]

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.3}),
    "sgd decay": (torch.optim.SGD, {"lr": 0.3, "weight_decay": 0.1}),
    "sgd maximize": (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1, "maximize": True}),
    "sgd tensor lr": (torch.optim.SGD, {"lr": torch.tensor(0.25, dtype=torch.float64), "momentum": 0.9}),
    "momentum": (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9}),
    "dampening": (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.3}),
    "adagrad options": (
        torch.optim.Adagrad,
        {"lr": 0.3, "lr_decay": 0.2, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3},
    ),
    "adagrad maximize": (torch.optim.Adagrad, {"lr": 0.3, "maximize": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.3}),
    "rmsprop options": (torch.optim.RMSprop, {"lr": 0.3, "alpha": 0.7, "eps": 1e-3, "weight_decay": 0.1}),
    "rmsprop momentum": (torch.optim.RMSprop, {"lr": 0.3, "momentum": 0.9}),
    "rmsprop centered": (torch.optim.RMSprop, {"lr": 0.3, "centered": True, "momentum": 0.9, "maximize": True}),
    "adam": (torch.optim.Adam, {"lr": 0.3}),
    "adam options": (torch.optim.Adam, {"lr": 0.3, "betas": (0.6, 0.7), "eps": 1e-3, "weight_decay": 0.1}),
    "adam decoupled": (torch.optim.Adam, {"lr": 0.3, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.3, "betas": (0.6, 0.7), "amsgrad": True, "maximize": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.3}),
    "adamw amsgrad": (torch.optim.AdamW, {"lr": 0.3, "weight_decay": 0.1, "betas": (0.6, 0.7), "amsgrad": True}),
    "adamw foreach": (torch.optim.AdamW, {"lr": 0.3, "foreach": True}),
    "adamw fused": (torch.optim.AdamW, {"lr": 0.3, "fused": True}),
}
MUONS: dict[str, dict[str, Any]] = {
    "muon": {"lr": 0.3},
    "muon plain": {"lr": 0.3, "nesterov": False, "weight_decay": 0.0},
    "muon rms": {"lr": 0.3, "adjust_lr_fn": "match_rms_adamw", "momentum": 0.8, "weight_decay": 0.2},
    "muon iterations": {"lr": 0.3, "ns_steps": 3, "ns_coefficients": (1.5, -0.5, 0.0), "eps": 1e-3},
}
ALL = {**OPTIMIZERS, **{name: (torch.optim.Muon, options) for name, options in MUONS.items()}}


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(
    name: str, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    kind, settings = ALL[name]
    shapes = MATRICES if kind is torch.optim.Muon else SHAPES
    parameters = [nn.Parameter(random(shape, seed, dtype)) for seed, shape in enumerate(shapes)]
    return kind(parameters, **{**settings, **options}), parameters


def give_gradients(parameters: list[nn.Parameter], seed: int) -> list[Tensor]:
    """New gradients in which the last row of each parameter is exactly zero, as for a pixel that is always black."""
    for index, parameter in enumerate(parameters):
        parameter.grad = random(tuple(parameter.shape), 100 * seed + index, parameter.dtype)
        parameter.grad[-1] = 0.0
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def take_steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], count: int) -> None:
    for seed in range(count):
        give_gradients(parameters, seed)
        optimizer.step()


def predicted(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: list[Tensor]
) -> list[Tensor]:
    with torch.no_grad():
        steps = st.read_step(optimizer, parameters)(parameters, gradients)
        return [parameter - step for parameter, step in zip(parameters, steps, strict=True)]


# --- the steps that are really taken ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_several_steps_are_those_of_the_optimizer(name: str) -> None:
    optimizer, parameters = make(name)
    for seed in range(4):
        gradients = give_gradients(parameters, seed)
        expected = predicted(optimizer, parameters, gradients)
        before = copy.deepcopy(parameters)
        optimizer.step()
        for parameter, wanted, old in zip(parameters, expected, before, strict=True):
            assert relative_error(wanted - old, parameter - old) < 1e-12
            assert not torch.equal(parameter, old)


def singular_value_oracle(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The Newton-Schulz polynomial a s + b s³ + c s⁵, `steps` times on the singular values s of G/max(‖G‖, ε)."""
    left, values, right = torch.linalg.svd(matrix / max(matrix.norm().item(), eps), full_matrices=False)
    a, b, c = coefficients
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


def muon_step(group: dict[str, Any], parameter: Tensor, gradient: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """u and the next momentum of Muon, in float64."""
    momentum = group["momentum"]
    buffer = momentum * buffer + (1 - momentum) * gradient
    direction = momentum * buffer + (1 - momentum) * gradient if group["nesterov"] else buffer
    image = singular_value_oracle(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
    rows, columns = parameter.shape
    by_rms = group["adjust_lr_fn"] == "match_rms_adamw"
    scale = 0.2 * max(rows, columns) ** 0.5 if by_rms else max(1, rows / columns) ** 0.5
    return group["lr"] * (scale * image + group["weight_decay"] * parameter), buffer


@pytest.mark.parametrize("name", MUONS)
def test_muon_takes_the_step_that_torch_takes_in_bfloat16(name: str) -> None:
    optimizer, parameters = make(name)
    (group,) = optimizer.param_groups
    buffers = [torch.zeros_like(parameter) for parameter in parameters]
    for seed in range(4):
        gradients = give_gradients(parameters, seed)
        steps = st.read_step(optimizer, parameters)(parameters, gradients)
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        for index, (parameter, old) in enumerate(zip(parameters, before, strict=True)):
            wanted, buffers[index] = muon_step(group, old, gradients[index], buffers[index])
            assert relative_error(steps[index], wanted) < 1e-12
            assert (
                relative_error(steps[index], old - parameter) < 0.05
            )  # 8 bits, five iterations that are no contraction
            assert relative_error(optimizer.state[parameter]["momentum_buffer"], buffers[index]) < 1e-14


@pytest.mark.parametrize(("nesterov", "dampening"), [(False, 0.0), (False, 0.3), (True, 0.0)])
def test_sgd_comes_to_the_steps_of_its_rate(nesterov: bool, dampening: float) -> None:
    parameter, gradient = nn.Parameter(random((4, 3), 0)), random((4, 3), 1)
    optimizer = torch.optim.SGD([parameter], lr=0.2, momentum=0.8, nesterov=nesterov, dampening=dampening)
    for _ in range(200):
        before, parameter.grad = parameter.detach().clone(), gradient.clone()
        optimizer.step()
    assert relative_error(before - parameter.detach(), sgd_rate(optimizer.param_groups[0]) * gradient) < 1e-10


@pytest.mark.parametrize("options", [{}, {"adjust_lr_fn": "match_rms_adamw"}])
def test_muons_steps_are_about_as_long_as_said(options: dict[str, Any]) -> None:
    parameters = [nn.Parameter(random(shape, 0)) for shape in ((40, 12), (12, 40), (30, 30))]
    optimizer = torch.optim.Muon(parameters, lr=0.3, weight_decay=0.0, **options)
    said = muon_length(optimizer.param_groups[0], [parameter.shape for parameter in parameters])
    for seed in range(3):
        for index, parameter in enumerate(parameters):
            parameter.grad = random(tuple(parameter.shape), 10 * seed + index)
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        taken = torch.cat([(p.detach() - old).flatten() for p, old in zip(parameters, before, strict=True)]).norm()
        assert 0.7 * said < taken.item() < 1.1 * said


def test_groups_have_their_own_settings_and_any_order() -> None:
    first, second, third = (nn.Parameter(random((3,), seed)) for seed in range(3))
    groups = [
        {"params": [first], "lr": 0.1},
        {"params": [second, third], "lr": 0.2, "betas": (0.5, 0.6), "maximize": True, "amsgrad": True},
    ]
    optimizer = torch.optim.Adam(groups)
    take_steps(optimizer, [first, second, third], 2)
    parameters = [third, first]
    gradients = [random((3,), 7), random((3,), 8)]
    expected = predicted(optimizer, parameters, gradients)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    for parameter, wanted in zip(parameters, expected, strict=True):
        assert relative_error(parameter, wanted) < 1e-12


@pytest.mark.parametrize("name", ALL)
def test_a_parameter_may_have_no_state_yet(name: str) -> None:
    optimizer, parameters = make(name)
    take_steps(optimizer, parameters, 2)
    optimizer.state.pop(parameters[0], None)
    gradients = give_gradients(parameters, 9)
    expected = predicted(optimizer, parameters, gradients)
    optimizer.step()
    tolerance = 0.05 if name in MUONS else 1e-12
    assert all(relative_error(p, wanted) < tolerance for p, wanted in zip(parameters, expected, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_the_state_stays_as_it_was_read(name: str) -> None:
    optimizer, parameters = make(name)
    take_steps(optimizer, parameters, 2)
    values, gradients = [p.detach().clone() for p in parameters], [random(tuple(p.shape), 5) for p in parameters]
    state = copy.deepcopy(optimizer.state_dict())
    step = st.read_step(optimizer, parameters)
    expected = step(values, gradients)
    assert all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(state["state"][index][key]))
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    )
    take_steps(optimizer, parameters, 2)
    optimizer.param_groups[0]["lr"] = 100.0
    assert all(torch.equal(got, wanted) for got, wanted in zip(step(values, gradients), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["momentum", "adagrad", "rmsprop centered", "adamw amsgrad", "muon"])
def test_the_step_is_of_the_searchs_dtype(name: str, dtype: torch.dtype) -> None:
    optimizer, parameters = make(name, dtype)
    take_steps(optimizer, parameters, 2)
    exact, twins = make(name)
    exact.load_state_dict(optimizer.state_dict())  # casts the state to float64
    values = [parameter.detach().double() for parameter in parameters]
    gradients = [random(tuple(parameter.shape), 3, torch.float32) for parameter in parameters]
    steps = st.read_step(optimizer, parameters)([value.float() for value in values], gradients)
    expected = st.read_step(exact, twins)(values, [gradient.double() for gradient in gradients])
    for got, wanted in zip(steps, expected, strict=True):
        assert got.dtype == torch.float32
        assert relative_error(got.double(), wanted) < 5e-6  # Muon enlarges the rounding, to 7e-7


# --- derivatives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("taken", [0, 2])
def test_gradcheck(name: str, taken: int) -> None:
    optimizer, parameters = make(name)
    take_steps(optimizer, parameters, taken)
    step = st.read_step(optimizer, parameters)
    values = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    gradients = [random(tuple(parameter.shape), 40 + i).requires_grad_() for i, parameter in enumerate(parameters)]
    count = len(parameters)
    assert torch.autograd.gradcheck(lambda *x: tuple(step(x[:count], x[count:])), (*values, *gradients), fast_mode=True)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("taken", [0, 2])
def test_the_derivative_is_finite_and_true_where_gradient_and_state_are_zero(name: str, taken: int) -> None:
    optimizer, _ = make(name)
    parameter = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    optimizer.param_groups[0]["params"] = [parameter]
    optimizer.state.clear()
    for _ in range(taken):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    if "initial_accumulator_value" in optimizer.defaults:
        optimizer.defaults["initial_accumulator_value"] = 0.0
    step = st.read_step(optimizer, [parameter])
    zero = torch.zeros_like(parameter, requires_grad=True)
    direction = random((3, 3), 1).sign()
    (update,) = step([parameter.detach()], [zero])
    assert torch.equal(update, torch.zeros_like(update))
    (slope,) = torch.autograd.grad(update, zero, direction)
    # So small a step that its square vanishes beside ε; u is linear there.
    (near,) = step([parameter.detach()], [1e-30 * direction])
    assert slope.isfinite().all()
    assert (near * direction).sum().item() == pytest.approx(1e-30 * (slope * direction).sum().item(), rel=1e-9)
    assert slope.abs().max() > 0


# --- the objective ------------------------------------------------------------------------------------------------


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.LeakyReLU(0.1), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).double()


def make_batch() -> tuple[Tensor, Tensor]:
    return random((6, 8), 1), torch.tensor([0, 1, 2, 0, 1, 2])


def test_along_plain_gradient_steps_it_is_the_lookahead() -> None:
    model, twin = make_model(), make_model()
    step = st.read_step(torch.optim.SGD(model.parameters(), lr=0.1), list(model.parameters()))
    report = teleport_mlp(model, make_batch(), objective=st.OptimizerLookahead(step, margin=2.0))
    wanted = teleport_mlp(twin, make_batch(), objective="lookahead", lr=0.1, margin=2.0)
    assert report.accepted
    assert report.objective_after == pytest.approx(wanted.objective_after, rel=1e-8)
    assert [record.accepted for record in report.trace] == [record.accepted for record in wanted.trace]
    for got, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(got, expected) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_fewer_bits_are_teleported_along_their_optimizers_step(dtype: torch.dtype) -> None:
    model, (x, y) = make_model().to(dtype), make_batch()
    optimizer, batch = torch.optim.AdamW(model.parameters(), lr=1e-2), (x.to(dtype), y)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), y).backward()
        optimizer.step()
    objective = st.OptimizerLookahead(st.read_step(optimizer, list(model.parameters())), margin=1.0)
    report = teleport_mlp(model, batch, objective=objective, drift_tol=0.1)
    assert report.accepted
    assert report.objective_after < report.objective_before


# --- errors -------------------------------------------------------------------------------------------------------


class OwnAdam(torch.optim.Adam):
    """A subclass that steps as it likes."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step(closure)


class InheritingAdam(torch.optim.AdamW):
    """A subclass that steps as its base does."""


@dataclass
class Wrapper:
    """As some libraries wrap an optimizer."""

    optimizer: torch.optim.Optimizer


def test_subclasses_that_inherit_step_wrappers_and_sequences_are_looked_through() -> None:
    parameters = [nn.Parameter(random((4, 3), 0)), nn.Parameter(random((3, 4), 1))]
    gradients = [random(tuple(p.shape), seed) for seed, p in enumerate(parameters, start=2)]
    alone = [torch.optim.AdamW(parameters[:1], lr=0.02), torch.optim.SGD(parameters[1:], lr=0.3)]
    triples = zip(alone, parameters, gradients, strict=True)
    expected = [step for one, p, g in triples for step in read_step(one, [p])([p], [g])]
    inheriting, plain = InheritingAdam(parameters[:1], lr=0.02), torch.optim.SGD(parameters[1:], lr=0.3)
    several = [Wrapper(inheriting), Wrapper(Wrapper(plain))]
    found = read_step(several, parameters)(parameters, gradients)  # type: ignore[arg-type]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def with_late_momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.RMSprop(parameters)
    take_steps(optimizer, parameters, 1)
    optimizer.param_groups[0]["momentum"] = 0.9
    return optimizer


@pytest.mark.parametrize(
    ("make_optimizer", "text"),
    [
        (
            torch.optim.NAdam,
            "optimizer must be one of SGD, Adagrad, RMSprop, Adam, AdamW, Muon, .* got NAdam: pass lr=",
        ),
        (OwnAdam, "got OwnAdam: pass lr="),
        (
            lambda parameters: torch.optim.SGD(parameters[1:]),
            r"held by the optimizer, got others at the positions \[0\]",
        ),
        (with_late_momentum, r"must hold 'momentum_buffer' in the state .* got \['square_avg', 'step'\]"),
    ],
)
def test_what_cannot_be_read(make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], text: str) -> None:
    parameters = [nn.Parameter(random((3, 3), seed)) for seed in range(2)]
    optimizer = make_optimizer(parameters)
    with pytest.raises(ValueError, match=text):
        st.read_step(optimizer, parameters)


@pytest.mark.parametrize("margin", [0.0, -1.0, float("nan")])
def test_bad_margins(margin: float) -> None:
    with pytest.raises(ValueError, match="margin must be"):
        st.OptimizerLookahead(lambda parameters, gradients: gradients, margin)
