"""The machine code in the compiled library, as cuobjdump shows it: what the sources mean the kernels to be made of.

No device is needed. Speed and accuracy depend on what is looked for here: that the products on the tensor cores take
three TF32 instructions a step, that the others are true float32 and float64, that no kernel keeps variables in memory.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from symtele_cuda.kernels import extension

TENSOR = "multiply_on_tensor_cores"


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture ("sm_90"), by its mangled name; `stack` and `local` are bytes of a thread.

    opcodes: with their modifiers, in the order of the code.
    """

    architecture: str
    name: str
    registers: int
    stack: int
    local: int
    opcodes: list[str]

    def __str__(self) -> str:
        return f"{self.name} ({self.architecture})"

    def count(self, beginning: str) -> int:
        """How many instructions it has whose opcode, with its modifiers, begins like this."""
        return sum(opcode.startswith(beginning) for opcode in self.opcodes)


# --- reading the library ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Path:
    path = extension.library_path()
    if path is None:
        pytest.skip(f"there is no compiled library: {extension.unavailable_reason()}")
    return path


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    found = find_cuobjdump()
    if found is None:
        pytest.skip("there is no cuobjdump, neither in the CUDA toolkit nor in triton's package")
    return found


@pytest.fixture(scope="module")
def kernels(library: Path, cuobjdump: str) -> list[Kernel]:
    usage = parse_usage(run(cuobjdump, "-res-usage", library))
    opcodes = parse_opcodes(run(cuobjdump, "-sass", library))
    return [Kernel(*key, *numbers, opcodes[key]) for key, numbers in usage.items()]


def find_cuobjdump() -> str | None:
    """From the toolkit of the build, the PATH, or triton's package, which comes with a CUDA build of torch."""
    record = extension.build_record()
    folders = [str(Path(record.toolkit) / "bin")] if record and record.toolkit else []
    triton = find_spec("triton")
    if triton and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump") or next(filter(None, (shutil.which("cuobjdump", path=at) for at in folders)), None)


def run(cuobjdump: str, option: str, library: Path) -> str:
    return subprocess.run([cuobjdump, option, str(library)], capture_output=True, text=True, check=True).stdout


def parse_usage(text: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(architecture, kernel) → registers, stack bytes, local bytes; of `cuobjdump -res-usage`."""
    usage = {}
    architecture = name = ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r" Function (\S+):$", line):
            name = found[1]
        elif found := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            usage[architecture, name] = (int(found[1]), int(found[2]), int(found[3]))
    return usage


def parse_opcodes(text: str) -> dict[tuple[str, str], list[str]]:
    """(architecture, kernel) → its opcodes in their order; of `cuobjdump -sass`."""
    opcodes: dict[tuple[str, str], list[str]] = {}
    architecture = name = ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s+Function : (\S+)", line):
            name = found[1]
            opcodes[architecture, name] = []
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?\s*([A-Z][A-Z0-9_.]+)", line):
            opcodes[architecture, name].append(found[1])
    return opcodes


def test_what_cuobjdump_prints_is_read() -> None:
    usage = (
        "Fatbin elf code:\n================\narch = sm_90\n\nResource usage:\n Common:\n  GLOBAL:0\n"
        " Function _Z3onev:\n  REG:163 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:744 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    )
    assert parse_usage(usage) == {("sm_90", "_Z3onev"): (163, 8, 4)}
    code = (
        'arch = sm_90\n\t\tFunction : _Z3onev\n\t.headerflags @"EF_CUDA_SM90"\n'
        "        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */\n"
        "                                                            /* 0x000fe20000000800 */\n"
        "        /*0010*/              @!P0 HMMA.1688.F32.TF32 R8, R4, R2, R8 ;  /* 0x00000a00ff017b82 */\n"
        "        /*0020*/                   HMMA.1688.F32.TF32 R8, R4, R2, R8 ;  /* 0x00000a00ff017b82 */\n"
    )
    assert parse_opcodes(code) == {("sm_90", "_Z3onev"): ["LDC", *["HMMA.1688.F32.TF32"] * 2]}


# --- what must be there -----------------------------------------------------------------------------------------------


def test_the_architectures_are_those_of_the_build_record(library: Path, cuobjdump: str) -> None:
    record = extension.build_record()
    assert record is not None
    machine_code = {entry.removesuffix("+PTX") for entry in record.architectures}
    portable = {entry.removesuffix("+PTX") for entry in record.architectures if entry.endswith("+PTX")}
    assert listed(run(cuobjdump, "-lelf", library)) == machine_code
    assert listed(run(cuobjdump, "-lptx", library) if portable else "") == portable


def listed(files: str) -> set[str]:
    """The architectures "9.0", "9.0a", … of the files that cuobjdump lists."""
    return {f"{found[1]}.{found[2]}" for found in re.finditer(r"\.sm_(\d+)(\d[af]?)\.", files)}


def test_every_architecture_has_the_same_kernels(kernels: list[Kernel]) -> None:
    names: dict[str, set[str]] = {}
    for kernel in kernels:
        names.setdefault(kernel.architecture, set()).add(kernel.name)
    assert len({frozenset(found) for found in names.values()}) == 1, {at: len(found) for at, found in names.items()}


def test_no_kernel_keeps_variables_in_memory(kernels: list[Kernel]) -> None:
    """Neither registers that do not suffice (spills) nor arrays that the compiler could not keep in them."""
    spilled = [str(kernel) for kernel in kernels if kernel.stack or kernel.local or kernel.count("STL")]
    assert not spilled


def test_no_kernel_was_compiled_with_fast_math(kernels: list[Kernel]) -> None:
    """Fast math turns tanh into the device's approximation (an instruction), which these sources never ask for."""
    assert not [str(kernel) for kernel in kernels if kernel.count("MUFU.TANH")]


def test_tensor_core_products_take_three_tf32_instructions_a_step(kernels: list[Kernel]) -> None:
    """big·big, big·small and small·big for each piece of 16 × 8 × 8 of a warp's tile: one alone would be plain TF32."""
    tensor = [kernel for kernel in kernels if TENSOR in kernel.name]
    assert tensor
    for kernel in tensor:
        _, (rows, columns, inner) = tile_shapes(kernel.name)
        steps = rows // 16 * (columns // 8) * (inner // 8)
        assert kernel.count("HMMA.1688.F32.TF32") == kernel.count("HMMA") == 3 * steps, str(kernel)


def tile_shapes(name: str) -> list[tuple[int, int, int]]:
    """The block's and the warp's tile (rows, columns, inner) in a mangled name."""
    return [(int(m), int(n), int(k)) for m, n, k in re.findall(r"ILi(\d+)ELi(\d+)ELi(\d+)EE", name)]


def test_tensor_core_products_move_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        if TENSOR in kernel.name:
            copies = [opcode for opcode in kernel.opcodes if opcode.startswith("LDGSTS")]
            stores = [opcode for opcode in kernel.opcodes if opcode.startswith("STG")]
            assert copies and stores and all(opcode.endswith(".128") for opcode in copies + stores), str(kernel)


def test_only_the_tensor_core_products_use_tensor_cores(kernels: list[Kernel]) -> None:
    """The others compute in the precision of their operands, also where TF32 is not allowed."""
    matrix = {str(k) for k in kernels if k.count("HMMA") or k.count("HGMMA") or k.count("UTC")}
    assert matrix == {str(kernel) for kernel in kernels if TENSOR in kernel.name}


def test_fused_products_multiply_in_the_precision_of_their_operands(kernels: list[Kernel]) -> None:
    """A kernel of a template has `If` (float) or `Id` (double) in its mangled name."""
    single = [kernel for kernel in kernels if "8multiplyIf" in kernel.name]
    double = [kernel for kernel in kernels if "8multiplyId" in kernel.name]
    assert single and double
    assert not [str(kernel) for kernel in single if not kernel.count("FFMA") or kernel.count("DFMA")]
    assert not [str(kernel) for kernel in double if not kernel.count("DFMA")]


@pytest.mark.parametrize(
    ("name", "blocks", "architectures"),
    [
        ("8multiplyIf", 2, {"sm_80", "sm_90", "sm_100"}),  # the others have the shared memory for one
        ("sweep_pivots", 3, None),  # so that two matrices of 512 rows are one wave on 132 multiprocessors
        ("sum_squares", 2, None),
    ],
)
def test_so_many_blocks_fit_onto_a_multiprocessor(
    kernels: list[Kernel], name: str, blocks: int, architectures: set[str] | None
) -> None:
    """By their registers: a block has 256 threads, and a multiprocessor 65,536 registers on every device."""
    named = [k for k in kernels if name in k.name and (architectures is None or k.architecture in architectures)]
    if not named:
        pytest.skip("the library is built for no such device")
    assert not [f"{kernel}, {kernel.registers}" for kernel in named if kernel.registers * blocks * 256 > 65536]


@pytest.mark.parametrize("name", ["gram_tile", "sweep_pivots", "sum_products"])
def test_sums_that_must_be_float64_are(kernels: list[Kernel], name: str) -> None:
    """The Gram matrix and its inverse lose what they are for in float32, whatever the dtype of the operands."""
    named = [kernel for kernel in kernels if name in kernel.name]
    assert named
    assert not [str(kernel) for kernel in named if not kernel.count("DFMA") or kernel.count("FFMA")]


@pytest.mark.parametrize("name", ["sum_products", "sum_each_squared", "sum_squares"])
def test_sums_request_several_packs_before_they_wait_for_one(kernels: list[Kernel], name: str) -> None:
    """packs_at_once of csrc/reduce.cu: without them the blocks that there are do not use the memory's bandwidth."""
    named = [kernel for kernel in kernels if name in kernel.name]
    assert named
    assert not [f"{kernel}, {loads_in_flight(kernel)}" for kernel in named if loads_in_flight(kernel) < 4]


def loads_in_flight(kernel: Kernel) -> int:
    """The most loads of 16 bytes between two instructions that compute with float64 numbers."""
    flying = most = 0
    for opcode in kernel.opcodes:
        if opcode.startswith(("DFMA", "DADD", "DMUL", "F2F", "I2F")):
            flying = 0
        elif opcode.startswith("LDG") and opcode.endswith(".128"):
            flying += 1
            most = max(most, flying)
    return most
