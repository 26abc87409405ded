"""The examples run, are short, and show what they say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_at_most_60_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


def test_a_refreshed_network_learns_on_where_one_left_alone_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="needs symtele_cuda[demo]")
    (path,) = (path for path in EXAMPLES if path.stem == "continual")
    run = runpy.run_path(str(path))["run"]
    alone, refreshed = (run(choice) for choice in (False, True))
    assert min(refreshed) > 0.9
    assert sum(refreshed[-5:]) > sum(alone[-5:])
    assert capsys.readouterr().out.count("standardised") >= 15


def example(name: str) -> Any:
    """`run` of an example; the test skips where a package that it needs is absent."""
    try:
        return runpy.run_path(str(next(path for path in EXAMPLES if path.stem == name)))["run"]
    except ImportError as error:
        pytest.skip(f"needs {error.name}")


@pytest.mark.parametrize(("name", "steps"), [("transformer", 60), ("llama", 60)])
def test_adamw_learns_faster_in_the_eigenbasis(name: str, steps: int) -> None:
    run = example(name)
    assert run(True, steps) < run(False, steps)


@pytest.mark.parametrize("name", ["lora", "convolutions"])
def test_a_teleport_along_pairs_and_scales_keeps_the_outputs(name: str) -> None:
    report, change = example(name)()
    assert report.accepted and report.grad_norm_after > 1.2 * report.grad_norm_before
    assert change < 1e-5
