"""What the benchmarks share: interleaved timing, checks that come before any speed, the machine's line, JSON out."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A timed sample lasts at least this long, so that the clock's own cost and a stray interrupt do not show.
SAMPLE_SECONDS = 0.02

UNIT = "forward+backward"


@dataclass(frozen=True)
class Contestant:
    """What is timed: `run`, called on what the untimed `prepare` returns; every run so starts from the same state."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


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


def compare(contestants: Mapping[str, Contestant], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Time every contestant once a round, in turn, so that a drift of the machine hits all alike.

    The contestant called UNIT must be among them. It is timed right before each of the others, and `Timing.units` is
    the median over the rounds of the ratio to that neighbour.
    """
    unit = contestants[UNIT]
    others = {name: contestant for name, contestant in contestants.items() if name != UNIT}
    repeats = {name: _repeats(contestant, device) for name, contestant in contestants.items()}
    unit_seconds: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in others}
    units: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(rounds):
        for name, contestant in others.items():
            unit_seconds.append(_sample(unit, repeats[UNIT], device))
            seconds[name].append(_sample(contestant, repeats[name], device))
            units[name].append(seconds[name][-1] / unit_seconds[-1])
    timings = {UNIT: _timing(unit_seconds, [1.0] * len(unit_seconds))}
    return timings | {name: _timing(seconds[name], units[name]) for name in others}


def machine_line(device: torch.device, dtype: torch.dtype) -> str:
    """One line that says where the numbers come from; no host name and no path."""
    parts = [_processor(), f"{os.cpu_count()} logical cores", f"{torch.get_num_threads()} thread(s)"]
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


def make_parser(description: str, shapes: Iterable[str], out: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(shapes), default=list(shapes), metavar="NAME", help="which")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--out", type=Path, default=Path(out), help="the JSON file to write")
    return parser


def add_timing_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each contestant is timed")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")


def run_shapes(
    benchmark: str, measure: Callable[[str], dict[str, Any]], arguments: argparse.Namespace, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Measure the shapes asked for one after the other, print each as it is done, and write the document."""
    torch.set_num_threads(arguments.threads)
    document: dict[str, Any] = {
        "benchmark": benchmark,
        "machine": machine_line(arguments.device, torch.float32),
        "unit": f"one {UNIT} on the same batch, timed right before in the same run",
        "settings": dict(settings),
        "shapes": {},
    }
    for name in arguments.shape:
        document["shapes"][name] = measure(name)
        print(render(name, document["shapes"][name]), flush=True)
        write_json(arguments.out, document)
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
    clock = _seconds_on_cuda if device.type == "cuda" else _seconds_on_cpu
    return statistics.median(clock(contestant.run, contestant.prepare()) for _ in range(repeats))


def _seconds_on_cpu(run: Callable[[Any], object], argument: Any) -> float:
    started = time.perf_counter()
    run(argument)
    return time.perf_counter() - started


def _seconds_on_cuda(run: Callable[[Any], object], argument: Any) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run(argument)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


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


def _processor() -> str:
    """The processor's model, as the kernel tells it on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
