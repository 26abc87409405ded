"""One activation of each kind that the kernels know, some scaled: what all tests go over that go over activations."""

from __future__ import annotations

from symtele_cuda.activations import (
    ELU,
    Activation,
    Identity,
    LeakyReLU,
    LogSigmoid,
    Sigmoid,
    Softplus,
    Softsign,
    Tanh,
    scaled,
)

PLAIN: list[Activation] = [
    Identity(),
    LeakyReLU(0.1),
    Tanh(),
    Sigmoid(),
    Softplus(3.0),
    ELU(0.4),
    Softsign(),
    LogSigmoid(),
]
SCALED: list[Activation] = [
    scaled(Tanh(), rate=0.5, shift=0.25, gain=-2.0, offset=0.25),
    scaled(LeakyReLU(0.1), shift=-0.3, gain=1.5),
]
ONE_OF_EACH = PLAIN + SCALED
