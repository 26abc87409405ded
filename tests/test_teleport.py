"""teleport_mlp end to end: the function is kept, the report is true, the guards guard, nothing is left behind."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from networks import ACTIVATIONS, make_batch, make_mlp, snapshot, unchanged
from teleports import teleport_mlp
from torch import nn

import symtele_cuda as st

# Float32 keeps the loss to 1e-5 and float64 to 1e-12 relative after ten steps: the promise of the README.
DRIFT = {torch.float32: 1e-5, torch.float64: 1e-12}


def gradient_norm(model, x, y, loss_fn=F.cross_entropy):
    gradients = torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))
    return math.sqrt(sum(float(g.square().sum()) for g in gradients))


@pytest.mark.parametrize("dtype", DRIFT)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ten_steps_keep_the_function_on_the_batch_and_raise_the_gradient(activation, bias, dtype):
    model = make_mlp([30, 40, 36, 5], activation, bias=bias, dtype=dtype)
    x, y = make_batch(20, 30, 5, dtype=dtype)
    outputs, before = model(x).detach(), gradient_norm(model, x, y)
    report = teleport_mlp(model, (x, y), max_growth=10.0)
    assert report.accepted and report.steps >= 1
    assert report.drift <= DRIFT[dtype]
    assert report.loss_after == pytest.approx(F.cross_entropy(model(x), y).item(), rel=DRIFT[dtype])
    assert torch.allclose(model(x), outputs, rtol=0, atol=100 * DRIFT[dtype] * outputs.abs().max().item())
    assert before < gradient_norm(model, x, y) <= 10.0 * before * 1.001


@pytest.mark.parametrize("objective", ["grad_norm", "lookahead"])
@pytest.mark.parametrize("dims", [[30, 40, 36, 5], [30, 12, 40, 5], [30, 40, 9, 5], [30, 40, 5]], ids=str)
def test_the_report_tells_the_truth_about_the_written_weights(dims, objective):
    model = make_mlp(dims, "softplus")
    x, y = make_batch(20, 30, 5)
    norm_before, loss_before = gradient_norm(model, x, y), F.cross_entropy(model(x), y).item()
    report = teleport_mlp(model, (x, y), objective=objective, lr=0.02, max_growth=3.0)
    assert report.accepted
    assert report.grad_norm_before == pytest.approx(norm_before, rel=1e-9)
    assert report.grad_norm_after == pytest.approx(gradient_norm(model, x, y), rel=1e-7)
    assert report.loss_before == pytest.approx(loss_before, rel=1e-12)
    if objective == "grad_norm":
        assert report.objective_after == pytest.approx(report.grad_norm_after**2, rel=1e-9)
    else:
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 4.0 * 0.02 * gradient
        assert report.objective_after == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-7)
        assert report.objective_after < report.objective_before
    assert len(report.trace) <= 10 and report.steps == sum(record.accepted for record in report.trace)
    assert str(report).startswith("teleported: objective ") and len(str(report)) <= 120 and "\n" not in str(report)
    assert repr(report) == str(report) and "drift of the loss" in report.describe()


@pytest.mark.parametrize("bias", [True, False])
def test_least_change_moves_the_weights_no_further_than_the_paper_action(bias):
    x, y = make_batch(20, 30, 5)
    moved = {}
    for action in ("least_change", "paper"):
        model = make_mlp([30, 40, 36, 5], bias=bias)
        before = snapshot(model)
        teleport_mlp(model, (x, y), method=st.Published(1e-12, steps=1, action=action))
        moved[action] = sum(float((p - q).square().sum()) for p, q in zip(snapshot(model), before, strict=True))
    assert moved["least_change"] < 1e-10 * moved["paper"]


@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
def test_for_square_invertible_activations_the_two_actions_agree(activation):
    x, y = make_batch(20, 20, 5)
    models = [make_mlp([20, 20, 20, 5], activation, bias=False) for _ in range(2)]
    for model, action in zip(models, ("least_change", "paper"), strict=True):
        assert teleport_mlp(model, (x, y), method=st.Published(1e-3, steps=3, inverse="exact", action=action)).accepted
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        # κ of square random activations is some 1e4, and it enters squared through the search's K⁻¹.
        assert float((first - second).detach().norm() / second.detach().norm()) <= 1e-6


def test_growth_cap_is_reached_and_kept():
    model = make_mlp([30, 40, 36, 5])
    x, y = make_batch(20, 30, 5)
    before = gradient_norm(model, x, y)
    report = teleport_mlp(model, (x, y), max_growth=1.5, steps=30)
    assert report.reason == "growth cap reached"
    assert 1.4 * before <= gradient_norm(model, x, y) <= 1.5 * before * (1 + 1e-9)


def test_layers_names_the_hidden_layers_to_move():
    model = make_mlp([30, 40, 36, 34, 5])
    before = snapshot(model)
    report = teleport_mlp(model, make_batch(20, 30, 5), layers=[1])
    assert [layer.teleported for layer in report.layers] == [True, False, False]
    changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert changed == [True, True, True, True, False, False, False, False]


def test_a_narrow_layer_is_carried_and_the_layer_behind_it_stays_where_it_is():
    model = make_mlp([30, 40, 9, 36, 5])
    x, y = make_batch(20, 30, 5)
    report = teleport_mlp(model, (x, y))
    assert report.accepted and report.drift <= 1e-12
    assert [layer.teleported for layer in report.layers] == [True, True, False]
    assert "20 samples cannot be independent" in report.layers[2].reason and report.layers[2].rank == 10


def test_duplicated_samples_are_recognised_per_layer():
    x, y = make_batch(20, 30, 5)
    x[7] = x[3]
    with pytest.raises(st.TeleportError, match="rank 19"):
        teleport_mlp(make_mlp([30, 40, 36, 5]), (x, y))


@pytest.mark.parametrize("objective", ["grad_norm", "lookahead"])
def test_holdout_guard_bounds_the_rise_and_reports_it(objective):
    x, y = make_batch(20, 30, 5)
    held = make_batch(50, 30, 5, seed=2)
    rises = []
    for tolerance in (0.02, math.inf):
        model = make_mlp([30, 40, 36, 5])
        report = teleport_mlp(
            model, (x, y), objective=objective, lr=0.1, max_growth=50.0, holdout=held, holdout_tol=tolerance
        )
        assert report.holdout_after == pytest.approx(F.cross_entropy(model(held[0]), held[1]).item(), rel=1e-9)
        rises.append(report.holdout_after / report.holdout_before - 1)
    assert rises[0] <= 0.02 < rises[1]


def holdout_ahead(model, batch, held, lr):
    """The loss on `held` after a gradient step on `batch`."""
    stepped = copy.deepcopy(model)
    gradients = torch.autograd.grad(F.cross_entropy(stepped(batch[0]), batch[1]), list(stepped.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(stepped.parameters(), gradients, strict=True):
            parameter -= lr * gradient
        return F.cross_entropy(stepped(held[0]), held[1]).item()


def own_step_ahead(lr: float) -> st.OptimizerLookahead:
    """What objective="lookahead" with margin=1 is, by the general path."""
    return st.OptimizerLookahead(lambda parameters, gradients: [lr * each for each in gradients], margin=1.0)


@pytest.mark.parametrize("own_objective", [False, True], ids=["activation space", "general path"])
def test_a_lookahead_must_also_gain_on_the_holdout(own_objective):
    lr, accepted, refused = 0.3, 0, 0
    for seed in range(8):
        model = make_mlp([30, 40, 36, 5])
        batch, held, untouched = make_batch(20, 30, 5, seed=seed), make_batch(15, 30, 5, seed=50), copy.deepcopy(model)
        objective = own_step_ahead(lr) if own_objective else "lookahead"
        options = dict(objective=objective, lr=lr, margin=1.0, holdout=held, holdout_tol=10.0)
        report = teleport_mlp(model, batch, **options)
        before, after = (holdout_ahead(each, batch, held, lr) for each in (untouched, model))
        assert after < before if report.accepted else after == before
        free = copy.deepcopy(untouched)
        unguarded = teleport_mlp(free, batch, **(options | {"holdout_tol": math.inf}))
        if holdout_ahead(free, batch, held, lr) >= before:
            refused += 1
            assert report.steps < unguarded.steps
            reason = "later steps were taken back" if report.accepted else "the step ahead would take the holdout loss"
            assert reason in report.reason
        accepted += report.accepted
    assert accepted > 0 and refused > 0


@pytest.mark.parametrize("own_objective", [False, True], ids=["activation space", "general path"])
def test_min_gain_is_the_factor_by_which_the_step_ahead_lowers_the_loss_more(own_objective):
    batch, lr = make_batch(20, 30, 5), 0.05
    options = dict(objective=own_step_ahead(lr) if own_objective else "lookahead", lr=lr, margin=1.0, steps=4)
    free = teleport_mlp(make_mlp([30, 40, 36, 5]), batch, **options)
    assert free.objective_before < free.loss_before
    factor = (free.loss_before - free.objective_after) / (free.loss_before - free.objective_before)
    met = teleport_mlp(make_mlp([30, 40, 36, 5]), batch, **options, min_gain=0.999 * factor)
    assert met.accepted and met.steps == free.steps
    model = make_mlp([30, 40, 36, 5])
    before = snapshot(model)
    missed = teleport_mlp(model, batch, **options, min_gain=1.001 * factor)
    gain = free.loss_before - free.objective_after  # of the last state: the earlier ones gain less
    assert not missed.accepted and f"lower the loss by {gain:.4g}, less than min_gain asks for" in missed.reason
    assert missed.trace == free.trace and unchanged(model, before)


@pytest.mark.parametrize("own_objective", [False, True], ids=["activation space", "general path"])
def test_with_min_gain_there_is_no_search_where_the_step_ahead_is_too_long(own_objective):
    batch, lr = make_batch(20, 30, 5), 100.0
    options = dict(objective=own_step_ahead(lr) if own_objective else "lookahead", lr=lr, margin=1.0)
    assert teleport_mlp(make_mlp([30, 40, 36, 5]), batch, **options).accepted
    model = make_mlp([30, 40, 36, 5])
    before = snapshot(model)
    report = teleport_mlp(model, batch, **options, min_gain=1e-9)
    assert report.objective_before > report.loss_before
    assert not report.accepted and report.trace == () and "the step ahead does not lower the loss" in report.reason
    assert unchanged(model, before)


@pytest.mark.parametrize(
    "options", [dict(objective="grad_norm"), dict(method=st.Published(1e-6))], ids=["grad_norm", "published"]
)
def test_min_gain_is_for_searches_that_look_ahead(options):
    batch, model = make_batch(20, 30, 5), make_mlp([30, 40, 36, 5])
    assert teleport_mlp(model, batch, **options, min_gain=1e6).accepted


def test_drift_guard_refuses_and_leaves_the_model_alone():
    model = make_mlp([30, 40, 36, 5], dtype=torch.float32)
    before = snapshot(model)
    report = teleport_mlp(model, make_batch(20, 30, 5, dtype=torch.float32), drift_tol=1e-30)
    # Either rounding moved the loss, and the weights stay, or it did not move it at all.
    assert report.drift == 0.0
    assert report.accepted or (unchanged(model, before) and "drift" in report.reason)


@pytest.mark.parametrize("inverse", ["exact", "first_order"])
def test_fixed_steps_follow_the_published_rule_without_guards(inverse):
    model = make_mlp([30, 40, 36, 5], bias=False)
    x, y = make_batch(20, 30, 5)
    report = teleport_mlp(model, (x, y), method=st.Published(1e-3, steps=4, inverse=inverse))
    assert report.accepted and report.steps == 4
    assert {record.size for record in report.trace} == {1e-3}
    assert (report.drift <= 1e-12) == (inverse == "exact")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_teleport_in_float32_and_round_once(dtype):
    x, y = make_batch(20, 30, 5, dtype=dtype)
    half = make_mlp([30, 40, 36, 5], dtype=dtype)
    single = make_mlp([30, 40, 36, 5], dtype=dtype).float()
    for model, inputs in ((half, x), (single, x.float())):
        assert teleport_mlp(model, (inputs, y), drift_tol=0.1).accepted
    assert all(p.dtype == dtype for p in half.parameters())
    assert all(torch.equal(p, q.to(dtype)) for p, q in zip(half.parameters(), single.parameters(), strict=True))


def test_the_guards_judge_a_half_precision_model_after_its_rounding():
    x, y = make_batch(20, 30, 5, dtype=torch.bfloat16)
    model = make_mlp([30, 40, 36, 5], dtype=torch.bfloat16)
    before, loss = snapshot(model), F.cross_entropy(model.float()(x.float()), y).item()
    model.bfloat16()
    report = teleport_mlp(model, (x, y), drift_tol=1e-12)
    assert not report.accepted and "drift" in report.reason and unchanged(model, before)
    assert teleport_mlp(model, (x, y), drift_tol=1e-2).drift <= 1e-2
    assert abs(F.cross_entropy(model.float()(x.float()), y).item() / loss - 1) <= 1e-2


def test_weights_beyond_the_range_of_float16_are_not_written():
    model = make_mlp([4, 16, 1], bias=False).half()
    with torch.no_grad():
        model[0].weight.div_(model[0].weight.abs().max()).mul_(6e4)
        model[2].weight.mul_(1e-3)
    x, y = 1e-3 * make_batch(2, 4, 1)[0].half(), torch.randn(2, 1, generator=torch.Generator().manual_seed(0)).half()
    teleport_mlp(model, (x, y), steps=40, max_growth=1e6, drift_tol=0.5)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_the_gradient_norm_is_right_where_almost_nothing_is_left_of_it():
    """A linear head fitted to its features: δ lies in the null space of [B, 1]ᵀ, and ⟨δ, K δ⟩ would be rounding
    alone."""
    model = make_mlp([20, 3, 2], "tanh", dtype=torch.float32)
    x, _ = make_batch(12, 20, 2, dtype=torch.float32)
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.zero_()
        features = torch.cat([model[1](model[0](x)), torch.ones(12, 1)], 1).double()
        y = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        y = (y - features @ torch.linalg.lstsq(features, y).solution).float()
    true = gradient_norm(model.double(), x.double(), y.double(), F.mse_loss)
    report = teleport_mlp(model.float(), (x, y), objective="lookahead", lr=0.1)
    assert report.grad_norm_before == pytest.approx(true, abs=1e-6)


@pytest.mark.parametrize("objective", ["grad_norm", "lookahead"])
def test_a_loss_with_weight_terms_takes_the_general_path(objective):
    model = make_mlp([30, 40, 36, 5], "tanh")
    x, y = make_batch(20, 30, 5)

    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs, targets) + 1e-2 * sum(p.square().sum() for p in model.parameters())

    before = gradient_norm(model, x, y, loss_fn)
    report = teleport_mlp(model, (x, y), loss_fn, objective=objective, lr=0.02)
    assert report.accepted and report.drift <= 1e-12
    assert report.grad_norm_before == pytest.approx(before, rel=1e-9)
    assert report.grad_norm_after == pytest.approx(gradient_norm(model, x, y, loss_fn), rel=1e-7)
    assert report.loss_after == pytest.approx(loss_fn(model(x), y).item(), rel=1e-9)


def test_a_vanishing_weight_term_gives_the_fast_path_s_teleport():
    x, y = make_batch(20, 30, 5)
    plain, weighted = make_mlp([30, 40, 36, 5]), make_mlp([30, 40, 36, 5])

    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs, targets) + 0.0 * sum(p.sum() for p in weighted.parameters())

    teleport_mlp(plain, (x, y))
    teleport_mlp(weighted, (x, y), loss_fn)
    for first, second in zip(plain.parameters(), weighted.parameters(), strict=True):
        assert torch.allclose(first, second, rtol=1e-8, atol=1e-10)


def test_a_user_supplied_objective():
    class SmallerFirstLayer:
        """Least Frobenius norm of the first layer's weights: needs neither the loss nor its gradient."""

        maximise = False

        def value(self, loss_of, parameters):
            return parameters[0].square().sum()

    model = make_mlp([30, 40, 36, 5])
    x, y = make_batch(20, 30, 5)
    outputs, before = model(x).detach(), float(model[0].weight.detach().square().sum())
    report = teleport_mlp(model, (x, y), objective=SmallerFirstLayer())
    after = float(model[0].weight.detach().square().sum())
    assert report.accepted and after < before
    assert report.objective_after == pytest.approx(after, rel=1e-9)
    assert torch.allclose(model(x), outputs, rtol=0, atol=1e-11)


def test_a_subclass_of_an_objective_is_asked_for_its_own_value():
    class Louder(st.GradNorm):
        def value(self, loss_of, parameters):
            return 1000 * super().value(loss_of, parameters)

    report = teleport_mlp(make_mlp([30, 40, 36, 5]), make_batch(20, 30, 5), objective=Louder())
    assert report.objective_before == pytest.approx(1000 * report.grad_norm_before**2, rel=1e-9)
    assert report.accepted and report.objective_after == pytest.approx(1000 * report.grad_norm_after**2, rel=1e-9)


def test_what_an_objective_does_to_its_tensors_does_not_reach_the_model():
    class Vandal:
        maximise = True

        def value(self, loss_of, parameters):
            value = parameters[0].square().sum()
            with torch.no_grad():
                parameters[-1].add_(1.0)
            return value

    model = make_mlp([30, 40, 36, 34, 5])
    before = model[-1].bias.detach().clone()
    assert teleport_mlp(model, make_batch(20, 30, 5), objective=Vandal(), layers=[1]).accepted
    assert torch.equal(model[-1].bias, before)


@pytest.mark.parametrize("max_growth", [1.005, 1e200, math.inf])
def test_any_growth_factor_above_one_is_a_cap(max_growth):
    model = make_mlp([30, 40, 36, 5])
    x, y = make_batch(20, 30, 5)
    report = teleport_mlp(model, (x, y), max_growth=max_growth)
    assert report.accepted
    assert 1 < report.grad_norm_after / report.grad_norm_before <= max_growth * (1 + 1e-9)


def test_mean_squared_error_and_a_trailing_activation():
    model = nn.Sequential(make_mlp([30, 40, 36, 5], "tanh"), nn.Sigmoid())
    x, _ = make_batch(20, 30, 5)
    y = torch.rand(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before = gradient_norm(model, x, y, F.mse_loss)
    report = teleport_mlp(model, (x, y))
    assert report.accepted and report.drift <= 1e-12
    assert report.grad_norm_before == pytest.approx(before, rel=1e-9)
    assert report.grad_norm_after == pytest.approx(gradient_norm(model, x, y, F.mse_loss), rel=1e-7)


def test_images_are_flattened_and_inactive_dropout_is_passed_over():
    model = nn.Sequential(nn.Flatten(), make_mlp([36, 40, 5]), nn.Dropout(0.5)).eval()
    x = torch.randn(20, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    report = teleport_mlp(model, (x, make_batch(20, 36, 5)[1]))
    assert report.accepted and not model.training


def test_only_the_parameter_values_change():
    model = make_mlp([30, 40, 36, 5], dtype=torch.float32)
    x, y = make_batch(20, 30, 5, dtype=torch.float32)
    parameters, pointers = list(model.parameters()), [p.data_ptr() for p in model.parameters()]
    F.cross_entropy(model(x), y).backward()
    gradients = [p.grad.clone() for p in parameters]
    model.eval()
    random_state = torch.get_rng_state()
    assert teleport_mlp(model, (x, y)).accepted
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert [p.data_ptr() for p in parameters] == pointers
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))
    assert all(p.requires_grad and p.is_leaf for p in parameters) and not model.training
    assert torch.equal(torch.get_rng_state(), random_state) and torch.is_grad_enabled()


def test_nothing_of_the_batch_is_kept_alive():
    x, y = make_batch(20, 30, 5)
    references = [weakref.ref(x), weakref.ref(y)]
    report = teleport_mlp(make_mlp([30, 40, 36, 5]), (x, y))
    del x, y
    gc.collect()
    assert report.accepted and [reference() for reference in references] == [None, None]


@pytest.mark.parametrize("context", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_caller_s_autograd_and_autocast_modes_do_not_matter(context):
    x, y = make_batch(20, 30, 5, dtype=torch.float32)
    plain, inside = (make_mlp([30, 40, 36, 5], dtype=torch.float32) for _ in range(2))
    teleport_mlp(plain, (x, y))
    with context():
        teleport_mlp(inside, (x, y))
    assert unchanged(inside, snapshot(plain))


def test_the_same_call_gives_the_same_weights():
    x, y = make_batch(20, 30, 5, dtype=torch.float32)
    first, second = (make_mlp([30, 40, 36, 5], dtype=torch.float32) for _ in range(2))
    for model in (first, second):
        teleport_mlp(model, (x, y), objective="lookahead", lr=0.1)
    assert unchanged(first, snapshot(second))
