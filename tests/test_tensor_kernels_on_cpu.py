"""The products on tensor cores (csrc/matmul_tensor.cu), CUTLASS's main loop and all, run on the CPU.

g++ compiles CUTLASS's headers as they are but for three instructions of a warp that are assembly in them; functions of
tests/harness/cutlass_on_cpu.h take their place. The tensor cores are modelled as they are known to be: they see 10 bits
of a float's mantissa and cut off where they add. What is compared with what is as in test_kernels_on_cpu.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_harness import CSRC, FLAGS, HARNESS, ORDERS, Unpacker, missing_compiler, output_of, run
from test_kernels_on_cpu import EPILOGUES, Case, Layout, check, encode_all, make_inputs, run_cases

from build_decision import CUTLASS_COMMAND, find_cutlass, find_toolkit
from symtele_cuda.activations import Activation

CHOSEN, SMALL, LARGE = 0, 64, 128
TILINGS = (SMALL, LARGE)
ROWS, COLUMNS = Layout(), Layout(transposed=True)

# The assembly's places in CUTLASS: the file, what is found there, and what is put instead, in how many places.
ASSEMBLY = [
    (
        "cutlass/arch/mma_sm80.h",
        r"(struct Mma<gemm::GemmShape<16, 8, 8>, 32, tfloat32_t,.*?)#if defined\(CUTLASS_ARCH_MMA_SM80.*?#endif",
        r"\1::cuda_on_cpu::multiply_16_8_8(reinterpret_cast<float*>(&d), &a, &b, reinterpret_cast<const float*>(&c));",
        1,
    ),
    (
        "cutlass/arch/memory_sm75.h",
        r"(void ldsm<layout::RowMajor, (\d)>\([^{]*\{)\s*#if defined.*?#endif",
        r"\1 ::cuda_on_cpu::load_matrices<\2>(&D, ptr);",
        3,
    ),
    (
        "cutlass/gemm/warp/mma_tensor_op_fast_f32.h",
        r"#if defined\(__CUDA_ARCH__\) && \(__CUDA_ARCH__ >= 800\)",
        "#if 1",
        2,
    ),
]


def build_with_cutlass(folder: Path, csrc: Path = CSRC) -> Path:
    """The program tests/harness/matmul_tensor.cpp; skips where g++ or the headers of CUTLASS or CUDA are not there."""
    cutlass, toolkit = find_cutlass(os.environ, sys.path), find_toolkit(os.environ, None)
    if reason := missing_compiler():
        pytest.skip(reason)
    if cutlass is None:
        pytest.skip(f"the headers of CUTLASS were not found: run {CUTLASS_COMMAND}, or set CUTLASS_HOME")
    if toolkit is None:
        pytest.skip("no CUDA toolkit, whose headers those of CUTLASS include")
    replace_assembly(cutlass, folder / "patched")
    cuda = Path(toolkit.home) / "include"
    headers = [csrc, folder / "patched", cutlass, cuda, cuda / "cccl", HARNESS]
    flags = [flag for flag in FLAGS if not flag.startswith("-W")]  # CUTLASS is for another compiler
    program = folder / "matmul_tensor"
    source = HARNESS / "matmul_tensor.cpp"
    command = ["g++", *flags, "-w", "-fpermissive", *(f"-I{header}" for header in headers), source, "-o", program]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def replace_assembly(cutlass: Path, folder: Path) -> None:
    """Copies of the files in ASSEMBLY, to be found before CUTLASS's own."""
    for file, pattern, replacement, places in ASSEMBLY:
        text, found = re.subn(pattern, replacement, (cutlass / file).read_text(), flags=re.DOTALL)
        assert found == places, f"{file} is not as in CUTLASS 4.2: {found} places in place of {places}"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_with_cutlass(tmp_path_factory.mktemp("matmul_tensor"))


# --- the cases -------------------------------------------------------------------------------------------------------


def draw_case(launcher: int, kind: str, activation: Activation, draw: random.Random) -> Case:
    """A case that the kernels take: what lies along the memory is a multiple of 4, everything else is odd."""
    a, b = (Layout(draw.random() < 0.5, draw.choice((0, 4))) for _ in range(2))
    inner_lies_along = not a.transposed or b.transposed
    optional = kind in ("linear", "masked")
    row = kind in ("linear", "activation", "over_slope", "masked") and draw.random() < 0.7
    return Case(
        launcher,
        torch.float32,
        draw.choice((4, 64, 132)) if a.transposed else draw.choice((1, 7, 65, 129)),
        draw.choice((4, 36, 68, 132)),
        draw.choice((4, 28, 44, 100, 132)) if inner_lies_along else draw.choice((1, 7, 33, 101)),
        kind,
        activation,
        a,
        b,
        source=kind == "times_slope" or (optional and draw.random() < 0.5),
        column=row and kind in ("linear", "over_slope") and draw.random() < 0.5,
        row=row,
        vector_stride=draw.choice((1, 3)),
        alpha=draw.choice((1.0, -0.7)) if optional else 1.0,
        beta=draw.choice((1.0, -0.3)) if optional or kind in ("inverse_activation", "times_slope") else 1.0,
        seed=draw.randrange(1000),
    )


@pytest.mark.parametrize("tiling", TILINGS)
def test_epilogues_and_odd_sizes(program: Path, tiling: int) -> None:
    draw = random.Random(tiling)
    epilogues = EPILOGUES if tiling == SMALL else EPILOGUES[::3]  # a large tile takes four times as long
    cases = [draw_case(tiling, *epilogue, draw) for epilogue in epilogues]
    written = {run_cases(program, cases, order) for order in ORDERS}
    assert len(written) == 1, "the results depend on the order of the threads"


@pytest.mark.parametrize("tiling", TILINGS)
def test_operand_layouts(program: Path, tiling: int) -> None:
    layouts = [Layout(transposed, padding) for transposed in (False, True) for padding in (0, 4)]
    cases = [Case(tiling, torch.float32, 132, 68, 44, a=a, b=b) for a, b in itertools.product(layouts, layouts)]
    run_cases(program, cases, "ascending")


@pytest.mark.parametrize("a", [ROWS, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize("inner", [4, 32, 36, 64, 96, 100, 128, 160])
def test_every_filling_of_the_pipeline(program: Path, a: Layout, inner: int) -> None:
    """Fewer tiles of `inner` than stages, as many, more, and a last one that is not full."""
    cases = [Case(SMALL, torch.float32, 8, 8, inner, a=a, b=b) for b in (ROWS, COLUMNS)]
    run_cases(program, cases, "descending")


def test_long_sums_keep_the_accuracy_of_float32(program: Path) -> None:
    """The tensor cores' bias would be 4e-5 here, were the sums left on them (see matmul_tensor.cu)."""
    run_cases(program, [Case(SMALL, torch.float32, 8, 8, 4096, b=COLUMNS)], "ascending")


def test_many_tiles_are_all_computed(program: Path) -> None:
    """Enough tiles for the order in which blocks go through them, and a choice of the tiles by the launcher."""
    sizes = [(129, 68, 4), (68, 700, 4), (700, 68, 4), (260, 516, 8)]
    run_cases(program, [Case(launcher, torch.float32, *size) for launcher in (SMALL, CHOSEN) for size in sizes], "1")


REFUSED = {
    "a that does not begin at 16 bytes": Case(CHOSEN, torch.float32, 8, 8, 8, a=Layout(offset=1)),
    "b that does not begin at 16 bytes": Case(CHOSEN, torch.float32, 8, 8, 8, b=Layout(offset=1)),
    "rows of a not 16 bytes apart": Case(CHOSEN, torch.float32, 8, 8, 8, a=Layout(padding=3)),
    "rows of a that end within a piece": Case(CHOSEN, torch.float32, 8, 8, 6, a=Layout(padding=2)),
    "columns of a that end within a piece": Case(CHOSEN, torch.float32, 6, 8, 8, a=Layout(True, 2)),
    "columns of b that end within a piece": Case(CHOSEN, torch.float32, 8, 8, 6, a=COLUMNS, b=Layout(True, 2)),
    "rows of the result not 16 bytes apart": Case(CHOSEN, torch.float32, 8, 6, 8, b=COLUMNS),
    "float64": Case(CHOSEN, torch.float64, 8, 8, 8),
    "nothing to sum": Case(CHOSEN, torch.float32, 8, 8, 0),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_the_kernels_do_not_take_is_refused(program: Path, case: Case) -> None:
    output = Unpacker(output_of(program, encode_all([case], [make_inputs(case)]), "ascending"))
    assert output.number() != 0
    first = output.tensor(case.dtype, case.shape)
    assert first is not None and first.isnan().all()


# --- planted faults --------------------------------------------------------------------------------------------------

# What a fault stands for: the expression of matmul_tensor.cu that is right, what takes its place, a case to show it.
FAULTS: dict[str, tuple[str, str, Case]] = {
    "no barrier before the results": ("__syncthreads()", "void()", Case(SMALL, torch.float32, 64, 64, 4)),
    "one row too many": (
        "top + i >= arguments.size.m()",
        "top + i > arguments.size.m()",
        Case(SMALL, torch.float32, 7, 8, 4),
    ),
    "one piece too many": (
        "left + j >= arguments.size.n()",
        "left + j > arguments.size.n()",
        Case(SMALL, torch.float32, 8, 8, 4),
    ),
    "warps in the wrong place": ("warp % warps_down", "0", Case(SMALL, torch.float32, 64, 64, 4)),
    "the last tile of the sum left out": (
        "(size.k() + Block::kK - 1) / Block::kK",
        "size.k() / Block::kK",
        Case(SMALL, torch.float32, 8, 8, 100),
    ),
    "too little shared memory": (
        "sizeof(typename Kernel::Shared)",
        "sizeof(typename Kernel::Shared) - 16",
        Case(SMALL, torch.float32, 64, 64, 96),
    ),
    "the other operand's leading dimension": (
        "leading(product.b)",
        "leading(product.a)",
        Case(SMALL, torch.float32, 8, 8, 12),
    ),
    "the row's vector not moved along": (
        "j * here.row_stride",
        "0 * here.row_stride",
        Case(SMALL, torch.float32, 8, 8, 4, row=True),
    ),
}


@pytest.fixture(scope="module")
def faulty_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with all faults in it, of which FAULT in the environment names the one that is to show."""
    folder = tmp_path_factory.mktemp("faults")
    shutil.copytree(CSRC, folder / "csrc")
    file = folder / "csrc" / "matmul_tensor.cu"
    text = file.read_text()
    for number, (right, wrong, _) in enumerate(FAULTS.values()):
        assert text.count(right) == 1, f"matmul_tensor.cu holds {text.count(right)} times: {right}"
        text = text.replace(right, f'(std::atoi(std::getenv("FAULT")) == {number} ? ({wrong}) : ({right}))')
    file.write_text(text)
    return build_with_cutlass(folder, folder / "csrc")


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(faulty_program: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = FAULTS[fault][2]
    monkeypatch.setenv("FAULT", "-1")
    assert not any(is_found(faulty_program, case, order) for order in ORDERS)
    monkeypatch.setenv("FAULT", str(list(FAULTS).index(fault)))
    assert any(is_found(faulty_program, case, order) for order in ORDERS)


def is_found(program: Path, case: Case, order: str) -> bool:
    inputs = make_inputs(case)
    done = run(program, encode_all([case], [inputs]), order)
    if done.returncode != 0:
        return True
    try:
        output = Unpacker(program.with_suffix(".out").read_bytes())
        assert output.number() == 0
        check(case, inputs, output)
    except AssertionError:
        return True
    return False
