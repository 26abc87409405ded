"""CUDA graphs of programs on tensors, one for each kind of work, kept for the next work of the same kind.

A graph replays the kernels of a program without the host in between, on memory of its own: a run copies the work's
tensors there, replays, and hands out the graph's own results, which hold until the same graph runs again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

# A graph keeps the memory of a whole search, so only those used last are kept.
LARGEST_CACHE = 16

GRAPH = "in a CUDA graph"

# Work on more elements takes so long that launching its kernels one by one costs nothing, and a graph would hold a copy
# of all of them.
LARGEST_WORK = 2**25


class Work(Protocol):
    """What a program is a function of: tensors, and what it depends on besides their values."""

    def tensors(self) -> list[Tensor]: ...

    def with_tensors(self: SomeWork, tensors: Sequence[Tensor]) -> SomeWork:
        """The same work with other tensors, in the order of `tensors()`."""
        ...

    def signature(self) -> Hashable:
        """All that tells a program of this work from those of other kinds."""
        ...


SomeWork = TypeVar("SomeWork", bound=Work)
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Captured(Generic[Outcome]):
    """A graph, the tensors that it reads and the results that it writes."""

    inputs: list[Tensor]
    replay: Callable[[], None]
    outcome: Outcome


_cache: OrderedDict[Hashable, Captured | str] = OrderedDict()


def run(work: SomeWork, program: Callable[[SomeWork], Outcome], obstacle: str | None = None) -> tuple[Outcome, str]:
    """program(work) through the graph for its kind of work, and in words whether it was one.

    The first work of a kind captures the graph. Where that fails, once and for all, or there should be none, as
    `obstacle` may say, the program runs kernel by kernel.
    """
    if (reason := obstacle or _obstacle(work)) is not None:
        return program(work), f"no CUDA graph: {reason}"
    key = (program, work.signature(), torch.get_float32_matmul_precision(), _lane())
    entry = _cache.get(key)
    if entry is None:
        entry = _capture(work, program)
        _cache[key] = entry
        while len(_cache) > LARGEST_CACHE:
            _cache.popitem(last=False)
    _cache.move_to_end(key)
    if isinstance(entry, str):
        return program(work), f"no CUDA graph: {entry}"
    torch._foreach_copy_(entry.inputs, work.tensors())
    entry.replay()
    return entry.outcome, GRAPH


def clear() -> None:
    """Forget all graphs and free their memory."""
    _cache.clear()


def _obstacle(work: Work) -> str | None:
    """Why a graph cannot hold the work, or would not pay."""
    tensors = work.tensors()
    if tensors[0].device.type != "cuda":
        return "there is none on this device"
    elements = sum(tensor.numel() for tensor in tensors)
    return f"it would gain nothing at this size ({elements} elements)" if elements > LARGEST_WORK else None


def _lane() -> Hashable:
    """The present stream and thread: a graph's memory serves one run at a time, so each has graphs of its own."""
    return torch.cuda.current_stream().cuda_stream, threading.get_ident()


def _capture(work: SomeWork, program: Callable[[SomeWork], Outcome]) -> Captured[Outcome] | str:
    """The graph of the program on copies of the work's tensors, or why there is none."""
    inputs = [tensor.clone() for tensor in work.tensors()]
    still = work.with_tensors(inputs)
    try:
        # Libraries make their handles and workspaces at their first call, which no graph may hold.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            program(still)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outcome = program(still)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"its capture failed ({str(error).splitlines()[0]})"
    return Captured(inputs, graph.replay, outcome)
