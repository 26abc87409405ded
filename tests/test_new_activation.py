"""A made-up activation, one class that the library does not know, through all of it on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from teleports import teleport_mlp
from torch import Tensor, nn

import symtele_cuda as st
from symtele_cuda.activations import ACTIVATIONS, Activation, register, scaled
from symtele_cuda.checks import check_invertible
from symtele_cuda.model.reader import read_chain
from symtele_cuda.operator import reference
from symtele_cuda.spelling import Spelling


class Arsinh(nn.Module):
    """As somebody may have written it, with a forward that could not be traced."""

    def __init__(self, sharpness: float = 1.0) -> None:
        super().__init__()
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        return torch.asinh(x * self.sharpness) if bool(x.isfinite().all()) else x


@pytest.fixture(autouse=True)
def arsinh() -> Iterator[type[Activation]]:
    def by_function(input: None) -> Activation:
        return Stretched()

    def by_module(input: None, sharpness: float) -> Activation:
        return Stretched(sharpness)

    @register
    @dataclass(frozen=True)
    class Stretched(Activation):
        """σ(z) = arsinh(s z) with s = `parameter`, onto ℝ."""

        parameter: float = 1.0

        name = "arsinh"
        spellings = (
            Spelling((Arsinh,), (), by_module),
            Spelling((), (torch.asinh, torch.arcsinh, "asinh"), by_function),
        )

        def __post_init__(self) -> None:
            check_invertible("sharpness", self.parameter)

        def forward(self, z: Tensor) -> Tensor:
            return torch.asinh(self.parameter * z)

        def derivative(self, z: Tensor) -> Tensor:
            return self.parameter / torch.sqrt(1 + (self.parameter * z) ** 2)

        def second_derivative(self, z: Tensor) -> Tensor:
            return -(self.parameter**3) * z * (1 + (self.parameter * z) ** 2) ** -1.5

        def inverse(self, b: Tensor) -> Tensor:
            return torch.sinh(b) / self.parameter

    yield Stretched
    del ACTIVATIONS["arsinh"]


class Net(nn.Module):
    """The same activation as a module and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 14), nn.Linear(14, 4)
        self.act = Arsinh(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(2 * torch.asinh(self.b(self.act(self.a(x)))))


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def test_a_model_is_read(arsinh: type[Activation]) -> None:
    assert read_chain(make_net()).activations == (arsinh(**{"parameter": 0.5}), scaled(arsinh(), gain=2.0))


def test_a_model_is_teleported() -> None:
    model, generator = make_net(), torch.Generator().manual_seed(1)
    x = torch.randn(10, 12, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (10,), generator=generator)
    before = model(x)
    for objective in ("grad_norm", "lookahead"):
        report = teleport_mlp(model, (x, y), objective=objective, lr=0.1, backend="torch")
        assert report.accepted, report.reason
        assert all(layer.teleported for layer in report.layers) and len(report.layers) == 2
    torch.testing.assert_close(model(x), before, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_layer_is_teleported_and_differentiated_twice(arsinh: type[Activation], by_name: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, inputs, change = (torch.randn(*s, generator=generator).double() for s in ((3, 5), (4, 5), (3, 3)))
    g = (torch.eye(3).double() + 0.1 * change).requires_grad_()
    sigma = arsinh() if by_name else arsinh(**{"parameter": 0.5})

    def layer(g: Tensor) -> Tensor:
        return st.teleport_layer(weight, inputs, g, activation="arsinh" if by_name else sigma)[0]

    expected, _ = reference.teleport_layer(weight, inputs, g, None, sigma, "least_change")
    torch.testing.assert_close(layer(g), expected, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(layer, g) and torch.autograd.gradgradcheck(layer, g)


def test_its_spellings_check_their_numbers() -> None:
    model = make_net()
    model.act.sharpness = math.nan
    with pytest.raises(ValueError, match=r"at 'act' .* got sharpness must be a finite number > 0 .* got nan"):
        read_chain(model)


def test_a_name_that_is_taken_is_refused(arsinh: type[Activation]) -> None:
    with pytest.raises(ValueError, match=r"name must be that of no other activation, got 'arsinh', of <class .*Stretc"):
        register(type("Another", (arsinh,), {}))


def test_it_is_unknown_without_being_registered(arsinh: type[Activation]) -> None:
    class Steeper(arsinh):  # type: ignore[valid-type, misc]
        pass

    with pytest.raises(TypeError, match=r"activation must be .* Stretched itself, got Steeper"):
        st.teleport_layer(torch.ones(2, 2), torch.eye(2), torch.eye(2), activation=Steeper())
