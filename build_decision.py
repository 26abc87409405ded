"""What a build of this package compiles, and why: CUDA kernels, or nothing.

`setup.py` imports this file before the package or its dependencies are installed, and writes the decision into the
package (`_build.json`), where `symtele_cuda.kernels.extension` reads it. So nothing but the standard library is
imported here, and torch only inside `find_torch`.

The decision follows from torch's CUDA version, the CUDA toolkit and the environment, never from a visible device:
images are often built on machines without one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

# The names that torch accepts in TORCH_CUDA_ARCH_LIST, for the architectures that its present versions support.
NAMED_ARCHITECTURES = {
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}

USUAL_HOME = Path("/usr/local/cuda")

NO_ISOLATION_COMMAND = "pip install --no-build-isolation ."

# Without its dependencies: they are those of CUTLASS's Python interface, of which only the headers are used.
CUTLASS_COMMAND = "pip install --no-deps nvidia-cutlass"

# What a toolkit must be able to compile: CUTLASS includes the headers in cuda/std, a package of their own at pip's.
PROBE = """
#include <cuda_runtime.h>
#include <cuda/std/utility>
__global__ void probe() {}
"""


class BuildError(RuntimeError):
    """What the environment asks of the build cannot be done."""


@dataclass(frozen=True)
class TorchBuild:
    """The torch that the build sees: its version and the CUDA it was built with (None for a build without CUDA)."""

    version: str
    cuda: str | None


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its folder, its version ("13.0") and the architectures its nvcc knows ("8.0", "9.0", ...).

    `fault` is what its nvcc says where it cannot compile an empty kernel.
    """

    home: str
    version: str
    architectures: tuple[str, ...]
    fault: str | None = None


@dataclass(frozen=True)
class Decision:
    """The outcome, "cuda" or "python", the reason in words, and what was seen when it was taken.

    `architectures`, in the notation of TORCH_CUDA_ARCH_LIST, are those that the kernels are compiled for.
    """

    outcome: str
    reason: str
    torch: str | None
    cuda: str | None
    toolkit: str | None
    toolkit_version: str | None
    cutlass: str | None
    architectures: tuple[str, ...]

    def __str__(self) -> str:
        title = {"cuda": "with CUDA kernels", "python": "pure Python, nothing is compiled"}[self.outcome]
        torch = f"{self.torch} ({f'CUDA {self.cuda}' if self.cuda else 'no CUDA'})" if self.torch else "not seen"
        architectures = " ".join(self.architectures) or "none"
        toolkit = f"{self.toolkit} (CUDA {self.toolkit_version})" if self.toolkit else "not found"
        return "\n".join(
            [
                f"build:          {title}",
                f"reason:         {self.reason}",
                f"torch:          {torch}",
                f"CUDA toolkit:   {toolkit}",
                f"CUTLASS:        {self.cutlass or 'not found'}",
                f"architectures:  {architectures}",
            ]
        )

    def to_json(self) -> str:
        """The record of the build: what `symtele_cuda.kernels.extension.BuildRecord` holds."""
        fields = asdict(self)
        del fields["toolkit_version"], fields["cutlass"]  # `text` alone says them
        return json.dumps({**fields, "text": str(self)}, indent=2) + "\n"


def decide_here() -> Decision:
    """The decision in this process's environment."""
    torch = find_torch()
    return decide(os.environ, torch, find_toolkit(os.environ, torch), find_cutlass(os.environ, sys.path))


def decide(
    environ: Mapping[str, str], torch: TorchBuild | None, toolkit: Toolkit | None, cutlass: Path | None
) -> Decision:
    """What to build with this torch, this toolkit and the CUTLASS headers in the folder `cutlass`.

    FORCE_CPU=1 asks for the pure Python package. FORCE_CUDA=1 turns every reason not to compile the kernels into a
    BuildError. TORCH_CUDA_ARCH_LIST replaces the default architectures; it is an error if it cannot be honoured.
    """
    force_cpu, force_cuda = is_on(environ, "FORCE_CPU"), is_on(environ, "FORCE_CUDA")
    if force_cpu and force_cuda:
        raise BuildError("FORCE_CPU and FORCE_CUDA are both set: unset one of them")

    forced = "FORCE_CPU is set: unset it and install again for CUDA kernels" if force_cpu else None
    obstacle = forced or torch_obstacle(torch) or compiler_obstacle(environ, torch, toolkit, cutlass)
    if obstacle and force_cuda:
        raise BuildError(f"FORCE_CUDA is set, but {obstacle}")
    if not obstacle:
        check_max_jobs(environ)

    return Decision(
        outcome="python" if obstacle else "cuda",
        reason=obstacle or "torch, the CUDA toolkit and CUTLASS are there and fit",
        torch=torch.version if torch else None,
        cuda=torch.cuda if torch else None,
        toolkit=toolkit.home if toolkit else None,
        toolkit_version=toolkit.version if toolkit else None,
        cutlass=str(cutlass) if cutlass else None,
        architectures=() if obstacle or not toolkit else select_architectures(environ, toolkit),
    )


def is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "") not in ("", "0")


def torch_obstacle(torch: TorchBuild | None) -> str | None:
    """Why kernels cannot be compiled against this torch."""
    if torch is None:
        return (
            "torch cannot be imported by this build (by default pip builds in an environment of its own, without "
            f"torch). For CUDA kernels install torch, setuptools and ninja first, run {CUTLASS_COMMAND}, then: "
            f"{NO_ISOLATION_COMMAND}"
        )
    if torch.cuda is None:
        return f"torch {torch.version} is a build without CUDA: install a CUDA build of torch, then this package again"
    return None


def compiler_obstacle(
    environ: Mapping[str, str], torch: TorchBuild | None, toolkit: Toolkit | None, cutlass: Path | None
) -> str | None:
    """Everything beside torch that keeps the kernels from being compiled."""
    obstacles = [toolkit_obstacle(environ, torch, toolkit), cutlass_obstacle(environ, cutlass)]
    return "; besides, ".join(filter(None, obstacles)) or None


def toolkit_obstacle(environ: Mapping[str, str], torch: TorchBuild | None, toolkit: Toolkit | None) -> str | None:
    """Why kernels for this torch cannot be compiled with this toolkit."""
    advice = pip_toolkit_advice(torch)
    if toolkit is None and environ.get("CUDA_HOME"):
        return f"CUDA_HOME={environ['CUDA_HOME']} holds no CUDA toolkit (a working bin/nvcc and include/cuda_runtime.h)"
    if toolkit is None:
        return (
            "no CUDA toolkit was found (looked for nvcc on the PATH, in /usr/local/cuda and in pip's nvidia packages): "
            f"install one, set CUDA_HOME{advice}"
        )
    if torch and torch.cuda and major(torch.cuda) != major(toolkit.version):
        return (
            f"torch {torch.version} was built with CUDA {torch.cuda}, but the toolkit at {toolkit.home} is CUDA "
            f"{toolkit.version}: set CUDA_HOME to a toolkit of CUDA {major(torch.cuda)}{advice}"
        )
    if toolkit.fault:
        return (
            f"the CUDA {toolkit.version} toolkit at {toolkit.home} does not compile ({toolkit.fault}). It needs its "
            "parts in one version and a host compiler that it supports, gcc or what CC names: mend it, set CUDA_HOME "
            f"to another{advice}"
        )
    return None


def pip_toolkit_advice(torch: TorchBuild | None) -> str:
    """The last of the ways to a toolkit for torch's CUDA, from 13 on: before, pip's packages shared no folder."""
    if torch is None or torch.cuda is None or int(major(torch.cuda)) < 13:
        return ""
    packages = " ".join(f'"nvidia-{name}=={torch.cuda}.*"' for name in ("cuda-nvcc", "nvvm", "cuda-crt"))
    return f", or run pip install {packages} nvidia-cuda-cccl"


def cutlass_obstacle(environ: Mapping[str, str], cutlass: Path | None) -> str | None:
    if cutlass is not None:
        return None
    if environ.get("CUTLASS_HOME"):
        return f"CUTLASS_HOME={environ['CUTLASS_HOME']} holds no CUTLASS (no include/cutlass/cutlass.h)"
    return f"the headers of CUTLASS were not found: run {CUTLASS_COMMAND}, or set CUTLASS_HOME"


def check_max_jobs(environ: Mapping[str, str]) -> None:
    """MAX_JOBS bounds the compilers that run at once; torch ignores what is no number, and takes 0 for no bound."""
    jobs = environ.get("MAX_JOBS", "")
    if jobs and not re.fullmatch(r"0*[1-9]\d*", jobs):
        raise BuildError(f"MAX_JOBS must be a whole number from 1 on, got {jobs!r}")


def major(version: str) -> str:
    return version.split(".")[0]


# --- architectures ---------------------------------------------------------------------------------------------------


def select_architectures(environ: Mapping[str, str], toolkit: Toolkit) -> tuple[str, ...]:
    """The architectures of TORCH_CUDA_ARCH_LIST, or else those of the default list that the toolkit knows."""
    requested = parse_architectures(environ.get("TORCH_CUDA_ARCH_LIST", ""))
    unknown = [entry for entry in requested if number(entry) not in toolkit.architectures]
    if unknown:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST asks for {' '.join(unknown)}, but the CUDA {toolkit.version} toolkit at "
            f"{toolkit.home} knows only {' '.join(toolkit.architectures)}"
        )
    older = [entry for entry in requested if float(number(entry)) < float(DEFAULT_ARCHITECTURES[0])]
    if older:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST asks for {' '.join(older)}, but the kernels need {DEFAULT_ARCHITECTURES[0]} or "
            "newer: more shared memory than older devices have, and TF32"
        )
    return requested or default_architectures(toolkit)


def parse_architectures(text: str) -> tuple[str, ...]:
    """The entries of a list such as "8.0;9.0a 12.0+PTX" or "Ampere;Hopper", in the syntax that torch reads."""
    words = filter(None, re.split(r"[;\s]+", text))
    entries = [entry for word in words for entry in NAMED_ARCHITECTURES.get(word, word).split(";")]
    for entry in entries:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST must hold entries such as 8.0, 9.0a, 12.0+PTX or "
                f"{', '.join(NAMED_ARCHITECTURES)}, separated by spaces or semicolons; got {entry!r}"
            )
    return tuple(dict.fromkeys(entries))


def number(entry: str) -> str:
    """ "9.0" of "9.0a+PTX"."""
    return entry.removesuffix("+PTX").rstrip("af")


def default_architectures(toolkit: Toolkit) -> tuple[str, ...]:
    """The default list as far as the toolkit knows it; the newest also as PTX, for devices that are newer still."""
    known = [entry for entry in DEFAULT_ARCHITECTURES if entry in toolkit.architectures]
    if not known:
        raise BuildError(
            f"the CUDA {toolkit.version} toolkit at {toolkit.home} knows none of {' '.join(DEFAULT_ARCHITECTURES)}: "
            "set CUDA_HOME to a newer one, or TORCH_CUDA_ARCH_LIST, or FORCE_CPU=1"
        )
    return (*known[:-1], f"{known[-1]}+PTX")


def gencode_flags(architectures: Iterable[str]) -> list[str]:
    """nvcc's flags: machine code for every entry, and where it ends in +PTX also PTX, which newer devices compile."""
    flags = []
    for entry in architectures:
        name = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return flags


def compiler_arguments(decision: Decision, search_path: Iterable[str]) -> dict[str, list[str]]:
    """The flags of g++ and nvcc beside those that torch adds, such as the C++ standard that its headers need.

    pip's headers are for g++ alone, behind the toolkit's own: nvcc fails where it meets those of another version
    first, and no CUDA source includes torch's headers. nvcc has no --threads: its processes are bounded by MAX_JOBS.
    """
    pip_headers = [flag for folder in pip_include_folders(search_path) for flag in ("-isystem", str(folder))]
    cutlass_headers = ["-isystem", decision.cutlass] if decision.cutlass else []
    hidden = "-fvisibility=hidden"
    return {
        "cxx": ["-O3", "-g0", hidden, *pip_headers],
        "nvcc": [
            *("-O3", "-DNDEBUG", "-lineinfo", f"-Xcompiler={hidden}"),
            *cutlass_headers,
            *gencode_flags(decision.architectures),
        ],
    }


def runtime_library(home: Path) -> str:
    """What follows -l for the CUDA runtime: pip's package has a libcudart.so.13, but no libcudart.so."""
    folders = [home / "lib64", home / "lib"]
    if any((folder / "libcudart.so").exists() for folder in folders):
        return "cudart"
    versioned = [path.name for folder in folders for path in sorted(folder.glob("libcudart.so.*"))]
    return f":{versioned[0]}" if versioned else "cudart"


# --- what is installed -----------------------------------------------------------------------------------------------


def find_torch() -> TorchBuild | None:
    """The torch that this interpreter imports, None if it has none (or one whose libraries do not load)."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    return TorchBuild(str(torch.__version__), torch.version.cuda)


def find_cutlass(environ: Mapping[str, str], search_path: Iterable[str]) -> Path | None:
    """The folder of CUTLASS's headers: in CUTLASS_HOME where that is set, else in pip's package nvidia-cutlass."""
    home = environ.get("CUTLASS_HOME")
    packages = (Path(folder) / "cutlass_library" / "source" for folder in search_path)
    folders = [(root / "include").resolve() for root in ([Path(home)] if home else packages)]
    return next((folder for folder in folders if (folder / "cutlass" / "cutlass.h").is_file()), None)


def find_toolkit(environ: Mapping[str, str], torch: TorchBuild | None) -> Toolkit | None:
    """The first toolkit that can compile for this torch, or else the first at all.

    CUDA_HOME, where set, is the only candidate: no other is taken silently.
    """
    if environ.get("CUDA_HOME"):
        candidates = [Path(environ["CUDA_HOME"])]
    else:
        nvcc = shutil.which("nvcc", path=environ.get("PATH"))
        candidates = [*homes_of_nvcc(nvcc), USUAL_HOME, *pip_homes(sys.path)]
    unfit = []
    for home in candidates:
        toolkit = inspect_toolkit(home, environ.get("CC"))
        if toolkit and not toolkit_obstacle(environ, torch, toolkit):
            return toolkit
        unfit.append(toolkit)
    return next(filter(None, unfit), None)


def homes_of_nvcc(nvcc: str | None) -> list[Path]:
    """Where the toolkit of an nvcc on the PATH may lie: where it says itself, and beside it.

    That nvcc may be a script that starts the real one elsewhere, so it is asked first: its dry run prints TOP=folder.
    """
    if nvcc is None:
        return []
    said = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull), re.MULTILINE)
    return [*([Path(said[1].strip())] if said else []), Path(nvcc).resolve().parents[1]]


def pip_homes(search_path: Iterable[str]) -> list[Path]:
    """The folders nvidia/cu13 and the like that pip's packages of the toolkit share, the newest first."""
    return [home for folder in search_path for home in sorted(Path(folder).glob("nvidia/cu[0-9]*"), reverse=True)]


def pip_include_folders(search_path: Iterable[str]) -> list[Path]:
    """The headers of pip's nvidia packages: a toolkit may lack those of the libraries that torch's headers name."""
    return [include for folder in search_path for include in sorted(Path(folder).glob("nvidia/*/include"))]


def inspect_toolkit(home: Path, host_compiler: str | None = None) -> Toolkit | None:
    """The toolkit in the folder `home`, None if it holds no nvcc that runs or no headers."""
    nvcc = shutil.which("nvcc", path=str(home / "bin"))
    if nvcc is None or not (home / "include" / "cuda_runtime.h").is_file():
        return None
    release = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    known = re.findall(r"compute_(\d+)(\d)\b", output_of(nvcc, "--list-gpu-arch"))
    if not release or not known:
        return None
    architectures = tuple(f"{tens}.{ones}" for tens, ones in known)
    return Toolkit(str(home.resolve()), release[1], architectures, fault_of(nvcc, host_compiler))


def fault_of(nvcc: str, host_compiler: str | None) -> str | None:
    """What nvcc says of the first error when it compiles an empty kernel, None if it can.

    It cannot without a host compiler that it supports, and not with parts of several versions, as pip installs them
    unless told which.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "probe.cu", Path(folder) / "probe.o"
        source.write_text(PROBE)
        host = ["-ccbin", host_compiler] if host_compiler else []
        said = output_of(nvcc, "-std=c++17", *host, "-c", str(source), "-o", str(result))
        if result.is_file():
            return None
    lines = said.splitlines() or ["nvcc says nothing"]
    return next((line for line in lines if "error" in line.lower() or "not found" in line), lines[-1]).strip()


def output_of(*command: str) -> str:
    """What the command prints on both streams; empty if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
