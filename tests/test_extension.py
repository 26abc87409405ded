"""Loading the compiled library: when, at most once, and what is said where it cannot be loaded."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from build_decision import Decision
from symtele_cuda.kernels import extension

ROOT = Path(__file__).resolve().parents[1]

BUILT = Decision(
    outcome="cuda",
    reason="torch, the CUDA toolkit and CUTLASS are there and fit",
    torch="2.15.0+cu132",
    cuda="13.2",
    toolkit="/opt/cuda",
    toolkit_version="13.0",
    cutlass="/opt/cutlass/include",
    architectures=("8.0", "9.0+PTX"),
)


class Installation:
    """A folder in which the package finds the record and the library of its build."""

    def __init__(self, folder: Path) -> None:
        self.record = folder / "_build.json"
        self.library = folder / "_kernels.so"

    def recorded(self, decision: Decision) -> Installation:
        self.record.write_text(decision.to_json())
        return self

    def compiled(self, source: str) -> None:
        """Put a shared library of this C source in the place of the kernels."""
        if not shutil.which("gcc"):
            pytest.skip("there is no gcc to make a library with")
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(self.library)]
        subprocess.run(command, input=source, text=True, check=True)


@pytest.fixture
def installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Installation]:
    """An installation that was never built."""
    result = Installation(tmp_path)
    monkeypatch.setattr(extension, "RECORD", result.record)
    monkeypatch.setattr(extension, "LIBRARY", result.library)
    extension.unavailable_reason.cache_clear()
    yield result
    extension.unavailable_reason.cache_clear()


@pytest.fixture
def same_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch that runs the test as the one of the build."""
    monkeypatch.setattr(torch, "__version__", BUILT.torch)
    monkeypatch.setattr(torch.version, "cuda", BUILT.cuda)


def expect_unavailable(*words: str) -> None:
    reason = extension.unavailable_reason()
    assert reason is not None and all(word in reason for word in words), reason
    with pytest.raises(RuntimeError) as caught:
        extension.load()
    assert str(caught.value) == reason


def test_a_source_tree_says_how_to_build(installation: Installation) -> None:
    assert extension.library_path() is None
    expect_unavailable(
        "source tree of symtele_cuda that was not installed",
        "pip install --no-deps nvidia-cutlass",
        "pip install --no-build-isolation .",
    )


def test_a_pure_python_build_gives_the_reason_of_its_record(installation: Installation) -> None:
    installation.recorded(dataclasses.replace(BUILT, outcome="python", reason="no CUDA toolkit was found"))
    installation.library.touch()  # left by an earlier build of the same source tree
    assert extension.library_path() is None
    expect_unavailable("built without CUDA kernels: no CUDA toolkit was found")


def test_a_missing_library_is_named(installation: Installation) -> None:
    installation.recorded(BUILT)
    assert extension.library_path() is None
    expect_unavailable(f"{installation.library} is missing", "pip install --no-build-isolation .")


@pytest.mark.parametrize(
    ("version", "cuda", "here"),
    [
        ("2.14.1+cu132", "13.2", "torch 2.14.1+cu132 (CUDA 13.2)"),
        ("2.15.0+cu128", "12.8", "torch 2.15.0+cu128 (CUDA 12.8)"),
        ("2.15.0+cpu", None, "torch 2.15.0+cpu (no CUDA)"),
    ],
)
def test_another_torch_is_named_beside_that_of_the_build(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None, here: str
) -> None:
    installation.recorded(BUILT).library.touch()
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    expect_unavailable("were built for torch 2.15.0+cu132 (CUDA 13.2)", here, "pip install --no-build-isolation .")


@pytest.mark.parametrize(("version", "cuda"), [("2.15.1+cu130", "13.0"), ("2.15.0", "13.2")])
def test_a_patch_release_and_a_minor_version_of_cuda_are_no_other_torch(
    monkeypatch: pytest.MonkeyPatch, version: str, cuda: str
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert extension.fits_torch(BUILT)


@pytest.mark.usefixtures("same_torch")
def test_an_undefined_symbol_is_explained(installation: Installation) -> None:
    installation.recorded(BUILT).compiled("void gone(void); void (*used)(void) = gone;")
    expect_unavailable("undefined symbol: gone (which this build of torch does not define)", "2.15.0+cu132 (CUDA 13.2)")


@pytest.mark.usefixtures("same_torch")
def test_what_the_loader_says_is_kept(installation: Installation) -> None:
    installation.recorded(BUILT).library.write_text("not a library")
    expect_unavailable("the CUDA kernels do not load:", str(installation.library), "pip install --no-build-isolation .")


@pytest.mark.usefixtures("same_torch")
def test_a_library_is_loaded_once(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    installation.recorded(BUILT).compiled("int nothing;")
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert extension.library_path() == installation.library
    extension.load()
    extension.load()
    assert extension.unavailable_reason() is None
    assert loaded == [str(installation.library)]


def test_a_device_beyond_the_built_architectures_is_told_what_to_build(installation: Installation) -> None:
    installation.recorded(dataclasses.replace(BUILT, architectures=("8.0", "9.0")))
    assert extension.device_obstacle((8, 6)) is None
    reason = extension.device_obstacle((12, 0))
    assert reason is not None
    assert "built for 8.0 9.0" in reason and 'TORCH_CUDA_ARCH_LIST="12.0"' in reason


# --- the library of this installation ---------------------------------------------------------------------------------


def test_importing_the_package_loads_no_library() -> None:
    program = "import symtele_cuda; maps = open('/proc/self/maps').read(); assert '_kernels.so' not in maps"
    if not Path("/proc/self/maps").exists():
        pytest.skip("there is no /proc/self/maps to see the loaded libraries in")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_built_library_needs_no_python() -> None:
    library = extension.library_path()
    if library is None or not shutil.which("nm"):
        pytest.skip("there is no compiled library, or no nm to read it with")
    symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    assert not [line for line in symbols.splitlines() if line.split()[-1].startswith("Py")]


def test_the_built_library_hides_its_launchers() -> None:
    library = extension.library_path()
    if library is None or not shutil.which("nm"):
        pytest.skip("there is no compiled library, or no nm to read it with")
    command = ["nm", "-D", "-C", "--defined-only", str(library)]
    exported = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "symtele::launch" not in exported, exported
