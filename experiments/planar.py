"""Gradient descent on booth and rosenbrock with and without teleports (Zhao et al. 2022, section 6.1 and figure 1).

A run takes steps 1, 2, …; a teleport at step s moves the point just before that step. The teleports of the source
climb ‖∇L‖² on the angle θ from a random start, a run for each seed; one more run teleports to the exact maximum.
Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments import figures
from experiments.records import Jump, PlanarRun, by_label, save_json
from experiments.tables import format_table
from experiments.testfunctions import SumOfSquares, booth, rosenbrock
from experiments.training import make_optimizer

Teleport = Callable[[Tensor], Tensor]

PLAIN = "GD"
ASCENT = "GD + teleports"
EXACT = "GD + exact teleports"
NEWTON = "Newton"


@dataclass(frozen=True)
class PlanarSettings:
    """A test function and how it is minimised; `teleport_steps` are the steps (from 1) that a teleport precedes."""

    function: str
    start: tuple[float, float]
    minimum: tuple[float, float]
    steps: int
    lr: float
    teleport_steps: tuple[int, ...]
    ascent_rate: float
    ascent_steps: int = 10
    optimizer: str = "sgd"
    newton: bool = False
    window: tuple[float, float, float, float] = (-10.0, 10.0, -10.0, 10.0)


BOOTH = PlanarSettings(
    function="booth",
    start=(5.0, -5.0),
    minimum=(1.0, 3.0),
    steps=10,
    lr=0.08,
    teleport_steps=(5,),
    ascent_rate=1e-3,
)
ROSENBROCK = PlanarSettings(
    function="rosenbrock",
    start=(-1.0, -1.0),
    minimum=(1.0, 1.0),
    steps=1000,
    lr=1e-3,
    teleport_steps=tuple(range(100, 1001, 100)),
    ascent_rate=0.1,
    newton=True,
    window=(-2.0, 2.0, -2.0, 2.0),
)
FUNCTIONS = {"booth": booth, "rosenbrock": rosenbrock}


def descend(
    settings: PlanarSettings, label: str, seed: int | None = None, teleport: Teleport | None = None
) -> PlanarRun:
    """The run of the settings' optimizer, with a teleport before each of the settings' steps if one is given."""
    function = FUNCTIONS[settings.function]
    x = torch.tensor(settings.start, dtype=torch.float64)
    optimizer = make_optimizer(settings.optimizer, [x], settings.lr)
    points, jumps = [x.clone()], []
    for step in range(1, settings.steps + 1):
        if teleport is not None and step in settings.teleport_steps:
            before = x.clone()
            x.copy_(teleport(before))
            jumps.append(_jump(function, step, before, x.clone()))
        x.grad = function.gradient(x)
        optimizer.step()
        points.append(x.clone())
    return _run(function, label, seed, points, jumps)


def newton(settings: PlanarSettings) -> PlanarRun:
    """x ← x − (∇²L)⁻¹ ∇L for as many steps as the settings say, or until the gradient vanishes."""
    function = FUNCTIONS[settings.function]
    points = [torch.tensor(settings.start, dtype=torch.float64)]
    for _ in range(settings.steps):
        x = points[-1]
        if function.gradient_norm(x) == 0:
            break
        points.append(x - torch.linalg.solve(function.hessian(x), function.gradient(x)))
    return _run(function, NEWTON, None, points, [])


def run(settings: PlanarSettings, seeds: range, out: Path) -> str:
    """All runs, their figures and JSON in `out`; returns the table to print."""
    _check(settings)
    function = FUNCTIONS[settings.function]
    runs = [descend(settings, PLAIN)]
    runs += [descend(settings, ASCENT, seed, ascent(settings, seed)) for seed in seeds]
    runs.append(descend(settings, EXACT, None, function.teleport_exact))
    if settings.newton:
        runs.append(newton(settings))
    _draw(settings, runs, out)
    name = settings.function
    save_json(out / f"{name}.json", name, {"planar": settings, "seeds": list(seeds)}, runs=runs)
    return _table(runs)


def ascent(settings: PlanarSettings, seed: int) -> Teleport:
    """The teleport by ascent on θ, every call from a new random θ of the seed's sequence."""
    function, generator = FUNCTIONS[settings.function], torch.Generator().manual_seed(seed)
    return lambda x: function.teleport_ascent(x, settings.ascent_steps, settings.ascent_rate, generator)


def _check(settings: PlanarSettings) -> None:
    outside = [step for step in settings.teleport_steps if not 1 <= step <= settings.steps]
    if outside:
        raise ValueError(f"teleports of {settings.function} precede steps from 1 to {settings.steps}, got {outside}")


def _run(function: SumOfSquares, label: str, seed: int | None, points: list[Tensor], jumps: list[Jump]) -> PlanarRun:
    path = torch.stack(points)
    losses, norms = function.loss(path), function.gradient_norm(path)
    pairs = tuple(_pair(point) for point in points)
    return PlanarRun(label, seed, pairs, tuple(losses.tolist()), tuple(norms.tolist()), tuple(jumps))


def _jump(function: SumOfSquares, step: int, before: Tensor, after: Tensor) -> Jump:
    norms = (function.gradient_norm(end).item() for end in (before, after))
    return Jump(step, _pair(before), _pair(after), *norms)


def _pair(x: Tensor) -> tuple[float, float]:
    return x[0].item(), x[1].item()


def _draw(settings: PlanarSettings, runs: list[PlanarRun], out: Path) -> None:
    function = FUNCTIONS[settings.function]
    first = {planar_run.label: planar_run for planar_run in reversed(runs)}

    def trajectories(name: str, *labels: str) -> None:
        chosen = [first[label] for label in labels]
        figures.trajectories(out / name, function, chosen, settings.minimum, settings.window)

    trajectories(f"{settings.function}_trajectory.png", PLAIN, ASCENT)
    if settings.newton:
        trajectories(f"{settings.function}_figure1.png", PLAIN, NEWTON, ASCENT)
    panels = [
        figures.Panel("step", "loss", _series(runs, _loss_curve)),
        figures.Panel("step", "gradient norm ‖∇L‖", _series(runs, _gradient_norm_curve)),
    ]
    figures.curves(out / f"{settings.function}_curves.png", settings.function, panels)


def _series(runs: list[PlanarRun], curve: Callable[[PlanarRun], list[tuple[float, float]]]) -> list[figures.Series]:
    series = []
    for label, members in by_label(runs).items():
        drawn = [curve(member) for member in members]
        x, ys = [x for x, _ in drawn[0]], [[y for _, y in points] for points in drawn]
        series.append(figures.Series(label, x, ys, marks=[jump.step - 1 for jump in members[0].jumps]))
    return series


def _loss_curve(planar_run: PlanarRun) -> list[tuple[float, float]]:
    return list(enumerate(planar_run.losses))


def _gradient_norm_curve(planar_run: PlanarRun) -> list[tuple[float, float]]:
    """(step, ‖∇L‖), with both ends of each teleport: it takes no step, and changes the norm."""
    curve: list[tuple[float, float]] = list(enumerate(planar_run.gradient_norms))
    for jump in reversed(planar_run.jumps):
        curve.insert(jump.step, (jump.step - 1, jump.gradient_norm_after))
    return curve


def _table(runs: list[PlanarRun]) -> str:
    rows = []
    for planar_run in runs:
        growth = [jump.gradient_norm_after / jump.gradient_norm_before for jump in planar_run.jumps]
        rows.append(
            (
                planar_run.label,
                "-" if planar_run.seed is None else str(planar_run.seed),
                str(len(planar_run.losses) - 1),
                f"{planar_run.losses[-1]:.3e}",
                f"{planar_run.gradient_norms[-1]:.3e}",
                ", ".join(f"{factor:.2g}" for factor in growth) or "-",
            )
        )
    header = ("method", "seed", "steps", "final loss", "final ‖∇L‖", "‖∇L‖ after / before each teleport")
    return format_table(header, rows)
