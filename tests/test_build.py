"""The decision of the build, on faked toolkits and environments, its record in the package, and the text of `info`."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from symtele_cuda import build_decision, info
from symtele_cuda.build_decision import BuildError, Decision, Toolkit, TorchBuild, decide

ROOT = Path(__file__).resolve().parents[1]

CPU_TORCH = TorchBuild("2.13.0+cpu", None)
CUDA_TORCH = TorchBuild("2.15.0+cu132", "13.2")
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
TOOLKIT = Toolkit("/opt/cuda", "13.0", ARCHITECTURES)
SOURCES = [Path("csrc/one.cu"), Path("csrc/two.cu")]

NVCC = """#!/bin/sh
case "$1" in
    --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
    --list-gpu-arch) printf 'compute_80\\ncompute_90\\ncompute_120\\n' ;;
    --dryrun) echo "#$ TOP={home}/bin/.." >&2 ;;
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


@pytest.fixture
def no_other_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hides the toolkits of the machine that runs the test."""
    monkeypatch.setattr(build_decision, "USUAL_HOME", tmp_path / "absent")
    monkeypatch.setattr(build_decision, "pip_homes", lambda search_path: [])


# --- the outcome ------------------------------------------------------------------------------------------------------


def test_everything_present_builds_the_kernels() -> None:
    decision = decide({}, CUDA_TORCH, TOOLKIT, SOURCES)
    assert decision == Decision(
        outcome="cuda",
        reason="torch and the CUDA toolkit fit, and csrc/ holds 2 CUDA sources",
        torch="2.15.0+cu132",
        cuda="13.2",
        toolkit="/opt/cuda",
        toolkit_version="13.0",
        architectures=("8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"),
    )


# Everything that keeps the kernels from being built: environment, torch, toolkit, sources, and words of the reason.
OBSTACLES = {
    "no torch": ({}, None, TOOLKIT, SOURCES, ["torch cannot be imported", "pip install --no-build-isolation ."]),
    "CPU torch": ({}, CPU_TORCH, TOOLKIT, SOURCES, ["torch 2.13.0+cpu is a build without CUDA"]),
    "no toolkit": ({}, CUDA_TORCH, None, SOURCES, ["no CUDA toolkit was found", "set CUDA_HOME"]),
    "wrong CUDA_HOME": ({"CUDA_HOME": "/x"}, CUDA_TORCH, None, SOURCES, ["CUDA_HOME=/x holds no CUDA toolkit"]),
    "other major": (
        {},
        CUDA_TORCH,
        Toolkit("/opt/old", "12.8", ARCHITECTURES),
        SOURCES,
        ["CUDA 13.2", "/opt/old is CUDA 12.8", "set CUDA_HOME to a toolkit of CUDA 13"],
    ),
    "no sources": ({}, CUDA_TORCH, TOOLKIT, [], ["no CUDA sources"]),
    "no sources, no torch": ({}, None, None, [], ["no CUDA sources", "besides, torch cannot be imported"]),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_an_obstacle_means_pure_python_and_says_why(name: str) -> None:
    environ, torch_build, toolkit, sources, words = OBSTACLES[name]
    decision = decide(environ, torch_build, toolkit, sources)
    assert decision.outcome == "python"
    assert all(word in decision.reason for word in words), decision.reason


@pytest.mark.parametrize("name", OBSTACLES)
def test_force_cuda_turns_an_obstacle_into_an_error(name: str) -> None:
    environ, torch_build, toolkit, sources, words = OBSTACLES[name]
    with pytest.raises(BuildError, match="FORCE_CUDA is set, but") as caught:
        decide({**environ, "FORCE_CUDA": "1"}, torch_build, toolkit, sources)
    assert all(word in str(caught.value) for word in words), caught.value


def test_force_cuda_changes_nothing_where_the_kernels_can_be_built() -> None:
    assert decide({"FORCE_CUDA": "1"}, CUDA_TORCH, TOOLKIT, SOURCES) == decide({}, CUDA_TORCH, TOOLKIT, SOURCES)


def test_force_cpu_wins_over_what_is_installed() -> None:
    decision = decide({"FORCE_CPU": "1"}, CUDA_TORCH, TOOLKIT, SOURCES)
    assert (decision.outcome, decision.architectures) == ("python", ())
    assert "FORCE_CPU" in decision.reason


@pytest.mark.parametrize("value", ["", "0"])
def test_a_switch_set_to_zero_is_off(value: str) -> None:
    assert decide({"FORCE_CPU": value, "FORCE_CUDA": "1"}, CUDA_TORCH, TOOLKIT, SOURCES).outcome == "cuda"


def test_both_switches_are_an_error() -> None:
    with pytest.raises(BuildError, match="FORCE_CPU and FORCE_CUDA are both set"):
        decide({"FORCE_CPU": "1", "FORCE_CUDA": "1"}, CUDA_TORCH, TOOLKIT, SOURCES)


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
    assert decide({"TORCH_CUDA_ARCH_LIST": text}, CUDA_TORCH, TOOLKIT, SOURCES).architectures == expected


@pytest.mark.parametrize("entry", ["sm_80", "8", "8.0+ptx", "hopper", "8,0", "8.0x"])
def test_a_malformed_architecture_is_named(entry: str) -> None:
    with pytest.raises(BuildError, match=r"TORCH_CUDA_ARCH_LIST must hold entries such as 8\.0") as caught:
        decide({"TORCH_CUDA_ARCH_LIST": f"9.0;{entry}"}, CUDA_TORCH, TOOLKIT, SOURCES)
    assert repr(entry) in str(caught.value)


def test_an_architecture_that_the_toolkit_does_not_know_is_named() -> None:
    with pytest.raises(BuildError, match=r"asks for 5.0 13.5a\+PTX, but the CUDA 13.0 toolkit at /opt/cuda knows only"):
        decide({"TORCH_CUDA_ARCH_LIST": "5.0 8.0 13.5a+PTX"}, CUDA_TORCH, TOOLKIT, SOURCES)


def test_the_default_list_goes_as_far_as_the_toolkit() -> None:
    older = dataclasses.replace(TOOLKIT, architectures=("7.5", "8.0", "9.0"))
    assert decide({}, CUDA_TORCH, older, SOURCES).architectures == ("8.0", "9.0+PTX")


def test_a_toolkit_without_any_default_architecture_is_an_error() -> None:
    oldest = dataclasses.replace(TOOLKIT, architectures=("7.0", "7.5"))
    with pytest.raises(BuildError, match=r"knows none of 8\.0"):
        decide({}, CUDA_TORCH, oldest, SOURCES)


def test_the_list_is_not_read_where_nothing_can_be_compiled() -> None:
    assert decide({"TORCH_CUDA_ARCH_LIST": "nonsense"}, CPU_TORCH, TOOLKIT, SOURCES).architectures == ()


# --- the toolkit ------------------------------------------------------------------------------------------------------


def test_cuda_home_is_the_only_candidate_where_it_is_set(tmp_path: Path) -> None:
    wanted, other = fake_toolkit(tmp_path / "wanted", "13.1"), fake_toolkit(tmp_path / "other")
    found = build_decision.find_toolkit({"CUDA_HOME": str(wanted), "PATH": str(other / "bin")})
    assert found == Toolkit(str(wanted), "13.1", ("8.0", "9.0", "12.0"))
    assert build_decision.find_toolkit({"CUDA_HOME": str(tmp_path), "PATH": str(other / "bin")}) is None


@pytest.mark.usefixtures("no_other_toolkit")
def test_a_wrapper_on_the_path_leads_to_the_real_toolkit(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda")
    wrapper = script(tmp_path / "usr" / "bin" / "nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    found = build_decision.find_toolkit({"PATH": str(wrapper.parent)})
    assert found is not None and found.home == str(home)


@pytest.mark.usefixtures("no_other_toolkit")
def test_the_folder_above_a_wrapper_is_no_toolkit(tmp_path: Path) -> None:
    wrapper = script(tmp_path / "usr" / "bin" / "nvcc", NVCC.format(version="13.0", home=tmp_path / "gone"))
    assert build_decision.find_toolkit({"PATH": str(wrapper.parent)}) is None


@pytest.mark.usefixtures("no_other_toolkit")
def test_a_link_to_nvcc_is_followed(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    text = (home / "bin" / "nvcc").read_text().replace("--dryrun", "--silent-about-its-home")
    script(home / "bin" / "nvcc", text)
    found = build_decision.find_toolkit({"PATH": str(tmp_path / "bin")})
    assert found is not None and found.home == str(home)


def test_the_usual_folder_is_found_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_decision, "USUAL_HOME", fake_toolkit(tmp_path / "cuda"))
    found = build_decision.find_toolkit({"PATH": str(tmp_path)})
    assert found is not None and found.home == str(tmp_path / "cuda")


def test_the_toolkit_of_pip_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = fake_toolkit(tmp_path / "nvidia" / "cu13")
    monkeypatch.setattr(build_decision, "USUAL_HOME", tmp_path / "absent")
    monkeypatch.syspath_prepend(tmp_path)
    found = build_decision.find_toolkit({"PATH": str(tmp_path)})
    assert found is not None and found.home == str(home)


@pytest.mark.parametrize("broken", ["#!/bin/sh\nexit 1\n", "not a program", "#!/absent/interpreter\n"])
def test_an_nvcc_that_does_not_run_is_no_toolkit(tmp_path: Path, broken: str) -> None:
    script(fake_toolkit(tmp_path / "cuda") / "bin" / "nvcc", broken)
    assert build_decision.inspect_toolkit(tmp_path / "cuda") is None


# --- torch, the record and setup.py -----------------------------------------------------------------------------------


def test_the_torch_of_this_interpreter_is_found() -> None:
    assert build_decision.find_torch() == TorchBuild(torch.__version__, torch.version.cuda)


def test_a_missing_torch_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert build_decision.find_torch() is None


def test_the_record_survives_json() -> None:
    decision = decide({}, CUDA_TORCH, TOOLKIT, SOURCES)
    assert Decision.from_json(decision.to_json()) == decision


def run_setup(out: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_py` of this checkout, with everything that it writes under `out`."""
    pytest.importorskip("setuptools")
    command = ["setup.py", "--quiet", "egg_info", "--egg-base", str(out), "build_py", "--build-lib", str(out)]
    clean = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", **environ}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=clean, capture_output=True, text=True, check=False)


def test_setup_prints_the_decision_and_records_it(tmp_path: Path) -> None:
    done = run_setup(tmp_path, FORCE_CPU="1")
    assert done.returncode == 0, done.stderr
    record = Decision.from_json((tmp_path / "symtele_cuda" / "_build.json").read_text())
    assert (record.outcome, record.torch) == ("python", torch.__version__)
    assert str(record) in done.stdout


def test_setup_stops_with_one_line_where_the_environment_contradicts_itself(tmp_path: Path) -> None:
    done = run_setup(tmp_path, FORCE_CPU="1", FORCE_CUDA="1")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "symtele_cuda: FORCE_CPU and FORCE_CUDA are both set: unset one of them"
    assert not (tmp_path / "symtele_cuda").exists()


# --- info -------------------------------------------------------------------------------------------------------------


def test_info_of_a_source_tree_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(info, "RECORD", tmp_path / "_build.json")
    assert info.build_record() is None
    text = info.describe()
    assert "source tree that was not installed" in text
    assert "pip install --no-build-isolation ." in text


def test_info_tells_the_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    decision = decide({}, dataclasses.replace(CUDA_TORCH, version=torch.__version__), TOOLKIT, SOURCES)
    (tmp_path / "_build.json").write_text(decision.to_json())
    monkeypatch.setattr(info, "RECORD", tmp_path / "_build.json")
    assert info.build_record() == decision
    assert str(decision) in info.describe()
    assert "torch is now" not in info.describe()


def test_info_notices_another_torch_than_that_of_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_build.json").write_text(decide({}, TorchBuild("1.0", "10.2"), TOOLKIT, SOURCES).to_json())
    monkeypatch.setattr(info, "RECORD", tmp_path / "_build.json")
    text = info.describe()
    assert "1.0 (CUDA 10.2)" in text and f"torch is now {torch.__version__}" in text


def test_info_names_what_results_depend_on() -> None:
    text = info.describe()
    for line in (
        f"torch           {torch.__version__}",
        f"float32 matmul: {torch.get_float32_matmul_precision()}",
        f"CPU threads:    {torch.get_num_threads()}",
        "CUDA device",
    ):
        assert line in text
