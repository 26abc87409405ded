"""`Teleporter`: teleports inside a training loop, when a schedule says so."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_alone, check_bool, check_int, check_name
from .errors import TeleportError
from .kernels.library import check_backend
from .measure import measure_own
from .methods.published import Published
from .methods.standardise import ALL, Standardise
from .model.chain import Chain, as_constant, check_batch, check_layers, check_same_structure, mark_of
from .model.loss import LossFunction
from .model.problem import Problem
from .model.reader import read_chain
from .model.samples import choose_samples, layers_to_match
from .objectives import GradNorm
from .objectives.next_step import OptimizerLookahead
from .objectives.own_steps import OwnSteps
from .optimizers import PendingGradients, check_holds, unwrap
from .plasticity import plasticity
from .report import TeleportReport, check_list, restore
from .schedule import Batch, Progress, Schedule
from .settings import GL, LOOKAHEAD, NEXT_STEP, Ascent, Guards
from .teleport import Reading, check_possible, check_settings, refuse_futile, teleport_problem
from .transaction import Transaction

AUTO_BATCH_SIZE = 200  # the most samples that batch_size="auto" gathers
AUTO_HOLDOUT_SIZE = 200  # so many tell a change of the loss by a few percent from chance
OPTIMIZER_STATES = ("keep", "reset")
ON_ERROR = ("raise", "warn")

EARLY = Schedule(epochs=(0,), teleports_per_epoch=3)
ONCE = Schedule(epochs=(0,))
LOOK_AHEAD = Ascent(LOOKAHEAD, margin=8.0, steps=4, first_radius=0.1)
CAREFUL = Guards(holdout_tol=0.03, min_gain=2.0)
STANDARDISED = Standardise(refit=ALL, least_kept=0.0)  # at the start predictions mean nothing
WORTHWHILE = Guards(holdout_tol=0.03, min_gain=1.0)
AUTO, LAST = "auto", "last"


class Teleporter:
    """Teleports a model in its training loop, with one line at the top of the loop's body:

        teleporter = Teleporter(model, optimizer)
        for epoch in range(epochs):
            for batch in loader:
                teleporter.step(batch, epoch=epoch)
                ...  # forward, backward, optimizer.step()

    In an epoch of the schedule, samples are gathered from successive batches; as soon as there are enough, the model
    is teleported on exactly that many and the gathered ones are dropped, until it has been teleported
    `teleports_per_epoch` times (a search that accepts no step counts). An epoch's leftovers are dropped at its end,
    with a warning if there was not a single teleport.

    No teleport is made on pending gradients, those that no optimizer step has used yet: they belong to the weights as
    they are. Under gradient accumulation, or where a GradScaler has skipped a step, it waits for the next call without.

    Args:
        model: a chain of nn.Linear and activations, as for `teleport_mlp`, whose parameters are changed in
            place. It is read here; a later change of its structure is an error that names what has changed.
        optimizer: holds all trainable parameters of the model: a torch.optim.Optimizer, a wrapper that holds one in
            `.optimizer`, or a sequence of these (Muon for the matrices and AdamW for the biases, say).
        loss_fn: loss_fn(outputs, y) → scalar; default as for `teleport_mlp`.
        method: how a teleport finds its point; the default standardises all hidden layers at the start, on whatever
            activations. "lookahead" without `lr` looks `margin` times the optimizer's own steps
            ahead, read at each teleport (schedulers are followed). For torch.optim.SGD it is a gradient step of the
            rate that its steps come to with momentum, lr (1 − dampening)/(1 − momentum), the largest over the groups
            that hold parameters of the model. For Muon, whose steps are of one length whatever the gradient, it is a
            gradient step of that length, at the rate that it takes before the teleport on the samples gathered. For
            Adagrad, RMSprop, Adam and AdamW, and for several optimizers of different kinds, it is their next step,
            `OptimizerLookahead`, weight decay included. While the lr of all these groups is 0, as at the start of a
            warm-up, `step` does nothing: there is no step to look ahead to. With `lr` it is the gradient step of that
            rate, for any optimizer. "next_step" is `OptimizerLookahead` for all: with momentum it sees little of what
            the new gradient will do, since the buffer stays as it is.
        schedule: a Schedule; the default is one teleport at the start of epoch 0, with a search three.
        batch_size: samples of one teleport. "auto" gathers the smaller of 200 and the number of columns of the inputs
            of the layers that GL is to move (the bias' column included), and teleports on those of them that all these
            layers can tell apart well, `matched_samples`; `report.layers[0].n` says how many. Where the step ahead does
            not lower the loss of all that is gathered, `min_gain` refuses the teleport before any are chosen. With
            group="positive_diagonal" it is 200 samples as they come, and so it is with `Standardise`; its refit="last"
            takes no more than the output layer's input has columns.
        holdout_size: so many further samples of the stream, those behind the teleport's own, are gathered as its
            holdout, the guard on samples that the search does not see. "auto" is 200 (none where `guards` have a
            holdout), 0 is none.
        layers: as for `teleport_mlp`, or "last": with group="gl" the last hidden layer that has an invertible
            activation, with the other group all. One layer costs less than all, and mostly gains more: the narrow
            inputs of the others do not limit the batch, and they keep their effect on samples outside it. "auto" is
            all of them with `Standardise`, and "last" with the others.
        optimizer_state: what an accepted teleport does to the optimizer's state of the model's parameters: "keep"
            leaves it, "reset" empties it.
        guards: as for `teleport_mlp`. By default the loss of the holdout may rise by 3 %, and the step ahead must lower
            the loss twice as much: where the rate suits the weights well, no point of the level set gives that, and
            the run goes on as it would have without the teleporter. With `Standardise` the best step must not lower it
            less than before, and with torch.optim.SGD two steps of its rate must not raise the loss.
        on_error: "raise", or "warn": a teleport that fails is a warning, its samples are dropped, it counts as made,
            and training goes on.
        backend: as for `teleport_mlp`.

    Attributes:
        reports: the TeleportReports so far, part of the state_dict.

    A run that goes on from `state_dict()` (with the states of model and optimizer, and the same order of the data)
    equals the uninterrupted one bit for bit on the CPU.

    Raises:
        TypeError, ValueError: an argument is not what is said above, or the model is no such chain, or one that this
            method can never teleport, or the process is one of several ranks of torch.distributed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        loss_fn: LossFunction | None = None,
        *,
        method: Ascent | Published | Standardise = STANDARDISED,
        schedule: Schedule | None = None,
        batch_size: int | str = AUTO,
        holdout_size: int | str = AUTO,
        layers: Sequence[int] | str | None = AUTO,
        optimizer_state: str = "keep",
        guards: Guards | None = None,
        on_error: str = "raise",
        backend: str = "auto",
    ) -> None:
        check_alone("Teleporter")
        chain = Transaction().run(lambda: read_chain(model))
        optimizers = unwrap(optimizer)
        check_holds(model, optimizers)
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable as loss_fn(outputs, targets), got {type(loss_fn).__name__}")
        in_closed_form = isinstance(method, Standardise)
        schedule = (ONCE if in_closed_form else EARLY) if schedule is None else schedule
        guards = (WORTHWHILE if in_closed_form else CAREFUL) if guards is None else guards
        guards = check_settings(method, guards)
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule, got {type(schedule).__name__}")
        check_name("optimizer_state", optimizer_state, OPTIMIZER_STATES)
        check_name("on_error", on_error, ON_ERROR)
        check_backend(backend)
        self._own_steps = OwnSteps(optimizers, model)
        if method.reads_step:
            self._own_steps.check(chain, one_step=method.objective == NEXT_STEP)
        elif method.objective == LOOKAHEAD:
            self._own_steps.check_minimises()
        self.model, self.optimizer, self.loss_fn, self.schedule = model, optimizer, loss_fn, schedule
        self.method, self.guards, self.optimizer_state = method, guards, optimizer_state
        self.reports: list[TeleportReport] = []
        self._layers = _choose_layers(chain, layers, method)
        automatic = batch_size == AUTO
        matches = method.group == GL and not in_closed_form
        self._matched_layers = layers_to_match(chain, self._layers) if automatic and matches else []
        most = _most_samples(chain, self._matched_layers, method)
        self._wanted = most if automatic else _check_batch_size(batch_size)
        self._holdout_size = _check_holdout_size(holdout_size, guards)
        check_possible(chain, self._layers, self._wanted, method)
        self.on_error, self.backend = on_error, backend
        self._optimizers, self._chain, self._mark = optimizers, chain, mark_of(model)
        self._pending_gradients = PendingGradients(model, optimizers)
        self._progress = Progress()

    def __repr__(self) -> str:
        which = "all hidden layers" if self._layers is None else f"hidden layers {list(self._layers)}"
        accepted = sum(report.accepted for report in self.reports)
        return (
            f"Teleporter({self.schedule}: {which} of "
            f"{len(self._chain.activations)}, {self._wanted} samples + {self._holdout_size} held out; "
            f"so far {accepted} of {len(self.reports)} accepted)"
        )

    def step(self, batch: Batch, *, epoch: int) -> TeleportReport | None:
        """Gather or teleport as the schedule says; the report if there was a teleport, else None.

        If it raises, the samples gathered and the teleports counted are what they were before, as are model and
        optimizers.
        """
        epoch = check_int("epoch", epoch, at_least=0)
        progress = self._progress
        if progress.epoch is not None and epoch < progress.epoch:
            raise ValueError(
                f"epoch must not go backwards, got {epoch} after {progress.epoch}: a new run takes a new Teleporter"
            )
        if epoch != progress.epoch:
            self._warn_of_epoch_without(progress)
        progress = progress.called(epoch, self.schedule)
        if not self._is_due(progress):
            self._progress = progress
            return None
        transaction = Transaction()
        try:
            return transaction.run(lambda: self._advance(transaction, progress, batch))
        except Exception as error:
            if self.on_error == "raise":
                raise
            warnings.warn(f"a teleport failed, {type(error).__name__}: {error}", stacklevel=2)
            self._progress = progress.finished(self.schedule)
            return None

    def refresh(self, batch: Batch, *, holdout: Batch | None = None) -> TeleportReport:
        """Teleport now, whatever the schedule says: at a change of the data, say, with `Standardise(refit="all")`.

        Args:
            batch: all samples to teleport on; with a search, those of them that match where batch_size is "auto".
            holdout: in the place of that of the guards.

        Raises:
            TypeError, ValueError: the batch does not fit the model and the loss.
            TeleportError: gradients are pending, or the batch lets no layer be teleported. Nothing has changed.
        """
        transaction = Transaction()

        def work() -> TeleportReport:
            self._keep(transaction)
            check_holds(self.model, self._optimizers)
            chain = self._read_model()
            transaction.compute_on(chain.linears[0].weight.device)
            if self._pending_gradients:
                raise TeleportError(
                    "refresh must be called where no gradients are pending, got some that no optimizer step has used"
                )
            report = self._teleport(transaction, chain, batch, holdout)
            self.reports.append(report)
            return report

        return transaction.run(work)

    def state_dict(self) -> dict[str, Any]:
        """Where the teleporter is, as tensors and plain values: `torch.load(..., weights_only=True)` reads it."""
        return {
            "epoch": self._progress.epoch,
            "done": self._progress.done,
            "gathered": list(self._progress.gathered),
            "calls": self._progress.calls,
            "owed": self._progress.owed,
            "reports": [asdict(report) for report in self.reports],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the teleporter that gave `state` was; schedule and options are the constructor's.

        All or nothing.

        Raises:
            TypeError, ValueError: `state` is not what `state_dict` gives for such a model; nothing has changed.
        """
        expected = set(self.state_dict())
        if not isinstance(state, Mapping) or set(state) != expected:
            got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state must have the entries {sorted(expected)}, got {got}")
        transaction = Transaction()
        transaction.run(lambda: self._load(transaction, state))

    def _load(self, transaction: Transaction, state: Mapping[str, Any]) -> None:
        self._keep(transaction)
        chain = self._read_model()
        transaction.compute_on(chain.linears[0].weight.device)
        progress = Progress(
            epoch=None if state["epoch"] is None else check_int("state: epoch", state["epoch"], at_least=0),
            done=check_int("state: done", state["done"], at_least=0),
            gathered=_restore_batches(state["gathered"], chain),
            calls=check_int("state: calls", state["calls"], at_least=0),
            owed=check_bool("state: owed", state["owed"]),
        )
        reports = [restore(TeleportReport, values) for values in check_list("state: reports", state["reports"])]
        self._progress, self.reports[:] = progress, reports

    def _keep(self, transaction: Transaction) -> None:
        """Put back what a call changes here where it raises."""
        for name in ("_progress", "_chain", "_mark"):
            transaction.keep_attribute(self, name)
        transaction.on_failure(functools.partial(self.reports.__setitem__, slice(None), [*self.reports]))

    def _warn_of_epoch_without(self, progress: Progress) -> None:
        """Say that an epoch of the schedule has ended without one teleport, and why."""
        seen = sum(len(x) for x, _ in progress.gathered)
        if progress.done > 0 or not (seen > 0 or progress.waited):
            return
        if progress.waited:
            reason = (
                "had gradients that no optimizer step had used at every call with enough samples: no teleport; call "
                "step where there are none, and hand over the optimizers that really step"
            )
        else:
            reason = (
                f"had {seen} samples, fewer than the {self._wanted} of a teleport and the {self._holdout_size} of its "
                "holdout: no teleport; pass a smaller batch_size or holdout_size"
            )
        warnings.warn(f"epoch {progress.epoch} {reason}", stacklevel=3)

    def _is_due(self, progress: Progress) -> bool:
        """Whether the schedule wants one more teleport, and the optimizer takes steps to look ahead to."""
        return progress.is_due(self.schedule) and (not self.method.reads_step or self._own_steps.largest_lr > 0)

    def _read_model(self) -> Chain:
        """The chain, read again only where something of the model has changed that it depends on."""
        if (mark := mark_of(self.model)) != self._mark:
            chain = read_chain(self.model)
            check_same_structure(self._chain, chain)
            self._chain, self._mark = chain, mark
        return self._chain

    def _advance(self, transaction: Transaction, progress: Progress, batch: Batch) -> TeleportReport | None:
        """Gather `batch`, or teleport if that makes enough samples and no gradients are pending."""
        self._keep(transaction)
        check_holds(self.model, self._optimizers)
        chain = self._read_model()
        transaction.compute_on(chain.linears[0].weight.device)
        check_batch(chain, batch)
        inputs, targets = map(as_constant, batch)
        pending = (*progress.gathered, (inputs, targets))
        _check_alike(pending)
        if sum(len(x) for x, _ in pending) < self._wanted + self._holdout_size:
            self._progress = replace(progress, gathered=(*progress.gathered, (inputs.clone(), targets.clone())))
            return None
        if self._pending_gradients:
            self._progress = replace(progress, waited=True)
            return None
        inputs, targets = (torch.cat(tensors) for tensors in zip(*pending, strict=True))
        own, held = slice(self._wanted), slice(self._wanted, self._wanted + self._holdout_size)
        holdout = (inputs[held], targets[held]) if self._holdout_size > 0 else None
        self._progress = progress.finished(self.schedule)
        when = None if progress.is_of_epoch(self.schedule) else self.schedule.when
        if when is not None and not when(plasticity(self.model, inputs)):
            return None
        report = self._teleport(transaction, chain, (inputs[own], targets[own]), holdout)
        self.reports.append(report)
        return report

    def _teleport(
        self, transaction: Transaction, chain: Chain, batch: Batch, holdout: Batch | None
    ) -> TeleportReport:
        """Teleport on the batch, or on the samples of it that match, with this holdout in the place of the guards'."""
        started = time.perf_counter()
        inputs, targets = batch
        reading = Reading(transaction, self.model, chain, self.loss_fn, self.backend)
        problem = reading.problem(batch)
        method, guards = self._method_for(problem), self.guards
        if holdout is not None:
            guards = replace(guards, holdout=holdout)
        if isinstance(method, Standardise) and guards.rate is None:
            guards = replace(guards, rate=self._own_steps.plain_rate())
        report = None
        if self._matched_layers and isinstance(method, Ascent) and method.looks_ahead and guards.min_gain > 0:
            report = refuse_futile(problem, method, guards)  # choosing samples would take several times as long
        if report is None:
            if self._matched_layers:
                chosen = choose_samples(problem.network, problem.samples, problem.outputs, self._matched_layers)
                if len(chosen) < len(problem.samples):
                    problem = reading.problem((inputs[chosen], targets[chosen]))
            report = teleport_problem(reading, problem, method, self._layers, guards)
        if report.accepted and self.optimizer_state == "reset":
            for optimizer in self._optimizers:
                transaction.keep_state(optimizer)
                for parameter in self.model.parameters():
                    optimizer.state.pop(parameter, None)
        return report.timed(started)

    def _method_for(self, problem: Problem) -> Ascent | Published | Standardise:
        """The method with what it reads off the optimizers, for a problem where it depends on that."""
        method, steps = self.method, self._own_steps
        if not isinstance(method, Ascent) or not method.reads_step:
            return method
        if method.objective == LOOKAHEAD:
            if (rate := steps.gradient_rate()) is not None:
                return replace(method, lr=rate)
            if (length := steps.fixed_length(self._chain)) is not None:
                norm = measure_own(problem, GradNorm()).gradient_norm
                return replace(method, lr=length / norm if norm > 0 else length)  # 0 steps nowhere at any rate
        return replace(method, objective=OptimizerLookahead(steps.next_step(self._chain), method.margin))


def _restore_batches(batches: object, chain: Chain) -> tuple[Batch, ...]:
    """Gathered batches on the model's device, in memory of their own; raise unless they are batches for the model."""
    device = chain.linears[0].weight.device
    restored: tuple[Batch, ...] = ()
    for batch in check_list("state: gathered", batches):
        try:
            if not isinstance(batch, (tuple, list)) or not all(isinstance(t, Tensor) and not t.is_meta for t in batch):
                raise TypeError("batch must be a pair (inputs, targets) of tensors that hold data")
            moved = tuple(as_constant(t).to(device, copy=True) for t in batch)
            check_batch(chain, moved)
            restored = (*restored, (moved[0], moved[1]))
            _check_alike(restored)
        except (TypeError, ValueError) as error:
            raise type(error)(f"state: gathered: {error}") from error
    return restored


def _choose_layers(
    chain: Chain, layers: Sequence[int] | str | None, method: Ascent | Published | Standardise
) -> Sequence[int] | None:
    """The hidden layers (1..m) that `layers` stands for; None is all."""
    if not isinstance(layers, str):
        return None if layers is None else check_layers(layers, len(chain.activations))
    if layers not in (AUTO, LAST):
        raise ValueError(f'layers must be "auto", "last", a sequence of hidden layer numbers or None, got {layers!r}')
    if method.group != GL or (layers == AUTO and isinstance(method, Standardise)):
        return None
    return layers_to_match(chain, None)[-1:] or None


def _most_samples(chain: Chain, matched: Sequence[int], method: Ascent | Published | Standardise) -> int:
    """The most samples that can be independent in the inputs of the hidden layers `matched` (1..m), at most 200."""
    exact = [len(chain.linears)] if isinstance(method, Standardise) and method.refit == LAST else []
    return min([AUTO_BATCH_SIZE, *map(chain.columns, [*matched, *exact])])


def _check_batch_size(batch_size: object) -> int:
    if isinstance(batch_size, str):
        raise ValueError(f'batch_size must be an int >= 1 or "auto", got {batch_size!r}')
    return check_int("batch_size", batch_size, at_least=1)


def _check_holdout_size(holdout_size: object, guards: Guards) -> int:
    given = guards.holdout is not None
    if isinstance(holdout_size, str):
        if holdout_size != "auto":
            raise ValueError(f'holdout_size must be an int >= 0 or "auto", got {holdout_size!r}')
        return 0 if given else AUTO_HOLDOUT_SIZE
    size = check_int("holdout_size", holdout_size, at_least=0)
    if size > 0 and given:
        raise ValueError(f"holdout must not be given with holdout_size > 0, got both and holdout_size={size}")
    return size


def _check_alike(batches: Sequence[Batch]) -> None:
    """Raise unless the batch that came last can be joined with those gathered before."""
    for name, tensors in zip(("inputs", "targets"), zip(*batches, strict=True), strict=True):
        first, last = tensors[0], tensors[-1]
        if first.shape[1:] != last.shape[1:] or first.dtype != last.dtype:
            raise ValueError(
                f"batch {name} must be like those gathered before, samples of shape {tuple(first.shape[1:])} and "
                f"{first.dtype}, got {tuple(last.shape[1:])} and {last.dtype}"
            )
