"""CUDA graphs of programs on tensors, one for each kind of work, kept for the next work of the same kind.

A graph replays the kernels of a program without the host in between, on memory of its own: a run copies the work's
tensors there, replays, and hands out the graph's own results, which hold until the same graph runs again.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from . import torch_kernels as torch_products
from .library import Products

# A graph keeps the memory of a whole search, so only those used last are kept: so many, and so many bytes of all.
LARGEST_CACHE = 16
LARGEST_BYTES = 2**31
# The call of a kind of work from which on a graph is worth its capture.
CAPTURED_CALL = 2
# Rows up to which `grams` and `invert_grams` have kernels of their own: largest_own_gram of csrc/ops.cpp.
LARGEST_OWN_FACTOR = 512

GRAPH = "in a CUDA graph"

# Work on more elements takes so long that launching its kernels one by one costs nothing, and a graph would hold a copy
# of all of them.
LARGEST_WORK = 2**25


Work = TypeVar("Work")
"""A frozen dataclass of tensors, plain values, and the like in tuples, lists and dataclasses; see `tensors_of`."""

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Captured(Generic[Outcome]):
    """A graph, the tensors that it reads and the results that it writes.

    bytes: what it holds of the device's memory. pool: where its results and all between lie; last, so that it goes
    after them and gives the memory back.
    """

    inputs: list[Tensor]
    replay: Callable[[], None]
    outcome: Outcome
    bytes: int
    pool: object


_cache: OrderedDict[Hashable, Captured | str] = OrderedDict()
_calls: OrderedDict[Hashable, int] = OrderedDict()
_lock = threading.Lock()  # a process captures one graph at a time
# What broke while it was captured: torch's allocator of host memory may go on asking such a graph what belongs to it.
_broken: list[torch.cuda.CUDAGraph] = []


def run(work: Work, program: Callable[[Work], Outcome], obstacle: str | None) -> tuple[Outcome, str]:
    """program(work) through the graph for its kind of work, and in words whether it was one.

    The first work of a kind runs kernel by kernel, for many come but once; the next one captures the graph. Where that
    fails, once and for all, or there should be none, the program goes on to run kernel by kernel.

    obstacle: why no graph can hold the program, or None.
    """
    tensors = tensors_of(work)
    if (reason := _obstacle(tensors) or obstacle) is not None:
        return program(work), f"no CUDA graph: {reason}"
    kind = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
    with _lock:
        key = (program, signature_of(work), kind, torch.backends.cuda.matmul.fp32_precision, _lane())
        entry = _find(key, work, program, tensors)
    if isinstance(entry, str):
        return program(work), f"no CUDA graph: {entry}"
    _copy(tensors, entry.inputs)
    entry.replay()
    return entry.outcome, GRAPH


def clear() -> None:
    """Forget all graphs and free their memory."""
    with _lock:
        _cache.clear()
        _calls.clear()


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a value, in the order of the fields of dataclasses and of the elements of tuples and lists.

    A field with compare=False counts for nothing: a program must not depend on it.
    """
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in _parts(value) for tensor in tensors_of(part)]


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same value with other tensors, in the order of `tensors_of`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, (tuple, list)):
        return type(value)(with_tensors(part, tensors) for part in value)
    if not tensors_of(value):
        return value
    return dataclasses.replace(value, **{name: with_tensors(getattr(value, name), tensors) for name in _names(value)})


def signature_of(value: Any) -> Hashable:
    """What a program depends on besides the values of tensors; what cannot be hashed counts by its identity."""
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, (tuple, list)) or _names(value):
        return type(value), tuple(signature_of(part) for part in _parts(value))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, (tuple, list)):
        return value
    return [getattr(value, name) for name in _names(value)]


def _names(value: Any) -> list[str]:
    """The fields that count of a dataclass; none of any other value."""
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        return []
    return [field.name for field in dataclasses.fields(value) if field.compare]


def solver_obstacle(products: Products, samples: int) -> str | None:
    """Why a factorization of `samples` rows is not captured: by torch it goes through libraries that may refuse."""
    if products is torch_products:
        return "plain torch factorizes by a solver library, which may not be captured"
    if samples > LARGEST_OWN_FACTOR:
        return f"n > {LARGEST_OWN_FACTOR} is factorized by a solver library, which may not be captured"
    return None


def _find(
    key: Hashable, work: Work, program: Callable[[Work], Outcome], tensors: Sequence[Tensor]
) -> Captured | str:
    """The graph for `key`, captured if this is the call for it; else why there is none."""
    if key not in _cache:
        calls = _calls[key] = _calls.pop(key, 0) + 1
        _shorten(_calls, 8 * LARGEST_CACHE)
        if calls < CAPTURED_CALL:
            return "the first of its kind is not captured"
        _cache[key] = _keepable(_capture(work, program, tensors))
        _shorten(_cache, LARGEST_CACHE)
        while sum(entry.bytes for entry in _cache.values() if isinstance(entry, Captured)) > LARGEST_BYTES:
            _cache.pop(next(kind for kind, entry in _cache.items() if isinstance(entry, Captured)))
    _cache.move_to_end(key)
    return _cache[key]


def _keepable(entry: Captured | str) -> Captured | str:
    """The entry, or why it is not worth its memory: a graph that no cache holds would be captured at every call."""
    if isinstance(entry, Captured) and entry.bytes > LARGEST_BYTES:
        return f"it would hold {entry.bytes >> 20} MiB of the device's memory"
    return entry


def _shorten(entries: OrderedDict, length: int) -> None:
    while len(entries) > length:
        entries.popitem(last=False)


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """In a few launches: the tensors of one dtype go in one."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        group = by_dtype.setdefault(source.dtype, ([], []))
        group[0].append(target)
        group[1].append(source)
    for group in by_dtype.values():
        torch._foreach_copy_(*group)


def _obstacle(tensors: Sequence[Tensor]) -> str | None:
    """Why a graph cannot hold work on these tensors, or would not pay."""
    if tensors[0].device.type != "cuda":
        return "there is none on this device"
    elements = sum(tensor.numel() for tensor in tensors)
    if elements > LARGEST_WORK:
        return f"it would gain nothing at this size ({elements} elements)"
    return None


def _lane() -> Hashable:
    """The present stream and thread: a graph's memory serves one run at a time, so each has graphs of its own."""
    return torch.cuda.current_stream().cuda_stream, threading.get_ident()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which graphs of a device are captured. torch's own lies on whatever device came first."""
    return torch.cuda.Stream(device)


def _capture(
    work: Work, program: Callable[[Work], Outcome], tensors: Sequence[Tensor]
) -> Captured[Outcome] | str:
    """The graph of the program on copies of the work's tensors, or why there is none."""
    try:
        inputs = [tensor.clone() for tensor in tensors]
        return _capture_on(_stream(inputs[0].device), inputs, work, program)
    except torch.OutOfMemoryError:
        return "there was no memory for it"
    except RuntimeError as error:
        return f"its capture failed ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _capture_on(
    stream: torch.cuda.Stream, inputs: list[Tensor], work: Work, program: Callable[[Work], Outcome]
) -> Captured[Outcome]:
    still = with_tensors(work, iter(inputs))
    # Libraries make their handles at their first call on a thread, which no graph may hold.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        program(still)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize(stream.device)
    # A workspace in use from before would be part of the graph and could be freed under it; so the graph gets its own,
    # in its own memory, and leaves none behind.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.stream(stream):
            # In torch.cuda.graph's place, which would empty the cache of the whole process. A pool of its own empties
            # itself, and nothing else, when it goes.
            graph, pool = torch.cuda.CUDAGraph(), torch.cuda.MemPool()
            outcome = _record(graph, pool, stream.device, lambda: program(still))
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    held = sum(tensor.nbytes for tensor in inputs) + sum(segment["total_size"] for segment in pool.snapshot())
    return Captured(inputs, graph.replay, outcome, held, pool)


def _record(
    graph: torch.cuda.CUDAGraph, pool: torch.cuda.MemPool, device: torch.device, run: Callable[[], Outcome]
) -> Outcome:
    """run() on the present stream, captured in the graph with the memory of the pool.

    A capture that breaks leaves torch's allocator allocating for it, and a reference to the pool: both are ended here.
    """
    handle: Any = pool.id  # torch's stubs tell a pool's from a graph's
    try:
        graph.capture_begin(pool=handle, capture_error_mode="thread_local")
        outcome = run()
        graph.capture_end()
    except BaseException:
        with suppress(RuntimeError):  # a capture that the device refused says so once more at its end
            graph.capture_end()
        with suppress(RuntimeError):  # where only the program failed, torch has ended it
            torch._C._cuda_endAllocateToPool(device.index, handle)
        graph.reset()
        if pool.use_count() > 1:
            torch._C._cuda_releasePool(device.index, handle)
        _broken.append(graph)
        raise
    return outcome
