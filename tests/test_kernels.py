"""The operators of csrc/ops.cpp: schemas that are those of the twins, twins and fake kernels behind them, backends.

The schemas are read from the source and defined once more under another name, so that no compiled library is needed.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from operators import (
    SCHEMAS,
    arguments_of,
    every_operator_and_mostly_one_activation,
    judge_arguments,
    normal,
    read_schemas,
    results_of,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from symtele_cuda.activations import Activation, Tanh
from symtele_cuda.kernels import extension
from symtele_cuda.kernels import library as kernels
from symtele_cuda.kernels import torch_kernels as products
from symtele_cuda.kernels.operands import OPERATORS

NAMESPACE = "symtele_cuda_twins"


@pytest.fixture(scope="module")
def operators() -> Iterator[kernels.Products]:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")  # its operators live as long as it does
    for schema in read_schemas():
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    kernels.complete(NAMESPACE)
    yield kernels.operators_of(NAMESPACE)


def test_every_operator_has_a_twin() -> None:
    assert set(SCHEMAS) == set(OPERATORS)


JIT_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Optional[Tensor]",
    Sequence[Tensor]: "List[Tensor]",
    Sequence[Tensor | None]: "List[Optional[Tensor]]",
    list[Tensor]: "List[Tensor]",
    Sequence[float]: "List[float]",
    Sequence[bool]: "List[bool]",
    Sequence[str]: "List[str]",
    float: "float",
    bool: "bool",
    int: "int",
    str: "str",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_is_the_signature_of_the_twin(name: str) -> None:
    twin = getattr(products, name)
    types_of = typing.get_type_hints(twin)
    signature = inspect.signature(twin)
    arguments = SCHEMAS[name].arguments
    assert [argument.name for argument in arguments] == list(signature.parameters)
    for argument in arguments:
        parameter = signature.parameters[argument.name]
        assert str(argument.type) == JIT_TYPES[types_of[argument.name]], argument.name
        assert argument.has_default_value() == (parameter.default is not inspect.Parameter.empty), argument.name
        if argument.has_default_value():
            assert argument.default_value == parameter.default, argument.name
    result = types_of["return"]
    several = typing.get_args(result) if typing.get_origin(result) is tuple else [result]
    expected = [] if result is types.NoneType else several
    assert [str(one.type) for one in SCHEMAS[name].returns] == [JIT_TYPES[one] for one in expected]


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_twin_says_what_all_its_tensors_are(name: str) -> None:
    tensors = {argument.name for argument in SCHEMAS[name].arguments if "Tensor" in str(argument.type)}
    assert set(OPERATORS[name].operands) == tensors
    assert OPERATORS[name].twin is getattr(products, name)


# --- the operators on the CPU -------------------------------------------------------------------------------------


@every_operator_and_mostly_one_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(operators: kernels.Products, name: str, activation: Activation, dtype: torch.dtype) -> None:
    for full in (False, True):
        results = torch.library.opcheck(getattr(operators, name), arguments_of(name, activation, dtype, full))
        assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_operator_computes_what_its_twin_does(operators: kernels.Products, name: str) -> None:
    found, expected = (
        results_of(getattr(where, name), name, arguments_of(name, Tanh(), torch.float64, full=True))
        for where in (operators, products)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_keywords_and_defaults(operators: kernels.Products) -> None:
    a, b, _, _, row, *_ = arguments_of("linear", Tanh(), torch.float32, full=True)
    for namespace in (operators, products):
        assert torch.equal(namespace.linear(a, b, row=row), a @ b + row)
        assert torch.equal(namespace.linear(a, b, alpha=2.0), 2 * (a @ b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fake_kernels_stay_on_their_device(operators: kernels.Products, dtype: torch.dtype) -> None:
    for name in SCHEMAS:
        arguments = arguments_of(name, Tanh(), dtype, full=True)
        with FakeTensorMode() as mode:
            moved = [_map(one, lambda tensor: mode.from_tensor(tensor).to("cuda:1")) for one in arguments]
            results = getattr(operators, name)(*moved)
        tensors = [] if results is None else tree_leaves(results)
        assert all(str(tensor.device) == "cuda:1" for tensor in tensors), name


def _map(argument: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(argument, list):
        return [_map(one, change) for one in argument]
    return change(argument) if isinstance(argument, Tensor) else argument


A, B, C = normal(3, 4), normal(4, 5), normal(3, 5)
SIZE = torch.tensor(0.5, dtype=torch.float64)
JUDGED = judge_arguments()[:-1]
TANH = Tanh().sigma
STEP = ([True], [TANH[0]], TANH[1])
BAD_ARGUMENTS: dict[str, tuple[str, tuple[Any, ...], type[Exception], str]] = {
    "vector": ("linear", (A[0], B), ValueError, r"a must be a matrix, got shape \(4,\)"),
    "inner": ("linear", (A, C), ValueError, r"b must have shape \(4, 5\), got \(3, 5\)"),
    "integers": ("linear", (A.int(), B.int()), TypeError, r"a must be of dtype float32 or float64, got int32"),
    "half": ("grams", ([A.half()], [False]), TypeError, r"rows must be of dtype float32 or float64, got float16"),
    "dtypes": ("linear", (A, B.double()), TypeError, r"b must be of dtype float32, got float64"),
    "devices": ("linear", (A, B.to("meta")), ValueError, r"b must be on the device of the first tensor, cpu, got meta"),
    "source": ("linear", (A, B, A), ValueError, r"source must have shape \(3, 5\), got \(3, 4\)"),
    "column": ("linear", (A, B, None, B[0], B[0]), ValueError, r"column must have shape \(3,\), got \(5,\)"),
    "row": ("linear_activation", (A, B, A[0], *TANH), ValueError, r"row must have shape \(5,\), got \(4,\)"),
    "origin": ("inverse_activation", (A, B, A, 1.0, *TANH), ValueError, r"origin must have shape \(3, 5\)"),
    "at": ("over_slope", (A, B, None, None, A, *TANH), ValueError, r"at must have shape \(3, 5\)"),
    "mask": (
        "grouped_linear",
        ([A, A], [B, B], [None, None], [None, None], [None, A], [1.0, 1.0], [1.0, 1.0]),
        ValueError,
        r"masks must have shape \(3, 5\)",
    ),
    "dtypes of a group": (
        "grouped_linear",
        ([A, A.double()], [B, B.double()], [None, None], [None, None], [None, None], [1.0, 1.0], [1.0, 1.0]),
        TypeError,
        r"a must be of dtype float32, got float64",
    ),
    "square": ("invert_grams", ([A.double()],), ValueError, r"grams must have shape \(3, 3\), got \(3, 4\)"),
    "precision": ("invert_grams", ([A[:, :3]],), TypeError, r"grams must be of dtype float64, got float32"),
    "grams of two sizes": ("grams", ([A, B], [True, True]), ValueError, r"rows must have shape \(3, 5\), got \(4, 5\)"),
    "change": ("take_steps", ([A], [B], SIZE, *STEP), ValueError, r"changes must have shape \(3, 4\), got \(4, 5\)"),
    "size": ("take_steps", ([A], [A], SIZE.float(), *STEP), TypeError, r"size must be of dtype float64"),
    "place": ("times_curvature", (A, A, B, None, *TANH), ValueError, r"at must have shape \(3, 4\), got"),
    "right": ("dot_sum", ([A, B], [A, C]), ValueError, r"right must have shape \(4, 5\), got \(3, 5\)"),
    "inverse": ("pseudo_inverse", (A.double(), A, True), ValueError, r"inverse must have shape \(3, 3\), got \(3, 4\)"),
    "rounded inverse": ("pseudo_inverse", (A[:, :3], A, True), TypeError, r"inverse must be of dtype float64"),
    "long": ("squared_norms", ([A, A.long()],), TypeError, r"tensors must be of dtype .* or int32, got int64"),
    "accept": ("commit", (SIZE, [A], [A]), TypeError, r"accept must be of dtype bool, got float64"),
    "trial": ("commit", (SIZE > 0, [A], [B]), ValueError, r"trial must have shape \(3, 4\), got \(4, 5\)"),
    "infos": (
        "near_dependence",
        ([C.double()], [C.double()], [SIZE], 1.0),
        TypeError,
        r"infos must be of dtype int32",
    ),
    "rules": ("judge", (*JUDGED, [1.0]), ValueError, r"rules must have 9 numbers, got 1"),
    "flags": ("judge", (*JUDGED[:4], SIZE[None], *judge_arguments()[5:]), TypeError, r"hindered must be of dtype"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_fake_kernels_refuse_what_the_kernels_refuse(operators: kernels.Products, case: str) -> None:
    name, arguments, error, message = BAD_ARGUMENTS[case]
    with FakeTensorMode() as mode, pytest.raises(error, match=message):
        getattr(operators, name)(*(_map(argument, mode.from_tensor) for argument in arguments))


# --- backends -----------------------------------------------------------------------------------------------------


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def without_cache() -> Iterator[None]:
    kernels._obstacle.cache_clear()
    yield
    kernels._obstacle.cache_clear()


@pytest.mark.parametrize(("device", "backend"), [(CPU, "auto"), (CPU, "torch"), (GPU, "torch")])
def test_plain_torch_is_always_there(device: torch.device, backend: str) -> None:
    assert kernels.products_for(device, backend) is products


@pytest.mark.usefixtures("without_cache")
def test_auto_is_plain_torch_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "unavailable_reason", lambda: "nobody built it")
    assert kernels.products_for(GPU, "auto") is products
    with pytest.raises(ValueError, match=r"backend='cuda' is not available: nobody built it\. Use .*backend='torch'"):
        kernels.products_for(GPU, "cuda")


@pytest.mark.usefixtures("without_cache")
def test_kernels_for_another_device_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "unavailable_reason", lambda: None)
    monkeypatch.setattr(extension, "device_obstacle", lambda capability: f"built for 8.0, got {capability}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert kernels.products_for(GPU, "auto") is products
    with pytest.raises(ValueError, match=r"backend='cuda' is not available: built for 8.0, got \(7, 0\)"):
        kernels.products_for(GPU, "cuda")


@pytest.mark.usefixtures("without_cache")
@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_the_compiled_kernels_are_taken_where_they_are(
    operators: kernels.Products, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "unavailable_reason", lambda: None)
    monkeypatch.setattr(extension, "device_obstacle", lambda capability: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "_compiled", lambda: operators)
    assert kernels.products_for(GPU, backend) is operators


def test_cuda_needs_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "unavailable_reason", lambda: None)
    with pytest.raises(ValueError, match=r"backend='cuda' is not available: the tensors are on cpu, not on a CUDA"):
        kernels.products_for(CPU, "cuda")


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'torch', 'cuda', got 'rocm'"):
        kernels.products_for(CPU, "rocm")


def test_the_compiled_operators_are_those_of_the_source() -> None:
    reason = extension.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    library = kernels._compiled()
    for name, schema in SCHEMAS.items():
        assert str(getattr(library, name)._schema).removeprefix("symtele_cuda::") == str(schema)
