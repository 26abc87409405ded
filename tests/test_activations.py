"""σ, σ', σ'', σ⁻¹ and their domain, each against an independent statement about it."""

from __future__ import annotations

import math

import pytest
import torch
from sigmas import ONE_OF_EACH
from torch import Tensor, nn

from symtele_cuda.activations import (
    ACTIVATIONS,
    ELU,
    UNSCALED,
    Activation,
    Identity,
    LeakyReLU,
    LogSigmoid,
    ReLU,
    Scaled,
    Sigmoid,
    Softplus,
    Softsign,
    Tanh,
    activation_of,
    make_activation,
    scaled,
    spellings,
)
from symtele_cuda.spelling import Spelling

EVERY = [
    *ONE_OF_EACH,
    scaled(ELU(), rate=2.0, gain=0.5),
    scaled(Identity(), gain=-3.0),
    LeakyReLU(0.5),
    LeakyReLU(3.0),
    Softplus(),
    Softplus(2.5),
    ELU(),
    ELU(0.3),
]
MODULES = {
    nn.Identity(): Identity(),
    nn.LeakyReLU(0.2): LeakyReLU(0.2),
    nn.ReLU(): ReLU(),
    nn.Tanh(): Tanh(),
    nn.Sigmoid(): Sigmoid(),
    nn.Softplus(beta=2.0): Softplus(2.0),
    nn.ELU(alpha=0.7): ELU(0.7),
    nn.Softsign(): Softsign(),
    nn.LogSigmoid(): LogSigmoid(),
    nn.SELU(): scaled(ELU(1.6732632423543772), gain=1.0507009873554805),
    nn.CELU(2.0): scaled(ELU(), rate=0.5, gain=2.0),
    nn.PReLU(): LeakyReLU(0.25),
}


def label(activation: Activation) -> str:
    return f"{activation}({activation.parameter:g})"


def spelling_of(module: nn.Module) -> Spelling:
    (spelling,) = (one for one in spellings() if one.spells(module))
    return spelling


every_activation = pytest.mark.parametrize("activation", EVERY, ids=label)


def grid(dtype: torch.dtype = torch.float64) -> Tensor:
    """Both branches of every σ, no kink."""
    return torch.linspace(-4, 4, 100, dtype=dtype)


@every_activation
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-3)])
def test_inverse_undoes_forward(activation: Activation, dtype: torch.dtype, tolerance: float) -> None:
    # tanh and sigmoid lose up to u / σ'(4) ≈ 1e3 u on the way back.
    z = grid(dtype)
    torch.testing.assert_close(activation.inverse(activation.forward(z)), z, rtol=tolerance, atol=tolerance)


@every_activation
def test_forward_undoes_inverse(activation: Activation) -> None:
    low, high = activation.domain
    b = torch.linspace(max(low, -5.0), min(high, 5.0), 101, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(activation.forward(activation.inverse(b)), b, rtol=1e-14, atol=1e-14)


@every_activation
def test_derivative_is_that_of_autograd(activation: Activation) -> None:
    z = grid().requires_grad_()
    (expected,) = torch.autograd.grad(activation.forward(z).sum(), z)
    torch.testing.assert_close(activation.derivative(z.detach()), expected, rtol=1e-13, atol=1e-15)


@every_activation
def test_pull_back_multiplies_by_the_derivative_and_that_of_the_inverse_divides(activation: Activation) -> None:
    z = grid()
    gradient, slope = torch.cos(7 * z), activation.derivative(z)
    torch.testing.assert_close(activation.pull_back(gradient, z), gradient * slope, rtol=1e-15, atol=0)
    if activation.invertible:
        torch.testing.assert_close(activation.pull_back_inverse(gradient, z), gradient / slope, rtol=1e-15, atol=0)


@every_activation
def test_second_derivative_is_that_of_autograd(activation: Activation) -> None:
    z = grid().requires_grad_()
    total = activation.derivative(z).sum()
    curvature = activation.second_derivative(z.detach())
    if not total.requires_grad:  # piecewise linear: nothing of z is left in σ'
        assert curvature is None
        return
    (expected,) = torch.autograd.grad(total, z)
    assert curvature is not None
    torch.testing.assert_close(curvature, expected, rtol=1e-12, atol=1e-15)


@every_activation
def test_derivative_of_the_inverse_is_one_over_the_derivative(activation: Activation) -> None:
    z = grid()
    b = activation.forward(z).detach().requires_grad_()
    (slope,) = torch.autograd.grad(activation.inverse(b).sum(), b)
    torch.testing.assert_close(slope * activation.derivative(z), torch.ones_like(z), rtol=1e-11, atol=0)


@every_activation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_function_keeps_the_dtype(activation: Activation, dtype: torch.dtype) -> None:
    z = torch.tensor([-0.5, 0.0, 0.25], dtype=dtype)
    results = [activation.forward(z), activation.derivative(z), activation.second_derivative(z), activation.inverse(z)]
    assert {result.dtype for result in results if result is not None} == {dtype}


@pytest.mark.parametrize("activation", [LeakyReLU(0.1), ELU(0.3)], ids=label)
def test_derivative_at_the_kink_is_that_of_torch(activation: Activation) -> None:
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(activation.forward(z).sum(), z)
    assert activation.derivative(z.detach()).item() == expected.item()


@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0])
def test_softplus_is_the_identity_beyond_its_threshold(beta: float) -> None:
    activation = Softplus(beta)
    z = torch.tensor([20.5, 30.0, 1e4], dtype=torch.float64) / beta
    assert torch.equal(activation.forward(z), z)
    assert torch.equal(activation.inverse(z), z)
    assert torch.equal(activation.derivative(z), torch.ones_like(z))
    assert torch.equal(activation.second_derivative(z), torch.zeros_like(z))


def test_softplus_inverse_holds_far_out_on_the_left() -> None:
    z = torch.tensor([-700.0, -300.0, -30.0], dtype=torch.float64)
    torch.testing.assert_close(Softplus().inverse(Softplus().forward(z)), z, rtol=1e-14, atol=0)


@pytest.mark.parametrize("z", [-1e4, 1e4])
@every_activation
def test_derivatives_are_finite_far_out(activation: Activation, z: float) -> None:
    point = torch.tensor([z], dtype=torch.float32)
    assert bool(torch.isfinite(activation.derivative(point)).all())
    curvature = activation.second_derivative(point)
    assert curvature is None or bool(torch.isfinite(curvature).all())


@every_activation
def test_domain_is_open_and_its_edges_are_outside(activation: Activation) -> None:
    low, high = activation.domain
    middle = torch.zeros(3, dtype=torch.float64) + (0.5 if low == 0 else -0.5 if high == 0 else 0.0)
    assert activation.contains(middle)
    for edge in (low, high, math.nan):
        outside = middle.clone()
        outside[1] = edge
        assert not activation.contains(outside)
    if math.isfinite(low):
        inside = middle.clone()
        inside[2] = math.nextafter(low, math.inf)
        assert activation.contains(inside)


@every_activation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_domain_in_every_dtype(activation: Activation, dtype: torch.dtype) -> None:
    inside = torch.full((2, 3), -0.25 if activation.domain[1] == 0 else 0.25, dtype=dtype)
    assert activation.contains(inside)
    assert activation.contains(inside[:0])
    for bad in (math.nan, math.inf, -math.inf):
        outside = inside.clone()
        outside[1, 1] = bad
        assert not activation.contains(outside)


@every_activation
def test_inverse_is_not_finite_outside_the_domain(activation: Activation) -> None:
    low, high = activation.domain
    beyond = torch.tensor([low - 0.1, high + 0.1], dtype=torch.float64)  # that of an infinite edge stays infinite
    assert not bool(torch.isfinite(activation.inverse(beyond)).any())


@pytest.mark.parametrize("cls", [LeakyReLU, Softplus, ELU])
@pytest.mark.parametrize("parameter", [0.0, -0.1, math.nan, math.inf])
def test_parameters_that_leave_no_inverse_are_refused(cls: type[Activation], parameter: float) -> None:
    with pytest.raises(ValueError, match="must be a finite number > 0"):
        cls(parameter)


@pytest.mark.parametrize("cls", [LeakyReLU, Softplus, ELU])
@pytest.mark.parametrize("parameter", [1e-40, 1e-38, 1e38, 1e39])
def test_parameters_that_float32_cannot_invert_are_refused(cls: type[Activation], parameter: float) -> None:
    with pytest.raises(ValueError, match=r"must be a finite number > 0 .* float32, from 1.2e-38 to 8.5e\+37, got 1e"):
        cls(parameter)


@pytest.mark.parametrize("parameter", [2.0**-126, 2.0**126])
def test_the_extreme_slopes_of_float32(parameter: float) -> None:
    z = torch.tensor([-1.0, 1.0])
    assert torch.equal(LeakyReLU(parameter).inverse(LeakyReLU(parameter).forward(z)), z)


@pytest.mark.parametrize("name", [name for name, cls in ACTIVATIONS.items() if cls.invertible])
def test_make_activation_by_name(name: str) -> None:
    activation = make_activation(name, 0.7)
    assert activation.name == name
    assert activation.parameter == (0.7 if name in ("leaky_relu", "softplus", "elu") else 0.0)
    assert make_activation(name) == ACTIVATIONS[name]()


def test_make_activation_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of \[.*'tanh'\], got 'relu'"):
        make_activation("relu")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_and_its_activation_are_the_same_function(module: nn.Module) -> None:
    activation = spelling_of(module).read_module(module)
    assert activation == MODULES[module]
    z = torch.tensor([-50.0, -1.0, 0.0, 1.0, 50.0], dtype=torch.float64)
    torch.testing.assert_close(activation.forward(z), module.double()(z), rtol=4e-16, atol=0)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Softplus(threshold=5.0), "Softplus with threshold 5.0"),
        (nn.LeakyReLU(0.0), "negative_slope must be .* got 0.0"),
        (nn.CELU(-1.0), "alpha must be a finite number > 0 .* got -1.0"),
        (nn.PReLU(init=-0.25), "PReLU's weight must be a finite number > 0 .* got -0.25"),
        (nn.PReLU(device="meta"), "PReLU whose weight is on the meta device"),
    ],
    ids=str,
)
def test_a_module_without_an_inverse_is_refused_with_the_reason(module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spelling_of(module).read_module(module)


def test_slopes_that_differ_are_refused() -> None:
    module = nn.PReLU(3)
    module.weight.data[1] = 0.5
    with pytest.raises(ValueError, match="PReLU whose 3 slopes differ"):
        spelling_of(module).read_module(module)


@every_activation
def test_the_numbers_of_an_activation_make_it_again(activation: Activation) -> None:
    name, numbers = activation.sigma
    assert activation_of(name, numbers) == activation
    assert (numbers[1:] == UNSCALED) == (not isinstance(activation, Scaled))


def test_a_scaled_activation_is_what_its_numbers_say() -> None:
    z = grid()
    flipped = scaled(Sigmoid(), rate=-2.0, shift=0.5, gain=-3.0, offset=1.0)
    torch.testing.assert_close(flipped.forward(z), 1 - 3 * torch.sigmoid(0.5 - 2 * z), rtol=1e-15, atol=1e-15)
    assert flipped.domain == (-2.0, 1.0)
    assert scaled(Softplus(), gain=-1.0, offset=2.0).domain == (-math.inf, 2.0)
    assert scaled(Tanh()) == Tanh()
    assert str(flipped) == "scaled sigmoid"


@pytest.mark.parametrize("numbers", [{"rate": 0.0}, {"gain": 0.0}, {"gain": math.inf}, {"rate": math.nan}])
def test_factors_without_an_inverse_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="the size of a factor must be a finite number > 0"):
        scaled(Tanh(), **numbers)


@pytest.mark.parametrize("numbers", [{"shift": math.inf}, {"offset": math.nan}])
def test_constants_that_are_not_finite_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a constant that is added must be finite, got"):
        scaled(Tanh(), **numbers)


@pytest.mark.parametrize("activation", [*EVERY, ReLU(), scaled(ReLU(), shift=0.5)], ids=label)
def test_piecewise_linear_activations_have_no_curvature(activation: Activation) -> None:
    assert activation.piecewise_linear == (activation.second_derivative(grid()) is None)


def test_relu_s_derivative_is_that_of_autograd() -> None:
    z = torch.linspace(-4, 4, 101, dtype=torch.float64).requires_grad_()  # the kink among them
    torch.nn.functional.relu(z).sum().backward()
    assert torch.equal(ReLU().derivative(z.detach()), z.grad)
    assert ReLU().second_derivative(z.detach()) is None


@pytest.mark.parametrize("activation", [*EVERY, ReLU()], ids=label)
def test_positively_homogeneous_activations_commute_with_positive_factors(activation: Activation) -> None:
    z, factors = grid(), torch.tensor([[0.25], [3.0]], dtype=torch.float64)
    commutes = torch.allclose(activation.forward(factors * z), factors * activation.forward(z), rtol=1e-14, atol=0)
    assert commutes == activation.positively_homogeneous


def test_only_relu_has_no_inverse() -> None:
    assert [activation for activation in (*EVERY, ReLU()) if not activation.invertible] == [ReLU()]
