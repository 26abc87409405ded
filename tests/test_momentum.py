"""First moments that are carried along: against the moments of the gradients at the new weights, and a dense oracle."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import make_batch, make_mlp, snapshot, unchanged
from torch import Tensor, nn

import symtele_cuda as st
from symtele_cuda import momentum

Batch = tuple[Tensor, Tensor]
ALWAYS = st.Schedule(epochs=[0], teleports_per_epoch=100)

OPTIMIZERS: dict[str, tuple[Callable[[list[nn.Parameter]], torch.optim.Optimizer], str]] = {
    "sgd": (lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9), "momentum_buffer"),
    "rmsprop": (lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9), "momentum_buffer"),
    "adam": (lambda parameters: torch.optim.Adam(parameters, lr=1e-3), "exp_avg"),
    "adamw": (lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), "exp_avg"),
    "muon": (lambda parameters: torch.optim.Muon(parameters, lr=1e-3), "momentum_buffer"),
}
AVERAGES_GRADIENTS = {"sgd": 1.0, "adam": 0.1, "adamw": 0.1, "muon": 0.05}  # the first moment after one step, over g


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def teleport(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, **options: object) -> st.TeleportReport:
    teleporter = st.Teleporter(
        model,
        optimizer,
        schedule=ALWAYS,
        batch_size=len(batch[0]),
        optimizer_state="transport",
        holdout_size=0,
        **{"layers": None, "min_gain": 0.0, "max_weight_change": math.inf, "max_sensitivity": math.inf, **options},
    )
    report = teleporter.step(batch, epoch=0)
    assert report is not None
    return report


def make_relu(dims: list[int], bias: bool) -> nn.Sequential:
    modules = (nn.ReLU() if isinstance(module, nn.LeakyReLU) else module for module in make_mlp(dims, bias=bias))
    return nn.Sequential(*modules)


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model if isinstance(module, nn.Linear)]


def hidden_inputs(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The inputs of the weight layers."""
    inputs = []
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Linear):
                inputs.append(x)
            x = module(x)
    return inputs


def saved_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [copy.deepcopy(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (got - expected).norm() <= tolerance * expected.norm()


# --- what the gradients become ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "tanh"])
@pytest.mark.parametrize("name", AVERAGES_GRADIENTS)
def test_the_last_layers_moment_of_the_batchs_gradient_is_that_of_the_new_gradient(name: str, activation: str) -> None:
    model, batch = make_mlp([10, 14, 12, 3], activation, bias=name != "muon"), make_batch(8, 10, 3)
    make_optimizer, entry = OPTIMIZERS[name]
    optimizer = make_optimizer(list(model.parameters()))
    lr, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], 0.0  # the first step moves nothing
    optimizer_step(model, optimizer, batch)
    optimizer.param_groups[0]["lr"] = lr
    last = linears(model)[-1]
    before = optimizer.state[last.weight][entry].clone()
    assert teleport(model, optimizer, batch).accepted
    model.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    moved = optimizer.state[last.weight][entry]
    assert_close(moved, AVERAGES_GRADIENTS[name] * last.weight.grad, 1e-9)
    assert (moved - before).norm() > 1e-3 * before.norm()
    if last.bias is not None:
        assert_close(optimizer.state[last.bias][entry], AVERAGES_GRADIENTS[name] * last.bias.grad, 1e-9)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_behind_a_narrow_linear_layer_the_moment_is_the_one_of_all_transformed_gradients(name: str, bias: bool) -> None:
    """With more samples than units there is one g only; along the whole past W_1 → g W_1 and W_2 → W_2 g⁻¹."""
    model, batch = make_mlp([16, 4, 3], "identity", bias=bias), make_batch(12, 16, 3)
    make_optimizer, entry = OPTIMIZERS[name]
    optimizer = make_optimizer(list(model.parameters()))
    past = []
    for seed in (5, 6, 7):
        other = make_batch(9, 16, 3, seed=seed)
        past.append((copy.deepcopy(model), other))
        optimizer_step(model, optimizer, other)
    before = hidden_inputs(model, batch[0])[1]
    assert teleport(model, optimizer, batch, objective="grad_norm", max_growth=1.5).accepted
    transposed = torch.linalg.lstsq(before, hidden_inputs(model, batch[0])[1]).solution  # gᵀ
    assert (transposed - torch.eye(4)).norm() > 1e-3

    twin = copy.deepcopy(model)
    expected = make_optimizer(list(twin.parameters()))
    for old, other in past:
        transformed = copy.deepcopy(old)
        first, second = linears(transformed)
        with torch.no_grad():
            first.weight.copy_(transposed.T @ first.weight)
            if bias:
                first.bias.copy_(first.bias @ transposed)
            second.weight.copy_(second.weight @ torch.linalg.inv(transposed.T))
        loss = F.cross_entropy(transformed(other[0]), other[1])
        for parameter, gradient in zip(
            twin.parameters(), torch.autograd.grad(loss, list(transformed.parameters())), strict=True
        ):
            parameter.grad = gradient
        expected.step()
    for parameter, wanted in zip(linears(model)[1].parameters(), linears(twin)[1].parameters(), strict=True):
        assert_close(optimizer.state[parameter][entry], expected.state[wanted][entry], 1e-8)


@pytest.mark.parametrize("name", AVERAGES_GRADIENTS)
def test_behind_relu_all_moments_are_those_of_the_gradients_of_rescaled_networks(name: str) -> None:
    bias = name != "muon"
    model, batch = make_relu([10, 7, 6, 3], bias), make_batch(12, 10, 3)
    if bias:
        with torch.no_grad():
            linears(model)[1].bias[1] = -50.0  # a unit that is off on all samples
    make_optimizer, entry = OPTIMIZERS[name]
    optimizer = make_optimizer(list(model.parameters()))
    past = []
    for seed in (5, 6, 7):
        other = make_batch(9, 10, 3, seed=seed)
        past.append((copy.deepcopy(model), other))
        optimizer_step(model, optimizer, other)
    old = copy.deepcopy(model)
    report = teleport(model, optimizer, batch, objective="grad_norm", group="positive_diagonal")
    assert report.accepted
    scales = [torch.ones(10).double()]
    for was, now in zip(linears(old)[:2], linears(model)[:2], strict=True):
        scales.append(now.weight[:, 0] / was.weight[:, 0] * scales[-1][0])  # W' = D W D₋₁⁻¹
    scales.append(torch.ones(3).double())
    assert all((scale - 1).abs().max() > 1e-3 for scale in scales[1:3])

    twin = copy.deepcopy(model)
    expected = make_optimizer(list(twin.parameters()))
    for network, other in past:
        with torch.no_grad():
            for linear, behind, ahead in zip(linears(network), scales[:-1], scales[1:], strict=True):
                linear.weight.mul_(ahead[:, None] / behind)
                if bias:
                    linear.bias.mul_(ahead)
        loss = F.cross_entropy(network(other[0]), other[1])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
            parameter.grad = gradient
        expected.step()
    for parameter, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(optimizer.state[parameter][entry], expected.state[wanted][entry], 1e-10)


# --- the formula, and what stays ----------------------------------------------------------------------------------


def expected_moment(moment: Tensor, bias: Tensor | None, before: Tensor, after: Tensor) -> Tensor:
    """M gᵀ of the least g over [B, 1], by a pseudo-inverse from an SVD."""
    moment, before, after = moment.double(), before.double(), after.double()
    if bias is not None:
        moment = torch.cat([moment, bias.double()[:, None]], 1)
        before, after = (torch.cat([b, b.new_ones(len(b), 1)], 1) for b in (before, after))
    least = torch.eye(before.shape[1], dtype=torch.float64) + torch.linalg.pinv(before) @ (after - before)
    return (moment @ least)[:, : moment.shape[1] - (bias is not None)]


@pytest.mark.parametrize("dims", [[10, 14, 12, 3], [16, 14, 5, 3], [16, 4, 3]])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_follow_the_least_group_element(name: str, dims: list[int]) -> None:
    model, batch = make_mlp(dims, bias=name != "muon"), make_batch(9, dims[0], 3)
    make_optimizer, entry = OPTIMIZERS[name]
    optimizer = make_optimizer(list(model.parameters()))
    for seed in (5, 6, 7):
        optimizer_step(model, optimizer, make_batch(9, dims[0], 3, seed=seed))
    old, before = saved_state(optimizer), hidden_inputs(model, batch[0])
    places = [id(value) for state in optimizer.state.values() for value in state.values()]
    report = teleport(model, optimizer, batch)
    assert report.accepted
    after = hidden_inputs(model, batch[0])
    indices = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    moved = [False, *(layer.teleported for layer in report.layers)]
    assert any(moved)
    for layer, linear in enumerate(linears(model)):
        for key, kept in old[indices[id(linear.weight)]].items():
            got = optimizer.state[linear.weight][key]
            if key == entry and moved[layer]:
                bias = None if linear.bias is None else optimizer.state[linear.bias][entry]
                assert_close(got, expected_moment(kept, bias, before[layer], after[layer]), 1e-9)
                assert not torch.equal(got, kept)
            else:
                assert torch.equal(got, kept)
        if linear.bias is not None:
            for key, kept in old[indices[id(linear.bias)]].items():
                assert torch.equal(optimizer.state[linear.bias][key], kept)
    assert [id(value) for state in optimizer.state.values() for value in state.values()] == places


def test_a_moment_without_one_of_the_bias_moves_by_the_weights_alone() -> None:
    model, batch = make_mlp([10, 14, 3]), make_batch(8, 10, 3)
    weights, biases = ([p for p in model.parameters() if p.dim() == dim] for dim in (2, 1))
    optimizer = torch.optim.SGD([{"params": weights, "momentum": 0.9}, {"params": biases}], lr=0.02)
    optimizer_step(model, optimizer, batch)
    last = linears(model)[-1].weight
    old, before = optimizer.state[last]["momentum_buffer"].clone(), hidden_inputs(model, batch[0])[1]
    assert teleport(model, optimizer, batch).accepted
    after = hidden_inputs(model, batch[0])[1]
    assert_close(optimizer.state[last]["momentum_buffer"], expected_moment(old, None, before, after), 1e-9)


def test_16_bit_moments_are_rounded_once() -> None:
    model, batch = make_mlp([10, 14, 12, 3], dtype=torch.bfloat16), make_batch(8, 10, 3, dtype=torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    optimizer_step(model, optimizer, batch)
    last = linears(model)[-1]
    wide = copy.deepcopy(model).float()
    old, before = optimizer.state[last.weight]["exp_avg"].clone(), hidden_inputs(wide, batch[0].float())[2]
    assert teleport(model, optimizer, batch, drift_tol=0.2).accepted
    after = hidden_inputs(copy.deepcopy(model).float(), batch[0].float())[2]
    moved = optimizer.state[last.weight]["exp_avg"]
    assert moved.dtype == torch.bfloat16
    wanted = expected_moment(old, optimizer.state[last.bias]["exp_avg"], before, after)
    assert_close(moved.double(), wanted, 2**-8)


# --- nothing to do, and all or nothing ----------------------------------------------------------------------------


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_without_a_first_moment_the_state_stays(make_optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    model, batch = make_mlp([10, 14, 12, 3]), make_batch(8, 10, 3)
    optimizer = make_optimizer(list(model.parameters()), lr=0.01)
    optimizer_step(model, optimizer, batch)
    before, twin = saved_state(optimizer), copy.deepcopy(model)
    search = {"lr": 0.05, "margin": 4.0, "steps": 6, "first_radius": 0.05}
    assert teleport(model, optimizer, batch, **search).accepted
    for old, new in zip(before, saved_state(optimizer), strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)
    st.teleport_mlp(twin, batch, objective="lookahead", **search)
    assert unchanged(model, snapshot(twin))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_before_the_first_step_there_is_nothing_to_move(name: str) -> None:
    model, batch = make_mlp([10, 14, 12, 3], bias=name != "muon"), make_batch(8, 10, 3)
    optimizer = OPTIMIZERS[name][0](list(model.parameters()))
    assert teleport(model, optimizer, batch).accepted
    assert len(optimizer.state) == 0


class NeverBetter:
    """An objective that has the same value everywhere."""

    maximise = True

    def value(self, loss_of: Callable[[list[Tensor]], Tensor], parameters: list[Tensor]) -> Tensor:
        return 0 * loss_of(parameters)


def trained(dims: list[int]) -> tuple[nn.Sequential, torch.optim.Optimizer, Callable[[], None]]:
    """A model, its optimizer after two steps, and an assertion that both are bit for bit as they are now."""
    model = make_mlp(dims)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for seed in (5, 6):
        optimizer_step(model, optimizer, make_batch(9, dims[0], 3, seed=seed))
    values, states = snapshot(model), saved_state(optimizer)

    def check() -> None:
        assert unchanged(model, values)
        for old, new in zip(states, saved_state(optimizer), strict=True):
            assert all(torch.equal(old[key], new[key]) for key in old)

    return model, optimizer, check


def test_nothing_moves_after_a_rejected_teleport() -> None:
    model, optimizer, assert_as_before = trained([10, 14, 12, 3])
    assert not teleport(model, optimizer, make_batch(8, 10, 3), objective=NeverBetter()).accepted
    assert_as_before()


def test_a_batch_that_does_not_determine_g_is_an_error_and_changes_nothing() -> None:
    dims = [16, 4, 3]
    model = make_mlp(dims)
    first = linears(model)[0]
    with torch.no_grad():
        for parameter in first.parameters():
            parameter[1] = parameter[0]  # two units that do the same
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    values = snapshot(model)
    with pytest.raises(st.TeleportError, match=r"inputs of weight layer 2 must have full rank .* \(12, 5\), rank 4"):
        teleport(model, optimizer, make_batch(12, 16, 3), objective="grad_norm")
    assert unchanged(model, values)
    for parameter in model.parameters():
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], torch.ones_like(parameter))


@pytest.mark.parametrize("when", ["while a moment is formed", "after the moments are written"])
def test_an_interrupt_leaves_all_as_it_was(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, assert_as_before = trained([10, 14, 12, 3])
    name = "_mapped" if when == "while a moment is formed" else "_transport"
    original, calls = getattr(momentum, name), []

    def interrupted(*arguments: object) -> object:
        result = original(*arguments)
        calls.append(arguments)
        if name == "_transport" or len(calls) == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(momentum, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        teleport(model, optimizer, make_batch(8, 10, 3))
    assert calls
    assert_as_before()
    monkeypatch.undo()
    assert teleport(model, optimizer, make_batch(8, 10, 3)).accepted
