"""The kernels around the products, run on the CPU: Gram matrices and their inverses, steps, reductions, decisions.

tests/harness/factor.cpp executes csrc/ under the emulator and the sanitizers, in several orders of the threads and the
blocks, whose results must be the same to the bit; the oracle is the twin in products.py, in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from cpu_harness import ORDERS, Unpacker, activation_items, build, output_of, pack, plant_fault
from exhaustive import first_of_each, mostly
from sigmas import ONE_OF_EACH
from torch import Tensor

from symtele_cuda.activations import ELU, Activation, LeakyReLU, Softplus, Tanh
from symtele_cuda.kernels import torch_kernels as products

GRAM, INVERT_GRAMS, STEP, DOT_SUM, COMMIT, NEAR_DEPENDENCE, JUDGE, SQUARED_NORMS, TIMES_CURVATURE = range(9)
SOURCES = [f"{name}.cu" for name in ("commit", "curvature", "gram", "invert_gram", "judge", "reduce", "step")]
DTYPES = (torch.float32, torch.float64)
DTYPE_NUMBERS = {torch.float32: 0, torch.float64: 1, torch.int32: 2}

UNIT_ROUNDOFF = 2.0**-53  # of float64

# The relative Frobenius error: a few roundings an element, of which sigma's inverse magnifies that of its argument.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}

# ||K X - I|| over u kappa(K). On the matrices here the sweeps stay below 15, Cholesky's inversion below 4.
LARGEST_RESIDUAL = 100

every_activation = pytest.mark.parametrize("activation", ONE_OF_EACH, ids=str)

Results = Sequence[tuple[torch.dtype, tuple[int, ...]]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("factor", tmp_path_factory.mktemp("factor"), sources=SOURCES)


def run_case(program: Path, operation: int, items: list, results: Results) -> list[Tensor | None]:
    """The results (dtype, shape) of one case, which all orders of the threads and blocks must give to the bit."""
    content = pack([1, operation, *items])
    first, *others = [output_of(program, content, order) for order in ORDERS]
    assert all(other == first for other in others), "the result depends on the order of the threads or blocks"
    output = Unpacker(first)
    assert output.number() == 0, "the launch failed"
    tensors = [output.tensor(dtype, shape) for dtype, shape in results]
    assert output.done()
    return tensors


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(got: Tensor | None, expected: Tensor, tolerance: float, name: str) -> None:
    assert got is not None
    assert got.shape == expected.shape
    error = torch.linalg.vector_norm(got.double() - expected) / torch.linalg.vector_norm(expected).clamp(min=1e-300)
    worst = (got.double() - expected).abs().argmax().item()
    assert error <= tolerance, f"{name}: relative error {error:.2e}, worst at element {worst}"


def offset_buffer(values: Tensor, offset: int) -> Tensor:
    """A flat buffer in which the values begin at element `offset`."""
    return torch.cat([values.new_full((offset,), 77), values.flatten()])


# --- gram ------------------------------------------------------------------------------------------------------------


def check_gram(
    program: Path,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    bias: bool = True,
    strides: tuple[int, int] | None = None,
) -> None:
    row_stride, column_stride = strides or (columns, 1)
    storage = normal((rows - 1) * row_stride + (columns - 1) * column_stride + 1, dtype=dtype)
    h = storage.as_strided((rows, columns), (row_stride, column_stride))
    rounds = dtype == torch.float32
    items = [DTYPE_NUMBERS[dtype], rows, 1, int(rounds), columns, row_stride, column_stride, int(bias), storage]
    square = (rows, rows)
    exact, rounded = run_case(program, GRAM, items, [(torch.float64, square), (dtype, square)])
    assert exact is not None
    assert torch.equal(exact, exact.T)
    assert_near(exact, products.grams([h], [bias])[0][0], 1e-15 * columns, "gram")
    if rounds:
        assert rounded is not None and torch.equal(rounded, exact.float())
    else:
        assert rounded is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 7), (7, 2), (16, 64), (17, 65), (33, 31), (50, 129)])
def test_gram(program, rows, columns, dtype, bias):
    check_gram(program, rows, columns, dtype, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strides", [(75, 1), (1, 20), (1, 23)])
def test_gram_of_padded_and_transposed_rows(program, strides, dtype):
    check_gram(program, 20, 70, dtype, strides=strides)


def check_several_grams(program: Path, dtype: torch.dtype, rows: int, columns: Sequence[int]) -> None:
    """Each is what it is alone, to the bit, whatever the others are; every second one with bias."""
    rounds, square = dtype == torch.float32, (rows, rows)
    alone: list[Tensor | None] = []
    described: list = []
    for m, width in enumerate(columns):
        described.append([width, width, 1, m % 2, normal(rows, width, dtype=dtype, seed=m)])
        results = [(torch.float64, square), (dtype, square)]
        alone += run_case(program, GRAM, [DTYPE_NUMBERS[dtype], rows, 1, int(rounds), *described[-1]], results)
    items = [DTYPE_NUMBERS[dtype], rows, len(columns), int(rounds), *itertools.chain(*described)]
    together = run_case(program, GRAM, items, [(torch.float64, square), (dtype, square)] * len(columns))
    for one, other in zip(together, alone, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(17, (5, 70, 1)), (5, tuple(range(1, 17)))])
def test_several_grams_in_one_launch(program, rows, columns, dtype):
    check_several_grams(program, dtype, rows, columns)


def test_gram_of_no_rows_and_of_no_columns(program):
    for rows, expected in ((0, torch.empty(0, 0)), (3, torch.ones(3, 3))):
        items = [0, rows, 1, 1, 0, 1, 1, 1, None]
        results = [(torch.float64, (rows, rows)), (torch.float32, (rows, rows))]
        for result in run_case(program, GRAM, items, results):
            assert result is None if rows == 0 else torch.equal(result.float(), expected)


# --- invert_grams ----------------------------------------------------------------------------------------------------


def invert_all(program: Path, grams: Sequence[Tensor], rounds: bool = True) -> tuple[list[Tensor], list[int]]:
    """The inverses, of which the rounded ones are the same in float32, and what is said of each."""
    count, size = len(grams), len(grams[0])
    exact, rounded = ([(dtype, (size, size))] * count for dtype in (torch.float64, torch.float32))
    results = [*exact, *rounded, (torch.int32, (count,))]
    *found, infos = run_case(program, INVERT_GRAMS, [size, count, int(rounds), *grams], results)
    assert infos is not None
    for one, in_float32 in zip(found[:count], found[count:], strict=True):
        if rounds:
            torch.testing.assert_close(one.float(), in_float32, rtol=0, atol=0, equal_nan=True)
        else:
            assert in_float32 is None
    return found[:count], infos.tolist()


def invert(program: Path, gram: Tensor) -> tuple[Tensor, int]:
    inverses, infos = invert_all(program, [gram])
    return inverses[0], infos[0]


def spectrum(shape: str, size: int, condition: float) -> Tensor:
    """Eigenvalues from 1 to 1 / condition."""
    if shape == "graded":
        return condition ** -torch.linspace(0, 1, size, dtype=torch.float64)
    large = {"one large": 1, "half large": (size + 1) // 2, "one small": size - 1}[shape]
    return torch.where(torch.arange(size) < max(large, 1), 1.0, 1 / condition).double()


def symmetric(eigenvalues: Tensor) -> Tensor:
    """A symmetric matrix with these eigenvalues, and vectors in no special position to its rows."""
    vectors = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues))).Q
    matrix = (vectors * eigenvalues) @ vectors.T
    return (matrix + matrix.T) / 2


def residual(gram: Tensor, inverse: Tensor) -> float:
    """||K X - I||_2, to the rounding errors of the product, which are a small part of it."""
    return float(torch.linalg.matrix_norm(gram @ inverse - torch.eye(len(gram), dtype=torch.float64), 2))


def check_inverse(program: Path, size: int, shape: str = "graded", condition: float = 1e4) -> None:
    gram = symmetric(spectrum(shape, size, condition))
    inverse, info = invert(program, torch.where(torch.ones(size, size).tril() > 0, gram, torch.nan))
    assert info == 0
    assert torch.equal(inverse, inverse.T)
    assert residual(gram, inverse) <= LARGEST_RESIDUAL * UNIT_ROUNDOFF * float(torch.linalg.cond(gram))


@pytest.mark.parametrize("size", [1, 2, 7, 31, 32, 33, 64, 65, 97])
def test_inverse_reads_the_lower_triangle_and_is_symmetric(program, size):
    check_inverse(program, size)


@pytest.mark.parametrize("condition", [1e0, 1e8, 1e12])
@pytest.mark.parametrize("shape", ["graded", "one large", "half large", "one small"])
@pytest.mark.parametrize("size", [20, 60])
def test_residual_of_the_inverse(program, size, shape, condition):
    check_inverse(program, size, shape, condition)


@pytest.mark.parametrize("condition", [1e4, 1e8])
def test_residual_where_the_leading_blocks_are_nearly_singular(program, condition):
    """The worst case: the large eigenvalues' vectors are smooth, so that their first elements hardly differ."""
    size = 40
    steps = torch.arange(1, size + 1, dtype=torch.float64)
    vectors = (2 / (size + 1)) ** 0.5 * torch.sin(torch.pi / (size + 1) * torch.outer(steps, steps))  # orthogonal
    gram = (vectors * spectrum("half large", size, condition)) @ vectors.T
    inverse, info = invert(program, (gram + gram.T) / 2)
    assert info == 0
    assert residual(gram, inverse) <= UNIT_ROUNDOFF * condition**1.5


@pytest.mark.parametrize("scale", [2.0**-500, 2.0**500])
def test_inverse_scales_with_the_matrix(program, scale):
    gram = symmetric(spectrum("graded", 40, 1e3))
    inverse, info = invert(program, gram)
    scaled, scaled_info = invert(program, gram * scale)
    assert info == scaled_info == 0
    assert torch.equal(scaled, inverse / scale)


def spoilt(size: int, pivot: int, value: float) -> Tensor:
    """L L^T, but with this value for a pivot (counted from 1)."""
    triangle = normal(size, size).tril() / size + torch.eye(size, dtype=torch.float64)
    gram = triangle @ triangle.T
    gram[pivot - 1, pivot - 1] += value - triangle[pivot - 1, pivot - 1] ** 2
    return gram


def check_bad_pivot(program: Path, size: int, pivot: int, value: float) -> None:
    gram = spoilt(size, pivot, value)
    assert invert(program, gram)[1] == pivot


@pytest.mark.parametrize("value", [-0.5, torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("size", "pivot"), [(1, 1), (20, 1), (20, 7), (20, 20), (70, 32), (70, 33), (70, 64), (70, 70)]
)
def test_the_first_pivot_that_is_not_positive_is_named(program, size, pivot, value):
    check_bad_pivot(program, size, pivot, value)
    if value == -0.5:
        _, infos, _ = products.invert_grams([spoilt(size, pivot, value)])
        assert int(infos) == pivot  # as by Cholesky


def test_exact_zeros_are_no_pivots(program):
    assert invert(program, torch.zeros(5, 5, dtype=torch.float64))[1] == 1
    assert invert(program, torch.ones(40, 40, dtype=torch.float64))[1] == 2


def check_several_bad_pivots(program: Path, size: int, pivots: Sequence[int]) -> None:
    gram = torch.eye(size, dtype=torch.float64)
    for pivot in pivots:
        gram[pivot - 1, pivot - 1] = -1
    assert invert(program, gram)[1] == min(pivots)


@pytest.mark.parametrize("pivots", [(69, 50), (50, 34), (40, 32, 3)])
def test_the_first_of_several_bad_pivots_counts(program, pivots):
    check_several_bad_pivots(program, 70, pivots)


def check_several_inverses(program: Path, size: int, count: int) -> None:
    """Each is what it is alone, to the bit, whatever the others are; the second has a bad pivot."""
    grams = [symmetric(spectrum("graded", size, 10.0 ** (1 + m % 5))) for m in range(count)]
    grams[1] = spoilt(size, size // 2 + 1, -0.5)
    inverses, infos = invert_all(program, grams)
    assert infos == [size // 2 + 1 if m == 1 else 0 for m in range(count)]
    for m in (0, 2, count - 1):
        assert torch.equal(inverses[m], invert(program, grams[m])[0])


@pytest.mark.parametrize("size", [5, 33])
def test_nothing_is_rounded_that_nobody_asked_for(program, size):
    grams = [symmetric(spectrum("graded", size, 1e3))]
    (inverse,), infos = invert_all(program, grams, rounds=False)
    assert (torch.equal(inverse, invert(program, grams[0])[0]), infos) == (True, [0])


@pytest.mark.parametrize(("size", "count"), [(1, 3), (7, 64), (32, 3), (33, 4), (97, 3)])
def test_several_inverses_in_one_launch(program, size, count):
    check_several_inverses(program, size, count)


def test_inverses_of_empty_matrices(program):
    for count in (1, 3):
        results = [*[(torch.float64, (0, 0))] * (2 * count), (torch.int32, (count,))]
        *inverses, infos = run_case(program, INVERT_GRAMS, [0, count, 0, *[None] * count], results)
        assert inverses == [None] * (2 * count) and infos.tolist() == [0] * count


# --- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer's step: what it is taken in, its activation, and its elements, `offset` elements into their buffers."""

    along_targets: bool
    activation: Activation
    count: int = 300
    offset: int = 0

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        targets = normal(self.count).clamp(-2, 2)
        base = targets if self.along_targets else self.activation.forward(targets)
        return base.to(dtype), normal(self.count, dtype=dtype, seed=1)


Operands = tuple[Tensor, Tensor]


def step_case(program: Path, layers: Sequence[Layer], operands: Sequence[Operands], size: float) -> list[list[Tensor]]:
    """B', Y' and σ'(Y') of every layer."""
    dtype = operands[0][0].dtype
    items: list = [torch.tensor(size, dtype=torch.float64), DTYPE_NUMBERS[dtype], len(layers)]
    shapes: list = []
    for layer, (base, change) in zip(layers, operands, strict=True):
        items += [int(layer.along_targets), layer.count, layer.offset, *activation_items(layer.activation)]
        items += [offset_buffer(base, layer.offset), offset_buffer(change, layer.offset)]
        shapes += [(dtype, (layer.count + layer.offset,))] * 3
    results = iter(run_case(program, STEP, items, shapes))
    return [[without_offset(next(results), layer.offset) for _ in range(3)] for layer in layers]


def without_offset(result: Tensor | None, offset: int) -> Tensor:
    assert result is not None
    untouched = result[:offset].view(torch.int32)  # the first elements of the buffer are not part of the result
    assert bool((untouched == -1).all())
    return result[offset:]


def twin_of(layers: Sequence[Layer], operands: Sequence[Operands], size: float) -> list[tuple[Tensor, ...]]:
    bases, changes = ([one[k].double() for one in operands] for k in range(2))
    along = [layer.along_targets for layer in layers]
    names, numbers = zip(*(layer.activation.sigma for layer in layers), strict=True)
    length = torch.tensor(size, dtype=torch.float64)
    results = products.take_steps(bases, changes, length, along, names, [*itertools.chain(*numbers)])
    return list(zip(*results, strict=True))


def check_step(program: Path, layer: Layer) -> None:
    check_steps(program, torch.float32, layer)


def check_mixed_steps(program: Path) -> None:
    check_steps(program, torch.float32, *MIXED_LAYERS)


def check_steps(program: Path, dtype: torch.dtype, *layers: Layer) -> None:
    operands = [layer.operands(dtype) for layer in layers]
    got, expected = step_case(program, layers, operands, 1e-3), twin_of(layers, operands, 1e-3)
    for results, truths in zip(got, expected, strict=True):
        for result, right, what in zip(results, truths, ("moved", "targets", "slopes"), strict=True):
            assert_near(result, right, TOLERANCE[dtype], what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("along_targets", [False, True])
@every_activation
def test_step(program, activation, along_targets, dtype):
    check_steps(program, dtype, Layer(along_targets, activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("count", [1, 3, 4, 1027])
def test_step_of_any_length_and_alignment(program, count, offset, dtype):
    check_steps(program, dtype, Layer(True, LeakyReLU(0.1), count, offset))


MIXED_LAYERS = [
    Layer(False, LeakyReLU(0.1), 1027),
    Layer(True, Tanh(), 300, 1),
    Layer(False, Softplus(2.0), 3),
    Layer(True, ELU(1.5), 2000),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_of_several_layers(program, dtype):
    check_steps(program, dtype, *MIXED_LAYERS)
    check_steps(program, dtype, *(4 * MIXED_LAYERS))


def test_step_beyond_the_largest_grid(program):
    check_steps(program, torch.float64, Layer(True, LeakyReLU(0.1), 1024 * 256 * 2 + 5))


@pytest.mark.parametrize("dtype", DTYPES)
@every_activation
def test_step_out_of_the_domain_is_not_finite(program, activation, dtype):
    base = torch.linspace(-4, 4, 33).to(dtype)  # with the ends of the domains, 0 and 1
    layers, operands = [Layer(False, activation, 33)], [(base, torch.ones_like(base))]
    ((moved, targets, _),) = step_case(program, layers, operands, 0.0)
    ((_, expected, _),) = twin_of(layers, operands, 0.0)
    assert torch.equal(moved, base)
    assert torch.equal(targets.isfinite(), expected.isfinite())


def test_step_of_nothing(program):
    items = [torch.zeros(1, dtype=torch.float64), 0, 1, 0, 0, 0, *activation_items(Tanh()), None, None]
    assert run_case(program, STEP, items, [(torch.float32, (0,))] * 3) == [None] * 3


# --- times_curvature -------------------------------------------------------------------------------------------------


def check_times_curvature(
    program: Path, activation: Activation, dtype: torch.dtype, count: int = 300, offset: int = 0, sums: bool = True
) -> None:
    left, right, at, source = (normal(count, dtype=dtype, seed=seed) for seed in range(4))
    at = 12 * at if isinstance(activation, Softplus) else at  # on both sides of the threshold
    buffers = [offset_buffer(operand, offset) for operand in (left, right, at, source)]
    items = [DTYPE_NUMBERS[dtype], count, offset, *activation_items(activation), int(sums), *buffers]
    (result,) = run_case(program, TIMES_CURVATURE, items, [(dtype, (count + offset,))])
    wide = left.double(), right.double(), at.double(), source.double() if sums else None
    assert result is not None and bool((result[:offset].view(torch.int32) == -1).all())
    assert_near(result[offset:], products.times_curvature(*wide, *activation.sigma), TOLERANCE[dtype], "sum")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sums", [False, True])
@every_activation
def test_times_curvature(program, activation, sums, dtype):
    check_times_curvature(program, activation, dtype, sums=sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("count", [1, 3, 4, 1027])
def test_times_curvature_of_any_length_and_alignment(program, count, offset, dtype):
    check_times_curvature(program, ELU(1.5), dtype, count, offset)


def test_times_curvature_beyond_the_largest_grid(program):
    check_times_curvature(program, LeakyReLU(0.1), torch.float64, 1024 * 256 * 2 + 5)


def test_times_curvature_of_nothing(program):
    items = [0, 0, 0, *activation_items(Tanh()), 1, None, None, None, None]
    assert run_case(program, TIMES_CURVATURE, items, [(torch.float32, (0,))]) == [None]


# --- dot_sum ---------------------------------------------------------------------------------------------------------


def check_dot_sum(
    program: Path,
    dtype: torch.dtype,
    sizes: Sequence[int],
    offset: int = 0,
    scale: float = 1.0,
    root: bool = False,
) -> None:
    left = [normal(size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    right = [a + normal(len(a), dtype=dtype, seed=100 + i) for i, a in enumerate(left)]
    items: list = [DTYPE_NUMBERS[dtype], len(sizes), scale, int(root)]
    for a, b in zip(left, right, strict=True):
        items += [offset, len(a), offset_buffer(a, offset), offset_buffer(b, offset)]
    (result,) = run_case(program, DOT_SUM, items, [(torch.float64, (1,))])
    expected = scale * sum(float(a.double() @ b.double()) for a, b in zip(left, right, strict=True))
    assert float(result) == pytest.approx(math.sqrt(expected) if root else expected, rel=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("sizes", [[1], [0, 5], [4096], [4095, 4097, 3], [300] * 64, [10240, 4, 33333]])
def test_dot_sum(program, sizes, offset, dtype):
    check_dot_sum(program, dtype, sizes, offset)


@pytest.mark.parametrize("sizes", [[5], [10240, 4, 33333]])
def test_a_scaled_dot_sum_and_its_root(program, sizes):
    check_dot_sum(program, torch.float32, sizes, scale=-0.5)
    check_dot_sum(program, torch.float32, sizes, scale=0.5, root=True)


def test_dot_sum_beyond_the_largest_grid(program):
    check_dot_sum(program, torch.float32, [700_001, 500_000])


def test_dot_sum_of_nothing(program):
    for items in ([0, 0, 1.0, 1], [0, 1, 1.0, 0, 0, 0, None, None]):
        (result,) = run_case(program, DOT_SUM, items, [(torch.float64, (1,))])
        assert float(result) == 0


# --- squared_norms ---------------------------------------------------------------------------------------------------


def check_squared_norms(program: Path, sizes: Sequence[int], offset: int = 0) -> None:
    """Of tensors of all dtypes in turn."""
    dtypes = [list(DTYPE_NUMBERS)[i % 3] for i in range(len(sizes))]
    tensors = [
        (100 * normal(size, seed=i)).to(dtype) for i, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True))
    ]
    items: list = [len(sizes)]
    for tensor in tensors:
        place = offset * tensor.element_size()
        items += [DTYPE_NUMBERS[tensor.dtype], place, len(tensor), offset_buffer(tensor, offset)]
    (result,) = run_case(program, SQUARED_NORMS, items, [(torch.float64, (len(sizes),))])
    assert result is not None
    expected = torch.stack([tensor.double().square().sum() for tensor in tensors])
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("sizes", [[1], [0, 5], [3, 7, 1, 1], [4096] * 3, [4095, 40, 4097, 3, 0, 5, 10240], [300] * 64])
def test_squared_norms(program, sizes, offset):
    check_squared_norms(program, sizes, offset)


def test_squared_norms_beyond_the_largest_grid(program):
    check_squared_norms(program, [1_100_001, 5, 3])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_squared_norms_that_are_no_numbers_stay_with_their_tensor(program, value):
    bad, good = torch.full((3,), value, dtype=torch.float64), torch.ones(5)
    items = [2, 1, 0, 3, bad, 0, 0, 5, good]
    (result,) = run_case(program, SQUARED_NORMS, items, [(torch.float64, (2,))])
    assert not result[0].isfinite() and result[1] == 5


def test_squared_norms_of_nothing(program):
    assert run_case(program, SQUARED_NORMS, [0], [(torch.float64, (0,))]) == [None]


# --- commit ----------------------------------------------------------------------------------------------------------


def check_commit(program: Path, accept: bool, sizes: Sequence[int], offset: int = 0) -> None:
    old = [torch.arange(size + offset, dtype=torch.int64).to(torch.uint8) for size in sizes]
    new = [255 - tensor for tensor in old]
    items: list = [torch.tensor([accept]), len(sizes)]
    for a, b in zip(old, new, strict=True):
        items += [offset, len(a) - offset, a, b]
    results = run_case(program, COMMIT, items, [(torch.uint8, (size + offset,)) for size in sizes])
    for result, a, b in zip(results, old, new, strict=True):
        assert (result is None and len(a) == 0) or torch.equal(
            result, torch.cat([a[:offset], (b if accept else a)[offset:]])
        )


@pytest.mark.parametrize("accept", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 16])
@pytest.mark.parametrize("sizes", [[1], [15, 16, 17, 0, 40000], [64] * 64])
def test_commit(program, sizes, offset, accept):
    check_commit(program, accept, sizes, offset)


def test_commit_beyond_the_largest_grid(program):
    check_commit(program, True, [256 * 256 * 16 + 33])


def test_commit_of_nothing(program):
    check_commit(program, True, [])


# --- near_dependence -------------------------------------------------------------------------------------------------


def check_near_dependence(program: Path, largest: float, sizes: Sequence[int], info: int = 0) -> bool:
    """Of multiples of orthogonal matrices Q, ‖Q‖_F² = size, compared with the twin; what it says."""
    grams = [50 * torch.linalg.qr(normal(n, n)).Q for n in sizes]
    inverses = [torch.linalg.qr(normal(n, n, seed=1)).Q for n in sizes]
    infos = [torch.tensor(info if k == len(sizes) - 1 else 0, dtype=torch.int32) for k in range(len(sizes))]
    items: list = [largest, len(sizes)]
    for parts in zip(sizes, grams, inverses, infos, strict=True):
        items += [parts[0] ** 2, *parts[1:]]
    (beyond,) = run_case(program, NEAR_DEPENDENCE, items, [(torch.bool, (1,))])
    assert beyond == products.near_dependence(grams, inverses, infos, largest)
    return bool(beyond)


def check_bound_of_near_dependence(program: Path, sizes: Sequence[int]) -> None:
    largest = (50 * max(sizes)) ** 0.5  # largest⁴ = ‖50 Q‖² ‖Q'‖² of the largest matrix
    assert not check_near_dependence(program, largest * 1.001, sizes)
    assert check_near_dependence(program, largest * 0.999, sizes)


# 20 blocks sum a matrix of 200 rows, and one of 730 rows is summed by all the blocks that there may be.
@pytest.mark.parametrize("sizes", [[1], [5, 40], [100, 3, 130], [7] * 64, [200, 46], [730]], ids=str)
def test_near_dependence_by_the_bound(program, sizes):
    check_bound_of_near_dependence(program, sizes)


def test_near_dependence_by_a_failed_inverse(program):
    assert check_near_dependence(program, 1e9, [5, 4], info=3)


@pytest.mark.parametrize("which", [1, 2])
def test_a_nan_counts_as_near_dependence(program, which):
    items: list = [1e9, 1, 9, torch.eye(3).double(), torch.eye(3).double(), torch.tensor(0, dtype=torch.int32)]
    items[2 + which][1, 2] = torch.nan
    assert run_case(program, NEAR_DEPENDENCE, items, [(torch.bool, (1,))])[0]


# --- judge -----------------------------------------------------------------------------------------------------------

RULES = (2.0, 1.2, 0.25, 1e-6, 0.98, 0.97, 0.1, 0.9, 0.999)
RUNNING = dict(before=1.0, radius=0.5, failed=0.0, ended=0.0, size=0.05, norm=10.0, value=2.0, cap=10.0)
NONE = (False, False)


@pytest.mark.parametrize("maximise", [True, False])
@pytest.mark.parametrize("failed", [0.0, 1.0])
@pytest.mark.parametrize(
    "facts",
    [
        dict(),
        dict(size=-0.05),
        dict(size=0.03),  # shortened
        dict(value=0.5),
        dict(value=1.0),
        dict(value=9.81),  # at the cap
        dict(value=20.0),  # above it
        dict(value=1e9),
        dict(value=10.01),
        dict(value=20.0, before=-1.0),
        dict(value=20.0, before=12.0),
        dict(value=20.0, cap=math.inf),
        dict(value=math.nan),
        dict(value=math.inf),
        dict(norm=0.0, size=math.inf),
        dict(norm=math.nan, size=math.nan),
        dict(ended=4.0),
        dict(radius=1e-9, size=1e-10),
        dict(hindered=(False, True)),
        dict(hindered=()),
        dict(hindered=(), value=20.0),
        dict(hindered=(True, True), value=math.nan),
        dict(broken=(False, True)),
        dict(broken=()),
        dict(broken=(True,), value=0.1),
        dict(broken=(True,), value=20.0),
    ],
    ids=str,
)
def test_judge(program, facts, failed, maximise):
    facts = {**RUNNING, "failed": failed, "hindered": NONE, "broken": NONE, **facts}
    control = torch.tensor([*(facts[k] for k in ("before", "radius", "failed", "ended")), 0.5], dtype=torch.float64)
    scalars = [torch.tensor(facts[key], dtype=torch.float64) for key in ("size", "norm", "value")]
    flags = [torch.tensor(facts[key], dtype=torch.bool) for key in ("hindered", "broken")]
    cap = torch.tensor(facts["cap"], dtype=torch.float64)
    items: list = [control, torch.tensor(RULES, dtype=torch.float64), *scalars, cap, *flags, int(maximise)]
    kinds = [(torch.bool, (1,)), (torch.float64, (6,)), (torch.float64, (5,))]
    accepted, row, after = run_case(program, JUDGE, items, kinds)
    expected, expected_row = products.judge(control, *scalars, *flags, cap, maximise, RULES)
    assert accepted == expected
    torch.testing.assert_close(row, expected_row, rtol=1e-14, atol=0, equal_nan=True)
    torch.testing.assert_close(after, control, rtol=1e-14, atol=0, equal_nan=True)


# --- faults ----------------------------------------------------------------------------------------------------------

Check = Callable[[Path], None]

FAULTS: dict[str, tuple[str, str, str, Check]] = {
    "no barrier between two pivots": (
        "invert_gram.cu",
        "    __syncthreads();\n    const PivotColumn &first",
        "    const PivotColumn &first",
        partial(check_inverse, size=7),
    ),
    "one buffer for two pairs of pivots": (
        "invert_gram.cu",
        "publish(memory.columns[(c / 2 + 1) % 2][lane % 2])",
        "publish(memory.columns[c / 2 % 2][lane % 2])",
        partial(check_inverse, size=7),
    ),
    "a barrier in a divergent branch": (
        "invert_gram.cu",
        "  __syncthreads();\n  return turned;",
        "  if (lane_of_tile() < 16) __syncthreads();\n  return turned;",
        partial(check_inverse, size=33),
    ),
    "a launch reads what it writes": (
        "invert_gram.cu",
        "(blocks - 1 - k) % 2 == 0",
        "k % 2 < 2",
        partial(check_inverse, size=97),
    ),
    "elements behind the matrix": (
        "invert_gram.cu",
        "strip.row[q] = row < size",
        "strip.row[q] = row <= size",
        partial(check_inverse, size=33),
    ),
    "too little shared memory for a sweep": (
        "invert_gram.cu",
        "sizeof(SweepMemory)",
        "sizeof(SweepMemory) - 2 * sizeof(double)",
        partial(check_inverse, size=33),
    ),
    "all matrices report to one": (
        "invert_gram.cu",
        "infos + blockIdx.z",
        "infos",
        partial(check_several_inverses, size=33, count=3),
    ),
    "a launch goes on from the first matrix alone": (
        "invert_gram.cu",
        "sweep.from[m] = sweep.to[m]",
        "sweep.from[m] = sweep.to[0]",
        partial(check_several_inverses, size=33, count=3),
    ),
    "room for one matrix alone": (
        "invert_gram.cu",
        "count * size * size * int64_t",
        "size * size * int64_t",
        partial(check_several_inverses, size=33, count=3),
    ),
    "no upper triangle": (
        "invert_gram.cu",
        "return row < column;",
        "return row + 32 < column;",
        partial(check_inverse, size=33),
    ),
    "another tile rounded": (
        "invert_gram.cu",
        "if (float* const rounded = matrices.rounded[blockIdx.z]) {\n    store_tile(tile,",
        "if (float* const rounded = matrices.rounded[blockIdx.z]) {\n    store_tile(panel_i,",
        partial(check_inverse, size=33),
    ),
    "all rounded into one": (
        "invert_gram.cu",
        "matrices.rounded[blockIdx.z]",
        "matrices.rounded[0]",
        partial(check_several_inverses, size=33, count=3),
    ),
    "the root of every block's sum": (
        "reduce.cu",
        "gridDim.x == 1 ? finish(total) : total",
        "finish(total)",
        partial(check_dot_sum, dtype=torch.float32, sizes=[10240], scale=0.5),
    ),
    "the last bad pivot": (
        "invert_gram.cu",
        "if (failed == 0 && !is_pivot(d))",
        "if (!is_pivot(d))",
        partial(check_several_bad_pivots, size=40, pivots=(39, 7, 3)),
    ),
    "the rows of the first matrix": (
        "gram.cu",
        "grams.matrices[blockIdx.z].h;",
        "grams.matrices[0].h;",
        partial(check_several_grams, dtype=torch.float32, rows=17, columns=(5, 70, 1)),
    ),
    "the bias of the first matrix": (
        "gram.cu",
        "grams.matrices[blockIdx.z].added;",
        "grams.matrices[0].added;",
        partial(check_several_grams, dtype=torch.float32, rows=17, columns=(5, 70, 1)),
    ),
    "no barrier before the next slab": (
        "gram.cu",
        "    __syncthreads();\n  }\n\n  for",
        "  }\n\n  for",
        partial(check_gram, rows=17, columns=129, dtype=torch.float32),
    ),
    "too little shared memory for a slab": (
        "gram.cu",
        "sizeof(GramMemory)",
        "sizeof(GramMemory) - sizeof(double)",
        partial(check_gram, rows=17, columns=65, dtype=torch.float64),
    ),
    "the wrong element of the upper triangle": (
        "gram.cu",
        "above = column * h.rows + row;",
        "above = column * h.rows + row + 1;",
        partial(check_gram, rows=17, columns=65, dtype=torch.float64),
    ),
    "an element left out behind the packs": (
        "packs.cuh",
        "i = packs * width + thread; i < count; i += threads) act(",
        "i = packs * width + thread + 1; i < count; i += threads) act(",
        partial(check_step, layer=Layer(True, Tanh(), 7)),
    ),
    "an element left out behind the packs that are read": (
        "packs.cuh",
        "i = packs * width + thread; i < count; i += threads) use(",
        "i = packs * width + thread + 1; i < count; i += threads) use(",
        partial(check_dot_sum, dtype=torch.float32, sizes=[7]),
    ),
    "packs behind the last": (
        "packs.cuh",
        "if (own < packs) loaded[q]",
        "loaded[q]",
        partial(check_dot_sum, dtype=torch.float32, sizes=[8]),
    ),
    "packs without alignment": (
        "step.cu",
        "are_aligned(step.base, step.change, step.moved, step.targets, step.slopes)",
        "true",
        partial(check_step, layer=Layer(True, Tanh(), 7, 1)),
    ),
    "the step of another layer": (
        "step.cu",
        "steps.of_layer[blockIdx.y];",
        "steps.of_layer[0];",
        check_mixed_steps,
    ),
    "blocks for the first layer alone": (
        "step.cu",
        "pack_blocks<T>(most_elements), static_cast<unsigned>(count)",
        "pack_blocks<T>(most_elements), 1",
        check_mixed_steps,
    ),
    "packs of four operands without alignment": (
        "curvature.cu",
        "are_aligned(left, right, at, source, result)",
        "true",
        partial(check_times_curvature, activation=Tanh(), dtype=torch.float32, count=7, offset=1),
    ),
    "a source that is not there": (
        "curvature.cu",
        "if (term.source != nullptr) sum",
        "sum",
        partial(check_times_curvature, activation=Tanh(), dtype=torch.float32, count=7, sums=False),
    ),
    "no barrier between two halvings": (
        "reduce.cu",
        "    __syncthreads();\n  }\n  return sums[0];",
        "  }\n  return sums[0];",
        partial(check_dot_sum, dtype=torch.float32, sizes=[5000]),
    ),
    "a matrix left out": (
        "reduce.cu",
        "m < static_cast<unsigned>(grams.count);",
        "m + 1 < static_cast<unsigned>(grams.count);",
        partial(check_near_dependence, largest=1e9, sizes=[5, 4], info=3),
    ),
    "a sum of a matrix left out": (
        "reduce.cu",
        "half = (width + 1) / 2;",
        "half = width / 2;",
        partial(check_bound_of_near_dependence, sizes=[5, 110]),
    ),
    "more sums than threads": (
        "reduce.cu",
        "most_partial_sums / max(grams.count, 1);",
        "most_partial_sums;",
        partial(check_bound_of_near_dependence, sizes=[20] * 12 + [200]),
    ),
    "no barrier between two halvings of a matrix's sums": (
        "reduce.cu",
        "    __syncthreads();\n  }\n  double found",
        "  }\n  double found",
        partial(check_bound_of_near_dependence, sizes=[5, 200]),
    ),
    "a dtype for another": (
        "reduce.cu",
        "sum_of_squares<int32_t>(tensor",
        "sum_of_squares<float>(tensor",
        partial(check_squared_norms, sizes=[3, 3, 5]),
    ),
    "the sums of another tensor": (
        "reduce.cu",
        "partial[blockIdx.x * count + threadIdx.x]",
        "partial[blockIdx.x + count * threadIdx.x]",
        partial(check_squared_norms, sizes=[3, 7, 5000]),
    ),
    "a copy without asking": (
        "commit.cu",
        "if (!*accept) return;",
        "if (!accept) return;",
        partial(check_commit, accept=False, sizes=[17]),
    ),
}


@pytest.mark.parametrize("fault", mostly(FAULTS, first_of_each({name: fault[0] for name, fault in FAULTS.items()})))
def test_planted_faults_are_found(fault, tmp_path):
    file, right, wrong, check = FAULTS[fault]
    program = build("factor", tmp_path, plant_fault(tmp_path, file, right, wrong), SOURCES)
    with pytest.raises(AssertionError):
        check(program)
