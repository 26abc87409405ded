"""The step that an optimizer of torch would take next, as a differentiable function of parameters and gradients.

`read_step(optimizer, parameters)` gives u(θ, g), with the settings and the state as they stand, such that the next
`optimizer.step()` with the gradients g is θ ← θ − u. `OptimizerLookahead` is the objective that goes with it.
`sgd_rate` and `muon_length` say how long the steps of SGD and Muon come to be, whatever their state.

The formulas are those of the reference code of torch.optim (its `_single_tensor_*` functions and `_muon.py`); foreach,
fused, capturable and differentiable change their rounding only. With maximize=True −g stands for g. What a training
loop does to the gradients between backward and step, such as clipping, is not part of the optimizer and not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number
from ..model.loss import LossOfParameters
from ..optimizers import holder_of, kind_of, unwrap

Update = Callable[[Tensor, Tensor], Tensor]
"""u of one parameter, of its value θ and its gradient g."""


Step = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""u of several parameters, of their values and their gradients."""


@dataclass(frozen=True)
class OptimizerLookahead:
    """f = L(θ − c·u(θ, ∇L(θ))), the loss after `margin` = c times the optimizer's next step u on the same batch, to be
    minimised.

    step: of `read_step` for the model's trainable parameters in the order of its Linear layers, weight before bias; its
    state stays as it was read. margin: a number > 0.
    """

    step: Step
    margin: float = 4.0

    maximise = False

    def __post_init__(self) -> None:
        check_number("margin", self.margin, above=0.0)

    def value(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> Tensor:
        return loss_of(self.ahead(loss_of, parameters))

    def ahead(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> list[Tensor]:
        """θ − c·u(θ, ∇L(θ))."""
        gradients = torch.autograd.grad(loss_of(parameters), list(parameters), create_graph=True)
        steps = self.step(parameters, gradients)
        return [p - self.margin * u for p, u in zip(parameters, steps, strict=True)]


def read_step(optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], parameters: Sequence[Tensor]) -> Step:
    """The next step of `optimizer` for `parameters`, with copies of its settings and state as they stand: a function
    u(θ, g) of lists in the order of `parameters`, with θ_next = θ − u, differentiable, twice too, in both.

    With γ = lr, λ = weight_decay, t the number of the step, primes for the state after it, and g + λθ in the place of g
    except for AdamW and Muon:

        SGD       b' = μ b + (1 − τ) g, at first g;  u = γ b', with nesterov γ (g + μ b');  without momentum γ g
        Adagrad   s' = s + g²;  u = γ/(1 + (t − 1) lr_decay) · g/(√s' + ε)
        RMSprop   v' = α v + (1 − α) g²;  d = √v' + ε, if centered √(v' − a'²) + ε with a' = α a + (1 − α) g;
                  u = γ g/d, with momentum γ b' with b' = μ b + g/d
        Adam      m' = β₁ m + (1 − β₁) g;  v' = β₂ v + (1 − β₂) g², with amsgrad then max(v_max, v');
                  u = γ/(1 − β₁ᵗ) · m'/(√(v'/(1 − β₂ᵗ)) + ε)
        AdamW     as Adam, u + γλθ
        Muon      b' = μ b + (1 − μ) g;  G = μ b' + (1 − μ) g with nesterov, else b';  X = G/max(‖G‖_F, ε), and ns_steps
                  times X ← a X + (b XXᵀ + c (XXᵀ)²) X;  u = γ s X + γλθ,  s = √max(1, rows/columns), or
                  0.2 √max(rows, columns) for "match_rms_adamw"; X in the dtype of the gradients, in torch in bfloat16

    (Duchi et al. 2011; Tieleman and Hinton 2012; Kingma and Ba 2015, arXiv 1412.6980; Reddi et al. 2018; Loshchilov and
    Hutter 2019, arXiv 1711.05101; Jordan et al. 2024, Muon.) √ has the derivative 0 at 0, which makes that of u the
    true one where gradient and second moment are exactly 0: γ/ε and not NaN.

    Args:
        optimizer: a torch.optim.SGD, Adagrad, RMSprop, Adam, AdamW or Muon, a subclass that inherits their `step`, a
            wrapper that holds one in `.optimizer`, or a sequence of these, each for the parameters that it holds.
        parameters: tensors that it holds, in the order of the step's arguments. The state is taken in the dtype of a
            search: float64 for float64, float32 for everything else.

    Raises:
        ValueError: another optimizer, or a parameter that it does not hold.
    """
    optimizers = unwrap(optimizer)
    kinds = {id(one): kind_of(one, _UPDATES) for one in optimizers}
    for one in optimizers:
        if kinds[id(one)] is None:
            known = ", ".join(cls.__name__ for cls in _UPDATES)
            raise ValueError(
                f"optimizer must be one of {known}, whose next step is known, got {type(one).__name__}: pass lr=, the "
                "rate of a plain gradient step, instead"
            )
    holders = holder_of(optimizers)
    missing = [index for index, parameter in enumerate(parameters) if id(parameter) not in holders]
    if missing:
        raise ValueError(f"parameters must be held by the optimizer, got others at the positions {missing}")
    updates = list[Update]()
    for parameter in parameters:
        holder, group = holders[id(parameter)]
        kind = kinds[id(holder)]
        assert kind is not None
        update = _UPDATES[kind](_Slot(parameter, group, holder.state.get(parameter, {}), holder.defaults))
        updates.append(_ascending(update) if group.get("maximize", False) else update)

    def step(values: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        return [update(*pair) for update, *pair in zip(updates, values, gradients, strict=True)]

    return step


def _ascending(update: Update) -> Update:
    """The update with maximize=True."""
    return lambda parameter, gradient: update(parameter, -gradient)


def sgd_rate(settings: Mapping[str, Any]) -> float:
    """η = γ(1 − τ)/(1 − μ) of a group of torch.optim.SGD with momentum μ and dampening τ, γ without momentum: under a
    constant gradient g its steps, weight decay aside, come to η g (Polyak 1964), with nesterov too.

    Raises:
        ValueError: they come to nothing or grow without bound, as μ or τ is 1 or more.
    """
    momentum, dampening = _as_float(settings["momentum"]), _as_float(settings["dampening"])
    if momentum == 0:
        return _as_float(settings["lr"])
    if not (momentum < 1 and dampening < 1):
        raise ValueError(
            f"optimizer must have momentum and dampening below 1, got momentum={momentum:g} and "
            f"dampening={dampening:g}: pass lr=, the rate of a plain gradient step, instead"
        )
    return _as_float(settings["lr"]) * (1 - dampening) / (1 - momentum)


def muon_length(settings: Mapping[str, Any], shapes: Sequence[torch.Size]) -> float:
    """√Σ (γ s)² min(rows, columns), the norm of a step of torch.optim.Muon for matrices of these shapes, weight decay
    aside, with γ and s as for `read_step`, were each X orthogonal: the iteration leaves it about a quarter shorter."""
    squares = (_muon_scale(settings, *shape) ** 2 * min(shape) for shape in shapes)
    return _as_float(settings["lr"]) * math.sqrt(sum(squares))


def _muon_scale(settings: Mapping[str, Any], rows: int, columns: int) -> float:
    if settings["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


@dataclass(frozen=True)
class _Slot:
    """What an optimizer holds for one parameter: its group's settings, its state, and its defaults."""

    parameter: Tensor
    settings: Mapping[str, Any]
    state: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def number(self, name: str) -> float:
        return _as_float(self.settings[name])

    def moment(self, name: str, start: float = 0.0) -> Tensor:
        """A copy of an entry of the state in the dtype of the search; `start` everywhere before the first step."""
        dtype = torch.float64 if self.parameter.dtype == torch.float64 else torch.float32
        if not self.state:
            return torch.full_like(self.parameter, start, dtype=dtype, requires_grad=False)
        if name not in self.state:
            raise ValueError(f"optimizer must hold {name!r} in the state of a parameter, got {sorted(self.state)}")
        return self.state[name].detach().to(dtype, copy=True)

    @property
    def next_step(self) -> float:
        """t, counted from 1."""
        return 1 + _as_float(self.state.get("step", 0))


def _as_float(value: float | Tensor) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)


def _sgd(slot: _Slot) -> Update:
    lr, momentum, dampening, decay = map(slot.number, ("lr", "momentum", "dampening", "weight_decay"))
    nesterov = slot.settings["nesterov"]
    started = momentum != 0 and slot.state.get("momentum_buffer") is not None
    held = slot.moment("momentum_buffer") if started else None

    def update(parameter: Tensor, gradient: Tensor) -> Tensor:
        gradient = _with_decay(gradient, parameter, decay)
        if momentum == 0:
            return lr * gradient
        buffer = gradient if held is None else momentum * held + (1 - dampening) * gradient
        return lr * (gradient + momentum * buffer if nesterov else buffer)

    return update


def _adagrad(slot: _Slot) -> Update:
    lr, lr_decay, eps, decay = map(slot.number, ("lr", "lr_decay", "eps", "weight_decay"))
    rate = lr / (1 + (slot.next_step - 1) * lr_decay)
    held = slot.moment("sum", start=slot.defaults["initial_accumulator_value"])

    def update(parameter: Tensor, gradient: Tensor) -> Tensor:
        gradient = _with_decay(gradient, parameter, decay)
        return rate * gradient / (_root(held + gradient.square()) + eps)

    return update


def _rmsprop(slot: _Slot) -> Update:
    lr, alpha, eps, decay, momentum = map(slot.number, ("lr", "alpha", "eps", "weight_decay", "momentum"))
    held = slot.moment("square_avg")
    mean = slot.moment("grad_avg") if slot.settings["centered"] else None
    buffer = slot.moment("momentum_buffer") if momentum > 0 else None

    def update(parameter: Tensor, gradient: Tensor) -> Tensor:
        gradient = _with_decay(gradient, parameter, decay)
        squares = alpha * held + (1 - alpha) * gradient.square()
        if mean is not None:
            squares = squares - (alpha * mean + (1 - alpha) * gradient).square()
        scaled = gradient / (_root(squares) + eps)
        return lr * (scaled if buffer is None else momentum * buffer + scaled)

    return update


def _adam(slot: _Slot) -> Update:
    """Adam and AdamW."""
    lr, eps, decay = map(slot.number, ("lr", "eps", "weight_decay"))
    first, second = map(_as_float, slot.settings["betas"])
    decoupled, t = slot.settings["decoupled_weight_decay"], slot.next_step
    held, held_squares = slot.moment("exp_avg"), slot.moment("exp_avg_sq")
    largest = slot.moment("max_exp_avg_sq") if slot.settings["amsgrad"] else None

    def update(parameter: Tensor, gradient: Tensor) -> Tensor:
        if not decoupled:
            gradient = _with_decay(gradient, parameter, decay)
        mean = first * held + (1 - first) * gradient
        squares = second * held_squares + (1 - second) * gradient.square()
        if largest is not None:
            squares = torch.maximum(largest, squares)
        root = _root(squares) / math.sqrt(1 - second**t)
        change = lr / (1 - first**t) * mean / (root + eps)
        return _with_decay(change, parameter, lr * decay) if decoupled else change

    return update


def _muon(slot: _Slot) -> Update:
    lr, decay, momentum, eps = map(slot.number, ("lr", "weight_decay", "momentum", "eps"))
    nesterov, iterations = slot.settings["nesterov"], slot.settings["ns_steps"]
    coefficients, scale = tuple(slot.settings["ns_coefficients"]), _muon_scale(slot.settings, *slot.parameter.shape)
    held = slot.moment("momentum_buffer")

    def update(parameter: Tensor, gradient: Tensor) -> Tensor:
        buffer = momentum * held + (1 - momentum) * gradient
        direction = momentum * buffer + (1 - momentum) * gradient if nesterov else buffer
        change = lr * scale * orthogonalized(direction, coefficients, iterations, eps)
        return _with_decay(change, parameter, lr * decay)

    return update


def orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float) -> Tensor:
    """Muon's X of the matrix G, in its dtype: Newton-Schulz, on the side of the smaller Gram matrix."""
    tall = matrix.shape[0] > matrix.shape[1]
    image = matrix.T if tall else matrix
    image = image / _root(image.square().sum()).clamp(min=eps)
    a, b, c = coefficients
    for _ in range(iterations):
        gram = image @ image.T
        image = a * image + (b * gram + c * gram @ gram) @ image
    return image.T if tall else image


_UPDATES: dict[type[torch.optim.Optimizer], Callable[[_Slot], Update]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adagrad: _adagrad,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.Muon: _muon,
}


def _with_decay(tensor: Tensor, parameter: Tensor, decay: float) -> Tensor:
    return tensor + decay * parameter if decay != 0 else tensor


def _root(squares: Tensor) -> Tensor:
    """√v, with the derivative 0 where v = 0."""
    zero = squares == 0
    return squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
