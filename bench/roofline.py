"""What the machine can do, measured, and the least that a layer's teleport asks of it, counted.

    python -m bench.roofline [--device cpu] [--shape NAME ...] [--threads 1] [--rounds 5] [--out FILE]

The ceilings are those of the library that torch calls: a copy in device memory, counting the bytes read and written,
and a square matrix product in each precision. The shapes are products in float32's accuracy, ours against the
library's, each checked against float64 first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.harness import (
    Check,
    Contestant,
    add_rounds,
    all_passed,
    begin,
    compare,
    in_turn,
    make_parser,
    median_seconds,
    read_arguments,
    relative_difference,
    run_shapes,
)
from symtele_cuda.kernels import torch_kernels as torch_products
from symtele_cuda.kernels.library import products_for

FLOAT32, TF32, FLOAT64 = "float32", "TF32", "float64"
DTYPES = {FLOAT32: torch.float32, TF32: torch.float32, FLOAT64: torch.float64}

# Far more than any cache holds, and products that fill the machine.
COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}

LIBRARY, OURS, TWIN = "library's float32 product", "compiled product", "the compiled product's twin in torch"
MAX_PRODUCT_ERROR = 2e-6
# Of float32's accuracy: the library computes in float32's own units, the compiled kernel in three products of TF32.
MUST_PRODUCT_SPEEDUP = 1.5


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of a copy; operations a second of a matrix product, by precision."""

    bytes_per_second: float
    operations_per_second: dict[str, float]


@dataclass(frozen=True)
class Work:
    """The least that a computation must move and compute: each input read once, each output written once."""

    bytes: float
    operations: dict[str, float]

    def seconds(self, ceilings: Ceilings) -> float:
        """The longer of the two times, at the ceilings."""
        computing = sum(count / ceilings.operations_per_second[name] for name, count in self.operations.items())
        return max(computing, self.bytes / ceilings.bytes_per_second)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Products of float32 tensors in float32, or in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == TF32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def layer_work(n: int, d_in: int, d_out: int, name: str) -> Work:
    """`teleport_layer` with R = 0 and its gradient ∂f/∂g, in the precision `name`.

    Products in that precision: H Wᵀ, S gᵀ, Yᵀ P and P Vᵀ, G_Bᵀ S. In float64 whatever the precision: one half of
    H Hᵀ, its Cholesky factor and inverse (n³ together) and K⁻¹ H. Read: H, W, g, V; written: W', ∂f/∂g.
    """
    products = 6.0 * n * d_in * d_out + 4.0 * n * d_out**2
    factor = 3.0 * n**2 * d_in + float(n) ** 3
    operations = {name: products}
    operations[FLOAT64] = operations.get(FLOAT64, 0.0) + factor
    elements = n * d_in + 3 * d_in * d_out + 2 * d_out**2
    return Work(float(DTYPES[name].itemsize * elements), operations)


def measure_ceilings(device: torch.device, rounds: int) -> Ceilings:
    size = COPY_BYTES[device.type]
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copying = median_seconds(lambda _: target.copy_(source), rounds, device)
    names = (FLOAT32, FLOAT64) if device.type == "cpu" else (FLOAT32, TF32, FLOAT64)
    rates = {name: _product_rate(name, PRODUCT_SIZE[device.type], rounds, device) for name in names}
    return Ceilings(2 * size / copying, rates)


def _product_rate(name: str, size: int, rounds: int, device: torch.device) -> float:
    a, b = (torch.randn(size, size, dtype=DTYPES[name], device=device) for _ in range(2))
    with precision(name):
        seconds = median_seconds(lambda _: a @ b, rounds, device)
    return 2.0 * size**3 / seconds


# --- products ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A square product; `must_speedup` over the library's in float32's accuracy."""

    size: int
    must_speedup: float | None = None


SHAPES = {"product-512": Shape(512)}
CUDA_SHAPES = {
    f"product-{size}": Shape(size, MUST_PRODUCT_SPEEDUP if size >= 2048 else None)
    for size in (8192, 4096, 2048, 1024, 512, 256)  # the small ones last, should the time not suffice
}
REGISTRY = {"cpu": SHAPES, "cuda": CUDA_SHAPES}

Pair = tuple[Tensor, Tensor]


def make_pair(size: int, device: torch.device) -> Pair:
    source = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=source, device=device) for _ in range(2))
    return a, b


def contestants_for(device: torch.device) -> dict[str, Callable[[Pair], Tensor]]:
    """The library's product and, last, ours: compiled, or where nothing is compiled its twin under the twin's name."""
    products = products_for(device, "auto")
    ours = TWIN if products is torch_products else OURS
    return {LIBRARY: lambda pair: pair[0] @ pair[1], ours: lambda pair: products.linear(*pair)}


def measure(shape: Shape, rounds: int, device: torch.device) -> dict[str, Any]:
    """One shape's entry of the JSON file; without timings where a check fails."""
    pair = make_pair(shape.size, device)
    exact = pair[0].double() @ pair[1].double()
    methods = contestants_for(device)
    checks = {
        f"{name}, relative error": Check(relative_difference(method(pair), exact), at_most=MAX_PRODUCT_ERROR)
        for name, method in methods.items()
    }
    result: dict[str, Any] = {"shape": shape, "checks": checks}
    if not all_passed(checks):
        return result
    prepare = in_turn(pair, lambda pair: (pair[0].clone(), pair[1].clone()), 8 * shape.size**2, device)
    contestants = {name: Contestant(method, prepare) for name, method in methods.items()}
    timings = compare(contestants, rounds, device, LIBRARY)
    rates = {f"{name}, TFLOP/s": 2e-12 * shape.size**3 / timing.seconds for name, timing in timings.items()}
    *_, ours = timings
    speedup = Check(1 / timings[ours].units, at_least=shape.must_speedup)
    return result | {"timings": timings, "ratios": rates, "requirements": {"faster than the library, times": speedup}}


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    begin(arguments)
    ceilings = measure_ceilings(arguments.device, arguments.rounds)
    print(describe(ceilings), flush=True)
    registry = REGISTRY[arguments.device.type]
    with precision(FLOAT32):
        return run_shapes(
            "roofline",
            lambda name: measure(registry[name], arguments.rounds, arguments.device),
            arguments,
            settings={"rounds": arguments.rounds, "ceilings": ceilings},
            unit_name=LIBRARY,
        )


def describe(ceilings: Ceilings) -> str:
    rates = (f"{name} {rate / 1e12:.2f} TFLOP/s" for name, rate in ceilings.operations_per_second.items())
    return ", ".join([f"copy {ceilings.bytes_per_second / 1e9:.0f} GB/s", *rates])


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("The machine's ceilings, and float32 products against the library's.", REGISTRY)
    add_rounds(parser, 5)
    return read_arguments(parser, REGISTRY, "roofline", words)


if __name__ == "__main__":
    main(parse())
