"""The operator against its plain-torch twin, numerical derivatives, opcheck, and every argument it must refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from symtele_cuda import ops, reference
from symtele_cuda.activations import ELU, Activation, Identity, LeakyReLU, Sigmoid, Softplus, Tanh
from symtele_cuda.errors import TeleportError
from symtele_cuda.ops import teleport_layer

ONE_OF_EACH = [LeakyReLU(0.1), Tanh(), Sigmoid(), Softplus(3.0), ELU(0.4), Identity()]
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


def operator_arguments(bias: bool, activation: Activation, action: str) -> tuple[Any, ...]:
    layer = make_layer(4, 5, 3, bias).with_gradient()
    return (*layer.tensors(), activation.name, activation.parameter, action)


def cotangents(bias: bool, *, g: bool = False) -> tuple[Tensor, ...]:
    """Random gradients of the outputs of the operator (weight, bias), or of its backward (weight, g, bias)."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 5), (3, 3), (3 * bias,)] if g else [(3, 5), (3 * bias,)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(not g) for shape in shapes)


@one_of_each
@every_action
@with_and_without_bias
def test_opcheck(activation: Activation, action: str, bias: bool) -> None:
    library = torch.ops.symtele_cuda
    layer = operator_arguments(bias, activation, action)
    constant = tuple(value.detach() if isinstance(value, Tensor) else value for value in layer)
    grads = cotangents(bias)
    calls = {
        library.teleport_layer.default: layer,
        library.teleport_layer_backward.default: (*grads, *layer),
        library.teleport_layer_double_backward.default: (
            *cotangents(bias, g=True),
            *(grad.detach() for grad in grads),
            *constant,
        ),
    }
    for operator, arguments in calls.items():
        results = torch.library.opcheck(operator, arguments)
        assert set(results.values()) == {"SUCCESS"}, (operator, results)


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
    new_weight, new_bias = operator(*layer.tensors(), "tanh", 0.0, "paper")
    assert (new_weight.shape, new_bias.shape, new_weight.device.type) == ((3, 5), (3,), "meta")
    assert operator(*layer.tensors()[:3], None, "tanh", 0.0, "paper")[1].shape == (0,)
    with pytest.raises(ValueError, match=r"g must have shape \(d_out=3, d_out=3\), got \(5, 3\)"):
        operator(layer.weight, layer.inputs, layer.weight.T, layer.bias, "tanh", 0.0, "paper")


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


def test_cuda_backend_says_why_it_is_not_there_and_what_to_do() -> None:
    layer = make_layer(4, 6, 3, bias=False)
    with pytest.raises(ValueError, match=r"backend='cuda' is not available: .*no CUDA kernels.*backend='torch'"):
        teleport_layer(*layer.tensors(), backend="cuda")
    assert ops.cuda_unavailable_reason()


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


def rank_one(layer: Layer) -> Tensor:
    return torch.outer(layer.g[0], layer.g[1])


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
    (changed(g=rank_one), ValueError, r"g must be invertible, got a matrix with 1/condition = "),
    (changed(g=torch.zeros(3, 3, dtype=torch.float64)), ValueError, r"g must be invertible"),
    (changed(activation="relu"), ValueError, r"activation must be one of \[.*\], got 'relu'"),
    (changed(activation=None), TypeError, r"activation must be a name or an Activation, got NoneType"),
    (changed(action="least"), ValueError, r"action must be one of \('least_change', 'paper'\), got 'least'"),
    (changed(backend="gpu"), ValueError, r"backend must be one of \('auto', 'torch', 'cuda'\), got 'gpu'"),
    (changed(negative_slope=0.0), ValueError, r"negative_slope must be a finite number > 0"),
    (changed(negative_slope=-0.1), ValueError, r"negative_slope must be .*, got -0.1"),
    (changed(negative_slope=math.nan), ValueError, r"negative_slope must be .*, got nan"),
    (changed(negative_slope="0.1"), TypeError, r"negative_slope must be a number, got str"),
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


@pytest.mark.parametrize("d_out", [1, 2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_singular_and_merely_ill_conditioned_g(d_out: int, dtype: torch.dtype) -> None:
    layer = make_layer(4, 6, d_out, bias=False, dtype=dtype)
    orthogonal = torch.linalg.qr(torch.randn(d_out, d_out, generator=torch.Generator().manual_seed(1)).double()).Q
    lengths = torch.ones(d_out, dtype=torch.float64)
    lengths[-1] = 1e-4  # far from singular even in float32
    teleport_layer(layer.weight, layer.inputs, ((orthogonal * lengths) @ orthogonal.T).to(dtype))
    lengths[-1] = 0
    singular = ((orthogonal * lengths) @ orthogonal.T).to(dtype)
    with pytest.raises(ValueError, match="g must be invertible"):
        teleport_layer(layer.weight, layer.inputs, singular)
