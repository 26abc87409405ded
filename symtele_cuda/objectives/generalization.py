"""Sharpness and curvature: what a teleport may change about a minimum besides the speed on the way to it.

Both are objectives of Zhao, Gower, Walters, Yu, *Improving Convergence and Generalization Using Parameter Symmetries*
(ICLR 2024, arXiv 2305.13404, the section on generalization), who ask whether a network generalizes better from a
flatter or a sharper place of one level set. `maximise` says which way to go. They follow the protocol of `objectives`
and take the general path: the weights are formed at every step of a search.

All random numbers come from a generator of the objective's own seed, on the parameters' device and in their dtype, and
are the same in every call: a search climbs one fixed function, and torch's global generator is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_bool, check_int, check_number
from ..model.loss import LossOfParameters

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sharpness:
    """φ(w) = mean over the distances t and random directions d of L(w + t d), ‖d‖ = 1.

    d is a direction of all weights and biases together, uniform on the unit sphere (normal entries, normalised). The
    published runs take 100 directions, of entries uniform in [0, 1), and t = 0.1, 0.2, …, 0.9, which is 900 losses a
    step; the defaults here are 30 losses over the same range. φ has no maximum on the orbit in general: the number of
    steps is what ends the ascent.

    Args:
        maximise: True goes to sharper places, False to flatter ones.
        distances: the t, in the unit of the weights; each > 0.
        directions: how many d.
        seed: of the directions, 0 … 2⁶³ − 1.

    Raises:
        TypeError, ValueError: an argument is not what is said above.
    """

    maximise: bool
    distances: Sequence[float] = (0.1, 0.5, 0.9)
    directions: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_bool("maximise", self.maximise)
        object.__setattr__(self, "distances", _check_distances(self.distances))
        check_int("directions", self.directions, at_least=1)
        check_int("seed", self.seed, at_least=0, at_most=LARGEST_SEED)

    def value(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> Tensor:
        """φ at `parameters`: a scalar."""
        generator = _generator(self.seed, parameters)
        losses = []
        for _ in range(self.directions):
            direction = _unit_direction(parameters, generator)
            for distance in self.distances:
                losses.append(loss_of([p + distance * d for p, d in zip(parameters, direction, strict=True)]))
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class Curvature:
    """ψ(w) = mean over random generators M of the curvature, at w, of the curve γ(t) = exp(tM)·w in the level set:

        κ = √(‖γ'‖² ‖γ''‖² − ⟨γ', γ''⟩²) / ‖γ'‖³ = ‖γ'' − (⟨γ', γ''⟩ / ‖γ'‖²) γ'‖ / ‖γ'‖²   at t = 0.

    The second form is the one computed: no difference of large numbers under a root. The group is that of the positive
    diagonal matrices behind all hidden layers k = 1 … m, M = (diag m_1, …, diag m_m) with normal entries m_k:

        W_k(t) = e^{t m_k} W_k e^{−t m_{k−1}},   b_k(t) = e^{t m_k} b_k,   m_0 = m_{m+1} = 0,

    so every entry of w has a rate a of its own, a_ij = m_k,i − m_{k−1},j, and γ = e^{ta} ⊙ w, γ' = a ⊙ w, γ'' = a² ⊙ w.
    With one hidden layer that is γ' = (m W_1, m b_1, −W_2 m), γ'' = (m² W_1, m² b_1, W_2 m²). κ does not depend on the
    length of M. It needs no data and no pseudo-inverse, whereas the published curves are those of GL(d) behind one
    layer, g = exp(tM) with the pseudo-inverse on a batch, of M with entries uniform in [0, 1).

    The curves lie in the level set, on every input, if the activations are positively homogeneous (ReLU, LeakyReLU,
    Identity); of others the objective knows nothing, and ψ is then the curvature of curves that leave the level set.

    ψ decreases without reaching a minimum where W_k grows and W_{k+1} shrinks without end: the number of steps is what
    ends the descent. Where γ' and γ'' are collinear κ = 0, its least value, and its gradient there is taken as 0.

    Args:
        maximise: True goes to where the level set is more curved, False to where it is less.
        generators: how many M.
        seed: of the generators, 0 … 2⁶³ − 1.

    Raises:
        TypeError, ValueError: an argument is not what is said above; in `value`, a network without a hidden layer, or
        one whose parameters are all zero along a curve, which then stands still and has no curvature.
    """

    maximise: bool
    generators: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_bool("maximise", self.maximise)
        check_int("generators", self.generators, at_least=1)
        check_int("seed", self.seed, at_least=0, at_most=LARGEST_SEED)

    def value(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> Tensor:
        """ψ at `parameters`: a scalar; `loss_of` is not asked."""
        generator = _generator(self.seed, parameters)
        curvatures = [_curvature(_rates(parameters, generator), parameters) for _ in range(self.generators)]
        return torch.stack(curvatures).mean()


def _curvature(rates: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """κ at t = 0 of γ(t) = e^{ta} ⊙ w."""
    velocity = torch.cat([(a * w).flatten() for a, w in zip(rates, parameters, strict=True)])
    acceleration = torch.cat([(a.square() * w).flatten() for a, w in zip(rates, parameters, strict=True)])
    speed_squared = velocity @ velocity
    if float(speed_squared.detach()) == 0:
        raise ValueError("parameters must not all be zero where the group acts on them: the curvature is undefined")
    across = acceleration - (velocity @ acceleration / speed_squared) * velocity
    return torch.linalg.vector_norm(across) / speed_squared


def _rates(parameters: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """a_ij = m_k,i − m_{k−1},j for each weight and a_i = m_k,i for each bias, m random behind the hidden layers."""
    weights = [parameter for parameter in parameters if parameter.ndim == 2]
    if len(weights) < 2:
        raise ValueError(f"parameters must hold a hidden layer, two weight matrices or more, got {len(weights)}")
    hidden = [_normal(weight[:, 0], generator) for weight in weights[:-1]]
    scales = [torch.zeros_like(weights[0][0]), *hidden, torch.zeros_like(weights[-1][:, 0])]
    rates, layer = list[Tensor](), 0
    for parameter in parameters:
        if parameter.ndim == 2:
            layer += 1
            rates.append(scales[layer][:, None] - scales[layer - 1])
        else:
            rates.append(scales[layer])
    return rates


def _unit_direction(parameters: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """A random vector of length 1, in the shapes of the parameters."""
    entries = [_normal(parameter, generator) for parameter in parameters]
    length = torch.stack([entry.square().sum() for entry in entries]).sum().sqrt()
    return [entry / length for entry in entries]


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _generator(seed: int, parameters: Sequence[Tensor]) -> torch.Generator:
    return torch.Generator(device=parameters[0].device).manual_seed(seed)


def _check_distances(distances: object) -> tuple[float, ...]:
    """`distances` as a tuple; raise unless it is a sequence of one or more finite numbers > 0."""
    if isinstance(distances, (str, bytes)) or not isinstance(distances, Sequence):
        raise TypeError(f"distances must be a sequence of numbers > 0, got {distances!r}")
    if not distances:
        raise ValueError("distances must hold at least one number > 0, got none")
    return tuple(check_number(f"distances[{index}]", t, above=0.0) for index, t in enumerate(distances))
