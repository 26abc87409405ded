"""Models and batches as users have them: other dtypes, views, tensors of inference mode, autocast, frozen layers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from networks import make_batch, make_mlp, snapshot, unchanged
from teleports import make_teleporter, teleport_mlp
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import symtele_cuda as st

DIMS = [20, 24, 22, 5]


def gradient_norm(model: nn.Module, loss: Tensor) -> float:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return math.hypot(*(float(g.norm()) for g in torch.autograd.grad(loss, parameters)))


def with_bias_first(how: str) -> nn.Sequential:
    """A model one Linear of which has registered its bias before its weight."""
    model = make_mlp([8, 8, 8, 3], "tanh")
    if how == "prune":
        prune.identity(model[2], "weight")
        prune.remove(model[2], "weight")
    elif how == "parametrization":
        parametrizations.weight_norm(model[2])
        parametrize.remove_parametrizations(model[2], "weight")
    elif how == "old weight norm":
        nn.utils.remove_weight_norm(nn.utils.weight_norm(model[2]))
    else:
        weight = model[2].weight
        del model[2].weight
        model[2].weight = weight
    assert [*model[2]._parameters] == ["bias", "weight"]
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("state", ["keep", "reset"])
@pytest.mark.parametrize("how", ["prune", "parametrization", "old weight norm", "set again"])
def test_weights_and_biases_are_paired_by_name(how, state):
    model, (x, y) = with_bias_first(how), make_batch(14, 8, 3)
    expected = make_mlp([8, 8, 8, 3], "tanh")
    expected.load_state_dict(model.state_dict())
    reports = []
    for one in (model, expected):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
        F.cross_entropy(one(x), y).backward()
        optimizer.step()
        options = dict(batch_size=6, holdout_size=8, min_gain=0.0, optimizer_state=state, layers=None)
        options |= dict(max_sensitivity=math.inf, max_weight_change=math.inf, holdout_tol=math.inf)
        reports.append(make_teleporter(one, optimizer, objective="grad_norm", **options).step((x, y), epoch=0))
    assert reports[0].accepted
    assert reports[0].objective_after == pytest.approx(reports[1].objective_after, rel=1e-9)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter)


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.float64, torch.float16])
def test_floating_targets_of_any_dtype(model_dtype, target_dtype):
    model = make_mlp(DIMS, "tanh").to(model_dtype)
    x, y = make_batch(12, 20, 5)[0].to(model_dtype), torch.rand(12, 5).to(target_dtype)
    held = make_batch(20, 20, 5, seed=4)[0].to(model_dtype), torch.rand(20, 5).to(target_dtype)
    wide = copy.deepcopy(model).double()
    loss = F.mse_loss(wide(x.double()), y.double())
    report = teleport_mlp(model, (x, y), holdout=held, holdout_tol=math.inf, drift_tol=0.1)
    tolerance = {torch.float64: 1e-9}.get(model_dtype, 1e-5)
    assert report.loss_before == pytest.approx(loss.item(), rel=tolerance)
    assert report.grad_norm_before == pytest.approx(gradient_norm(wide, loss), rel=10 * tolerance)
    assert report.accepted and report.holdout_before is not None


@pytest.mark.parametrize("loss_fn", [None, F.cross_entropy], ids=["default", "own"])
def test_half_precision_inside_autocast(loss_fn):
    models = [make_mlp(DIMS, "tanh").half() for _ in range(2)]
    x, y = make_batch(12, 20, 5, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = teleport_mlp(models[0], (x, y), loss_fn, drift_tol=0.1)
        assert torch.is_autocast_enabled("cpu")
    outside = teleport_mlp(models[1], (x, y), loss_fn, drift_tol=0.1)
    assert inside.accepted and inside.objective_after == outside.objective_after
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def inference(make: object) -> Tensor:
    with torch.inference_mode():
        return make()  # type: ignore[operator]


X, Y = make_batch(12, 20, 5)
VIEWS = {
    "made in inference mode": lambda: inference(lambda: X + 0),
    "view made in inference mode": lambda: inference(lambda: (X + 0)[:]),
    "expanded": lambda: (X[:, :1] + X).expand(12, 20),
    "one of unbind": lambda: torch.stack([X, X]).unbind(0)[0],
    "one of split": lambda: torch.cat([X, X]).requires_grad_().split(12)[1],
    "transposed": lambda: X.T.contiguous().T,
    "view made without gradients": lambda: torch.no_grad()(lambda: torch.cat([X, X]).requires_grad_()[:12])(),
    "a leaf with gradient": lambda: X.clone().requires_grad_(),
    "with a graph": lambda: X.clone().requires_grad_() * 2.0,
    "negative view": lambda: torch._neg_view(X),
}
PATHS = {
    "fast": dict(),
    "lookahead": dict(objective="lookahead", lr=0.5),
    "weight terms": dict(weighted=True),
    "published": dict(method=st.Published(1e-6)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("view", VIEWS)
def test_every_path_takes_samples_that_are_views(view, path):
    models, options = [make_mlp(DIMS, "tanh") for _ in range(2)], dict(PATHS[path])
    weighted = options.pop("weighted", False)
    x = VIEWS[view]()
    targets = inference(lambda: Y + 0) if "inference" in view else Y
    reports = []
    for model, inputs, labels in zip(models, (x, x.detach().clone()), (targets, Y), strict=True):

        def loss_fn(outputs: Tensor, expected: Tensor, model: nn.Module = model) -> Tensor:
            return F.cross_entropy(outputs, expected) + 1e-3 * sum(p.square().sum() for p in model.parameters())

        held = (inputs, labels)
        reports.append(teleport_mlp(model, held, loss_fn if weighted else None, holdout=held, **options))
    assert reports[0].accepted
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_teleporter_inside_autocast():
    model = make_mlp(DIMS, "tanh").half()
    x, y = make_batch(30, 20, 5, dtype=torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        teleporter = make_teleporter(model, optimizer, batch_size="auto", holdout_size=2, min_gain=0.0)
        assert teleporter.step((x, y), epoch=0) is not None
        assert torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


def test_the_teleporter_takes_tensors_of_inference_mode():
    model = make_mlp(DIMS, "tanh")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)  # its lookahead differentiates through the samples
    teleporter = make_teleporter(model, optimizer, batch_size=12, holdout_size=12, min_gain=0.0, holdout_tol=math.inf)
    assert teleporter.step(inference(lambda: (X + 0, Y + 0)), epoch=0) is None
    assert teleporter.step(inference(lambda: (X + 1, Y + 0)), epoch=0) is not None


def test_parameters_of_inference_mode_are_refused_before_anything_is_written():
    with torch.inference_mode():
        late = nn.Linear(22, 5, dtype=torch.float64)
    model = make_mlp(DIMS, "tanh")
    model[4] = late
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'4.weight' must be one that autograd can follow, got one made in"):
        teleport_mlp(model, (X, Y))
    assert unchanged(model, before)


@pytest.mark.parametrize("scale", [1e-25, 1e-21, 1e-19, 1.0, 1e19, 1e22])
@pytest.mark.parametrize("n", [12, 40])
@pytest.mark.parametrize("weighted", [False, True], ids=["fast path", "general path"])
def test_gradient_norms_far_from_one_are_reported_in_float32(weighted, n, scale):
    model = make_mlp([40, 64, 50, 5], "tanh", dtype=torch.float32)
    x, y = make_batch(n, 40, 5, dtype=torch.float32)
    wide = copy.deepcopy(model).double()
    expected = scale * gradient_norm(wide, F.cross_entropy(wide(x.double()), y))

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        term = 0.0 * model[0].weight.square().sum() if weighted else 0.0
        return scale * F.cross_entropy(outputs, targets) + term

    report = teleport_mlp(model, (x, y), loss_fn)
    assert report.grad_norm_before == pytest.approx(expected, rel=1e-4)
    assert math.isfinite(report.grad_norm_after) and report.grad_norm_after > 0


def swapped(targets: Tensor, outputs: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def test_swapped_loss_arguments_get_a_sentence():
    model = make_mlp(DIMS)
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"loss_fn must take \(outputs, targets\) in this order, got one that fails"):
        teleport_mlp(model, (X, Y), swapped)
    assert unchanged(model, before)


# --- frozen layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["grad_norm", "lookahead"])
def test_a_frozen_layer_that_the_plan_leaves_alone_is_allowed_and_counts_for_nothing(objective):
    model = make_mlp([20, 24, 22, 23, 5], "tanh")
    model[0].requires_grad_(False)
    before, frozen = copy.deepcopy(model), snapshot(model[0])
    report = teleport_mlp(model, (X, Y), objective=objective, lr=0.2, margin=1.0)
    assert report.accepted and unchanged(model[0], frozen)
    assert [layer.teleported for layer in report.layers] == [False, True, True]
    assert report.layers[0].reason == "it would change '0.weight', which is frozen"
    for model_, norm, value in (
        (before, report.grad_norm_before, report.objective_before),
        (model, report.grad_norm_after, report.objective_after),
    ):
        loss = F.cross_entropy(model_(X), Y)
        assert norm == pytest.approx(gradient_norm(model_, loss), rel=1e-8)
        optimizer = torch.optim.SGD([p for p in model_.parameters() if p.requires_grad], lr=0.2)
        F.cross_entropy(model_(X), Y).backward()
        optimizer.step()
        ahead = F.cross_entropy(model_(X), Y).item()
        assert value == pytest.approx(norm**2 if objective == "grad_norm" else ahead, rel=1e-8)


def test_a_frozen_layer_that_was_asked_for_is_named():
    model = make_mlp(DIMS, "tanh")
    model[2].bias.requires_grad_(False)
    with pytest.raises(st.TeleportError, match=r"hidden layer 2: it would change '2.bias', which is frozen. Unfreeze"):
        teleport_mlp(model, (X, Y), layers=[2])


def test_a_frozen_trunk_trains_with_a_teleporter():
    model = make_mlp([20, 24, 22, 23, 5], "tanh")
    model[0].requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for optimizer in (torch.optim.SGD(trainable, lr=0.1), torch.optim.Adam(trainable, lr=1e-3)):
        teleporter = make_teleporter(model, optimizer, batch_size=12, holdout_size=0, min_gain=0.0)
        report = teleporter.step((X, Y), epoch=0)
        assert report is not None and report.layers[0].reason.endswith("not asked for")


class Scaled(nn.Linear):
    """A Linear with one parameter more."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.temperature = nn.Parameter(torch.ones(1))


def test_a_linear_with_a_parameter_of_its_own_is_refused_at_the_start():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Scaled(8, 3))
    with pytest.raises(ValueError, match=r"at '2' expected a Linear with weight and bias alone, got .*'temperature'"):
        make_teleporter(model, torch.optim.SGD(model.parameters(), lr=0.1))
