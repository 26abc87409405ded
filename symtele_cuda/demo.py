"""The demo: scikit-learn's handwritten digits by an MLP with SGD, without and with teleports.

The network is 64-128-128-10 with LeakyReLU 0.1 and without biases; SGD of rate 0.02 on batches of 20 samples. Both runs
of a seed start from the same weights and see the batches in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .report import TeleportReport
from .teleporter import Teleporter

WIDTHS = (64, 128, 128, 10)
SLOPE, RATE, BATCH_SIZE, VALIDATION_SHARE = 0.1, 0.02, 20, 0.2


@dataclass(frozen=True)
class Digits:
    """Training and validation samples: pixels in [0, 1] (n×64, float32) and their digits (n, int64)."""

    x: Tensor
    y: Tensor
    x_held_out: Tensor
    y_held_out: Tensor


@dataclass(frozen=True)
class Result:
    """Where one run has ended: its losses, the share of the validation samples that it knows, and its teleports."""

    train_loss: float
    validation_loss: float
    accuracy: float
    reports: tuple[TeleportReport, ...]


def run(epochs: int, seeds: Iterable[int]) -> str:
    """Train without and with teleports for every seed; a table of the ends, and a line for every teleport.

    Raises:
        ImportError: scikit-learn is not there.
    """
    lines = [f"{'seed':>4}  {'run':<10}  {'train loss':>10}  {'validation loss':>15}  {'accuracy':>8}"]
    teleports = []
    for seed in seeds:
        digits = load(seed)
        for name, teleported in (("plain", False), ("teleported", True)):
            result = train(digits, epochs, seed, teleported)
            lines.append(
                f"{seed:>4}  {name:<10}  {result.train_loss:>10.4f}  {result.validation_loss:>15.4f}  "
                f"{100 * result.accuracy:>6.2f} %"
            )
            teleports += [f"seed {seed}: {report}" for report in result.reports]
    return "\n".join([f"{epochs} epochs of SGD, rate {RATE:g}", *lines, "", *teleports])


def load(seed: int) -> Digits:
    """The 1,797 digits of 8×8 pixels that come with scikit-learn, shuffled, a fifth of them held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("scikit-learn is needed here; install it with: pip install symtele_cuda[demo]") from error
    inputs, targets = load_digits(return_X_y=True)
    x, y = torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(targets).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held_out, kept = order.tensor_split([round(VALIDATION_SHARE * len(x))])
    return Digits(x[kept], y[kept], x[held_out], y[held_out])


def make_model(generator: torch.Generator) -> nn.Sequential:
    """The network at the range of torch's own start."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(WIDTHS):
        linear = nn.Linear(d_in, d_out, bias=False)
        nn.init.uniform_(linear.weight, -(d_in**-0.5), d_in**-0.5, generator=generator)
        layers += [linear, nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers[:-1])


def train(digits: Digits, epochs: int, seed: int, teleported: bool) -> Result:
    """One run; the teleporter is one line of it."""
    generator = torch.Generator().manual_seed(seed)
    model = make_model(generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    teleporter = Teleporter(model, optimizer) if teleported else None
    for epoch in range(epochs):
        for indices in torch.randperm(len(digits.x), generator=generator).split(BATCH_SIZE):
            x, y = digits.x[indices], digits.y[indices]
            if teleporter is not None:
                teleporter.step((x, y), epoch=epoch)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    with torch.no_grad():
        outputs = model(digits.x_held_out)
        return Result(
            F.cross_entropy(model(digits.x), digits.y).item(),
            F.cross_entropy(outputs, digits.y_held_out).item(),
            (outputs.argmax(1) == digits.y_held_out).float().mean().item(),
            () if teleporter is None else tuple(teleporter.reports),
        )
