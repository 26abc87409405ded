"""What the host does of a GPU's programs, measured without one: Python, checks and torch's calls, on tensors so small
that nothing else is left.

    python -m bench.host [--rounds 9] [--out FILE]

What the device would do is left out: a graph's outcome is that of its first run, and the operators of csrc return
copies of what their twins returned in a first run. torch's own operators compute on the CPU what they would launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import layer, teleport
from bench.harness import UNIT, Contestant, add_rounds, begin, compare, make_parser, read_arguments, run_shapes
from symtele_cuda.kernels import graphs
from symtele_cuda.kernels import torch_kernels as products
from symtele_cuda.kernels.operands import OPERATORS
from symtele_cuda.operator import layer as operator_layer
from symtele_cuda.search import device as device_search

CPU = torch.device("cpu")
TELEPORT = "teleport_mlp, ten steps"


class Replays:
    """In the place of `graphs`: the outcome of a kind's first run, after what a replay copies."""

    def __init__(self) -> None:
        self._captured: dict[Hashable, tuple[list[Tensor], Any]] = {}

    def run(self, work: Any, program: Callable[[Any], Any], obstacle: str | None) -> tuple[Any, str]:
        tensors, key = graphs.tensors_of(work), (program, graphs.signature_of(work))
        if key not in self._captured:
            self._captured[key] = [tensor.clone() for tensor in tensors], program(work)
        inputs, outcome = self._captured[key]
        graphs._copy(tensors, inputs)
        return outcome, graphs.GRAPH


@contextmanager
def replayed() -> Iterator[None]:
    """Inside, teleports take the way of the device."""
    with patch.object(graphs, "run", Replays().run), patch.object(device_search, "can_climb", lambda orbit: True):
        yield


def duplicate(result: Any) -> Any:
    """A copy of tensors in lists and tuples, in little more time than memory for them takes."""
    return result.clone() if isinstance(result, Tensor) else type(result)(map(duplicate, result))


@contextmanager
def without_work(program: Callable[[], object]) -> Iterator[None]:
    """Inside, the operators of csrc return copies of what their twins return in one run of the program."""
    results: dict[str, list[Any]] = {name: [] for name in OPERATORS}

    def recording(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            results[name].append(getattr(products, name)(*arguments, **keywords))
            return results[name][-1]

        return call

    def repeating(found: Sequence[Any]) -> Callable[..., Any]:
        turns = itertools.cycle(found)
        return lambda *arguments, **keywords: duplicate(next(turns))

    first = SimpleNamespace(**{name: recording(name) for name in OPERATORS})
    with patch.object(operator_layer, "products_for", lambda device, backend: first):
        program()
    others = SimpleNamespace(**{name: repeating(found) for name, found in results.items()})
    with patch.object(operator_layer, "products_for", lambda device, backend: others):
        yield


def measure_teleport(rounds: int) -> dict[str, Any]:
    start = teleport.make_problem(teleport.Shape((12, 10, 10, 3), 6), CPU)

    def run(problem: teleport.Problem) -> None:
        report = teleport.our_teleport(problem, "grad_norm")
        assert report.accepted, report.reason

    with replayed():
        contestants = {
            UNIT: Contestant(teleport.Problem.gradients, start.clone),
            TELEPORT: Contestant(run, start.clone),
        }
        return {"timings": compare(contestants, rounds, CPU)}


def measure_layer(rounds: int) -> dict[str, Any]:
    problem = layer.make_problem(layer.Shape(8, 16, 16), CPU)
    methods = {UNIT: layer.forward_backward, layer.OPERATOR: layer.by_operator, layer.EAGER: layer.by_cholesky}
    with without_work(lambda: layer.by_operator(problem)):
        contestants = {name: Contestant(method, lambda: problem) for name, method in methods.items()}
        return {"timings": compare(contestants, rounds, CPU)}


PROGRAMS = {"teleport": measure_teleport, "layer": measure_layer}
REGISTRY = {"cpu": PROGRAMS}


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = make_parser("What the host does of a GPU's programs.", REGISTRY)
    add_rounds(parser, 9)
    arguments = read_arguments(parser, REGISTRY, "host", words)
    begin(arguments)
    settings = {"rounds": arguments.rounds}
    return run_shapes("host", lambda name: PROGRAMS[name](arguments.rounds), arguments, settings=settings)


if __name__ == "__main__":
    main()
