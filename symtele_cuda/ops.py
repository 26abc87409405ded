"""The operator `symtele_cuda::teleport_layer`: one layer's teleport, its gradient and that gradient's, in closed form.

With the bias as one more column, W̃ = [W, b] (d_out×d̃) and H̃ = [H, 1] (n×d̃), and with ρ = 1 for action="least_change"
and ρ = 0 for action="paper":

    Z = H̃ W̃ᵀ,  S = σ(Z),  B = S gᵀ,  Y = σ⁻¹(B),  P = (H̃ H̃ᵀ)⁻¹ H̃
    forward           W̃' = ρ W̃ + (Y − ρ Z)ᵀ P

    backward          given V = ∂f/∂W̃':  G_Y = P Vᵀ,  G_B = G_Y ⊙ D,  G_Z = G_B g ⊙ σ'(Z),  D = (σ⁻¹)'(B) = 1 / σ'(Y)
                      ∂f/∂g = G_Bᵀ S,    ∂f/∂W̃ = ρ V + (G_Z − ρ G_Y)ᵀ H̃

    double backward   given C = ∂f/∂(∂W̃), C_g = ∂f/∂(∂g):  the changes of Z, S, B and Y along (C, C_g) are
                      T = H̃ Cᵀ,  dS = σ'(Z) ⊙ T,  dB = S C_gᵀ + dS gᵀ,  dY = D ⊙ dB;  with Q = G_Y ⊙ (σ⁻¹)''(B) ⊙ dB
                      ∂f/∂V = ρ C + (dY − ρ T)ᵀ P                 (the forward derivative of W̃')
                      ∂f/∂g = Qᵀ S + G_Bᵀ dS
                      ∂f/∂W̃ = ((Q g + G_B C_g) ⊙ σ'(Z) + G_B g ⊙ T ⊙ σ''(Z))ᵀ H̃

H is data and gets no gradient. Each of the three is an operator of its own with a fake kernel, so that a compiled
kernel can take its place behind the same schema; the kernels here are plain torch and serve every device. bfloat16 and
float16 are computed in float32 and rounded once. P is computed again in each of the three, so that they take a layer's
own arguments and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .activations import Activation, make_activation
from .errors import TeleportError
from .pinv import MAX_CONDITION, append_ones, pinv_factor, probe_vectors

ACTIONS: dict[str, float] = {"least_change": 1.0, "paper": 0.0}
"""The actions, with the share ρ of the old weights that stays as the reference."""

BACKENDS = ("auto", "torch", "cuda")

_COMPUTE_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def teleport_layer(
    weight: Tensor,
    inputs: Tensor,
    g: Tensor,
    bias: Tensor | None = None,
    activation: str | Activation = "leaky_relu",
    negative_slope: float = 0.1,
    action: str = "least_change",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The weights with which a layer turns its batch into activations moved by g: σ(H W'ᵀ + b') = σ(H Wᵀ + b) gᵀ.

        Z = H Wᵀ + b,  Y = σ⁻¹(σ(Z) gᵀ),  [W', b'] = [R, r] + (Y − H Rᵀ − r)ᵀ P,  P = (H̃ H̃ᵀ)⁻¹ H̃,  H̃ = [H, 1]

    With action="least_change", R, r = W, b: the smallest change of [W, b] with this effect, none at g = I. With
    action="paper", R = 0, r = 0: W' = Yᵀ H⁺ᵀ (Zhao, Dehmamy, Walters, Yu 2022, eq. 8), which forgets what W does off
    the batch. The two agree where H̃ is square. Without bias b, r and the column of ones are absent.

    Differentiable in weight, g and bias, twice; inputs are data and get no gradient. Deterministic on the CPU.

    Args:
        weight: W (d_out×d_in), float64, float32, bfloat16 or float16 (these two computed in float32, rounded once).
        inputs: H (n×d_in), the layer's inputs, n ≤ d_in + 1 (n ≤ d_in without bias), H̃ of full row rank.
        g: the group element (d_out×d_out), invertible.
        bias: b (d_out), or None for a layer without bias. All tensors have one dtype and one device.
        activation: the layer's σ, a name ("leaky_relu", "tanh", "sigmoid", "softplus", "elu", "identity") or an
            Activation, which also gives ELU its α and Softplus its β.
        negative_slope: slope of activation="leaky_relu", > 0; the other activations do not read it.
        action: "least_change" or "paper".
        backend: "auto" and "torch" compute with torch on the tensors' device; "cuda" demands the compiled kernels.

    Returns:
        W' (d_out×d_in) and b' (d_out), None without bias.

    Raises:
        TypeError: an argument of the wrong type, dtypes that differ or are no floating-point dtype of the list above.
        ValueError: wrong shapes, devices that differ, elements that are not finite, an unknown name, a slope that is
            not positive, a singular g, more samples than can be matched, σ(Z) gᵀ outside the domain of σ⁻¹, or
            backend="cuda" without kernels.
        TeleportError: inputs that are not of full row rank, or worse conditioned than `pinv.MAX_CONDITION`.
    """
    chosen = _choose_activation(activation, negative_slope)
    _check_backend(backend)
    _check_action(action)
    _check_tensors(weight, inputs, g, bias)
    _check_values(weight, inputs, g, bias)
    operator = torch.ops.symtele_cuda.teleport_layer
    new_weight, new_bias = operator(weight, inputs, g, bias, chosen.name, chosen.parameter, action)
    return new_weight, None if bias is None else new_bias


def cuda_unavailable_reason() -> str:
    """Why backend="cuda" cannot be had in this installation, and what to do instead."""
    return (
        "this build of symtele_cuda has no CUDA kernels: it is pure Python. Use backend='auto' or backend='torch', "
        "which run the same formulas with torch's own kernels, on CUDA tensors too"
    )


# ---------------------------------------------------------------------------------------------------------------------
# the operators
# ---------------------------------------------------------------------------------------------------------------------

_LAYER = "Tensor weight, Tensor inputs, Tensor g, Tensor? bias, str activation, float parameter, str action"

torch.library.define("symtele_cuda::teleport_layer", f"({_LAYER}) -> (Tensor, Tensor)")
torch.library.define(
    "symtele_cuda::teleport_layer_backward",
    f"(Tensor grad_weight, Tensor grad_bias, {_LAYER}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "symtele_cuda::teleport_layer_double_backward",
    "(Tensor change_weight, Tensor change_g, Tensor change_bias, Tensor grad_weight, Tensor grad_bias, "
    f"{_LAYER}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("symtele_cuda::teleport_layer", "default")
def _forward(
    weight: Tensor, inputs: Tensor, g: Tensor, bias: Tensor | None, activation: str, parameter: float, action: str
) -> tuple[Tensor, Tensor]:
    with _full_precision(weight):
        layer = _prepare(weight, inputs, g, bias, activation, parameter, action)
        z, _, y = layer.move()
        change = torch.sub(y, z, alpha=layer.rho)
        return _unpack(torch.addmm(layer.weight, change.T, layer.factor, beta=layer.rho), weight, bias)


@torch.library.impl("symtele_cuda::teleport_layer_backward", "default")
def _backward(
    grad_weight: Tensor,
    grad_bias: Tensor,
    weight: Tensor,
    inputs: Tensor,
    g: Tensor,
    bias: Tensor | None,
    activation: str,
    parameter: float,
    action: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂f/∂W, ∂f/∂g and ∂f/∂b, the last empty without bias."""
    with _full_precision(weight):
        layer = _prepare(weight, inputs, g, bias, activation, parameter, action)
        grad = _pack(grad_weight, grad_bias if bias is not None else None)
        z, s, y = layer.move()
        grad_y = layer.factor @ grad.T
        grad_b = grad_y / layer.activation.derivative(y)
        grad_z = (grad_b @ layer.g) * layer.activation.derivative(z)
        through_z = torch.sub(grad_z, grad_y, alpha=layer.rho).T
        by_weight, by_bias = _unpack(torch.addmm(grad, through_z, layer.inputs, beta=layer.rho), weight, bias)
        return by_weight, (grad_b.T @ s).to(g.dtype), by_bias


@torch.library.impl("symtele_cuda::teleport_layer_double_backward", "default")
def _double_backward(
    change_weight: Tensor,
    change_g: Tensor,
    change_bias: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    weight: Tensor,
    inputs: Tensor,
    g: Tensor,
    bias: Tensor | None,
    activation: str,
    parameter: float,
    action: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of f(∂W, ∂g, ∂b) in grad_weight, grad_bias, W, g and b; those of the biases empty without bias."""
    with _full_precision(weight):
        layer = _prepare(weight, inputs, g, bias, activation, parameter, action)
        grad = _pack(grad_weight, grad_bias if bias is not None else None)
        change = _pack(change_weight, change_bias if bias is not None else None)
        change_g = change_g.to(layer.g.dtype)
        z, s, y = layer.move()
        slope_z, slope_y = layer.activation.derivative(z), layer.activation.derivative(y)

        change_z = layer.inputs @ change.T
        change_s = slope_z * change_z
        change_b = s @ change_g.T + change_s @ layer.g.T
        change_y = change_b / slope_y

        grad_y = layer.factor @ grad.T
        grad_b = grad_y / slope_y
        bent_b = -grad_b * change_y * _second_derivative(layer.activation, y) / slope_y
        grad_s = bent_b @ layer.g + grad_b @ change_g
        grad_z = grad_s * slope_z + (grad_b @ layer.g) * change_z * _second_derivative(layer.activation, z)

        moved = torch.sub(change_y, change_z, alpha=layer.rho).T
        by_grad_weight, by_grad_bias = _unpack(torch.addmm(change, moved, layer.factor, beta=layer.rho), weight, bias)
        by_weight, by_bias = _unpack(grad_z.T @ layer.inputs, weight, bias)
        by_g = torch.addmm(bent_b.T @ s, grad_b.T, change_s).to(g.dtype)
        return by_grad_weight, by_grad_bias, by_weight, by_g, by_bias


@torch.library.register_fake("symtele_cuda::teleport_layer")
def _forward_fake(
    weight: Tensor, inputs: Tensor, g: Tensor, bias: Tensor | None, activation: str, parameter: float, action: str
) -> tuple[Tensor, Tensor]:
    _check_tensors(weight, inputs, g, bias)
    return weight.new_empty(weight.shape), _empty_bias(weight, bias)


@torch.library.register_fake("symtele_cuda::teleport_layer_backward")
def _backward_fake(
    grad_weight: Tensor, grad_bias: Tensor, weight: Tensor, inputs: Tensor, g: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return weight.new_empty(weight.shape), g.new_empty(g.shape), _empty_bias(weight, bias)


@torch.library.register_fake("symtele_cuda::teleport_layer_double_backward")
def _double_backward_fake(
    change_weight: Tensor,
    change_g: Tensor,
    change_bias: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    weight: Tensor,
    inputs: Tensor,
    g: Tensor,
    bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    by_grad = weight.new_empty(weight.shape), _empty_bias(weight, bias)
    return *by_grad, weight.new_empty(weight.shape), g.new_empty(g.shape), _empty_bias(weight, bias)


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep the arguments of either differentiable operator: its tensors, and the three that describe σ and action."""
    *tensors, activation, parameter, action = inputs
    ctx.save_for_backward(*tensors)
    ctx.description = (activation, parameter, action)


def _differentiate_forward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    weight, inputs, g, bias = ctx.saved_tensors
    by_weight, by_g, by_bias = torch.ops.symtele_cuda.teleport_layer_backward(
        grad_weight, grad_bias, weight, inputs, g, bias, *ctx.description
    )
    return by_weight, None, by_g, None if bias is None else by_bias, None, None, None


def _differentiate_backward(
    ctx: Any, change_weight: Tensor, change_g: Tensor, change_bias: Tensor
) -> tuple[Tensor | None, ...]:
    grad_weight, grad_bias, weight, inputs, g, bias = ctx.saved_tensors
    by_grad_weight, by_grad_bias, by_weight, by_g, by_bias = torch.ops.symtele_cuda.teleport_layer_double_backward(
        change_weight, change_g, change_bias, grad_weight, grad_bias, weight, inputs, g, bias, *ctx.description
    )
    return by_grad_weight, by_grad_bias, by_weight, None, by_g, None if bias is None else by_bias, None, None, None


torch.library.register_autograd("symtele_cuda::teleport_layer", _differentiate_forward, setup_context=_save_layer)
torch.library.register_autograd(
    "symtele_cuda::teleport_layer_backward", _differentiate_backward, setup_context=_save_layer
)


# ---------------------------------------------------------------------------------------------------------------------
# what the three kernels share
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """One layer in the dtype of the computation, its bias packed as the last column."""

    weight: Tensor  # W̃ (d_out×d̃)
    inputs: Tensor  # H̃ (n×d̃)
    factor: Tensor  # P (n×d̃)
    g: Tensor
    activation: Activation
    rho: float

    def move(self) -> tuple[Tensor, Tensor, Tensor]:
        """Z, S = σ(Z) and Y = σ⁻¹(S gᵀ)."""
        z = self.inputs @ self.weight.T
        s = self.activation.forward(z)
        b = s @ self.g.T
        _check_domain(self.activation, b)
        return z, s, self.activation.inverse(b)


def _prepare(
    weight: Tensor, inputs: Tensor, g: Tensor, bias: Tensor | None, activation: str, parameter: float, action: str
) -> _Layer:
    _check_action(action)
    _check_tensors(weight, inputs, g, bias)
    dtype = _COMPUTE_DTYPE[weight.dtype]
    data = inputs.to(dtype)
    return _Layer(
        weight=_pack(weight, bias),
        inputs=data if bias is None else append_ones(data),
        factor=_exact_factor(data, bias is not None),
        g=g.to(dtype),
        activation=make_activation(activation, parameter),
        rho=ACTIONS[action],
    )


def _exact_factor(inputs: Tensor, bias: bool) -> Tensor:
    found = pinv_factor(inputs, bias)
    if found.factor is not None:
        return found.factor
    name, samples = "[inputs, 1]" if bias else "inputs", len(inputs)
    if found.rank < samples:
        expected, came = "full row rank, so that every sample can be matched", f"rank {found.rank}"
    else:
        expected = f"a condition number of at most {MAX_CONDITION[inputs.dtype]:g} in {inputs.dtype}"
        came = f"{found.condition:.2g} at full rank {found.rank}"
    raise TeleportError(
        f"{name} must have {expected}, got {came} for n={samples} samples; use fewer or more different samples"
    )


def _pack(matrix: Tensor, column: Tensor | None) -> Tensor:
    """[W, b] in the dtype of the computation, or W where there is no column."""
    joined = matrix if column is None else torch.cat([matrix, column.unsqueeze(1)], dim=1)
    return joined.to(_COMPUTE_DTYPE[matrix.dtype])


def _unpack(packed: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Split [W, b] into tensors of their own, rounded to the layer's dtype; b is empty where the layer has none."""
    columns = weight.shape[1]
    new = torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(packed[:, :columns])
    return new, _empty_bias(weight, bias).copy_(packed[:, columns:].flatten())


def _empty_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_empty(0 if bias is None else weight.shape[0])


def _second_derivative(activation: Activation, z: Tensor) -> Tensor:
    curvature = activation.second_derivative(z)
    return z.new_zeros(()) if curvature is None else curvature


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast off: it would compute the products of a float32 layer in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


# ---------------------------------------------------------------------------------------------------------------------
# checks
# ---------------------------------------------------------------------------------------------------------------------


def _choose_activation(activation: str | Activation, negative_slope: float) -> Activation:
    if isinstance(activation, Activation):
        return activation
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a name or an Activation, got {type(activation).__name__}")
    if activation != "leaky_relu":
        return make_activation(activation)
    if not isinstance(negative_slope, (int, float)):
        raise TypeError(f"negative_slope must be a number, got {type(negative_slope).__name__}")
    return make_activation(activation, negative_slope)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "cuda":
        raise ValueError(f"backend='cuda' is not available: {cuda_unavailable_reason()}")


def _check_action(action: str) -> None:
    if action not in ACTIONS:
        raise ValueError(f"action must be one of {tuple(ACTIONS)}, got {action!r}")


def _check_tensors(weight: Tensor, inputs: Tensor, g: Tensor, bias: Tensor | None) -> None:
    """Types, shapes, dtypes and devices: all that can be known without reading an element."""
    named = _named(weight, inputs, g, bias)
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight must have shape (d_out, d_in) with d_out, d_in >= 1, got {tuple(weight.shape)}")
    outputs, columns = weight.shape
    if inputs.ndim != 2 or inputs.shape[1] != columns or inputs.shape[0] == 0:
        raise ValueError(f"inputs must have shape (n, d_in={columns}) with n >= 1, got {tuple(inputs.shape)}")
    if g.shape != (outputs, outputs):
        raise ValueError(f"g must have shape (d_out={outputs}, d_out={outputs}), got {tuple(g.shape)}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must have shape (d_out={outputs},), got {tuple(bias.shape)}")
    if weight.dtype not in _COMPUTE_DTYPE:
        raise TypeError(f"weight must be one of {', '.join(map(str, _COMPUTE_DTYPE))}, got {weight.dtype}")
    for name, tensor in named.items():
        if tensor.dtype != weight.dtype:
            raise TypeError(f"{name} must have the dtype of weight, {weight.dtype}, got {tensor.dtype}")
        if tensor.device != weight.device:
            raise ValueError(f"{name} must be on the device of weight, {weight.device}, got {tensor.device}")
    limit = columns if bias is None else columns + 1
    if inputs.shape[0] > limit:
        expression = f"d_in={columns}" if bias is None else f"d_in + 1 = {limit}"
        raise ValueError(
            f"inputs must have at most {expression} samples, which is the largest possible rank, "
            f"got n={inputs.shape[0]} samples of shape {tuple(inputs.shape)}"
        )


def _check_values(weight: Tensor, inputs: Tensor, g: Tensor, bias: Tensor | None) -> None:
    for name, tensor in _named(weight, inputs, g, bias).items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinite elements")
    reciprocal = _reciprocal_condition(g)
    limit = 10 * torch.finfo(_COMPUTE_DTYPE[g.dtype]).eps
    if not reciprocal > limit:
        raise ValueError(
            f"g must be invertible, got a matrix with 1/condition = {reciprocal:.1e} "
            f"(singular in {g.dtype} below {limit:.1e})"
        )


@torch.no_grad()
def _reciprocal_condition(g: Tensor) -> float:
    """1 / (‖g‖ ‖g⁻¹‖) from one LU factorisation in float64, with ‖g⁻¹‖ from its effect on a few fixed vectors.

    At most a factor of about √d_out too large: enough to tell a singular matrix from a badly conditioned one.
    """
    exact = g.double()
    triangles, pivots, info = torch.linalg.lu_factor_ex(exact)
    if info.item() != 0:
        return 0.0
    probes = probe_vectors(exact)
    solved = torch.linalg.lu_solve(triangles, pivots, probes.T)
    stretch = (torch.linalg.vector_norm(solved, dim=0) / torch.linalg.vector_norm(probes, dim=1)).max()
    return (1 / (stretch * torch.linalg.matrix_norm(exact))).nan_to_num(nan=0.0).item()


def _check_domain(activation: Activation, moved: Tensor) -> None:
    if activation.contains(moved):
        return
    low, high = activation.domain
    outside = torch.where(torch.isfinite(moved), torch.maximum(low - moved, moved - high), torch.inf)
    worst = moved.flatten()[outside.argmax()].item()
    raise ValueError(
        f"g must keep σ(Z) gᵀ in ({low:g}, {high:g}), the domain of the inverse of {activation}, "
        f"got the value {worst:.9g}"
    )


def _named(weight: Tensor, inputs: Tensor, g: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    named = {"weight": weight, "inputs": inputs, "g": g}
    return named if bias is None else {**named, "bias": bias}
