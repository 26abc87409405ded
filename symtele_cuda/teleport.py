"""`teleport_mlp`: one teleport of a model on one batch, all or nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .action import Network, Plan, State, StepFailed, form_weights, initial_state, parameter_list, predict
from .errors import TeleportError
from .loss import LossFunction
from .measurement import Measurement, measure, relative_change
from .mlp import Chain, check_parameters, read_chain
from .objectives import GradNorm, Objective
from .options import Options, make_options
from .paths import choose_path
from .planning import make_plan, match_inputs
from .problem import Holdout, Problem, parameters_kept
from .report import TeleportReport
from .search import Search, SearchResult, ascend, ascend_fixed


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
    max_growth: float = 2.0,
    action: str = "least_change",
    metric: str = "euclidean",
    inverse: str = "exact",
    layers: Sequence[int] | None = None,
    drift_tol: float = 1e-4,
    holdout: tuple[Tensor, Tensor] | None = None,
    holdout_tol: float = 0.05,
    backend: str = "auto",
) -> TeleportReport:
    """Move the weights of `model`, in place, along the level set of the loss on `batch`, to where the optimizer
    gains more.

    g_k ∈ GL(d_k) acts on the activations of hidden layer k = 1..m, B_k = σ(Z_k) g_kᵀ, and every weight layer becomes

        [W_k', b_k'] = [R_k, r_k] + (σ⁻¹(B_k) − B_{k−1} R_kᵀ − r_k)ᵀ P(B_{k−1}),   P(B) = [B, 1]⁺ᵀ,

    (Zhao et al. 2022, arXiv 2205.10637, eq. 8, where R_k = 0), which keeps the outputs on the batch exactly where
    the rows of [B_{k−1}, 1] are linearly independent; g is found by `steps` ascent steps. Parameters are written
    once, at the end, in place; after an error or a rejected search the model is bit for bit what it was.
    Deterministic on the CPU.

    Args:
        model: a chain of nn.Linear and invertible activations (LeakyReLU, Tanh, Sigmoid, Softplus, ELU, Identity);
            float32 or float64; bfloat16 and float16 are computed in float32 and rounded once at the end.
        batch: (x, y), n samples x (n×d_0, or what the model flattens to it) and their targets.
        loss_fn: loss_fn(outputs, y) → scalar. Default: cross entropy for integer y, mean squared error for floating
            y. A loss with weight terms must reach the weights through `model`; it takes the general path, with the
            weights formed at every step.
        objective: "grad_norm" maximises ‖∇L‖² up to `max_growth`; "lookahead" minimises the loss after one gradient
            step of length margin·lr; or an object as described in `symtele_cuda.objectives`.
        lr: the learning rate of plain gradient descent, for "lookahead".
        margin: how many times longer than lr the step of "lookahead" is.
        steps: trial steps of the search.
        step_size: "auto" is a trust region on the activations; a number ε is the paper's rule g ← (I ± ε∇_T f) g,
            with no acceptance test but finiteness (neither guard, neither cap).
        max_growth: the factor by which "grad_norm" may raise ‖∇L‖ (> 1, math.inf for no cap).
        action: "least_change" (R_k = W_k, the minimum-norm change of the weights) or "paper" (R_k = 0).
        metric: "euclidean", the norm in which a change of the weights is least.
        inverse: of g where a layer needs it, "exact" or "first_order" (I − εT, the published rule).
        layers: the hidden layers k = 1..m to teleport; default: all that the batch allows.
        drift_tol: the largest |loss_after − loss_before| / |loss_before| on the batch, a loss's weight terms held at
            the old weights. The rounding of 16-bit models counts: 1e-4 is tight for them.
        holdout: (x, y) of a second batch; holdout_tol: by what share of its value its loss may rise.
        backend: "torch", "cuda", or "auto" for the best that is there.

    Returns:
        A TeleportReport; `accepted` says whether the weights were written.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the text names it, what was expected and what
        came.
        TeleportError: no layer, or not every layer named in `layers`, can be teleported with this batch.
    """
    start = time.perf_counter()
    chain = read_chain(model)
    options = make_options(
        objective=objective,
        lr=lr,
        margin=margin,
        steps=steps,
        step_size=step_size,
        max_growth=max_growth,
        action=action,
        metric=metric,
        inverse=inverse,
        layers=layers,
        hidden_layers=len(chain.activations),
        drift_tol=drift_tol,
        holdout_tol=holdout_tol,
        backend=backend,
    )
    if torch.is_inference_mode_enabled():
        raise TeleportError(
            "teleport_mlp cannot run inside torch.inference_mode(), expected torch.no_grad() or neither"
        )
    check_parameters(chain)
    device_type = chain.linears[0].weight.device.type
    with torch.no_grad(), torch.autocast(device_type, enabled=False), parameters_kept(chain):
        problem = Problem.make(model, chain, batch, loss_fn)
        held = None if holdout is None else Holdout.make(chain, holdout, problem)
        report, weights = _teleport(problem, options, held)
        if report.accepted:
            _write(chain, weights)
    return replace(report, seconds=time.perf_counter() - start)


def _teleport(problem: Problem, options: Options, held: Holdout | None) -> tuple[TeleportReport, Network]:
    """Plan, search and check; the report (without its time) and the weights to write if it is accepted."""
    network = problem.network
    matches = match_inputs(problem)
    plan, layer_reports = make_plan(
        problem,
        matches,
        options.layers,
        action=options.action,
        inverse=options.inverse,
        group_steps=options.step_size is not None,
    )
    start = initial_state(network, plan, problem.outputs, matches)
    path = choose_path(problem, plan, options.objective)
    evaluation = path.evaluate(start)
    before = measure(problem, options.objective, held, network, problem.outputs)
    search = Search(path, network, plan, options.objective.maximise, options.steps)
    if options.step_size is not None:
        result = ascend_fixed(search, start, evaluation, step_size=options.step_size)
    else:
        largest = options.max_growth * before.gradient_norm
        cap = largest * largest if type(options.objective) is GradNorm else math.inf  # a subclass has its own scale
        guard = _guard(problem, plan, options, held, before)
        result = ascend(search, start, evaluation, cap=cap, guard=guard)
    unchanged = TeleportReport(
        accepted=False,
        reason=result.reason,
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
        layers=layer_reports,
        trace=result.records,
        seconds=0.0,
    )
    return _settle(problem, plan, options, held, start, result, before, unchanged)


def _settle(
    problem: Problem,
    plan: Plan,
    options: Options,
    held: Holdout | None,
    start: State,
    result: SearchResult,
    before: Measurement,
    unchanged: TeleportReport,
) -> tuple[TeleportReport, Network]:
    """Form the weights of the last state that keeps what the search promised, going back along the accepted steps.

    Everything is measured on the weights as they will stand in the model, for 16-bit models after the rounding.
    """
    reason = result.reason
    for steps in range(len(result.waypoints) - 1, 0, -1):
        waypoint = result.waypoints[steps]
        try:
            formed, outputs = form_weights(problem.network, plan, start, waypoint.targets, waypoint.references)
        except StepFailed as failure:
            reason = str(failure)
            continue
        written, outputs = _round(formed, outputs, problem)
        after = measure(problem, options.objective, held, written, outputs)
        refusal = _refusal(options, before, after.data_loss, after.holdout) or _no_gain(options, before, after)
        if refusal is not None:
            reason = refusal
            continue
        report = replace(
            unchanged,
            accepted=True,
            reason=reason,
            steps=steps,
            loss_after=after.loss,
            grad_norm_after=after.gradient_norm,
            objective_after=after.objective,
            drift=relative_change(before.data_loss, after.data_loss),
            holdout_after=after.holdout,
        )
        return report, written
    return replace(unchanged, reason=reason), problem.network


def _guard(
    problem: Problem, plan: Plan, options: Options, held: Holdout | None, before: Measurement
) -> Callable[[State], str | None]:
    """The test of a state during the search: the batch's loss where it can drift, the holdout's where there is one."""

    def guard(state: State) -> str | None:
        loss_now = problem.loss.value(state.logits) if plan.first_order_inverse else before.data_loss
        held_now = None if held is None else held.loss.value(predict(problem.network, plan, state, held.samples))
        return _refusal(options, before, loss_now, held_now)

    return guard


def _refusal(options: Options, before: Measurement, data_loss: float, holdout: float | None) -> str | None:
    """Why a state with these losses is not acceptable, or None; without a trust region only finiteness counts."""
    if not math.isfinite(data_loss):
        return "the loss on the batch is not finite"
    if options.step_size is not None:
        return None
    if (drift := relative_change(before.data_loss, data_loss)) > options.drift_tol:
        return f"the loss on the batch drifted by {drift:.1e}, more than drift_tol = {options.drift_tol:g}"
    if before.holdout is None or holdout is None:
        return None
    if holdout <= before.holdout + options.holdout_tol * abs(before.holdout):
        return None
    return f"the holdout loss rose from {before.holdout:.4g} to {holdout:.4g}"  # or is NaN


def _no_gain(options: Options, before: Measurement, after: Measurement) -> str | None:
    """Why the objective on the weights formed is no reason to write them, or None."""
    if not after.finite:
        return "the loss, the objective or the gradient of the new weights is not finite"
    if options.step_size is not None:
        return None
    gained = after.objective > before.objective if options.objective.maximise else after.objective < before.objective
    return None if gained else "the objective did not improve"


def _round(network: Network, outputs: list[Tensor], problem: Problem) -> tuple[Network, list[Tensor]]:
    """The network rounded to the dtype of the model's parameters, held in its own dtype, and its pre-activations."""
    if problem.parameter_dtype == problem.samples.dtype:
        return network, outputs
    rounded = [tensor.to(problem.parameter_dtype).to(tensor.dtype) for tensor in parameter_list(network)]
    network = network.with_parameters(rounded)
    return network, network.forward(problem.samples)


def _write(chain: Chain, network: Network) -> None:
    """Copy the weights into the model's own parameters, in one call that no interrupt of Python can split."""
    parameters: list[Tensor] = [parameter for _, parameter in chain.named_parameters()]
    torch._foreach_copy_(parameters, parameter_list(network))
