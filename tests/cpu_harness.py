"""Builds and runs the C++ programs of tests/harness, which execute the kernels of csrc/ on the CPU.

The programs are compiled with AddressSanitizer and UBSan and end with a status other than 0 on whatever these or the
emulator (tests/harness/cuda_on_cpu.h) find. They read one binary file and write another (tests/harness/buffers.h).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from symtele_cuda.activations import Activation

CSRC = Path(__file__).parent.parent / "csrc"
HARNESS = Path(__file__).parent / "harness"

# Compiled once and shared by the processes of a run and by later runs; of the older ones some are thrown away.
OBJECTS = CSRC.parent / "build" / "cpu_harness"
MOST_OBJECTS = 500

FLAGS = ("-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

# The orders in which the threads between two barriers, and the blocks, run; a number is the seed of a shuffle.
ORDERS = ("ascending", "descending", "1")


@lru_cache
def missing_compiler() -> str | None:
    """Why the programs cannot be built here, None if they can."""
    if shutil.which("g++") is None:
        return "no g++ on the PATH"
    probe = ["g++", *FLAGS, "-x", "c++", "-", "-o", os.devnull]
    done = subprocess.run(probe, input="int main() {}", capture_output=True, text=True, check=False)
    return f"g++ builds no programs with sanitizers: {done.stderr}" if done.returncode else None


def build(name: str, folder: Path, csrc: Path = CSRC, sources: Sequence[str] = ()) -> Path:
    """The program tests/harness/`name`.cpp in `folder`, linked with these files of `csrc`; skips without g++."""
    if reason := missing_compiler():
        pytest.skip(reason)
    files = [HARNESS / f"{name}.cpp", *(csrc / source for source in sources)]
    program = folder / name
    output_of_gcc([*FLAGS, *(str(compile_object(file, csrc=csrc)) for file in files), "-o", str(program)])
    return program


def compile_object(source: Path, flags: Sequence[str] = FLAGS, csrc: Path = CSRC) -> Path:
    """The object of `source`, kept in `OBJECTS` under the hash of all that goes into it."""
    options = [*flags, f"-I{csrc}", f"-I{HARNESS}"]
    text = output_of_gcc([*options, "-x", "c++", "-E", str(source)]).replace(str(csrc), "csrc")
    key = hashlib.sha256("\n".join([compiler(), *flags, text]).encode()).hexdigest()
    target = OBJECTS / f"{source.stem}-{key[:32]}.o"
    if target.exists():
        target.touch()  # one of the last used, which stay
    else:
        OBJECTS.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(f".{os.getpid()}")  # another process may make the same one now
        output_of_gcc([*flags, "-x", "c++-cpp-output", "-c", "-", "-o", str(made)], text)
        made.replace(target)
        for old in sorted(OBJECTS.glob("*.o"), key=lambda path: path.stat().st_mtime)[:-MOST_OBJECTS]:
            old.unlink(missing_ok=True)
    return target


@lru_cache
def compiler() -> str:
    """What tells one g++ from another."""
    return output_of_gcc(["--version"])


def output_of_gcc(arguments: Sequence[str], text: str | None = None) -> str:
    done = subprocess.run(["g++", *arguments], input=text, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def plant_fault(folder: Path, file: str, right: str, wrong: str) -> Path:
    """A copy of csrc/ in `folder` with `wrong` in place of the one occurrence of `right` in `file`."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)
    text = (copy / file).read_text()
    assert text.count(right) == 1, f"{file} holds {text.count(right)} times: {right}"
    (copy / file).write_text(text.replace(right, wrong))
    return copy


def run(program: Path, content: bytes, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `program` with the arguments and the files of its input, which holds `content`, and its output."""
    source, target = program.with_suffix(".in"), program.with_suffix(".out")
    source.write_bytes(content)
    environ = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [str(program), *arguments, str(source), str(target)]
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)


def output_of(program: Path, content: bytes, *arguments: str) -> bytes:
    """What `program` wrote; fails with what it reported if it ended with a status other than 0."""
    done = run(program, content, *arguments)
    assert done.returncode == 0, done.stderr
    return program.with_suffix(".out").read_bytes()


KINDS = re.findall(r'ACT\("(\w+)", \w+\)', (CSRC / "activation.cuh").read_text())


def activation_items(activation: Activation) -> list[int | float]:
    """An activation as the programs read it (tests/harness/activations.h): its kind and its five numbers."""
    name, numbers = activation.sigma
    return [KINDS.index(name), *numbers]


def pack(items: Iterable[int | float | Tensor | None]) -> bytes:
    """The items as the programs read them: int64, float64, or an array (of none: nothing in it) behind its size."""
    return b"".join(map(_pack_item, items))


def _pack_item(item: int | float | Tensor | None) -> bytes:
    if isinstance(item, int):
        return struct.pack("<q", item)
    if isinstance(item, float):
        return struct.pack("<d", item)
    content = b"" if item is None else item.contiguous().numpy().tobytes()
    return struct.pack("<q", len(content)) + content


class Unpacker:
    """Reads what a program wrote, in order."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def number(self) -> int:
        self.position += 8
        return int(struct.unpack_from("<q", self.content, self.position - 8)[0])

    def tensor(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor | None:
        """The next array, None if it is empty."""
        size = self.number()
        if size == 0:
            return None
        self.position += size
        array = np.frombuffer(bytearray(self.content[self.position - size : self.position]), np.uint8)
        return torch.from_numpy(array).view(dtype).view(*shape)

    def done(self) -> bool:
        return self.position == len(self.content)
