"""Which kernel a product takes: `choose_route` of csrc/route.cpp, host code, run without CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
from cpu_harness import Unpacker, build, output_of, pack

FUSED, TENSOR, LIBRARY = range(3)
F32, F64 = range(2)
H100 = 90


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("route", tmp_path_factory.mktemp("route"), sources=["route.cpp"])


def route(program: Path, size, *, dtype=F32, a=None, b=None, allow_tf32=False, capability=H100) -> int:
    """The route of rows x columns x inner = `size`; a and b as (address, row stride, column stride)."""
    rows, columns, inner = size
    a, b = a or (4096, inner, 1), b or (8192, columns, 1)
    content = pack([1, dtype, rows, columns, inner, *a, *b, int(allow_tf32), capability])
    return Unpacker(output_of(program, content)).number()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("size", [(20, 20, 784), (20, 512, 512), (200, 512, 512), (512, 784, 20), (0, 512, 512)])
def test_the_searchs_products_are_fused(program, size, dtype):
    assert route(program, size, dtype=dtype) == FUSED


def test_large_float32_products_keep_float32s_accuracy_on_the_tensor_cores(program):
    size = (2048, 2048, 2048)
    assert route(program, size) == TENSOR
    assert route(program, size, a=(4096, 1, 2048), b=(8192, 1, 2048)) == TENSOR  # transposed operands


@pytest.mark.parametrize(
    "how",
    [
        {"dtype": F64},
        {"allow_tf32": True},
        {"a": (4100, 2048, 1)},  # does not begin at a multiple of 16 bytes
        {"b": (8192, 2049, 1)},  # every other row does not
    ],
)
def test_what_the_tensor_cores_cannot_do_goes_to_the_library(program, how):
    assert route(program, (2048, 2048, 2048), **how) == LIBRARY


@pytest.mark.parametrize("capability", [80, 90, 100, 103])
def test_three_tf32_products_are_taken_where_they_are_faster_than_one_in_float32(program, capability):
    assert route(program, (2048, 2048, 2048), capability=capability) == TENSOR


@pytest.mark.parametrize("capability", [75, 86, 87, 89, 110, 120, 121])
def test_they_are_not_taken_where_the_tensor_cores_are_hardly_faster_in_tf32(program, capability):
    assert route(program, (2048, 2048, 2048), capability=capability) == LIBRARY
    assert route(program, (20, 512, 784), capability=capability) == FUSED


def test_float64_leaves_the_fused_kernel_earlier(program):
    size = (512, 512, 512)
    assert route(program, size) == FUSED
    assert route(program, size, dtype=F64) == LIBRARY


def test_the_number_of_multiply_adds_does_not_overflow(program):
    size = (2**24, 2**7, 2**24)
    assert route(program, size) == TENSOR
