"""`symtele info` and `symtele demo`."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from symtele_cuda.__main__ import main

needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs symtele_cuda[demo]")


def test_info_names_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


@needs_sklearn
def test_demo_trains_without_and_with_teleports(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--epochs", "6", "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    losses = {name: float(loss) for name, loss in re.findall(r"(plain|teleported) +(\d\.\d+)", printed)}
    assert losses["teleported"] < losses["plain"] < 2.3
    assert printed.count("seed 0: teleported") == 1


@needs_sklearn
def test_the_package_alone_has_a_demo(tmp_path: Path) -> None:
    """Outside of a checkout there are no experiments."""
    words = [sys.executable, "-m", "symtele_cuda", "demo", "--epochs", "1", "--seeds", "1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "teleported" in done.stdout, done.stderr


def test_demo_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install symtele_cuda[demo]" in error


@pytest.mark.parametrize("seeds", ["0", "-1", "1.5", "many"])
def test_a_wrong_number_is_one_line(seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["demo", "--seeds", seeds])
    assert raised.value.code == 2
    text = f"argument --seeds: must be a whole number >= 1, got '{seeds}'"
    assert capsys.readouterr().err == f"symtele demo: error: {text}\n"
