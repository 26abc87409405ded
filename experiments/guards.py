"""What keeps a teleport from doing harm: each guard alone, and together, at rates from small to too large.

64-128-128-10 on scikit-learn's digits, SGD without and with momentum: where harm is, it is at the large rates, where a
teleport to a steeper place makes steps overshoot that did not before. The question is which guard sees that:

* the holdout: other samples must not lose, and must gain by the step ahead;
* the least gain: the step ahead must lower the loss, and by twice as much as without the teleport;
* the Hessian: gradient steps of rate η diverge along the direction of its largest eigenvalue λ, η λ > 2 (1 + μ) with
  momentum μ (Polyak 1964), so a teleport that takes η λ beyond that is undone, unless it was beyond and not smaller.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from experiments import figures
from experiments.data import Dataset
from experiments.records import save_json
from experiments.study.jobs import DEFAULTS, FOR_ANY_GAIN, FULL
from experiments.study.measure import measure_seeds
from experiments.study.problems import PROBLEMS, Problem
from experiments.study.records import Record
from experiments.study.results import final_losses, spread, worst_of_sound
from experiments.tables import format_table
from experiments.training import TeleportSettings
from symtele_cuda.model.chain import Chain
from symtele_cuda.report import TeleportReport
from symtele_cuda.schedule import Batch
from symtele_cuda.teleporter import Teleporter
from symtele_cuda.transaction import Transaction

PROBLEM = PROBLEMS["digits"]
OPTIMIZERS = ("sgd", "momentum")
RATES = {optimizer: FULL[PROBLEM.name].rates[optimizer] for optimizer in OPTIMIZERS}
LANCZOS_STEPS = 10


@dataclass(frozen=True)
class Guard:
    """How to teleport, and by which teleporter."""

    teleports: TeleportSettings
    teleporter: type[Teleporter] = Teleporter


class HessianGuarded(Teleporter):
    """A teleporter that undoes what makes the steps of a gradient descent unstable.

    For torch.optim.SGD. λ is that of the loss on all samples gathered, the teleport's own and its holdout's.
    """

    def _teleport(self, transaction: Transaction, chain: Chain, batch: Batch, holdout: Batch | None) -> TeleportReport:
        parameters: list[Tensor] = list(self.model.parameters())
        old = [parameter.detach().clone() for parameter in parameters]
        parts = [batch] if holdout is None else [batch, holdout]
        inputs, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        before = self._times_too_long(inputs, targets)
        report = super()._teleport(transaction, chain, batch, holdout)
        if not report.accepted or self._times_too_long(inputs, targets) <= max(before, 1.0):
            return report
        transaction.write(parameters, old)
        return replace(report, accepted=False, reason="the Hessian's largest eigenvalue is too large for the rate")

    def _times_too_long(self, inputs: Tensor, targets: Tensor) -> float:
        """η λ / (2 (1 + μ))."""
        group = self._optimizers[0].param_groups[0]
        assert self.loss_fn is not None  # an experiment's teleporter has one
        with torch.enable_grad():
            loss = self.loss_fn(self.model(inputs), targets)
            curvature = largest_eigenvalue(loss, list(self.model.parameters()))
        return float(group["lr"]) * curvature / (2 * (1 + float(group["momentum"])))


def largest_eigenvalue(loss: Tensor, parameters: Sequence[Tensor], steps: int = LANCZOS_STEPS) -> float:
    """The largest eigenvalue of the Hessian of `loss`, estimated from below by steps of Lanczos' method.

    With v_1 random and normal, w = H v_j made orthogonal to all v so far gives v_{j+1} = w / ‖w‖ (each H v one more
    backward pass); the eigenvalue is that of the matrix v_iᵀ H v_j. Deterministic on the CPU.

    Args:
        loss: a scalar that depends twice differentiably on the parameters.
        parameters: one vector together.
        steps: how many products with H.
    """
    gradients = torch.autograd.grad(loss, list(parameters), create_graph=True)
    gradient = torch.cat([each.flatten() for each in gradients])
    generator = torch.Generator(gradient.device).manual_seed(0)
    start = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype, device=gradient.device)
    basis = (start / start.norm())[None]
    projected = gradient.new_zeros(steps, steps)
    for step in range(steps):
        products = torch.autograd.grad(gradient, list(parameters), basis[step], retain_graph=True)
        image = torch.cat([product.flatten() for product in products])
        projected[step, : step + 1] = basis @ image
        rest = image
        for _ in range(2):  # once leaves what rounding has put back
            rest = rest - (basis @ rest) @ basis
        length = rest.norm()
        if length <= torch.finfo(rest.dtype).eps * image.norm():  # the Hessian does not lead out of the span
            projected = projected[: step + 1, : step + 1]
            break
        basis = torch.cat([basis, rest[None] / length])
    return float(torch.linalg.eigvalsh(projected.double())[-1])  # of the lower triangle


GUARDS = {
    "none": Guard(replace(FOR_ANY_GAIN, holdout_tol=math.inf)),
    "Hessian": Guard(replace(FOR_ANY_GAIN, holdout_tol=math.inf), HessianGuarded),
    "holdout": Guard(FOR_ANY_GAIN),
    "least gain": Guard(replace(DEFAULTS, holdout_tol=math.inf)),
    "holdout and least gain": Guard(DEFAULTS),
}


@dataclass(frozen=True)
class Outcome:
    """One guard at one rate, over the seeds.

    teleports: accepted, of all seeds. diverged: runs that did, where the plain run of the seed did not. worst: the
    largest ratio of the mean train loss to the plain one after the teleports, over the seeds that diverged in neither.
    train_loss, plain_loss: their means at the end. time_share: of the training time that the teleports took, mean.
    """

    optimizer: str
    lr: float
    guard: str
    teleports: int
    diverged: int
    worst: float
    train_loss: float
    plain_loss: float
    time_share: float


def run(
    dataset: Dataset,
    problem: Problem,
    seeds: Sequence[int],
    out: Path,
    on_run: Callable[[str], None],
) -> str:
    """All runs; figure and JSON in `out`, the table returned. `on_run` gets what has finished, for progress."""

    def measured(name: str, optimizer: str, lr: float, guard: Guard | None) -> list[Record]:
        teleports, kind = (None, Teleporter) if guard is None else (guard.teleports, guard.teleporter)
        named = f"{optimizer}, lr {lr:g}, {name}"
        return measure_seeds(problem, dataset, optimizer, lr, teleports, seeds, named, on_run, kind)

    outcomes = []
    for optimizer, rates in RATES.items():
        for lr in rates:
            plain = measured("plain", optimizer, lr, None)
            for name, guard in GUARDS.items():
                outcomes.append(_outcome(optimizer, lr, name, plain, measured(name, optimizer, lr, guard)))
    _draw(f"{dataset.name}: the train loss after teleports, by guard", outcomes, out / "guards.png")
    guards = {name: {**asdict(guard), "teleporter": guard.teleporter.__name__} for name, guard in GUARDS.items()}
    settings = {"data": dataset.name, "problem": problem, "guards": guards, "seeds": list(seeds)}
    save_json(out / "guards.json", "guards", settings, outcomes=outcomes)
    return outcome_table(outcomes)


def count_runs(seeds: int) -> int:
    return sum(map(len, RATES.values())) * (1 + len(GUARDS)) * seeds


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    header = ("optimizer", "rate", "guard", "teleports", "diverged", "worst / plain", "train loss", "plain", "time")
    rows = [
        (
            outcome.optimizer,
            f"{outcome.lr:g}",
            outcome.guard,
            str(outcome.teleports),
            str(outcome.diverged),
            f"{outcome.worst:.3f}",
            f"{outcome.train_loss:.3g}",
            f"{outcome.plain_loss:.3g}",
            f"{outcome.time_share:.1%}",
        )
        for outcome in outcomes
    ]
    return format_table(header, rows)


def _outcome(optimizer: str, lr: float, guard: str, plain: Sequence[Record], guarded: Sequence[Record]) -> Outcome:
    return Outcome(
        optimizer,
        lr,
        guard,
        teleports=sum(len(record.accepted) for record in guarded),
        diverged=sum(ours.diverged and not theirs.diverged for theirs, ours in zip(plain, guarded, strict=True)),
        worst=worst_of_sound(plain, guarded)[0],
        train_loss=spread(final_losses(guarded)).mean,
        plain_loss=spread(final_losses(plain)).mean,
        time_share=statistics.fmean(record.teleport_share for record in guarded),
    )


def _draw(title: str, outcomes: Sequence[Outcome], path: Path) -> None:
    """The worst ratio of the mean train losses over the rate, a curve a guard."""
    panels = [
        figures.Panel(
            "learning rate",
            "worst train loss after teleports / plain",
            [
                figures.Series(guard, RATES[optimizer], [[o.worst for o in outcomes if (o.optimizer, o.guard) == key]])
                for guard in GUARDS
                for key in [(optimizer, guard)]
            ],
            title=optimizer,
            x_scale="log",
        )
        for optimizer in OPTIMIZERS
    ]
    figures.curves(path, title, panels)
