"""What a teleport says of itself: plain numbers, nothing of the data."""

from __future__ import annotations

from dataclasses import dataclass

from .search import StepRecord


@dataclass(frozen=True)
class LayerReport:
    """One hidden layer k = 1..m of width d_k: the batch of n samples as its input [B_{k−1}, 1], and whether it was
    moved.

    rank and condition (κ₂, an estimate; inf where the rank is below n) are those of the n×(d_{k−1}+1) input; None where
    group="positive_diagonal" was asked for, which needs no match, and where a `Teleporter` has seen that no search is
    worth it before it chose among the n samples. group: what moved the layer, "gl" or "positive_diagonal", None where
    it was not moved.
    """

    index: int
    n: int
    width: int
    rank: int | None
    condition: float | None
    teleported: bool
    reason: str
    group: str | None


@dataclass(frozen=True)
class TeleportReport:
    """The outcome of `teleport_mlp`.

    accepted: whether the weights were written; reason: why the search ended, or why nothing was written.
    steps: accepted ascent steps; trace: every step tried.
    loss_*: on the teleport batch; drift: |loss_after − loss_before| / |loss_before|, with the weight terms of a loss
    that has them held at the old weights.
    grad_norm_*: ‖∇L‖ (not squared) over the weights and biases of all layers; objective_*: the objective's own value.
    holdout_*: the loss on the holdout batch, None without one. seconds: wall-clock of the whole call.
    backend: what has computed, "torch" or the compiled "cuda" kernels, on which device, and whether a CUDA graph ran
    the search, or why not.
    If not accepted the *_after fields equal the *_before fields: nothing has changed.
    """

    accepted: bool
    reason: str
    steps: int
    loss_before: float
    loss_after: float
    grad_norm_before: float
    grad_norm_after: float
    objective_before: float
    objective_after: float
    drift: float
    holdout_before: float | None
    holdout_after: float | None
    layers: tuple[LayerReport, ...]
    trace: tuple[StepRecord, ...]
    seconds: float
    backend: str

    def __str__(self) -> str:
        moved = sum(layer.teleported for layer in self.layers)
        outcome = "teleported" if self.accepted else "not teleported"
        holdout = ""
        if self.holdout_before is not None and self.holdout_after is not None:
            holdout = f", holdout loss {self.holdout_before:.4g} → {self.holdout_after:.4g}"
        return (
            f"{outcome} ({self.reason}): {moved} of {len(self.layers)} hidden layers, n = {self.layers[0].n}, "
            f"{self.steps} of {len(self.trace)} steps accepted, "
            f"objective {self.objective_before:.4g} → {self.objective_after:.4g}, "
            f"‖∇L‖ {self.grad_norm_before:.4g} → {self.grad_norm_after:.4g}, "
            f"loss {self.loss_before:.4g}, drift {self.drift:.1e}{holdout}, {1e3 * self.seconds:.1f} ms"
        )
