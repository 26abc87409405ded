"""`teleport_mlp`: one teleport of a model on one batch, all or nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .action import Network, Plan, State, StepFailed, form_weights, initial_state, parameter_list, predict
from .loss import LossFunction
from .mlp import Chain, check_batch, read_chain
from .objectives import GradNorm, Lookahead, Objective
from .options import Options, make_options
from .pinv import condition_from_gram, gram, invert_gram
from .planning import make_plan, match_inputs
from .problem import Holdout, Problem, layer_inputs, read_network
from .report import TeleportReport
from .search import FastPath, GeneralPath, Path, SearchResult, ascend, ascend_fixed

# `batch_size="auto"` keeps the layers' inputs below this condition number. Float32 would bear more, the data outside
# the batch would not: the nearer the samples are to dependence, the larger the weights that tell them apart.
GOOD_CONDITION = 200.0


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
        drift_tol: the largest |loss_after − loss_before| / |loss_before| on the batch.
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
    device_type = chain.linears[0].weight.device.type
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        problem = Problem.make(model, chain, batch, loss_fn)
        held = None if holdout is None else Holdout.make(chain, holdout, problem)
        report, weights = _teleport(problem, options, held)
        if report.accepted:
            _write(chain, weights)
    return replace(report, seconds=time.perf_counter() - start)


def matched_batch_size(model: nn.Module, x: Tensor) -> int:
    """The largest n so that the first n samples of `x` are matched, and well conditioned, as the input of every
    hidden layer.

    At least 1. The condition number of the leading rows grows with their number, so n is found by bisection.
    """
    chain = read_chain(model)
    network = read_network(chain)
    with torch.no_grad():
        samples = check_batch(chain, (x, torch.zeros(len(x), device=x.device)))[0].to(network.weights[0].dtype)
        outputs = network.forward(samples)
        inputs = layer_inputs(network, samples, outputs)[: len(network.activations)]
        size = len(samples)
        for values, bias in zip(inputs, network.biases, strict=False):
            size = _leading_rows(gram(values[:size], bias is not None), min(size, values.shape[1] + (bias is not None)))
    return size


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
    state = initial_state(network, plan, problem.outputs, matches)
    path = _path(problem, plan, options.objective)
    evaluation = path.evaluate(state)
    objective_before = evaluation.value
    if any(plan.zero_reference):  # at g = I the paper's action has already changed the network
        untouched = Plan.untouched(network)
        original = initial_state(network, untouched, problem.outputs, matches)
        objective_before = _path(problem, untouched, options.objective).evaluate(original).value
    norm_before = _gradient_norm(problem, options.objective, objective_before, network)
    if options.step_size is not None:
        result = ascend_fixed(
            path,
            network,
            plan,
            state,
            evaluation,
            maximise=options.objective.maximise,
            steps=options.steps,
            step_size=options.step_size,
        )
    else:
        capped = isinstance(options.objective, GradNorm)
        result = ascend(
            path,
            network,
            plan,
            state,
            evaluation,
            maximise=options.objective.maximise,
            steps=options.steps,
            cap=(options.max_growth * norm_before) ** 2 if capped else math.inf,
            guard=_guard(problem, plan, options, held),
        )
    unchanged = TeleportReport(
        accepted=False,
        reason=result.reason,
        steps=0,
        loss_before=problem.loss_before,
        loss_after=problem.loss_before,
        grad_norm_before=norm_before,
        grad_norm_after=norm_before,
        objective_before=objective_before,
        objective_after=objective_before,
        drift=0.0,
        holdout_before=None if held is None else held.loss_before,
        holdout_after=None if held is None else held.loss_before,
        layers=layer_reports,
        trace=result.records,
        seconds=0.0,
    )
    return _settle(problem, plan, options, held, result, unchanged)


def _settle(
    problem: Problem,
    plan: Plan,
    options: Options,
    held: Holdout | None,
    result: SearchResult,
    unchanged: TeleportReport,
) -> tuple[TeleportReport, Network]:
    """Form the weights of the last state whose true loss passes the guards, going back along the accepted steps."""
    network, reason = problem.network, result.reason
    for steps in range(len(result.waypoints) - 1, 0, -1):
        waypoint = result.waypoints[steps]
        try:
            formed, logits = form_weights(network, plan, problem.samples, waypoint.targets, waypoint.references)
        except StepFailed as failure:
            reason = str(failure)
            continue
        losses = _losses(problem, held, formed, logits)
        refusal = _refusal(problem, options, held, losses)
        if refusal is None and not _improves(options, unchanged.objective_before, waypoint.value):
            refusal = "the objective did not improve"
        if refusal is not None:
            reason = refusal
            continue
        written = _round(formed, problem.parameter_dtype)
        if written is not formed:
            losses = _losses(problem, held, written, written.forward(problem.samples)[-1])
        return (
            replace(
                unchanged,
                accepted=True,
                reason=reason,
                steps=steps,
                loss_after=losses.total,
                grad_norm_after=_gradient_norm(problem, options.objective, waypoint.value, formed),
                objective_after=waypoint.value,
                drift=_drift(problem.data_loss, losses.data),
                holdout_after=losses.holdout,
            ),
            written,
        )
    return replace(unchanged, reason=reason), network


def _path(problem: Problem, plan: Plan, objective: Objective) -> Path:
    """In activation space where loss and objective allow it, else with the weights formed."""
    if isinstance(objective, (GradNorm, Lookahead)) and not problem.weight_terms:
        return FastPath(problem.network, plan, objective, problem.loss, problem.output_delta)
    return GeneralPath(problem.network, plan, objective, problem.loss_of)


def _guard(problem: Problem, plan: Plan, options: Options, held: Holdout | None) -> Callable[[State], str | None]:
    """The test of a state during the search: the batch's loss where it can drift, the holdout's loss where there is
    one."""

    def guard(state: State) -> str | None:
        loss_now = problem.loss.value(state.logits) if plan.first_order_inverse else problem.data_loss
        held_now = None if held is None else held.loss.value(predict(problem.network, plan, state, held.samples))
        return _refusal(problem, options, held, _Losses(loss_now, loss_now, held_now))

    return guard


def _refusal(problem: Problem, options: Options, held: Holdout | None, losses: _Losses) -> str | None:
    """Why a state with these losses is not acceptable, or None; without a trust region only finiteness counts."""
    if not math.isfinite(losses.total):
        return "the loss on the batch is not finite"
    if options.step_size is not None:
        return None
    if (drift := _drift(problem.data_loss, losses.data)) > options.drift_tol:
        return f"the loss on the batch drifted by {drift:.1e}, more than drift_tol = {options.drift_tol:g}"
    if held is None or losses.holdout is None:
        return None
    if losses.holdout <= held.loss_before + options.holdout_tol * abs(held.loss_before):
        return None
    return f"the holdout loss rose from {held.loss_before:.4g} to {losses.holdout:.4g}"  # or is NaN


def _improves(options: Options, before: float, after: float) -> bool:
    if options.step_size is not None:
        return math.isfinite(after)
    return after > before if options.objective.maximise else after < before


@dataclass(frozen=True)
class _Losses:
    """On the batch: the loss, and the loss with its weight terms held at the old weights; on the holdout: the
    latter."""

    total: float
    data: float
    holdout: float | None


def _losses(problem: Problem, held: Holdout | None, formed: Network, logits: Tensor) -> _Losses:
    """The true losses of the formed weights, whose `logits` on the batch are given."""
    data = problem.loss.value(logits)
    return _Losses(
        total=float(problem.loss_of(parameter_list(formed))) if problem.weight_terms else data,
        data=data,
        holdout=None if held is None else held.loss.value(formed.forward(held.samples)[-1]),
    )


def _gradient_norm(problem: Problem, objective: Objective, value: float, network: Network) -> float:
    """‖∇L‖ of `network`, whose objective is `value`."""
    if isinstance(objective, GradNorm):
        return math.sqrt(value)
    with torch.enable_grad():
        parameters = parameter_list(network, requires_grad=True)
        if problem.weight_terms:
            loss = problem.loss_of(parameters)
        else:
            loss = problem.loss(network.with_parameters(parameters).forward(problem.samples)[-1])
        gradients = torch.autograd.grad(loss, parameters)
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))


def _drift(before: float, after: float) -> float:
    if after == before:
        return 0.0
    return abs(after - before) / abs(before) if before != 0 else math.inf


def _leading_rows(gram_matrix: Tensor, most: int) -> int:
    """The largest number of leading rows, up to `most`, whose Gram matrix is well conditioned."""

    def good(size: int) -> bool:
        leading = gram_matrix[:size, :size]
        inverse = invert_gram(leading)
        return inverse is not None and condition_from_gram(leading, inverse) <= GOOD_CONDITION

    if good(most):
        return most
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def _round(network: Network, dtype: torch.dtype) -> Network:
    """The network with its values rounded to `dtype`, held in its own dtype."""
    own = network.weights[0].dtype
    if dtype == own:
        return network
    return replace(
        network,
        weights=tuple(weight.to(dtype).to(own) for weight in network.weights),
        biases=tuple(None if bias is None else bias.to(dtype).to(own) for bias in network.biases),
    )


def _write(chain: Chain, network: Network) -> None:
    """Copy the weights into the model's own parameters, in one call that no interrupt of Python can split."""
    parameters: list[Tensor] = [parameter for _, parameter in chain.named_parameters()]
    torch._foreach_copy_(parameters, parameter_list(network))
