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
tells whether the result is sound (`Health`), which stays on the device until the end, so that the caller asks once. It
is not differentiable in these five: the gradients above are total, they count how Z, S and Y move with W̃ and g.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..activations import Activation
from ..checks import check_bool, check_name
from ..kernels.library import check_backend
from ..kernels.pinv import absorb, factorize
from ..kernels.torch_kernels import padded_memory, times_curvature
from .health import Health, check_health, measure_health
from .layer import (
    ACTIONS,
    Layer,
    check_no_tangent,
    check_tensors,
    choose_activation,
    full_precision,
    named_tensors,
    pack,
    widen,
)


def teleport_layer(
    weight: Tensor,
    inputs: Tensor,
    g: Tensor,
    bias: Tensor | None = None,
    activation: str | Activation = "leaky_relu",
    negative_slope: float = 0.1,
    action: str = "least_change",
    backend: str = "auto",
    check: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The weights with which a layer turns its batch into activations moved by g: σ(H W'ᵀ + b') = σ(H Wᵀ + b) gᵀ.

        Z = H Wᵀ + b,  Y = σ⁻¹(σ(Z) gᵀ),  [W', b'] = [R, r] + (Y − H Rᵀ − r)ᵀ P,  P = (H̃ H̃ᵀ)⁻¹ H̃,  H̃ = [H, 1]

    With action="least_change", R, r = W, b: the smallest change of [W, b] with this effect, none at g = I. With
    action="paper", R = 0, r = 0: W' = Yᵀ H⁺ᵀ (Zhao, Dehmamy, Walters, Yu 2022, eq. 8), which forgets what W does off
    the batch. The two agree where H̃ is square. Without bias b, r and the column of ones are absent. A singular g is no
    error: g is never inverted, and the formula holds as long as σ(Z) gᵀ lies in the domain of σ⁻¹. The new layer then
    gives activations of lower rank, from which no layer behind it can recover the old ones.

    Differentiable in weight, g and bias, twice, by backward mode; inputs are data and get no gradient. A third
    derivative and forward mode (torch.func.jvp and jacfwd, torch.autograd.forward_ad) raise NotImplementedError. The
    other transforms of torch.func (vmap, grad, jacrev, ...) and, where it checks, torch.compile(fullgraph=True) are not
    supported: torch refuses them. Deterministic on the CPU.

    Args:
        weight: W (d_out×d_in), float64, float32, bfloat16 or float16 (these two computed in float32, rounded once).
        inputs: H (n×d_in), the layer's inputs, n ≤ d_in + 1 (n ≤ d_in without bias), H̃ of full row rank.
        g: the group element (d_out×d_out).
        bias: b (d_out), or None for a layer without bias. All tensors have one dtype and one device.
        activation: the layer's σ, a name of `activations.ACTIVATIONS` ("leaky_relu", "tanh", "sigmoid", "softplus",
            "elu", "softsign", "log_sigmoid", "identity") or one of the library's Activations, which also gives ELU its
            α, Softplus its β and all of them the numbers of `activations.scaled`.
        negative_slope: slope of activation="leaky_relu", > 0; the other activations do not read it.
        action: "least_change" or "paper".
        backend: "torch" computes with torch's own kernels on the tensors' device, "cuda" with the compiled ones, and
            "auto" with these for CUDA tensors where the installation has them.
        check: whether to measure and read back that the arguments and the result are finite, that H̃ is of full rank
            and well conditioned, and that σ(Z) gᵀ lies in the domain. Without it nothing waits for the device, and
            where one of these does not hold the result is not finite or holds no meaning, without an error.

    Returns:
        W' (d_out×d_in) and b' (d_out), None without bias.

    Raises:
        TypeError: an argument of the wrong type, dtypes that differ or are no floating-point dtype of the list above.
        ValueError: wrong shapes, devices that differ or are "meta", an unknown name, a slope that is not positive, more
            samples than can be matched, a CUDA tensor of more than 2³¹ elements, or backend="cuda" where the compiled
            kernels cannot be had; where it checks, elements that are not finite, σ(Z) gᵀ outside the domain of σ⁻¹, or
            new weights that overflow their dtype.
        TeleportError: where it checks, inputs that are not of full row rank, worse conditioned than
            `pinv.MAX_CONDITION`, or of a scale whose Gram matrix leaves float64.
        NotImplementedError: a derivative in forward mode, or a third one.
    """
    chosen = choose_activation(activation, negative_slope)
    check_backend(backend)
    check_name("action", action, ACTIONS)
    check_bool("check", check)
    named = named_tensors(weight, inputs, g, bias)
    check_tensors(**named)
    for name, tensor in named.items():
        check_no_tangent(name, tensor)
    if weight.is_meta:
        raise ValueError("weight must hold numbers to compute with, got a tensor on the meta device")
    description = *chosen.sigma, action, backend
    if not torch.compiler.is_compiling():
        return _TeleportLayer.apply(check, weight, inputs, g, bias, description)
    # A compiler is to see one operator.
    layer = Layer(weight, inputs, g, bias, *description)
    new_weight, empty_or_bias, z, *_, measured = torch.ops.symtele_cuda.teleport_layer(check, *layer)
    new_bias = None if bias is None else empty_or_bias
    if check:
        check_health(measured, layer, z, new_weight, new_bias)
    return new_weight, new_bias


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
    "symtele_cuda::teleport_layer", f"(bool check, {_LAYER}) -> (Tensor weight, Tensor bias, {_SAVED}, Tensor health)"
)
torch.library.define(
    "symtele_cuda::teleport_layer_backward",
    f"(bool with_layer, {_GRADS}, {_SAVED}, {_LAYER}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "symtele_cuda::teleport_layer_double_backward",
    f"({_CHANGES}, {_GRADS}, {_SAVED}, {_LAYER}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _forward(check: bool, *arguments: Any) -> tuple[Tensor, ...]:
    layer = Layer(*arguments)
    check_name("action", layer.action, ACTIONS)
    check_tensors(*layer.tensors())
    new_weight, new_bias, saved, measured = _transform(check, layer)
    unmeasured, no_bias = layer.nothing()
    return (
        new_weight,
        no_bias if new_bias is None else new_bias,
        *saved,
        unmeasured if measured is None else measured,
    )


def _transform(check: bool, layer: Layer) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...], Tensor | None]:
    """W', b', (Z, S, Y, P), and the numbers of `Health` if they are to be checked."""
    products, sigma, rho = layer.products, (layer.activation, layer.numbers), layer.rho
    with full_precision(layer.weight):
        weight, inputs, g, bias = layer.widened()
        found = factorize(inputs, bias is not None, products)
        factor = found.factor()
        z, s = products.linear_activation(inputs, weight.T, bias, *sigma)
        y, change = products.inverse_activation(s, g.T, z, rho, *sigma)
        exact_weight, exact_bias = absorb(products, factor, change, weight, bias, share=rho)
        new_weight = layer.narrow(exact_weight)
        new_bias = None if exact_bias is None else layer.narrow(exact_bias)
        measured = measure_health(products, found, z, new_weight, new_bias) if check else None
    return new_weight, new_bias, (z, s, y, factor), measured


def _backward(with_layer: bool, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    layer = Layer.at_the_end_of(arguments)
    by_weight, by_g, by_bias = _pull_back(with_layer, layer, *arguments[: -len(layer)])
    none_weight, none_bias = layer.nothing()
    return none_weight if by_weight is None else by_weight, by_g, none_bias if by_bias is None else by_bias


def _pull_back(
    with_layer: bool,
    layer: Layer,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    z: Tensor,
    s: Tensor,
    y: Tensor,
    factor: Tensor,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """∂f/∂W, ∂f/∂g and ∂f/∂b. Those of W and b, half of the work, are None unless `with_layer` asks for them."""
    products, sigma, rho = layer.products, (layer.activation, layer.numbers), layer.rho
    with full_precision(layer.weight):
        grad_weight = widen(grad_weight)
        column, row = None, None
        if layer.bias is not None and grad_bias is not None:
            column, row, factor = factor[:, -1], widen(grad_bias), factor[:, :-1]
        grad_y, grad_b = products.over_slope(factor, grad_weight.T, column, row, y, *sigma)
        by_g = layer.narrow(products.linear(grad_b.T, s))
        if not with_layer:
            return None, by_g, None
        through_z = products.times_slope(grad_b, widen(layer.g), z, grad_y, -rho, *sigma)
        kept = grad_weight if rho else None
        by_weight = layer.narrow(products.linear(through_z.T, widen(layer.inputs), kept, beta=rho))
        by_bias = None if row is None else layer.narrow(torch.add(through_z.sum(0), row, alpha=rho))
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
    layer = Layer(*arguments)
    with full_precision(layer.weight):
        sigma, inputs, g, change_g = layer.sigma, layer.extended_inputs(), widen(layer.g), widen(change_g)
        grad, change = pack(grad_weight, grad_bias), pack(change_weight, change_bias)
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


def _forward_fake(check: bool, *arguments: Any) -> tuple[Tensor, ...]:
    layer = Layer(*arguments)
    check_tensors(*layer.tensors())
    inputs, (outputs, columns) = widen(layer.inputs), layer.weight.shape
    z = inputs.new_empty(len(inputs), outputs)
    factor = padded_memory(inputs, len(inputs), columns + int(layer.has_bias))
    numbers = len(Health._fields) - (not layer.has_bias)
    measured = z.new_empty(numbers, dtype=torch.float64) if check else layer.weight.new_empty(0)
    return *layer.new_empty(), z, torch.empty_like(z), torch.empty_like(z), factor, measured


def _backward_fake(with_layer: bool, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    layer = Layer.at_the_end_of(arguments)
    by_weight, by_bias = layer.new_empty() if with_layer else layer.nothing()
    return by_weight, layer.g.new_empty(layer.g.shape), by_bias


def _double_backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layer = Layer.at_the_end_of(arguments)
    by_weight, by_bias = layer.new_empty()
    return *layer.new_empty(), by_weight, layer.g.new_empty(layer.g.shape), by_bias


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    _keep(ctx, Layer(*inputs[1:]), output[2:6])


def _keep(ctx: Any, layer: Layer, saved: tuple[Tensor, ...]) -> None:
    """What the backward pass reads."""
    ctx.save_for_backward(*saved, *layer.tensors())
    ctx.description = layer[4:]


def _differentiate(ctx: Any, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the whole layer."""
    check_no_tangent("the gradient of the new weight", grad_weight)
    check_no_tangent("the gradient of the new bias", grad_bias)
    _, needs_weight, _, _, needs_bias, *_ = ctx.needs_input_grad
    with_layer, (*saved, weight, inputs, g, bias) = needs_weight or needs_bias, ctx.saved_tensors
    layer = Layer(weight, inputs, g, bias, *ctx.description)
    if torch.is_grad_enabled():
        given = layer.nothing()[1] if grad_bias is None else grad_bias
        operator = torch.ops.symtele_cuda.teleport_layer_backward
        by_weight, by_g, by_bias = operator(with_layer, grad_weight, given, *saved, *layer)
    else:  # no further derivative is to come
        by_weight, by_g, by_bias = _pull_back(with_layer, layer, grad_weight, grad_bias, *saved)
    return by_weight if needs_weight else None, None, by_g, by_bias if needs_bias else None


def _differentiate_forward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return None, *_differentiate(ctx, grad_weight, grad_bias), *(None for _ in ctx.description)


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
    ("teleport_layer", _forward, _forward_fake),
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
    def forward(ctx: Any, check: bool, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        *tensors, description = arguments
        layer = Layer(*tensors, *description)
        new_weight, new_bias, saved, measured = _transform(check, layer)
        if measured is not None:
            check_health(measured, layer, saved[0], new_weight, new_bias)
        _keep(ctx, layer, saved)
        return new_weight, new_bias

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_differentiate(ctx, grad_weight, grad_bias), None
