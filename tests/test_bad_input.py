"""Bad input and interruptions: a clear error, and everything bit for bit as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from teleports import teleport_mlp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import symtele_cuda as st

SIZES = (6, 16, 12, 3)


def make_model(activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = activation or nn.LeakyReLU(0.1)
    layers = (nn.Linear(6, 16), hidden, nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3), nn.Dropout(0.0))
    return nn.Sequential(*layers).double()


def make_batch(n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


@dataclass
class Call:
    """A call of `teleport_mlp` on a model in the middle of its training."""

    model: Any = field(default_factory=make_model)
    batch: Any = field(default_factory=make_batch)
    loss_fn: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> st.TeleportReport:
        return teleport_mlp(self.model, self.batch, self.loss_fn, **self.options)


# --- what must not change -----------------------------------------------------------------------------------------


def bits(tensor: Tensor | None) -> object:
    """A tensor's elements as bytes, so that NaN equals itself and 0 differs from −0."""
    if tensor is None or tensor.is_meta:
        return None
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    return dense.contiguous().numpy().tobytes()


def start_training(model: object) -> torch.optim.Optimizer | None:
    """Gradients and momentum for the parameters that can have them, a mode for every module."""
    if not isinstance(model, nn.Module):
        return None
    model.eval()
    for module in list(model.modules())[::2]:
        module.training = True
    trainable = [p for p in model.parameters() if p.requires_grad and p.layout == torch.strided]
    for parameter in trainable:
        parameter.grad = torch.full_like(parameter, 0.25)
    if not trainable:
        return None
    optimizer = torch.optim.SGD(trainable, lr=0.0, momentum=0.9)
    optimizer.step()
    return optimizer


def snapshot(model: object, optimizer: torch.optim.Optimizer | None) -> dict[str, object]:
    """All that an error must leave alone, as values that compare exactly."""
    state: dict[str, object] = {
        "torch rng": bits(torch.get_rng_state()),
        "python rng": random.getstate(),
        "numpy rng": str(np.random.get_state()),
        "grad mode": torch.is_grad_enabled(),
    }
    if isinstance(model, nn.Module):
        state["modes"] = [module.training for module in model.modules()]
        state["hooks"] = [len(module._forward_hooks) for module in model.modules()]
        for name, p in model.named_parameters():
            state[name] = (id(p), p.requires_grad, p.dtype, p.device, p.layout, bits(p), id(p.grad), bits(p.grad))
    if optimizer is not None:
        state["optimizer"] = [
            {key: bits(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
            for entry in optimizer.state.values()
        ]
    return state


def assert_refused(call: Call, error: type[BaseException], text: str) -> None:
    optimizer = start_training(call.model)
    before = snapshot(call.model, optimizer)
    with pytest.raises(error, match=text):
        call()
    after = snapshot(call.model, optimizer)
    assert [key for key in before if before[key] != after[key]] == []


# --- teleport_mlp -------------------------------------------------------------------------------------------------


def altered(change: Callable[[nn.Sequential], object]) -> Call:
    model = make_model()
    change(model)
    return Call(model)


def with_weight(weight: Tensor, requires_grad: bool = True) -> Call:
    return altered(lambda m: setattr(m[2], "weight", nn.Parameter(weight, requires_grad=requires_grad)))


def with_batch(x: Any = None, y: Any = None) -> Call:
    good_x, good_y = make_batch()
    return Call(batch=(good_x if x is None else x, good_y if y is None else y))


def with_options(**options: Any) -> Call:
    return Call(options=options)



class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x + torch.tanh(self.a(x)))


X, Y = make_batch()
NAN, INF = float("nan"), float("inf")
SUPPORTED = "LeakyReLU, .*Tanh, Sigmoid, Softplus .*ELU"

CASES: dict[str, tuple[Callable[[], Call], type[Exception], str]] = {
    # the model
    "model: residual": (lambda: Call(Residual()), ValueError, r"model must be a chain .* at 'add' expected .* got"),
    "model: convolution": (
        lambda: Call(nn.Sequential(nn.Conv1d(1, 2, 3))),
        ValueError,
        r"at '0' expected .* got Conv1d",
    ),
    "model: one layer": (lambda: Call(nn.Linear(6, 3)), ValueError, r"model must have at least two Linear .* got 1"),
    "model: function": (lambda: Call(torch.tanh), TypeError, r"model must be a torch.nn.Module, got builtin"),
    "model: ReLU6": (lambda: Call(make_model(nn.ReLU6())), ValueError, rf"at '1' expected .*{SUPPORTED}.* got ReLU6"),
    "model: ReLU, which GL cannot move": (
        lambda: Call(make_model(nn.ReLU()), options={"layers": [1]}),
        st.TeleportError,
        r"layers: .* hidden layer 1: relu has no inverse\. .*group=\"positive_diagonal\" moves ReLU",
    ),
    "model: GELU": (lambda: Call(make_model(nn.GELU())), ValueError, rf"at '1' expected .*{SUPPORTED}.* got GELU"),
    "model: hook": (
        lambda: altered(lambda m: m[0].register_forward_hook(lambda *_: None)),
        ValueError,
        r"at '0' expected no forward hooks.* got hooks",
    ),
    "model: layers do not fit": (
        lambda: altered(lambda m: m.__setitem__(2, nn.Linear(15, 12).double())),
        ValueError,
        r"at '2' expected 16 features, as '0' has there, got 15",
    ),
    # its parameters
    "parameter: tied": (
        lambda: altered(lambda m: setattr(m[4], "bias", nn.Parameter(m[2].bias.detach()[:3]))),
        ValueError,
        r"parameters must not be tied, got '2.bias' and '4.bias' sharing memory",
    ),
    "parameter: frozen": (
        lambda: altered(lambda m: m[2].weight.requires_grad_(False)),
        st.TeleportError,
        r"hidden layer 1: it would change '2.weight', which is frozen; hidden layer 2: .* Unfreeze it",
    ),
    "parameter: non-contiguous": (
        lambda: with_weight(torch.zeros(16, 12, dtype=torch.float64).T),
        ValueError,
        r"parameter '2.weight' must be contiguous, got strides \(1, 12\)",
    ),
    "parameter: meta": (
        lambda: with_weight(torch.zeros(12, 16, dtype=torch.float64, device="meta")),
        ValueError,
        r"parameter '2.weight' must hold data, got .* meta device",
    ),
    "parameter: sparse": (
        lambda: with_weight(torch.zeros(12, 16, dtype=torch.float64).to_sparse()),
        TypeError,
        r"parameter '2.weight' must be a dense tensor, got layout torch.sparse_coo",
    ),
    "parameter: NaN": (
        lambda: altered(lambda m: m[2].weight.data[3, 4].fill_(NAN)),
        ValueError,
        r"parameter '2.weight' must be finite, got NaN or Inf",
    ),
    "parameter: Inf": (
        lambda: altered(lambda m: m[4].bias.data[0].fill_(-INF)),
        ValueError,
        r"parameter '4.bias' must be finite, got NaN or Inf",
    ),
    "parameter: mixed dtypes": (
        lambda: altered(lambda m: m[4].float()),
        TypeError,
        r"parameter '4.weight' must have the dtype torch.float64 of '0.weight', got torch.float32",
    ),
    "parameter: integer": (
        lambda: with_weight(torch.ones(12, 16, dtype=torch.int64), requires_grad=False),
        TypeError,
        r"parameter '2.weight' must be of a real floating dtype, got torch.int64",
    ),
    # the batch
    "batch: a tensor": (lambda: Call(batch=X), TypeError, r"batch must be a pair .* got Tensor"),
    "batch: features": (
        lambda: with_batch(X[:, :4]),
        ValueError,
        r"inputs must have shape \(n, d_in=6\), got \(5, 4\)",
    ),
    "batch: image": (lambda: with_batch(X.view(5, 2, 3)), ValueError, r"d_in=6\), got \(5, 2, 3\) \(the model has no"),
    "batch: dtype": (lambda: with_batch(X.float()), TypeError, r"model's dtype torch.float64, got torch.float32"),
    "batch: device": (
        lambda: with_batch(X.to("meta")),
        ValueError,
        r"inputs must be on the model's device cpu, got meta",
    ),
    "batch: targets' device": (lambda: with_batch(y=Y.to("meta")), ValueError, r"targets must be on .* cpu, got meta"),
    "batch: empty": (
        lambda: with_batch(X[:0], Y[:0]),
        ValueError,
        r"inputs must hold at least one sample, got 0",
    ),
    "batch: NaN": (lambda: with_batch(X * NAN), ValueError, r"batch inputs must be finite, got NaN or Inf"),
    "batch: Inf": (lambda: with_batch(X / 0.0), ValueError, r"batch inputs must be finite, got NaN or Inf"),
    "targets: too few": (
        lambda: with_batch(y=Y[:3]),
        ValueError,
        r"one entry for each of n=5 inputs, got shape \(3,\)",
    ),
    "targets: list": (lambda: with_batch(y=[0, 1, 2, 0, 1]), TypeError, r"targets must be a tensor, got list"),
    "targets: int32": (lambda: with_batch(y=Y.int()), TypeError, r"targets must be int64 .* got torch.int32"),
    "targets: bool": (lambda: with_batch(y=Y > 0), TypeError, r"targets must be int64 .* got torch.bool"),
    "targets: column": (lambda: with_batch(y=Y[:, None]), ValueError, r"targets must have shape \(5,\).* got \(5, 1\)"),
    "targets: too large": (
        lambda: with_batch(y=Y + 3),
        ValueError,
        r"targets must be class indices in 0..2, got values",
    ),
    "targets: negative": (
        lambda: with_batch(y=-1 - Y),
        ValueError,
        r"targets must be class indices in 0..2, got values",
    ),
    "targets: shape": (lambda: with_batch(y=X[:, :2]), ValueError, r"targets .* shape .*\(5, 3\), got \(5, 2\)"),
    "targets: NaN": (lambda: with_batch(y=X[:, :3] * NAN), ValueError, r"targets must be finite, got NaN or Inf"),
    "n: too large": (
        lambda: Call(batch=make_batch(40)),
        st.TeleportError,
        r"batch: expected samples .* got a batch of n = 40 with hidden layer 1: 40 samples .*; hidden layer 2: ",
    ),
    "n: repeated sample": (
        lambda: with_batch(X[:1].repeat(5, 1)),
        st.TeleportError,
        r"got a batch of n = 5 with hidden layer 1: the 5 samples have rank 1",
    ),
    "n: too large for a named layer": (
        lambda: Call(batch=make_batch(10), options={"layers": [1, 2]}),
        st.TeleportError,
        r"layers: expected samples .* got a batch of n = 10 with hidden layer 1: 10 samples",
    ),
    # the options
    "lookahead without lr": (lambda: with_options(objective="lookahead"), ValueError, r"lr must be given"),
    "lr: negative": (lambda: with_options(objective="lookahead", lr=-0.1), ValueError, r"lr must be .* > 0, got -0.1"),
    "lr: NaN": (lambda: with_options(objective="lookahead", lr=NAN), ValueError, r"lr must be .* > 0, got nan"),
    "lr: name": (lambda: with_options(objective="lookahead", lr="0.1"), TypeError, r"lr must be a number, got str"),
    "margin": (lambda: with_options(margin=0.0), ValueError, r"margin must be .* > 0, got 0.0"),
    "margin: NaN": (lambda: with_options(margin=NAN), ValueError, r"margin must be .* > 0, got nan"),
    "steps: negative": (lambda: with_options(steps=-1), ValueError, r"steps must be >= 1, got -1"),
    "steps: float": (lambda: with_options(steps=2.0), TypeError, r"steps must be an int, got 2.0 of type float"),
    "method": (lambda: with_options(method="ascent"), TypeError, r"method must be an Ascent, .* got str"),
    "guards": (lambda: with_options(guards=0.1), TypeError, r"guards must be Guards, got float"),
    "first_radius: 0": (lambda: with_options(first_radius=0.0), ValueError, r"first_radius must be .* > 0, got 0.0"),
    "first_radius: NaN": (lambda: with_options(first_radius=NAN), ValueError, r"first_radius must be .* got nan"),
    "max_growth: 1": (lambda: with_options(max_growth=1.0), ValueError, r"max_growth must be .* > 1, got 1.0"),
    "max_growth: NaN": (lambda: with_options(max_growth=NAN), ValueError, r"max_growth must be .* > 1, got nan"),
    "drift_tol: negative": (lambda: with_options(drift_tol=-1e-3), ValueError, r"drift_tol must be .* > 0, got -0.001"),
    "drift_tol: NaN": (lambda: with_options(drift_tol=NAN), ValueError, r"drift_tol must be .* > 0, got nan"),
    "holdout_tol: negative": (lambda: with_options(holdout_tol=-1.0), ValueError, r"holdout_tol must be .* got -1.0"),
    "min_gain: negative": (lambda: with_options(min_gain=-1.0), ValueError, r"min_gain must be .* got -1.0"),
    "min_gain: NaN": (lambda: with_options(min_gain=NAN), ValueError, r"min_gain must be .* got nan"),
    "min_gain: text": (lambda: with_options(min_gain="2"), TypeError, "min_gain must be a number, got str"),
    "holdout_tol: NaN": (lambda: with_options(holdout_tol=NAN), ValueError, r"holdout_tol must be .* got nan"),
    "holdout: empty": (
        lambda: with_options(holdout=(X[:0], Y[:0])),
        ValueError,
        r"holdout: .* at least one sample, got 0",
    ),
    "holdout: targets": (lambda: with_options(holdout=(X, Y + 3)), ValueError, r"holdout: .* in 0..2, got values"),
    "group: unknown": (
        lambda: with_options(group="so"),
        ValueError,
        r"group must be one of 'gl', 'positive_diagonal', got 'so'",
    ),
    "group: not a name": (lambda: with_options(group=None), ValueError, r"group must be one of .*, got None"),
    "group: an activation that is not homogeneous": (
        lambda: with_options(group="positive_diagonal", layers=[1, 2]),
        st.TeleportError,
        r"layers: expected positively homogeneous .* hidden layer 2: tanh is not positively homogeneous\. Use group",
    ),
    "group: no activation that is homogeneous": (
        lambda: Call(make_model(nn.Tanh()), options={"group": "positive_diagonal"}),
        st.TeleportError,
        r"group: expected positively homogeneous .* hidden layer 1: tanh is not positively homogeneous; hidden layer 2",
    ),
    "layers: 0": (lambda: with_options(layers=[0]), ValueError, r"layers must be .* 1..2, got \[0\]"),
    "layers: twice": (lambda: with_options(layers=[1, 1]), ValueError, r"layers must be distinct .* got \[1, 1\]"),
    "layers: number": (lambda: with_options(layers=1), TypeError, r"layers must be a sequence .* got 1"),
    "objective": (lambda: with_options(objective="newton"), ValueError, r"objective must be one of .* got 'newton'"),
    "objective: object": (lambda: with_options(objective=3), TypeError, r"objective must have .* got int"),
    "next step": (lambda: with_options(objective="next_step"), ValueError, r'objective must not be "next_step" with'),
    "backend": (lambda: with_options(backend="tpu"), ValueError, r"backend must be one of .* got 'tpu'"),
    "unknown option": (lambda: with_options(momentum=0.9), TypeError, r"momentum"),
    # the loss
    "loss: name": (lambda: Call(loss_fn="mse"), TypeError, r"loss_fn must be callable .* got str"),
    "loss: a number": (
        lambda: Call(loss_fn=lambda o, y: 1.0),
        ValueError,
        r"loss_fn must return a scalar .* got float",
    ),
    "loss: a vector": (
        lambda: Call(loss_fn=lambda o, y: F.cross_entropy(o, y, reduction="none")),
        ValueError,
        r"loss_fn must return a scalar .* got a tensor of shape \(5,\)",
    ),
    "loss: constant": (
        lambda: Call(loss_fn=lambda o, y: torch.tensor(1.0)),
        ValueError,
        r"loss_fn must depend on .* got",
    ),
    "loss: detached": (
        lambda: Call(loss_fn=lambda o, y: o.detach().sum()),
        ValueError,
        r"loss_fn must depend on .* got",
    ),
    "loss: of something else": (
        lambda: Call(loss_fn=lambda o, y: torch.ones((), requires_grad=True) * y.sum()),
        ValueError,
        r"loss_fn must depend on .* got",
    ),
    "loss: NaN": (lambda: Call(loss_fn=lambda o, y: o.sum() * NAN), ValueError, r"loss_fn must be finite .* got nan"),
}


@pytest.mark.parametrize("name", CASES)
def test_teleport_mlp_refuses_and_changes_nothing(name: str) -> None:
    make, error, text = CASES[name]
    assert_refused(make(), error, text)


def test_the_call_of_the_table_is_good_without_its_fault() -> None:
    assert Call()().accepted


# --- exceptions and interruptions in the middle -------------------------------------------------------------------


class Weighted:
    """A user's objective: the squared norm of the gradients of all parameters but the first."""

    maximise = True

    def value(self, loss_of: Callable[[Sequence[Tensor]], Tensor], parameters: Sequence[Tensor]) -> Tensor:
        gradients = torch.autograd.grad(loss_of(parameters), list(parameters), create_graph=True)
        return torch.stack([gradient.square().sum() for gradient in gradients[1:]]).sum()


SEARCHES: dict[str, dict[str, Any]] = {
    "grad_norm": {},
    "lookahead": {"objective": "lookahead", "lr": 0.05},
    "published rule": {"method": st.Published(1e-3)},
    "holdout": {"holdout": make_batch(7), "holdout_tol": 1.0},
    "narrow layer": {"layers": [1]},
    "user's objective": {"objective": Weighted()},
}


class RaisingLoss:
    """Cross entropy, with a weight term if a model is given, which raises `error` at its k-th call."""

    def __init__(
        self, k: int | None = None, error: BaseException | None = None, model: nn.Module | None = None
    ) -> None:
        self.k, self.error, self.model, self.calls = k, error, model, 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if self.error is not None and self.calls == self.k:
            raise self.error
        loss = F.cross_entropy(outputs, targets)
        if self.model is None:
            return loss
        return loss + 1e-3 * sum(parameter.square().sum() for parameter in self.model.parameters())


def count_calls(options: dict[str, Any], weight_terms: bool) -> int:
    call = Call(options=options)
    call.loss_fn = RaisingLoss(model=call.model if weight_terms else None)
    call()
    return call.loss_fn.calls


class OwnError(ValueError):
    """An error of the user's, made from two arguments."""

    def __init__(self, what: str, where: int) -> None:
        super().__init__(f"{what} at {where}")


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt("stop"), ZeroDivisionError("in the user's loss"), OwnError("a target", 3)], ids=type
)
@pytest.mark.parametrize("weight_terms", [False, True], ids=["loss of the outputs", "loss with weight terms"])
@pytest.mark.parametrize("search", SEARCHES)
def test_whatever_the_loss_raises_goes_through_and_changes_nothing(
    search: str, weight_terms: bool, error: BaseException
) -> None:
    options = {"steps": 4, **SEARCHES[search]}
    total = count_calls(options, weight_terms)
    assert total >= 2
    for k in range(1, total + 1):
        call = Call(options=options)
        call.loss_fn = RaisingLoss(k, error, call.model if weight_terms else None)
        optimizer = start_training(call.model)
        before = snapshot(call.model, optimizer)
        with pytest.raises(type(error)) as caught:
            call()
        assert caught.value is error
        after = snapshot(call.model, optimizer)
        assert [key for key in before if before[key] != after[key]] == [], f"loss call {k} of {total}"


# --- teleport_layer -----------------------------------------------------------------------------------------------


def layer_arguments(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    good = {
        "weight": normal(5, 6),
        "inputs": normal(4, 6),
        "g": torch.eye(5, dtype=torch.float64) + 0.1 * normal(5, 5),
        "bias": normal(5),
    }
    return good | changes


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **{"dtype": torch.float64, **options})


def ones(*shape: int, **options: Any) -> Tensor:
    return zeros(*shape, **options) + 1


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


LAYER_CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "check: number": ({"check": 0}, TypeError, r"check must be a bool, got 0 of type int"),
    "g: shape": ({"g": eye(6)}, ValueError, r"g must have shape .*5.* got \(6, 6\)"),
    "g: not square": ({"g": ones(5, 4)}, ValueError, r"g must have shape .*5.* got \(5, 4\)"),
    "g: vector": ({"g": ones(5)}, ValueError, r"g must have shape .* got \(5,\)"),
    "g: NaN": ({"g": eye(5) * NAN}, ValueError, r"g must be finite, got"),
    "g: dtype": ({"g": eye(5).float()}, TypeError, r"g must .*float64.* got torch.float32"),
    "g: device": ({"g": eye(5).to("meta")}, ValueError, r"g must .*cpu.* got meta"),
    "g: list": ({"g": [[1.0]]}, TypeError, r"g must be a Tensor, got list"),
    "tanh: outside": ({"g": 100 * eye(5), "activation": "tanh"}, ValueError, r"\(-1.*1.*\)"),
    "sigmoid: outside": ({"g": -eye(5), "activation": "sigmoid"}, ValueError, r"\(0.*1.*\)"),
    "softplus: outside": ({"g": -eye(5), "activation": "softplus"}, ValueError, r"\(0.*inf.*\)"),
    "elu: outside": ({"g": -100 * eye(5), "activation": "elu"}, ValueError, r"\(-1.*inf.*\)"),
    "inputs: too many": ({"inputs": torch.randn(9, 6).double()}, ValueError, r"inputs must .* got .*9"),
    "inputs: features": ({"inputs": ones(4, 7)}, ValueError, r"inputs must have shape .*6.* got \(4, 7\)"),
    "inputs: empty": ({"inputs": zeros(0, 6)}, ValueError, r"inputs must .* got .*0"),
    "inputs: NaN": ({"inputs": ones(4, 6) * NAN}, ValueError, r"inputs must be finite, got"),
    "inputs: rank": ({"inputs": ones(4, 6)}, st.TeleportError, r"inputs.* must have full row rank.* got rank 1"),
    "weight: vector": ({"weight": ones(6)}, ValueError, r"weight must have shape .* got \(6,\)"),
    "weight: Inf": ({"weight": ones(5, 6) * INF}, ValueError, r"weight must be finite, got"),
    "weight: integer": ({"weight": torch.ones(5, 6, dtype=torch.int64)}, TypeError, r"weight must .* got torch.int64"),
    "bias: shape": ({"bias": ones(6)}, ValueError, r"bias must have shape .*5.* got \(6,\)"),
    "activation": ({"activation": "relu"}, ValueError, r"activation must be one of .*leaky_relu.* got 'relu'"),
    "slope: negative": ({"negative_slope": -0.1}, ValueError, r"negative_slope must be .* > 0 .* got -0.1"),
    "slope: NaN": ({"negative_slope": NAN}, ValueError, r"negative_slope must be .* > 0 .* got nan"),
    "action": ({"action": "most"}, ValueError, r"action must be one of .* got 'most'"),
    "backend": ({"backend": "tpu"}, ValueError, r"backend must be one of .* got 'tpu'"),
}


@pytest.mark.parametrize("name", LAYER_CASES)
def test_teleport_layer_refuses_and_changes_nothing(name: str) -> None:
    changes, error, text = LAYER_CASES[name]
    arguments = layer_arguments(**changes)
    tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    before = {key: bits(value) for key, value in tensors.items()} | snapshot(None, None)
    with pytest.raises(error, match=text):
        st.teleport_layer(**arguments)
    after = {key: bits(value) for key, value in tensors.items()} | snapshot(None, None)
    assert [key for key in before if before[key] != after[key]] == []


def layer_on_gpus(**changes: tuple[tuple[int, ...], dict[str, Any]]) -> dict[str, Any]:
    """Arguments without memory, which claim to lie on a GPU; inside FakeTensorMode only."""
    good = {"weight": ((5, 6), {}), "inputs": ((4, 6), {}), "g": ((5, 5), {}), "bias": ((5,), {})}
    return {
        name: torch.empty(shape, **{"device": "cuda:0", "dtype": torch.float32, **options})
        for name, (shape, options) in (good | changes).items()
    }


LONG = 2**15 + 1
GPU_CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "g: another GPU": (
        {"g": ((5, 5), {"device": "cuda:1"})},
        ValueError,
        r"g must be on the device of weight, cuda:0, got cuda:1",
    ),
    "inputs: CPU": (
        {"inputs": ((4, 6), {"device": "cpu"})},
        ValueError,
        r"inputs must be on the device of weight, cuda:0, got cpu",
    ),
    "weight: CPU": (
        {"weight": ((5, 6), {"device": "cpu"})},
        ValueError,
        r"inputs must be on the device of weight, cpu, got cuda:0",
    ),
    "bias: dtype": ({"bias": ((5,), {"dtype": torch.float16})}, TypeError, r"bias must have the dtype of weight"),
    "weight: dtype": (
        {"weight": ((5, 6), {"dtype": torch.int8})},
        TypeError,
        r"weight must be one of .* got torch.int8",
    ),
    "weight: elements": (
        {
            "weight": ((2 * LONG, LONG), {}),
            "inputs": ((4, LONG), {}),
            "g": ((2 * LONG, 2 * LONG), {}),
            "bias": ((2 * LONG,), {}),
        },
        ValueError,
        r"weight must have at most 2³¹ elements on cuda:0, got 2147614722",
    ),
    "g: elements": (
        {"weight": ((2 * LONG, 6), {}), "g": ((2 * LONG, 2 * LONG), {}), "bias": ((2 * LONG,), {})},
        ValueError,
        r"g must have at most 2³¹ elements on cuda:0, got 4295229444",
    ),
}


@pytest.mark.parametrize("name", GPU_CASES)
def test_teleport_layer_refuses_on_a_gpu(name: str) -> None:
    changes, error, text = GPU_CASES[name]
    with FakeTensorMode(), pytest.raises(error, match=text):
        st.teleport_layer(**layer_on_gpus(**changes))


def test_the_arguments_of_the_layers_table_are_good_without_their_fault() -> None:
    weight, bias = st.teleport_layer(**layer_arguments())
    assert bool(torch.isfinite(weight).all())
    assert bias is not None
