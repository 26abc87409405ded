"""AdamW in the gradients' eigenbasis: rotations of a network that turn its gradients' covariances into diagonals.

Adam and its like scale each coordinate by itself, so that the basis counts in which the coordinates are. A rotation Q
of a residual stream, or of the units of a head, changes that basis and not what the network computes. For a site with
the matrices W and their gradients G,

    C_W = EMA(0.95) of G Gᵀ along the site's axis of W,   C = Σ_W numel(W) C_W / tr C_W,
    Q = the eigenvectors of C as rows, largest eigenvalue first,   W, m ← Q W, Q m,   C_W ← Q C_W Qᵀ,

with m Adam's first moment. The second one is made of its margins, in columns j along the axis and the others i,

    v_ij ← (Σ_j (Q∘Q v)_ij) c_j / Σ c,   c = diag(Q C_W Qᵀ).

Vyas et al. 2024 (SOAP, arXiv 2409.11321) rotate the gradients of each matrix in the optimizer, at every step; here the
network itself is rotated, one basis for all matrices of a site, and afterwards the optimizer is on its own again.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_alone, check_int
from ..errors import TeleportError
from ..optimizers import check_holds, kind_of, unwrap
from ..sites import Declaration, Site, resolve
from ..sites.action import GL, ORTHOGONAL, Axis
from ..sites.exactness import KEPT, change_of, floating_outputs
from ..sites.state import FIRST_MOMENTS, SECOND_MOMENTS, moments_of, move
from ..transaction import Transaction

DECAY = 0.95
OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad)


class EigenbasisTeleporter:
    """Rotates a network into the eigenbasis of its gradients while it trains; no other line is needed:

        aligner = EigenbasisTeleporter(model, optimizer)

    It hooks the optimizer's `step`: before it, the gradients are read; after every `every`-th one, up to the step
    `until`, parameters and state are rotated. Then the hooks are gone, and all that it held.

    What the network computes stays what it is. That is measured at the first rotation, on the batch that the model has
    seen last; where it does not hold, `step` raises, and all is as it was before the rotation.

    Args:
        model: any module with rotations, see `find_sites`; one that torch.compile has made as well.
        optimizer: an Adam, AdamW, RMSprop or Adagrad, or a sequence of these, that holds all trainable parameters.
            Its `step` is called without a closure. A subclass with a `step` of its own is refused.
        sites: "auto" are all streams and pairs that `find_sites` knows, or your own.
        every: steps between two rotations, counted in steps of the optimizer: accumulated gradients are one.
        until: the last step after which there may be a rotation.
        averages: modules with the same parameters by name that are to rotate along, the `.module` of a
            torch.optim.swa_utils.AveragedModel for example. An average over points of different bases is of no use.

    Attributes:
        rotations: how many there have been. seconds: the time that they, and reading the gradients, have taken.

    A run that goes on from `state_dict()`, with those of model and optimizer, is the uninterrupted one bit for bit.

    Raises:
        TypeError, ValueError: an argument is not what is said above, or the process is one of several ranks.
        TeleportError: there is nothing to rotate.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        sites: Iterable[Site | Declaration] | str = "auto",
        every: int = 5,
        until: int = 200,
        averages: Sequence[nn.Module] = (),
    ) -> None:
        check_alone("EigenbasisTeleporter")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.every, self.until = check_int("every", every, at_least=1), check_int("until", until, at_least=1)
        self._model = getattr(model, "_orig_mod", model)  # what torch.compile has made, or the model itself
        self._optimizers = unwrap(optimizer)
        for one in self._optimizers:
            if kind_of(one, OPTIMIZERS) is None:
                names = ", ".join(kind.__name__ for kind in OPTIMIZERS)
                raise TypeError(f"optimizer must be one of {names}, got {type(one).__name__}")
        check_holds(self._model, self._optimizers)
        self._parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._averages = [_parameters_like(self._parameters, module) for module in averages]
        self._bases = [_Basis.make(site, self._parameters) for site in _rotations(resolve(self._model, sites))]
        self.rotations, self.seconds = 0, 0.0
        self._steps = [0] * len(self._optimizers)
        self._seen: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._checked = False
        self._hooks = [model.register_forward_pre_hook(self._see, with_kwargs=True)]
        for place, one in enumerate(self._optimizers):
            self._hooks.append(one.register_step_pre_hook(self._before_step))
            self._hooks.append(one.register_step_post_hook(lambda *_, place=place: self._after_step(place)))

    def __repr__(self) -> str:
        sizes = ", ".join(basis.site.described for basis in self._bases) or "done"
        when = f"every {self.every} steps until {self.until}"
        return f"EigenbasisTeleporter({when}: {sizes}; {self.rotations} rotations so far)"

    def state_dict(self) -> dict[str, Any]:
        """Where it is, as tensors and plain values."""
        return {
            "steps": list(self._steps),
            "rotations": self.rotations,
            "checked": self._checked,
            "covariances": [[c.clone() for c in basis.covariances] for basis in self._bases],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the one that gave `state` was; model, optimizer and options are the constructor's.

        Raises:
            TypeError, ValueError: `state` is not what `state_dict` gives for such a model; nothing has changed.
        """
        expected = {"steps", "rotations", "checked", "covariances"}
        if not isinstance(state, Mapping) or set(state) != expected:
            got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state must have the entries {sorted(expected)}, got {got}")
        steps = [check_int("state: steps", step, at_least=0) for step in state["steps"]]
        done = min(steps, default=0) >= self.until
        own = [] if done else [[c.shape for c in basis.covariances] for basis in self._bases]
        given = [[getattr(c, "shape", None) for c in listed] for listed in state["covariances"]]
        if len(steps) != len(self._steps) or own != given:
            raise ValueError("state must be of a teleporter with the same optimizers and sites, got another's")
        self.rotations = check_int("state: rotations", state["rotations"], at_least=0)
        self._steps, self._checked = steps, bool(state["checked"])
        if done:
            self.close()
        for basis, covariances in zip(self._bases, state["covariances"], strict=True):
            for own_covariance, value in zip(basis.covariances, covariances, strict=True):
                own_covariance.copy_(value)

    def close(self) -> None:
        """Take the hooks off and free all that was held; the network stays where it is."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._bases, self._seen = [], [], None

    # --- hooks --------------------------------------------------------------------------------------------------------

    def _see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._checked:
            self._seen = (args, kwargs)

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the gradients of this optimizer's parameters into the covariances."""
        if any(callable(argument) for argument in (*args[1:], *kwargs.values())):
            raise TypeError("optimizer must be stepped without a closure, got one: its gradients come too late")
        started = time.perf_counter()
        if not _overflown(optimizer):
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            scale = getattr(optimizer, "grad_scale", None)  # a GradScaler leaves it to a fused optimizer
            for basis in self._bases:
                basis.observe(self._parameters, held, None if scale is None else scale.float().reciprocal())
        self.seconds += time.perf_counter() - started

    def _after_step(self, place: int) -> None:
        """Count the step, and rotate where all optimizers have taken the one that is due."""
        if _overflown(self._optimizers[place]):
            return
        self._steps[place] += 1
        step = self._steps[place]
        if any(other != step for other in self._steps):
            return
        if step % self.every == 0 and step <= self.until:
            started = time.perf_counter()
            transaction = Transaction()
            transaction.run(lambda: self._rotate(transaction))
            self.rotations += 1
            self.seconds += time.perf_counter() - started
        if step >= self.until:
            self.close()

    @torch.no_grad()
    def _rotate(self, transaction: Transaction) -> None:
        before = None if self._checked else self._outputs()
        rotations = [(basis, self._choose(basis.covariance())) for basis in self._bases]
        turned = [basis.turned(rotation) for basis, rotation in rotations]
        moved = [(basis.site, rotation) for basis, rotation in rotations]
        alike: list[Mapping[str, Tensor]] = [self._parameters, *self._averages]
        for entries in (*alike, *moments_of(self._optimizers, self._parameters, FIRST_MOMENTS)):
            move(transaction, entries, moved)
        for entries in moments_of(self._optimizers, self._parameters, SECOND_MOMENTS):
            values = dict(entries)
            for (basis, rotation), covariances in zip(rotations, turned, strict=True):
                values |= basis.second_moments(values, rotation, covariances)
            transaction.write(list(entries.values()), list(values.values()))
        held = [c for basis in self._bases for c in basis.covariances]
        transaction.write(held, [c for covariances in turned for c in covariances])
        if before is not None:
            change = change_of(before, self._outputs() or [])
            if not change <= KEPT:
                raise TeleportError(
                    f"sites: expected rotations that keep what the model computes, got outputs that differ by "
                    f"{change:.1e} of their norm: find the site with teleport(model, batch, sites=[site])"
                )
        self._checked, self._seen = True, None

    def _choose(self, covariance: Tensor) -> Tensor:
        """Q (heads×k×k) for C."""
        return torch.linalg.eigh(covariance).eigenvectors.flip(-1).mT

    def _outputs(self) -> list[Tensor] | None:
        """What the model makes of the batch that it has seen last, in evaluation mode; None where it has seen none."""
        if self._seen is None:
            text = "the model was not called before its first rotation: that it is exact goes unmeasured"
            warnings.warn(text, stacklevel=2)
            return None
        args, kwargs = self._seen
        modes = [(module, module.training) for module in self._model.modules()]
        try:
            self._model.eval()
            return floating_outputs(self._model(*args, **kwargs))
        finally:
            for module, training in modes:
                module.training = training


@dataclass(frozen=True)
class _Basis:
    """A site with the covariance of the gradients along each of its axes, (heads×k×k) in float32."""

    site: Site
    covariances: tuple[Tensor, ...]
    sizes: tuple[int, ...]

    @classmethod
    def make(cls, site: Site, parameters: Mapping[str, nn.Parameter]) -> _Basis:
        shape = site.heads, site.units, site.units
        held = [parameters[axis.name] for axis in site.axes]
        covariances = tuple(torch.zeros(shape, device=p.device) for p in held)
        sizes = [p.numel() // p.shape[axis.dim] * axis.repeat for axis, p in zip(site.axes, held, strict=True)]
        return cls(site, covariances, tuple(size * site.units for size in sizes))

    def observe(self, parameters: Mapping[str, nn.Parameter], held: set[int], factor: Tensor | None) -> None:
        """C_W ← 0.95 C_W + 0.05 G Gᵀ for the parameters that are `held`; factor: what G is multiplied by."""
        for axis, covariance in zip(self.site.axes, self.covariances, strict=True):
            parameter = parameters[axis.name]
            if parameter.grad is None or id(parameter) not in held:
                continue
            gradient = parameter.grad.float() if factor is None else parameter.grad.float() * factor
            columns = axis.columns(gradient, self.site.heads, self.site.units)
            covariance.baddbmm_(columns, columns.mT, beta=DECAY, alpha=1 - DECAY)

    def covariance(self) -> Tensor:
        """C (heads×k×k) in float64."""
        total = torch.zeros_like(self.covariances[0], dtype=torch.float64)
        for covariance, size in zip(self.covariances, self.sizes, strict=True):
            traces = covariance.double().diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
            total += torch.where(traces == 0, 0, size * covariance.double() / traces)
        if not bool(torch.isfinite(total).all()):
            raise TeleportError("gradients must be finite for a rotation, got NaN or Inf since the last one")
        return total

    def turned(self, rotation: Tensor) -> list[Tensor]:
        """Q C_W Qᵀ of all axes."""
        q = rotation.float()
        return [q @ covariance @ q.mT for covariance in self.covariances]

    def second_moments(
        self, values: Mapping[str, Tensor], rotation: Tensor, turned: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """v of the site's parameters after the rotation, those of `values`."""
        moved = dict[str, Tensor]()
        for axis, covariance in zip(self.site.axes, turned, strict=True):
            if axis.name in values:
                value = moved.get(axis.name, values[axis.name])
                moved[axis.name] = _factored(axis, value, rotation.square(), covariance)
        return moved


def _factored(axis: Axis, value: Tensor, squares: Tensor, covariance: Tensor) -> Tensor:
    """(Σ_j (Q∘Q v)_ij) c_j / Σ c along the axis; where no gradient has been seen (c = 0), Q∘Q v."""
    spread = squares.to(value.dtype) @ axis.columns(value, *squares.shape[:2])
    shares = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).to(value.dtype)[:, :, None]
    total = shares.sum(1, keepdim=True)
    return axis.put_back(value, torch.where(total > 0, spread.sum(1, keepdim=True) * (shares / total), spread))


def _rotations(sites: Sequence[Site]) -> list[Site]:
    """The sites that hold rotations, with these as their group."""
    found = [replace(site, group=ORTHOGONAL) for site in sites if site.group in (GL, ORTHOGONAL) and site.units > 1]
    if not found:
        raise TeleportError("sites: expected streams or linear pairs, which can be rotated, got none")
    return found


def _overflown(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler has told a fused optimizer that this step is none."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _parameters_like(parameters: Mapping[str, nn.Parameter], module: object) -> dict[str, nn.Parameter]:
    """The parameters of an average by the names of the model's."""
    own = dict(module.named_parameters()) if isinstance(module, nn.Module) else {}
    if not isinstance(module, nn.Module) or any(name not in own for name in parameters):
        raise ValueError("averages must be modules with the model's parameters by name, got one without: its .module?")
    return {name: own[name] for name in parameters}
