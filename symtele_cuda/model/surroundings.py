"""What a teleport is looked at on besides its batch: the loss of a holdout, and what noise in the inputs does."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.torch_kernels import dot
from .chain import Chain
from .loss import BatchLoss, check_default_targets, finite_loss
from .network import Network, kernel
from .problem import Problem, prepare

NOISE = 0.1
"""The standard deviation of the noise, as a share of that of all elements of the inputs."""


@dataclass(frozen=True)
class OtherSamples:
    """Samples Q (N×d_0) that are not the batch's, their pre-activations at the start, and Q Xᵀ + 1.

    known_overlap: None where no search will ask for it.
    """

    inputs: Tensor
    outputs: tuple[Tensor, ...]
    known_overlap: Tensor | None

    @classmethod
    def make(cls, network: Network, inputs: Tensor, batch: Tensor | None) -> OtherSamples:
        overlap = None if batch is None else kernel(inputs, batch, network.biases[0] is not None)
        return cls(inputs, tuple(network.forward(inputs)), overlap)

    @property
    def overlap(self) -> Tensor:
        assert self.known_overlap is not None
        return self.known_overlap

    def first(self, count: int) -> OtherSamples:
        """The first `count` of them."""
        return replace(
            self,
            inputs=self.inputs[:count],
            outputs=tuple(y[:count] for y in self.outputs),
            known_overlap=self.overlap[:count],
        )


@dataclass(frozen=True)
class Surroundings:
    """The N samples of a holdout, or of the batch itself where there is none, and the same with noise.

    others: those of the holdout, if there is one, and behind them the N noisy ones. loss: of the holdout.
    """

    others: OtherSamples
    loss: BatchLoss | None

    @classmethod
    def make(
        cls, chain: Chain, holdout: tuple[Tensor, Tensor] | None, problem: Problem, for_search: bool = True
    ) -> Surroundings:
        """Raises TypeError or ValueError, which name the holdout, if it is no batch for the model and the loss."""
        batch = problem.samples if for_search else None
        if holdout is None:
            return cls(OtherSamples.make(problem.network, with_noise(problem.samples), batch), None)
        samples, targets = _check_holdout(chain, holdout, problem)
        rows = torch.cat([samples, with_noise(samples)])
        others = OtherSamples.make(problem.network, rows, batch)
        found = cls(others, replace(problem.loss, targets=targets))
        finite_loss(found.holdout_loss(others.outputs[-1]), "holdout")
        return found

    @property
    def held(self) -> int:
        """How many samples the holdout has; 0 without one."""
        return 0 if self.loss is None else len(self.others.inputs) // 2

    @property
    def holdout(self) -> tuple[Tensor, BatchLoss] | None:
        """The samples of the holdout and its loss; None without one."""
        return None if self.loss is None else (self.others.inputs[: self.held], self.loss)

    def holdout_loss(self, logits: Tensor) -> Tensor:
        """The loss of the holdout, from the logits of its samples or of all `others`: a scalar."""
        assert self.loss is not None
        return self.loss.value(logits[: self.held])

    def sensitivity(self, logits: Tensor, batch_logits: Tensor) -> Tensor:
        """√(1/N Σ ‖z(x + ε) − z(x)‖²), the root mean square by which the noise ε moves the logits z: a float64 scalar.

        logits: of all `others`; batch_logits: of the batch.
        """
        clean = logits[: self.held] if self.loss is not None else batch_logits
        change = logits[self.held :] - clean
        return dot(change, change).sqrt() / math.sqrt(len(change))


def _check_holdout(chain: Chain, holdout: tuple[Tensor, Tensor], problem: Problem) -> tuple[Tensor, Tensor]:
    """(x, y) of a holdout as `prepare` gives them; the errors name it."""
    try:
        samples, targets = prepare(chain, holdout, problem.samples.dtype)
        if problem.loss.default:
            own = problem.loss.targets
            if targets.is_floating_point() != own.is_floating_point():
                raise TypeError(f"targets must be of the batch's kind {own.dtype}, got {targets.dtype}")
            own_outputs = problem.loss.output.forward(problem.outputs[-1])
            check_default_targets(targets, (len(samples), *own_outputs.shape[1:]))
    except (TypeError, ValueError) as error:
        raise type(error)(f"holdout: {error}") from error
    return samples, targets


def with_noise(samples: Tensor) -> Tensor:
    """x + ε with ε from a normal distribution, of `NOISE` times the standard deviation of all elements of x (n×d).

    ε is the same for all calls of one shape, dtype and device; the process's random state stays as it is.
    """
    generator = torch.Generator(samples.device).manual_seed(0)
    noise = torch.randn(samples.shape, generator=generator, dtype=samples.dtype, device=samples.device)
    return torch.addcmul(samples, noise, samples.std(correction=0) * NOISE)
