"""What was built and what is seen: the text of `python -m symtele_cuda info`."""

from __future__ import annotations

import platform

import torch

from symtele_cuda._version import __version__
from symtele_cuda.kernels import extension
from symtele_cuda.kernels.extension import NO_ISOLATION_COMMAND, BuildRecord, build_record


def describe() -> str:
    """Versions, the build and its reason, whether its kernels load, the visible devices, and the settings of torch
    that results depend on."""
    lines = [
        f"symtele_cuda    {__version__}",
        f"Python          {platform.python_version()}",
        f"torch           {torch.__version__} ({f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'})",
        "",
        *build_lines(build_record()),
        "",
        *device_lines(),
        f"float32 matmul: {'TF32 allowed' if torch.backends.cuda.matmul.fp32_precision == 'tf32' else 'float32'}",
        f"CPU threads:    {torch.get_num_threads()}",
    ]
    return "\n".join(lines)


def build_lines(record: BuildRecord | None) -> list[str]:
    if record is None:
        return [f"build:          none; everything runs on torch's operations: {extension.unavailable_reason()}"]
    lines = record.text.splitlines()
    if record.outcome == "cuda":
        lines.append(f"CUDA kernels:   {extension.unavailable_reason() or f'loaded from {extension.LIBRARY}'}")
    elif record.torch != torch.__version__:
        lines.append(f"note:           torch is now {torch.__version__}; to decide again: {NO_ISOLATION_COMMAND}")
    return lines


def device_lines() -> list[str]:
    if not torch.cuda.is_available():
        return ["CUDA devices:   none visible"]
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        f"CUDA device {index}:  {device.name}, compute capability {device.major}.{device.minor}, "
        f"{device.total_memory / 2**30:.0f} GiB{kernels_on((device.major, device.minor))}"
        for index, device in enumerate(properties)
    ]


def kernels_on(capability: tuple[int, int]) -> str:
    """What is to be said of the kernels on such a device, if there are any."""
    obstacle = extension.device_obstacle(capability) if extension.library_path() else None
    return f"; {obstacle}" if obstacle else ""
