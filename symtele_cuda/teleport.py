"""`teleport_mlp`: one teleport of a model on one batch, all or nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from .kernels.library import products_for
from .measure import Measurement, measure_own, read, relative_change
from .model.chain import Chain, read_chain
from .model.loss import LossFunction
from .model.network import Network, parameter_list
from .model.problem import Problem, begin
from .objectives import Objective
from .orbits.batch_plan import make_plan, match_inputs, observe_inputs, report_unmatched
from .report import LayerReport, StepRecord, TeleportReport
from .search import device as device_search
from .search.trust_region import STEPS_LONG_ENOUGH, SearchResult, ascend, ascend_fixed, holding
from .settings import POSITIVE_DIAGONAL, Options, make_options
from .surroundings import Surroundings
from .task import (
    Found,
    Task,
    change_refusal,
    describe_backend,
    drift_refusal,
    holdout_refusal,
    is_futile,
    noise_refusal,
)
from .transaction import Transaction

LATER_TAKEN_BACK = "later steps were taken back: the weights formed from them broke a guard"


def teleport_mlp(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    loss_fn: LossFunction | None = None,
    *,
    objective: str | Objective = "grad_norm",
    lr: float | None = None,
    margin: float = 4.0,
    steps: int = 10,
    step_size: str | float = "auto",
    first_radius: float = 0.02,
    max_growth: float = 2.0,
    action: str = "least_change",
    metric: str = "euclidean",
    inverse: str = "exact",
    group: str = "gl",
    layers: Sequence[int] | None = None,
    drift_tol: float = 1e-4,
    holdout: tuple[Tensor, Tensor] | None = None,
    holdout_tol: float = 0.05,
    min_gain: float = 0.0,
    max_weight_change: float = math.inf,
    max_sensitivity: float = math.inf,
    backend: str = "auto",
) -> TeleportReport:
    """Move the weights of `model`, in place, along the level set of the loss on `batch`, to where the optimizer
    gains more.

    With group="gl", g_k ∈ GL(d_k) acts on the activations of hidden layer k = 1..m, B_k = σ(Z_k) g_kᵀ, and every
    weight layer becomes

        [W_k', b_k'] = [R_k, r_k] + (σ⁻¹(B_k) − B_{k−1} R_kᵀ − r_k)ᵀ P(B_{k−1}),   P(B) = [B, 1]⁺ᵀ,

    (Zhao et al. 2022, arXiv 2205.10637, eq. 8, where R_k = 0), which keeps the outputs on the batch exactly where
    the rows of [B_{k−1}, 1] are linearly independent. With group="positive_diagonal", D_k = diag(exp s_k) does,

        W_k' = D_k W_k,   b_k' = D_k b_k,   W_{k+1}' = W_{k+1} D_k⁻¹,

    which keeps the outputs on every input where the activation is positively homogeneous. g and s are found by
    `steps` ascent steps. Parameters are written once, at the end, in place; after an error or a rejected search the
    model is bit for bit what it was. Deterministic on the CPU.

    Args:
        model: a chain of nn.Linear and activations, with constants and what else `mlp.read_chain` understands;
            float32 or float64; bfloat16 and float16 are computed in float32 and rounded once at the end.
        batch: (x, y), n samples x as the model takes them and their targets.
        loss_fn: loss_fn(outputs, y) → scalar. Default: cross entropy for integer y, mean squared error for floating
            y of the outputs' shape. A loss with weight terms must reach the weights through `model`; it takes the
            general path, with the weights formed at every step.
        objective: "grad_norm" maximises ‖∇L‖² up to `max_growth`; "lookahead" minimises the loss after one gradient
            step of length margin·lr; or an object as described in `symtele_cuda.objectives`.
        lr: the learning rate of plain gradient descent, for "lookahead".
        margin: how many times longer than lr the step of "lookahead" is.
        steps: trial steps of the search.
        step_size: "auto" is a trust region on the activations; a number ε is the paper's rule g ← (I ± ε∇_T f) g,
            with no acceptance test but finiteness (neither guard, neither cap).
        first_radius: the length of the trust region's first step, > 0, as a share of the norm of all moved activations.
            The region adapts; a larger start saves steps where there are few.
        max_growth: the factor by which "grad_norm" may raise ‖∇L‖ (> 1, math.inf for no cap).
        action: "least_change" (R_k = W_k, the minimum-norm change of the weights) or "paper" (R_k = 0).
        metric: "euclidean", the norm in which a change of the weights is least.
        inverse: of g where a layer needs it, "exact" or "first_order" (I − εT, the published rule).
        group: "gl" moves hidden layers whose activation has an inverse and whose input the batch can match;
            "positive_diagonal" those with a positively homogeneous activation (LeakyReLU, ReLU or none), whatever
            the batch; "auto" takes GL where that is possible and the diagonal group elsewhere.
        layers: the hidden layers k = 1..m to teleport; default: all that the batch allows.
        drift_tol: the largest |loss_after − loss_before| / |loss_before| on the batch, a loss's weight terms held at
            the old weights. The rounding of 16-bit models counts: 1e-4 is tight for them.
        holdout: (x, y) of a second batch; holdout_tol: by what share of its value its loss may rise. What "lookahead"
            gains on the batch must also gain there: the step that the batch's gradient makes must leave the holdout
            with a lower loss than it would without the teleport. math.inf only reports.
        min_gain: for "lookahead", how many times as much the step ahead must lower the loss on the batch as it does
            without the teleport. Where it does not lower it even so, the steps are not too short there, whatever the
            gradient: there is no search, and no teleport. 0 asks for nothing but a lower objective.
        max_weight_change: the largest ‖[W', b'] − [W, b]‖_F / ‖[W, b]‖_F of a weight layer; math.inf bounds nothing.
        max_sensitivity: how many times as far as before noise in the inputs may move the logits: the samples are those
            of the holdout, or of the batch without one, see `TeleportReport`; math.inf only reports.
        backend: "torch", "cuda", or "auto" for the best that is there.

    Returns:
        A TeleportReport; `accepted` says whether the weights were written.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the text names it, what was expected and what
        came.
        TeleportError: no layer, or not every layer named in `layers`, can be teleported with this batch.
    """
    def work() -> TeleportReport:
        chain = read_chain(model)
        options = make_options(
            objective=objective,
            lr=lr,
            margin=margin,
            steps=steps,
            step_size=step_size,
            first_radius=first_radius,
            max_growth=max_growth,
            action=action,
            metric=metric,
            inverse=inverse,
            group=group,
            layers=layers,
            hidden_layers=len(chain.activations),
            drift_tol=drift_tol,
            holdout_tol=holdout_tol,
            min_gain=min_gain,
            max_weight_change=max_weight_change,
            max_sensitivity=max_sensitivity,
            backend=backend,
        )
        return teleport_chain(transaction, model, chain, batch, loss_fn, options, holdout)

    transaction = Transaction()
    return transaction.run(work)


def teleport_chain(
    transaction: Transaction,
    model: nn.Module,
    chain: Chain,
    batch: tuple[Tensor, Tensor],
    loss_fn: LossFunction | None,
    options: Options,
    holdout: tuple[Tensor, Tensor] | None,
) -> TeleportReport:
    """`teleport_mlp` of a model that is read as `chain`, as part of a transaction."""
    start = time.perf_counter()
    begin(transaction, chain)
    products = products_for(chain.linears[0].weight.device, options.backend)
    problem = Problem.make(model, chain, batch, loss_fn, products)
    report, weights = _teleport(problem, options, Surroundings.make(chain, holdout, problem))
    if report.accepted:
        transaction.write([parameter for _, parameter in chain.named_parameters()], parameter_list(weights))
    return replace(report, seconds=time.perf_counter() - start)


def refuse_futile(
    transaction: Transaction,
    model: nn.Module,
    chain: Chain,
    batch: tuple[Tensor, Tensor],
    loss_fn: LossFunction | None,
    options: Options,
) -> TeleportReport | None:
    """The report of a teleport that `min_gain` refuses whatever a search would find, or None.

    It takes a forward and a backward pass and the step ahead: the inputs of no layer are matched.
    """
    start = time.perf_counter()
    begin(transaction, chain)
    products = products_for(chain.linears[0].weight.device, options.backend)
    problem = Problem.make(model, chain, batch, loss_fn, products)
    before = measure_own(problem, options.objective)
    if not is_futile(options, before):
        return None
    backend = describe_backend(problem.network, "decisions on the host")
    report = _unchanged(problem, before, STEPS_LONG_ENOUGH, report_unmatched(problem), (), backend)
    return replace(report, seconds=time.perf_counter() - start)


def _teleport(problem: Problem, options: Options, around: Surroundings) -> tuple[TeleportReport, Network]:
    """Plan, search and check; the report (without its time) and the weights to write if it is accepted."""
    matches = observe_inputs(problem) if options.group == POSITIVE_DIAGONAL else match_inputs(problem, options.layers)
    plan, layer_reports = make_plan(
        problem,
        matches,
        options.layers,
        action=options.action,
        inverse=options.inverse,
        group_steps=options.step_size is not None,
        group=options.group,
    )
    task = Task(problem, around, tuple(matches), plan, options)
    found = device_search.find(task) if device_search.can_find(task) else _find_on_host(task)
    result = found.result
    unchanged = _unchanged(problem, found.before, result.reason, layer_reports, result.records, found.backend)
    return _settle(task, found, unchanged)


def _unchanged(
    problem: Problem,
    before: Measurement,
    reason: str,
    layers: tuple[LayerReport, ...],
    trace: tuple[StepRecord, ...],
    backend: str,
) -> TeleportReport:
    """The report (without its time) of weights that stay as they are."""
    return TeleportReport(
        accepted=False,
        reason=reason,
        steps=0,
        loss_before=before.loss,
        loss_after=before.loss,
        grad_norm_before=before.gradient_norm,
        grad_norm_after=before.gradient_norm,
        objective_before=before.objective,
        objective_after=before.objective,
        drift=0.0,
        holdout_before=before.holdout,
        holdout_after=before.holdout,
        weight_changes=(0.0,) * len(problem.network),
        weight_change=0.0,
        sensitivity_before=before.sensitivity,
        sensitivity_after=before.sensitivity,
        layers=layers,
        trace=trace,
        seconds=0.0,
        backend=backend,
    )


def _find_on_host(task: Task) -> Found:
    """The search with every decision on the host, for any objective and any loss."""
    options, network = task.options, task.problem.network
    start, before = task.start(), read(task.measure(network, task.problem.outputs))
    backend = describe_backend(network, "decisions on the host")
    if is_futile(options, before):
        return Found(start, before, SearchResult((start.waypoint,), (), STEPS_LONG_ENOUGH), None, backend)
    search = task.search()
    evaluation = search.path.evaluate(start)
    if options.step_size is not None:
        result = ascend_fixed(search, start, evaluation, step_size=options.step_size)
    else:
        cap = float(task.cap(before.gradient_norm))
        bounds = task.bounds(before.data_loss, before.sensitivity, before.holdout)
        result = ascend(search, start, evaluation, cap=cap, bounds=bounds)
    return Found(start, before, result, None, backend)


def _settle(task: Task, found: Found, unchanged: TeleportReport) -> tuple[TeleportReport, Network]:
    """The weights of the last state that keeps what the search promised, going back along the accepted steps.

    Everything is measured on the weights as they will stand in the model, for 16-bit models after the rounding.
    """
    before, reason = found.before, found.result.reason
    waypoints = found.result.waypoints
    for steps in range(len(waypoints) - 1, 0, -1):
        candidate = found.last if steps == len(waypoints) - 1 else None
        if candidate is None:
            candidate = task.candidate(found.start, waypoints[steps])
        if (hindrance := holding(candidate.hindrances)) is not None:
            reason = hindrance
            continue
        after, (*changes, whole) = read(candidate.measured), candidate.changes.tolist()
        if (refusal := _refusal(task.options, before, after, changes)) is not None:
            reason = refusal
            continue
        if (refusal := _too_little_gain(task, before, after)) is not None:
            reason = refusal
            break  # an earlier state gains less
        report = replace(
            unchanged,
            accepted=True,
            reason=found.result.reason if steps == len(waypoints) - 1 else LATER_TAKEN_BACK,
            steps=steps,
            loss_after=after.loss,
            grad_norm_after=after.gradient_norm,
            objective_after=after.objective,
            drift=relative_change(before.data_loss, after.data_loss),
            holdout_after=after.holdout,
            weight_changes=tuple(changes),
            weight_change=whole,
            sensitivity_after=after.sensitivity,
        )
        return report, candidate.network
    return replace(unchanged, reason=reason), task.problem.network


def _refusal(options: Options, before: Measurement, after: Measurement, changes: Sequence[float]) -> str | None:
    """Why weights with these figures are not acceptable, or None; without a trust region only finiteness counts.

    changes: those of the single weight layers.
    """
    if not all(map(math.isfinite, changes)):
        return "the new weights are not finite"
    if not math.isfinite(after.data_loss):
        return drift_refusal(options, before.data_loss, after.data_loss)
    if not after.finite:
        return "the loss, the objective or the gradient of the new weights is not finite"
    if options.step_size is not None:
        return None
    if relative_change(before.data_loss, after.data_loss) > options.drift_tol:
        return drift_refusal(options, before.data_loss, after.data_loss)
    if max(changes) > options.max_weight_change:
        return change_refusal(options, changes)
    return _harm_elsewhere(options, before, after) or _no_gain(options, before, after)


def _harm_elsewhere(options: Options, before: Measurement, after: Measurement) -> str | None:
    """Why the new weights are not acceptable on the holdout, or under noise in the inputs, or None."""
    old, new = before.holdout, after.holdout
    if old is not None and new is not None and not new <= old + options.holdout_tol * abs(old):
        return holdout_refusal(old, new)
    calm, noisy = before.sensitivity, after.sensitivity
    assert calm is not None and noisy is not None
    if math.isfinite(options.max_sensitivity) and not noisy <= options.max_sensitivity * calm:
        return noise_refusal(options, calm, noisy)
    return None


def _no_gain(options: Options, before: Measurement, after: Measurement) -> str | None:
    """Why the objective on the weights formed is no reason to write them, or None."""
    gained = after.objective > before.objective if options.objective.maximise else after.objective < before.objective
    if not gained:
        return "the objective did not improve"
    ahead, otherwise = after.holdout_ahead, before.holdout_ahead
    if ahead is None or otherwise is None or math.isinf(options.holdout_tol) or ahead < otherwise:
        return None
    return f"the step ahead would take the holdout loss to {ahead:.4g}, without the teleport to {otherwise:.4g}"


def _too_little_gain(task: Task, before: Measurement, after: Measurement) -> str | None:
    """Why the gain of the step ahead is less than `min_gain` asks for, or None."""
    if not task.options.wants_gain:
        return None
    gain, least = before.loss - after.objective, task.options.min_gain * (before.loss - before.objective)
    if gain >= least:
        return None
    return f"the step ahead would lower the loss by {gain:.4g}, less than min_gain asks for, {least:.4g}"
