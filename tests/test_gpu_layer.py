"""`teleport_layer` on a GPU: against its twin in float64, its derivatives, and the same in every run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from on_gpu import (
    ACTIVATIONS,
    DEVICE,
    LAYOUTS,
    SMOOTH,
    TOLERANCE,
    assert_all_close,
    assert_close,
    assert_same_bits,
    clones,
    compiled,
    kernels_of,
    needs_tensor_route,
    never_waiting,
    poison,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from symtele_cuda.activations import Activation
from symtele_cuda.errors import TeleportError
from symtele_cuda.operator import reference
from symtele_cuda.operator.teleport_layer import ACTIONS, teleport_layer

pytestmark = pytest.mark.gpu

BACKENDS = ["cuda", "torch", "auto"]
# 16-bit layers are computed in float32 and rounded once, to 8 and 11 bits; the products of the derivatives' check too.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
# The inputs' condition number multiplies the error of P, and with it that of W' and of every derivative; the slopes of
# σ⁻¹ and the sums of derivatives over it multiply it by up to ten once more.
SHARE = 10.0

every_action = pytest.mark.parametrize("action", ACTIONS)
with_and_without_bias = pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def compiled_kernels() -> None:
    compiled()


@dataclass(frozen=True)
class Layer:
    weight: Tensor
    inputs: Tensor
    g: Tensor
    bias: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Layer:
        bias = None if self.bias is None else change(self.bias)
        return Layer(change(self.weight), change(self.inputs), change(self.g), bias)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.weight, self.inputs, self.g, self.bias

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in (self.weight, self.g, self.bias) if tensor is not None]

    def condition(self) -> float:
        """κ₂ of [inputs, 1]."""
        inputs = self.inputs.double()
        ones = [] if self.bias is None else [inputs.new_ones(len(inputs), 1)]
        gram = torch.cat([inputs, *ones], 1)
        values = torch.linalg.eigvalsh(gram @ gram.T)
        return math.sqrt((values[-1] / values[0]).item())


def make_layer(n: int, d_in: int, d_out: int, bias: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> Layer:
    """Moved activations lie in every domain: g is nonnegative with row sums below one."""
    source = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64, device=DEVICE)

    mixing = torch.rand(d_out, d_out, generator=source, dtype=torch.float64, device=DEVICE)
    mixing /= mixing.sum(1, keepdim=True)
    g = 0.3 * mixing + 0.6 * torch.eye(d_out, dtype=torch.float64, device=DEVICE)
    weight = normal(d_out, d_in) / math.sqrt(d_in)
    layer = Layer(weight, normal(n, d_in), g, normal(d_out) / 2 if bias else None)
    return layer.map(lambda tensor: tensor.to(dtype))


def outputs_and_gradients(
    layer: Layer, activation: Activation, action: str, backend: str | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """W' and b', the gradients of Σ c_i output_i², and those of Σ c_i gradient_i; by the twin if `backend` is None."""
    wanted = {id(tensor) for tensor in layer.leaves()}
    layer = layer.map(lambda tensor: tensor.detach().clone().requires_grad_(id(tensor) in wanted))
    poison()
    if backend is None:
        results = reference.teleport_layer(*layer.tensors(), activation, action)
    else:
        results = teleport_layer(*layer.tensors(), activation=activation, action=action, backend=backend)
    outputs = [result for result in results if result is not None]
    first = torch.autograd.grad(weighted([output.square() for output in outputs]), layer.leaves(), create_graph=True)
    second = torch.autograd.grad(weighted(list(first)), layer.leaves())
    return [output.detach() for output in outputs], [gradient.detach() for gradient in first], list(second)


def weighted(tensors: list[Tensor]) -> Tensor:
    parts = []
    for tensor in tensors:
        weights = torch.cos(torch.arange(tensor.numel(), dtype=torch.float64, device=DEVICE)).to(tensor.dtype)
        parts.append((weights * tensor.flatten()).sum())
    return torch.stack(parts).sum()


def tolerance(layer: Layer, dtype: torch.dtype) -> float:
    return SHARE * layer.condition() * TOLERANCE[dtype] if dtype in TOLERANCE else SHARE * ROUNDING[dtype]


# --- against the twin -----------------------------------------------------------------------------------------------


@every_backend
@every_action
@with_and_without_bias
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@every_activation
def test_results_and_derivatives(
    activation: Activation, dtype: torch.dtype, bias: bool, action: str, backend: str
) -> None:
    layer = make_layer(9, 17, 13, bias, dtype)
    found = outputs_and_gradients(layer, activation, action, backend)
    truth = outputs_and_gradients(layer.map(Tensor.double), activation, action, None)
    for what, one, other in zip(("output", "gradient", "second derivative"), found, truth, strict=True):
        assert_all_close(what, one, other, [tolerance(layer, dtype)] * len(one))


@every_backend
@pytest.mark.parametrize("sizes", [(20, 784, 512), (200, 512, 512), (513, 1031, 777)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_larger_layers(dtype: torch.dtype, sizes: tuple[int, int, int], backend: str) -> None:
    layer = make_layer(*sizes, True, dtype)
    found = outputs_and_gradients(layer, SMOOTH[0], "least_change", backend)
    truth = outputs_and_gradients(layer.map(Tensor.double), SMOOTH[0], "least_change", "torch")
    for what, one, other in zip(("output", "gradient", "second derivative"), found, truth, strict=True):
        assert_all_close(what, one, other, [tolerance(layer, dtype)] * len(one))


@pytest.mark.parametrize("sizes", [(1024, 4096, 4096), (4096, 8192, 2048)], ids=str)
@every_activation
def test_forward_of_large_layers(activation: Activation, sizes: tuple[int, int, int]) -> None:
    layer = make_layer(*sizes, False, torch.float32)
    (found, _), (truth, _) = (
        teleport_layer(*one.tensors(), activation=activation, backend=backend)
        for one, backend in ((layer, "cuda"), (layer.map(Tensor.double), "torch"))
    )
    assert_close("weight", found, truth, tolerance(layer, torch.float32))


@every_backend
@every_action
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_16_bit_layers_are_rounded_once(dtype: torch.dtype, action: str, backend: str) -> None:
    layer = make_layer(9, 17, 13, True, dtype)
    found = teleport_layer(*layer.tensors(), activation=SMOOTH[0], action=action, backend=backend)
    truth = reference.teleport_layer(*layer.map(Tensor.double).tensors(), SMOOTH[0], action)
    assert [result.dtype for result in found] == [dtype, dtype]
    assert_all_close("output", found, truth, [ROUNDING[dtype]] * 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    layer = make_layer(20, 41, 33, True, dtype)
    strange = layer.map(lambda tensor: LAYOUTS[layout](tensor) if tensor.ndim == 2 else tensor)
    plain, other = (teleport_layer(*one.tensors(), activation=SMOOTH[0], backend="cuda") for one in (layer, strange))
    assert_all_close("output", other, plain, [tolerance(layer, dtype)] * 2)


@every_action
@with_and_without_bias
@every_activation
def test_numerical_derivatives(activation: Activation, bias: bool, action: str) -> None:
    layer = make_layer(3, 5, 4, bias)

    def function(*leaves: Tensor) -> list[Tensor]:
        results = teleport_layer(
            leaves[0],
            layer.inputs,
            leaves[1],
            leaves[2] if bias else None,
            activation=activation,
            action=action,
            backend="cuda",
        )
        return [result for result in results if result is not None]

    leaves = [tensor.clone().requires_grad_() for tensor in layer.leaves()]
    assert gradcheck(function, leaves, nondet_tol=0.0, fast_mode=True)
    assert gradgradcheck(function, leaves, nondet_tol=0.0, fast_mode=True)


# --- the same in every run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(9, 17, 13), (200, 512, 512), (1024, 2048, 2048)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_two_runs_give_the_same_bits(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    layer = make_layer(*sizes, True, dtype)
    runs = [outputs_and_gradients(layer, SMOOTH[0], "least_change", "cuda") for _ in range(2)]
    for what, one, other in zip(("output", "gradient", "second derivative"), *runs, strict=True):
        assert_same_bits(what, one, other)


@pytest.mark.parametrize("sizes", [(20, 41, 33), (200, 784, 512)], ids=str)
def test_on_another_stream(sizes: tuple[int, int, int]) -> None:
    layer = make_layer(*sizes, True, torch.float32)
    plain = clones(teleport_layer(*layer.tensors(), activation=SMOOTH[0], backend="cuda"))
    late = layer.map(torch.ones_like)
    stream = torch.cuda.Stream(DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for target, source in zip(late.tensors(), layer.tensors(), strict=True):
            target.copy_(source)
        moved = teleport_layer(*late.tensors(), activation=SMOOTH[0], backend="cuda")
    stream.synchronize()
    assert_same_bits("output", moved, plain)


def test_tf32_only_where_the_user_allowed_it() -> None:
    layer = make_layer(256, 1024, 1024, False, torch.float32)
    truth, _ = teleport_layer(*layer.map(Tensor.double).tensors(), activation=SMOOTH[0], backend="torch")
    before = torch.get_float32_matmul_precision()
    try:
        for precision, bound in (("highest", tolerance(layer, torch.float32)), ("high", 1e-3 * layer.condition())):
            torch.set_float32_matmul_precision(precision)
            found, _ = teleport_layer(*layer.tensors(), activation=SMOOTH[0], backend="cuda")
            assert_close(precision, found, truth, bound)
    finally:
        torch.set_float32_matmul_precision(before)


# --- the host and the device -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda", "torch"])
@pytest.mark.parametrize("sizes", [(9, 17, 13), (200, 784, 512), (600, 1024, 512)], ids=str)
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.bfloat16], ids=str)
def test_the_operators_ask_nothing_of_the_device(dtype: torch.dtype, sizes: tuple[int, int, int], backend: str) -> None:
    layer = make_layer(*sizes, True, dtype)
    description = (*SMOOTH[0].sigma, "least_change", backend)
    operators = torch.ops.symtele_cuda

    def both() -> None:
        weight, bias, *saved, _ = operators.teleport_layer(*layer.tensors(), *description)
        operators.teleport_layer_backward(True, weight, bias, *saved, *layer.tensors(), *description)

    both()
    with never_waiting():
        both()


@pytest.mark.parametrize("backend", ["cuda", "torch"])
def test_a_call_reads_back_once(backend: str) -> None:
    layer = make_layer(20, 41, 33, True, torch.float32)
    layer = replace(layer, g=torch.eye(33, device=DEVICE) + 1e-3 * layer.g)
    teleport_layer(*layer.tensors(), activation=SMOOTH[1], backend=backend)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            teleport_layer(*layer.tensors(), activation=SMOOTH[1], backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]
    assert len(waits) == 1, waits


@with_and_without_bias
def test_large_float32_layers_go_to_the_tensor_cores(bias: bool) -> None:
    """Z, B and W' forward, G_Y and ∂f/∂g backward, with a bias too."""
    needs_tensor_route()
    layer = make_layer(256, 1024, 1024, bias, torch.float32)

    def both() -> None:
        g = layer.g.detach().requires_grad_()
        moved, _ = teleport_layer(
            layer.weight, layer.inputs, g, layer.bias, activation=SMOOTH[0], action="paper", backend="cuda"
        )
        torch.autograd.grad(moved, g, layer.weight)

    names = kernels_of(both)
    assert sum("multiply_on_tensor_cores" in name for name in names) == 5, names
    assert not any("apply_epilogue" in name for name in names), names


@every_backend
@pytest.mark.parametrize(
    "change, error, text",
    [
        (lambda layer: replace(layer, g=3 * layer.g), ValueError, r"g must keep σ\(Z\) gᵀ in \(-1, 1\)"),
        (lambda layer: replace(layer, g=layer.g * math.nan), ValueError, "g must be finite"),
        (lambda layer: replace(layer, weight=layer.weight * math.inf), ValueError, "weight must be finite"),
        (lambda layer: replace(layer, inputs=layer.inputs[:1].expand(20, -1)), TeleportError, "rank 1"),
        (lambda layer: replace(layer, inputs=layer.inputs * 1e120), TeleportError, "largest magnitude"),
    ],
)
def test_what_only_the_computation_finds(
    change: Callable[[Layer], Layer], error: type[Exception], text: str, backend: str
) -> None:
    layer = make_layer(20, 41, 33, False, torch.float64)
    with pytest.raises(error, match=text):
        teleport_layer(*change(layer).tensors(), activation=SMOOTH[0], backend=backend)


@every_backend
def test_a_g_far_from_the_identity(backend: str) -> None:
    layer = make_layer(20, 41, 33, True, torch.float64)
    layer = replace(layer, g=layer.g.flip(0))
    found = teleport_layer(*layer.tensors(), activation=SMOOTH[0], backend=backend)
    truth = reference.teleport_layer(*layer.tensors(), SMOOTH[0], "least_change")
    assert_all_close("output", found, truth, [tolerance(layer, torch.float64)] * 2)
