"""matched_samples: independent, well conditioned, in order, and as many as the inputs can tell apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import make_batch, make_mlp, snapshot, unchanged
from teleports import teleport_mlp
from torch import Tensor, nn

from symtele_cuda import TeleportError
from symtele_cuda.kernels.pinv import condition_from_gram
from symtele_cuda.kernels.torch_kernels import grams, invert_grams
from symtele_cuda.model.problem import layer_inputs, read_network
from symtele_cuda.model.reader import read_chain
from symtele_cuda.model.samples import GOOD_CONDITION, matched_samples

DIMS = [30, 40, 36, 5]


def make_samples(n: int, d_in: int = 30, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return make_batch(n, d_in, 5, dtype=dtype)[0]


def conditions(model: nn.Module, x: Tensor) -> list[float]:
    """κ₂ of the inputs of all hidden layers, from their singular values."""
    network = read_network(read_chain(model))
    inputs = layer_inputs(network, x, network.forward(x))[:-1]
    extended = [
        values if bias is None else torch.cat([values, torch.ones(len(x), 1)], 1).double()
        for values, bias in zip(inputs, network.biases, strict=False)
    ]
    return [float(torch.linalg.cond(values)) for values in extended]


def all_but(n: int, *rows: int) -> list[int]:
    return [row for row in range(n) if row not in rows]


def test_independent_samples_are_all_taken() -> None:
    assert matched_samples(make_mlp(DIMS), make_samples(20)).tolist() == list(range(20))


def change(x: Tensor, kind: str) -> list[int]:
    """Spoil some of the 20 samples in place; the rows that are expected to be left out."""
    generator = torch.Generator().manual_seed(3)
    if kind == "duplicates at the start":
        x[1] = x[2] = x[0]
        return [1, 2]
    if kind == "duplicates":
        x[5], x[19] = x[2], x[7]
        return [5, 19]
    if kind == "near duplicate":
        x[1] = x[0] + 1e-4 * torch.randn(30, generator=generator)
        return [1]
    if kind == "linear combination":
        x[4] = 0.5 * x[0] + 0.2 * x[1] + 0.3 * x[2]  # affine: the bias' column too
        return [4]
    if kind == "twice zero":
        x[0] = x[6] = 0.0
        return [6]
    if kind == "outlier":
        x[3] *= 1e4
        return [3]
    raise ValueError(kind)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "kind",
    ["duplicates at the start", "duplicates", "near duplicate", "linear combination", "twice zero", "outlier"],
)
def test_only_what_depends_on_the_others_is_left_out(kind: str, dtype: torch.dtype) -> None:
    model, x = make_mlp(DIMS, dtype=dtype), make_samples(20)
    left_out = change(x, kind)
    assert matched_samples(model, x.to(dtype)).tolist() == all_but(20, *left_out)


def test_zero_rows_without_bias_are_left_out() -> None:
    x = make_samples(20)
    x[[0, 1, 8]] = 0.0
    assert matched_samples(make_mlp(DIMS, bias=False), x).tolist() == all_but(20, 0, 1, 8)


def test_constant_features_cost_their_columns() -> None:
    x = make_samples(40)
    x[:, 3] = 2.0  # as the bias: 30 columns are left of 31
    x[:, 7:27] = 0.0  # and now 10
    chosen = matched_samples(make_mlp(DIMS), x)
    # The first ten may be worse conditioned than the limit, later ones are tried for them.
    assert 8 <= len(chosen) <= 10
    assert max(conditions(make_mlp(DIMS), x[chosen])) <= 2 * GOOD_CONDITION


@pytest.mark.parametrize(("bias", "most"), [(True, 9), (False, 8)])
def test_no_more_than_the_narrowest_input_has_columns(bias: bool, most: int) -> None:
    model = make_mlp([30, 40, 8, 20, 5], bias=bias)
    chosen = matched_samples(model, make_samples(100))
    assert most - 1 <= len(chosen) <= most
    assert len(matched_samples(model, make_samples(100), [1, 2])) > most  # 8 is the width of layer 3's input


def test_layers_that_do_not_count_are_not_looked_at() -> None:
    model, x = make_mlp(DIMS), make_samples(20)
    with torch.no_grad():
        model[0].weight[:, :4] = 0.0  # the second layer's input does not see the first four features
    x[1] = x[0]
    x[1, :4] += 1.0
    assert matched_samples(model, x).tolist() == all_but(20, 1)
    assert matched_samples(model, x, [2]).tolist() == all_but(20, 1)
    assert matched_samples(model, x, [1]).tolist() == list(range(20))


@pytest.mark.parametrize("activation", ["leaky_relu", "tanh", "sigmoid", "softplus", "elu"])
@pytest.mark.parametrize("make", [torch.clone, torch.sigmoid, lambda x: x[torch.arange(len(x)) // 3] + 0.01 * x])
def test_condition_numbers_are_bounded(activation: str, make: Callable[[Tensor], Tensor]) -> None:
    model = make_mlp([60, 50, 70, 5], activation)
    x = make(make_samples(100, 60))
    chosen = matched_samples(model, x)
    assert len(chosen) >= 2
    assert bool((chosen.diff() > 0).all())
    network = read_network(read_chain(model))
    for values in layer_inputs(network, x[chosen], network.forward(x[chosen]))[:-1]:
        (matrix,), _ = grams([values], [True])
        (inverse,), infos, _ = invert_grams([matrix])
        assert infos.item() == 0
        # To rounding: the Gram matrix of the chosen rows, not the chosen rows of the Gram matrix.
        assert condition_from_gram(matrix, inverse) <= GOOD_CONDITION * (1 + 1e-6)
    assert max(conditions(model, x[chosen])) <= 2 * GOOD_CONDITION  # that estimate is good to a factor of two


def test_no_sample_left_out_would_fit() -> None:
    """κ₂ does not fall when rows are added: with a sample left out the bound is missed, but for the estimates."""
    model, x = make_mlp(DIMS), make_samples(20)
    left_out = change(x, "near duplicate") + change(x, "duplicates")
    chosen = matched_samples(model, x).tolist()
    assert chosen == all_but(20, *left_out)
    for row in left_out:
        assert max(conditions(model, x[sorted([*chosen, row])])) > GOOD_CONDITION


def test_chosen_samples_can_be_teleported() -> None:
    (x, y), model = make_batch(60, 30, 5), make_mlp(DIMS)
    x[1] = x[0]
    chosen = matched_samples(model, x)
    assert len(chosen) >= 20
    report = teleport_mlp(model, (x[chosen], y[chosen]))
    assert report.accepted
    assert all(layer.teleported and layer.rank == len(chosen) for layer in report.layers)


def test_samples_of_any_finite_size() -> None:
    x = make_samples(20)
    scales = torch.tensor([1e70, 1e-70], dtype=torch.float64).repeat(10)[:, None]
    model = make_mlp(DIMS, bias=False)
    assert matched_samples(model, x * scales[0]).tolist() == list(range(20))
    assert matched_samples(model, x * scales).tolist() == list(range(0, 20, 2))


def test_images_and_one_sample() -> None:
    model = nn.Sequential(nn.Flatten(), *make_mlp(DIMS))
    assert matched_samples(model, make_samples(6).view(6, 1, 5, 6)).tolist() == list(range(6))
    assert matched_samples(model, make_samples(1)).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    x = make_samples(20, dtype=dtype)
    x[1] = x[0]
    assert matched_samples(make_mlp(DIMS, dtype=dtype), x).tolist() == all_but(20, 1)


def test_deterministic_and_without_side_effects() -> None:
    model, x = make_mlp(DIMS, dtype=torch.float32), make_samples(100, dtype=torch.float32)
    before, rng, samples = snapshot(model), torch.get_rng_state(), x.clone()
    chosen = matched_samples(model, x)
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen, matched_samples(model, x.requires_grad_()))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.equal(chosen, matched_samples(model, x))
    assert unchanged(model, before)
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(x, samples)


def broken(change: Callable[[nn.Sequential], object]) -> nn.Sequential:
    model = make_mlp(DIMS)
    with torch.no_grad():
        change(model)
    return model


X = make_samples(4)
BAD_CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "model": (lambda: matched_samples(3, X), TypeError, "model must be a torch.nn.Module, got int"),  # type: ignore[arg-type]
    "list": (lambda: matched_samples(make_mlp(DIMS), [1.0]), TypeError, "x must be a tensor, got list"),  # type: ignore[arg-type]
    "0-d": (
        lambda: matched_samples(make_mlp(DIMS), X[0, 0]),
        ValueError,
        r"shape \(n, d_in=30\), got \(\)",
    ),
    "width": (lambda: matched_samples(make_mlp(DIMS), X[:, :7]), ValueError, r"x must have shape .* got \(4, 7\)"),
    "dtype": (
        lambda: matched_samples(make_mlp(DIMS), X.float()),
        TypeError,
        "x must .*float64, got torch.float32",
    ),
    "device": (lambda: matched_samples(make_mlp(DIMS), X.to("meta")), ValueError, "x must be on .* cpu, got meta"),
    "empty": (lambda: matched_samples(make_mlp(DIMS), X[:0]), ValueError, "x must hold at least one sample, got 0"),
    "NaN": (lambda: matched_samples(make_mlp(DIMS), X * torch.nan), ValueError, "x must be finite, got NaN or Inf"),
    "layers": (lambda: matched_samples(make_mlp(DIMS), X, [0]), ValueError, r"layers must be .* 1..2, got \[0\]"),
    "layers text": (lambda: matched_samples(make_mlp(DIMS), X, "1"), TypeError, "layers must be a sequence"),  # type: ignore[arg-type]
    "NaN weights": (
        lambda: matched_samples(broken(lambda m: m[2].weight[0, 0].fill_(torch.nan)), X),
        ValueError,
        "parameter '2.weight' must be finite",
    ),
    "all zero": (
        lambda: matched_samples(make_mlp(DIMS, bias=False), 0 * X),
        TeleportError,
        r"x: expected a sample that is finite and not zero in .* hidden layers \[1, 2\], got none among 4",
    ),
    "overflow": (
        lambda: matched_samples(broken(lambda m: m[0].weight.mul_(1e200)), X * 1e200),
        TeleportError,
        "got none among 4",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors(name: str) -> None:
    call, error, text = BAD_CALLS[name]
    with pytest.raises(error, match=text):
        call()
