"""The measurement of what the host does: its stand-ins for a GPU compute once and then no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from teleports import teleport_mlp
from torch import nn

from bench import host, layer
from bench.harness import UNIT
from symtele_cuda.kernels import torch_kernels as products
from symtele_cuda.search import device as device_search


def test_a_replayed_teleport_is_that_of_the_device_and_searches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, searches = torch.Generator().manual_seed(0), []
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9), nn.Tanh(), nn.Linear(9, 3))
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.3, 0.3, generator=generator)
    batch = torch.randn(6, 12, generator=generator), torch.randint(3, (6,), generator=generator)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run_program = device_search.run_program
    monkeypatch.setattr(device_search, "run_program", lambda task: searches.append(task) or run_program(task))
    expected = teleport_mlp(model, batch)
    reports = []
    with host.replayed():
        for _ in range(3):
            model.load_state_dict(start)
            reports.append(teleport_mlp(model, batch))
    assert len(searches) == 1
    for report in reports:
        assert report.accepted and "in a CUDA graph" in report.backend
        assert report.objective_after == pytest.approx(expected.objective_after, rel=1e-4)


def test_operators_without_work_return_what_their_twins_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = layer.make_problem(layer.Shape(6, 10, 8), torch.device("cpu"))
    expected = layer.by_operator(problem)

    def refuse(*_: object) -> None:
        raise AssertionError("computed")

    with host.without_work(lambda: layer.by_operator(problem)):
        for name in ("linear", "over_slope", "invert_grams"):
            monkeypatch.setattr(products, name, refuse)
        for _ in range(2):
            for one, other in zip(layer.by_operator(problem), expected, strict=True):
                torch.testing.assert_close(one, other)


def test_the_document_has_both_programs(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    host.main(["--rounds", "1", "--out", str(out)])
    shapes = json.loads(out.read_text(encoding="utf-8"))["shapes"]
    assert set(shapes["teleport"]["timings"]) == {UNIT, host.TELEPORT}
    assert set(shapes["layer"]["timings"]) == {UNIT, layer.OPERATOR, layer.EAGER}
