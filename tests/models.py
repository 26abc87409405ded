"""Models that are chains with something more: one table of cases for all tests that read, search and write them.

The forwards stand in a module that pytest does not rewrite, so that their asserts are those of Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from symtele_cuda.activations import (
    ELU,
    Activation,
    Identity,
    LeakyReLU,
    LogSigmoid,
    ReLU,
    Sigmoid,
    Softplus,
    Softsign,
    Tanh,
    scaled,
)
from symtele_cuda.model.chain import Chain, check_inputs

INPUTS, SAMPLES = 12, 10


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Model(nn.Module):
    """Linear layers a, b, c of widths 12-16-14-`outputs`, with a forward given as a function of the module and its
    input, and further modules and buffers by their names."""

    def __init__(
        self, forward: Callable[[Model, Tensor], Tensor], outputs: int = 4, **others: nn.Module | Tensor
    ) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(INPUTS, 16), nn.Linear(16, 14), nn.Linear(14, outputs)
        for name, other in others.items():
            self.register_buffer(name, other) if isinstance(other, Tensor) else self.add_module(name, other)
        self.apply_to = forward
        self.double()
        for seed, linear in enumerate((self.a, self.b, self.c)):
            with torch.no_grad():
                linear.weight.copy_(1.5 / linear.in_features**0.5 * normal(*linear.weight.shape, seed=seed))
                linear.bias.copy_(0.2 * normal(len(linear.bias), seed=seed + 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_to(self, x)


def with_activation(module: nn.Module) -> Model:
    return Model(lambda m, x: m.c(m.act(m.b(m.act(m.a(x))))), act=module)


def behind_tanh(output: Callable[[Model, Tensor], Tensor], outputs: int = 4, **others: Tensor) -> Model:
    """A chain with tanh between its layers and `output` behind them."""
    return Model(lambda m, x: output(m, m.c(torch.tanh(m.b(torch.tanh(m.a(x)))))), outputs, **others)


def asserting(m: Model, x: Tensor) -> Tensor:
    assert x.dim() == 2
    assert x.ndim == 2 and x.shape[1] == INPUTS, f"got {x.shape}"
    assert 1 <= x.size(1) <= INPUTS
    assert x.is_floating_point() and x.isfinite().all()
    assert not x.is_complex()
    assert (x.dim() == 2) & (x.shape[0] > 0)
    torch._assert(x.shape[-1] == INPUTS, "features")
    hidden = torch.tanh(m.a(x))
    assert hidden.shape[1] == 16, "hidden"
    return m.c(torch.tanh(m.b(hidden)))


def run_chain(chain: Chain, x: Tensor) -> Tensor:
    """The function that a chain stands for, from its fields alone."""
    value = check_inputs(chain, x, "x")
    for linear, piece in zip(chain.linears, (*chain.activations, chain.output), strict=True):
        value = piece.forward(F.linear(value, linear.weight, linear.bias))
    return value


def asserting_either(m: Model, x: Tensor) -> Tensor:
    assert x.dim() == 2 or x.dim() == 3
    return m.c(torch.tanh(m.b(torch.tanh(m.a(x)))))


def asserting_in_place(m: Model, x: Tensor) -> Tensor:
    hidden = m.a(x)
    assert hidden.tanh_().dim() == 2
    return m.c(torch.tanh(m.b(hidden)))


def deciding(m: Model, x: Tensor) -> Tensor:
    if x.dim() != 2:
        raise AssertionError("two dimensions")
    return m.c(torch.tanh(m.b(torch.tanh(m.a(x)))))


@dataclass(frozen=True)
class Case:
    """A model, its hidden activations, one sample's shape, and what it is trained with.

    outputs: of one sample, () for one number without a dimension of its own. loss_fn: None for the default.
    classes: whether the targets are classes. group: which group moves it.
    """

    make: Callable[[], nn.Module]
    activations: tuple[Activation, ...] = (Tanh(), Tanh())
    sample: tuple[int, ...] = (INPUTS,)
    outputs: tuple[int, ...] = (4,)
    classes: bool = True
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None
    group: str = "gl"

    def batch(self, n: int = SAMPLES, seed: int = 20) -> tuple[Tensor, Tensor]:
        x = 2 * normal(n, *self.sample, seed=seed) + 0.5
        if self.classes:
            return x, torch.randint(4, (n,), generator=torch.Generator().manual_seed(seed + 1))
        return x, normal(n, *self.outputs, seed=seed + 2)


SELU = scaled(ELU(1.6732632423543772), gain=1.0507009873554805)
CELU = scaled(ELU(), rate=0.5, gain=2.0)
LECUN = scaled(Tanh(), rate=2 / 3, gain=1.7159)


CASES: dict[str, Case] = {
    # activations
    "SELU": Case(lambda: with_activation(nn.SELU()), (SELU, SELU)),
    "CELU": Case(lambda: with_activation(nn.CELU(2.0)), (CELU, CELU)),
    "PReLU": Case(lambda: with_activation(nn.PReLU()), (LeakyReLU(0.25),) * 2),
    "PReLU, diagonal": Case(lambda: with_activation(nn.PReLU()), (LeakyReLU(0.25),) * 2, group="positive_diagonal"),
    "PReLU of equal slopes": Case(
        lambda: Model(lambda m, x: m.c(torch.tanh(m.b(m.act(m.a(x))))), act=nn.PReLU(16)), (LeakyReLU(0.25), Tanh())
    ),
    "LogSigmoid": Case(lambda: with_activation(nn.LogSigmoid()), (LogSigmoid(),) * 2),
    "Softsign": Case(lambda: with_activation(nn.Softsign()), (Softsign(),) * 2),
    "functional selu, celu": Case(
        lambda: Model(lambda m, x: m.c(F.celu(m.b(F.selu(m.a(x))), alpha=2.0))), (SELU, CELU)
    ),
    "functional logsigmoid, softsign": Case(
        lambda: Model(lambda m, x: m.c(F.softsign(m.b(F.logsigmoid(m.a(x)))))), (LogSigmoid(), Softsign())
    ),
    "functional prelu": Case(
        lambda: Model(lambda m, x: m.c(torch.tanh(m.b(F.prelu(m.a(x), m.act.weight)))), act=nn.PReLU()),
        (LeakyReLU(0.25), Tanh()),
    ),
    # constants between two Linears
    "LeCun's tanh": Case(
        lambda: Model(lambda m, x: m.c(1.7159 * torch.tanh(2 / 3 * m.b(1.7159 * torch.tanh(m.a(x) * (2 / 3)))))),
        (LECUN, LECUN),
    ),
    "softplus minus log 2": Case(
        lambda: Model(lambda m, x: m.c(F.softplus(m.b(F.softplus(m.a(x)) - 0.6931)) - 0.6931)),
        (scaled(Softplus(), offset=-0.6931),) * 2,
    ),
    "flipped sigmoid": Case(
        lambda: Model(
            lambda m, x: m.c(1 - 2 * torch.sigmoid(0.3 - m.b(4 * torch.sigmoid(m.a(x)) - m.centre))),
            centre=torch.tensor([0.5]),
        ),
        (scaled(Sigmoid(), gain=4.0, offset=-0.5), scaled(Sigmoid(), rate=-1.0, shift=0.3, gain=-2.0, offset=1.0)),
    ),
    "scaled LeakyReLU, diagonal": Case(
        lambda: Model(lambda m, x: m.c(torch.tanh(m.b(F.leaky_relu(-m.a(x), 0.2).div(2))))),
        (scaled(LeakyReLU(0.2), rate=-1.0, gain=0.5), Tanh()),
        group="positive_diagonal",
    ),
    "scaled ReLU, diagonal": Case(
        lambda: Model(lambda m, x: m.c(F.relu(m.b(3 * F.relu(m.a(x)))))),
        (scaled(ReLU(), gain=3.0), ReLU()),
        group="positive_diagonal",
    ),
    "shifted ReLU, which nothing moves, between layers that GL moves": Case(
        lambda: nn.Sequential(
            (model := Model(lambda m, x: m.c(m.b(m.a(x))), outputs=20)).a,
            nn.Tanh(),
            model.b,
            Shift(0.5),
            nn.ReLU(),
            model.c,
            nn.Tanh(),
            nn.Linear(20, 4).double(),
        ),
        (Tanh(), scaled(ReLU(), shift=0.5), Tanh()),
    ),
    "no activation but a constant": Case(
        lambda: Model(lambda m, x: m.c(torch.tanh(m.b(-2 * m.a(x) + 1)))),
        (scaled(Identity(), gain=-2.0, offset=1.0), Tanh()),
    ),
    # before the first Linear
    "normalised by buffers": Case(
        lambda: Model(
            lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a((x - m.mean) / m.std))))),
            mean=normal(INPUTS, seed=30),
            std=1 + normal(INPUTS, seed=31) ** 2,
        )
    ),
    "normalised by frozen parameters": Case(lambda: nn.Sequential(Normalise(), behind_tanh(lambda m, z: z))),
    "normalised images": Case(
        lambda: Model(
            lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(torch.flatten((x - m.mean).div(m.std), 1)))))),
            mean=normal(3, 1, 1, seed=30),
            std=1 + normal(3, 1, 1, seed=31) ** 2,
        ),
        sample=(3, 2, 2),
    ),
    "pixels": Case(
        lambda: Model(lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(1 - (x / 2).sub(0.25).view(x.size(0), -1))))))),
        sample=(3, 4),
    ),
    # behind the last Linear
    "temperature": Case(lambda: behind_tanh(lambda m, z: z / 0.5)),
    "outputs in their units": Case(
        lambda: behind_tanh(lambda m, z: torch.add(z * m.std, m.mean), mean=normal(4), std=normal(1, 4, seed=1)),
        classes=False,
    ),
    "squeeze": Case(lambda: behind_tanh(lambda m, z: z.squeeze(-1), outputs=1), outputs=(), classes=False),
    "squeeze, then a sigmoid of scores": Case(
        lambda: behind_tanh(lambda m, z: 3 * torch.sigmoid(torch.squeeze(z, 1) + m.one), outputs=1, one=torch.ones(1)),
        outputs=(),
        classes=False,
    ),
    "view(-1)": Case(lambda: behind_tanh(lambda m, z: z.view(-1), outputs=1), outputs=(), classes=False),
    "squeeze of several outputs": Case(lambda: behind_tanh(lambda m, z: z.squeeze(-1))),
    "binary": Case(
        lambda: behind_tanh(lambda m, z: z.squeeze(-1), outputs=1),
        outputs=(),
        loss_fn=lambda z, y: F.binary_cross_entropy_with_logits(z, (y > 1).to(z.dtype)),
    ),
    "log_softmax": Case(lambda: behind_tanh(lambda m, z: F.log_softmax(z, dim=-1))),
    "log_softmax and NLLLoss": Case(lambda: behind_tanh(lambda m, z: z.log_softmax(1)), loss_fn=nn.NLLLoss()),
    "LogSoftmax, values": Case(
        lambda: nn.Sequential(behind_tanh(lambda m, z: z), nn.LogSoftmax(dim=-1)), classes=False
    ),
    "tanh, a constant and log_softmax": Case(lambda: behind_tanh(lambda m, z: (5 * torch.tanh(z)).log_softmax(-1))),
    # asserts
    "asserts": Case(lambda: Model(asserting)),
}


class Shift(nn.Module):
    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Normalise(nn.Module):
    """With constants that torch counts among the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(normal(INPUTS, seed=30), requires_grad=False)
        self.std = nn.Parameter(1 + normal(INPUTS, seed=31) ** 2, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
