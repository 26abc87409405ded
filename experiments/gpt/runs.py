"""One run of the small Transformer under one arm: what it learns with, and what it measures on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import symtele_cuda as st
from experiments import require_extra
from experiments.gpt.model import GPT, Text, draw, sites_of

LAYERS, HEAD_WIDTH, CONTEXT, PIECES = 2, 32, 64, 16
LOOK_EVERY, LOOKED_AT = 20, 128  # steps; pieces of the validation text
CLIP, WEIGHT_DECAY, LAST_SHARE = 1.0, 0.1, 0.1
EARLY = 200  # the last step of what works at the beginning alone


@dataclass(frozen=True)
class Job:
    """One run. warm_up: the steps in which the rate rises; then it falls along a cosine to a tenth."""

    width: int
    steps: int
    arm: str
    lr: float
    warm_up: int
    beta2: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What came of it: the validation loss every `LOOK_EVERY` steps, the seconds of the training, those looks left out,
    those of the rotations among them, and the largest relative change of the logits at one."""

    job: Job
    losses: tuple[float, ...]
    seconds: float
    rotating: float
    inexact: float


class Rotations(st.EigenbasisTeleporter):
    """The library's, with the largest change of the logits at a rotation, and the seconds that measuring it takes."""

    inexact, measuring = 0.0, 0.0

    def measure_on(self, model: GPT, tokens: Tensor) -> None:
        self._measured = model, tokens

    def _rotate(self, transaction: Any) -> None:
        before = self._logits()
        super()._rotate(transaction)
        self.inexact = max(self.inexact, float((self._logits() - before).norm() / before.norm()))

    @torch.no_grad()
    def _logits(self) -> Tensor:
        started = time.perf_counter()
        model, tokens = self._measured
        logits = model(tokens)
        self.measuring += time.perf_counter() - started
        return logits


class RandomRotations(Rotations):
    """The control: the same rotations of everything, by bases that know nothing of the gradients."""

    _generator = torch.Generator().manual_seed(0)

    def _choose(self, covariance: Tensor) -> Tensor:
        noise = torch.randn(covariance.shape, generator=self._generator, dtype=covariance.dtype)
        return torch.linalg.qr(noise).Q


Optimizers = list[torch.optim.Optimizer]


@dataclass(frozen=True)
class Arm:
    """The optimizers of a run, a second set that takes over after `EARLY` steps, and whether the network is rotated.

    until: the last step with a rotation, every fifth from the first on; 0 for none.
    """

    optimizers: Callable[[GPT, Job], Optimizers]
    afterwards: Callable[[GPT, Job], Optimizers] | None = None
    until: int = 0
    rotations: type[Rotations] = Rotations


def _adamw(model: GPT, job: Job) -> Optimizers:
    betas = 0.9, job.beta2
    return [torch.optim.AdamW(model.parameters(), job.lr, betas, weight_decay=WEIGHT_DECAY, fused=True)]


def _soap(model: GPT, job: Job) -> Optimizers:
    """SOAP (Vyas et al. 2024, arXiv 2409.11321)."""
    soap = require_extra("pytorch_optimizer").SOAP
    return [soap(model.parameters(), job.lr, (0.95, job.beta2), weight_decay=WEIGHT_DECAY)]


def _muon(model: GPT, job: Job) -> Optimizers:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for embeddings and head, both at one rate."""
    matrices = list(model.blocks.parameters())
    others = [*model.embedding.parameters(), *model.positions.parameters(), *model.head.parameters()]
    return [
        torch.optim.Muon(matrices, job.lr, WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, job.lr, (0.9, job.beta2), weight_decay=WEIGHT_DECAY, fused=True),
    ]


PLAIN, RANDOM, ROTATED, ALWAYS = "AdamW", "random rotations", "eigenbasis, early", "eigenbasis, all along"
SOAP_START, SOAP, MUON = "SOAP, early, then AdamW", "SOAP", "Muon"
ARMS = {
    PLAIN: Arm(_adamw),
    RANDOM: Arm(_adamw, until=EARLY, rotations=RandomRotations),
    ROTATED: Arm(_adamw, until=EARLY),
    ALWAYS: Arm(_adamw, until=10**9),
    SOAP_START: Arm(_soap, _adamw),
    SOAP: Arm(_soap),
    MUON: Arm(_muon),
}
EARLY_ALONE = (RANDOM, ROTATED, SOAP_START)


class Run:
    """A network on its way: its optimizers, its rotations if it has any, and the seconds of its steps so far."""

    def __init__(self, job: Job, text: Text) -> None:
        torch.manual_seed(job.seed)
        self.job, self.arm, self.text = job, ARMS[job.arm], text
        self.model = GPT(job.width, LAYERS, job.width // HEAD_WIDTH, CONTEXT)
        self.generator = torch.Generator().manual_seed(1000 + job.seed)
        self.looked_at = draw(text.validation, LOOKED_AT, CONTEXT, torch.Generator().manual_seed(7))
        self.optimizers, self.rotations = self.arm.optimizers(self.model, job), None
        if self.arm.until:
            sites = sites_of(self.model)
            self.rotations = self.arm.rotations(self.model, self.optimizers, sites=sites, until=self.arm.until)
            self.rotations.measure_on(self.model, self.looked_at[0][:PIECES])
        self.seconds, self.done = 0.0, 0

    def step(self) -> None:
        started = time.perf_counter()
        if self.done == EARLY and self.arm.afterwards is not None:
            self.optimizers = self.arm.afterwards(self.model, self.job)
        loss = _loss(self.model, draw(self.text.train, PIECES, CONTEXT, self.generator))
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _rate(self.job, self.done)
            optimizer.step()
        self.done += 1
        self.seconds += time.perf_counter() - started

    @property
    def measuring(self) -> float:
        """The seconds that measuring the rotations has taken, which `seconds` contains."""
        return 0.0 if self.rotations is None else self.rotations.measuring

    @torch.no_grad()
    def validate(self) -> float:
        loss = float(_loss(self.model, self.looked_at))
        return loss if math.isfinite(loss) else math.inf


def run_job(job: Job, text: Text) -> Outcome:
    run, losses = Run(job, text), list[float]()
    for _ in range(job.steps // LOOK_EVERY):
        if losses and not math.isfinite(losses[-1]):
            losses.append(math.inf)
            continue
        for _ in range(LOOK_EVERY):
            run.step()
        losses.append(run.validate())
    seconds, rotations = run.seconds - run.measuring, run.rotations
    if rotations is None:
        return Outcome(job, tuple(losses), seconds, 0.0, 0.0)
    return Outcome(job, tuple(losses), seconds, rotations.seconds - run.measuring, rotations.inexact)


def time_steps(jobs: dict[str, Job], text: Text, rounds: int = 5, steps: int = 10) -> dict[str, float]:
    """Seconds of a step of each arm at the beginning of a run, rotations included: of the fastest of some rounds, in
    which the arms take turns."""
    runs = {arm: Run(job, text) for arm, job in jobs.items()}
    best = dict.fromkeys(runs, math.inf)
    for _ in range(rounds):
        for arm, run in runs.items():
            before = run.seconds - run.measuring
            for _ in range(steps):
                run.step()
            best[arm] = min(best[arm], (run.seconds - run.measuring - before) / steps)
    return best


def _rate(job: Job, step: int) -> float:
    if step < job.warm_up:
        return job.lr * (step + 1) / job.warm_up
    done = (step - job.warm_up) / max(1, job.steps - job.warm_up)
    return job.lr * (LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * done)))


def _loss(model: GPT, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
