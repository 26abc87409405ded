"""The compiled library of CUDA kernels: where it lies, how it is loaded, and why there is none.

`import symtele_cuda` loads nothing of it. The first `load` does, for the process: the operators that csrc/ops.cpp
registers are then found as `torch.ops.symtele_cuda.*`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from symtele_cuda.kernels.build_decision import CUTLASS_COMMAND, NO_ISOLATION_COMMAND, Decision, major, runs_on

LIBRARY = Path(__file__).parents[1] / "_kernels.so"
RECORD = Path(__file__).parents[1] / "_build.json"

BUILD_AGAIN = f"build it again in this environment: {NO_ISOLATION_COMMAND}"


def build_record() -> Decision | None:
    """The decision that the build of this installation recorded; None in a source tree that was never installed."""
    return Decision.from_json(RECORD.read_text()) if RECORD.is_file() else None


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
            f"torch, setuptools and ninja, run {CUTLASS_COMMAND}, then: {NO_ISOLATION_COMMAND}"
        )
    if record.outcome != "cuda":
        return f"symtele_cuda was built without CUDA kernels: {record.reason}"
    if not LIBRARY.is_file():
        return f"the build of symtele_cuda did not finish, {LIBRARY} is missing: {BUILD_AGAIN}"
    if not fits_torch(record):
        return f"{versions(record)}; the compiled code fits no other: {BUILD_AGAIN}"
    return load_error(record)


def load_error(record: Decision) -> str | None:
    """What the loader has against the library, None once it is loaded."""
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        said = str(error.__cause__ or error)  # torch's own text is the path alone
        hint = " (which this build of torch does not define)" if "undefined symbol" in said else ""
        return f"the CUDA kernels do not load: {said}{hint}. {versions(record)}; {BUILD_AGAIN}"
    return None


def fits_torch(record: Decision) -> bool:
    """Whether this torch has the release (2.15 of 2.15.1+cu132) and the CUDA generation of the torch of the build.

    Only then is the library loaded at all: C++ interfaces that changed would not be noticed by the loader.
    """
    return bool(
        record.torch
        and release(record.torch) == release(torch.__version__)
        and record.cuda
        and torch.version.cuda
        and major(record.cuda) == major(torch.version.cuda)
    )


def release(version: str) -> list[str]:
    return version.split(".")[:2]


def versions(record: Decision) -> str:
    built, here = describe_torch(record.torch, record.cuda), describe_torch(torch.__version__, torch.version.cuda)
    return f"the CUDA kernels of symtele_cuda were built for {built}, and this is {here}"


def describe_torch(version: str | None, cuda: str | None) -> str:
    return f"torch {version} ({f'CUDA {cuda}' if cuda else 'no CUDA'})"


def device_obstacle(capability: tuple[int, int]) -> str | None:
    """Why the kernels of this installation do not run on a device of this compute capability, None if they do."""
    record = build_record()
    built = record.architectures if record else ()
    if any(runs_on(entry, capability) for entry in built):
        return None
    tens, ones = capability
    return (
        f"the CUDA kernels of symtele_cuda were built for {' '.join(built) or 'no architecture'}, and the device has "
        f'compute capability {tens}.{ones}: build them again with TORCH_CUDA_ARCH_LIST="{tens}.{ones}"'
    )
