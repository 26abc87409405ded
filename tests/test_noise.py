"""The experiment on noise: where a run is down at a loss, its spikes, the comparison, and the command."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments import noise
from experiments.__main__ import main
from experiments.data import Dataset
from experiments.noise import Look, NoiseRun
from experiments.training import NOISE, with_noise

needs_extras = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("matplotlib", "tqdm", "sklearn")),
    reason="needs symtele_cuda[demo]",
)


def look(epoch: float, loss: float, accuracy: float = 0.5) -> Look:
    return Look(epoch, loss, noise_accuracy=accuracy, accuracy=2 * accuracy, norm=10 * accuracy)


def test_the_first_time_at_a_loss_lies_between_two_looks_by_the_logarithm() -> None:
    looks = [look(0, 1.0, 0.1), look(1, 0.01, 0.3), look(2, 0.5, 0.2), look(3, 0.001, 0.4)]
    found = noise.first_at(looks, 0.1)
    assert found is not None
    assert vars(found) == pytest.approx(vars(look(0.5, 0.505, 0.2)))
    assert vars(noise.first_at(looks, 0.01)) == pytest.approx(vars(looks[1]))
    assert noise.first_at(looks, 1e-4) is None


def test_a_rise_is_over_the_best_before_it() -> None:
    assert noise.greatest_rise([1.0, 0.5, 0.4, 0.2]) == 1.0
    assert noise.greatest_rise([1.0, 0.5, 1.2, 0.1, 0.3, 0.2]) == pytest.approx(3.0)


def run_at(arm: str, seed: int, level: Look | None, spike: float) -> NoiseRun:
    return NoiseRun("tanh", "sgd", 0.1, arm, seed, (level, None), spike, 3, (1.5,), (0.7, 0.2)[:1])


def test_arms_are_compared_seed_by_seed_where_both_got_there() -> None:
    plain = [run_at("plain", 0, look(4, 0.1, 0.4), 1.0), run_at("plain", 1, look(8, 0.1, 0.5), 2.5)]
    others = [run_at("x", 0, look(2, 0.1, 0.3), 2.1), run_at("x", 1, None, 2.4)]
    found = noise.compare(plain, others)
    assert found.noise == (pytest.approx(-10), None)
    assert found.clean == (pytest.approx(-20), None)
    assert found.norms == (pytest.approx(0.75), None)
    assert found.epochs == (0.5, None)
    assert (found.spikes, found.worst_spike, found.accepted, found.teleports) == (1, 2.4, 2, 6)


def test_the_noise_has_its_share_of_the_inputs_spread() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = 2 + 3 * torch.randn(400, 30, generator=generator)
    data = Dataset("made", inputs, torch.arange(400) % 7)
    noisy, targets = with_noise(data, data, draws=2)
    assert noisy.shape == (800, 30) and torch.equal(targets, data.targets.repeat(2))
    assert float((noisy[:400] - inputs).std()) == pytest.approx(NOISE * float(inputs.std()), rel=0.02)
    assert not torch.equal(noisy[:400], noisy[400:])


def test_all_arms_of_a_seed_begin_alike_but_for_the_fast_start() -> None:
    generator = torch.Generator().manual_seed(1)
    data = Dataset("made", torch.randn(500, 12, generator=generator), torch.arange(500) % 4)
    begun = {arm: noise.start(noise.PROBLEMS["digits"], data, "tanh", "sgd", 0.1, arm, seed=3) for arm in noise.ARMS}
    weights = {arm: nn.utils.parameters_to_vector(one.model.parameters()) for arm, one in begun.items()}
    for arm in noise.ARMS:
        assert torch.equal(weights[arm], weights[noise.PLAIN]) == (arm != noise.FAST_START)
    batches = [one.shuffled_batches() for one in begun.values()]
    assert all(torch.equal(torch.cat(found), torch.cat(batches[0])) for found in batches)
    assert begun[noise.PLAIN].teleporter is None and begun[noise.BOUNDED].teleporter is not None


@needs_extras
def test_noise_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "RATES", {"sgd": (0.05,)})
    monkeypatch.setattr(noise, "ACTIVATIONS", {"LeakyReLU 0.1": noise.ACTIVATIONS["LeakyReLU 0.1"]})
    monkeypatch.setitem(noise.PROBLEMS, "digits", replace(noise.PROBLEMS["digits"], widths=(32, 32)))
    assert main(["noise", "--seeds", "2", "--epochs", "3", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "noise.json").read_text())
    assert [run["arm"] for run in document["runs"]] == [arm for arm in noise.ARMS for _ in range(2)]
    assert [outcome["arm"] for outcome in document["outcomes"]] == list(noise.ARMS)[1:]
    for run in document["runs"]:
        bounds = document["settings"]["arms"][run["arm"]] or {}
        assert run["spike"] >= 1 and len(run["levels"]) == len(noise.LEVELS)
        assert all(growth <= bounds.get("max_sensitivity", math.inf) for growth in run["sensitivities"])
        assert all(change <= bounds.get("max_weight_change", math.inf) for change in run["weight_changes"])
    assert any(run["sensitivities"] for run in document["runs"])
    assert "with the default's bounds" in capsys.readouterr().out
