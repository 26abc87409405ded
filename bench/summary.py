"""What a run of `bench/gpu.sh` came to: `python -m bench.summary FOLDER` reads its files, whichever there are."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

BENCHMARKS = ("teleport", "layer", "roofline", "training")


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
    for suite in suites:
        for case in suite.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                yield f"  FAIL  {case.get('classname')}::{case.get('name')}"


def sanitizer_lines(folder: Path) -> Iterator[str]:
    path = folder / "sanitizer.log"
    if not path.exists():
        yield "sanitizer: no result"
        return
    for part in re.split(r"^=== ", path.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)[1:]:
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", part)
        yield f"sanitizer, {part.splitlines()[0]}: {found[-1] if found else 'no summary'}"


def benchmark_lines(folder: Path, name: str) -> Iterator[str]:
    """The verdict on every requirement, and on the checks that failed, after which nothing was timed."""
    document = _read(folder, name)
    if not document:
        yield f"{name}: no result"
        return
    yield f"{name}: {document.get('machine', 'one machine a seed')}"
    for shape, result in document["shapes"].items():
        if "error" in result:
            yield f"  ERROR {shape}: {result['error']}"
        for what, check in result.get("requirements", {}).items():
            yield f"  {_verdict(check)}  {shape}: {what} {_number(check['value'])}{_bounds(check)}"
        for what, check in result.get("checks", {}).items():
            if not check["passed"]:
                yield f"  WRONG {shape}: {what} {_number(check['value'])}{_bounds(check)}"


def summary(folder: Path) -> str:
    lines = [*stage_lines(folder), *test_lines(folder), *sanitizer_lines(folder)]
    for name in BENCHMARKS:
        lines += benchmark_lines(folder, name)
    return "\n".join(lines)


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _verdict(check: dict[str, Any]) -> str:
    if check["at_most"] is None and check["at_least"] is None:
        return "    "
    return "pass" if check["passed"] else "FAIL"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _bounds(check: dict[str, Any]) -> str:
    limits = ((">=", check["at_least"]), ("<=", check["at_most"]))
    return "".join(f" ({sign} {limit:g})" for sign, limit in limits if limit is not None)


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])))
