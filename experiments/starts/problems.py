"""What is trained: problems, activations and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from experiments.side_by_side import Apart, SideBySide
from experiments.starts.arms import (
    ALL,
    ALL_ANYWAY,
    EACH,
    EACH_ANYWAY,
    INITS,
    LAST,
    LOOKAHEAD,
    ON_BEST,
    PLAIN,
    SMALL,
    SPREADS,
    TRAINED,
    TRAINED_ANYWAY,
)

BATCH_SIZE = 20
NOISE, NOISE_LEVEL = 0.3, 0.05
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "LeakyReLU 0.1": lambda: nn.LeakyReLU(0.1),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "ELU": nn.ELU,
    "SELU": nn.SELU,
    "CELU": nn.CELU,
    "softsign": nn.Softsign,
    "ReLU": nn.ReLU,
}
STUDIED = ("LeakyReLU 0.1", "tanh", "sigmoid")
Optimizers = list[torch.optim.Optimizer]


def _muon(networks: SideBySide | Apart, lr: float) -> Optimizers:
    """Muon for the hidden layers' matrices, AdamW with the same rate and decay for all else."""
    assert isinstance(networks, Apart)
    hidden = networks.hidden_matrices()
    known = set(map(id, hidden))
    others = [parameter for parameter in networks.parameters() if id(parameter) not in known]
    adamw = torch.optim.AdamW(others, lr, fused=True)
    decay = adamw.defaults["weight_decay"]
    return [torch.optim.Muon(hidden, lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"), adamw]


OPTIMIZERS: dict[str, Callable[[SideBySide | Apart, float], Optimizers]] = {
    "sgd": lambda networks, lr: [torch.optim.SGD(networks.parameters(), lr, fused=True)],
    "momentum": lambda networks, lr: [torch.optim.SGD(networks.parameters(), lr, momentum=0.9, fused=True)],
    "adagrad": lambda networks, lr: [torch.optim.Adagrad(networks.parameters(), lr, fused=True)],
    "adam": lambda networks, lr: [torch.optim.Adam(networks.parameters(), lr, fused=True)],
    "adamw": lambda networks, lr: [torch.optim.AdamW(networks.parameters(), lr, fused=True)],
    "muon": _muon,
}
MATRICES_ONLY, GRADIENT_STEPS = ("muon",), ("sgd", "momentum")
FIRST_RATES = {"sgd": 0.2, "momentum": 0.02, "adagrad": 0.02, "adam": 2e-3, "adamw": 2e-3, "muon": 5e-3}


@dataclass(frozen=True)
class Problem:
    """Data, hidden widths, epochs of a run, train losses, that of them which decides which rate is best, activations,
    and the arms of each optimizer.

    data: a name of `experiments.study.problems.DATA`.
    """

    data: str
    widths: tuple[int, ...]
    epochs: int
    levels: tuple[float, ...]
    level: float
    activations: tuple[str, ...]
    arms: Mapping[str, tuple[str, ...]]

    @property
    def on_mnist(self) -> bool:
        """Whether its data are files that the user must have."""
        return self.data == "mnist"


CLASSES = (0.1, 0.03, 0.01)
STARTS = (PLAIN, *INITS, LAST, ALL, SMALL, ON_BEST, TRAINED, TRAINED_ANYWAY)
FEW = (PLAIN, *INITS, ALL)
ON_MNIST = (PLAIN, "He or Glorot", ALL, ALL_ANYWAY)
LEAKY_AND_TANH = ("LeakyReLU 0.1", "tanh")
PROBLEMS = {
    "digits": Problem(
        "digits",
        (128, 128),
        12,
        CLASSES,
        0.01,
        STUDIED,
        {"sgd": (*STARTS, EACH, EACH_ANYWAY, LOOKAHEAD), "momentum": STARTS, "adam": STARTS},
    ),
    "digits, deep": Problem(
        "digits", (128,) * 4, 8, CLASSES, 0.03, ("sigmoid",), dict.fromkeys(("sgd", "adam"), (*FEW, ON_BEST))
    ),
    "digits, deep tanh": Problem(
        "digits",
        (64,) * 8,
        12,
        CLASSES,
        0.03,
        ("tanh",),
        dict.fromkeys(("sgd", "adam"), (*FEW, ALL_ANYWAY, ON_BEST)),
    ),
    "digits, other rules": Problem(
        "digits", (128, 128), 12, CLASSES, 0.01, ("LeakyReLU 0.1",), dict.fromkeys(("adagrad", "adamw"), FEW)
    ),
    "digits, Muon": Problem("digits", (128, 128), 6, CLASSES, 0.01, LEAKY_AND_TANH, {"muon": FEW}),
    "digits, spreads": Problem(
        "digits",
        (128, 128),
        12,
        CLASSES,
        0.01,
        tuple(name for name in ACTIVATIONS if name not in STUDIED),
        {"sgd": (PLAIN, *SPREADS)},
    ),
    "diabetes": Problem(
        "diabetes",
        (64, 64),
        40,
        (0.45, 0.4, 0.35),
        0.4,
        LEAKY_AND_TANH,
        dict.fromkeys(("sgd", "adam"), (*FEW, ALL_ANYWAY, SMALL)),
    ),
    "mnist": Problem("mnist", (512, 512), 5, CLASSES, 0.1, LEAKY_AND_TANH, {"sgd": ON_MNIST}),
    "mnist, narrow": Problem("mnist", (128,), 5, CLASSES, 0.1, LEAKY_AND_TANH, {"sgd": ON_MNIST}),
}
