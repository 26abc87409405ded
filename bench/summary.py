"""What a run of `bench/gpu.sh` came to: `python -m bench.summary FOLDER` reads its files, whichever there are.

Short enough for the end of a log of which only the end is kept: a line a shape, and of the failed tests the first of
each function.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench import layer, roofline, teleport
from bench.harness import UNIT

BENCHMARKS = ("teleport", "layer", "roofline", "training")
MOST_FAILURES, MOST_CHARACTERS = 20, 11_000
ENDED_EARLY = "ended early"  # as gpu.sh says of a process of tests

# The contestants whose times are told, in milliseconds, and what without a bound is told too.
LABELS = {
    UNIT: "f+b",
    teleport.GRAD_NORM: "grad_norm",
    teleport.LOOKAHEAD: "lookahead",
    teleport.PUBLISHED: "published",
    layer.OPERATOR: "operator",
    layer.ON_TORCH: "on torch",
    layer.EAGER: "eager",
    layer.COMPILED: "compiled",
    roofline.LIBRARY: "library",
    roofline.OURS: "ours",
}
ALWAYS_TOLD = (
    "units",
    "units of one step",
    "share of the ceilings",
    "faster than the library, times",
    "faster than published in the lean reading, times",
)


def machine_lines(folder: Path) -> Iterator[str]:
    """What the machine's stage printed first."""
    found = re.search(r"^=== machine\n(.*)\n(\d+ multiprocessors.*)", _log(folder), re.MULTILINE)
    yield from found.groups() if found else ()


def stage_lines(folder: Path) -> Iterator[str]:
    for stage in _read(folder, "summary").get("stages", []):
        verdict = {0: "ok", 124: "OUT OF TIME", 137: "OUT OF TIME"}.get(stage["status"], f"FAILED ({stage['status']})")
        yield f"{stage['name']:<12}{verdict:<14}{stage['seconds']:>4} s"


def test_lines(folder: Path) -> Iterator[str]:
    path = folder / "tests.xml"
    try:
        suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):  # a run that was stopped may leave half a file
        yield "tests: no result"
        return
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    yield "tests: " + ", ".join(f"{count} {key}" for key, count in counts.items())
    failures: dict[str, list[str]] = {}
    early: list[str] = []
    for suite in suites:
        for case in suite.iter("testcase"):
            for wrong in (*case.iter("failure"), *case.iter("error")):
                function, _, parameters = str(case.get("name")).partition("[")
                message = " ".join((wrong.get("message") or "").split())
                if message.startswith(ENDED_EARLY):
                    early.append(function)
                else:
                    failures.setdefault(f"{case.get('classname')}::{function}", []).append(f"[{parameters} {message}")
    for function, found in list(failures.items())[:MOST_FAILURES]:
        yield f"  FAIL  {function}, {len(found)} times: {found[0]}"
    if len(failures) > MOST_FAILURES:
        yield f"  and {len(failures) - MOST_FAILURES} functions more"
    if early:
        yield f"  {ENDED_EARLY} or not started, {len(early)} functions: {', '.join(early)}"


def sanitizer_lines(folder: Path) -> Iterator[str]:
    """What each of compute-sanitizer's tools says at its end."""
    found = re.search(r"^=== sanitizer\n(.*?)(?=^=== |\Z)", _log(folder), re.MULTILINE | re.DOTALL)
    if found is None:
        yield "sanitizer: no result"
        return
    for part in re.split(r"^--- ", found[1], flags=re.MULTILINE)[1:]:
        said = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", part)
        yield f"sanitizer, {part.splitlines()[0]}: {said[-1] if said else 'no summary'}"


def benchmark_lines(folder: Path, name: str) -> Iterator[str]:
    """A shape's times and the verdicts on its requirements, or on the checks that failed, after which none is timed."""
    document = _read(folder, name)
    if not document:
        yield f"{name}: no result"
        return
    ceilings = document.get("settings", {}).get("ceilings")
    yield f"{name}: {roofline.describe(roofline.Ceilings(**ceilings)) if ceilings else 'times in ms'}"
    for shape, result in document["shapes"].items():
        if "error" in result:
            yield f"  ERROR {shape}: {result['error']}"
        for what, check in result.get("checks", {}).items():
            if not check["passed"]:
                yield f"  WRONG {shape}: {what} {_number(check['value'])}{_bounds(check)} {check['note']}".rstrip()
        for what, why in result.get("left out", {}).items():
            yield f"  left out {shape}: {what}, {why}"
        if "requirements" in result:
            yield f"  {shape}: {_times(result)}; {_verdicts(result['requirements'])}"


def summary(folder: Path) -> str:
    lines = [*machine_lines(folder), *stage_lines(folder), *test_lines(folder), *sanitizer_lines(folder)]
    for name in BENCHMARKS:
        lines += benchmark_lines(folder, name)
    return "\n".join(line[:340] for line in lines)[:MOST_CHARACTERS]


def _log(folder: Path) -> str:
    path = folder / "gpu.log"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _times(result: dict[str, Any]) -> str:
    timings = result.get("timings", {})
    return ", ".join(f"{label} {1e3 * timings[key]['seconds']:.3g}" for key, label in LABELS.items() if key in timings)


def _verdicts(requirements: dict[str, Any]) -> str:
    """What has a bound, with the bound where it is not kept."""
    said = []
    for what, check in requirements.items():
        short = re.sub(
            "^faster than (.*), times$", lambda found: f"x faster than {LABELS.get(found[1], found[1])}", what
        )
        if check["at_most"] is None and check["at_least"] is None:
            said += [f"{short} {_number(check['value'])}"] if what in ALWAYS_TOLD else []
        else:
            verdict = "pass" if check["passed"] else "FAIL"
            said.append(f"{verdict} {short} {_number(check['value'])}{'' if check['passed'] else _bounds(check)}")
    return ", ".join(said)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _bounds(check: dict[str, Any]) -> str:
    limits = ((">=", check["at_least"]), ("<=", check["at_most"]))
    return "".join(f" ({sign} {limit:g})" for sign, limit in limits if limit is not None)


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])))
