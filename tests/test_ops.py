"""The operator against its plain-torch twin, numerical derivatives, opcheck, and every argument it must refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from exhaustive import mostly
from sigmas import ONE_OF_EACH
from torch import Tensor
from torch.autograd import forward_ad

from symtele_cuda.activations import ELU, Activation, LeakyReLU, Sigmoid, Softplus, Tanh
from symtele_cuda.errors import TeleportError
from symtele_cuda.kernels import extension
from symtele_cuda.kernels import torch_kernels as products
from symtele_cuda.kernels.pinv import MAX_CONDITION, append_ones, pinv_factor
from symtele_cuda.operator import health, reference
from symtele_cuda.operator import teleport_layer as ops
from symtele_cuda.operator.teleport_layer import teleport_layer

EVERY = [*ONE_OF_EACH, LeakyReLU(2.0), Softplus(), ELU()]
ACTIONS = list(ops.ACTIONS)

every_activation = pytest.mark.parametrize("activation", EVERY, ids=lambda a: f"{a}({a.parameter:g})")
one_of_each = pytest.mark.parametrize("activation", ONE_OF_EACH, ids=str)
every_action = pytest.mark.parametrize("action", ACTIONS)
with_and_without_bias = pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])

# Relative to the Frobenius norm of what is compared. The weights carry u κ(H̃) (κ ≈ 10 here) times the slope of σ⁻¹; the
# half types are computed in float32, so that only their one rounding is left: u = 2⁻⁸ and 2⁻¹¹.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-4, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer, in the order of the operator's arguments."""

    weight: Tensor
    inputs: Tensor
    g: Tensor
    bias: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Layer:
        bias = None if self.bias is None else change(self.bias)
        return Layer(change(self.weight), change(self.inputs), change(self.g), bias)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.weight, self.inputs, self.g, self.bias

    def leaves(self) -> tuple[Tensor, ...]:
        """What is differentiated in: weight, g and bias."""
        return tuple(tensor for tensor in (self.weight, self.g, self.bias) if tensor is not None)

    def with_gradient(self) -> Layer:
        required = {id(tensor) for tensor in self.leaves()}
        return self.map(lambda tensor: tensor.clone().requires_grad_(id(tensor) in required))


def make_layer(n: int, d_in: int, d_out: int, bias: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> Layer:
    """A layer whose moved activations lie in every domain: g is nonnegative with row sums below one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = torch.rand(d_out, d_out, generator=generator, dtype=torch.float64)
    g = 0.6 * torch.eye(d_out, dtype=torch.float64) + 0.3 * mixing / mixing.sum(1, keepdim=True)
    weight = normal(d_out, d_in) / math.sqrt(d_in)
    return Layer(weight, normal(n, d_in), g, normal(d_out) / 2 if bias else None).map(lambda tensor: tensor.to(dtype))


def apply(layer: Layer, activation: Activation, action: str) -> tuple[Tensor, ...]:
    """The operator's outputs, without the one that is None."""
    results = teleport_layer(*layer.tensors(), activation=activation, action=action)
    return tuple(result for result in results if result is not None)


def apply_twin(layer: Layer, activation: Activation, action: str) -> tuple[Tensor, ...]:
    results = reference.teleport_layer(*layer.tensors(), activation, action)
    return tuple(result for result in results if result is not None)


def assert_agree(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal in relative Frobenius norm and in where they are zero; the worst element is named."""
    assert actual.shape == expected.shape, name
    difference = (actual.double() - expected.double()).abs()
    scale = torch.linalg.vector_norm(expected.double()).item()
    worst = difference.argmax().item()
    error = torch.linalg.vector_norm(difference).item()
    assert error <= tolerance * scale, (
        f"{name}: error {error:.2e} > {tolerance:.0e} × {scale:.2e}, "
        f"worst at {worst}: {actual.flatten()[worst]} for {expected.flatten()[worst]}"
    )
    assert torch.equal(actual == 0, expected.to(actual.dtype) == 0), f"{name}: another zero pattern"


def assert_all_agree(names: str, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """`names` are separated by blanks; the last one, the bias, may have no tensor."""
    assert len(actual) == len(expected)
    for name, one, other in zip(names.split()[: len(actual)], actual, expected, strict=True):
        assert_agree(name, one, other, tolerance)


def first_gradients(function: Callable[..., tuple[Tensor, ...]], layer: Layer, *description: Any) -> tuple[Tensor, ...]:
    """The gradients of Σ cos(i)·output_i, a function that no symmetry of the layer keeps."""
    layer = layer.with_gradient()
    outputs = function(layer, *description)
    return torch.autograd.grad(_weighted_sum(outputs), layer.leaves())


def second_gradients(
    function: Callable[..., tuple[Tensor, ...]], layer: Layer, *description: Any
) -> tuple[Tensor, ...]:
    """The gradients of Σ cos(i)·gradient_i: a Hessian-vector product with respect to weight, g and bias."""
    layer = layer.with_gradient()
    outputs = function(layer, *description)
    squares = tuple(output.square() for output in outputs)
    gradients = torch.autograd.grad(_weighted_sum(squares), layer.leaves(), create_graph=True)
    return torch.autograd.grad(_weighted_sum(gradients), layer.leaves())


def _weighted_sum(tensors: tuple[Tensor, ...]) -> Tensor:
    return sum(
        (torch.cos(torch.arange(tensor.numel(), dtype=torch.float64)).to(tensor.dtype) * tensor.flatten()).sum()
        for tensor in tensors
    )  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------------------------------
# what the new layer does
# ---------------------------------------------------------------------------------------------------------------------


@every_activation
@every_action
@with_and_without_bias
def test_the_new_layer_gives_the_moved_activations(activation: Activation, action: str, bias: bool) -> None:
    layer = make_layer(7, 12, 5, bias)
    new_weight, new_bias = teleport_layer(*layer.tensors(), activation=activation, action=action)
    assert (new_bias is None) == (not bias)
    moved = activation.forward(torch.nn.functional.linear(layer.inputs, layer.weight, layer.bias)) @ layer.g.T
    produced = activation.forward(torch.nn.functional.linear(layer.inputs, new_weight, new_bias))
    assert_agree("σ(Z')", produced, moved, 1e-12)


@every_activation
@with_and_without_bias
def test_least_change_at_the_identity_changes_nothing(activation: Activation, bias: bool) -> None:
    layer = make_layer(7, 12, 5, bias)
    layer = replace(layer, g=torch.eye(5, dtype=torch.float64))
    old = (layer.weight,) if layer.bias is None else (layer.weight, layer.bias)
    # The rounding of σ⁻¹(σ(Z)), at most u / σ'(Z) on each element, goes through P, whose norm is 1/σ_min ≈ 1.
    assert_all_agree("weight bias", apply(layer, activation, "least_change"), old, 1e-14)


@pytest.mark.parametrize("activation", [LeakyReLU(0.1), Tanh(), Softplus()], ids=str)
@with_and_without_bias
def test_the_actions_agree_where_the_batch_fills_the_space(activation: Activation, bias: bool) -> None:
    layer = make_layer(6 + bias, 6, 4, bias)
    by_paper, by_least_change = apply(layer, activation, "paper"), apply(layer, activation, "least_change")
    assert_all_agree("weight bias", by_paper, by_least_change, 1e-11)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 3), (5, 9, 1), (13, 17, 31), (32, 40, 24)], ids=str)
@every_action
@with_and_without_bias
def test_odd_sizes(shape: tuple[int, int, int], action: str, bias: bool) -> None:
    layer = make_layer(*shape, bias)
    assert_all_agree("weight bias", apply(layer, Tanh(), action), apply_twin(layer, Tanh(), action), 1e-11)


# ---------------------------------------------------------------------------------------------------------------------
# against the twin
# ---------------------------------------------------------------------------------------------------------------------


@every_activation
@every_action
@with_and_without_bias
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_outputs_and_gradients_are_those_of_the_twin(
    activation: Activation, action: str, bias: bool, dtype: torch.dtype
) -> None:
    layer = make_layer(9, 12, 6, bias, dtype)
    exact = layer.map(Tensor.double)
    outputs = apply(layer, activation, action)
    assert {output.dtype for output in outputs} == {dtype}
    assert_all_agree("weight' bias'", outputs, apply_twin(exact, activation, action), TOLERANCE[dtype])
    for names, derive in (("∂weight ∂g ∂bias", first_gradients), ("∂²weight ∂²g ∂²bias", second_gradients)):
        gradients = derive(apply, layer, activation, action)
        assert {gradient.dtype for gradient in gradients} == {dtype}
        assert_all_agree(names, gradients, derive(apply_twin, exact, activation, action), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [LeakyReLU(0.1), Tanh()], ids=str)
@every_action
@with_and_without_bias
def test_half_types_are_computed_in_float32_and_rounded_once(
    dtype: torch.dtype, activation: Activation, action: str, bias: bool
) -> None:
    layer = make_layer(6, 12, 5, bias, dtype)
    wide = layer.map(Tensor.float)
    outputs, expected = apply(layer, activation, action), apply(wide, activation, action)
    assert all(torch.equal(one, other.to(dtype)) for one, other in zip(outputs, expected, strict=True))

    gradients = first_gradients(apply, layer, activation, action)
    assert {gradient.dtype for gradient in gradients} == {dtype}
    # The incoming gradient, a product in the test, is rounded once too.
    expected_gradients = first_gradients(apply, wide, activation, action)
    assert_all_agree("∂weight ∂g ∂bias", gradients, expected_gradients, 4 * TOLERANCE[dtype])


@every_action
def test_autocast_does_not_reach_the_operator(action: str) -> None:
    layer = make_layer(6, 12, 5, bias=True, dtype=torch.float32)
    expected = apply(layer, Tanh(), action)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = apply(layer, Tanh(), action)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@every_action
@with_and_without_bias
def test_strided_tensors(action: str, bias: bool) -> None:
    layer = make_layer(6, 12, 5, bias)

    def spread(tensor: Tensor) -> Tensor:
        """The same values with gaps of NaN between them, and a transposed matrix."""
        wide = torch.full([2 * size for size in tensor.shape[::-1]], math.nan, dtype=tensor.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
        view.copy_(tensor.T if tensor.ndim == 2 else tensor)
        return view.T if tensor.ndim == 2 else view

    strided = layer.map(spread)
    assert not strided.weight.is_contiguous() and not strided.inputs.is_contiguous()
    outputs = apply(strided, Tanh(), action)
    assert all(output.is_contiguous() for output in outputs)
    assert_all_agree("weight bias", outputs, apply(layer, Tanh(), action), 1e-13)
    gradients, expected = (first_gradients(apply, at, Tanh(), action) for at in (strided, layer))
    assert_all_agree("∂weight ∂g ∂bias", gradients, expected, 1e-12)


@every_action
def test_twice_the_same(action: str) -> None:
    layer = make_layer(20, 30, 25, bias=True, dtype=torch.float32)
    first, second = (second_gradients(apply, layer, Tanh(), action) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_arguments_are_left_alone() -> None:
    layer = make_layer(6, 12, 5, bias=True)
    before = layer.map(Tensor.clone)
    new_weight, new_bias = apply(layer, LeakyReLU(), "paper")
    new_weight.zero_()
    new_bias.zero_()
    assert all(torch.equal(one, other) for one, other in zip(layer.tensors(), before.tensors(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# derivatives and registration
# ---------------------------------------------------------------------------------------------------------------------


@one_of_each
@every_action
@with_and_without_bias
@pytest.mark.parametrize("n", [3, 5], ids=["n<d", "n=d"])
def test_gradcheck_and_gradgradcheck(activation: Activation, action: str, bias: bool, n: int) -> None:
    layer = make_layer(n, 5, 3, bias, seed=2).with_gradient()

    def function(weight: Tensor, g: Tensor, *offset: Tensor) -> tuple[Tensor, ...]:
        return apply(Layer(weight, layer.inputs, g, offset[0] if offset else None), activation, action)

    assert torch.autograd.gradcheck(function, layer.leaves())
    assert torch.autograd.gradgradcheck(function, layer.leaves())


@one_of_each
@every_action
def test_gradgradcheck_where_only_g_is_differentiated(activation: Activation, action: str) -> None:
    layer = make_layer(3, 5, 3, bias=True, seed=2)
    g = layer.g.clone().requires_grad_()

    def function(g: Tensor) -> tuple[Tensor, ...]:
        return apply(replace(layer, g=g), activation, action)

    assert torch.autograd.gradgradcheck(function, g)


def cotangents(tensors: tuple[Tensor, ...], requires_grad: bool) -> tuple[Tensor, ...]:
    """Random gradients of these tensors."""
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).requires_grad_(requires_grad)
        for tensor in tensors
    )


@pytest.mark.parametrize("activation", mostly(ONE_OF_EACH, lambda one: one in ONE_OF_EACH[:2]), ids=str)
@every_action
@with_and_without_bias
def test_opcheck(activation: Activation, action: str, bias: bool) -> None:
    library = torch.ops.symtele_cuda
    description = (*activation.sigma, action, "auto")
    constant = (*make_layer(4, 5, 3, bias).tensors(), *description)
    layer = (*make_layer(4, 5, 3, bias).with_gradient().tensors(), *description)
    new_weight, new_bias, *saved, _ = library.teleport_layer(True, *constant)
    grads = cotangents((new_weight, new_bias), requires_grad=True)
    constant_grads = cotangents((new_weight, new_bias), requires_grad=False)
    gradients = library.teleport_layer_backward(True, *constant_grads, *saved, *constant)
    calls = [
        (library.teleport_layer.default, (True, *layer)),
        (library.teleport_layer.default, (False, *layer)),
        (library.teleport_layer_backward.default, (True, *grads, *saved, *layer)),
        (library.teleport_layer_backward.default, (False, *grads, *saved, *layer)),
        (
            library.teleport_layer_double_backward.default,
            (*cotangents(gradients, requires_grad=False), *constant_grads, *saved, *constant),
        ),
    ]
    for operator, arguments in calls:
        results = torch.library.opcheck(operator, arguments)
        assert set(results.values()) == {"SUCCESS"}, (operator, results)


@pytest.mark.parametrize("name", ["weight", "inputs", "g", "bias"])
def test_forward_mode_is_refused(name: str) -> None:
    layer = make_layer(4, 5, 3, bias=True)
    tensor = getattr(layer, name)

    def function(changed: Tensor) -> Tensor:
        return teleport_layer(*replace(layer, **{name: changed}).tensors())[0]

    message = f"{name} must have no tangent, got one: teleport_layer has no forward-mode derivative"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, (tensor,), (tensor,))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jacfwd(function)(tensor)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        function(forward_ad.make_dual(tensor, tensor))


def test_forward_mode_is_refused_in_the_incoming_gradient() -> None:
    layer = make_layer(4, 5, 3, bias=True).with_gradient()
    new_weight, _ = apply(layer, Tanh(), "least_change")
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="the gradient of the new weight must have"):
        new_weight.backward(forward_ad.make_dual(torch.ones_like(new_weight), torch.ones_like(new_weight)))


def test_the_forward_derivative_by_backward_mode() -> None:
    layer = make_layer(4, 5, 3, bias=True)
    change = torch.outer(layer.g[0], layer.g[1])

    def function(g: Tensor) -> Tensor:
        return apply(replace(layer, g=g), Tanh(), "least_change")[0]

    _, tangent = torch.autograd.functional.jvp(function, layer.g, change)
    difference = (function(layer.g + 1e-5 * change) - function(layer.g - 1e-5 * change)) / 2e-5
    assert_agree("tangent", tangent, difference, 1e-8)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.jacrev, torch.func.grad, torch.func.hessian])
def test_the_other_transforms_are_refused(transform: Callable[..., Any]) -> None:
    layer = make_layer(4, 5, 3, bias=True)

    def function(g: Tensor) -> Tensor:
        return teleport_layer(*replace(layer, g=g).tensors())[0].sum()

    with pytest.raises(RuntimeError):
        transform(function)(torch.stack([layer.g, layer.g]) if transform is torch.func.vmap else layer.g)


def test_a_compiler_sees_one_operator() -> None:
    layer, graphs = make_layer(4, 5, 3, bias=True).with_gradient(), []

    def function(g: Tensor) -> Tensor:
        return _weighted_sum(apply(replace(layer, g=g), Tanh(), "least_change"))

    def keep(module: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(module.code)
        return module.forward

    (expected,) = torch.autograd.grad(function(layer.g), layer.g)
    (compiled,) = torch.autograd.grad(torch.compile(function, backend=keep)(layer.g), layer.g)
    torch.compiler.reset()
    assert "symtele_cuda.teleport_layer" in "".join(graphs)
    assert_agree("gradient", compiled, expected, 1e-12)


@pytest.mark.parametrize("activation", [LeakyReLU(), Tanh()], ids=str)
def test_a_third_derivative_is_refused(activation: Activation) -> None:
    layer = make_layer(4, 5, 3, bias=True).with_gradient()
    value = _weighted_sum(tuple(output.square() for output in apply(layer, activation, "least_change")))
    for _ in range(2):
        value = _weighted_sum(torch.autograd.grad(value, layer.leaves(), create_graph=True))
    with pytest.raises(NotImplementedError, match="differentiable twice, got a request for its third derivative"):
        torch.autograd.grad(value, layer.leaves())


def test_inputs_get_no_gradient() -> None:
    layer = make_layer(4, 5, 3, bias=True).with_gradient()
    inputs = layer.inputs.requires_grad_()
    total = sum(output.sum() for output in apply(layer, Tanh(), "least_change"))
    assert torch.autograd.grad(total, inputs, allow_unused=True) == (None,)


def test_only_what_is_asked_for_is_differentiated() -> None:
    layer = make_layer(4, 5, 3, bias=True)
    g = layer.g.clone().requires_grad_()
    new_weight, _ = teleport_layer(layer.weight, layer.inputs, g, layer.bias)
    (by_g,) = torch.autograd.grad(new_weight.sum(), g)
    full = layer.with_gradient()
    (expected,) = torch.autograd.grad(teleport_layer(*full.tensors())[0].sum(), full.g)
    assert torch.equal(by_g, expected)


def test_fake_kernels_know_the_shapes_and_refuse_wrong_ones() -> None:
    layer = make_layer(4, 5, 3, bias=True, dtype=torch.float32).map(lambda tensor: tensor.to("meta"))
    operator = torch.ops.symtele_cuda.teleport_layer
    outputs = operator(True, *layer.tensors(), *Tanh().sigma, "paper", "auto")
    assert {output.device.type for output in outputs} == {"meta"}
    assert [tuple(output.shape) for output in outputs] == [(3, 5), (3,), (4, 3), (4, 3), (4, 3), (4, 6), (6,)]
    without_bias = operator(False, *layer.tensors()[:3], None, *Tanh().sigma, "paper", "auto")
    assert [tuple(output.shape) for output in without_bias] == [(3, 5), (0,), *3 * [(4, 3)], (4, 5), (0,)]
    with pytest.raises(ValueError, match=r"g must have shape \(d_out=3, d_out=3\), got \(5, 3\)"):
        operator(True, layer.weight, layer.inputs, layer.weight.T, layer.bias, *Tanh().sigma, "paper", "auto")


@every_action
@with_and_without_bias
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_kernels_ask_nothing_of_the_device(
    dtype: torch.dtype, action: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device every question about a value is an error, as it is while a CUDA graph is captured."""
    monkeypatch.setattr(ops, "full_precision", lambda tensor: nullcontext())  # there is no autocast for this device
    layer = make_layer(4, 5, 3, bias, dtype).map(lambda tensor: tensor.to("meta"))
    arguments = (*layer.tensors(), *Tanh().sigma, action, "torch")
    new_weight, new_bias, *saved, measured = ops._forward(True, *arguments)
    gradients = ops._backward(True, new_weight, new_bias, *saved, *arguments)
    ops._double_backward(*gradients, new_weight, new_bias, *saved, *arguments)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        measured.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# arguments
# ---------------------------------------------------------------------------------------------------------------------


def test_names_and_instances_of_activations() -> None:
    layer = make_layer(4, 6, 3, bias=False)

    def new_weight(activation: str | Activation, **options: Any) -> Tensor:
        return teleport_layer(*layer.tensors(), activation=activation, **options)[0]

    assert torch.equal(new_weight("leaky_relu"), new_weight(LeakyReLU(0.1)))
    assert torch.equal(new_weight("leaky_relu", negative_slope=0.3), new_weight(LeakyReLU(0.3)))
    assert torch.equal(new_weight("elu", negative_slope=0.3), new_weight(ELU(1.0)))
    assert torch.equal(new_weight("softplus"), new_weight(Softplus(1.0)))
    assert not torch.equal(new_weight(ELU(0.4)), new_weight(ELU(1.0)))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_backends_that_are_always_there(backend: str) -> None:
    layer = make_layer(4, 6, 3, bias=False)
    assert torch.equal(teleport_layer(*layer.tensors(), backend=backend)[0], teleport_layer(*layer.tensors())[0])


def test_cuda_backend_says_why_it_is_not_there_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(4, 6, 3, bias=False)
    monkeypatch.setattr(extension, "unavailable_reason", lambda: "nobody built it")
    with pytest.raises(ValueError, match=r"backend='cuda' is not available: nobody built it\. Use .*backend='torch'"):
        teleport_layer(*layer.tensors(), backend="cuda")


def test_cuda_backend_wants_tensors_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(4, 6, 3, bias=False)
    monkeypatch.setattr(extension, "unavailable_reason", lambda: None)
    with pytest.raises(ValueError, match=r"backend='cuda' is not available: the tensors are on cpu.*backend='torch'"):
        teleport_layer(*layer.tensors(), backend="cuda")


def changed(**replacements: Any) -> Callable[[Layer], dict[str, Any]]:
    """Named arguments of teleport_layer: those of a good layer (n=4, d_in=6, d_out=3) with some replaced."""

    def arguments(layer: Layer) -> dict[str, Any]:
        good: dict[str, Any] = dict(zip(("weight", "inputs", "g", "bias"), layer.tensors(), strict=True))
        return good | {key: value(layer) if callable(value) else value for key, value in replacements.items()}

    return arguments


def with_element(name: str, value: float) -> Callable[[Layer], Tensor]:
    def poison(layer: Layer) -> Tensor:
        tensor = getattr(layer, name).clone()
        tensor.view(-1)[1] = value
        return tensor

    return poison


def duplicated(layer: Layer) -> Tensor:
    return layer.inputs[[0, 1, 2, 1]]


def nearly_duplicated(layer: Layer) -> Tensor:
    inputs = layer.inputs[[0, 1, 2, 1]]
    inputs[3, 0] += 1e-8
    return inputs


class SteepTanh(Tanh):
    """It inherits the name, by which the operator knows its activations."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(3 * z)


BAD_ARGUMENTS = [
    (changed(weight=[[1.0]]), TypeError, r"weight must be a Tensor, got list"),
    (changed(bias=1.0), TypeError, r"bias must be a Tensor, got float"),
    (changed(inputs=lambda layer: layer.inputs.to_sparse()), TypeError, r"inputs must be a dense tensor, got layout"),
    (changed(weight=torch.zeros(3)), ValueError, r"weight must have shape \(d_out, d_in\).*, got \(3,\)"),
    (changed(weight=torch.zeros(3, 0)), ValueError, r"weight must have shape .* got \(3, 0\)"),
    (changed(inputs=torch.zeros(4, 7)), ValueError, r"inputs must have shape \(n, d_in=6\) with n >= 1, got \(4, 7\)"),
    (changed(inputs=torch.zeros(0, 6)), ValueError, r"inputs must have shape \(n, d_in=6\) with n >= 1, got \(0, 6\)"),
    (changed(inputs=torch.zeros(6)), ValueError, r"inputs must have shape .*, got \(6,\)"),
    (changed(g=torch.eye(6)), ValueError, r"g must have shape \(d_out=3, d_out=3\), got \(6, 6\)"),
    (changed(bias=torch.zeros(3, 1)), ValueError, r"bias must have shape \(d_out=3,\), got \(3, 1\)"),
    (changed(g=torch.eye(3)), TypeError, r"g must have the dtype of weight, torch.float64, got torch.float32"),
    (changed(inputs=lambda layer: layer.inputs.float()), TypeError, r"inputs must have the dtype of weight"),
    (changed(weight=torch.ones(3, 6, dtype=torch.int64)), TypeError, r"weight must be one of .*, got torch.int64"),
    (changed(g=lambda layer: layer.g.to("meta")), ValueError, r"g must be on the device of weight, cpu, got meta"),
    (changed(inputs=lambda layer: layer.inputs.new_ones(8, 6)), ValueError, r"at most d_in \+ 1 = 7 samples.* got n=8"),
    (changed(inputs=lambda layer: layer.inputs.new_ones(7, 6), bias=None), ValueError, r"at most d_in=6 .* got n=7"),
    (changed(inputs=duplicated), TeleportError, r"\[inputs, 1\] must have full row rank.* got rank 3 for n=4 samples"),
    (changed(inputs=duplicated, bias=None), TeleportError, r"^inputs must have full row rank.* got rank 3 for n=4"),
    (changed(inputs=nearly_duplicated), TeleportError, r"condition number of at most 1e\+07 in torch.float64, got"),
    (changed(check=1), TypeError, r"check must be a bool, got 1 of type int"),
    (changed(activation="relu"), ValueError, r"activation must be one of \[.*\], got 'relu'"),
    (changed(activation=None), TypeError, r"activation must be a name or an Activation, got NoneType"),
    (changed(activation=SteepTanh()), TypeError, r"activation must be .* LeakyReLU, Tanh, .* itself, got SteepTanh"),
    (changed(activation=Activation()), TypeError, r"activation must be a name or one of .*, got Activation"),
    (changed(action="least"), ValueError, r"action must be one of 'least_change', 'paper', got 'least'"),
    (changed(action=["paper"]), ValueError, r"action must be one of 'least_change', 'paper', got \['paper'\]"),
    (changed(backend="gpu"), ValueError, r"backend must be one of 'auto', 'torch', 'cuda', got 'gpu'"),
    (changed(backend=["torch"]), ValueError, r"backend must be one of .*, got \['torch'\]"),
    (changed(negative_slope=0.0), ValueError, r"negative_slope must be a finite number > 0"),
    (changed(negative_slope=-0.1), ValueError, r"negative_slope must be .*, got -0.1"),
    (changed(negative_slope=math.nan), ValueError, r"negative_slope must be .*, got nan"),
    (changed(negative_slope="0.1"), TypeError, r"negative_slope must be a number, got str"),
    (changed(negative_slope=True), TypeError, r"negative_slope must be a number, got bool"),
    (changed(negative_slope=1e-40), ValueError, r"negative_slope must be .* from 1.2e-38 to 8.5e\+37, got 1e-40"),
    *(
        (changed(**{name: with_element(name, value)}), ValueError, f"{name} must be finite, got NaN or infinite")
        for name in ("weight", "inputs", "g", "bias")
        for value in (math.nan, math.inf)
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS, ids=[case[2][:60] for case in BAD_ARGUMENTS])
def test_bad_arguments(arguments: Callable[[Layer], dict[str, Any]], error: type[Exception], message: str) -> None:
    layer = make_layer(4, 6, 3, bias=True)
    with pytest.raises(error, match=message):
        teleport_layer(**arguments(layer))


@pytest.mark.parametrize(
    ("activation", "factor", "message"),
    [
        (Tanh(), 3.0, r"g must keep σ\(Z\) gᵀ in \(-1, 1\), the domain of the inverse of tanh, got the value"),
        (Sigmoid(), 3.0, r"\(0, 1\), the domain of the inverse of sigmoid, got the value 2\."),
        (Sigmoid(), -1.0, r"the inverse of sigmoid, got the value -0\."),
        (Softplus(), -1.0, r"\(0, inf\), the domain of the inverse of softplus, got the value -"),
        (ELU(0.4), 5.0, r"\(-0.4, inf\), the domain of the inverse of elu, got the value -"),
    ],
    ids=str,
)
def test_a_g_that_leaves_the_domain_is_refused_with_the_worst_value(
    activation: Activation, factor: float, message: str
) -> None:
    layer = make_layer(4, 6, 3, bias=True)
    with pytest.raises(ValueError, match=message) as caught:
        teleport_layer(layer.weight, layer.inputs, factor * layer.g, layer.bias, activation)
    z = torch.nn.functional.linear(layer.inputs, layer.weight, layer.bias)
    moved = activation.forward(z) @ (factor * layer.g).T
    low, high = activation.domain
    worst = torch.maximum(low - moved, moved - high).argmax()
    assert float(str(caught.value).rsplit(" ", 1)[1]) == pytest.approx(moved.flatten()[worst].item(), rel=1e-8)


def test_meta_tensors_are_refused() -> None:
    layer = make_layer(4, 6, 3, bias=True).map(lambda tensor: tensor.to("meta"))
    with pytest.raises(ValueError, match="weight must hold numbers to compute with, got a tensor on the meta device"):
        teleport_layer(*layer.tensors())


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-100, 1e100, 1e200, 1e300])
def test_inputs_whose_gram_matrix_leaves_float64_are_refused_for_their_scale(scale: float) -> None:
    layer = make_layer(4, 6, 3, bias=False)
    with pytest.raises(TeleportError, match=r"^inputs must have a largest magnitude from 1e-70 to 1e\+70, got \d\.\de"):
        teleport_layer(layer.weight, scale * layer.inputs, layer.g)


@pytest.mark.parametrize("scale", [1e-70, 1e70])
@every_action
def test_inputs_of_the_extreme_scales(scale: float, action: str) -> None:
    layer = make_layer(4, 6, 3, bias=False)
    scaled = Layer(layer.weight / scale, scale * layer.inputs, layer.g, None)
    (expected,) = apply(layer, Tanh(), action)
    assert_agree("weight", scale * apply(scaled, Tanh(), action)[0], expected, 1e-12)


def test_squares_that_overflow_are_no_error() -> None:
    layer = make_layer(4, 6, 3, bias=True, dtype=torch.float32)
    new_weight, _ = teleport_layer(1e25 * layer.weight, layer.inputs, layer.g, 1e25 * layer.bias)
    expected, _ = teleport_layer(layer.weight, layer.inputs, layer.g, layer.bias)
    assert_agree("weight", 1e-25 * new_weight, expected, 1e-5)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("samples", [[0, 0, 0], [0, 1, 0]], ids=str)
@with_and_without_bias
def test_repeated_samples_are_refused_in_every_dtype(dtype: torch.dtype, samples: list[int], bias: bool) -> None:
    layer = make_layer(2, 6, 3, bias, dtype)
    rank = len(set(samples))
    with pytest.raises(TeleportError, match=f"must have full row rank, .* got rank {rank} for n=3 samples"):
        teleport_layer(layer.weight, layer.inputs[samples], layer.g, layer.bias)


@pytest.mark.parametrize(
    ("name", "dtype", "largest"),
    [
        ("weight", torch.float16, "65504"),
        ("bias", torch.float16, "65504"),
        ("weight", torch.bfloat16, r"3.38953e\+38"),
        ("weight", torch.float32, r"3.40282e\+38"),
    ],
    ids=str,
)
def test_new_weights_that_overflow_are_refused(name: str, dtype: torch.dtype, largest: str) -> None:
    """A quarter of the largest number is moved to 5/8 of it, as σ(z), whose inverse doubles it once more."""
    number = torch.full((1, 1), -torch.finfo(dtype).max / 4, dtype=dtype)
    one, g = torch.ones_like(number), torch.full_like(number, 5.0)
    layer = Layer(0 * one, 0 * one, g, number[0]) if name == "bias" else Layer(number, one, g, None)
    with pytest.raises(ValueError, match=f"the new {name} must be at most {largest}, the largest number of {dtype}"):
        teleport_layer(*layer.tensors(), negative_slope=0.5)


def test_only_what_is_doubtful_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(4, 6, 3, bias=True)
    looked_at = []
    for name in ("_check_matched", "_check_domain", "_check_range", "_check_finite"):
        monkeypatch.setattr(health, name, lambda *arguments, name=name: looked_at.append(name))
    teleport_layer(*layer.tensors())
    teleport_layer(*replace(layer, g=-3 * layer.g).tensors())
    assert looked_at == []
    teleport_layer(*replace(layer, g=1e300 * layer.g).tensors())
    assert looked_at == [*4 * ["_check_finite"], "_check_domain", *2 * ["_check_range"]]


@every_activation
@every_action
@with_and_without_bias
def test_a_singular_g_is_no_error_within_the_domain(activation: Activation, action: str, bias: bool) -> None:
    layer = make_layer(7, 12, 5, bias)
    g = layer.g.clone()
    g[4] = g[3]  # a mixture, as the others, so that every activation keeps it in the domain
    layer = replace(layer, g=g)
    assert torch.linalg.matrix_rank(layer.g) == 4
    new_weight, new_bias = teleport_layer(*layer.tensors(), activation=activation, action=action)
    moved = activation.forward(torch.nn.functional.linear(layer.inputs, layer.weight, layer.bias)) @ layer.g.T
    produced = activation.forward(torch.nn.functional.linear(layer.inputs, new_weight, new_bias))
    assert_agree("σ(Z')", produced, moved, 1e-12)
    for derive in (first_gradients, second_gradients):
        gradients, expected = (derive(function, layer, activation, action) for function in (apply, apply_twin))
        assert_all_agree("weight g bias", gradients, expected, TOLERANCE[torch.float64])


def test_a_g_of_zeros() -> None:
    layer = make_layer(4, 6, 3, bias=True)
    new_weight, new_bias = teleport_layer(layer.weight, layer.inputs, 0 * layer.g, layer.bias)
    assert_agree("Z'", layer.inputs @ new_weight.T + new_bias + 1, torch.ones(4, 3, dtype=torch.float64), 1e-12)


# --- without checks ---------------------------------------------------------------------------------------------------


@every_action
@with_and_without_bias
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_without_checks_the_result_is_the_same(action: str, bias: bool, dtype: torch.dtype) -> None:
    layer = make_layer(7, 12, 5, bias, dtype)
    checked, unchecked = (
        teleport_layer(*layer.tensors(), activation=Tanh(), action=action, check=check) for check in (True, False)
    )
    assert torch.equal(checked[0], unchecked[0])
    assert unchecked[1] is None if not bias else torch.equal(checked[1], unchecked[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: replace(layer, weight=with_element("weight", math.nan)(layer)),
        lambda layer: replace(layer, inputs=with_element("inputs", math.inf)(layer)),
        lambda layer: replace(layer, g=4 * layer.g),
        lambda layer: replace(layer, inputs=0 * layer.inputs, bias=None),
    ],
    ids=["weight", "inputs", "domain", "rank"],
)
def test_without_checks_what_is_wrong_is_not_finite(change: Callable[[Layer], Layer]) -> None:
    bad = change(make_layer(4, 6, 3, bias=True))
    with pytest.raises((ValueError, TeleportError)):
        teleport_layer(*bad.tensors(), activation=Tanh())
    new_weight, _ = teleport_layer(*bad.tensors(), activation=Tanh(), check=False)
    assert not torch.isfinite(new_weight).all()


def test_without_checks_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "squared_norms", lambda tensors: pytest.fail("measured"))
    monkeypatch.setattr(ops, "check_health", lambda *arguments: pytest.fail("looked at"))
    layer = make_layer(4, 6, 3, bias=True)
    assert teleport_layer(*layer.tensors(), check=False)[0].isfinite().all()
    with pytest.raises(pytest.fail.Exception, match="measured"):
        teleport_layer(*layer.tensors())


# --- the bound of the condition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@with_and_without_bias
@pytest.mark.parametrize("share", [0.2, 0.95])
def test_a_batch_near_the_limit_is_looked_at_and_taken(
    dtype: torch.dtype, bias: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = conditioned_layer(share * MAX_CONDITION[dtype], bias, dtype)
    looked_at: list[Tensor] = []
    monkeypatch.setattr(health, "pinv_factor", lambda *batch: looked_at.append(batch[0]) or pinv_factor(*batch))
    apply(layer, Tanh(), "least_change")
    assert len(looked_at) == (share > 0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@with_and_without_bias
def test_a_batch_beyond_the_limit_is_refused(dtype: torch.dtype, bias: bool) -> None:
    layer = conditioned_layer(3 * MAX_CONDITION[dtype], bias, dtype)
    with pytest.raises(TeleportError, match="must have a condition number of at most"):
        apply(layer, Tanh(), "least_change")


def conditioned_layer(condition: float, bias: bool, dtype: torch.dtype) -> Layer:
    """Two inputs so near to each other that κ₂([H, 1]), or κ₂(H), is this; the others are orthogonal."""
    layer = make_layer(40, 60, 5, bias)
    basis = 8 * torch.linalg.qr(layer.inputs.T).Q.T  # of lengths beside which the ones are small

    def apart(distance: float) -> Tensor:
        return torch.cat([basis[:-1], basis[:1] + distance * basis[-1:]])

    values = torch.linalg.svdvals(append_ones(apart(1e-3)) if bias else apart(1e-3))
    inputs = apart(1e-3 * (values[0] / values[-1]).item() / condition)
    return replace(layer, inputs=inputs).map(lambda tensor: tensor.to(dtype))
