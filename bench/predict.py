"""Predicted times on an H200 that was not there: counted launches, bytes and operations over assumed rates.

    python -m bench.predict [--shape NAME ...] [--out FILE]

No result is computed and no time is measured. Each program runs once on tensors without data (fake tensors). Every
kernel that the program would launch on a GPU is written down with the bytes that it reads and writes, each operand
once, and with its floating-point operations. A launch is taken to last

    max(latency of its kernels + chain, bytes / bandwidth, operations / (rate of its route · share of the device))

and the launches to follow each other. The chain is the time of steps that wait for one another inside a kernel, as
those of an inverse do. The prediction leaves out everything else: caches that hold operands from one launch to the
next (which would make small shapes faster), the ends of waves, all that a kernel does below its rate, and what the
processor does besides launching. The constants are rounded figures for such a device, not measurements of kernels.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench import layer, teleport
from bench.harness import RESULTS, UNIT, plain, write_json
from symtele_cuda.activations import LeakyReLU
from symtele_cuda.kernels import graphs
from symtele_cuda.kernels.operands import OPERATORS
from symtele_cuda.model.problem import Problem
from symtele_cuda.model.reader import read_chain
from symtele_cuda.model.surroundings import Surroundings
from symtele_cuda.objectives import GradNorm
from symtele_cuda.operator import layer as operator_layer
from symtele_cuda.orbits.batch import BatchOrbit
from symtele_cuda.orbits.batch_plan import make_plan, match_inputs
from symtele_cuda.search.device import Climb, run_program
from symtele_cuda.settings import Ascent

# --- what is assumed of the device -----------------------------------------------------------------------------------

DEVICE, MULTIPROCESSORS = "H200", 132
BYTES_PER_SECOND = 4.3e12  # of a large copy, reads and writes together

# Seconds from one launch to the next: the processor's work for an operator of torch, that for each further kernel of
# the same operator, which only has to be launched, and that of a captured graph.
EAGER_LAUNCH, FURTHER_LAUNCH, GRAPH_LAUNCH = 6e-6, 2.5e-6, 2e-6

# Operations a second by route (a multiplication and an addition are two), where all multiprocessors are busy.
RATES = {
    "fused float32": 60e12,  # FFMA on the ordinary cores
    "fused float64": 30e12,  # DFMA there
    "tensor": 110e12,  # float32 as three TF32 products, on the instructions of compute capability 8.0
    "library float32": 60e12,
    "library float64": 60e12,  # on the tensor cores
    "solver": 20e12,  # Cholesky factorizations and triangular solves in float64
    "elementwise": math.inf,  # bytes alone decide
}

# One pivot of a factorization by the library takes about 230 cycles from one barrier to the next. One that
# `invert_grams` sweeps takes half of 350.
PIVOT_SECONDS, SWEEP_SECONDS = 1.3e-7, 1e-7

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

    def limits(self) -> dict[str, float]:
        """The least seconds that the launch takes, for each reason."""
        share = 1.0 if self.tiles is None else min(1.0, self.tiles / MULTIPROCESSORS)
        latency = GRAPH_LAUNCH if self.captured else EAGER_LAUNCH
        further = min(latency, FURTHER_LAUNCH)
        return {
            "launches": (further if self.further else latency) + (self.kernels - 1) * further + self.chain,
            "bytes": (self.bytes_read + self.bytes_written) / BYTES_PER_SECOND,
            "operations": self.operations / (RATES[self.route] * share),
        }

    def seconds(self) -> float:
        return max(self.limits().values())

    def bound(self) -> str:
        """The reason that decides."""
        limits = self.limits()
        return max(limits, key=lambda reason: limits[reason])


# --- what an operator launches ---------------------------------------------------------------------------------------

# As in csrc: the tiles of the Gram matrix's kernel and the pivot blocks of its inverse's, the multiply-adds up to which
# a product is fused, and the tiles of products, the first that fill the device.
GRAM_TILE, PIVOT_BLOCK = 16, 32
MOST_FUSED = {torch.float32: 2**27, torch.float64: 2**26}
PRODUCTS = ("linear", "linear_activation", "inverse_activation", "over_slope", "times_slope")
FUSED_TILES, TENSOR_TILES = (64, 32, 16), (128, 64)
ENOUGH_TILES = 96

# The tiles of the library's products, and the panels of its factorizations, which follow each other.
LIBRARY_TILES, PANEL = (128, 64, 32), 64


def bytes_of(values: Any) -> int:
    """The bytes of all tensors among the (nested) values."""
    return sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def count_tiles(sides: Sequence[int], *shapes: tuple[int, int]) -> int:
    """How many tiles cover matrices of these shapes: the largest of which there are enough, or else the smallest."""
    counts = [sum(math.ceil(rows / side) * math.ceil(columns / side) for rows, columns in shapes) for side in sides]
    return next((count for count in counts if count >= ENOUGH_TILES), counts[-1])


def product_route(a: Tensor, columns: int) -> tuple[str, int]:
    """The route of a product and the tiles that work on it, as choose_route has it for aligned operands."""
    dtype = str(a.dtype).removeprefix("torch.")
    rows, inner = a.shape
    if rows * columns * inner <= MOST_FUSED[a.dtype]:
        return f"fused {dtype}", count_tiles(FUSED_TILES, (rows, columns))
    if a.dtype == torch.float32 and columns % 4 == 0 and inner % 4 == 0:
        return "tensor", count_tiles(TENSOR_TILES, (rows, columns))
    return f"library {dtype}", count_tiles(LIBRARY_TILES, (rows, columns))


def launch_product(name: str, arguments: Sequence[Any], results: Any) -> list[Launch]:
    a, b = arguments[:2]
    (rows, inner), columns = a.shape, b.shape[1]
    route, tiles = product_route(a, columns)
    operations = 2 * rows * columns * inner
    read, written = bytes_of(arguments), bytes_of(results)
    if not route.startswith("library") or (name == "linear" and len(arguments) < 5):
        return [Launch(name, route, read, written, operations, tiles)]
    product = a.itemsize * rows * columns
    return [
        Launch(name, route, bytes_of([a, b]), product, operations, tiles),
        Launch(f"{name}, its epilogue", "elementwise", read - bytes_of([a, b]) + product, written),
    ]


def launch_group(name: str, arguments: Sequence[Any], results: Sequence[Tensor]) -> list[Launch]:
    """One launch for all products that are fused, and those of the others."""
    remaining, fused, shapes, others = iter(results), list[Launch](), list[tuple[int, int]](), list[Launch]()
    for a, b, source, row, mask in zip(*arguments[:5], strict=True):
        outcome = [next(remaining) for _ in range(1 if mask is None else 2)]
        plain = row is None and mask is None
        operands = (a, b, source) if plain else (a, b, source, row, mask)
        launches = launch_product("linear" if plain else name, operands, outcome)
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
        *launch_product("linear", (inverse, wide), wide),
        Launch(f"{name}, its rounding", "elementwise", bytes_of(wide), bytes_of(results)),
    ]


def launch_fused(name: str, arguments: Sequence[Any], results: Any) -> list[Launch]:
    """The launches of one of csrc's operators, which come from one call of torch's dispatcher."""
    first, *others = _launches_of(name, arguments, results)
    return [first, *(replace(launch, further=True) for launch in others)]


def _launches_of(name: str, arguments: Sequence[Any], results: Any) -> list[Launch]:
    if name == "grams":
        return launch_grams(name, arguments, results)
    if name == "invert_grams":
        return launch_inverse(name, arguments, results)
    if name == "pseudo_inverse":
        return launch_pseudo_inverse(name, arguments, results)
    if name == "grouped_linear":
        return launch_group(name, arguments, results)
    if name in PRODUCTS:
        return launch_product(name, arguments, results)
    kernels_of_it = 2 if name in ("dot_sum", "squared_norms", "near_dependence") else 1
    return [Launch(name, "elementwise", bytes_of(arguments), bytes_of(results), kernels=kernels_of_it)]


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
    if ("linalg_" in name or "cholesky" in name) and name != "linalg_vector_norm":
        raise NotImplementedError(f"nothing is known of how long {name} takes")
    if function._overloadpacket in flop_registry:
        operations = flop_registry[function._overloadpacket](*arguments, **keywords, out_val=results)
        dtype = str(results.dtype).removeprefix("torch.")
        tiles = count_tiles(LIBRARY_TILES, (results.shape[-2], results.shape[-1]))
        return Launch(name, f"library {dtype}", read, written, operations, tiles)
    return Launch(name, "elementwise", read, written)


class Recorder(TorchDispatchMode):
    """Writes down every launch under it: torch's own operators as they come, csrc's through `products`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.waits = 0
        self._paused = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside, nothing is written down."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def run(self, work: Any, program: Callable[[Any], Any], obstacle: str | None) -> tuple[Any, str]:
        """What `graphs.run` does from the second call on, its decisions on the size and kind of the work included."""
        tensors = graphs.tensors_of(work)
        if sum(tensor.numel() for tensor in tensors) > graphs.LARGEST_WORK or obstacle is not None:
            return program(work), ""
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        dtypes = len({tensor.dtype for tensor in tensors})
        self.launches.append(Launch("copy into the graph", "elementwise", moved, moved, kernels=dtypes))
        self.launches.append(Launch("replay of the graph", "elementwise", 0, 0))
        first = len(self.launches)
        outcome = program(work)
        self.launches[first:] = [replace(launch, captured=True) for launch in self.launches[first:]]
        return outcome, graphs.GRAPH

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._paused:
            return function(*args, **(kwargs or {}))
        if function is torch.ops.aten._local_scalar_dense.default:
            self.waits += 1
            return True if args[0].dtype == torch.bool else 0  # all is well, and counts of failures are nought
        results = function(*args, **(kwargs or {}))
        launch = launch_aten(function, args, kwargs or {}, results)
        if launch is not None:
            self.launches.append(launch)
        return results

    @property
    def products(self) -> Any:
        """csrc's operators, which know the shapes of their results and compute nothing."""

        def recorded(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                with self.pause():
                    results = fake(*args, **kwargs)
                self.launches.extend(launch_fused(name, (*args, *kwargs.values()), results))
                return results

            return call

        return SimpleNamespace(**{name: recorded(name, operator.fake) for name, operator in OPERATORS.items()})


@contextmanager
def recording() -> Iterator[Recorder]:
    """Inside, tensors have no data, and what is computed with them is written down instead."""
    recorder = Recorder()
    compiled = patch.object(operator_layer, "products_for", lambda device, backend: recorder.products)
    graphed = patch.object(graphs, "run", recorder.run)
    with compiled, graphed, torch.no_grad(), FakeTensorMode(), recorder:
        yield recorder


# --- the programs ----------------------------------------------------------------------------------------------------

# Where fake tensors are said to be. Without a GPU in torch itself, and for the set-up, whose gradient of the loss would
# want a real one, it is the CPU, so that a few decisions are those taken there.
WHERE = torch.device("cuda" if torch.version.cuda else "cpu")
SIGMA = LeakyReLU(0.1)
SETUP, SEARCH = "set-up", f"{teleport.STEPS} steps and the weights"
LONGER_SEARCH = f"{teleport.LONGER_STEPS} steps and the weights"


def call_kernel(operator: str, *arguments: Any) -> Any:
    """Run the kernel of one of our operators itself, where fake tensors would only ask it for shapes."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return getattr(torch.ops.symtele_cuda, operator).default.redispatch(keys, *arguments)


@dataclass(frozen=True)
class LayerShape:
    """W' of one layer and, for a given ∂f/∂W', ∂f/∂g: what `bench.layer` times."""

    n: int
    d_in: int
    d_out: int

    def run(self, recorder: Recorder) -> Iterator[str]:
        shapes = (self.d_out, self.d_in), (self.n, self.d_in), (self.d_out, self.d_out)
        arguments = (*(torch.empty(shape, device=WHERE) for shape in shapes), None, *SIGMA.sigma, "paper", "cuda")
        yield layer.OPERATOR
        new_weight, new_bias, *saved, _ = call_kernel("teleport_layer", True, *arguments)
        changes = torch.empty_like(new_weight), torch.empty_like(new_bias)
        call_kernel("teleport_layer_backward", False, *changes, *saved, *arguments)


@dataclass(frozen=True)
class TeleportShape:
    """A teleport: its set-up, the program from the first state to the new weights, of ten steps and of twenty, and a
    forward+backward pass."""

    dims: tuple[int, ...]
    n: int

    def run(self, recorder: Recorder) -> Iterator[str]:
        layers = [(nn.Linear(d_in, d_out, bias=False), nn.LeakyReLU(0.1)) for d_in, d_out in pairwise(self.dims)]
        model = nn.Sequential(*itertools.chain.from_iterable(layers))[:-1]
        chain = read_chain(model)
        x, y = torch.empty(self.n, self.dims[0]), torch.empty(self.n, dtype=torch.int64)
        yield SETUP
        problem = Problem.make(model, chain, (x, y), None, recorder.products)
        matches = tuple(match_inputs(problem))
        plans, _ = make_plan(problem, matches, None)
        orbit = BatchOrbit(problem, Surroundings.make(chain, None, problem), matches, plans, GradNorm())
        for part, steps in ((SEARCH, teleport.STEPS), (LONGER_SEARCH, teleport.LONGER_STEPS)):
            work = Climb.make(orbit, Ascent(steps=steps, max_growth=math.inf), teleport.UNBOUNDED)
            empty = (torch.empty_like(tensor, device=WHERE) for tensor in graphs.tensors_of(work))
            on_device = graphs.with_tensors(work, empty)
            yield part
            graphs.run(on_device, run_program, on_device.obstacle())
        with torch.enable_grad():
            yield UNIT
            functional.cross_entropy(model(x), y).backward()


NETWORKS = [
    ((784, 512, 512, 10), 20),
    ((784, 512, 512, 10), 200),
    ((3072, 1024, 1024, 10), 512),
    ((4096, 4096, 4096, 1000), 1024),
    ((4096, 4096, 4096, 1000), 4096),
]
SHAPES: dict[str, LayerShape | TeleportShape] = {
    f"mlp-{'-'.join(map(str, dims))}-n{n}": TeleportShape(dims, n) for dims, n in NETWORKS
}
SHAPES |= {f"layer-n{d}-{d}-{d}": LayerShape(d, d, d) for d in (128, 512, 1024, 2048, 4096, 8192)}
SHAPES |= {"layer-n2048-16384-16384": LayerShape(2048, 16384, 16384)}

# --- the predictions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What a program would take.

    waits: how often it waits for a value on the device; a program with any cannot be captured. bound_by_launches: the
    share of its time in launches whose own latency decides.
    """

    seconds: float
    kernels: int
    waits: int
    gigabytes: float
    gigaflops: float
    bound_by_launches: float


def predict(launches: Sequence[Launch], waits: int) -> Prediction:
    seconds = sum(launch.seconds() for launch in launches)
    return Prediction(
        seconds=seconds,
        kernels=sum(launch.kernels for launch in launches),
        waits=waits,
        gigabytes=sum(launch.bytes_read + launch.bytes_written for launch in launches) / 1e9,
        gigaflops=sum(launch.operations for launch in launches) / 1e9,
        bound_by_launches=sum(one.seconds() for one in launches if one.bound() == "launches") / seconds,
    )


def count(name: str) -> dict[str, Prediction]:
    """A prediction for every part of the program."""
    parts: dict[str, tuple[int, int]] = {}
    with recording() as recorder:
        for part in SHAPES[name].run(recorder):
            parts[part] = len(recorder.launches), recorder.waits
        ends = [*parts.values(), (len(recorder.launches), recorder.waits)][1:]
    return {
        part: predict(recorder.launches[first:last], waits - waits_before)
        for (part, (first, waits_before)), (last, waits) in zip(parts.items(), ends, strict=True)
    }


def render(predicted: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The predictions of a document as a table in Markdown."""
    lines = [
        "| shape | program | predicted | kernels | waits | GB | GFLOP | bound by launches |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for name, parts in predicted.items():
        for part, of in parts.items():
            size = f"{of['gigabytes']:.3f} | {of['gigaflops']:.1f} | {100 * of['bound_by_launches']:.0f} %"
            time = f"{1e3 * of['seconds']:.2f} ms | {of['kernels']} | {of['waits']}"
            lines.append(f"| `{name}` | {part} | {time} | {size} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="NAME", help="which")
    parser.add_argument("--out", type=Path, default=RESULTS / "prediction.json", help="the JSON to write")
    arguments = parser.parse_args(words)
    document = plain(
        {
            "benchmark": "prediction",
            "note": "every time is a PREDICTION from counted launches, bytes and operations; nothing was run on a GPU",
            "assumed": {
                "device": DEVICE,
                "multiprocessors": MULTIPROCESSORS,
                "bytes_per_second": BYTES_PER_SECOND,
                "seconds_per_launch": {"eager": EAGER_LAUNCH, "further": FURTHER_LAUNCH, "graph": GRAPH_LAUNCH},
                "seconds_per_pivot": {"library": PIVOT_SECONDS, "invert_grams": SWEEP_SECONDS},
                "operations_per_second": RATES,
                "tensors_said_to_be_on": WHERE.type,
            },
            "predicted": {name: count(name) for name in arguments.shape},
        }
    )
    print(f"PREDICTED for an {DEVICE}, float32, not measured:\n")
    print(render(document["predicted"]))
    write_json(arguments.out, document)


if __name__ == "__main__":
    main()
