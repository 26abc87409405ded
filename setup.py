"""The build: decide what to compile, say it, and record it in the package. Everything static is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "symtele_cuda"


def load_build_decision() -> ModuleType:
    """`symtele_cuda.build_decision` without `import symtele_cuda`, which needs torch: an isolated build has none."""
    spec = importlib.util.spec_from_file_location("build_decision", ROOT / PACKAGE / "build_decision.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


class BuildWithRecord(build_py):
    """Copies the package and adds `_build.json`, the decision as `python -m symtele_cuda info` reads it back."""

    def run(self) -> None:
        build_decision = load_build_decision()
        try:
            decision = build_decision.decide_here(ROOT)
        except build_decision.BuildError as error:
            raise SystemExit(f"{PACKAGE}: {error}") from None
        super().run()
        folder = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
        (folder / "_build.json").write_text(decision.to_json())
        print(f"{PACKAGE} is built as follows\n{decision}", flush=True)


setup(cmdclass={"build_py": BuildWithRecord})
