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

H is data and gets no gradient. Each of the three is an operator of its own with a fake kernel. The first two are a few
fused products each (`products`), computed by the compiled kernels or by plain torch; the third is plain torch. bfloat16
and float16 are computed in float32 and rounded once.

The forward operator also returns Z, S, Y and P, in the dtype of the computation, for the other two to read, and what
tells whether the result is sound (`_Health`), which stays on the device until the end: on a GPU every question about a
value waits for all that was launched, so that the caller asks once. The operator is not differentiable in these five:
the gradients above are total, they count how Z, S and Y move with W̃ and g.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..activations import ACTIVATIONS, Activation, Scaled, activation_of, make_activation
from ..checks import check_name
from ..errors import TeleportError
from ..kernels.library import Products, check_backend, products_for
from ..kernels.pinv import MAX_CONDITION, absorb, append_ones, factorize, pinv_factor
from ..kernels.torch_kernels import multiply_remainder, padded_memory, probe_vectors, times_curvature

ACTIONS: dict[str, float] = {"least_change": 1.0, "paper": 0.0}
"""The actions, with the share ρ of the old weights that stays as the reference."""

# A tensor of more elements is refused on a GPU: the kernels were made and tested for no larger ones.
_MOST_ELEMENTS = 2**31


@dataclass(frozen=True)
class _IdentityTest:
    """When g counts as near enough to I to be invertible: where ‖R‖² ≤ vanished for the `identity_remainder` R.

    T = g − I of a singular g stretches some vector x, ‖x‖ = 1, by 1 or more, and then ‖R‖ ≥ ‖V x‖. The elements of V x
    are like as many random numbers of variance 1/3: all so small that such a g passes once in 10⁹ times.
    """

    vectors: int
    rounds: int
    vanished: float

    def remainder(self, products: Products, g: Tensor) -> Tensor:
        """R; on a CPU, which may look at it meanwhile, after as many rounds as it takes."""
        if not g.is_cpu:
            return products.identity_remainder(g, self.vectors, self.rounds)
        remainder = probe_vectors(self.vectors, g)
        for _ in range(self.rounds):
            remainder = multiply_remainder(remainder, g)
            if self.passes(products.squared_norms([remainder]).item()):
                break
        return remainder

    def passes(self, squared_norm: float) -> bool:
        return squared_norm <= self.vanished  # not NaN


# The first test of either passes g = 0.6 I, and I + 0.2 N / √d with N normal. On a GPU a launch has its price and a
# vector has none; its second test comes where the first has failed, before an LU.
_CPU_TESTS = (_IdentityTest(2, 8, 1e-9),)
_GPU_TESTS = (_IdentityTest(32, 3, 1.3), _IdentityTest(8, 8, 0.01))


def _identity_tests(g: Tensor) -> tuple[_IdentityTest, ...]:
    return _CPU_TESTS if g.is_cpu else _GPU_TESTS


# Vectors that tell how large g⁻¹ is.
_PROBES = 2

# Between these magnitudes of the inputs no Gram matrix, and no norm of one or of its inverse, leaves float64.
_SCALES = (1e-70, 1e70)

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

    Differentiable in weight, g and bias, twice, by backward mode; inputs are data and get no gradient. A third
    derivative and forward mode (torch.func.jvp and jacfwd, torch.autograd.forward_ad) raise NotImplementedError. The
    other transforms of torch.func (vmap, grad, jacrev, ...) and torch.compile(fullgraph=True) are not supported: torch
    refuses them, as the values of the arguments are checked. Deterministic on the CPU.

    Args:
        weight: W (d_out×d_in), float64, float32, bfloat16 or float16 (these two computed in float32, rounded once).
        inputs: H (n×d_in), the layer's inputs, n ≤ d_in + 1 (n ≤ d_in without bias), H̃ of full row rank.
        g: the group element (d_out×d_out), invertible.
        bias: b (d_out), or None for a layer without bias. All tensors have one dtype and one device.
        activation: the layer's σ, a name of `activations.ACTIVATIONS` ("leaky_relu", "tanh", "sigmoid", "softplus",
            "elu", "softsign", "log_sigmoid", "identity") or one of the library's Activations, which also gives ELU its
            α, Softplus its β and all of them the numbers of `activations.scaled`.
        negative_slope: slope of activation="leaky_relu", > 0; the other activations do not read it.
        action: "least_change" or "paper".
        backend: "torch" computes with torch's own kernels on the tensors' device, "cuda" with the compiled ones, and
            "auto" with these for CUDA tensors where the installation has them.

    Returns:
        W' (d_out×d_in) and b' (d_out), None without bias.

    Raises:
        TypeError: an argument of the wrong type, dtypes that differ or are no floating-point dtype of the list above.
        ValueError: wrong shapes, devices that differ or are "meta", elements that are not finite, an unknown name, a
            slope that is not positive, a singular g, more samples than can be matched, σ(Z) gᵀ outside the domain of
            σ⁻¹, new weights that overflow their dtype, a CUDA tensor of more than 2³¹ elements, or backend="cuda" where
            the compiled kernels cannot be had.
        TeleportError: inputs that are not of full row rank, worse conditioned than `pinv.MAX_CONDITION`, or of a scale
            whose Gram matrix leaves float64.
        NotImplementedError: a derivative in forward mode, or a third one.
    """
    chosen = _choose_activation(activation, negative_slope)
    check_backend(backend)
    check_name("action", action, ACTIONS)
    _check_tensors(weight, inputs, g, bias)
    _check_no_tangent(_named(weight, inputs, g, bias))
    if weight.is_meta:
        raise ValueError("weight must hold numbers to compute with, got a tensor on the meta device")
    layer = _Layer(weight, inputs, g, bias, *chosen.sigma, action, backend)
    compiling = torch.compiler.is_compiling()  # a compiler is to see one operator
    operator = torch.ops.symtele_cuda.teleport_layer if compiling else _TeleportLayer.apply
    new_weight, new_bias, z, *_, measured = operator(*layer)
    _check_health(_Health(*measured.tolist()), layer, z, new_weight, new_bias)
    return new_weight, None if bias is None else new_bias


# ---------------------------------------------------------------------------------------------------------------------
# the operators
# ---------------------------------------------------------------------------------------------------------------------

_LAYER = (
    "Tensor weight, Tensor inputs, Tensor g, Tensor? bias, str activation, float[] numbers, str action, str backend"
)
_SAVED = "Tensor z, Tensor s, Tensor y, Tensor factor"
_GRADS = "Tensor grad_weight, Tensor grad_bias"
_CHANGES = "Tensor change_weight, Tensor change_g, Tensor change_bias"

torch.library.define(
    "symtele_cuda::teleport_layer", f"({_LAYER}) -> (Tensor weight, Tensor bias, {_SAVED}, Tensor health)"
)
torch.library.define(
    "symtele_cuda::teleport_layer_backward",
    f"(bool with_layer, {_GRADS}, {_SAVED}, {_LAYER}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "symtele_cuda::teleport_layer_double_backward",
    f"({_CHANGES}, {_GRADS}, {_SAVED}, {_LAYER}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _checked_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """`_forward` for who calls the operator itself."""
    layer = _Layer(*arguments)
    check_name("action", layer.action, ACTIONS)
    _check_tensors(*layer.tensors())
    return _forward(*layer)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """W', b' (empty without bias), Z, S, Y, P and the numbers of `_Health`."""
    layer = _Layer(*arguments)
    products, sigma = layer.products, (layer.activation, layer.numbers)
    with _full_precision(layer.weight):
        weight, inputs, g, bias = layer.widened()
        found = factorize(inputs, layer.has_bias, products)
        factor = found.factor()
        z, s = products.linear_activation(inputs, weight.T, bias, *sigma)
        y, change = products.inverse_activation(s, g.T, z, layer.rho, *sigma)
        new_weight, new_bias = (
            layer.weight.new_empty(0) if new is None else new.to(layer.weight.dtype)
            for new in absorb(products, factor, change, weight, bias, share=layer.rho)
        )
        results = [z, y, _widen(new_weight), _widen(new_bias)]
        health = products.squared_norms(
            [_identity_tests(g)[0].remainder(products, g), found.gram, found.inverse(), found.info, *results]
        )
        return new_weight, new_bias, z, s, y, factor, health


def _backward(
    with_layer: bool,
    grad_weight: Tensor,
    grad_bias: Tensor,
    z: Tensor,
    s: Tensor,
    y: Tensor,
    factor: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂f/∂W, ∂f/∂g and ∂f/∂b. Those of W and b, half of the work, are empty unless `with_layer` asks for them."""
    layer = _Layer(*arguments)
    products, sigma = layer.products, (layer.activation, layer.numbers)
    with _full_precision(layer.weight):
        _, inputs, g, bias = layer.widened()
        grad_weight, grad_bias = _widen(grad_weight), _widen(grad_bias)
        column, row = (None, None) if bias is None else (factor[:, -1], grad_bias)
        grad_y, grad_b = products.over_slope(layer.without_ones(factor), grad_weight.T, column, row, y, *sigma)
        by_g = products.linear(grad_b.T, s).to(layer.g.dtype)
        by_weight, by_bias = layer.nothing()
        if with_layer:
            through_z = products.times_slope(grad_b, g, z, grad_y, -layer.rho, *sigma)
            kept = grad_weight if layer.rho else None
            by_weight = products.linear(through_z.T, inputs, kept, beta=layer.rho).to(layer.weight.dtype)
            if bias is not None:
                by_bias = torch.add(through_z.sum(0), grad_bias, alpha=layer.rho).to(layer.weight.dtype)
        return by_weight, by_g, by_bias


def _double_backward(
    change_weight: Tensor,
    change_g: Tensor,
    change_bias: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    z: Tensor,
    s: Tensor,
    y: Tensor,
    factor: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of f(∂W, ∂g, ∂b) in grad_weight, grad_bias, W, g and b; those of the biases empty without bias."""
    layer = _Layer(*arguments)
    with _full_precision(layer.weight):
        sigma, inputs, g, change_g = layer.sigma, layer.extended_inputs(), _widen(layer.g), _widen(change_g)
        grad, change = _pack(grad_weight, grad_bias), _pack(change_weight, change_bias)
        slope_z, slope_y, named = sigma.derivative(z), sigma.derivative(y), (layer.activation, layer.numbers)

        change_z = inputs @ change.T
        change_s = slope_z * change_z
        change_b = s @ change_g.T + change_s @ g.T
        change_y = change_b / slope_y

        grad_y = factor @ grad.T
        grad_b = grad_y / slope_y
        bent_b = times_curvature(-grad_b, change_y, y, None, *named) / slope_y
        grad_s = bent_b @ g + grad_b @ change_g
        grad_z = times_curvature(grad_b @ g, change_z, z, grad_s * slope_z, *named)

        moved = torch.sub(change_y, change_z, alpha=layer.rho).T
        by_grad_weight, by_grad_bias = layer.unpack(torch.addmm(change, moved, factor, beta=layer.rho))
        by_weight, by_bias = layer.unpack(grad_z.T @ inputs)
        by_g = torch.addmm(bent_b.T @ s, grad_b.T, change_s).to(layer.g.dtype)
        return by_grad_weight, by_grad_bias, by_weight, by_g, by_bias


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    layer = _Layer(*arguments)
    _check_tensors(*layer.tensors())
    inputs, (outputs, columns) = _widen(layer.inputs), layer.weight.shape
    z = inputs.new_empty(len(inputs), outputs)
    factor = padded_memory(inputs, len(inputs), columns + int(layer.has_bias))
    health = layer.weight.new_empty(len(_Health._fields), dtype=torch.float64)
    return *layer.new_empty(), z, torch.empty_like(z), torch.empty_like(z), factor, health


def _backward_fake(with_layer: bool, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    layer = _Layer.at_the_end_of(arguments)
    by_weight, by_bias = layer.new_empty() if with_layer else layer.nothing()
    return by_weight, layer.g.new_empty(layer.g.shape), by_bias


def _double_backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layer = _Layer.at_the_end_of(arguments)
    by_weight, by_bias = layer.new_empty()
    return *layer.new_empty(), by_weight, layer.g.new_empty(layer.g.shape), by_bias


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    saved, health = output[2:6], output[6]
    ctx.mark_non_differentiable(*saved, health)
    ctx.save_for_backward(*saved, *inputs[:4])
    ctx.description = inputs[4:]


def _differentiate_forward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    _check_no_tangent({"the gradient of the new weight": grad_weight, "the gradient of the new bias": grad_bias})
    needs_weight, _, _, needs_bias, *_ = ctx.needs_input_grad
    # Where no further derivative is to come, the kernel itself, as in `_TeleportLayer`.
    backward = torch.ops.symtele_cuda.teleport_layer_backward if torch.is_grad_enabled() else _backward
    by_weight, by_g, by_bias = backward(
        needs_weight or needs_bias, grad_weight, grad_bias, *ctx.saved_tensors, *ctx.description
    )
    by_layer = by_weight if needs_weight else None, None, by_g, by_bias if needs_bias else None
    return *by_layer, *(None for _ in ctx.description)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.with_layer, *tensors = inputs[:11]
    ctx.save_for_backward(*tensors)
    ctx.description = inputs[11:]


def _differentiate_backward(
    ctx: Any, change_weight: Tensor, change_g: Tensor, change_bias: Tensor
) -> tuple[Tensor | None, ...]:
    grad_weight, grad_bias, *_, bias = ctx.saved_tensors
    if not ctx.with_layer:  # ∂f/∂W and ∂f/∂b were not computed, so nothing depends on them
        change_weight, change_bias = torch.zeros_like(grad_weight), torch.zeros_like(grad_bias)
    by_grad_weight, by_grad_bias, by_weight, by_g, by_bias = torch.ops.symtele_cuda.teleport_layer_double_backward(
        change_weight, change_g, change_bias, *ctx.saved_tensors, *ctx.description
    )
    by_layer = by_weight, None, by_g, None if bias is None else by_bias
    return None, by_grad_weight, by_grad_bias, *(None for _ in range(4)), *by_layer, *(None for _ in ctx.description)


def _refuse_third_derivative(ctx: Any, *_: Tensor) -> NoReturn:
    raise NotImplementedError("teleport_layer is differentiable twice, got a request for its third derivative")


for _operator, _kernel, _fake in (
    ("teleport_layer", _checked_forward, _forward_fake),
    ("teleport_layer_backward", _backward, _backward_fake),
    ("teleport_layer_double_backward", _double_backward, _double_backward_fake),
):
    torch.library.impl(f"symtele_cuda::{_operator}", "default", _kernel)
    torch.library.register_fake(f"symtele_cuda::{_operator}", _fake)

torch.library.register_autograd("symtele_cuda::teleport_layer", _differentiate_forward, setup_context=_save_forward)
torch.library.register_autograd(
    "symtele_cuda::teleport_layer_backward", _differentiate_backward, setup_context=_save_backward
)
torch.library.register_autograd("symtele_cuda::teleport_layer_double_backward", _refuse_third_derivative)


class _TeleportLayer(torch.autograd.Function):
    """The operator on checked arguments, without the dispatcher, whose time is felt where the layer is small."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        results = _forward(*arguments)
        _save_forward(ctx, arguments, results)
        return results

    backward = staticmethod(_differentiate_forward)


# ---------------------------------------------------------------------------------------------------------------------
# what the three kernels share
# ---------------------------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """The operator's arguments in the order of its schema, and what the kernels read off them."""

    weight: Tensor
    inputs: Tensor
    g: Tensor
    bias: Tensor | None
    activation: str
    numbers: Sequence[float]
    action: str
    backend: str

    @classmethod
    def at_the_end_of(cls, arguments: tuple[Any, ...]) -> _Layer:
        """These are the last arguments of all three operators."""
        return cls(*arguments[-len(cls._fields) :])

    @property
    def sigma(self) -> Activation:
        return activation_of(self.activation, self.numbers)

    @property
    def rho(self) -> float:
        return ACTIONS[self.action]

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    @property
    def products(self) -> Products:
        return products_for(self.weight.device, self.backend)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.weight, self.inputs, self.g, self.bias

    def widened(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The tensors in the dtype of the computation."""
        return (
            _widen(self.weight),
            _widen(self.inputs),
            _widen(self.g),
            None if self.bias is None else _widen(self.bias),
        )

    def extended_inputs(self) -> Tensor:
        """H̃ in the dtype of the computation."""
        inputs = _widen(self.inputs)
        return append_ones(inputs) if self.has_bias else inputs

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """W and b, tensors of their own, rounded to the layer's dtype; b is empty where the layer has no bias."""
        if not self.has_bias:
            return packed.to(self.weight.dtype), self.weight.new_empty(0)
        weight, bias = self.new_empty()
        return weight.copy_(packed[:, :-1]), bias.copy_(packed[:, -1])

    def new_empty(self) -> tuple[Tensor, Tensor]:
        """Memory for a W and a b."""
        outputs = len(self.weight)
        return self.weight.new_empty(self.weight.shape), self.weight.new_empty(outputs if self.has_bias else 0)

    def without_ones(self, extended: Tensor) -> Tensor:
        """The columns of an n×d̃ matrix that belong to W."""
        return extended[:, : self.weight.shape[1]]

    def nothing(self) -> tuple[Tensor, Tensor]:
        """What stands for a W and a b that were not asked for."""
        return self.weight.new_empty(0), self.weight.new_empty(0)


def _widen(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype of the computation."""
    dtype = _COMPUTE_DTYPE[tensor.dtype]
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _pack(matrix: Tensor, column: Tensor | None) -> Tensor:
    """[W, b] in the dtype of the computation, or W where there is no b: None or empty."""
    if column is None or column.numel() == 0:
        return _widen(matrix)
    return _widen(torch.cat([matrix, column.unsqueeze(1)], dim=1))


def _full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: it would compute the products of a float32 layer in half precision."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# checks
# ---------------------------------------------------------------------------------------------------------------------


def _choose_activation(activation: str | Activation, negative_slope: float) -> Activation:
    if isinstance(activation, Activation):
        base = activation.base if isinstance(activation, Scaled) else activation
        known_ones = [cls for cls in ACTIVATIONS.values() if cls.invertible]
        if type(base) not in known_ones:  # the operator goes by the name, which a subclass inherits
            known = ", ".join(cls.__name__ for cls in known_ones)
            raise TypeError(f"activation must be a name or one of {known} itself, got {type(activation).__name__}")
        return activation
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a name or an Activation, got {type(activation).__name__}")
    if activation != "leaky_relu":
        return make_activation(activation)
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, numbers.Real):
        raise TypeError(f"negative_slope must be a number, got {type(negative_slope).__name__}")
    return make_activation(activation, negative_slope)


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
        if tensor.is_cuda and tensor.numel() > _MOST_ELEMENTS:
            raise ValueError(f"{name} must have at most 2³¹ elements on {tensor.device}, got {tensor.numel()}")
    limit = columns if bias is None else columns + 1
    if inputs.shape[0] > limit:
        expression = f"d_in={columns}" if bias is None else f"d_in + 1 = {limit}"
        raise ValueError(
            f"inputs must have at most {expression} samples, which is the largest possible rank, "
            f"got n={inputs.shape[0]} samples of shape {tuple(inputs.shape)}"
        )


def _check_no_tangent(named: dict[str, Tensor]) -> None:
    """torch drops the tangents that reach an operator without a forward derivative, and does not say so."""
    for name, tensor in named.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} must have no tangent, got one: teleport_layer has no forward-mode derivative; "
                "torch.autograd.functional.jvp computes the same from its backward derivatives"
            )


class _Health(NamedTuple):
    """Squared norms that a layer's kernel leaves on its device, of which some are small where the result is sound.

    Attributes:
        remainder: of the `identity_remainder`: where it is not small g may be singular.
        gram, inverse: of K and K⁻¹, float64.
        info: not 0 where K is not positive definite.
        z, y, weight, bias: of Z, Y, W' and b', not finite where an argument is not, where Y left the domain of σ⁻¹ or
            where numbers overflowed, be it only their squares.
    """

    remainder: float
    gram: float
    inverse: float
    info: float
    z: float
    y: float
    weight: float
    bias: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.z + self.y + self.weight + self.bias)

    def matched(self, largest: float) -> bool:
        """Whether κ₂(H̃) is at most `largest` for sure: κ₂(H̃)² = κ₂(K) ≤ ‖K‖ ‖K⁻¹‖, which is often far too much."""
        return self.info == 0 and self.gram * self.inverse <= largest**4


@torch.no_grad()
def _check_health(health: _Health, layer: _Layer, z: Tensor, new_weight: Tensor, new_bias: Tensor) -> None:
    """Look closer where a number is not small, and raise the error that is behind it if there is one."""
    matched = health.matched(MAX_CONDITION[z.dtype])
    with _full_precision(z):
        if not (matched and health.finite):
            for name, tensor in _named(layer.weight, layer.inputs, layer.g, layer.bias).items():
                _check_finite(name, tensor)
        if not _identity_tests(layer.g)[0].passes(health.remainder):
            _check_invertible(layer.products, layer.g)
        if not matched:
            _check_matched(_widen(layer.inputs), layer.has_bias, health)
        if not health.finite:
            _check_domain(layer.sigma, layer.sigma.forward(z) @ _widen(layer.g).T)
            _check_range("weight", new_weight)
            if layer.has_bias:
                _check_range("bias", new_bias)


def _check_matched(inputs: Tensor, bias: bool, health: _Health) -> None:
    found = pinv_factor(inputs, bias)
    if found.matched and health.info == 0:
        return
    name, samples, (low, high) = "[inputs, 1]" if bias else "inputs", len(inputs), _SCALES
    largest = inputs.abs().max().item()
    advice = f" for n={samples} samples; use fewer or more different samples"
    if found.rank < samples:
        expected, came = "full row rank, so that every sample can be matched", f"rank {found.rank}"
    elif not low <= largest <= high:
        expected, came = f"a largest magnitude from {low:g} to {high:g}", f"{largest:.1e}"
        advice = ": their Gram matrix is out of the range of float64; rescale them"
    else:
        expected = f"a condition number of at most {MAX_CONDITION[inputs.dtype]:g} in {inputs.dtype}"
        came = f"{found.condition:.2g} at full rank {found.rank}"
    raise TeleportError(f"{name} must have {expected}, got {came}{advice}")


def _check_range(name: str, new: Tensor) -> None:
    if not _is_finite(new):
        raise ValueError(
            f"the new {name} must be at most {torch.finfo(new.dtype).max:g}, the largest number of {new.dtype}, "
            "got an overflow; use a dtype of wider range or a g nearer to I"
        )


def _check_finite(name: str, tensor: Tensor) -> None:
    if not _is_finite(tensor):
        raise ValueError(f"{name} must be finite, got NaN or infinite elements")


def _is_finite(tensor: Tensor) -> bool:
    """From the extremes, which are NaN if any element is: several times faster than `isfinite` of every element."""
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def _check_invertible(products: Products, g: Tensor) -> None:
    widened = _widen(g)
    for test in _identity_tests(g)[1:]:
        if test.passes(products.squared_norms([test.remainder(products, widened)]).item()):
            return
    reciprocal, limit = _reciprocal_condition(widened), 10 * torch.finfo(widened.dtype).eps
    if not reciprocal > limit:
        raise ValueError(
            f"g must be invertible, got a matrix with 1/condition = {reciprocal:.1e} "
            f"(singular in {g.dtype} below {limit:.1e})"
        )


def _reciprocal_condition(g: Tensor) -> float:
    """1 / (‖g‖ ‖g⁻¹‖) from one LU factorisation in float64, with ‖g⁻¹‖ from its effect on a few fixed vectors.

    At most a factor of about √d_out too large: enough to tell a singular matrix from a badly conditioned one.
    """
    exact = g.double()
    triangles, pivots, info = torch.linalg.lu_factor_ex(exact)
    if info.item() != 0:
        return 0.0
    probes = probe_vectors(_PROBES, exact)
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
