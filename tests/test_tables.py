"""The figures in README and docs are those of the committed result files."""

from __future__ import annotations

from pathlib import Path

from bench.tables import RESULTS, load, page, teleport_table, training_table
from bench.teleport import GRAD_NORM, PUBLISHED

ROOT = Path(__file__).resolve().parents[1]


def test_the_measurements_page_is_made_from_the_result_files():
    assert (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8") == page() + "\n"


def test_the_readme_s_tables_are_made_from_the_result_files():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert teleport_table(load("teleport", RESULTS / "present")) in readme
    assert training_table(load("training")) in readme


def test_the_readme_s_second_machine_is_that_of_its_file():
    timings = [shape["timings"] for shape in load("teleport", RESULTS / "xeon")["shapes"].values()]
    units = [timing[GRAD_NORM]["units"] for timing in timings]
    faster = [timing[PUBLISHED]["units"] / timing[GRAD_NORM]["units"] for timing in timings]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"`grad_norm` takes {min(units):.0f} to {max(units):.0f} such passes" in readme
    assert f"is {min(faster):.0f} to {max(faster):.0f} times faster than the published algorithm" in readme


def test_the_readme_says_what_noise_and_weights_cost_side_by_side():
    before, after = (
        load(f"teleport-{when}", RESULTS / "side-by-side")["shapes"]["mlp-784-512-512-10-n20"]["timings"][GRAD_NORM]
        for when in ("before", "after")
    )
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"`grad_norm` from {before['units']:.1f} to {after['units']:.1f} passes" in readme


def test_what_the_results_must_show_is_what_they_show():
    for name in ("teleport", "training"):
        for shape in load(name)["shapes"].values():
            failed = [key for key, check in shape["requirements"].items() if not check["passed"] and "aim" not in key]
            assert failed == [], f"{name}: {shape['shape']}"
