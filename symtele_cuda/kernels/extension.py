"""The compiled library of CUDA kernels: where it lies, how it is loaded, and why there is none.

`import symtele_cuda` loads nothing of it. The first `load` does, for the process: the operators that csrc/ops.cpp
registers are then found as `torch.ops.symtele_cuda.*`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_kernels.so"
RECORD = Path(__file__).parents[1] / "_build.json"

NO_ISOLATION_COMMAND = "pip install --no-build-isolation ."
BUILD_AGAIN = f"build it again in this environment: {NO_ISOLATION_COMMAND}"


@dataclass(frozen=True)
class BuildRecord:
    """What the build of this installation has decided, as `Decision.to_json` of build_decision.py writes it.

    outcome: "cuda" or "python". torch, cuda: the versions it saw; toolkit: the folder of its CUDA toolkit.
    architectures: in the notation of TORCH_CUDA_ARCH_LIST. text: all of it, in several lines.
    """

    outcome: str
    reason: str
    torch: str | None
    cuda: str | None
    toolkit: str | None
    architectures: list[str]
    text: str


def build_record() -> BuildRecord | None:
    """The record of this installation; None in a source tree that was never installed."""
    return BuildRecord(**json.loads(RECORD.read_text())) if RECORD.is_file() else None


def library_path() -> Path | None:
    """The compiled library of this installation, None if none was built."""
    record = build_record()
    return LIBRARY if record and record.outcome == "cuda" and LIBRARY.is_file() else None


def load() -> None:
    """Load the library, which registers its operators with torch. More than once is as good as once.

    Raises:
        RuntimeError: it cannot be loaded; the text is that of `unavailable_reason`.
    """
    reason = unavailable_reason()
    if reason:
        raise RuntimeError(reason)


@functools.cache
def unavailable_reason() -> str | None:
    """None if the library is loaded when this returns, or else why it cannot be, and how to mend it."""
    record = build_record()
    if record is None:
        return (
            "this is a source tree of symtele_cuda that was not installed. For CUDA kernels install a CUDA build of "
            f"torch, setuptools and ninja, run pip install --no-deps nvidia-cutlass, then: {NO_ISOLATION_COMMAND}"
        )
    if record.outcome != "cuda":
        return f"symtele_cuda was built without CUDA kernels: {record.reason}"
    if not LIBRARY.is_file():
        return f"the build of symtele_cuda did not finish, {LIBRARY} is missing: {BUILD_AGAIN}"
    if not fits_torch(record):
        return f"{versions(record)}; the compiled code fits no other: {BUILD_AGAIN}"
    return load_error(record)


def load_error(record: BuildRecord) -> str | None:
    """What the loader has against the library, None once it is loaded."""
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        said = str(error.__cause__ or error)  # torch's own text is the path alone
        hint = " (which this build of torch does not define)" if "undefined symbol" in said else ""
        return f"the CUDA kernels do not load: {said}{hint}. {versions(record)}; {BUILD_AGAIN}"
    return None


def fits_torch(record: BuildRecord) -> bool:
    """Whether this torch has the release (2.15 of 2.15.1+cu132) and the CUDA generation of the torch of the build.

    Only then is the library loaded at all: C++ interfaces that changed would not be noticed by the loader.
    """
    return bool(
        record.torch
        and release(record.torch) == release(torch.__version__)
        and record.cuda
        and torch.version.cuda
        and record.cuda.split(".")[0] == torch.version.cuda.split(".")[0]
    )


def release(version: str) -> list[str]:
    return version.split(".")[:2]


def versions(record: BuildRecord) -> str:
    built, here = describe_torch(record.torch, record.cuda), describe_torch(torch.__version__, torch.version.cuda)
    return f"the CUDA kernels of symtele_cuda were built for {built}, and this is {here}"


def describe_torch(version: str | None, cuda: str | None) -> str:
    return f"torch {version} ({f'CUDA {cuda}' if cuda else 'no CUDA'})"


def device_obstacle(capability: tuple[int, int]) -> str | None:
    """Why the kernels of this installation do not run on a device of this compute capability, None if they do."""
    record = build_record()
    built = record.architectures if record else []
    if any(runs_on(entry, capability) for entry in built):
        return None
    tens, ones = capability
    return (
        f"the CUDA kernels of symtele_cuda were built for {' '.join(built) or 'no architecture'}, and the device has "
        f'compute capability {tens}.{ones}: build them again with TORCH_CUDA_ARCH_LIST="{tens}.{ones}"'
    )


def runs_on(entry: str, capability: tuple[int, int]) -> bool:
    """Whether code for an entry such as "9.0a+PTX" runs on a device of this compute capability.

    Machine code runs on its own generation, from its minor version on, PTX on everything newer. Code for 9.0a uses
    features of that one device, code for 10.0f those of its generation, in PTX too.
    """
    base = entry.removesuffix("+PTX")
    tens, ones = map(int, base.rstrip("af").split("."))
    if base.endswith("a"):
        return capability == (tens, ones)
    newer = entry.endswith("+PTX") and not base.endswith("f") and capability >= (tens, ones)
    return newer or (capability[0] == tens and capability[1] >= ones)
