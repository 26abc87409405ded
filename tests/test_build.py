"""The decision of the build and its flags, on faked toolkits and environments, its record, and the text of `info`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import build_decision
from build_decision import BuildError, Decision, Toolkit, TorchBuild, decide
from symtele_cuda import info
from symtele_cuda.kernels import extension

ROOT = Path(__file__).resolve().parents[1]

CPU_TORCH = TorchBuild("2.13.0+cpu", None)
CUDA_TORCH = TorchBuild("2.15.0+cu132", "13.2")
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
TOOLKIT = Toolkit("/opt/cuda", "13.0", ARCHITECTURES)
CUTLASS = Path("/opt/cutlass/include")

NVCC = """#!/bin/sh
case "$1" in
    --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
    --list-gpu-arch) printf 'compute_80\\ncompute_90\\ncompute_120\\n' ;;
    --dryrun) echo "#$ TOP={home}/bin/.." >&2 ;;
    -std=*) for last; do :; done; : > "$last" ;;
esac
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def fake_toolkit(home: Path, version: str = "13.0") -> Path:
    """A folder that looks like a CUDA toolkit to who looks."""
    script(home / "bin" / "nvcc", NVCC.format(version=version, home=home))
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    return home


def find_toolkit(environ: dict[str, str], torch_build: TorchBuild = CUDA_TORCH) -> Toolkit | None:
    return build_decision.find_toolkit(environ, torch_build)


@pytest.fixture
def no_other_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hides the toolkits of the machine that runs the test."""
    monkeypatch.setattr(build_decision, "USUAL_HOME", tmp_path / "absent")
    monkeypatch.setattr(build_decision, "pip_homes", lambda search_path: [])


# --- the outcome ------------------------------------------------------------------------------------------------------


def test_everything_present_builds_the_kernels() -> None:
    decision = decide({}, CUDA_TORCH, TOOLKIT, CUTLASS)
    assert decision == Decision(
        outcome="cuda",
        reason="torch, the CUDA toolkit and CUTLASS are there and fit",
        torch="2.15.0+cu132",
        cuda="13.2",
        toolkit="/opt/cuda",
        toolkit_version="13.0",
        cutlass="/opt/cutlass/include",
        architectures=("8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"),
    )


PIP_TOOLKIT = 'pip install "nvidia-cuda-nvcc==13.2.*" "nvidia-nvvm==13.2.*" "nvidia-cuda-crt==13.2.*" nvidia-cuda-cccl'

# Everything that keeps the kernels from being built: environment, torch, toolkit, CUTLASS, and words of the reason.
OBSTACLES = {
    "no torch": (
        {},
        None,
        TOOLKIT,
        CUTLASS,
        ["torch cannot be imported", "pip install --no-deps nvidia-cutlass", "pip install --no-build-isolation ."],
    ),
    "CPU torch": ({}, CPU_TORCH, TOOLKIT, CUTLASS, ["torch 2.13.0+cpu is a build without CUDA"]),
    "no toolkit": ({}, CUDA_TORCH, None, CUTLASS, ["no CUDA toolkit was found", "set CUDA_HOME", PIP_TOOLKIT]),
    "wrong CUDA_HOME": ({"CUDA_HOME": "/x"}, CUDA_TORCH, None, CUTLASS, ["CUDA_HOME=/x holds no CUDA toolkit"]),
    "other major": (
        {},
        CUDA_TORCH,
        Toolkit("/opt/old", "12.8", ARCHITECTURES),
        CUTLASS,
        ["CUDA 13.2", "/opt/old is CUDA 12.8", "set CUDA_HOME to a toolkit of CUDA 13", PIP_TOOLKIT],
    ),
    "broken toolkit": (
        {},
        CUDA_TORCH,
        dataclasses.replace(TOOLKIT, fault="cicc: not found"),
        CUTLASS,
        ["CUDA 13.0 toolkit at /opt/cuda does not compile (cicc: not found)", "host compiler", PIP_TOOLKIT],
    ),
    "no CUTLASS": ({}, CUDA_TORCH, TOOLKIT, None, ["run pip install --no-deps nvidia-cutlass", "set CUTLASS_HOME"]),
    "wrong CUTLASS_HOME": ({"CUTLASS_HOME": "/x"}, CUDA_TORCH, TOOLKIT, None, ["CUTLASS_HOME=/x holds no CUTLASS"]),
    "neither toolkit nor CUTLASS": (
        {},
        CUDA_TORCH,
        None,
        None,
        ["no CUDA toolkit was found", "besides, the headers of CUTLASS were not found"],
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_an_obstacle_means_pure_python_and_says_why(name: str) -> None:
    environ, torch_build, toolkit, cutlass, words = OBSTACLES[name]
    decision = decide(environ, torch_build, toolkit, cutlass)
    assert (decision.outcome, decision.architectures) == ("python", ())
    assert all(word in decision.reason for word in words), decision.reason


@pytest.mark.parametrize("name", OBSTACLES)
def test_force_cuda_turns_an_obstacle_into_an_error(name: str) -> None:
    environ, torch_build, toolkit, cutlass, words = OBSTACLES[name]
    with pytest.raises(BuildError, match="FORCE_CUDA is set, but") as caught:
        decide({**environ, "FORCE_CUDA": "1"}, torch_build, toolkit, cutlass)
    assert all(word in str(caught.value) for word in words), caught.value


def test_pip_is_no_way_to_a_toolkit_of_cuda_12() -> None:
    reason = decide({}, TorchBuild("2.11.0+cu128", "12.8"), None, CUTLASS).reason
    assert "no CUDA toolkit was found" in reason and "pip install" not in reason


def test_force_cuda_changes_nothing_where_the_kernels_can_be_built() -> None:
    assert decide({"FORCE_CUDA": "1"}, CUDA_TORCH, TOOLKIT, CUTLASS) == decide({}, CUDA_TORCH, TOOLKIT, CUTLASS)


def test_force_cpu_wins_over_what_is_installed() -> None:
    decision = decide({"FORCE_CPU": "1"}, CUDA_TORCH, TOOLKIT, CUTLASS)
    assert (decision.outcome, decision.architectures) == ("python", ())
    assert "FORCE_CPU" in decision.reason


@pytest.mark.parametrize("value", ["", "0"])
def test_a_switch_set_to_zero_is_off(value: str) -> None:
    assert decide({"FORCE_CPU": value, "FORCE_CUDA": "1"}, CUDA_TORCH, TOOLKIT, CUTLASS).outcome == "cuda"


def test_both_switches_are_an_error() -> None:
    with pytest.raises(BuildError, match="FORCE_CPU and FORCE_CUDA are both set"):
        decide({"FORCE_CPU": "1", "FORCE_CUDA": "1"}, CUDA_TORCH, TOOLKIT, CUTLASS)


@pytest.mark.parametrize("jobs", ["0", "many", "-1", "1.5"])
def test_a_max_jobs_that_bounds_nothing_is_an_error(jobs: str) -> None:
    with pytest.raises(BuildError, match=f"MAX_JOBS must be a whole number from 1 on, got '{jobs}'"):
        decide({"MAX_JOBS": jobs}, CUDA_TORCH, TOOLKIT, CUTLASS)
    assert decide({"MAX_JOBS": jobs}, CPU_TORCH, TOOLKIT, CUTLASS).outcome == "python"
    assert decide({"MAX_JOBS": "2"}, CUDA_TORCH, TOOLKIT, CUTLASS).outcome == "cuda"


# --- architectures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0", ("8.0",)),
        ("8.0;9.0a", ("8.0", "9.0a")),
        (" 8.0 12.0+PTX ; ", ("8.0", "12.0+PTX")),
        ("Ampere;8.0", ("8.0", "8.6+PTX")),
        ("Hopper", ("9.0+PTX",)),
        ("", ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")),
    ],
)
def test_architecture_list_is_honoured(text: str, expected: tuple[str, ...]) -> None:
    assert decide({"TORCH_CUDA_ARCH_LIST": text}, CUDA_TORCH, TOOLKIT, CUTLASS).architectures == expected


@pytest.mark.parametrize("entry", ["sm_80", "8", "8.0+ptx", "hopper", "8,0", "8.0x"])
def test_a_malformed_architecture_is_named(entry: str) -> None:
    with pytest.raises(BuildError, match=r"TORCH_CUDA_ARCH_LIST must hold entries such as 8\.0") as caught:
        decide({"TORCH_CUDA_ARCH_LIST": f"9.0;{entry}"}, CUDA_TORCH, TOOLKIT, CUTLASS)
    assert repr(entry) in str(caught.value)


def test_an_architecture_that_the_toolkit_does_not_know_is_named() -> None:
    with pytest.raises(BuildError, match=r"asks for 5.0 13.5a\+PTX, but the CUDA 13.0 toolkit at /opt/cuda knows only"):
        decide({"TORCH_CUDA_ARCH_LIST": "5.0 8.0 13.5a+PTX"}, CUDA_TORCH, TOOLKIT, CUTLASS)


def test_the_default_list_goes_as_far_as_the_toolkit() -> None:
    older = dataclasses.replace(TOOLKIT, architectures=("7.5", "8.0", "9.0"))
    assert decide({}, CUDA_TORCH, older, CUTLASS).architectures == ("8.0", "9.0+PTX")


def test_an_architecture_older_than_the_kernels_is_refused() -> None:
    with pytest.raises(BuildError, match=r"asks for 7\.5, but the kernels need 8\.0 or newer"):
        build_decision.select_architectures({"TORCH_CUDA_ARCH_LIST": "7.5;8.0"}, TOOLKIT)


def test_a_toolkit_without_any_default_architecture_is_an_error() -> None:
    oldest = dataclasses.replace(TOOLKIT, architectures=("7.0", "7.5"))
    with pytest.raises(BuildError, match=r"knows none of 8\.0"):
        decide({}, CUDA_TORCH, oldest, CUTLASS)


def test_the_list_is_not_read_where_nothing_can_be_compiled() -> None:
    assert decide({"TORCH_CUDA_ARCH_LIST": "nonsense"}, CPU_TORCH, TOOLKIT, CUTLASS).architectures == ()


def test_flags_for_machine_code_and_for_ptx() -> None:
    assert build_decision.gencode_flags(("8.0", "9.0a", "10.3", "12.0+PTX")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_103,code=sm_103",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.parametrize(
    ("entry", "runs", "does_not"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("9.0+PTX", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        ("9.0a", [(9, 0)], [(9, 1), (10, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
        ("10.0f+PTX", [(10, 0), (10, 3)], [(12, 0), (9, 0)]),
    ],
)
def test_which_devices_run_the_code_of_an_entry(
    entry: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    assert all(extension.runs_on(entry, capability) for capability in runs)
    assert not any(extension.runs_on(entry, capability) for capability in does_not)


def test_the_flags_of_the_compilers(tmp_path: Path) -> None:
    headers = tmp_path / "nvidia" / "cu13" / "include"
    headers.mkdir(parents=True)
    flags = build_decision.compiler_arguments(decide({}, CUDA_TORCH, TOOLKIT, CUTLASS), [str(tmp_path)])
    assert flags["cxx"][-2:] == ["-isystem", str(headers)]
    assert str(headers) not in flags["nvcc"]
    assert "-isystem /opt/cutlass/include -gencode=arch=compute_80,code=sm_80" in " ".join(flags["nvcc"])
    assert {"-DNDEBUG", "-lineinfo"} <= set(flags["nvcc"])
    for compiler, visibility in (("cxx", "-fvisibility=hidden"), ("nvcc", "-Xcompiler=-fvisibility=hidden")):
        assert visibility in flags[compiler]
        assert not any("fast" in flag or flag.startswith("-std") for flag in flags[compiler])


# --- the toolkit ------------------------------------------------------------------------------------------------------


def test_cuda_home_is_the_only_candidate_where_it_is_set(tmp_path: Path) -> None:
    wanted, other = fake_toolkit(tmp_path / "wanted", "13.1"), fake_toolkit(tmp_path / "other")
    found = find_toolkit({"CUDA_HOME": str(wanted), "PATH": str(other / "bin")})
    assert found == Toolkit(str(wanted), "13.1", ("8.0", "9.0", "12.0"))
    assert find_toolkit({"CUDA_HOME": str(tmp_path), "PATH": str(other / "bin")}) is None


@pytest.mark.usefixtures("no_other_toolkit")
def test_a_wrapper_on_the_path_leads_to_the_real_toolkit(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda")
    wrapper = script(tmp_path / "usr" / "bin" / "nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    found = find_toolkit({"PATH": str(wrapper.parent)})
    assert found is not None and found.home == str(home)


@pytest.mark.usefixtures("no_other_toolkit")
def test_the_folder_above_a_wrapper_is_no_toolkit(tmp_path: Path) -> None:
    wrapper = script(tmp_path / "usr" / "bin" / "nvcc", NVCC.format(version="13.0", home=tmp_path / "gone"))
    assert find_toolkit({"PATH": str(wrapper.parent)}) is None


@pytest.mark.usefixtures("no_other_toolkit")
def test_a_link_to_nvcc_is_followed(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    text = (home / "bin" / "nvcc").read_text().replace("--dryrun", "--silent-about-its-home")
    script(home / "bin" / "nvcc", text)
    found = find_toolkit({"PATH": str(tmp_path / "bin")})
    assert found is not None and found.home == str(home)


def test_the_usual_folder_is_found_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_decision, "USUAL_HOME", fake_toolkit(tmp_path / "cuda"))
    found = find_toolkit({"PATH": str(tmp_path)})
    assert found is not None and found.home == str(tmp_path / "cuda")


def test_the_toolkit_of_pip_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = fake_toolkit(tmp_path / "nvidia" / "cu13")
    monkeypatch.setattr(build_decision, "USUAL_HOME", tmp_path / "absent")
    monkeypatch.syspath_prepend(tmp_path)
    found = find_toolkit({"PATH": str(tmp_path)})
    assert found is not None and found.home == str(home)


@pytest.mark.parametrize("broken", ["#!/bin/sh\nexit 1\n", "not a program", "#!/absent/interpreter\n"])
def test_an_nvcc_that_does_not_run_is_no_toolkit(tmp_path: Path, broken: str) -> None:
    script(fake_toolkit(tmp_path / "cuda") / "bin" / "nvcc", broken)
    assert build_decision.inspect_toolkit(tmp_path / "cuda") is None


@pytest.mark.usefixtures("no_other_toolkit")
def test_a_toolkit_that_compiles_goes_before_one_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, sound = fake_toolkit(tmp_path / "broken"), fake_toolkit(tmp_path / "sound")
    says = "-std=*) echo 'sh: 1: cicc: not found' >&2; echo more >&2 ;;"
    script(broken / "bin" / "nvcc", NVCC.format(version="13.0", home=broken).replace("-std=*)", f"{says}\n    x)"))
    environ = {"PATH": f"{broken / 'bin'}:/usr/bin:/bin"}
    found = find_toolkit(environ)
    assert found is not None and (found.home, found.fault) == (str(broken), "sh: 1: cicc: not found")

    monkeypatch.setattr(build_decision, "USUAL_HOME", sound)
    found = find_toolkit(environ)
    assert found is not None and (found.home, found.fault) == (str(sound), None)
    found = find_toolkit({**environ, "CUDA_HOME": str(broken)})
    assert found is not None and found.fault


@pytest.mark.usefixtures("no_other_toolkit")
def test_a_toolkit_that_fits_torch_goes_before_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = fake_toolkit(tmp_path / "old", "12.8"), fake_toolkit(tmp_path / "new", "13.0")
    environ = {"PATH": f"{old / 'bin'}:/usr/bin:/bin"}
    found = find_toolkit(environ)
    assert found is not None and found.version == "12.8"

    monkeypatch.setattr(build_decision, "pip_homes", lambda search_path: [new])
    for torch_build, version in ((CUDA_TORCH, "13.0"), (TorchBuild("2.11.0+cu128", "12.8"), "12.8")):
        found = find_toolkit(environ, torch_build)
        assert found is not None and found.version == version


def test_the_host_compiler_is_that_of_torch(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda")
    text = NVCC.format(version="13.0", home=home).replace("-std=*)", '-std=*) echo "error: $2 $3" >&2 ;;\n    x)')
    script(home / "bin" / "nvcc", text)
    found = find_toolkit({"CUDA_HOME": str(home), "CC": "gcc-13"})
    assert found is not None and found.fault == "error: -ccbin gcc-13"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["lib64/libcudart.so", "lib64/libcudart.so.13"], "cudart"),
        (["lib/libcudart.so.13"], ":libcudart.so.13"),
        ([], "cudart"),
    ],
)
def test_the_name_of_the_runtime_library(tmp_path: Path, files: list[str], expected: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert build_decision.runtime_library(tmp_path) == expected


# --- CUTLASS ----------------------------------------------------------------------------------------------------------


def fake_cutlass(include: Path) -> Path:
    (include / "cutlass").mkdir(parents=True)
    (include / "cutlass" / "cutlass.h").touch()
    return include


def test_cutlass_of_pip_is_found(tmp_path: Path) -> None:
    include = fake_cutlass(tmp_path / "cutlass_library" / "source" / "include")
    assert build_decision.find_cutlass({}, ["/absent", str(tmp_path)]) == include
    assert build_decision.find_cutlass({}, ["/absent"]) is None


def test_cutlass_home_is_the_only_candidate_where_it_is_set(tmp_path: Path) -> None:
    include = fake_cutlass(tmp_path / "wanted" / "include")
    fake_cutlass(tmp_path / "cutlass_library" / "source" / "include")
    assert build_decision.find_cutlass({"CUTLASS_HOME": str(tmp_path / "wanted")}, [str(tmp_path)]) == include
    assert build_decision.find_cutlass({"CUTLASS_HOME": "/absent"}, [str(tmp_path)]) is None


# --- torch, the record and setup.py -----------------------------------------------------------------------------------


def test_the_torch_of_this_interpreter_is_found() -> None:
    assert build_decision.find_torch() == TorchBuild(torch.__version__, torch.version.cuda)


def test_a_torch_that_does_not_load_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    assert build_decision.find_torch() is None


def test_a_missing_torch_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert build_decision.find_torch() is None


def test_the_record_holds_what_the_installed_package_reads() -> None:
    decision = decide({}, CUDA_TORCH, TOOLKIT, CUTLASS)
    record = extension.BuildRecord(**json.loads(decision.to_json()))
    assert record.text == str(decision)
    for name in ("outcome", "reason", "torch", "cuda", "toolkit"):
        assert getattr(record, name) == getattr(decision, name)
    assert tuple(record.architectures) == decision.architectures
    assert extension.NO_ISOLATION_COMMAND == build_decision.NO_ISOLATION_COMMAND


def run_setup(out: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_py` of this checkout, with everything that it writes under `out`."""
    pytest.importorskip("setuptools")
    command = ["setup.py", "--quiet", "egg_info", "--egg-base", str(out), "build_py", "--build-lib", str(out)]
    clean = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", **environ}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=clean, capture_output=True, text=True, check=False)


def test_setup_prints_the_decision_and_records_it(tmp_path: Path) -> None:
    done = run_setup(tmp_path, FORCE_CPU="1")
    assert done.returncode == 0, done.stderr
    record = extension.BuildRecord(**json.loads((tmp_path / "symtele_cuda" / "_build.json").read_text()))
    assert (record.outcome, record.torch) == ("python", torch.__version__)
    assert record.text in done.stdout


def test_setup_stops_with_one_line_where_the_environment_contradicts_itself(tmp_path: Path) -> None:
    done = run_setup(tmp_path, FORCE_CPU="1", FORCE_CUDA="1")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "symtele_cuda: FORCE_CPU and FORCE_CUDA are both set: unset one of them"
    assert not (tmp_path / "symtele_cuda").exists()


def test_a_compiler_that_fails_is_told_of_max_jobs(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    if torch.version.cuda is None:
        pytest.skip("torch compiles CUDA sources only where it is a build with CUDA")
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "_build.json", "_kernels.so")
    shutil.copytree(ROOT / "symtele_cuda", checkout / "symtele_cuda", ignore=ignored)
    for name in ("setup.py", "build_decision.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    (checkout / "csrc").mkdir()
    (checkout / "csrc" / "one.cu").touch()

    home = fake_toolkit(tmp_path / "cuda", torch.version.cuda)
    killed = '#!/bin/sh\ncase "$*" in *one.cu*) echo Killed; exit 1 ;; esac\n'
    script(home / "bin" / "nvcc", (home / "bin" / "nvcc").read_text().replace("#!/bin/sh\n", killed))
    fake_cutlass(tmp_path / "cutlass" / "include")
    environ = {
        "PATH": "/usr/bin:/bin",
        "CUDA_HOME": str(home),
        "CUTLASS_HOME": str(tmp_path / "cutlass"),
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "9.0",
    }
    command = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(command, cwd=checkout, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Killed" in done.stdout, done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert "the kernels could not be compiled" in last and "try again with MAX_JOBS=1" in last, done.stderr


# --- info -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the package looks for the record and the library of its build: an empty folder."""
    monkeypatch.setattr(extension, "RECORD", tmp_path / "_build.json")
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_kernels.so")
    extension.unavailable_reason.cache_clear()
    yield tmp_path / "_build.json"
    extension.unavailable_reason.cache_clear()


def test_info_of_a_source_tree_says_so(record: Path) -> None:
    assert info.build_record() is None
    text = info.describe()
    assert "source tree of symtele_cuda that was not installed" in text
    assert "pip install --no-build-isolation ." in text


def test_info_tells_the_record(record: Path) -> None:
    decision = decide({}, dataclasses.replace(CPU_TORCH, version=torch.__version__), TOOLKIT, CUTLASS)
    record.write_text(decision.to_json())
    assert info.build_record() == extension.BuildRecord(**json.loads(decision.to_json()))
    assert str(decision) in info.describe()
    assert "torch is now" not in info.describe()


def test_info_names_the_built_architectures_and_why_the_kernels_do_not_load(record: Path) -> None:
    record.write_text(decide({}, CUDA_TORCH, TOOLKIT, CUTLASS).to_json())
    text = info.describe()
    assert "architectures:  8.0 8.6 8.9 9.0 10.0 12.0+PTX" in text
    assert "2.15.0+cu132 (CUDA 13.2)" in text
    assert f"CUDA kernels:   the build of symtele_cuda did not finish, {extension.LIBRARY} is missing" in text


def test_info_notices_another_torch_than_that_of_the_build(record: Path) -> None:
    record.write_text(decide({}, TorchBuild("1.0", None), TOOLKIT, CUTLASS).to_json())
    text = info.describe()
    assert "1.0 (no CUDA)" in text and f"torch is now {torch.__version__}" in text


def test_info_says_of_a_device_whether_the_kernels_run_on_it(record: Path) -> None:
    record.write_text(decide({"TORCH_CUDA_ARCH_LIST": "8.0"}, CUDA_TORCH, TOOLKIT, CUTLASS).to_json())
    assert info.kernels_on((9, 0)) == ""  # without a library the line on the kernels says it all
    extension.LIBRARY.touch()
    assert info.kernels_on((8, 6)) == ""
    assert 'TORCH_CUDA_ARCH_LIST="9.0"' in info.kernels_on((9, 0))


def test_info_names_what_results_depend_on() -> None:
    text = info.describe()
    for line in (
        f"torch           {torch.__version__}",
        "float32 matmul: float32",
        f"CPU threads:    {torch.get_num_threads()}",
        "CUDA device",
    ):
        assert line in text
