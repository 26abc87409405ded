"""The fused matrix product and the epilogues (csrc/matmul.cu, epilogue.cuh, activation.cuh), run on the CPU.

Each product is compared with its twin in `torch_kernels`, in float64 on the same numbers, and must give the same bytes
in whatever order the threads run. What the operands' buffers hold beside the operands is NaN.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cpu_harness import ORDERS, Unpacker, activation_items, build, output_of, pack, plant_fault, run
from exhaustive import first_of_each, mostly
from sigmas import ONE_OF_EACH
from torch import Tensor

from symtele_cuda.activations import Activation, Identity, Softplus, Softsign
from symtele_cuda.kernels import torch_kernels as products

IDENTITY = Identity()
KINDS = ("linear", "activation", "inverse_activation", "over_slope", "times_slope", "masked")
DTYPES = {torch.float32: 0, torch.float64: 1}
FUSED, EPILOGUE_ALONE = 0, 1
TILES = (16, 32, 64)
LARGEST_GROUP = 8  # max_products of csrc/kernels.h

# Relative error in the Frobenius norm: u sqrt(inner) for the sums, and what atanh and log make of it near their poles.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


@dataclass(frozen=True)
class Layout:
    """Of an operand: column-major if `transposed`, its rows (columns) `padding` elements further apart than they are
    long, its first element `offset` behind the beginning of an allocation."""

    transposed: bool = False
    padding: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Case:
    launcher: int
    dtype: torch.dtype
    rows: int
    columns: int
    inner: int
    kind: str = "linear"
    activation: Activation = IDENTITY
    a: Layout = Layout()
    b: Layout = Layout()
    source: bool = False
    column: bool = False
    row: bool = False
    vector_stride: int = 1
    alpha: float = 1.0
    beta: float = 1.0
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns


@dataclass(frozen=True)
class Inputs:
    a: Tensor
    b: Tensor
    source: Tensor | None
    at: Tensor | None
    column: Tensor | None
    row: Tensor | None


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, b = normal(case.rows, case.inner), normal(case.inner, case.columns)
    if case.kind == "inverse_activation":
        a, b = into_range(a, b, case.activation)
    inputs = Inputs(
        a,
        b,
        normal(*case.shape) if case.source else None,
        normal(*case.shape) / 2 if case.kind not in ("linear", "activation") else None,  # tanh' has digits there
        normal(case.rows) if case.column else None,
        normal(case.columns) if case.row else None,
    )
    return map_tensors(inputs, lambda tensor: tensor.to(case.dtype))


def into_range(a: Tensor, b: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Scale a so that a b lies well inside the range of the activation, which 0 is in or at the edge of."""
    low, high = activation.domain
    if low == 0 or high == 0:
        a, b = (a.abs() + 0.1) * (1 if low == 0 else -1), b.abs() + 0.1
    product = a @ b
    if product.numel() == 0 or product.abs().max() == 0:
        return a, b
    if isinstance(activation, Softplus):  # on both sides of the threshold
        return a * (Softplus.threshold / activation.parameter / product.mean()), b
    near = 0.6 if isinstance(activation, Softsign) else 0.9  # the slope of its inverse, 1/(1 − |b|)², grows fast
    limit = near * min(abs(edge) for edge in (low, high) if edge != 0)
    return (a, b) if math.isinf(limit) else (a * (limit / product.abs().max()), b)


def map_tensors(inputs: Inputs, function) -> Inputs:
    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    return Inputs(**{name: None if tensor is None else function(tensor) for name, tensor in fields.items()})


def expected(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """What the twin makes of the same numbers in float64."""
    x = map_tensors(inputs, Tensor.double)
    activation = case.activation.sigma
    match case.kind:
        case "linear":
            return (products.linear(x.a, x.b, x.source, x.column, x.row, case.alpha, case.beta),)
        case "activation":
            return products.linear_activation(x.a, x.b, x.row, *activation)
        case "inverse_activation":
            return products.inverse_activation(x.a, x.b, x.at, -case.beta, *activation)
        case "over_slope":
            return products.over_slope(x.a, x.b, x.column, x.row, x.at, *activation)
        case "times_slope":
            return (products.times_slope(x.a, x.b, x.at, x.source, case.beta, *activation),)
    return tuple(products.grouped_linear([x.a], [x.b], [x.source], [x.row], [x.at], [case.alpha], [case.beta]))


# --- what the program reads and writes -------------------------------------------------------------------------------


def encode(case: Case, inputs: Inputs) -> bytes:
    size = inputs.a.element_size() * case.rows * case.columns
    first = inputs.a @ inputs.b if case.launcher == EPILOGUE_ALONE else torch.full(case.shape, torch.nan).to(case.dtype)
    header = [DTYPES[case.dtype], case.rows, case.columns, case.inner, KINDS.index(case.kind)]
    scalars = [*activation_items(case.activation), case.alpha, case.beta]
    vectors = [None if v is None else spread(v, case.vector_stride) for v in (inputs.column, inputs.row)]
    return pack(
        [
            *(*header, *scalars, case.vector_stride, case.vector_stride),
            *(*lay_out(inputs.a, case.a), *lay_out(inputs.b, case.b)),
            *(inputs.source, inputs.at, *vectors, first, size if writes_twice(case) else 0),
        ]
    )


def lay_out(matrix: Tensor, layout: Layout) -> tuple[int, int, int, Tensor]:
    """Offset and strides, and a buffer that ends with the matrix."""
    lines = matrix.T if layout.transposed else matrix
    buffer = matrix.new_full((layout.offset + len(lines) * (lines.shape[1] + layout.padding),), torch.nan)
    stride = lines.shape[1] + layout.padding
    buffer[layout.offset :].view(len(lines), stride)[:, : lines.shape[1]] = lines
    strides = (1, stride) if layout.transposed else (stride, 1)
    end = len(buffer) - layout.padding if len(lines) else len(buffer)
    return layout.offset, *strides, buffer[:end]


def spread(vector: Tensor, stride: int) -> Tensor:
    buffer = vector.new_full(((len(vector) - 1) * stride + 1,), torch.nan)
    buffer[::stride] = vector
    return buffer


def writes_twice(case: Case) -> bool:
    return case.kind not in ("linear", "times_slope")


def check(case: Case, inputs: Inputs, output: Unpacker) -> None:
    results = [output.tensor(case.dtype, case.shape) for _ in range(2)]
    names = ("first", "second") if writes_twice(case) else ("first",)
    assert writes_twice(case) or results[1] is None
    if 0 in case.shape:
        assert results == [None, None]
        return
    for name, result, reference in zip(names, results, expected(case, inputs), strict=False):
        error = (result.double() - reference).abs()
        assert error.norm() <= TOLERANCE[case.dtype] * reference.norm(), (
            f"{name}: relative error {error.norm() / reference.norm():.1e}, worst at "
            f"{divmod(int(error.nan_to_num(torch.inf).argmax()), case.columns)}: {case}"
        )


def run_cases(program: Path, cases: list[Case], order: str) -> bytes:
    """Run the cases one by one, check them all, and return what the program wrote."""
    return run_groups(program, [[case] for case in cases], order)


def run_groups(program: Path, groups: list[list[Case]], order: str) -> bytes:
    """Run the cases of each group in one launch, check them all, and return what the program wrote."""
    inputs = [[make_inputs(case) for case in group] for group in groups]
    written = output_of(program, encode_groups(groups, inputs), order)
    output = Unpacker(written)
    for group, values in zip(groups, inputs, strict=True):
        assert output.number() == 0, f"not launched: {group}"
        for case, one in zip(group, values, strict=True):
            check(case, one, output)
    assert output.done()
    return written


def encode_all(cases: list[Case], inputs: list[Inputs]) -> bytes:
    return encode_groups([[case] for case in cases], [[one] for one in inputs])


def encode_groups(groups: list[list[Case]], inputs: list[list[Inputs]]) -> bytes:
    parts = [pack([len(groups)])]
    for group, values in zip(groups, inputs, strict=True):
        parts += [pack([group[0].launcher, len(group)]), *map(encode, group, values)]
    return b"".join(parts)


# --- the cases -------------------------------------------------------------------------------------------------------

SIZES = (1, 2, 7, 31, 33, 65, 129)
EPILOGUES = [(kind, activation) for kind in KINDS[1:5] for activation in ONE_OF_EACH] + [
    ("linear", IDENTITY),
    ("masked", IDENTITY),
]


def draw_case(launcher: int, dtype: torch.dtype, kind: str, activation: Activation, draw: random.Random) -> Case:
    """A case of this epilogue; the sizes, layouts and optional operands are drawn."""

    def layout() -> Layout:
        return Layout(draw.random() < 0.5, draw.choice((0, 0, 3, 4)), draw.choice((0, 0, 1)))

    optional = kind in ("linear", "masked")
    row = kind in ("linear", "activation", "over_slope", "masked") and draw.random() < 0.7
    return Case(
        launcher,
        dtype,
        *(draw.choice(SIZES) for _ in range(3)),
        kind,
        activation,
        layout(),
        layout(),
        source=kind == "times_slope" or (optional and draw.random() < 0.5),
        column=row and kind in ("linear", "over_slope") and draw.random() < 0.5,
        row=row,
        vector_stride=draw.choice((1, 3)),
        alpha=draw.choice((1.0, -0.7)) if optional else 1.0,
        beta=draw.choice((1.0, -0.3)) if optional or kind in ("inverse_activation", "times_slope") else 1.0,
        seed=draw.randrange(1000),
    )


def draw_cases(launcher: int, dtype: torch.dtype) -> list[Case]:
    draw = random.Random(f"{launcher} {dtype}")
    epilogues = EPILOGUES + 6 * [("linear", IDENTITY)]
    return [draw_case(launcher, dtype, *epilogue, draw) for epilogue in epilogues]


def layout_cases(tile: int, dtype: torch.dtype) -> list[Case]:
    """Both orientations of each operand, loaded in pieces of 16 bytes, and not because of padding or offset."""
    layouts = [Layout(transposed, *odd) for transposed in (False, True) for odd in ((4, 0), (1, 0), (4, 1))]
    return [Case(tile, dtype, 36, 68, 44, a=a, b=b) for a, b in itertools.product(layouts, layouts)]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("matmul", tmp_path_factory.mktemp("matmul"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("launcher", [FUSED, EPILOGUE_ALONE, *TILES])
def test_epilogues_and_odd_sizes(program, launcher, dtype):
    cases = draw_cases(launcher, dtype)
    written = {run_cases(program, cases, order) for order in ORDERS}
    assert len(written) == 1, "the results depend on the order of the threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_operand_layouts(program, tile, dtype):
    run_cases(program, layout_cases(tile, dtype), "ascending")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_stages_and_the_choice_of_tiles(program, dtype):
    """Sums over several stages, and products that launch_fused gives to each of the three tiles."""
    sizes = [(20, 20, 784), (40, 30, 513), (320, 300, 40), (610, 620, 9)]
    transposed = Layout(transposed=True)
    cases = [Case(FUSED, dtype, *size, a=a) for size in sizes for a in (Layout(), transposed)]
    assert run_cases(program, cases, "ascending") == run_cases(program, cases, "descending")


def draw_groups(launcher: int, dtype: torch.dtype) -> list[list[Case]]:
    """Groups of every size, of products of different sizes, layouts and epilogues."""
    draw = random.Random(f"groups {launcher} {dtype}")
    epilogues = [("linear", IDENTITY), ("masked", IDENTITY)]
    return [
        [draw_case(launcher, dtype, *draw.choice(epilogues), draw) for _ in range(count)]
        for count in range(1, LARGEST_GROUP + 1)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("launcher", [FUSED, *TILES])
def test_groups(program, launcher, dtype):
    """Each product is what it is alone, to the bit, where the tiles are the same."""
    groups = draw_groups(launcher, dtype)
    written = {run_groups(program, groups, order) for order in ORDERS}
    assert len(written) == 1, "the results depend on the order of the threads"
    if launcher != FUSED:
        cases = [case for group in groups for case in group]
        together, alone = (Unpacker(one) for one in (*written, run_cases(program, cases, "ascending")))
        for group in groups:
            assert together.number() == 0
            for case in group:
                assert alone.number() == 0
                for _ in range(2):
                    one, other = (output.tensor(case.dtype, case.shape) for output in (together, alone))
                    assert (one is None and other is None) or torch.equal(one, other)


def test_a_group_with_products_of_nothing(program):
    """They have no tile, wherever they stand."""
    sizes = [(0, 5, 4), (33, 17, 9), (5, 0, 4), (7, 40, 0), (0, 0, 0)]
    run_groups(program, [[Case(tile, torch.float32, *size) for size in sizes] for tile in (FUSED, *TILES)], "1")
    nothing = [[Case(FUSED, torch.float32, 0, 5, 4), Case(FUSED, torch.float32, 3, 0, 4)]]
    run_groups(program, nothing, "ascending")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_sum_and_no_element(program, dtype):
    """inner = 0 gives the epilogue of zeros; without rows or columns nothing is launched."""
    cases = [Case(launcher, dtype, 3, 5, 0, source=True) for launcher in (FUSED, *TILES)]
    cases += [Case(launcher, dtype, *size) for launcher in (FUSED, EPILOGUE_ALONE) for size in ((0, 5, 4), (5, 0, 4))]
    inputs = [make_inputs(case) for case in cases]
    output = Unpacker(output_of(program, encode_all(cases, inputs), "ascending"))
    for case, values in zip(cases, inputs, strict=True):
        assert output.number() == 0
        first, second = (output.tensor(case.dtype, case.shape) for _ in range(2))
        assert second is None
        assert first is None if 0 in case.shape else torch.equal(first, values.source)


@pytest.mark.parametrize("activation", [one for one in ONE_OF_EACH if one.bounded], ids=str)
def test_the_inverse_is_not_finite_outside_its_domain(program, activation):
    case = Case(16, torch.float32, 9, 7, 5, "inverse_activation", activation)
    outside = 3.0 if activation.domain[1] <= 0 else -3.0
    inputs = dataclasses.replace(make_inputs(case), a=torch.full((9, 5), outside), b=torch.ones(5, 7))
    output = Unpacker(output_of(program, encode_all([case], [inputs]), "ascending"))
    assert output.number() == 0
    assert not output.tensor(case.dtype, case.shape).isfinite().any()


# --- planted faults --------------------------------------------------------------------------------------------------

MATMUL, EPILOGUE, ACTIVATION = "matmul.cu", "epilogue.cuh", "activation.cuh"

# What a fault stands for: the file, the line that is right, what takes its place.
FAULTS = {
    "no barrier between stages": (
        MATMUL,
        "    __syncthreads();  // `next` is written, and `present` read by all\n",
        "",
    ),
    "no barrier before the sum": (MATMUL, "  __syncthreads();  // the partial sums are written\n", ""),
    "a barrier that some threads skip": (
        MATMUL,
        "    __syncthreads();  // `next`",
        "    if (threadIdx.x < 200) __syncthreads();  // `next`",
    ),
    "too little shared memory": (MATMUL, "::shared_bytes,\n", "::shared_bytes - 16,\n"),
    "one element too far along": (MATMUL, "      if (i < left)", "      if (i <= left)"),
    "one line of the operand too far": (MATMUL, "if (outer_left <= 0 ||", "if (outer_left < 0 ||"),
    "pieces where they are not aligned": (MATMUL, "if (operand.aligned && left", "if (left"),
    "an index one too far": (
        MATMUL,
        "k_piece * length + step % length",
        "k_piece * length + step % length + 1",
    ),
    "a stage not turned where it is read": (MATMUL, "at.row) ^ turn_of<T>(at.slice);", "at.row);"),
    "a tile of the product before": (
        MATMUL,
        "while (blockIdx.x < group.members[own].first_tile) --own;",
        "while (blockIdx.x <= group.members[own].first_tile && own > 0) --own;",
    ),
    "tiles counted from those of all": (
        MATMUL,
        "blockIdx.x - group.members[own].first_tile;",
        "blockIdx.x;",
    ),
    "the epilogue of another product": (
        MATMUL,
        "finish<T, extent>(group.members[own].epilogue,",
        "finish<T, extent>(group.members[0].epilogue,",
    ),
    "wrong element written": (
        MATMUL,
        "epilogue.write(i * epilogue.columns + j,",
        "epilogue.write(i * epilogue.columns,",
    ),
    "one row too many": (MATMUL, "    if (i < rows &&", "    if (i <= rows &&"),
    "a row too many read": (MATMUL, "element / extent, rows - 1)", "element / extent, rows)"),
    "column and row exchanged": (EPILOGUE, "row[j * row_stride]", "row[i * row_stride]"),
    "a wrong derivative": (ACTIVATION, "return 1 - value * value;", "return 1 - value;"),
    "a derivative not scaled": (ACTIVATION, "return slope * sigma.derivative", "return gain * sigma.derivative"),
    "an inverse not shifted": (ACTIVATION, "(b - offset) * per_gain) - shift)", "(b - offset) * per_gain))"),
}


@pytest.mark.parametrize("name", mostly(FAULTS, first_of_each({name: fault[0] for name, fault in FAULTS.items()})))
def test_planted_faults_are_found(tmp_path, name):
    program = build("matmul", tmp_path, plant_fault(tmp_path, *FAULTS[name]))
    with pytest.raises(AssertionError):
        for draw, run_all in ((draw_cases, run_cases), (draw_groups, run_groups)):
            written = {run_all(program, draw(32, torch.float32), order) for order in ORDERS}
            assert len(written) == 1


def test_the_emulator_names_the_barrier_that_is_missed(tmp_path):
    faulty = build("matmul", tmp_path, plant_fault(tmp_path, *FAULTS["a barrier that some threads skip"]))
    case = Case(16, torch.float32, 3, 3, 3)
    done = run(faulty, encode_all([case], [make_inputs(case)]), "ascending")
    assert done.returncode == 3
    assert "a barrier that not all threads reach" in done.stderr
