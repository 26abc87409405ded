"""The build: decide what to compile, say it, record it in the package, and compile it.

Everything static is in pyproject.toml.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "symtele_cuda"


sys.path.insert(0, str(ROOT))  # pip's builds do not have it there
import build_decision  # noqa: E402

try:
    decision = build_decision.decide_here()
except build_decision.BuildError as error:
    raise SystemExit(f"{PACKAGE}: {error}") from None


class BuildWithRecord(build_py):
    """Copies the package and adds `_build.json`, the decision as `python -m symtele_cuda info` reads it back."""

    def run(self) -> None:
        print(f"{PACKAGE} is built as follows\n{decision}", flush=True)
        super().run()
        folder = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
        (folder / "_build.json").write_text(decision.to_json())


def setup_of_kernels() -> dict[str, Any]:
    """What `setup` must be told to compile csrc/ into symtele_cuda/_kernels.so.

    It is a plain shared library that registers operators with torch when it is loaded, and no module of Python: it
    depends on torch's version, but not on Python's.
    """
    os.environ["CUDA_HOME"] = decision.toolkit  # cpp_extension reads it when it is imported, and guesses without it
    # ninja lies beside the interpreter, which may run without its environment being activated.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    class BuildKernels(BuildExtension):
        """torch's build, with objects that an editable installation finds again and a word on what may have failed."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, no_python_abi_suffix=True, **kwargs)

        def initialize_options(self) -> None:
            super().initialize_options()
            self.build_temp = str(ROOT / "build" / f"kernels-torch-{decision.torch}")

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                raise SystemExit(
                    f"{error}\n{PACKAGE}: the kernels could not be compiled, see above. If a compiler was killed, "
                    "memory ran out: try again with MAX_JOBS=1. FORCE_CPU=1 installs without kernels."
                ) from error

    sources = [*ROOT.glob("csrc/*.cu"), *ROOT.glob("csrc/*.cpp")]
    headers = [*ROOT.glob("csrc/*.cuh"), *ROOT.glob("csrc/*.h")]
    kernels = CUDAExtension(
        f"{PACKAGE}._kernels",
        sources=sorted(str(path.relative_to(ROOT)) for path in sources),
        depends=sorted(str(path.relative_to(ROOT)) for path in headers),
        extra_compile_args=build_decision.compiler_arguments(decision, sys.path),
        extra_link_args=["-Wl,--no-undefined"],
        py_limited_api=True,
    )
    runtime = build_decision.runtime_library(Path(decision.toolkit))
    kernels.libraries = [runtime if name == "cudart" else name for name in kernels.libraries]
    return {
        "ext_modules": [kernels],
        "cmdclass": {"build_ext": BuildKernels},
        # Free-threaded Pythons have no stable ABI, so setuptools refuses to promise it there.
        "options": {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


arguments = setup_of_kernels() if decision.outcome == "cuda" else {}
setup(**{**arguments, "cmdclass": {**arguments.get("cmdclass", {}), "build_py": BuildWithRecord}})
