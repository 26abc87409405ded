"""`Teleporter`: teleports inside a training loop, when a schedule says so."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .loss import LossFunction
from .mlp import Chain, check_batch, read_chain
from .objectives import Objective
from .options import check_int, check_name, make_options
from .report import LayerReport, TeleportReport
from .search import StepRecord
from .teleport import matched_batch_size, teleport_mlp

AUTO_BATCH_SIZE = 200  # the most samples that batch_size="auto" gathers
OPTIMIZER_STATES = ("keep", "reset")

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Schedule:
    """When to teleport: `teleports_per_epoch` times at the start of each of `epochs`.

    Epochs are counted from 0: epochs=[1] means after one whole epoch of training. They are kept sorted, each once.
    """

    epochs: Collection[int]
    teleports_per_epoch: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.epochs, (str, bytes)) or not isinstance(self.epochs, Collection):
            raise TypeError(f"epochs must be a collection of ints >= 0, got {self.epochs!r}")
        epochs = {check_int("epochs", epoch, at_least=0) for epoch in self.epochs}
        object.__setattr__(self, "epochs", tuple(sorted(epochs)))
        count = check_int("teleports_per_epoch", self.teleports_per_epoch, at_least=1)
        object.__setattr__(self, "teleports_per_epoch", count)


AFTER_ONE_EPOCH = Schedule(epochs=(1,), teleports_per_epoch=4)


class Teleporter:
    """Teleports a model in its training loop, with one line at the top of the loop's body:

        teleporter = Teleporter(model, optimizer, schedule=Schedule(epochs=[1], teleports_per_epoch=4))
        for epoch in range(epochs):
            for batch in loader:
                teleporter.step(batch, epoch=epoch)
                ...  # forward, backward, optimizer.step()

    In an epoch of the schedule, samples are gathered from successive batches; as soon as there are enough, the model
    is teleported on exactly that many and the gathered ones are dropped, until it has been teleported
    `teleports_per_epoch` times (a search that accepts no step counts). An epoch's leftovers are dropped at its end.

    Args:
        model: a chain of nn.Linear and invertible activations, as for `teleport_mlp`, whose parameters are changed in
            place.
        optimizer: holds all trainable parameters of the model.
        loss_fn: loss_fn(outputs, y) → scalar; default as for `teleport_mlp`.
        schedule: a Schedule; the default is four teleports in epoch 1.
        batch_size: samples of one teleport. "auto" gathers the smaller of 200 and the number of columns of the inputs
            of the teleported layers (the bias' column included), and uses as many of the first ones as all layers can
            match with a good condition number; `report.layers[0].n` says how many.
        optimizer_state: "keep", or "reset" to empty the optimizer's state of the model's parameters after each accepted
            teleport.
        objective: as for `teleport_mlp`. "lookahead" needs the rate of plain gradient descent: `lr` if given, else it
            is read from a torch.optim.SGD at every teleport (schedulers are followed) as the length of its averaged
            step, lr·(1 − dampening)/(1 − momentum), the largest over the groups that hold parameters of the model.
        **options: the other keyword arguments of `teleport_mlp`.

    Attributes:
        reports: the TeleportReports so far, part of the state_dict.

    A run that goes on from `state_dict()` (with the states of model and optimizer, and the same order of the data)
    equals the uninterrupted one bit for bit on the CPU.

    Raises:
        TypeError, ValueError: an argument is not what is said above, or the model is no such chain.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction | None = None,
        schedule: Schedule = AFTER_ONE_EPOCH,
        batch_size: int | str = "auto",
        optimizer_state: str = "keep",
        objective: str | Objective = "lookahead",
        **options: Any,
    ) -> None:
        chain = read_chain(model)
        _check_optimizer(optimizer, model)
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable as loss_fn(outputs, targets), got {type(loss_fn).__name__}")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule, got {type(schedule).__name__}")
        check_name("optimizer_state", optimizer_state, OPTIMIZER_STATES)
        options["objective"] = objective
        self._lr_is_read = objective == "lookahead" and options.get("lr") is None
        if self._lr_is_read:
            _plain_rate(optimizer, model)
        # A scheduler may start at lr = 0: an lr that is read counts at the teleports only.
        layers = _check_options(options | {"lr": 1.0} if self._lr_is_read else options, chain)
        self.model, self.optimizer, self.loss_fn, self.schedule = model, optimizer, loss_fn, schedule
        self.optimizer_state = optimizer_state
        self.reports: list[TeleportReport] = []
        self._options = options
        self._fit_batch = batch_size == "auto"
        self._wanted = _most_matched(chain, layers) if self._fit_batch else _check_batch_size(batch_size)
        self._epoch: int | None = None
        self._done = 0
        self._gathered: tuple[Batch, ...] = ()

    def step(self, batch: Batch, *, epoch: int) -> TeleportReport | None:
        """Gather or teleport as the schedule says; the report if there was a teleport, else None.

        If it raises, the samples gathered and the teleports counted are what they were before.
        """
        epoch = check_int("epoch", epoch, at_least=0)
        if epoch != self._epoch:
            self._epoch, self._done, self._gathered = epoch, 0, ()
        if epoch not in self.schedule.epochs or self._done >= self.schedule.teleports_per_epoch:
            return None
        check_batch(read_chain(self.model), batch)
        inputs, targets = batch[0].detach(), batch[1].detach()
        pending = (*self._gathered, (inputs, targets))
        _check_alike(pending)
        if sum(len(x) for x, _ in pending) < self._wanted:
            self._gathered = (*self._gathered, (inputs.clone(), targets.clone()))
            return None
        report = self._teleport(*(torch.cat(tensors)[: self._wanted] for tensors in zip(*pending, strict=True)))
        self._done, self._gathered = self._done + 1, ()
        self.reports.append(report)
        return report

    def state_dict(self) -> dict[str, Any]:
        """Where the teleporter is, as tensors and plain values: `torch.load(..., weights_only=True)` reads it."""
        return {
            "epoch": self._epoch,
            "done": self._done,
            "gathered": list(self._gathered),
            "reports": [asdict(report) for report in self.reports],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the teleporter that gave `state` was; schedule and options are the constructor's."""
        expected = set(self.state_dict())
        if not isinstance(state, Mapping) or set(state) != expected:
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state must have the entries {sorted(expected)}, got {got}")
        device = next(self.model.parameters()).device
        self._epoch, self._done = state["epoch"], state["done"]
        self._gathered = tuple((x.to(device), y.to(device)) for x, y in state["gathered"])
        self.reports = [_restore_report(report) for report in state["reports"]]

    def _teleport(self, inputs: Tensor, targets: Tensor) -> TeleportReport:
        options = self._options
        if self._lr_is_read:
            options = options | {"lr": _plain_rate(self.optimizer, self.model)}
        size = matched_batch_size(self.model, inputs, self._options.get("layers")) if self._fit_batch else len(inputs)
        report = teleport_mlp(self.model, (inputs[:size], targets[:size]), self.loss_fn, **options)
        if report.accepted and self.optimizer_state == "reset":
            for parameter in self.model.parameters():
                self.optimizer.state.pop(parameter, None)
        return report


def _restore_report(values: Mapping[str, Any]) -> TeleportReport:
    """The inverse of dataclasses.asdict for a report."""
    layers = tuple(LayerReport(**layer) for layer in values["layers"])
    trace = tuple(StepRecord(**step) for step in values["trace"])
    return TeleportReport(**{**values, "layers": layers, "trace": trace})


def _plain_rate(optimizer: torch.optim.Optimizer, model: nn.Module) -> float:
    """The rate of plain gradient descent that `optimizer` amounts to, the largest over the model's parameter groups."""
    if not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            f'lr must be given for objective "lookahead" with the optimizer {type(optimizer).__name__}: its own lr is '
            "not the rate of a plain gradient step. Pass lr=, for example the rate at which plain SGD would be run"
        )
    own = set(map(id, model.parameters()))
    groups = [group for group in optimizer.param_groups if any(id(parameter) in own for parameter in group["params"])]
    return max(_averaged_step_length(group) for group in groups)


def _averaged_step_length(group: Mapping[str, Any]) -> float:
    """By how much times the gradient a parameter of an SGD group moves in all, for a gradient that stays the same."""
    lr, momentum = float(group["lr"]), float(group["momentum"])
    if momentum == 0:
        return lr
    if momentum >= 1:
        raise ValueError(f"optimizer must have a momentum < 1 if lr is read from it, got {momentum}: pass lr=")
    return lr * (1 - float(group["dampening"])) / (1 - momentum)


def _most_matched(chain: Chain, layers: Sequence[int] | None) -> int:
    """The most samples that can be independent in the inputs of the hidden layers `layers` (1..m), at most 200."""
    hidden = range(1, len(chain.activations) + 1) if layers is None else layers
    linears = [chain.linears[k - 1] for k in hidden]
    return min(AUTO_BATCH_SIZE, *(linear.weight.shape[1] + (linear.bias is not None) for linear in linears))


def _check_optimizer(optimizer: object, model: nn.Module) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(f"optimizer must hold all trainable parameters of the model, got one without {missing}")


_OPTION_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(teleport_mlp).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


def _check_options(options: Mapping[str, Any], chain: Chain) -> Sequence[int] | None:
    """Raise unless `options` are right for `teleport_mlp`; the layers that they name."""
    unknown = sorted(set(options) - set(_OPTION_DEFAULTS))
    if unknown:
        raise TypeError(f"options must be among {sorted(_OPTION_DEFAULTS)}, got {unknown}")
    values = {**_OPTION_DEFAULTS, **options}
    values.pop("holdout")  # data: checked with the model at each teleport
    return make_options(**values, hidden_layers=len(chain.activations)).layers


def _check_batch_size(batch_size: object) -> int:
    if isinstance(batch_size, str):
        raise ValueError(f'batch_size must be an int >= 1 or "auto", got {batch_size!r}')
    return check_int("batch_size", batch_size, at_least=1)


def _check_alike(batches: Sequence[Batch]) -> None:
    """Raise unless the batch that came last can be joined with those gathered before."""
    for name, tensors in zip(("inputs", "targets"), zip(*batches, strict=True), strict=True):
        first, last = tensors[0], tensors[-1]
        if first.shape[1:] != last.shape[1:] or first.dtype != last.dtype:
            raise ValueError(
                f"batch {name} must be like those gathered before, samples of shape {tuple(first.shape[1:])} and "
                f"{first.dtype}, got {tuple(last.shape[1:])} and {last.dtype}"
            )
