"""csrc/ops.cpp and the kernels behind it on CPU tensors: the host code of every operator, compiled by g++.

The kernels run in the emulator of tests/harness. A copy of ops.cpp takes CPU tensors for CUDA tensors; nothing else of
it is changed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_harness import CSRC, HARNESS
from operators import SCHEMAS, arguments_of, every_operator_and_activation, judge_arguments, normal, results_of
from test_products import DECISIONS
from torch import Tensor

from symtele_cuda import teleport_layer
from symtele_cuda.activations import Activation, Tanh
from symtele_cuda.kernels import library as kernels
from symtele_cuda.kernels import torch_kernels as products
from symtele_cuda.kernels.pinv import append_ones
from symtele_cuda.operator import layer as operator_layer
from symtele_cuda.operator import teleport_layer as ops

KERNELS = sorted(path for path in CSRC.glob("*.cu") if path.stem != "matmul_tensor")
TANH = Tanh().sigma
NAMESPACE = "symtele_cuda_on_cpu"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile csrc/ with")

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


def for_cpu_tensors(source: str) -> str:
    """ops.cpp with CPU tensors in the place of CUDA tensors, in a namespace of its own."""
    for old, new in (
        ("tensor.is_cuda()", "tensor.is_cpu()"),
        ("TORCH_LIBRARY_FRAGMENT(symtele_cuda,", f"TORCH_LIBRARY_FRAGMENT({NAMESPACE},"),
        ("c10::DispatchKey::CUDA,", "c10::DispatchKey::CPU,"),
    ):
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def compile_object(source: Path, folder: Path, *flags: str) -> Path:
    target = folder / f"{source.stem}.o"
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-x", "c++", "-c", str(source), "-o", str(target), *flags]
    subprocess.run([*command, f"-I{HARNESS}", f"-I{CSRC}"], check=True, timeout=300)
    return target


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> kernels.Products:
    folder = tmp_path_factory.mktemp("ops_on_cpu")
    copy = folder / "ops.cpp"
    copy.write_text(for_cpu_tensors((CSRC / "ops.cpp").read_text()))
    torch_folder = Path(torch.__file__).parent
    include = torch_folder / "include"
    headers = [f"-isystem{include}", f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    objects = [compile_object(copy, folder, *headers)]
    objects += [compile_object(source, folder) for source in KERNELS]
    objects.append(compile_object(HARNESS / "routes.cpp", folder))
    library = folder / "ops.so"
    link = ["g++", "-shared", "-o", str(library), *map(str, objects), f"-L{torch_folder / 'lib'}"]
    subprocess.run([*link, "-ltorch_cpu", "-lc10"], check=True, timeout=300)
    torch.ops.load_library(str(library))
    return kernels.operators_of(NAMESPACE)


@pytest.fixture(params=["fused", "library"])
def route(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param == "library"
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


def assert_agree(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.is_contiguous()
    error = torch.linalg.vector_norm(actual.double() - expected.double())
    assert error <= tolerance * torch.linalg.vector_norm(expected.double())


def compare(operators: kernels.Products, name: str, make: Callable[[], tuple[Any, ...]], tolerance: float) -> None:
    """An operator with its twin, on the same arguments."""
    actual, expected = (results_of(getattr(where, name), name, make()) for where in (operators, products))
    for one, other in zip(actual, expected, strict=True):
        if name == "pseudo_inverse":  # its rows begin at multiples of 16 bytes
            assert one.stride() == other.stride()
            one, other = one.contiguous(), other.contiguous()
        assert_agree(one, other, tolerance)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("full", [False, True], ids=["least", "full"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@every_operator_and_activation
def test_the_operator_computes_what_its_twin_does(
    operators: kernels.Products, name: str, activation: Activation, dtype: torch.dtype, full: bool
) -> None:
    compare(operators, name, lambda: arguments_of(name, activation, dtype, full), TOLERANCE[dtype])


def spread(tensor: Tensor) -> Tensor:
    """The same values, every second element of a larger tensor."""
    wide = tensor.new_full([2 * size for size in tensor.shape], float("nan"))
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def padded(tensor: Tensor) -> Tensor:
    wide = tensor.new_full([size + 3 for size in tensor.shape], float("nan"))
    view = wide[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return view.copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda tensor: tensor.T.contiguous().T if tensor.ndim == 2 else tensor,
    "padded": padded,
    "padded and transposed": lambda tensor: padded(tensor.T).T if tensor.ndim == 2 else padded(tensor),
    "spread": spread,
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
    "expanded across": lambda tensor: tensor[..., :1].expand(tensor.shape),
}


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in SCHEMAS if name not in ("commit", "invert_grams", "judge")])
def test_layouts(operators: kernels.Products, name: str, layout: str) -> None:
    def laid_out(argument: Any) -> Any:
        if isinstance(argument, list):
            return [laid_out(one) for one in argument]
        return LAYOUTS[layout](argument) if isinstance(argument, Tensor) and argument.ndim else argument

    def make() -> tuple[Any, ...]:
        return tuple(map(laid_out, arguments_of(name, Tanh(), torch.float64, full=True)))

    compare(operators, name, make, TOLERANCE[torch.float64])


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(
    "sizes", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (1, 70, 5), (70, 1, 5), (33, 65, 40)], ids=str
)
def test_sizes(operators: kernels.Products, sizes: tuple[int, int, int]) -> None:
    n, m, k = sizes
    a, b, c = normal(n, k), normal(k, m), normal(n, m)
    compare(operators, "linear", lambda: (a, b, c, c[:, 0] if m else normal(n), normal(m), 0.5, 2.0), 2e-6)
    compare(operators, "linear", lambda: (a, b, None, None, None, 0.5, 2.0), 2e-6)
    compare(operators, "linear", lambda: (b.T, a.T, c.T), 2e-6)
    compare(operators, "over_slope", lambda: (a, b, None, None, c, *TANH), 2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_gram_matrices_beyond_our_own_kernels(operators: kernels.Products, dtype: torch.dtype, bias: bool) -> None:
    rows = normal(600, 620, dtype=dtype)
    compare(operators, "grams", lambda: ([rows, 2 * rows], [bias, not bias]), TOLERANCE[dtype])
    exact = products.grams([rows], [bias])[0][0] + torch.eye(600, dtype=torch.float64)
    broken = exact.clone()
    broken[400, 400] = -1.0
    inverses, infos, rounded = operators.invert_grams([exact, broken, 4 * exact], True)
    assert (infos.tolist(), infos.dtype) == ([0, 401, 0], torch.int32)
    assert_agree(inverses[0] @ exact, torch.eye(600, dtype=torch.float64), 1e-11)
    assert torch.equal(inverses[2], inverses[0] / 4)
    assert torch.equal(rounded[2], inverses[2].float())


def test_more_inverses_than_a_launch_takes(operators: kernels.Products) -> None:
    identity = torch.eye(3, dtype=torch.float64)
    inverses, infos, _ = operators.invert_grams([(-1.0 if m == 70 else 1.0 + m) * identity for m in range(150)])
    assert infos.tolist() == [int(m == 70) for m in range(150)]
    for m in (0, 63, 64, 127, 128, 149):
        assert_agree(inverses[m], identity / (1 + m), 1e-15)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_pseudo_inverse_hides_the_condition_of_the_gram_matrix(
    operators: kernels.Products, dtype: torch.dtype, bias: bool
) -> None:
    rows = normal(20, 31, dtype=dtype)
    rows[3] = rows[4] + 1e-3 * rows[3]
    (inverse,), _, _ = operators.invert_grams(operators.grams([rows], [bias])[0])
    extended = append_ones(rows).double() if bias else rows.double()
    factor = operators.pseudo_inverse(inverse, rows, bias)
    assert factor.stride() == (32, 1)
    residual = factor.double() @ extended.T - torch.eye(20, dtype=torch.float64)
    condition = torch.linalg.cond(extended)
    lost = torch.finfo(dtype).eps * condition + torch.finfo(torch.float64).eps * condition**2
    assert torch.linalg.matrix_norm(residual, 2) <= 10 * lost


def test_more_tensors_than_one_launch_takes(operators: kernels.Products) -> None:
    left = [normal(3, 5, seed=i) for i in range(150)]
    right = [normal(3, 5, seed=i + 1000) for i in range(150)]
    compare(operators, "dot_sum", lambda: (left, right), 2e-6)
    compare(operators, "dot_sum", lambda: (left, left, 0.5, True), 2e-6)
    compare(operators, "grouped_linear", lambda: many_products(left), 2e-6)
    compare(operators, "grams", lambda: (left[:40], [i % 2 == 0 for i in range(40)]), 2e-6)
    compare(
        operators, "take_steps", lambda: steps([one / 9 for one in left[:40]], [one / 9 for one in right[:40]]), 2e-6
    )
    compare(operators, "commit", lambda: (torch.tensor(True), [one.clone() for one in left], right), 0.0)
    compare(operators, "squared_norms", lambda: (left,), 2e-6)
    operators.commit(torch.tensor(True), [], [])
    exact, info = torch.eye(3, dtype=torch.float64), torch.tensor(0, dtype=torch.int32)
    for last, expected in ((1.0, False), (1e-3, True)):
        grams = [exact] * 149 + [last * exact]
        assert operators.near_dependence(grams, [exact] * 149 + [exact / last], [info] * 150, 10.0).item() is False
        assert (
            operators.near_dependence(grams, [exact] * 150, [info] * 149 + [info + expected], 10.0).item() is expected
        )


@pytest.mark.parametrize("case", DECISIONS)
def test_judge(operators: kernels.Products, case: str) -> None:
    actual, expected = (
        results_of(where.judge, "judge", judge_arguments(**DECISIONS[case][0])) for where in (operators, products)
    )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


def many(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """As many elements, in the memory of one."""
    return torch.zeros(1, 1, dtype=dtype).expand(*shape)


A, B, C = normal(3, 4), normal(4, 5), normal(3, 5)
SIZE = torch.tensor(0.5, dtype=torch.float64)
JUDGED = judge_arguments()[:-1]


def many_products(matrices: list[Tensor]) -> tuple[Any, ...]:
    return group(*((one, one.T, None, None, one @ one.T if i % 3 == 0 else None) for i, one in enumerate(matrices)))


def steps(bases: list[Tensor], changes: list[Tensor], size: Tensor = SIZE) -> tuple[Any, ...]:
    """The arguments of `take_steps` for tanh."""
    return bases, changes, size, [False] * len(bases), [TANH[0]] * len(bases), TANH[1] * len(bases)


def group(*products: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """The arguments of `grouped_linear` for products (a, b, source, row, mask), of which the last may be left out."""
    columns = zip(*((*one, None, None, None)[:5] for one in products), strict=True)
    return *map(list, columns), [1.0] * len(products), [1.0] * len(products)


BAD_ARGUMENTS: dict[str, tuple[str, tuple[Any, ...], type[Exception], str]] = {
    "vector": ("linear", (A[0], B), ValueError, r"a must be a matrix, got shape \[4\]"),
    "inner": ("linear", (A, C), ValueError, r"b must have as many rows as a has columns, 4, got shape \[3, 5\]"),
    "integers": ("linear", (A.int(), B.int()), TypeError, r"a must be of dtype float32 or float64, got int32"),
    "half": ("grams", ([A.half()], [False]), TypeError, r"rows must be of dtype float32 or float64, got float16"),
    "dtypes": ("linear", (A, B.double()), TypeError, r"b must be of dtype float32, got float64"),
    "large": ("linear", (many(2**16, 2**15 + 1), B), ValueError, r"a must have at most 2\^31 elements, got 2147549184"),
    "large result": (
        "linear",
        (many(2**16, 1), many(1, 2**15 + 1)),
        ValueError,
        r"at most 2\^31 elements, got 65536 x",
    ),
    "large gram": (
        "grams",
        ([many(2**16, 1)], [False]),
        ValueError,
        r"rows must have a Gram matrix of at most 2\^31 .* 65536",
    ),
    "large inverse": (
        "invert_grams",
        ([many(2**16, 2**16, dtype=torch.float64)],),
        ValueError,
        r"grams must have at most 2\^31",
    ),
    "source": ("linear", (A, B, A), ValueError, r"source must have shape \[3, 5\], got \[3, 4\]"),
    "column": ("linear", (A, B, None, B[0], B[0]), ValueError, r"column must have shape \[3\], got \[5\]"),
    "row": ("linear_activation", (A, B, A[0], *TANH), ValueError, r"row must have shape \[5\], got \[4\]"),
    "row's dtype": (
        "linear",
        (A, B, None, None, B[0].double()),
        TypeError,
        r"row must be of dtype float32, got float64",
    ),
    "activation": (
        "linear_activation",
        (A, B, None, "relu", TANH[1]),
        ValueError,
        r"activation must be one of .* got relu",
    ),
    "numbers": ("linear_activation", (A, B, None, "tanh", [0.0]), ValueError, r"numbers must be 5 .* got 1"),
    "numbers of steps": (
        "take_steps",
        (*steps([A, A], [A, A])[:-1], TANH[1]),
        ValueError,
        r"numbers must be 5 for each of bases, got 5 for 2",
    ),
    "origin": ("inverse_activation", (A, B, A, 1.0, *TANH), ValueError, r"origin must have shape \[3, 5\]"),
    "at": ("over_slope", (A, B, None, None, A, *TANH), ValueError, r"at must have shape \[3, 5\]"),
    "mask": ("grouped_linear", group((A, B), (A, B, None, None, A)), ValueError, r"mask must have shape \[3, 5\]"),
    "dtypes of a group": (
        "grouped_linear",
        group((A, B), (A.double(), B.double())),
        TypeError,
        r"a must be of dtype float32, got float64",
    ),
    "rows of a group": (
        "grouped_linear",
        group((A, B), (A, B, None, A[0])),
        ValueError,
        r"row must have shape \[5\], got \[4\]",
    ),
    "alphas": (
        "grouped_linear",
        (*group((A, B))[:-2], [1.0, 1.0], [1.0]),
        ValueError,
        r"alphas must have as many elements as a, 1, got 2",
    ),
    "square": ("invert_grams", ([A.double()],), ValueError, r"grams must have shape \[3, 3\], got \[3, 4\]"),
    "sizes of the inverses": (
        "invert_grams",
        ([A[:, :3].double(), B.double()],),
        ValueError,
        r"grams must have shape \[3, 3\], got \[4, 5\]",
    ),
    "precision": ("invert_grams", ([A[:, :3]],), TypeError, r"grams must be of dtype float64, got float32"),
    "grams of two sizes": (
        "grams",
        ([A, B], [False, True]),
        ValueError,
        r"rows must have as many rows each as the first, 3, got shape \[4, 5\]",
    ),
    "biases": ("grams", ([A, A], [True]), ValueError, r"biases must have as many elements as rows, 2, got 1"),
    "change": ("take_steps", steps([A, A], [A, B]), ValueError, r"changes must have shape \[3, 4\], got \[4, 5\]"),
    "dtypes of steps": (
        "take_steps",
        steps([A, A.double()], [A, A.double()]),
        TypeError,
        r"bases must be of dtype float32, got float64",
    ),
    "size": ("take_steps", steps([A], [A], SIZE.float()), TypeError, r"size must be of dtype float64, got float32"),
    "sizes": ("take_steps", steps([A], [A], A.double()), ValueError, r"size must have one element, got shape"),
    "steps": ("take_steps", steps([A, A], [A]), ValueError, r"changes must have as many elements as bases, 2, got 1"),
    "activation of a step": (
        "take_steps",
        (*steps([A], [A])[:-2], ["relu"], TANH[1]),
        ValueError,
        r"activation must be one of .* got relu",
    ),
    "place": ("times_curvature", (A, A, B, None, *TANH), ValueError, r"at must have shape \[3, 4\], got"),
    "precision of a source": (
        "times_curvature",
        (A, A, A, A.double(), *TANH),
        TypeError,
        r"source must be of dtype float32, got float64",
    ),
    "right": ("dot_sum", ([A, B], [A, C]), ValueError, r"right must have shape \[4, 5\], got \[3, 5\]"),
    "lists": ("dot_sum", ([A, B], [A]), ValueError, r"right must have as many elements as left, 2, got 1"),
    "rows": ("pseudo_inverse", (A.double(), A, True), ValueError, r"inverse must have shape \[3, 3\], got \[3, 4\]"),
    "inverse": ("pseudo_inverse", (A[:, :3], A, True), TypeError, r"inverse must be of dtype float64, got float32"),
    "long": ("squared_norms", ([A, A.long()],), TypeError, r"tensors must be of dtype .* or int32, got int64"),
    "accept": ("commit", (SIZE, [A], [A]), TypeError, r"accept must be of dtype bool, got float64"),
    "trial": ("commit", (SIZE > 0, [A], [B]), ValueError, r"trial must have shape \[3, 4\], got \[4, 5\]"),
    "infos": (
        "near_dependence",
        ([A.double()], [A.double()], [SIZE], 1.0),
        TypeError,
        r"infos must be of dtype int32, got",
    ),
    "control": ("judge", (SIZE, *judge_arguments()[1:]), ValueError, r"control must have shape \[5\], got \[\]"),
    "rules": ("judge", (*JUDGED, [1.0]), ValueError, r"rules must have 9 numbers, got 1"),
    "flags": (
        "judge",
        (*JUDGED[:4], SIZE[None], *judge_arguments()[5:]),
        TypeError,
        r"hindered must be of dtype bool",
    ),
    "current": (
        "commit",
        (SIZE > 0, [A.T], [A.T]),
        ValueError,
        r"current must have contiguous tensors, got strides \[1, 4\]",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(operators: kernels.Products, case: str) -> None:
    name, arguments, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        getattr(operators, name)(*arguments)


def test_a_launch_that_fails_is_told(operators: kernels.Products) -> None:
    with pytest.raises(RuntimeError, match=re.escape("symtele_cuda: launch_tensor failed with an error")):
        operators.linear(A, normal(4, 1313))


# --- teleport_layer on the compiled operators -------------------------------------------------------------------------


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("action", ops.ACTIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_teleport_layer(
    operators: kernels.Products, dtype: torch.dtype, bias: bool, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        operator_layer, "products_for", lambda device, backend: products if backend == "torch" else operators
    )
    g = torch.eye(9, dtype=dtype) + normal(9, 9, dtype=dtype) / 40
    arguments = (
        normal(9, 17, dtype=dtype) / 4,
        normal(7, 17, dtype=dtype),
        g,
        normal(9, dtype=dtype) if bias else None,
    )
    results = []
    for backend in ("auto", "torch"):
        leaves = [one.clone().requires_grad_(i != 1) for i, one in enumerate(arguments) if one is not None]
        outputs = teleport_layer(*leaves, activation="leaky_relu", action=action, backend=backend)
        found = [output for output in outputs if output is not None]
        total = sum((one.square() * torch.arange(1, one.numel() + 1).view(one.shape)).sum() for one in found)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        results.append([*found, *torch.autograd.grad(total, wanted)])
    for one, other in zip(*results, strict=True):
        assert_agree(one.detach(), other.detach(), 100 * TOLERANCE[dtype])
