"""What was built and what is seen: the text of `python -m symtele_cuda info`."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from symtele_cuda._version import __version__
from symtele_cuda.build_decision import NO_ISOLATION_COMMAND, Decision

RECORD = Path(__file__).with_name("_build.json")


def build_record() -> Decision | None:
    """The decision that the build of this installation recorded; None in a source tree that was never installed."""
    return Decision.from_json(RECORD.read_text()) if RECORD.is_file() else None


def describe() -> str:
    """Versions, the build and its reason, the visible devices, and the settings of torch that results depend on."""
    return "\n".join([*version_lines(), "", *build_lines(build_record()), "", *machine_lines()])


def version_lines() -> list[str]:
    return [
        f"symtele_cuda    {__version__}",
        f"Python          {platform.python_version()}",
        f"torch           {torch.__version__} ({f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'})",
    ]


def build_lines(record: Decision | None) -> list[str]:
    if record is None:
        return [
            "build:          none, this is a source tree that was not installed; everything runs on torch's operations",
            f"to build:       {NO_ISOLATION_COMMAND}   (with torch, setuptools, ninja and pybind11 installed)",
        ]
    lines = str(record).splitlines()
    if record.torch != torch.__version__:
        lines.append(f"note:           torch is now {torch.__version__}; to decide again: {NO_ISOLATION_COMMAND}")
    return lines


def machine_lines() -> list[str]:
    return [
        *device_lines(),
        f"float32 matmul: {torch.get_float32_matmul_precision()}",
        f"CPU threads:    {torch.get_num_threads()}",
    ]


def device_lines() -> list[str]:
    if not torch.cuda.is_available():
        return ["CUDA devices:   none visible"]
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        f"CUDA device {index}:  {device.name}, compute capability {device.major}.{device.minor}, "
        f"{device.total_memory / 2**30:.0f} GiB"
        for index, device in enumerate(properties)
    ]
