"""Every compiled operator once on small operands, for compute-sanitizer: nothing is timed and nothing compared.

    compute-sanitizer --tool racecheck python -m bench.sanitize [--teleport]

Operands are made on the CPU and copied, so that the kernels under watch are nearly all our own. With --teleport whole
teleports of a small network instead, through CUDA graphs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from symtele_cuda import Ascent, teleport_mlp
from symtele_cuda.activations import ACTIVATIONS
from symtele_cuda.kernels.library import Linear, Products, products_for, together
from symtele_cuda.kernels.operands import OPERATORS

DEVICE = torch.device("cuda")

# rows, columns, inner: odd and thin; in float32 besides one that goes to the tensor cores.
SIZES = [(1, 1, 1), (7, 33, 2), (33, 65, 129), (20, 512, 784), (200, 10, 65)]
LARGE = (640, 512, 512)


class Operands:
    """Random operands in [0.2, 0.8], which lies in every activation's domain."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.source = torch.Generator().manual_seed(0)

    def make(self, *shape: int) -> Tensor:
        return (0.2 + 0.6 * torch.rand(*shape, generator=self.source)).to(self.dtype).to(DEVICE)

    def matrices(self, rows: int, columns: int) -> Iterator[Tensor]:
        """Contiguous, stored by columns, and with rows further apart than they are long."""
        yield self.make(rows, columns)
        yield self.make(columns, rows).t()
        yield self.make(rows, columns + 3)[:, :columns]

    def positive_definite(self, size: int) -> Tensor:
        rows = 0.1 * torch.rand(size, size, generator=self.source, dtype=torch.float64)
        return (rows @ rows.T + torch.eye(size, dtype=torch.float64)).to(DEVICE)


def run_products(products: Products, operands: Operands, sizes: tuple[int, int, int]) -> None:
    rows, columns, inner = sizes
    like, column, row = operands.make(rows, columns), operands.make(rows), operands.make(columns)
    scale = 1.0 / inner
    for a in operands.matrices(rows, inner):
        for b in operands.matrices(inner, columns):
            products.linear(a, b)
            products.linear(a, b, like, column, row, scale, -0.5)
            together(products, *(Linear(a, b, source, mask=like) for source in (like, None)), Linear(a, b, row=row))
    a, b = operands.make(rows, inner), operands.make(inner, columns)
    size = torch.tensor(0.01, dtype=torch.float64).to(DEVICE)
    for name, activation in ACTIVATIONS.items():
        if not activation.invertible:
            continue
        numbers = activation().sigma[1]
        products.linear_activation(a, b, row, name, numbers)
        products.linear_activation(a, b, None, name, numbers)
        products.inverse_activation(a, b, like, 1.0, name, numbers)
        products.over_slope(a, b, column, row, like, name, numbers)
        products.over_slope(a, b, None, None, like, name, numbers)
        products.times_slope(a, b, like, like, -1.0, name, numbers)
        products.take_steps([like, like], [like, like], size, [False, True], [name] * 2, [*numbers] * 2)
        products.times_curvature(like, like, like, like, name, numbers)
        products.times_curvature(like, like, like, None, name, numbers)


def run_factors(products: Products, operands: Operands) -> None:
    for size in (1, 31, 33, 129, 200):
        for rows in operands.matrices(size, 65):
            for bias in (False, True):
                products.grams([rows, rows], [bias, not bias], bias)
        matrix = operands.positive_definite(size)
        (inverse, _), (info, _), _ = products.invert_grams([matrix, -matrix], True)
        for bias in (False, True):
            products.pseudo_inverse(inverse, operands.make(size, 65), bias)
        products.near_dependence([matrix, matrix], [inverse, inverse], [info, info], 1e5)


def run_lists(products: Products, operands: Operands) -> None:
    for count in (1, 3, 70):
        left = [operands.make(1 + 37 * index) for index in range(count)]
        right = [operands.make(1 + 37 * index) for index in range(count)]
        products.dot_sum(left, right)
        products.dot_sum(left, left, 0.5, True)
        products.squared_norms([*left, operands.make(3).double(), operands.make(3).int()])
        for accept in (False, True):
            products.commit(torch.tensor(accept).to(DEVICE), left, right)


def run_judge(products: Products) -> None:
    def numbers(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(DEVICE)

    control = numbers(1.0, 0.1, 0.0, 0.0, 0.1)
    rules = (2.0, 1.2, 0.25, 1e-6, 0.98, 0.5, 0.1, 0.9, 0.999)
    size, norm, cap = (numbers(value).squeeze() for value in (0.1, 1.0, 4.0))
    for flags in (0, 1, 3):
        for value in (0.5, 1.5, 5.0, float("nan")):
            hindered = torch.zeros(flags, dtype=torch.bool).to(DEVICE)
            broken = torch.ones(flags, dtype=torch.bool).to(DEVICE)
            products.judge(control, size, norm, numbers(value).squeeze(), hindered, broken, cap, True, rules)


def run_operators(products: Products) -> None:
    for dtype in (torch.float32, torch.float64):
        operands = Operands(dtype)
        for sizes in SIZES if dtype == torch.float64 else [*SIZES, LARGE]:
            run_products(products, operands, sizes)
        run_factors(products, operands)
        run_lists(products, operands)
    run_judge(products)
    print(f"{len(OPERATORS)} operators ran")


def run_teleports() -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.LeakyReLU(0.1), nn.Linear(40, 36), nn.Tanh(), nn.Linear(36, 5))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 30, generator=generator).to(DEVICE), torch.randint(5, (20,), generator=generator).to(DEVICE)
    for objective in ("grad_norm", "lookahead"):
        for _ in range(3):  # kernel by kernel, captured, replayed
            method = Ascent(objective, lr=0.05, steps=4)
            report = teleport_mlp(copy.deepcopy(model).to(DEVICE), (x, y), method=method)
            print(f"{report.backend}: {report}")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Every compiled operator once, for compute-sanitizer.")
    parser.add_argument("--teleport", action="store_true", help="whole teleports instead")
    teleports = parser.parse_args(words).teleport
    products = products_for(DEVICE, "cuda")  # without the kernels there is nothing to watch
    if teleports:
        run_teleports()
    else:
        run_operators(products)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
