"""The predictions of bench.predict: what is counted, by hand, and that the search on the device waits for nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import predict
from bench.predict import DEVICES, GRAPH_LAUNCH, MULTIPROCESSORS, RATES, Launch, recording

H200 = DEVICES["H200"]


def test_a_launch_takes_what_decides_most() -> None:
    assert Launch("", "elementwise", 8, 8).seconds(H200, GRAPH_LAUNCH) == GRAPH_LAUNCH
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
        recorder.products.masked(a, b, None, at)
    found = recorder.launches
    assert [found[0].route, len(found)] == [route, kernels]
    assert found[0].operations == 2 * rows * 512 * 1024
    again = 2 * at.numel() if kernels == 2 else 0  # the product is written and read once more
    moved = a.numel() + b.numel() + 3 * at.numel() + again
    assert sum(one.bytes_read + one.bytes_written for one in found) == dtype.itemsize * moved


def test_torchs_own_operators_are_counted_and_views_are_not() -> None:
    with recording() as recorder:
        a = torch.empty(64, 32)
        (a.T @ a).add_(1.0)
    product, addition = recorder.launches
    assert (product.operator, product.operations) == ("mm", 2 * 32 * 64 * 32)
    assert (addition.operator, addition.bytes_read, addition.bytes_written) == ("add_", 4 * 32 * 32, 4 * 32 * 32)


@pytest.mark.parametrize("name", ["mlp-784-512-512-10-n20-leaky_relu", "mlp-784-512-512-10-n200-softplus"])
def test_the_search_on_the_device_waits_for_nothing(name: str) -> None:
    if predict.WHERE.type != "cuda":
        pytest.skip("this torch is a build without CUDA, so that the decisions are those taken on the CPU")
    parts = predict.measure(name, H200, allow_tf32=False)
    assert parts["search and weights"].waits == 0 < parts["set-up"].waits


def test_a_larger_problem_takes_longer_and_the_document_says_that_it_predicts(tmp_path: Path) -> None:
    out = tmp_path / "prediction.json"
    names = ["layer-n512-512-512", "layer-n4096-4096-4096"]
    predict.main(predict.make_arguments().parse_args(["--shape", *names, "--out", str(out)]))
    document = json.loads(out.read_text())
    assert "PREDICTION" in document["note"]
    small, large = (document["predicted"][name]["forward and backward"] for name in names)
    assert large["graph_seconds"] > 10 * small["graph_seconds"]
    assert small["graph_seconds"] <= small["eager_seconds"]
    assert sum(large["share_of_bound"].values()) == pytest.approx(1, abs=0.01)
