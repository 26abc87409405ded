"""The predictions of bench.predict: what is counted, by hand, and that the search on the device waits for nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import layer, predict, tables
from bench.harness import UNIT
from bench.predict import (
    BYTES_PER_SECOND,
    EAGER_LAUNCH,
    FURTHER_LAUNCH,
    GRAPH_LAUNCH,
    MULTIPROCESSORS,
    RATES,
    Launch,
    recording,
)
from symtele_cuda.kernels.library import Linear, together

ROOT = Path(__file__).parents[1]


def test_a_launch_takes_what_decides_most() -> None:
    assert Launch("", "elementwise", 8, 8).seconds() == EAGER_LAUNCH
    panels = Launch("", "solver", 8, 8, kernels=3, chain=1e-6)
    assert panels.seconds() == pytest.approx(EAGER_LAUNCH + 2 * FURTHER_LAUNCH + 1e-6)
    assert replace(panels, captured=True).seconds() == pytest.approx(3 * GRAPH_LAUNCH + 1e-6)
    assert Launch("", "elementwise", 8, 8, further=True).seconds() == FURTHER_LAUNCH
    many = 10**9
    assert Launch("", "elementwise", many, many).seconds() == 2 * many / BYTES_PER_SECOND
    half = Launch("", "tensor", 0, 0, many**2, MULTIPROCESSORS // 2)
    assert half.seconds() == many**2 / (RATES["tensor"] / 2)
    assert half.bound() == "operations"


@pytest.mark.parametrize(
    ("rows", "dtype", "route", "kernels"),
    [
        (256, torch.float32, "fused float32", 1),
        (2048, torch.float32, "tensor", 1),
        (2048, torch.float64, "library float64", 2),
    ],
)
def test_a_product_is_counted_by_its_route(rows: int, dtype: torch.dtype, route: str, kernels: int) -> None:
    with recording() as recorder:
        a, b, at = (torch.empty(*shape, dtype=dtype) for shape in ((rows, 512), (512, 1024), (rows, 1024)))
        together(recorder.products, Linear(a, b, mask=at))
    found = recorder.launches
    assert [found[0].route, len(found)] == [route, kernels]
    assert [one.further for one in found] == [False, True][:kernels]  # by one operator
    assert found[0].operations == 2 * rows * 512 * 1024
    again = 2 * at.numel() if kernels == 2 else 0  # the product is written and read once more
    moved = a.numel() + b.numel() + 3 * at.numel() + again
    assert sum(one.bytes_read + one.bytes_written for one in found) == dtype.itemsize * moved


def test_torchs_own_operators_are_counted_and_views_are_not() -> None:
    with recording() as recorder:
        a = torch.empty(64, 32)
        (a.T @ a).add_(1.0)
        torch.zeros(0)
    product, addition = recorder.launches
    assert (product.operator, product.operations) == ("mm", 2 * 32 * 64 * 32)
    assert (addition.operator, addition.bytes_read, addition.bytes_written) == ("add_", 4 * 32 * 32, 4 * 32 * 32)


def test_an_unknown_solver_is_an_error() -> None:
    with recording(), pytest.raises(NotImplementedError, match="linalg_eigh"):
        torch.linalg.eigvalsh(torch.empty(4, 4))


def test_the_operator_is_counted_whole() -> None:
    """Four products of the forward pass and two of ∂f/∂g; a Gram matrix, its factor, a solve and a product."""
    found = predict.count("layer-n4096-4096-4096")[layer.OPERATOR]
    products, solved = 6 * 2 * 4096**3, (2 + 1 / 3 + 1 + 2) * 4096**3
    assert found.gigaflops == pytest.approx((products + solved) / 1e9, rel=1e-6)


@pytest.mark.parametrize("name", ["mlp-784-512-512-10-n20", "mlp-784-512-512-10-n200"])
def test_the_search_on_the_device_waits_for_nothing(name: str) -> None:
    if predict.WHERE.type != "cuda":
        pytest.skip("this torch is a build without CUDA, so that the decisions are those taken on the CPU")
    parts = predict.count(name)
    assert parts[predict.SEARCH].waits == parts[predict.LONGER_SEARCH].waits == 0 < parts[predict.SETUP].waits


def test_a_larger_problem_takes_longer_and_the_document_says_that_it_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "prediction.json"
    names = ["layer-n512-512-512", "layer-n4096-4096-4096"]
    predict.main(["--shape", *names, "--out", str(out)])
    document = json.loads(out.read_text())
    assert "PREDICTION" in document["note"]
    small, large = (document["predicted"][name][layer.OPERATOR] for name in names)
    assert large["seconds"] > 10 * small["seconds"]
    assert small["bound_by_launches"] > 0.9 > 0.1 > large["bound_by_launches"]
    assert predict.render(document["predicted"]) in capsys.readouterr().out


def test_the_page_of_the_kernels_shows_the_file() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    predicted = tables.load("prediction")["predicted"]
    assert predict.render(predicted) in page
    steps = []
    for name, parts in predicted.items():
        if name.startswith("mlp-"):
            ten, twenty, unit = (parts[part]["seconds"] for part in (predict.SEARCH, predict.LONGER_SEARCH, UNIT))
            steps.append((twenty - ten) / 10 / unit)
    assert f"takes {', '.join(f'{step:.2f}' for step in steps[:-1])} and {steps[-1]:.2f} forward+backward" in " ".join(
        page.split()
    )
