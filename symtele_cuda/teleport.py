"""One teleport of a model, all or nothing: read, make the orbit, climb, settle, write."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TeleportError
from .guards import (
    LATER_TAKEN_BACK,
    STANDARDISED,
    STEPS_AHEAD,
    STEPS_LONG_ENOUGH,
    Bounds,
    is_futile,
    not_finite,
    on_rate,
    refusal,
    refusal_of_standardised,
    too_little_gain,
)
from .kernels.library import check_backend, products_for
from .measure import Measurement, loss_after_steps, measure, measure_own, weight_changes
from .methods import published
from .methods.published import Published
from .methods.standardise import (
    ALL,
    Standardise,
    check_standardisable,
    plan_standardise,
    shares_kept,
    standardise,
)
from .model.chain import Chain, check_layers
from .model.loss import LossFunction
from .model.network import Network, parameter_list
from .model.problem import Problem, begin
from .model.reader import read_chain
from .model.surroundings import Surroundings
from .model.whole import WholeModel, begin_whole
from .objectives import GradNorm
from .objectives.best_decrease import BestDecrease
from .optimizers import check_holds, unwrap
from .orbits.batch import BatchOrbit
from .orbits.batch_plan import check_matchable, make_plan, match_inputs, report_unmatched
from .orbits.exact import ExactOrbit, plan_scales
from .outcome import Found, describe_backend, describe_kernels, make_report, report_unchanged
from .report import LayerReport, TeleportReport
from .search import device
from .search.trust_region import Search, SearchResult, ascend, holding
from .settings import GL, Ascent, Guards
from .sites import Declaration, Site, resolve
from .sites.action import ORTHOGONAL
from .sites.exactness import KEPT, change_of, check_exact
from .sites.state import transport
from .transaction import Transaction


def teleport_mlp(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    loss_fn: LossFunction | None = None,
    *,
    method: Ascent | Published | Standardise = Ascent(),
    layers: Sequence[int] | None = None,
    guards: Guards = Guards(),
    backend: str = "auto",
) -> TeleportReport:
    """Move the weights of `model`, in place, along the level set of the loss on `batch`, to where the optimizer
    gains more.

    With group="gl", g_k ∈ GL(d_k) acts on the activations of hidden layer k = 1..m, B_k = σ(Z_k) g_kᵀ, and every
    weight layer becomes

        [W_k', b_k'] = [W_k, b_k] + (σ⁻¹(B_k) − B_{k−1} W_kᵀ − b_k)ᵀ P(B_{k−1}),   P(B) = [B, 1]⁺ᵀ,

    the least change of the weights with this effect (Zhao et al. 2022, arXiv 2205.10637, eq. 8, has 0 in the place of
    W_k, b_k). It keeps the outputs on the batch exactly where the rows of [B_{k−1}, 1] are linearly independent. With
    group="positive_diagonal", D_k = diag(exp s_k) does,

        W_k' = D_k W_k,   b_k' = D_k b_k,   W_{k+1}' = W_{k+1} D_k⁻¹,

    which keeps the outputs on every input where the activation is positively homogeneous. g and s are found by the
    method. Parameters are written once, at the end, in place; after an error or a rejected search the model is bit for
    bit what it was. Deterministic on the CPU.

    Args:
        model: a chain of nn.Linear and activations, with constants and what else `model.reader.read_chain` understands;
            float32 or float64; bfloat16 and float16 are computed in float32 and rounded once at the end.
        batch: (x, y), n samples x as the model takes them and their targets.
        loss_fn: loss_fn(outputs, y) → scalar. Default: cross entropy for integer y, mean squared error for floating
            y of the outputs' shape. A loss with weight terms must reach the weights through `model`; it takes the
            general path, with the weights formed at every step.
        method: how the point on the level set is found. `Ascent` searches it, `Standardise` has it in closed form.
            `Published` is the rule of the source: the guards count for nothing there, and only weights that are not
            finite are refused.
        layers: the hidden layers k = 1..m to teleport; default: all that the batch allows.
        guards: what the teleport must keep to be written.
        backend: "torch", "cuda", or "auto" for the best that is there.

    Returns:
        A TeleportReport; `accepted` says whether the weights were written.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the text names it, what was expected and what
            came.
        TeleportError: no layer, or not every layer named in `layers`, can be teleported with this batch.
    """

    def work() -> TeleportReport:
        reading = Reading(transaction, model, read_chain(model), loss_fn, backend)
        return teleport_chain(reading, batch, method, layers, guards)

    transaction = Transaction()
    return transaction.run(work)


def teleport(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    loss_fn: LossFunction | None = None,
    *,
    sites: Iterable[Site | Declaration] | str = "auto",
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    method: Ascent = Ascent(),
    guards: Guards = Guards(),
) -> TeleportReport:
    """Move the weights of any model, in place, along symmetries that keep its outputs on every input.

    That the sites are symmetries is measured on the batch before anything moves, and again afterwards.

    Args:
        model: any module of one input, with parameters of one dtype; it computes the same twice (no dropout). 16-bit
            ones are computed in float32 and rounded once at the end.
        batch: (x, y), the samples on which the objective counts, x as the model takes them.
        loss_fn: loss_fn(outputs, y) → scalar; default as for `teleport_mlp`.
        sites: where a group acts: "auto" is `find_sites(model)`; or declared ones, see `LinearPair`, `QueryKey` and
            `Scales`. A rotation (`Stream`) changes neither ‖∇L‖ nor a gradient step, and is left where it is:
            `EigenbasisTeleporter` is for these.
        optimizer: one or several whose state moves along: first moments by g^{-T}, second ones by its squared entries.
            None leaves every state as it is.
        method: how the point on the orbit is found; its group is that of the sites.
        guards: what the teleport must keep to be written. Noise in the inputs sees nothing of it.

    Returns:
        A TeleportReport without layers.

    Raises:
        TypeError, ValueError: an argument is not what is said above.
        TeleportError: there is no site, one is no symmetry of the model, or the optimizer's state cannot be moved.
            Nothing has changed.
    """

    def work() -> TeleportReport:
        started = time.perf_counter()
        suited = check_settings(method, guards)
        if not isinstance(method, Ascent):
            raise TypeError(f"method must be an Ascent, got {type(method).__name__}")
        begin_whole(transaction, model)
        optimizers = () if optimizer is None else unwrap(optimizer)
        if optimizers:
            check_holds(model, optimizers)
        listed = _that_search_moves(resolve(model, sites))
        whole = WholeModel.make(model, batch, loss_fn, guards.holdout)
        values, parameters = whole.values, list(whole.parameters.values())
        outputs = check_exact(whole.outputs, values, listed)
        orbit = ExactOrbit.make(values, whole.losses, listed, method.make_objective(), parameters[0].dtype)
        found = _climb(orbit, method, suited)
        report, weights = _settle(orbit, method, suited, found, ())
        if weights is not None:
            transaction.write(parameters, weights)
            moved = zip(listed, found.result.waypoints[report.steps], strict=True)
            transport(transaction, optimizers, whole.parameters, moved)
            _check_kept(outputs, whole.outputs({}), orbit.written)
        return report.timed(started)

    transaction = Transaction()
    return transaction.run(work)


def _that_search_moves(sites: Sequence[Site]) -> list[Site]:
    found = [site for site in sites if site.group != ORTHOGONAL]
    if not found:
        raise TeleportError(
            "sites: expected one whose group changes gradients, got rotations alone: EigenbasisTeleporter is for these"
        )
    return found


def _check_kept(before: Sequence[Tensor], after: Sequence[Tensor], written: torch.dtype) -> None:
    """Raise if the outputs have changed by more than rounding to the dtype in which the weights are written."""
    change, allowed = change_of(before, after), max(KEPT, 10 * torch.finfo(written).eps)
    if not change <= allowed:
        raise TeleportError(f"the outputs changed by {change:.1e} of their norm, expected at most {allowed:.1e}")


@dataclass(frozen=True)
class Reading:
    """A model that is read as a chain, with its loss, as part of a transaction."""

    transaction: Transaction
    model: nn.Module
    chain: Chain
    loss_fn: LossFunction | None
    backend: str = "auto"

    def problem(self, batch: tuple[Tensor, Tensor]) -> Problem:
        begin(self.transaction, self.chain)
        products = products_for(self.chain.linears[0].weight.device, self.backend)
        return Problem.make(self.model, self.chain, batch, self.loss_fn, products)


def teleport_chain(
    reading: Reading,
    batch: tuple[Tensor, Tensor],
    method: Ascent | Published | Standardise,
    layers: Sequence[int] | None,
    guards: Guards,
) -> TeleportReport:
    """`teleport_mlp` of a model that is read."""
    started = time.perf_counter()
    guards = check_settings(method, guards)
    check_backend(reading.backend)
    named = None if layers is None else check_layers(layers, len(reading.chain.activations))
    if isinstance(method, Ascent):
        method.make_objective()  # what it cannot do without is said before the model is looked at
    return teleport_problem(reading, reading.problem(batch), method, named, guards).timed(started)


def teleport_problem(
    reading: Reading,
    problem: Problem,
    method: Ascent | Published | Standardise,
    named: Sequence[int] | None,
    guards: Guards,
) -> TeleportReport:
    """The teleport of the hidden layers `named` (1..m; None: all that can be moved) on a batch that is read."""
    chain = reading.chain
    if isinstance(method, Standardise):
        return _standardise(reading, problem, method, named, guards)
    objective = GradNorm() if isinstance(method, Published) else method.make_objective()
    around = Surroundings.make(chain, guards.holdout, problem)
    if method.group == GL:
        matches = match_inputs(problem, named)
        plans, reports = make_plan(problem, matches, named)
        orbit: Any = BatchOrbit(problem, around, tuple(matches), plans, objective, guards.bound_noise)
        parameters = [parameter for _, parameter in chain.named_parameters()]
    else:
        sites, reports = plan_scales(chain, len(problem.samples), named)
        trainable = {name: p for name, p in chain.named_parameters() if p.requires_grad}
        values = dict(zip(trainable, problem.leaves(problem.network), strict=True))
        losses = problem.losses(around.holdout)
        orbit = ExactOrbit.make(values, losses, sites, objective, problem.parameter_dtype)
        parameters = list(trainable.values())
    if isinstance(method, Published):
        return _follow(reading.transaction, orbit, method, parameters, reports)
    return _run(reading.transaction, orbit, method, guards, parameters, reports)


def _follow(
    transaction: Transaction,
    orbit: BatchOrbit,
    rule: Published,
    parameters: list[nn.Parameter],
    reports: tuple[LayerReport, ...],
) -> TeleportReport:
    """The published rule: no trial step is judged, and weights that are finite are written."""
    problem, before = orbit.problem, orbit.read(orbit.measure_start())
    moved = [*(report.teleported for report in reports), False]
    network, records, reason = published.climb(problem.network, problem.samples, problem.loss, rule, moved)
    found = Found(before, SearchResult((), records, reason), None, describe_backend(orbit, "decisions on the host"))
    candidate = orbit.candidate(network, network.forward(problem.samples))
    after, changes = orbit.read(candidate.measured), candidate.changes.tolist()
    steps = sum(record.accepted for record in records)
    broken = not_finite(after, changes)
    if steps == 0 or broken is not None:
        return report_unchanged(before, broken or reason, reports, records, found.backend, orbit.parts)
    transaction.write(parameters, candidate.parameters)
    return make_report(found, after, steps, changes, reports)


def _standardise(
    reading: Reading, problem: Problem, rule: Standardise, named: Sequence[int] | None, guards: Guards
) -> TeleportReport:
    """The point in closed form: one pass forward, and what it takes to judge it."""
    moved, reports = plan_standardise(problem, named, rule)
    around = Surroundings.make(reading.chain, guards.holdout, problem, for_search=False)
    objective = BestDecrease() if guards.min_gain > 0 else GradNorm()
    found = standardise(problem, rule, moved)
    network, outputs = problem.rounded(found.network, found.outputs)
    values = [
        measure(problem, objective, around, problem.network, problem.outputs),
        measure(problem, objective, around, network, outputs),
        weight_changes(problem.network, network),
        shares_kept(problem, around, network, outputs) if rule.refit == ALL else problem.samples.new_empty(0).double(),
        torch.stack([flag.double() for flag, _ in found.hindrances]),
        _losses_ahead(problem, network, guards),
    ]
    numbers = iter(torch.cat(values).tolist())  # all that the host asks the device for
    figures, afters, changes, kept, holding, ahead = ([*islice(numbers, len(value))] for value in values)
    before, after = Measurement(*figures), Measurement(*afters)
    reason = next((text for flag, (_, text) in zip(holding, found.hindrances, strict=True) if flag), None)
    reason = reason or refusal_of_standardised(guards, rule, before, after, changes[:-1], kept)
    if reason is None and ahead and not ahead[0] <= before.loss:
        reason = on_rate(guards, before.loss, float(_losses_ahead(problem, problem.network, guards)), ahead[0])
    backend = f"{describe_kernels(problem)} on {problem.samples.device.type}, in closed form"
    result = Found(before, SearchResult((), (), reason or STANDARDISED), None, backend)
    if reason is not None:
        return report_unchanged(before, reason, reports, (), backend, len(problem.network))
    parameters = [parameter for _, parameter in reading.chain.named_parameters()]
    reading.transaction.write(parameters, parameter_list(network))
    report = make_report(result, after, 1, changes, reports)
    return replace(report, kept=kept[0] if kept else None, holdout_kept=kept[1] if len(kept) > 1 else None)


def _losses_ahead(problem: Problem, network: Network, guards: Guards) -> Tensor:
    """The loss on the batch after the steps that `guards.rate` asks about, if it does: float64, of one element or 0."""
    if guards.rate is None:
        return problem.samples.new_empty(0).double()
    return loss_after_steps(problem, network, guards.rate, STEPS_AHEAD).reshape(1)


def refuse_futile(problem: Problem, method: Ascent, guards: Guards) -> TeleportReport | None:
    """The report of a teleport that `min_gain` refuses whatever a search would find, or None.

    It takes a backward pass and the step ahead: the inputs of no layer are matched.
    """
    before = measure_own(problem, method.make_objective())
    if not is_futile(guards, method.looks_ahead, before):
        return None
    backend = f"{describe_kernels(problem)} on {problem.samples.device.type}, decisions on the host"
    reports = report_unmatched(problem)
    return report_unchanged(before, STEPS_LONG_ENOUGH, reports, (), backend, len(problem.network))


def check_possible(
    chain: Chain, layers: Sequence[int] | None, n: int, method: Ascent | Published | Standardise
) -> None:
    """Raise ValueError if no batch of `n` samples lets the method move the hidden `layers` (1..m; None: any)."""
    if isinstance(method, Standardise):
        check_standardisable(chain, layers, n, method)
        return
    if method.group == GL:
        check_matchable(chain, layers, n)
        return
    try:
        plan_scales(chain, n, layers)
    except TeleportError as error:
        raise ValueError(f"model can never be teleported by group='positive_diagonal': {error}") from error


def _run(
    transaction: Transaction,
    orbit: Any,
    method: Ascent,
    guards: Guards,
    parameters: list[nn.Parameter],
    reports: tuple[LayerReport, ...],
) -> TeleportReport:
    """Climb, settle and write."""
    found = _climb(orbit, method, guards)
    report, weights = _settle(orbit, method, guards, found, reports)
    if weights is not None:
        transaction.write(parameters, weights)
    return report


def _climb(orbit: Any, method: Ascent, guards: Guards) -> Found:
    """The search: on the device where that can be, else with every decision on the host."""
    if isinstance(orbit, BatchOrbit) and device.can_climb(orbit):
        before, result, last, how = device.climb(orbit, method, guards)
        return Found(before, result, last, describe_backend(orbit, how))
    backend = describe_backend(orbit, "decisions on the host")
    before = orbit.read(orbit.measure_start())
    if is_futile(guards, method.looks_ahead, before):
        start = orbit.waypoint(orbit.start())
        return Found(before, SearchResult((start,), (), STEPS_LONG_ENOUGH), None, backend)
    bounds = Bounds((), ())
    if before.sensitivity is not None:
        bounds = Bounds.make(guards, before.sensitivity, before.holdout)
    cap = float(method.cap(orbit.objective, before.gradient_norm))
    search = Search(orbit, orbit.objective.maximise, method.steps, float(method.first_radius), cap, bounds)
    return Found(before, ascend(search), None, backend)


def _settle(
    orbit: Any, method: Ascent, guards: Guards, found: Found, reports: tuple[LayerReport, ...]
) -> tuple[TeleportReport, list[Tensor] | None]:
    """The report (without its time), and the weights of the last point that keeps what the search promised, going back
    along the accepted steps; None where none does.

    Everything is measured on the weights as they will stand in the model, for 16-bit models after the rounding.
    """
    before, reason, waypoints = found.before, found.result.reason, found.result.waypoints
    for steps in range(len(waypoints) - 1, 0, -1):
        candidate = found.last if steps == len(waypoints) - 1 else None
        if candidate is None:
            candidate = orbit.weights(waypoints[steps])
        if (hindrance := holding(candidate.hindrances)) is not None:
            reason = hindrance
            continue
        after, changes = orbit.read(candidate.measured), candidate.changes.tolist()
        broken = refusal(guards, orbit.objective.maximise, before, after, changes[:-1])
        if broken is not None:
            reason = broken
            continue
        if (too_little := too_little_gain(guards, method.looks_ahead, before, after)) is not None:
            reason = too_little
            break  # an earlier point gains less
        if steps < len(waypoints) - 1:
            found = replace(found, result=replace(found.result, reason=LATER_TAKEN_BACK))
        return make_report(found, after, steps, changes, reports), candidate.parameters
    return report_unchanged(before, reason, reports, found.result.records, found.backend, orbit.parts), None


def check_settings(method: object, guards: object) -> Guards:
    """The guards with what suits the method; raise unless both are what they should be."""
    if not isinstance(method, (Ascent, Published, Standardise)):
        raise TypeError(f"method must be an Ascent, a Standardise or Published, got {type(method).__name__}")
    if not isinstance(guards, Guards):
        raise TypeError(f"guards must be Guards, got {type(guards).__name__}")
    return guards.suited_to(method)
