"""The training loop of the neural-network experiments, plain and teleported: same seed, same start, same batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim import _muon

from experiments.data import Dataset
from experiments.records import EpochRecord, Run, TeleportRecord
from symtele_cuda.methods.published import Published
from symtele_cuda.objectives import Objective
from symtele_cuda.objectives.next_step import orthogonalized
from symtele_cuda.report import TeleportReport
from symtele_cuda.schedule import Schedule
from symtele_cuda.settings import Ascent, Guards
from symtele_cuda.teleporter import Teleporter

Loss = Callable[[Tensor, Tensor], Tensor]

# Steps of those that can be fused take longer on a CPU if they are not.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9, fused=True),
    "adagrad": partial(torch.optim.Adagrad, fused=True),
    "rmsprop": torch.optim.RMSprop,
    "adam": partial(torch.optim.Adam, fused=True),
    "adamw": partial(torch.optim.AdamW, fused=True),
    "muon": lambda parameters, lr: torch.optim.Muon(parameters, lr=lr, weight_decay=0.0),
}

ADAPTIVE_LRS = {"adagrad": 1e-2, "rmsprop": 1e-3, "adam": 1e-3, "adamw": 1e-3, "muon": 1e-2}


@dataclass(frozen=True)
class Task:
    """What is trained: an MLP without bias, LeakyReLU of slope 0.1 between its layers, on `train` with `loss_fn`.

    The weights start uniform in `weight_range`, or in ±1/√fan_in (torch's own default) without one.
    """

    dims: tuple[int, ...]
    loss_fn: Loss
    train: Dataset
    validation: Dataset | None = None
    weight_range: tuple[float, float] | None = None
    negative_slope: float = 0.1

    def make_model(self, generator: torch.Generator) -> nn.Sequential:
        """On the CPU, with the weights that `generator` draws."""
        return make_mlp(
            self.dims, lambda: nn.LeakyReLU(self.negative_slope), generator, weight_range=self.weight_range
        )

    def to(self, device: str) -> Task:
        validation = None if self.validation is None else self.validation.to(device)
        moved = (self.train.to(device), validation)
        return Task(self.dims, self.loss_fn, *moved, self.weight_range, self.negative_slope)


@dataclass(frozen=True)
class TrainingSettings:
    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    device: str = "cpu"


@dataclass(frozen=True)
class TeleportSettings:
    """When and how a run teleports; the options are those of `Teleporter`, `Ascent` and `Guards`, or of `Published`
    where `step_size` is a number.

    Without bounds on the weights and on noise, as `Teleporter` was when the study was run.
    """

    epochs: tuple[int, ...] = (0,)
    teleports_per_epoch: int = 3
    batch_size: int | str = "auto"
    objective: str | Objective = "lookahead"
    action: str = "least_change"
    inverse: str = "exact"
    group: str = "gl"
    layers: tuple[int, ...] | str | None = "last"
    steps: int = 3
    step_size: float | str = "auto"
    first_radius: float = 0.2
    lr: float | None = None
    margin: float = 8.0
    holdout_size: int | str = "auto"
    holdout_tol: float = 0.03
    min_gain: float = 2.0
    optimizer_state: str = "keep"

    @property
    def bounds(self) -> tuple[float, float]:
        """`max_weight_change` and `max_sensitivity`."""
        return math.inf, math.inf

    def teleporter(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Loss,
        kind: type[Teleporter] = Teleporter,
        holdout: tuple[Tensor, Tensor] | None = None,
    ) -> Teleporter:
        max_weight_change, max_sensitivity = self.bounds
        return kind(
            model,
            optimizer,
            loss_fn,
            method=self.method,
            schedule=Schedule(self.epochs, self.teleports_per_epoch),
            batch_size=self.batch_size,
            holdout_size=self.holdout_size,
            layers=self.layers,
            optimizer_state=self.optimizer_state,
            guards=Guards(
                holdout=holdout,
                holdout_tol=self.holdout_tol,
                min_gain=self.min_gain,
                max_weight_change=max_weight_change,
                max_sensitivity=max_sensitivity,
            ),
        )

    @property
    def method(self) -> Ascent | Published:
        """The published rule where there is a rate of the ascent, else the search of this library.

        Raises:
            ValueError: an action or an inverse that this search does not have, or another objective for the rule.
        """
        if not isinstance(self.step_size, str):
            if self.objective != "grad_norm":
                raise ValueError(f'objective must be "grad_norm" for the published rule, got {self.objective!r}')
            return Published(self.step_size, self.steps, self.inverse, self.action)
        if (self.action, self.inverse) != ("least_change", "exact"):
            raise ValueError(
                f"action and inverse are choices of the published rule, got {self.action!r} and {self.inverse!r} "
                "without a step size"
            )
        return Ascent(self.objective, self.lr, self.margin, self.steps, self.first_radius, group=self.group)


@dataclass(frozen=True)
class BoundedTeleports(TeleportSettings):
    """As `Teleporter` is by default, with bounds on the weights and on noise in the inputs."""

    steps: int = 4
    first_radius: float = 0.1
    max_weight_change: float = Ascent.usual_change
    max_sensitivity: float = Guards.max_sensitivity

    @property
    def bounds(self) -> tuple[float, float]:
        return self.max_weight_change, self.max_sensitivity


def default_lr(optimizer: str, sgd_lr: float) -> float:
    """A rate for `optimizer` where plain SGD takes `sgd_lr`; momentum 0.9 makes ten times as long steps."""
    return {"sgd": sgd_lr, "momentum": sgd_lr / 10, **ADAPTIVE_LRS}[optimizer]


def make_optimizer(name: str, parameters: list[nn.Parameter] | list[Tensor], lr: float) -> torch.optim.Optimizer:
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {sorted(OPTIMIZERS)}, got {name!r}")
    return OPTIMIZERS[name](parameters, lr=lr)


def make_mlp(
    dims: Sequence[int],
    make_activation: Callable[[], nn.Module],
    generator: torch.Generator,
    *,
    bias: bool = False,
    weight_range: tuple[float, float] | None = None,
) -> nn.Sequential:
    """An MLP on the CPU whose parameters `generator` draws: uniform in `weight_range`, or in ±1/√fan_in without one."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(dims):
        linear = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=bias)
        low, high = weight_range or (-1 / math.sqrt(d_in), 1 / math.sqrt(d_in))
        for parameter in linear.parameters():
            nn.init.uniform_(parameter, low, high, generator=generator)
        layers += [linear, make_activation()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Trainee:
    """What a run works on: the task, and the model, optimizer and teleporter (None: plain) that go through it.

    `generator` has drawn the weights and draws the order of the batches.
    """

    task: Task
    batch_size: int
    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    teleporter: Teleporter | None
    generator: torch.Generator

    def shuffled_batches(self) -> tuple[Tensor, ...]:
        """The indices of one epoch's batches."""
        order = torch.randperm(len(self.task.train), generator=self.generator)
        return order.to(self.task.train.inputs.device).split(self.batch_size)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.task.train.inputs[indices], self.task.train.targets[indices]

    def teleport(self, batch: tuple[Tensor, Tensor], epoch: int) -> TeleportReport | None:
        return None if self.teleporter is None else self.teleporter.step(batch, epoch=epoch)

    def teleport_unless_diverged(self, batch: tuple[Tensor, Tensor], epoch: int) -> TeleportReport | None:
        """`teleport`, which is an error where the loss is not finite; there this does nothing."""
        try:
            return self.teleport(batch, epoch)
        except ValueError:
            if self._is_finite(batch):
                raise
            return None

    @torch.no_grad()
    def _is_finite(self, batch: tuple[Tensor, Tensor]) -> bool:
        inputs, targets = batch
        return bool(self.task.loss_fn(self.model(inputs), targets).isfinite())

    def descend(self, batch: tuple[Tensor, Tensor]) -> None:
        """One step of the optimizer."""
        inputs, targets = batch
        self.optimizer.zero_grad()
        self.task.loss_fn(self.model(inputs), targets).backward()
        with muon_in_own_dtype() if inputs.device.type == "cpu" else nullcontext():
            self.optimizer.step()


@contextmanager
def muon_in_own_dtype() -> Iterator[None]:
    """Let torch's Muon orthogonalize in the dtype of the gradients, not in bfloat16.

    A CPU without instructions for bfloat16 takes ten times as long with it. Nothing public says in which dtype.
    """

    def in_own_dtype(
        matrix: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float, *_: object
    ) -> Tensor:
        """Some versions of torch hand over more, which only says how the same is computed."""
        return orthogonalized(matrix, coefficients, iterations, eps)

    own = _muon._zeropower_via_newtonschulz
    _muon._zeropower_via_newtonschulz = in_own_dtype  # type: ignore[assignment]  # other names of the arguments
    try:
        yield
    finally:
        _muon._zeropower_via_newtonschulz = own


def start(
    task: Task,
    training: TrainingSettings,
    teleports: TeleportSettings | None,
    seed: int,
    kind: type[Teleporter] = Teleporter,
) -> Trainee:
    """The beginning of the run of `seed`, whose teleporter is one of `kind`."""
    generator = torch.Generator().manual_seed(seed)
    model = task.make_model(generator).to(training.device)
    optimizer = make_optimizer(training.optimizer, list(model.parameters()), training.lr)
    teleporter = None if teleports is None else teleports.teleporter(model, optimizer, task.loss_fn, kind)
    return Trainee(task, training.batch_size, model, optimizer, teleporter, generator)


def compare(
    make_task: Callable[[int], Task],
    training: TrainingSettings,
    arms: dict[str, TeleportSettings | None],
    seeds: Iterable[int],
    on_epoch: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """One run for every seed and arm (label → teleports, None: plain); `on_epoch` gets the run so far, for progress."""
    runs = []
    for seed in seeds:
        task = make_task(seed).to(training.device)
        for teleports in arms.values():
            _check_schedule(teleports, training, task)
        warm_up(task, training)
        runs += [train(task, training, teleports, label, seed, on_epoch) for label, teleports in arms.items()]
    return runs


def train(
    task: Task,
    training: TrainingSettings,
    teleports: TeleportSettings | None,
    label: str,
    seed: int,
    on_epoch: Callable[[Run], None] = lambda run: None,
) -> Run:
    """One run. A run whose train loss is no longer finite ends at that epoch."""
    trainee = start(task, training, teleports, seed)
    run = Run(label, seed, (_evaluate(trainee.model, task, epoch=0, seconds=0.0),), ())
    for epoch in range(training.epochs):
        batches = trainee.shuffled_batches()
        started = time.perf_counter()
        made = _train_epoch(trainee, batches, epoch)
        _synchronize(training.device)
        seconds = run.final.seconds + time.perf_counter() - started
        record = _evaluate(trainee.model, task, epoch + 1, seconds)
        run = Run(label, seed, (*run.epochs, record), (*run.teleports, *made))
        on_epoch(run)
        if not math.isfinite(record.train_loss):
            break
    return run


def _train_epoch(trainee: Trainee, batches: tuple[Tensor, ...], epoch: int) -> list[TeleportRecord]:
    made = []
    for iteration, indices in enumerate(batches):
        batch = trainee.batch(indices)
        report = trainee.teleport_unless_diverged(batch, epoch)
        if report is not None:
            made.append(_teleport_record(report, position=epoch + iteration / len(batches)))
        trainee.descend(batch)
    return made


def _teleport_record(report: TeleportReport, position: float) -> TeleportRecord:
    return TeleportRecord(
        position=position,
        samples=report.layers[0].n,
        accepted=report.accepted,
        reason=report.reason,
        loss_before=report.loss_before,
        loss_after=report.loss_after,
        gradient_norm_before=report.grad_norm_before,
        gradient_norm_after=report.grad_norm_after,
        objective_before=report.objective_before,
        objective_after=report.objective_after,
        drift=report.drift,
        seconds=report.seconds,
    )


def _evaluate(model: nn.Module, task: Task, epoch: int, seconds: float) -> EpochRecord:
    train_loss = task.loss_fn(model(task.train.inputs), task.train.targets)
    gradients = torch.autograd.grad(train_loss, list(model.parameters()))
    gradient_norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    validation_loss, accuracy = validate(model, task)
    return EpochRecord(epoch, train_loss.item(), gradient_norm.item(), validation_loss, accuracy, seconds)


@torch.no_grad()
def validate(model: nn.Module, task: Task) -> tuple[float | None, float | None]:
    """(loss, accuracy) on the validation set; None without one, and no accuracy in a regression."""
    if task.validation is None:
        return None, None
    outputs, targets = model(task.validation.inputs), task.validation.targets
    loss = task.loss_fn(outputs, targets).item()
    if targets.is_floating_point():
        return loss, None
    return loss, (outputs.argmax(dim=1) == targets).float().mean().item()


NOISE = 0.3
"""The standard deviation of the noise of `with_noise`, as a share of that of all elements of the training inputs."""


@torch.no_grad()
def noisy_accuracy(model: nn.Module, task: Task) -> float | None:
    """The accuracy on the validation set with noise in its inputs, always the same; None in a regression."""
    if task.validation is None or task.validation.targets.is_floating_point():
        return None
    noisy, targets = with_noise(task.train, task.validation)
    return (model(noisy).argmax(dim=1) == targets).float().mean().item()


def with_noise(train: Dataset, validation: Dataset, draws: int = 1) -> tuple[Tensor, Tensor]:
    """The validation samples `draws` times with normal noise, and their targets."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((draws, *validation.inputs.shape), generator=generator).to(validation.inputs.device)
    noisy = validation.inputs + NOISE * train.inputs.std(correction=0) * noise
    return noisy.flatten(0, 1), validation.targets.repeat(draws)


def norm_of(model: nn.Module) -> float:
    """‖W‖ of all parameters."""
    return float(torch.stack([parameter.detach().norm() for parameter in model.parameters()]).norm())


def warm_up(task: Task, training: TrainingSettings, iterations: int = 20) -> None:
    """A few discarded iterations, so that the first run does not pay for torch's own start in its wall-clock."""
    batch = torch.arange(min(training.batch_size, len(task.train)), device=training.device)
    _train_epoch(start(task, training, None, seed=0), (batch,) * iterations, epoch=0)
    _synchronize(training.device)


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _check_schedule(teleports: TeleportSettings | None, training: TrainingSettings, task: Task) -> None:
    if teleports is None:
        return
    if max(teleports.epochs) >= training.epochs:
        raise ValueError(
            f"teleport epochs are counted from 0 and must lie below the {training.epochs} epochs of the run, "
            f"got {list(teleports.epochs)}"
        )
    if isinstance(teleports.batch_size, int) and teleports.batch_size > len(task.train):
        raise ValueError(
            f"teleport batch size must be at most the {len(task.train)} training samples, got {teleports.batch_size}"
        )
