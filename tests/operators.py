"""What the tests of the operators share: the schemas of csrc/ops.cpp, and good arguments for each operator."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sigmas import ONE_OF_EACH
from torch import Tensor
from torch.utils._pytree import tree_leaves

from symtele_cuda.activations import Activation, Tanh

SOURCE = Path(__file__).parents[1] / "csrc" / "ops.cpp"
RULES = {
    "growth": 3.0,
    "later growth": 1.5,
    "shrinkage": 0.25,
    "smallest radius": 1e-3,
    "cap share": 0.9,
    "cap aim": 0.95,
    "least share": 0.1,
    "largest share": 0.8,
    "shortened below": 0.99,
}


def read_schemas() -> list[str]:
    """The operators' schemas in csrc/ops.cpp."""
    section = SOURCE.read_text().split("TORCH_LIBRARY_FRAGMENT")[1]
    joined = re.sub(r'"\s*\n\s*"', "", section)  # the compiler joins neighbouring strings
    return re.findall(r'"(\w+\(.*\) -> .*?)"', joined)


SCHEMAS = {(schema := torch._C.parse_schema(text)).name: schema for text in read_schemas()}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments_of(name: str, activation: Activation, dtype: torch.dtype, full: bool) -> tuple[Any, ...]:
    """Good arguments of an operator, with every optional operand or with none."""
    sigma = activation.sigma
    a, b, c = (normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(3, 4), (4, 5), (3, 5)]))
    column, row = (normal(3, dtype=dtype), normal(5, dtype=dtype)) if full else (None, None)
    size = torch.tensor(0.5, dtype=torch.float64)
    inside = side_of(activation)
    accept = torch.tensor(full)
    info = torch.tensor(0, dtype=torch.int32)
    exact = torch.eye(4, dtype=torch.float64) + 1 / (1 + full)
    calls: dict[str, tuple[Any, ...]] = {
        "linear": (a, b, c, column, row, 0.5, 2.0) if full else (a, b),
        "linear_activation": (a, b, row, *sigma),
        "inverse_activation": (a.abs() / 9, inside * b.abs() / 9, c, 1.0, *sigma),
        "over_slope": (a, b, column, row, c, *sigma),
        "times_slope": (a, b, c, c + 1, -1.0, *sigma),
        "grouped_linear": grouped_arguments(a, b, c, row, full),
        "grams": ([a, a.T[:3], 2 * a], [True, False, True], True) if full else ([a], [False]),
        "invert_grams": ([exact] * (1 + full), full),
        "pseudo_inverse": (normal(3, 3, dtype=torch.float64), a, full),
        "take_steps": step_arguments(c, size, activation, 2 + full),
        "times_curvature": (a, a + 1, a.abs(), a - 1 if full else None, *sigma),
        "dot_sum": ([a, b.T], [2 * a, b.T], 0.5, True) if full else ([a], [a]),
        "squared_norms": ([a, a[0], exact, b.T, info + 3] if full else [a],),
        "commit": (accept, [a, b], [a + 1, (b + 1).T.contiguous().T]),
        "near_dependence": ([exact] * (1 + full), [exact] * (1 + full), [info] * (1 + full), 3.0),
        "judge": judge_arguments(broken=(False,) * full, maximise=full),
    }
    return calls[name]


def grouped_arguments(a: Tensor, b: Tensor, c: Tensor, row: Tensor | None, full: bool) -> tuple[Any, ...]:
    """The arguments of `grouped_linear` for one plain product, or for several with all that is optional."""
    if not full:
        return [a], [b], [None], [None], [None], [1.0], [1.0]
    optional = [c, None, None], [None, b[:, 0], row], [c, None, c + 1]
    return [a, b, a], [b, b.T, b], *optional, [0.5, 2.0, 1.0], [2.0, 1.0, 1.0]


def step_arguments(c: Tensor, size: Tensor, activation: Activation, layers: int) -> tuple[Any, ...]:
    """The arguments of `take_steps` for layers in turn along the targets and not, the last with another activation."""
    last = Tanh()
    activations = [*[activation] * (layers - 1), last]
    bases = [c if layer % 2 else side_of(one) * c.abs() / 9 for layer, one in enumerate(activations)]
    changes = [base.T.contiguous().T for base in bases]
    along = [layer % 2 == 1 for layer in range(layers)]
    names, numbers = zip(*(one.sigma for one in activations), strict=True)
    return bases, changes, size, along, list(names), [number for own in numbers for number in own]


def side_of(activation: Activation) -> int:
    """On which side of 0 small numbers lie in the domain of σ⁻¹: 1 where on both."""
    return -1 if activation.domain[1] <= 0 else 1


def judge_arguments(
    control: tuple[float, ...] = (2.0, 0.5, 0.0, 0.0, 0.5),
    size: float = 0.25,
    norm: float = 2.0,
    value: float = 3.0,
    hindered: tuple[bool, ...] = (False, False),
    broken: tuple[bool, ...] = (False,),
    cap: float = math.inf,
    maximise: bool = True,
) -> tuple[Any, ...]:
    """The arguments of `judge`, of a step that is taken where nothing else is said."""
    state, size_, norm_, value_, cap_ = (
        torch.tensor(one, dtype=torch.float64) for one in (control, size, norm, value, cap)
    )
    flags = (torch.tensor(one, dtype=torch.bool) for one in (hindered, broken))
    return state, size_, norm_, value_, *flags, cap_, maximise, list(RULES.values())


def results_of(function: Callable[..., Any], name: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """What the operator returns, and the tensors that it writes to."""
    result = function(*arguments)
    results = [] if result is None else tree_leaves(result)
    for argument, value in zip(SCHEMAS[name].arguments, arguments, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            results += value if isinstance(value, list) else [value]
    return results


def takes_activation(name: str) -> bool:
    return any(argument.name in ("activation", "activations") for argument in SCHEMAS[name].arguments)


CASES = [(name, activation) for name in SCHEMAS for activation in ONE_OF_EACH[: None if takes_activation(name) else 1]]

_NAMES = ("name", "activation")
_IDS = [f"{name}-{activation}" for name, activation in CASES]

every_operator_and_activation = pytest.mark.parametrize(_NAMES, CASES, ids=_IDS)

every_operator_and_mostly_one_activation = pytest.mark.parametrize(
    _NAMES,
    [
        pytest.param(*case, marks=() if case[1] is ONE_OF_EACH[0] else pytest.mark.exhaustive) for case in CASES
    ],
    ids=_IDS,
)
