"""What a report says of weights and noise is true of the model, and the bounds on both bound it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from networks import make_batch, make_mlp, snapshot, unchanged
from teleports import teleport_mlp
from torch import Tensor, nn

from symtele_cuda.model.surroundings import NOISE, with_noise

DIMS = [20, 24, 22, 5]
ACTIVATIONS = ["leaky_relu", "tanh", "softplus"]


def sensitivity(model: nn.Module, x: Tensor) -> float:
    """√(1/N Σ ‖z(x + ε) − z(x)‖²) of the model itself."""
    with torch.no_grad():
        return float((model(with_noise(x)) - model(x)).square().sum(1).mean().sqrt())


def changes_of(before: nn.Sequential, after: nn.Sequential) -> list[float]:
    """‖[W', b'] − [W, b]‖ / ‖[W, b]‖ of every Linear, and of all."""
    layers = [
        [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in model if isinstance(m, nn.Linear)]
        for model in (before, after)
    ]
    layers = [[*vectors, torch.cat(vectors)] for vectors in layers]
    return [float((new - old).norm() / old.norm()) for old, new in zip(*layers, strict=True)]


@pytest.mark.parametrize("holdout", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_report_tells_what_noise_does_and_how_far_the_weights_moved(activation, bias, holdout):
    model = make_mlp(DIMS, activation, bias=bias)
    before, batch, other = copy.deepcopy(model), make_batch(12, 20, 5), make_batch(30, 20, 5, seed=7)
    report = teleport_mlp(model, batch, holdout=other if holdout else None, holdout_tol=math.inf)
    x = other[0] if holdout else batch[0]
    assert report.accepted
    assert report.sensitivity_before == pytest.approx(sensitivity(before, x), rel=1e-9)
    assert report.sensitivity_after == pytest.approx(sensitivity(model, x), rel=1e-9)
    *layers, whole = changes_of(before, model)
    assert report.weight_changes == pytest.approx(layers, rel=1e-9) and report.weight_change == pytest.approx(whole)


def test_noise_is_of_a_share_of_the_inputs_spread_and_the_same_every_time():
    x = 3.0 + 5.0 * make_batch(400, 50, 5)[0]
    state = torch.get_rng_state()
    noise = with_noise(x) - x
    assert float(noise.std()) == pytest.approx(NOISE * float(x.std()), rel=0.02)
    assert abs(float(noise.mean())) < 0.02 * float(x.std())
    assert torch.equal(with_noise(x) - x, noise) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(with_noise(torch.ones(3, 4)), torch.ones(3, 4))  # of constant inputs the noise is none


@pytest.mark.parametrize("objective", ["grad_norm", "lookahead"])
@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
@pytest.mark.parametrize("most", [1.02, 1.2])
def test_no_teleport_makes_the_model_more_sensitive_than_it_may(most, activation, objective):
    batch, held = make_batch(12, 20, 5), make_batch(30, 20, 5, seed=7)
    options = dict(objective=objective, lr=0.5, holdout=held, holdout_tol=math.inf, max_growth=math.inf, steps=8)
    free, bounded = (make_mlp(DIMS, activation) for _ in range(2))
    start = sensitivity(free, held[0])
    teleport_mlp(free, batch, **options)
    report = teleport_mlp(bounded, batch, max_sensitivity=most, **options)
    assert sensitivity(free, held[0]) > most * start  # without the bound it would be
    assert sensitivity(bounded, held[0]) <= most * start
    assert any("more than max_sensitivity" in record.note for record in report.trace)
    assert report.accepted or "max_sensitivity" in report.reason


@pytest.mark.parametrize("most", [1e-3, 0.5, 1.0])
def test_no_weight_layer_changes_more_than_it_may(most):
    model, before = make_mlp(DIMS), make_mlp(DIMS)
    report = teleport_mlp(model, make_batch(12, 20, 5), max_growth=math.inf, max_weight_change=most)
    *layers, _ = changes_of(before, model)
    assert max(layers) <= most
    if most == 1e-3:
        assert not report.accepted and unchanged(model, snapshot(before))
        assert "would change by" in report.reason and len(str(report)) <= 120
    else:
        assert report.accepted and report.steps < sum(record.accepted for record in report.trace)
        assert report.reason.startswith("later steps were taken back")


@pytest.mark.parametrize("name", ["max_weight_change", "max_sensitivity"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_bound_is_a_positive_number(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number > 0, got"):
        teleport_mlp(make_mlp(DIMS), make_batch(12, 20, 5), **{name: value})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_what_is_written_is_finite_in_every_dtype(activation, dtype):
    accepted = 0
    for seed in range(6):
        model = make_mlp([8, 8, 3], activation, seed=seed).to(dtype)
        x, y = make_batch(4, 8, 3, seed=seed)
        report = teleport_mlp(model, ((x * 1e-4).to(dtype), y), max_growth=100.0, steps=20, drift_tol=0.1)
        accepted += report.accepted
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        assert all(map(math.isfinite, report.weight_changes))
    assert accepted > 0


def test_a_holdout_with_a_loss_of_0_does_not_refuse_where_it_is_only_reported():
    model, (x, _) = make_mlp(DIMS, bias=False), make_batch(12, 20, 5)
    holdout = torch.zeros(9, 20, dtype=x.dtype), torch.zeros(9, 5, dtype=x.dtype)
    report = teleport_mlp(model, (x, torch.randn(12, 5, dtype=x.dtype)), holdout=holdout, holdout_tol=math.inf)
    assert report.accepted, report.reason
    assert report.holdout_before == report.holdout_after == 0
