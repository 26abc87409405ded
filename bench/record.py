"""About 300 small teleports with all that they decide, for a comparison of two commits bit for bit.

    python -m bench.record --out FILE        at the one commit
    python -m bench.record --against FILE    at the other: names every case that differs, and exits with 1 if one does

A case's record holds the outcome, every step of the search and a checksum of the weights written, floats in full. Two
records are comparable on one processor with one version of torch; both commits must be recorded in one environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import symtele_cuda as st
from symtele_cuda.teleporter import LOOK_AHEAD

SHAPES = {
    "wide": (30, 40, 36, 5),
    "narrow first": (30, 12, 40, 5),
    "narrow last": (30, 40, 9, 5),
    "deep": (30, 40, 9, 36, 5),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
}
OBJECTIVES = ("grad_norm", "lookahead")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
SAMPLES, HELD_OUT = 20, 30
RATE = 0.05

Record = dict[str, Any]


class WeightedNorm:
    """An objective of the caller's, for which the weights are formed at every step."""

    maximise = True

    def value(self, loss_of: Callable[..., Tensor], parameters: list[Tensor]) -> Tensor:
        gradients = torch.autograd.grad(loss_of(parameters), parameters, create_graph=True)
        return torch.stack([gradient.square().sum() for gradient in gradients[::2]]).sum()


def make_model(dims: tuple[int, ...], activation: str, bias: bool, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(dims):
        layers += [nn.Linear(d_in, d_out, bias=bias), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def make_batch(n: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 30, generator=generator, dtype=torch.float64).to(dtype),
        torch.randint(5, (n,), generator=generator),
    )


def cases() -> Iterator[tuple[str, Callable[[], Record]]]:
    """The name of every case, and what makes its record."""
    grid = list(itertools.product(SHAPES, ACTIVATIONS, DTYPES))

    def case(name: str, shape: str, activation: str, dtype: str, bias: bool = True, **options: Any) -> tuple[str, Any]:
        def record() -> Record:
            model = make_model(SHAPES[shape], activation, bias, DTYPES[dtype])
            batch = make_batch(SAMPLES, DTYPES[dtype], 1)
            held = make_batch(HELD_OUT, DTYPES[dtype], 2) if options.get("holdout") else None
            return teleport(model, batch, **{**options, "holdout": held})

        return f"{name}, {shape}, {activation}, {dtype}{'' if bias else ', no bias'}", record

    for shape, activation, dtype in grid:
        for objective, bias in itertools.product(OBJECTIVES, (True, False)):
            yield case(objective, shape, activation, dtype, bias, objective=objective)
    for shape, dtype, objective in itertools.product(SHAPES, DTYPES, OBJECTIVES):
        for activation in ("leaky_relu", "identity"):
            yield case(
                f"diagonal {objective}", shape, activation, dtype, group="positive_diagonal", objective=objective
            )
    for shape, activation in itertools.product(SHAPES, ("leaky_relu", "tanh")):
        for dtype in DTYPES:
            yield case("holdout", shape, activation, dtype, objective="lookahead", holdout=True, min_gain=1.2)
            bounds: dict[str, Any] = {"max_weight_change": 0.05, "max_sensitivity": 1.2, "max_growth": math.inf}
            yield case("bounds", shape, activation, dtype, holdout=True, **bounds)
        yield case("last layer", shape, activation, "float32", layers=[len(SHAPES[shape]) - 2])
        yield case("caller's objective", shape, activation, "float32", objective=WeightedNorm(), steps=4)
    for optimizer, activation in itertools.product((torch.optim.SGD, torch.optim.Adam), ("leaky_relu", "tanh")):
        yield f"teleporter, {optimizer.__name__}, {activation}", functools.partial(train, optimizer, activation)


def teleport(model: nn.Module, batch: tuple[Tensor, Tensor], **options: Any) -> Record:
    free = {"max_weight_change": math.inf, "max_sensitivity": math.inf}
    names = {field.name for field in dataclasses.fields(st.Guards)}
    guards = st.Guards(**free | {name: options.pop(name) for name in names & options.keys()})
    layers = options.pop("layers", None)
    try:
        method = st.Ascent(lr=RATE, **options)
        report = st.teleport_mlp(model, batch, method=method, layers=layers, guards=guards)
    except (TypeError, ValueError, st.TeleportError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return describe(report) | {"weights": checksum(model)}


def train(make_optimizer: Callable[..., torch.optim.Optimizer], activation: str) -> Record:
    """A short run with a teleporter whose bounds are off."""
    model = make_model(SHAPES["wide"], activation, True, torch.float32)
    optimizer = make_optimizer(model.parameters(), lr=0.01)
    guards = st.Guards(holdout_tol=0.03, min_gain=1.0, max_weight_change=math.inf, max_sensitivity=math.inf)
    teleporter = st.Teleporter(
        model, optimizer, method=LOOK_AHEAD, batch_size=SAMPLES, holdout_size=HELD_OUT, guards=guards
    )
    for seed in range(12):
        batch = make_batch(SAMPLES, torch.float32, seed)
        teleporter.step(batch, epoch=0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return {"reports": [describe(report) for report in teleporter.reports], "weights": checksum(model)}


def describe(report: st.TeleportReport) -> Record:
    """What a report says, without its time."""
    names = ("loss", "grad_norm", "objective", "holdout", "sensitivity")
    figures = {f"{name}_{when}": getattr(report, f"{name}_{when}") for name in names for when in ("before", "after")}
    return {
        "accepted": report.accepted,
        "reason": report.reason,
        "steps": report.steps,
        "drift": exact(report.drift),
        "weight_changes": [exact(change) for change in (*report.weight_changes, report.weight_change)],
        "figures": {name: exact(figure) for name, figure in figures.items()},
        "layers": [[layer.teleported, layer.reason, layer.group] for layer in report.layers],
        "trace": [[exact(step.objective), exact(step.size), step.accepted, step.note] for step in report.trace],
    }


def exact(value: float | None) -> str | None:
    return None if value is None else float(value).hex()


def checksum(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()[:16]


def differences(old: dict[str, Record], new: dict[str, Record]) -> list[str]:
    """A line for each case that is not the same in both."""
    lines = []
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in new or name not in old:
            lines.append(f"{name}: only in the {'old' if name in old else 'new'} record")
        elif old[name] != new[name]:
            parts = [part for part in {**old[name], **new[name]} if old[name].get(part) != new[name].get(part)]
            lines.append(f"{name}: other {', '.join(parts)}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.add_argument("--against", type=Path, help="the JSON of another commit, to compare with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = {name: record() for name, record in cases()}
    print(f"{len(records)} cases, {sum('error' in record for record in records.values())} of them refused")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(records, indent=0) + "\n")
    if arguments.against is None:
        return 0
    lines = differences(json.loads(arguments.against.read_text()), records)
    print("\n".join([*lines, f"{len(lines)} cases differ"]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
