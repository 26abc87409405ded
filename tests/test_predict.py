"""The predictions of bench.predict: what is counted, by hand, and that the search on the device waits for nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import host, layer, predict, tables, teleport
from bench.launches import (
    DEVICES,
    EAGER_LAUNCH,
    FURTHER_LAUNCH,
    GRAPH_LAUNCH,
    MULTIPROCESSORS,
    PIVOT_SECONDS,
    RATES,
    SVD,
    Launch,
)
from bench.predict import recording
from symtele_cuda.kernels.library import Linear, together

H200 = DEVICES["H200"]


def test_a_launch_takes_what_decides_most() -> None:
    assert Launch("", "elementwise", 8, 8).seconds(H200, GRAPH_LAUNCH) == GRAPH_LAUNCH
    panels = Launch("", "solver", 8, 8, kernels=3, chain=1e-6)
    assert panels.seconds(H200, EAGER_LAUNCH) == pytest.approx(EAGER_LAUNCH + 2 * FURTHER_LAUNCH + 1e-6)
    assert panels.seconds(H200, GRAPH_LAUNCH) == pytest.approx(3 * GRAPH_LAUNCH + 1e-6)
    assert Launch("", "elementwise", 8, 8, further=True).seconds(H200, EAGER_LAUNCH) == FURTHER_LAUNCH
    many = 10**9
    assert Launch("", "elementwise", many, many).seconds(H200, GRAPH_LAUNCH) == 2 * many / H200.bytes_per_second
    half = Launch("", "tensor", 0, 0, many**2, MULTIPROCESSORS // 2)
    assert half.seconds(H200, GRAPH_LAUNCH) == many**2 / (RATES["tensor"] / 2)
    assert half.bound(H200) == "operations"


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


def test_a_factorization_counts_its_columns_and_a_decomposition_is_one_launch_of_unknown_length() -> None:
    with recording() as recorder:
        a = torch.empty(128, 128, dtype=torch.float64)
        triangle = torch.linalg.cholesky_ex(a).L
        torch.cholesky_inverse(triangle)
        torch.linalg.pinv(torch.empty(20, 784))
    factor, inverse, decomposition = (one for one in recorder.launches if one.route != "elementwise")
    assert (factor.operations, factor.kernels, factor.chain) == (128**3 // 3, 2, 128 * PIVOT_SECONDS)
    assert (inverse.operations, inverse.kernels, inverse.chain) == (2 * 128**3, 2, 0)
    assert (decomposition.route, decomposition.seconds(H200, EAGER_LAUNCH)) == (SVD, EAGER_LAUNCH)


def test_an_unknown_solver_is_an_error() -> None:
    with recording(), pytest.raises(NotImplementedError, match="linalg_eigh"):
        torch.linalg.eigvalsh(torch.empty(4, 4))


def test_the_opponents_are_counted_whole() -> None:
    """Five products of the formula and two of its gradient, two solvers; three pseudo-inverses and one wait a step."""
    operator = predict.measure("layer-n4096-4096-4096", H200, allow_tf32=False)
    products, solved = 7 * 2 * 4096**3, (1 / 3 + 2) * 4096**3
    assert operator[layer.EAGER].gigaflops == pytest.approx((products + solved) / 1e9, rel=1e-6)
    assert operator[layer.EAGER].product_seconds < operator[layer.EAGER].eager_seconds
    published = predict.measure("mlp-784-512-512-10-n20-leaky_relu", H200, allow_tf32=False)[teleport.PUBLISHED]
    assert published.decompositions == published.waits * 3 == 30


@pytest.mark.parametrize("name", ["mlp-784-512-512-10-n20-leaky_relu", "mlp-784-512-512-10-n200-softplus"])
def test_the_search_on_the_device_waits_for_nothing(name: str) -> None:
    if predict.WHERE.type != "cuda":
        pytest.skip("this torch is a build without CUDA, so that the decisions are those taken on the CPU")
    parts = predict.measure(name, H200, allow_tf32=False)
    assert parts[predict.SEARCH].waits == parts[predict.LONGER_SEARCH].waits == 0 < parts[predict.SETUP].waits


def test_a_larger_problem_takes_longer_and_the_document_says_that_it_predicts(tmp_path: Path) -> None:
    out = tmp_path / "prediction.json"
    names = ["layer-n512-512-512", "layer-n4096-4096-4096"]
    predict.main(predict.make_arguments().parse_args(["--shape", *names, "--out", str(out)]))
    document = json.loads(out.read_text())
    assert "PREDICTION" in document["note"]
    small, large = (document["predicted"][name][layer.OPERATOR] for name in names)
    assert large["graph_seconds"] > 10 * small["graph_seconds"]
    assert small["graph_seconds"] <= small["eager_seconds"]
    assert sum(large["share_of_bound"].values()) == pytest.approx(1, abs=0.01)


def cells_of(table: str, shape: str, column: int) -> list[float]:
    """The numbers of a column, in the rows whose shape begins so."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return [float(row[column].split()[0].rstrip("×")) for row in rows if row[0].startswith(f"`{shape}")]


def test_the_page_of_the_kernels_says_what_the_file_says() -> None:
    page = " ".join((Path(__file__).parents[1] / "docs" / "kernels.md").read_text(encoding="utf-8").split())
    predicted = tables.load("prediction")
    searches, published = tables.predicted_teleport_table(predicted), tables.predicted_published_table(predicted)
    whole, each = cells_of(searches, "mlp-784-512-512-10-n200", 4), cells_of(published, "mlp-784-512-512-10-n200", 4)
    assert f"n = 200, take {min(whole):.1f} to {max(whole):.1f} ms" in page
    assert f"a matrix of 200 rows takes {min(each):.1f} to {max(each):.1f} ms" in page
    small, large = (cells_of(searches, name, 7) for name in ("mlp-784-512-512-10", "mlp-4096-4096-4096-1000-n4096"))
    others = [step for step in cells_of(searches, "mlp-", 7) if step not in small + large]
    assert f"takes {min(small):.2f} to {max(small):.2f} forward+backward passes on the same batch" in page
    assert f"with wider layers {min(others):.2f} to {max(others):.2f}" in page
    assert f"and {min(large):.2f} to {max(large):.2f} where the batch is as large" in page
    faster = cells_of(tables.predicted_layer_table(predicted), "layer-", 5)
    operator = [name for name in predicted["predicted"] if name.startswith("layer-")]
    from_1024 = [times for name, times in zip(operator, faster, strict=True) if predict.SHAPES[name].n >= 1024]
    assert f"{min(from_1024):.1f} to {max(from_1024):.1f} times as fast as the formula with a Cholesky factor" in page
    decomposition = cells_of(tables.predicted_twin_table(predicted), "layer-", 3)
    assert (
        f"takes three times as long there if that takes {min(decomposition):.1f} to {max(decomposition):.1f} ms" in page
    )
    on_host = tables.load("host")["shapes"]
    seconds = on_host["teleport"]["timings"][host.TELEPORT]["seconds"]
    assert f"of a teleport {1e3 * seconds:.2f} ms" in page
    ours, formula = (1e3 * on_host["layer"]["timings"][name]["seconds"] for name in (layer.OPERATOR, layer.EAGER))
    assert f"Of `teleport_layer` {ours:.2f} ms" in page and f"checks nothing, takes {formula:.2f} ms" in page
