"""`Standardise`: the pre-activations that it makes, what it keeps, what its guards refuse, the ridge it chooses."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import ACTIVATIONS, make_batch, make_mlp, snapshot, unchanged
from torch import Tensor, nn

import symtele_cuda as st
from symtele_cuda.methods.standardise import NOTICED, RIDGES, fit_ridge
from symtele_cuda.model.problem import Problem
from symtele_cuda.model.reader import read_chain
from symtele_cuda.objectives.best_decrease import SHARES, BestDecrease

FREE = st.Guards(max_sensitivity=math.inf, max_weight_change=math.inf, holdout_tol=math.inf)
KINDS = [*ACTIVATIONS, "relu"]
SPREADS = {"sigmoid": 4.0, "softplus": 4.0, "flipped_tanh": 2.0 / 0.7}


def make(kind: str, dims: list[int] | None = None, **options: Any) -> nn.Sequential:
    if kind != "relu":
        return make_mlp(dims or [12, 24, 30, 4], kind, **options)
    model = make_mlp(dims or [12, 24, 30, 4], **options)
    return nn.Sequential(*(nn.ReLU() if isinstance(one, nn.LeakyReLU) else one for one in model))


def hidden_outputs(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The pre-activations of the hidden layers."""
    found = []
    for module in model:
        x = module(x)
        if isinstance(module, nn.Linear):
            found.append(x.detach())
    return found[:-1]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_keeps_the_outputs_on_the_batch(kind: str, dtype: torch.dtype, bias: bool) -> None:
    model, (x, y) = make(kind, dtype=dtype, bias=bias), make_batch(10, 12, 4, dtype=dtype)
    before = model(x).detach()
    report = st.teleport_mlp(model, (x, y), method=st.Standardise(), guards=FREE)
    assert report.accepted, report.reason
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(model(x).detach(), before, rtol=tolerance, atol=tolerance)
    for output in hidden_outputs(model, x):
        centred = output - output.mean(0) if bias else output
        centre = -0.1 / 0.7 if kind == "flipped_tanh" and bias else 0.0
        assert centred.square().mean().sqrt().item() == pytest.approx(SPREADS.get(kind, 2.0), rel=1e-3)
        if bias:
            torch.testing.assert_close(output.mean(0), torch.full_like(output[0], centre), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_refitted_keep_the_function_of_a_trained_network_on_other_samples(kind: str) -> None:
    model, x, y = trained(kind)
    own, others = slice(300), slice(300, None)
    before = model(x).detach()
    guards = dataclasses.replace(FREE, holdout=(x[others], y[others]))
    method = st.Standardise(refit="all", least_kept=0.8)
    report = st.teleport_mlp(model, (x[own], y[own]), method=method, guards=guards)
    assert report.accepted, report.reason
    after = model(x).detach()
    for rows, kept in ((own, report.kept), (others, report.holdout_kept)):
        assert kept == pytest.approx((before[rows].argmax(1) == after[rows].argmax(1)).double().mean().item())
    assert report.holdout_kept is not None and report.holdout_kept > 0.8
    for output in hidden_outputs(model, x[own]):
        spread = (output - output.mean(0)).square().mean().sqrt().item()
        assert spread == pytest.approx(SPREADS.get(kind, 2.0), rel=1e-6)


def trained(kind: str = "tanh") -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small network that knows the sign of a sum, its samples and their classes."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 12, generator=generator, dtype=torch.float64)
    y = (x[:, :3].sum(1) > 0).long() + (x[:, 3:6].sum(1) > 0).long()
    model = make(kind, [12, 48, 48, 3])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


def test_a_number_is_the_spread_of_every_layer_and_a_smaller_one_less_sensitive_to_noise() -> None:
    model, (x, y) = make("leaky_relu"), make_batch(10, 12, 4)
    noise = []
    for spread in (0.5, 3.0):
        twin = copy.deepcopy(model)
        report = st.teleport_mlp(twin, (x, y), method=st.Standardise(spread=spread), guards=FREE)
        assert all(
            (output - output.mean(0)).square().mean().sqrt().item() == pytest.approx(spread)
            for output in hidden_outputs(twin, x)
        )
        noise.append(report.sensitivity_after)
    assert noise[0] < noise[1]


def test_layers_that_are_not_asked_for_keep_their_weights() -> None:
    model, (x, y) = make("tanh"), make_batch(10, 12, 4)
    first = snapshot(model[0])
    report = st.teleport_mlp(model, (x, y), method=st.Standardise(), layers=[2], guards=FREE)
    assert unchanged(model[0], first)
    assert [layer.teleported for layer in report.layers] == [False, True]
    assert report.weight_changes[0] == 0 and min(report.weight_changes[1:]) > 0


def test_it_is_deterministic() -> None:
    results = []
    for _ in range(2):
        model, x, y = trained()
        st.teleport_mlp(model, (x, y), method=st.Standardise(refit="all"))
        results.append(snapshot(model))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_models_are_rounded_once_at_the_end_and_judged_as_they_will_stand(dtype: torch.dtype) -> None:
    model, x, y = trained("leaky_relu")
    model, x = model.to(dtype), x.to(dtype)
    twin = copy.deepcopy(model).float()
    method = st.Standardise(refit="all")
    report = st.teleport_mlp(model, (x, y), method=method, guards=FREE)
    st.teleport_mlp(twin, (x.float(), y), method=method, guards=FREE)
    assert report.accepted, report.reason
    for parameter, exact in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.float(), exact.to(dtype).float())
    assert report.loss_after == pytest.approx(F.cross_entropy(model.float()(x.float()), y).item(), rel=1e-4)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_error_of_the_loss_leaves_the_model(call: int) -> None:
    model, (x, y) = make("tanh"), make_batch(10, 12, 4)
    before, calls = snapshot(model), [0]

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == call:
            raise RuntimeError("no loss")
        return F.cross_entropy(outputs, targets)

    with pytest.raises(RuntimeError, match="no loss"):
        st.teleport_mlp(model, (x, y), loss_fn, method=st.Standardise(), guards=FREE)
    assert unchanged(model, before) and torch.is_grad_enabled()


# --- the ridge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("n", [6, 40], ids=["wide", "tall"])
def test_the_ridge_regression_is_that_of_the_normal_equations(n: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    b, t = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (9, 3))
    penalty = 0.3 * (b - b.mean(0) if bias else b).square().sum() / 9
    extended = torch.cat([b, torch.ones(n, 1, dtype=b.dtype)], 1) if bias else b
    diagonal = torch.full((9,), float(penalty), dtype=b.dtype)
    diagonal = torch.cat([diagonal, torch.zeros(1, dtype=b.dtype)]) if bias else diagonal
    expected = torch.linalg.solve(extended.T @ extended + torch.diag(diagonal), extended.T @ t).T
    weight, shift = fit_ridge(b, t, torch.zeros(3) if bias else None, 0.3)
    torch.testing.assert_close(weight, expected[:, :9])
    if bias:
        assert shift is not None
        torch.testing.assert_close(shift.double(), expected[:, 9], rtol=1e-6, atol=1e-6)
    else:
        assert shift is None


@pytest.mark.parametrize("n", [12, 60], ids=["wide", "tall"])
def test_auto_takes_the_largest_ridge_that_cross_validation_hardly_notices(n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    b, noise = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (20, 4))
    b = b * torch.logspace(0, -3, 20, dtype=torch.float64)
    t = b @ torch.randn(20, 4, generator=generator, dtype=torch.float64) + 0.1 * noise
    errors = []
    for ridge in RIDGES:
        weight, shift = fit_ridge(b, t, torch.zeros(4), ridge)
        hat = torch.stack([fitted(b, one, ridge) for one in torch.eye(n, dtype=b.dtype)], 1)
        left = t - b @ weight.T - shift
        errors.append((left.square().sum() / (1 - hat.trace() / n) ** 2).item())
    expected = max(ridge for ridge, error in zip(RIDGES, errors, strict=True) if error <= NOTICED * min(errors))
    assert expected not in (RIDGES[0], RIDGES[-1])
    torch.testing.assert_close(fit_ridge(b, t, torch.zeros(4), "auto")[0], fit_ridge(b, t, torch.zeros(4), expected)[0])


def fitted(b: Tensor, target: Tensor, ridge: float) -> Tensor:
    """What the regression makes of one target: a column of the hat matrix."""
    weight, shift = fit_ridge(b, target[:, None], torch.zeros(1, dtype=b.dtype), ridge)
    assert shift is not None
    return (b @ weight.T + shift)[:, 0]


# --- guards -----------------------------------------------------------------------------------------------------------


def refused(model: nn.Sequential, batch: tuple[Tensor, Tensor], text: str, guards: st.Guards, **options: Any) -> None:
    before = snapshot(model)
    report = st.teleport_mlp(model, batch, method=st.Standardise(**options), guards=guards)
    assert not report.accepted and text in report.reason, report.reason
    assert unchanged(model, before)


def test_each_guard_refuses_in_plain_words_and_leaves_the_model() -> None:
    model, x, y = trained()
    batch, others = (x[:300], y[:300]), (x[300:], y[300:])
    noisy = st.Guards(max_sensitivity=1e-3)
    refused(model, batch, "noise in the inputs would move the logits", noisy, refit="all")
    refused(model, batch, "more than max_weight_change = 0.01", st.Guards(max_weight_change=0.01), refit="all")
    refused(model, batch, "of the predictions on the batch would stay", st.Guards(), refit="all", ridge=1e3)
    worse = st.Guards(holdout=others, holdout_tol=0.0)
    refused(model, batch, "the holdout loss rose", worse, refit="all", ridge=1e3, least_kept=0.0)
    gain = st.Guards(min_gain=50.0)
    refused(model, batch, "less than min_gain = 50 times as much", gain, refit="all")
    refused(model, (x[:10], y[:10]), "the holdout loss rose", st.Guards(holdout=others, max_sensitivity=math.inf))


def descend(model: nn.Sequential, batch: tuple[Tensor, Tensor], rate: float, steps: int) -> float:
    """The loss after so many gradient steps of a copy."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return F.mse_loss(model(batch[0]), batch[1]).item()


def make_regression() -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(200, 12, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(12, 64), nn.LeakyReLU(0.1), nn.Linear(64, 64), nn.LeakyReLU(0.1), nn.Linear(64, 1))
    return model.double(), (x, x[:, :1] + 0.1 * torch.randn(200, 1, dtype=torch.float64))


def test_a_rate_that_is_too_large_for_standardised_weights_is_seen_in_two_steps() -> None:
    method, free = st.Standardise(refit="all", least_kept=0.0), dataclasses.replace(FREE, min_gain=0.0)
    for rate in (1e-4, 1e-3, 1e-2, 1e-1):
        model, batch = make_regression()
        teleported = copy.deepcopy(model)
        assert st.teleport_mlp(teleported, batch, method=method, guards=free).accepted
        now, alone, ahead = (descend(*run) for run in (
            (model, batch, rate, 0), (model, batch, rate, 2), (teleported, batch, rate, 2),
        ))  # fmt: skip
        assert alone < now
        before = snapshot(model)
        report = st.teleport_mlp(model, batch, method=method, guards=dataclasses.replace(free, rate=rate))
        assert report.accepted == (ahead <= now) == (rate < 0.05)
        if not report.accepted:
            assert unchanged(model, before)
            text = f"2 gradient steps of rate {rate:g} would take the loss on the batch from {now:.4g} to {ahead:.4g}"
            assert f"{text}, without the teleport to {alone:.4g}" in report.reason
    model, batch = make_regression()
    too_large = dataclasses.replace(free, rate=1.0)  # for the model as it is, too, but less so
    assert descend(model, batch, 1.0, 2) > descend(model, batch, 1.0, 0)
    assert "without the teleport" in st.teleport_mlp(model, batch, method=method, guards=too_large).reason
    hopeless = dataclasses.replace(free, rate=1e300)
    assert st.teleport_mlp(model, batch, method=method, guards=hopeless).accepted
    with pytest.raises(ValueError, match="rate must be"):
        st.Guards(rate=-1.0)


def test_a_teleporter_reads_the_rate_off_sgd_alone() -> None:
    for make_optimizer, accepted in (
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), False),
        (lambda p: torch.optim.SGD(p, 1e-3), True),
        (lambda p: torch.optim.Adam(p, 0.1), True),
    ):
        model, batch = make_regression()
        teleporter = st.Teleporter(model, make_optimizer(model.parameters()), guards=dataclasses.replace(FREE))
        assert teleporter.refresh(batch).accepted == accepted
    model, batch = make_regression()
    own = dataclasses.replace(FREE, rate=1e-3)
    assert st.Teleporter(model, torch.optim.SGD(model.parameters(), 0.1), guards=own).refresh(batch).accepted


def test_the_share_of_a_regression_that_is_kept_is_one_less_the_relative_change() -> None:
    model, (x, _) = make("tanh", [12, 16, 16, 2]), make_batch(200, 12, 4)
    targets = torch.stack([x.sum(1), x[:, 0]], 1)
    before = model(x).detach()
    method = st.Standardise(refit="all", least_kept=0.0)
    report = st.teleport_mlp(model, (x, targets), method=method, guards=FREE)
    change = (model(x).detach() - before).norm() / (before - before.mean(0)).norm()
    assert report.kept == pytest.approx(1 - change.item())


def test_pre_activations_that_do_not_vary_are_refused() -> None:
    model, (x, y) = make("tanh"), make_batch(10, 12, 4)
    with torch.no_grad():
        model[0].weight.zero_()
    refused(model, (x, y), "hidden layer 1: its pre-activations do not vary over the samples", FREE)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"spread": 0.0}, ValueError, "spread must be a finite number > 0, got 0.0"),
        ({"spread": "wide"}, ValueError, "spread must be one of 'auto', got 'wide'"),
        ({"ridge": -1.0}, ValueError, "ridge must be a finite number > 0, got -1.0"),
        ({"refit": "some"}, ValueError, "refit must be one of 'last', 'all', got 'some'"),
        ({"least_kept": 1.5}, ValueError, "least_kept must be a share from 0 to 1, got 1.5"),
        ({"least_kept": "all"}, TypeError, "least_kept must be a number, got str"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        st.Standardise(**options)


def test_more_samples_than_columns_are_refused_for_the_exact_refit() -> None:
    model, batch = make("tanh"), make_batch(32, 12, 4)
    with pytest.raises(st.TeleportError, match=r'at most 31 samples for refit="last", .* got 32: take fewer'):
        st.teleport_mlp(model, batch, method=st.Standardise())


@pytest.mark.parametrize("refit", ["last", "all"])
def test_frozen_parameters_stay_and_the_layers_that_need_them_are_left_out(refit: str) -> None:
    model, (x, y) = make("tanh"), make_batch(20, 12, 4)
    model[0].requires_grad_(False)
    method = st.Standardise(refit=refit, least_kept=0.0)
    first = snapshot(model[0])
    report = st.teleport_mlp(model, (x, y), method=method, guards=FREE)
    assert [layer.teleported for layer in report.layers] == [False, True]
    assert report.layers[0].reason == "it would change '0.weight', which is frozen"
    assert report.accepted and unchanged(model[0], first)
    model[-1].requires_grad_(False)
    with pytest.raises(st.TeleportError, match=r"hidden layer 2: it would change '4.weight', which is frozen"):
        st.teleport_mlp(model, (x, y), method=method)


# --- how it is judged -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [8, 100], ids=["through n×n matrices", "through the gradient"])
def test_the_best_decrease_is_that_of_plain_gradient_steps(n: int) -> None:
    model, (x, y) = make("tanh"), make_batch(n, 12, 4)
    guards = st.Guards(min_gain=1e-9, max_sensitivity=math.inf, max_weight_change=math.inf)
    expected = best_decrease(model, x, y)
    method = st.Standardise(refit="last" if n < 31 else "all", least_kept=0.0)
    report = st.teleport_mlp(model, (x, y), method=method, guards=guards)
    assert report.accepted
    assert report.objective_before == pytest.approx(expected, rel=1e-6)
    assert report.objective_after == pytest.approx(best_decrease(model, x, y), rel=1e-6)


def best_decrease(model: nn.Module, x: Tensor, y: Tensor) -> float:
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, parameters)
    unit = loss.item() / sum(gradient.square().sum().item() for gradient in gradients)
    after = []
    for share in SHARES:
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=share * unit)
            after.append(F.cross_entropy(twin(x), y).item())
    return max(0.0, loss.item() - min(after))


def test_a_loss_with_weight_terms_is_judged_in_the_general_way() -> None:
    model, (x, y) = make("tanh"), make_batch(10, 12, 4)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        penalty = sum((parameter.square().sum() for parameter in model.parameters()), torch.zeros(()))
        return F.cross_entropy(outputs, targets) + 1e-4 * penalty

    guards = st.Guards(min_gain=1e-9, max_sensitivity=math.inf, max_weight_change=math.inf)
    report = st.teleport_mlp(model, (x, y), loss_fn, method=st.Standardise(), guards=guards)
    assert report.accepted and report.drift < 1e-8
    problem = Problem.make(model, read_chain(model), (x, y), loss_fn)
    parameters = problem.leaves(problem.network)
    value = BestDecrease().value(problem.loss_of_trainable(problem.network), parameters)
    assert report.objective_after == pytest.approx(value.item(), rel=1e-6)


# --- in a loop --------------------------------------------------------------------------------------------------------


def make_teleporter(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> st.Teleporter:
    method = st.Standardise(refit="all", least_kept=0.0)
    return st.Teleporter(model, optimizer, **({"method": method, "guards": FREE} | options))


def test_a_teleporter_standardises_once_on_the_samples_of_successive_batches() -> None:
    model, (x, y) = make("tanh"), make_batch(120, 12, 4)
    twin = copy.deepcopy(model)
    teleporter = make_teleporter(model, torch.optim.SGD(model.parameters(), 0.1), batch_size=60, holdout_size=20)
    reports = [teleporter.step((x[i : i + 20], y[i : i + 20]), epoch=0) for i in range(0, 120, 20)]
    assert [report is not None for report in reports] == [False, False, False, True, False, False]
    guards = dataclasses.replace(FREE, holdout=(x[60:80], y[60:80]))
    method = st.Standardise(refit="all", least_kept=0.0)
    st.teleport_mlp(twin, (x[:60], y[:60]), method=method, guards=guards)
    assert unchanged(model, snapshot(twin))


@pytest.mark.parametrize("kind", ["relu", "tanh"])
def test_by_default_a_teleporter_standardises_once_at_the_start(kind: str) -> None:
    model = make(kind, [12, 64, 64, 4], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)  # about as small as torch's own start
    teleporter = st.Teleporter(model, torch.optim.Adam(model.parameters(), 1e-3))
    for call in range(12):
        x, _ = make_batch(50, 12, 4, dtype=torch.float32, seed=call)
        teleporter.step((x, x[:, :4].argmax(1)), epoch=0)
    (report,) = teleporter.reports  # on 200 samples, with 200 behind them as the holdout
    assert report.layers[0].n == 200 and report.holdout_before is not None
    assert report.reason == "standardised", report.reason
    assert report.objective_after > report.objective_before


def test_the_exact_refit_gathers_no_more_samples_than_it_can_take() -> None:
    model = make("tanh")
    teleporter = make_teleporter(model, torch.optim.SGD(model.parameters(), 0.1), method=st.Standardise())
    assert "31 samples + 200 held out" in repr(teleporter)
    with pytest.raises(ValueError, match="can never be teleported by Standardise with 40 samples: expected at most 31"):
        make_teleporter(model, torch.optim.SGD(model.parameters(), 0.1), method=st.Standardise(), batch_size=40)


def test_refresh_teleports_now_and_resets_the_optimizer_if_asked() -> None:
    model, x, y = trained()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    teleporter = make_teleporter(model, optimizer, optimizer_state="reset")
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(st.TeleportError, match="refresh must be called where no gradients are pending"):
        teleporter.refresh((x, y))
    optimizer.step()
    assert len(optimizer.state) == 6
    report = teleporter.refresh((x[:300], y[:300]), holdout=(x[300:], y[300:]))
    assert report.accepted and report.holdout_kept is not None and teleporter.reports == [report]
    assert len(optimizer.state) == 0
    restored = make_teleporter(model, optimizer)
    restored.load_state_dict(teleporter.state_dict())
    assert restored.reports == [report]


def test_a_batch_that_does_not_fit_leaves_everything_after_refresh() -> None:
    model, x, y = trained()
    teleporter = make_teleporter(model, torch.optim.Adam(model.parameters(), 0.01))
    before = snapshot(model)
    with pytest.raises(ValueError, match="batch targets must have one entry for each"):
        teleporter.refresh((x, y[:-1]))
    assert unchanged(model, before) and teleporter.reports == []


def stream(teleporter: st.Teleporter, calls: int, per_epoch: int = 100) -> list[int]:
    """The calls of `step`, from 1, that teleported."""
    batches = [make_batch(20, 12, 4, seed=call) for call in range(calls)]
    steps = (teleporter.step(batch, epoch=call // per_epoch) for call, batch in enumerate(batches))
    return [call for call, report in enumerate(steps, start=1) if report is not None]


def test_a_schedule_may_ask_for_a_teleport_after_every_so_many_steps_in_any_epoch() -> None:
    model = make("tanh")
    options: dict[str, Any] = {"batch_size": 40, "holdout_size": 0}
    teleporter = make_teleporter(
        model, torch.optim.SGD(model.parameters(), 0.1), schedule=st.Schedule([0], every=5), **options
    )
    assert "1 × in epochs [0] and every 5 steps" in repr(teleporter)
    assert stream(teleporter, 13, per_epoch=4) == [2, 6, 11]  # gathered over two calls from the fifth and the tenth on


def test_it_goes_on_from_its_state_in_the_middle_of_such_a_schedule() -> None:
    results = []
    for interrupted in (False, True):
        model = make("tanh")
        options: dict[str, Any] = {"schedule": st.Schedule(every=5), "batch_size": 40, "holdout_size": 0}
        teleporter = make_teleporter(model, torch.optim.SGD(model.parameters(), 0.1), **options)
        batches = [make_batch(20, 12, 4, seed=call) for call in range(12)]
        for call, batch in enumerate(batches):
            if interrupted and call == 5:
                state = teleporter.state_dict()
                teleporter = make_teleporter(model, torch.optim.SGD(model.parameters(), 0.1), **options)
                teleporter.load_state_dict(state)
            teleporter.step(batch, epoch=0)
        results.append(snapshot(model))
        assert len(teleporter.reports) == 2
    assert all(map(torch.equal, *results))


def test_a_condition_leaves_out_what_is_not_needed() -> None:
    model, seen = make("tanh"), list[st.Plasticity]()

    def when(found: st.Plasticity) -> bool:
        seen.append(found)
        return found.lost()

    schedule = st.Schedule(every=3, when=when)
    options: dict[str, Any] = {"schedule": schedule, "batch_size": 20, "holdout_size": 0}
    teleporter = make_teleporter(model, torch.optim.SGD(model.parameters(), 0.1), **options)
    assert stream(teleporter, 4) == [] and len(seen) == 1
    with torch.no_grad():
        model[0].bias[:20] = 50.0  # most units are saturated
    assert stream(teleporter, 2) == [2] and len(seen) == 2
    with pytest.raises(ValueError, match="when must be given together with every"):
        st.Schedule([0], when=when)
    with pytest.raises(TypeError, match=r"when must be callable as when\(plasticity\), got str"):
        st.Schedule([0], every=3, when="lost")  # type: ignore[arg-type]


# --- plasticity -------------------------------------------------------------------------------------------------------


def test_dead_and_saturated_units_are_silent() -> None:
    model, (x, _) = make("relu"), make_batch(50, 12, 4)
    assert st.plasticity(model, x).layers[0].silent == 0
    with torch.no_grad():
        model[0].bias[:6] = -1e3
    found = st.plasticity(model, x).layers
    assert found[0].silent == 6 / 24
    saturated = make("tanh")
    with torch.no_grad():
        saturated[0].bias[:3] = 50.0
    assert st.plasticity(saturated, x).layers[0].silent == 3 / 24


def test_the_figures_are_those_of_their_formulas() -> None:
    model, (x, _) = make("leaky_relu"), make_batch(50, 12, 4)
    layer = st.plasticity(model, x).layers[0]
    z = model[0](x).detach()
    assert layer.spread == pytest.approx((z - z.mean(0)).square().mean().sqrt().item())
    assert layer.norm == pytest.approx(math.hypot(*(p.norm().item() for p in model[0].parameters())))
    h = F.leaky_relu(z, 0.1)
    shares = torch.linalg.svdvals(h - h.mean(0)) / torch.linalg.svdvals(h - h.mean(0)).sum()
    assert layer.effective_rank == pytest.approx(math.exp(-(shares * shares.log()).sum().item()))
    assert layer.width == 24 and layer.index == 1


def test_features_along_one_direction_have_effective_rank_one() -> None:
    model, (x, _) = make("identity"), make_batch(50, 12, 4)
    with torch.no_grad():
        model[0].weight.copy_(torch.outer(torch.ones(24), torch.ones(12)))
    assert st.plasticity(model, x).layers[0].effective_rank == pytest.approx(1.0, abs=1e-6)


def test_plasticity_prints_a_table_and_leaves_the_model() -> None:
    model, (x, _) = make("tanh"), make_batch(50, 12, 4)
    before = snapshot(model)
    lines = str(st.plasticity(model, x)).splitlines()
    assert unchanged(model, before)
    assert lines[0].split() == ["hidden", "layer", "units", "spread", "silent", "effective", "rank", "norm"]
    assert [line.split()[:2] for line in lines[1:]] == [["1", "24"], ["2", "30"]]
    with pytest.raises(ValueError, match=r"x must have shape \(n, d_in=12\)"):
        st.plasticity(model, x[:, :5])
