"""What the benchmarks share: interleaved timing, checks that come before any speed, the machine's line, JSON out.

On the CPU the clock is the wall's. On a GPU it is the device's, by events around every run: the gaps while it waits for
the host count. Work that reads results back is timed by the wall clock there too, between two waits for the device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from experiments import processor
from symtele_cuda.kernels.library import products_for

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"

# A timed sample lasts at least this long, so that the clock's own cost and a stray interrupt do not show.
SAMPLE_SECONDS = 0.02

UNIT = "forward+backward"

# device type → the shapes that a benchmark runs there, by name
Registry = Mapping[str, Mapping[str, Any]]

# On a GPU the inputs of successive runs are this many times larger than its cache together, up to so many copies.
CACHES, MOST_COPIES = 2, 32


@dataclass(frozen=True)
class Contestant:
    """What is timed: `run`, called on what the untimed `prepare` returns; every run so starts from the same state.

    reads_back: on a GPU, `run` waits for results, so that only the wall clock sees all that it takes.
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    reads_back: bool = False


@dataclass(frozen=True)
class Timing:
    """Seconds a run, over the rounds: median and quartiles; the same in units of the unit's time in the same round."""

    seconds: float
    seconds_iqr: tuple[float, float]
    units: float
    units_iqr: tuple[float, float]
    rounds: int


@dataclass(frozen=True)
class Check:
    """A number and the bounds it must keep; a value that could not be had (None) or is NaN keeps none."""

    value: float | None
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        if self.value is None or math.isnan(self.value):
            return False
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return low <= self.value <= high

    def __str__(self) -> str:
        limits = (("≥", self.at_least), ("≤", self.at_most))
        bounds = [f"{sign} {limit:g}" for sign, limit in limits if limit is not None]
        value = "none" if self.value is None else f"{self.value:.3g}"
        return " ".join([value, f"({', '.join(bounds) or 'for information'})", self.note]).rstrip()


def compare(
    contestants: Mapping[str, Contestant], rounds: int, device: torch.device, unit_name: str = UNIT
) -> dict[str, Timing]:
    """Time every contestant once a round, in turn, so that a drift of the machine hits all alike.

    The contestant called `unit_name` must be among them. It is timed right before each of the others, and
    `Timing.units` is the median over the rounds of the ratio to that neighbour.
    """
    unit = contestants[unit_name]
    others = {name: contestant for name, contestant in contestants.items() if name != unit_name}
    repeats = {name: _repeats(contestant, device) for name, contestant in contestants.items()}
    unit_seconds: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in others}
    units: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(rounds):
        for name, contestant in others.items():
            unit_seconds.append(_sample(unit, repeats[unit_name], device))
            seconds[name].append(_sample(contestant, repeats[name], device))
            units[name].append(seconds[name][-1] / unit_seconds[-1])
    timings = {unit_name: _timing(unit_seconds, [1.0] * len(unit_seconds))}
    return timings | {name: _timing(seconds[name], units[name]) for name in others}


def median_seconds(run: Callable[[Any], object], rounds: int, device: torch.device) -> float:
    """The median time of a single piece of work that stands for itself."""
    contestant = Contestant(run)
    repeats = _repeats(contestant, device)
    return statistics.median(_sample(contestant, repeats, device) for _ in range(rounds))


def in_turn(original: T, copy: Callable[[T], T], size: int, device: torch.device) -> Callable[[], T]:
    """For `Contestant.prepare`: on a GPU copies of `original` (`size` bytes) that do not fit its cache together."""
    copies = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        copies = min(MOST_COPIES, math.ceil(CACHES * cache / size))
    cycle = itertools.cycle([original, *(copy(original) for _ in range(copies - 1))])
    return lambda: next(cycle)


def machine_line(device: torch.device, dtype: torch.dtype) -> str:
    """One line that says where the numbers come from; no host name and no path."""
    parts = [processor(), f"{os.cpu_count()} logical cores", f"{torch.get_num_threads()} thread(s)"]
    if device.type == "cuda":
        parts.insert(0, f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}")
    parts += [f"torch {torch.__version__}", f"python {platform.python_version()}", str(dtype).removeprefix("torch.")]
    return ", ".join(parts)


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖ in float64."""
    difference = value.detach().double() - reference.detach().double()
    return (difference.norm() / reference.detach().double().norm()).item()


def all_passed(checks: Mapping[str, Check]) -> bool:
    return all(check.passed for check in checks.values())


def make_parser(description: str, registry: Registry) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    names = dict.fromkeys(name for shapes in registry.values() for name in shapes)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--shape", nargs="+", choices=list(names), metavar="NAME", help="default: all of the device")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch, by default 1")
    parser.add_argument("--out", type=Path, help="the JSON file to write, by default one in bench/results")
    return parser


def add_rounds(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--rounds", type=int, default=rounds, help=f"how often each contestant is timed ({rounds})")


def read_arguments(
    parser: argparse.ArgumentParser, registry: Registry, benchmark: str, words: Sequence[str] | None
) -> argparse.Namespace:
    """The arguments, with the shapes and the file that belong to the device where none are named."""
    arguments = parser.parse_args(words)
    kind = arguments.device.type
    if kind not in registry:
        parser.error(f"--device must be one of {', '.join(registry)}, got {arguments.device}")
    arguments.shape = arguments.shape or list(registry[kind])
    if unknown := [name for name in arguments.shape if name not in registry[kind]]:
        parser.error(f"--shape on {kind} must be among {', '.join(registry[kind])}, got {', '.join(unknown)}")
    folder = RESULTS if kind == "cpu" else RESULTS / "gpu"
    arguments.out = arguments.out or folder / f"{benchmark}.json"
    return arguments


def begin(arguments: argparse.Namespace) -> None:
    """Set the threads of torch before anything is measured.

    Raises:
        SystemExit: on a GPU without the compiled kernels: the times of torch's would stand under their names.
    """
    torch.set_num_threads(arguments.threads)
    if arguments.device.type == "cuda":
        try:
            products_for(arguments.device, "cuda")
        except (RuntimeError, ValueError) as error:
            raise SystemExit(f"nothing is measured: {error}") from error


def run_shapes(
    benchmark: str,
    measure: Callable[[str], dict[str, Any]],
    arguments: argparse.Namespace,
    settings: Mapping[str, Any],
    unit_name: str = UNIT,
) -> dict[str, Any]:
    """Measure the shapes asked for one after the other, print each as it is done, and write the document.

    Raises:
        SystemExit: at the end, if a shape could not be measured; the document says why.
    """
    document: dict[str, Any] = {
        "benchmark": benchmark,
        "machine": machine_line(arguments.device, torch.float32),
        "unit": f"one {unit_name} on the same operands, timed right before in the same run",
        "settings": dict(settings),
        "shapes": {},
    }
    for name in arguments.shape:
        try:
            document["shapes"][name] = measure(name)
        except Exception as error:  # the next shape may do, and what is measured is kept
            traceback.print_exc()
            document["shapes"][name] = {"error": f"{type(error).__name__}: {error}"}
        print(render(name, document["shapes"][name]), flush=True)
        write_json(arguments.out, document)
    if failed := [name for name, result in document["shapes"].items() if "error" in result]:
        raise SystemExit(f"not measured: {', '.join(failed)}")
    return document


def render(name: str, result: Mapping[str, Any]) -> str:
    """A shape's result for people: a line for every timing, ratio and verdict."""
    lines = [name]
    for contestant, timing in result.get("timings", {}).items():
        low, high = timing.units_iqr
        lines.append(
            f"  {contestant:<32}{1e3 * timing.seconds:10.2f} ms {timing.units:9.2f} units ({low:.2f} to {high:.2f})"
        )
    lines += [f"  {what}: {ratio:.2f}" for what, ratio in result.get("ratios", {}).items()]
    for group in ("checks", "requirements"):
        for what, check in result.get(group, {}).items():
            lines.append(f"  {'pass' if check.passed else 'FAIL'}  {what}: {check}")
    return "\n".join(lines)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write whole or not at all: a benchmark that is interrupted leaves the file of its last finished shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(plain(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def plain(value: Any) -> Any:
    """`value` as strict JSON has it: dataclasses are objects, a check carries its verdict, NaN and Inf are null."""
    if isinstance(value, Check):
        return plain({**asdict(value), "passed": value.passed})
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _repeats(contestant: Contestant, device: torch.device) -> int:
    """How many runs a sample holds; the runs that find it out are the warm-up."""
    _sample(contestant, 1, device)
    return max(1, round(SAMPLE_SECONDS / max(_sample(contestant, 1, device), 1e-9)))


def _sample(contestant: Contestant, repeats: int, device: torch.device) -> float:
    """The median of the seconds of `repeats` runs; preparing them is not timed."""
    if device.type != "cuda":
        seconds = [_seconds_on_cpu(contestant.run, contestant.prepare()) for _ in range(repeats)]
    elif contestant.reads_back:
        seconds = [_seconds_with_waits(contestant.run, contestant.prepare()) for _ in range(repeats)]
    else:
        seconds = _seconds_on_stream(contestant, repeats)
    return statistics.median(seconds)


def _seconds_on_cpu(run: Callable[[Any], object], argument: Any) -> float:
    started = time.perf_counter()
    run(argument)
    return time.perf_counter() - started


def _seconds_with_waits(run: Callable[[Any], object], argument: Any) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run(argument)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _seconds_on_stream(contestant: Contestant, repeats: int) -> list[float]:
    """One run right after the other, an event before and after each."""
    arguments = [contestant.prepare() for _ in range(repeats)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in arguments]
    torch.cuda.synchronize()
    for (start, end), argument in zip(events, arguments, strict=True):
        start.record()
        contestant.run(argument)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _timing(seconds: Sequence[float], units: Sequence[float]) -> Timing:
    return Timing(
        seconds=statistics.median(seconds),
        seconds_iqr=_quartiles(seconds),
        units=statistics.median(units),
        units_iqr=_quartiles(units),
        rounds=len(seconds),
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return (values[0], values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (low, high)
