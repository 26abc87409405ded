"""Every model of `models.CASES`: what is read is its function, and the module itself bears out what a teleport reports.

Autograd of the module in float64 is the oracle.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from models import CASES, SAMPLES, Case, Model, asserting_either, asserting_in_place, deciding, run_chain
from teleports import make_teleporter, teleport_mlp
from torch import Tensor, nn

from symtele_cuda.model.loss import default_loss
from symtele_cuda.model.reader import read_chain

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for _, parameter in read_chain(model).named_parameters()]


def loss_of(case: Case, targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return case.loss_fn or default_loss(targets)


def loss_and_gradients(case: Case, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """By autograd of the module itself."""
    x, y = batch
    loss = loss_of(case, y)(model(x), y)
    return loss.detach(), list(torch.autograd.grad(loss, parameters_of(model)))


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


def loss_after_step(case: Case, model: nn.Module, batch: tuple[Tensor, Tensor], rate: float) -> float:
    """After one step of plain SGD, which torch's optimizer takes, on the weights and biases of the Linears."""
    trained = copy.deepcopy(model)
    x, y = batch
    optimizer = torch.optim.SGD(parameters_of(trained), lr=rate)
    loss_of(case, y)(trained(x), y).backward()
    optimizer.step()
    with torch.no_grad():
        return float(loss_of(case, y)(trained(x), y))


@every_case
def test_what_is_read_is_the_model_s_function(case: Case) -> None:
    model = case.make()
    chain = read_chain(model)
    x, _ = case.batch()
    assert chain.activations == case.activations
    expected = model(x)
    assert expected.shape == (len(x), *case.outputs)
    torch.testing.assert_close(run_chain(chain, x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (asserting_either, r"torch\.fx can trace, got Model, TraceError: .*control flow"),
        (deciding, r"torch\.fx can trace, got Model, TraceError: .*control flow"),
        (asserting_in_place, r"at 'tanh_' expected .* got tanh_"),
    ],
)
def test_other_questions_to_the_values_are_refused(forward: Callable[[Model, Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_chain(Model(forward))


@every_case
def test_the_gradient_that_the_output_pulls_back_is_that_of_autograd(case: Case) -> None:
    output = read_chain(case.make()).output
    width = case.outputs[0] if case.outputs else 1
    z = torch.randn(6, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    made = output.forward(z)
    gradient = torch.cos(7 * made.detach())
    (expected,) = torch.autograd.grad(made, z, gradient)
    torch.testing.assert_close(output.pull_back(gradient, z.detach()), expected, rtol=1e-13, atol=1e-14)


@every_case
def test_a_teleport_keeps_the_outputs_and_reports_the_gradient_of_the_module(case: Case) -> None:
    model, batch, holdout = case.make(), case.batch(), case.batch(30, seed=50)
    x, _ = batch
    outputs = model(x).detach()
    (loss, gradients), (held, _) = (loss_and_gradients(case, model, data) for data in (batch, holdout))
    report = teleport_mlp(
        model, batch, case.loss_fn, steps=4, group=case.group, holdout=holdout, holdout_tol=math.inf
    )
    assert report.accepted and report.grad_norm_after > 1.05 * report.grad_norm_before, str(report)
    torch.testing.assert_close(model(x).detach(), outputs, rtol=1e-8, atol=1e-8)
    assert report.loss_before == pytest.approx(float(loss), rel=1e-12)
    assert report.grad_norm_before == pytest.approx(norm(gradients), rel=1e-10)
    assert report.holdout_before == pytest.approx(float(held), rel=1e-12)
    loss, gradients = loss_and_gradients(case, model, batch)
    assert report.loss_after == pytest.approx(float(loss), rel=1e-10)
    assert report.grad_norm_after == pytest.approx(norm(gradients), rel=1e-8)
    assert report.holdout_after == pytest.approx(float(loss_and_gradients(case, model, holdout)[0]), rel=1e-10)


@every_case
def test_the_lookahead_is_the_loss_after_a_step_of_sgd(case: Case) -> None:
    model, batch = case.make(), case.batch()
    before = copy.deepcopy(model)
    report = teleport_mlp(
        model, batch, case.loss_fn, objective="lookahead", lr=0.01, margin=2.0, steps=4, group=case.group
    )
    assert report.accepted and report.objective_after < report.objective_before, str(report)
    assert report.objective_before == pytest.approx(loss_after_step(case, before, batch, 0.02), rel=1e-10)
    assert report.objective_after == pytest.approx(loss_after_step(case, model, batch, 0.02), rel=1e-8)


@every_case
def test_a_loss_with_weight_terms_goes_through_the_module(case: Case) -> None:
    model, batch = case.make(), case.batch()

    def decayed(outputs: Tensor, targets: Tensor) -> Tensor:
        penalty = sum(parameter.square().sum() for parameter in parameters_of(model))
        return loss_of(case, targets)(outputs, targets) + 0.01 * penalty

    x, y = batch
    outputs = model(x).detach()
    gradients = torch.autograd.grad(decayed(model(x), y), parameters_of(model))
    report = teleport_mlp(model, batch, decayed, steps=3, group=case.group)
    assert report.accepted, str(report)
    assert report.grad_norm_before == pytest.approx(norm(list(gradients)), rel=1e-10)
    torch.testing.assert_close(model(x).detach(), outputs, rtol=1e-8, atol=1e-8)
    gradients = torch.autograd.grad(decayed(model(x), y), parameters_of(model))
    assert report.grad_norm_after == pytest.approx(norm(list(gradients)), rel=1e-8)


@every_case
def test_a_float32_model_keeps_its_outputs_to_rounding(case: Case) -> None:
    model, (x, y) = case.make().float(), case.batch()
    batch = x.float(), y.float() if y.is_floating_point() else y
    outputs = model(batch[0]).detach()
    report = teleport_mlp(model, batch, case.loss_fn, steps=2, group=case.group, drift_tol=1e-3)
    assert report.accepted, str(report)
    torch.testing.assert_close(model(batch[0]).detach(), outputs, rtol=1e-3, atol=1e-3)


@every_case
def test_a_teleporter_trains_the_model(case: Case) -> None:
    """From gathered batches to the same outputs on the samples of the teleport."""
    model, (x, y) = case.make(), case.batch(24)
    chain = parameters_of(model)
    slopes = [p for p in model.parameters() if all(p is not one for one in chain)]  # of PReLU: they stay as they are
    optimizer = torch.optim.SGD([{"params": chain}, {"params": slopes, "lr": 0.0}], lr=1e-3, momentum=0.9)
    loss_of(case, y)(model(x), y).backward()
    optimizer.step()
    teleporter = make_teleporter(
        model,
        optimizer,
        case.loss_fn,
        batch_size="auto" if case.group == "gl" else SAMPLES,
        holdout_size=4,
        group=case.group,
        holdout_tol=math.inf,
        min_gain=0.0,
        max_weight_change=math.inf,
        max_sensitivity=math.inf,
    )
    outputs = model(x).detach()
    report = teleporter.step((x, y), epoch=0)
    assert report is not None and report.accepted, str(report)
    kept = (model(x).detach() - outputs).abs().reshape(len(x), -1).amax(1) < 1e-7 * outputs.abs().max()
    assert int(kept.sum()) >= report.layers[0].n > 1


def test_targets_of_squeezed_outputs_have_their_shape() -> None:
    case = CASES["squeeze"]
    model, (x, y) = case.make(), case.batch()
    with pytest.raises(ValueError, match=r"have the shape of the outputs \(10,\), got \(10, 1\)"):
        teleport_mlp(model, (x, y[:, None]))
    with pytest.raises(ValueError, match=r"holdout: targets .* shape of the outputs \(10,\), got \(10, 1\)"):
        teleport_mlp(model, (x, y), holdout=(x, y[:, None]))
    with pytest.raises(
        ValueError, match=r"outputs of shape \(10,\), one number a sample, got class indices; pass a loss"
    ):
        teleport_mlp(model, (x, torch.zeros(10, dtype=torch.int64)))


def test_the_slope_of_a_prelu_stays_and_a_teleport_reads_the_one_of_now() -> None:
    case = CASES["PReLU"]
    model, batch = case.make(), case.batch()
    with torch.no_grad():
        model.act.weight.fill_(0.6)
    outputs = model(batch[0]).detach()
    assert teleport_mlp(model, batch, steps=2).accepted
    assert model.act.weight.tolist() == [0.6]
    torch.testing.assert_close(model(batch[0]).detach(), outputs, rtol=1e-9, atol=1e-9)
