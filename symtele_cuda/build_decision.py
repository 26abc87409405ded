"""What a build of this package compiles, and why: CUDA kernels, or nothing.

`setup.py` loads this file by its path, before the package or its dependencies are installed, and writes the decision
into the package (`_build.json`); `symtele_cuda.info` reads it back. So nothing but the standard library is imported
here, and torch only inside `find_torch`.

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
from collections.abc import Iterable, Mapping, Sequence
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


class BuildError(RuntimeError):
    """What the environment asks of the build cannot be done."""


@dataclass(frozen=True)
class TorchBuild:
    """The torch that the build sees: its version and the CUDA it was built with (None for a build without CUDA)."""

    version: str
    cuda: str | None


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its folder, its version ("13.0") and the architectures its nvcc knows ("8.0", "9.0", ...)."""

    home: str
    version: str
    architectures: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """The outcome, "cuda" or "python", the reason in words, and what was seen when it was taken.

    `architectures`, in the notation of TORCH_CUDA_ARCH_LIST, are those that the kernels are compiled for, or would be
    if there were any sources; empty where none can be compiled.
    """

    outcome: str
    reason: str
    torch: str | None
    cuda: str | None
    toolkit: str | None
    toolkit_version: str | None
    architectures: tuple[str, ...]

    def __str__(self) -> str:
        title = {"cuda": "with CUDA kernels", "python": "pure Python, nothing is compiled"}[self.outcome]
        torch = f"{self.torch} ({f'CUDA {self.cuda}' if self.cuda else 'no CUDA'})" if self.torch else "not seen"
        architectures = " ".join(self.architectures) or "none"
        unused = " (nothing was compiled for them)" if self.architectures and self.outcome == "python" else ""
        toolkit = f"{self.toolkit} (CUDA {self.toolkit_version})" if self.toolkit else "not found"
        return "\n".join(
            [
                f"build:          {title}",
                f"reason:         {self.reason}",
                f"torch:          {torch}",
                f"CUDA toolkit:   {toolkit}",
                f"architectures:  {architectures}{unused}",
            ]
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Decision:
        fields = json.loads(text)
        return cls(**{**fields, "architectures": tuple(fields["architectures"])})


def decide_here(root: Path) -> Decision:
    """The decision for the source tree at `root`, in this process's environment."""
    sources = sorted((root / "csrc").glob("**/*.cu"))
    return decide(os.environ, find_torch(), find_toolkit(os.environ), sources)


def decide(
    environ: Mapping[str, str], torch: TorchBuild | None, toolkit: Toolkit | None, sources: Sequence[Path]
) -> Decision:
    """What to build from `sources` with this torch and this toolkit.

    FORCE_CPU=1 asks for the pure Python package. FORCE_CUDA=1 turns every reason not to compile the kernels into a
    BuildError. TORCH_CUDA_ARCH_LIST replaces the default architectures; it is an error if it cannot be honoured.
    """
    force_cpu, force_cuda = is_on(environ, "FORCE_CPU"), is_on(environ, "FORCE_CUDA")
    if force_cpu and force_cuda:
        raise BuildError("FORCE_CPU and FORCE_CUDA are both set: unset one of them")

    forced = "FORCE_CPU is set: unset it and install again for CUDA kernels" if force_cpu else None
    compiler_obstacle = forced or torch_obstacle(torch) or toolkit_obstacle(environ, torch, toolkit)
    architectures = () if compiler_obstacle or not toolkit else select_architectures(environ, toolkit)
    obstacle = "; besides, ".join(filter(None, [sources_obstacle(sources), compiler_obstacle]))
    if obstacle and force_cuda:
        raise BuildError(f"FORCE_CUDA is set, but {obstacle}")

    return Decision(
        outcome="python" if obstacle else "cuda",
        reason=obstacle or f"torch and the CUDA toolkit fit, and csrc/ holds {len(sources)} CUDA sources",
        torch=torch.version if torch else None,
        cuda=torch.cuda if torch else None,
        toolkit=toolkit.home if toolkit else None,
        toolkit_version=toolkit.version if toolkit else None,
        architectures=architectures,
    )


def is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "") not in ("", "0")


def sources_obstacle(sources: Sequence[Path]) -> str | None:
    return None if sources else "this version has no CUDA sources (csrc/*.cu), it computes with torch's own operations"


def torch_obstacle(torch: TorchBuild | None) -> str | None:
    """Why kernels cannot be compiled against this torch."""
    if torch is None:
        return (
            "torch cannot be imported by this build (by default pip builds in an environment of its own, without "
            "torch). For CUDA kernels install torch, setuptools, ninja and pybind11 first, then run: "
            + NO_ISOLATION_COMMAND
        )
    if torch.cuda is None:
        return f"torch {torch.version} is a build without CUDA: install a CUDA build of torch, then this package again"
    return None


def toolkit_obstacle(environ: Mapping[str, str], torch: TorchBuild | None, toolkit: Toolkit | None) -> str | None:
    """Why kernels for this torch cannot be compiled with this toolkit."""
    if toolkit is None and environ.get("CUDA_HOME"):
        return f"CUDA_HOME={environ['CUDA_HOME']} holds no CUDA toolkit (a working bin/nvcc and include/cuda_runtime.h)"
    if toolkit is None:
        return (
            "no CUDA toolkit was found (looked for nvcc on the PATH, in /usr/local/cuda and in pip's nvidia packages): "
            "install one or set CUDA_HOME"
        )
    if torch and torch.cuda and major(torch.cuda) != major(toolkit.version):
        return (
            f"torch {torch.version} was built with CUDA {torch.cuda}, but the toolkit at {toolkit.home} is CUDA "
            f"{toolkit.version}: set CUDA_HOME to a toolkit of CUDA {major(torch.cuda)}"
        )
    return None


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


# --- what is installed -----------------------------------------------------------------------------------------------


def find_torch() -> TorchBuild | None:
    """The torch that this interpreter imports, None if it has none."""
    try:
        import torch
    except ImportError:
        return None
    return TorchBuild(str(torch.__version__), torch.version.cuda)


def find_toolkit(environ: Mapping[str, str]) -> Toolkit | None:
    """The first candidate that is a toolkit. CUDA_HOME, where set, is the only one: no other is taken silently."""
    if environ.get("CUDA_HOME"):
        return inspect_toolkit(Path(environ["CUDA_HOME"]))
    candidates = (*homes_of_nvcc(shutil.which("nvcc", path=environ.get("PATH"))), USUAL_HOME, *pip_homes(sys.path))
    return next(filter(None, map(inspect_toolkit, candidates)), None)


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


def inspect_toolkit(home: Path) -> Toolkit | None:
    """The toolkit in the folder `home`, None if it holds no nvcc that runs or no headers."""
    nvcc = shutil.which("nvcc", path=str(home / "bin"))
    if nvcc is None or not (home / "include" / "cuda_runtime.h").is_file():
        return None
    release = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    known = re.findall(r"compute_(\d+)(\d)\b", output_of(nvcc, "--list-gpu-arch"))
    if not release or not known:
        return None
    return Toolkit(str(home.resolve()), release[1], tuple(f"{tens}.{ones}" for tens, ones in known))


def output_of(*command: str) -> str:
    """What the command prints on both streams; empty if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
