"""What kernels a program launches on a GPU and how long they are taken to last: the ground of `bench.predict`.

A launch is taken to last

    max(latency of its kernels + chain, bytes / bandwidth, operations / (rate of its route · share of the device))

and the launches to follow each other; the chain is the time of steps that wait for one another inside a kernel, which
only inverses and factorizations have. That leaves out everything else: caches that hold operands from one launch to the
next (which would make small shapes faster), the ends of waves, and all that a kernel does below its rate. The constants
are rounded figures for such devices, not measurements of these kernels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from symtele_cuda.kernels import graphs

# --- what is assumed of the devices ----------------------------------------------------------------------------------

# Seconds from one launch to the next: the processor's work for an operator of torch, that for each further kernel of
# the same operator, which only has to be launched, and that of a captured graph.
EAGER_LAUNCH = 6e-6
FURTHER_LAUNCH = 2.5e-6
GRAPH_LAUNCH = 2e-6

# The route of a singular value decomposition.
SVD = "singular value decomposition"

# Operations a second by route (a multiplication and an addition are two), where all multiprocessors are busy.
RATES = {
    "fused float32": 60e12,  # FFMA on the ordinary cores
    "fused float64": 30e12,  # DFMA there
    "tensor": 110e12,  # float32 as three TF32 products, on the instructions of compute capability 8.0
    "library float32": 60e12,
    "library float64": 60e12,  # on the tensor cores
    "library tf32": 400e12,
    "solver": 20e12,  # Cholesky factorizations and triangular solves in float64
    "elementwise": math.inf,  # bytes alone decide
    SVD: math.inf,  # nothing is assumed of its time: one launch
}

# Of one pivot of a factorization by the library, about 230 cycles from one barrier to the next; and of one that
# `invert_grams` sweeps, two of which take about 350.
PIVOT_SECONDS, SWEEP_SECONDS = 1.3e-7, 1e-7

MULTIPROCESSORS = 132  # of both devices


@dataclass(frozen=True)
class Device:
    """Bytes a second are those of a large copy, reads and writes together."""

    name: str
    bytes_per_second: float


DEVICES = {device.name: device for device in (Device("H200", 4.3e12), Device("H100", 2.9e12))}

# --- a launch and its cost -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Kernels launched one after the other by one operator, `kernels` of them, and their bytes and operations in all.

    `tiles` are the blocks that work side by side on the operations, None where they fill every device. `chain` are the
    seconds of what cannot go side by side at all. `further`: the operator has launched others before them. `captured`:
    from the second call on they are launched by a graph.
    """

    operator: str
    route: str
    bytes_read: int
    bytes_written: int
    operations: int = 0
    tiles: int | None = None
    kernels: int = 1
    chain: float = 0.0
    further: bool = False
    captured: bool = False

    def limits(self, device: Device, latency: float) -> dict[str, float]:
        """The least seconds that it takes for each reason."""
        share = 1.0 if self.tiles is None else min(1.0, self.tiles / MULTIPROCESSORS)
        further = min(latency, FURTHER_LAUNCH)
        return {
            "launches": (further if self.further else latency) + (self.kernels - 1) * further + self.chain,
            "bytes": (self.bytes_read + self.bytes_written) / device.bytes_per_second,
            "operations": self.operations / (RATES[self.route] * share),
        }

    def seconds(self, device: Device, latency: float) -> float:
        return max(self.limits(device, latency).values())

    def bound(self, device: Device) -> str:
        """The reason that decides in a captured graph."""
        limits = self.limits(device, GRAPH_LAUNCH)
        return max(limits, key=lambda reason: limits[reason])


# --- what an operator launches ---------------------------------------------------------------------------------------

# As in csrc: the tiles of the Gram matrix's kernel and the pivot blocks of its inverse's, the multiply-adds up to which
# a product is fused, and the tiles of products, the first that fill the device.
GRAM_TILE, PIVOT_BLOCK = 16, 32
MOST_FUSED = {torch.float32: 2**27, torch.float64: 2**26}
PRODUCTS = ("linear", "linear_activation", "inverse_activation", "over_slope", "times_slope")
FUSED_TILES, TENSOR_TILES = (64, 32, 16), (128, 64)
ENOUGH_TILES = 96

# Of the library: the tiles of its products, and the panels of its factorizations, which follow each other.
LIBRARY_TILES, PANEL = (128, 64, 32), 64


def bytes_of(values: Any) -> int:
    """Of all tensors among the (nested) values."""
    return sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def count_tiles(sides: Sequence[int], *shapes: tuple[int, int]) -> int:
    """How many tiles cover matrices of these shapes: the largest of which there are enough, or else the smallest."""
    counts = [sum(math.ceil(rows / side) * math.ceil(columns / side) for rows, columns in shapes) for side in sides]
    return next((count for count in counts if count >= ENOUGH_TILES), counts[-1])


def product_route(a: Tensor, columns: int, allow_tf32: bool) -> tuple[str, int]:
    """The route of a product and the tiles that work on it, as choose_route has it for aligned operands."""
    dtype = str(a.dtype).removeprefix("torch.")
    rows, inner = a.shape
    if rows * columns * inner <= MOST_FUSED[a.dtype]:
        return f"fused {dtype}", count_tiles(FUSED_TILES, (rows, columns))
    if a.dtype == torch.float32 and not allow_tf32 and columns % 4 == 0 and inner % 4 == 0:
        return "tensor", count_tiles(TENSOR_TILES, (rows, columns))
    precision = "tf32" if a.dtype == torch.float32 and allow_tf32 else dtype
    return f"library {precision}", count_tiles(LIBRARY_TILES, (rows, columns))


def launch_product(name: str, arguments: Sequence[Any], results: Any, allow_tf32: bool) -> list[Launch]:
    a, b = arguments[:2]
    (rows, inner), columns = a.shape, b.shape[1]
    route, tiles = product_route(a, columns, allow_tf32)
    operations = 2 * rows * columns * inner
    read, written = bytes_of(arguments), bytes_of(results)
    if not route.startswith("library") or (name == "linear" and len(arguments) < 5):
        return [Launch(name, route, read, written, operations, tiles)]
    product = a.itemsize * rows * columns
    return [
        Launch(name, route, bytes_of([a, b]), product, operations, tiles),
        Launch(f"{name}, its epilogue", "elementwise", read - bytes_of([a, b]) + product, written),
    ]


def launch_group(name: str, arguments: Sequence[Any], results: Sequence[Tensor], allow_tf32: bool) -> list[Launch]:
    """One launch for all products that are fused, and those of the others."""
    remaining, fused, shapes, others = iter(results), list[Launch](), list[tuple[int, int]](), list[Launch]()
    for a, b, source, row, mask in zip(*arguments[:5], strict=True):
        outcome = [next(remaining) for _ in range(1 if mask is None else 2)]
        plain = row is None and mask is None
        operands = (a, b, source) if plain else (a, b, source, row, mask)
        launches = launch_product("linear" if plain else name, operands, outcome, allow_tf32)
        if launches[0].route.startswith("fused"):
            fused += launches
            shapes.append((a.shape[0], b.shape[1]))
        else:
            others += launches
    if not fused:
        return others
    together = Launch(
        name,
        fused[0].route,
        bytes_read=sum(one.bytes_read for one in fused),
        bytes_written=sum(one.bytes_written for one in fused),
        operations=sum(one.operations for one in fused),
        tiles=count_tiles(FUSED_TILES, *shapes),
    )
    return [together, *others]


def launch_grams(name: str, arguments: Sequence[Any], results: Any) -> list[Launch]:
    matrices, (exact, rounded) = arguments[0], results
    n, inner = len(matrices[0]), sum(matrix.shape[1] for matrix in matrices)
    if n <= graphs.LARGEST_OWN_FACTOR:  # half of the tiles, the others are mirrored
        edge = math.ceil(n / GRAM_TILE)
        tiles = len(matrices) * edge * (edge + 1) // 2
        return [Launch(name, "fused float64", bytes_of(matrices), bytes_of(results), n * (n + 1) * inner, tiles)]
    launches: list[Launch] = []
    for matrix, product, copy in itertools.zip_longest(matrices, exact, rounded):
        wide, size, operations = 8 * matrix.numel(), bytes_of(product), 2 * n * n * matrix.shape[1]
        launches += [
            Launch(f"{name}, its copies", "elementwise", bytes_of(matrix) + size, wide + bytes_of([copy]), kernels=2),
            Launch(name, "library float64", wide, size, operations, count_tiles(LIBRARY_TILES, (n, n))),
        ]
    return launches


def launch_inverse(name: str, arguments: Sequence[Any], results: Any) -> list[Launch]:
    count, n = len(arguments[0]), len(arguments[0][0])
    read, written, rounded = bytes_of(arguments), bytes_of(results[:2]), bytes_of(results[2])
    if n <= graphs.LARGEST_OWN_FACTOR:  # each step reads and writes all of the matrices
        steps, tiles = math.ceil(n / PIVOT_BLOCK), count_tiles((PIVOT_BLOCK,), *[(n, n)] * count)
        chain = n * SWEEP_SECONDS
        moved = read * steps, written * steps + rounded
        return [Launch(name, "fused float64", *moved, 2 * n**3 * count, tiles, steps, chain)]
    panels, chain = 2 * count * math.ceil(n / PANEL), count * n * PIVOT_SECONDS
    solved, operations, tiles = (n**3 // 3 + n**3) * count, 2 * n**3 * count, count_tiles(LIBRARY_TILES, (n, n))
    return [
        Launch(f"{name}, its factors", "solver", 2 * read, 2 * written, solved, None, panels, chain),
        Launch(name, "library float64", read, written, operations, tiles, count),
        *([Launch(f"{name}, its rounding", "elementwise", written, rounded, kernels=count)] if rounded else []),
    ]


def launch_pseudo_inverse(name: str, arguments: Sequence[Any], results: Tensor) -> list[Launch]:
    """A copy in float64, with the ones in another launch, the product and its rounding."""
    inverse, rows, bias = arguments
    wide = results.new_empty(results.shape, dtype=torch.float64)
    return [
        Launch(f"{name}, its copy", "elementwise", bytes_of(rows), bytes_of(wide), kernels=1 + bias),
        *launch_product("linear", (inverse, wide), wide, False),
        Launch(f"{name}, its rounding", "elementwise", bytes_of(wide), bytes_of(results)),
    ]


def launch_fused(name: str, arguments: Sequence[Any], results: Any, allow_tf32: bool) -> list[Launch]:
    """The launches of one of csrc's operators, which come from one call of torch's dispatcher."""
    first, *others = _launches_of(name, arguments, results, allow_tf32)
    return [first, *(replace(launch, further=True) for launch in others)]


def _launches_of(name: str, arguments: Sequence[Any], results: Any, allow_tf32: bool) -> list[Launch]:
    if name == "grams":
        return launch_grams(name, arguments, results)
    if name == "invert_grams":
        return launch_inverse(name, arguments, results)
    if name == "pseudo_inverse":
        return launch_pseudo_inverse(name, arguments, results)
    if name == "grouped_linear":
        return launch_group(name, arguments, results, allow_tf32)
    if name in PRODUCTS:
        return launch_product(name, arguments, results, allow_tf32)
    kernels_of_it = 2 if name in ("dot_sum", "squared_norms", "near_dependence") else 1
    return [Launch(name, "elementwise", bytes_of(arguments), bytes_of(results), kernels=kernels_of_it)]


# Of torch's solvers: operations in n³, n columns and right-hand sides, and whether the columns wait for one another.
# The inverse by a Cholesky factor is two solves.
SOLVERS = {
    "linalg_cholesky_ex": (1 / 3, True),
    "linalg_solve_triangular": (1.0, False),
    "cholesky_inverse": (2.0, False),
}


def launch_aten(function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any], results: Any) -> Launch | None:
    """The launch of one of torch's own operators, None for those that launch nothing."""
    schema = function._schema
    namespace, name = schema.name.split("::")
    views = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
    if namespace != "aten" or views or name.startswith(("empty", "new_empty", "detach", "lift")):
        return None
    read = bytes_of([arguments, [value for key, value in keywords.items() if key != "out"]])
    written = bytes_of(results)
    if written == 0:  # for results without elements nothing is launched
        return None
    dtype = next((str(leaf.dtype) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)), "")
    if name == "linalg_pinv":  # and what follows its decomposition
        return Launch(name, SVD, read, written)
    if ("linalg_" in name or "cholesky" in name) and name != "linalg_vector_norm":
        if name not in SOLVERS:
            raise NotImplementedError(f"nothing is known of how long {name} takes")
        n, (cubes, in_turn) = arguments[0].shape[-1], SOLVERS[name]
        operations, panels, chain = int(cubes * n**3), math.ceil(n / PANEL), n * PIVOT_SECONDS if in_turn else 0.0
        return Launch(name, "solver", read, written, operations, None, panels, chain)
    if function._overloadpacket in flop_registry:
        operations = flop_registry[function._overloadpacket](*arguments, **keywords, out_val=results)
        route = "library float64" if dtype == "torch.float64" else "library float32"
        tiles = count_tiles(LIBRARY_TILES, (results.shape[-2], results.shape[-1]))
        return Launch(name, route, read, written, operations, tiles)
    return Launch(name, "elementwise", read, written)
