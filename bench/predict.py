"""Predicted times on GPUs that were not there: counted launches, bytes and operations over assumed rates.

    python -m bench.predict [--shape NAME ...] [--device H200] [--tf32] [--out FILE]

Nothing is computed and nothing is timed. Each program runs once on tensors without data (fake tensors), and every
kernel that it would launch on a GPU is written down with the bytes that it reads and writes, each operand once, and its
floating-point operations. A launch is then taken to last

    max(launch latency + chain, bytes / bandwidth, operations / (rate of its route · share of the device it fills))

and the launches to follow each other; the chain is the time of steps that wait for one another inside a kernel, which
only the inverse has. That leaves out everything else: caches that hold operands from one launch to
the next (which would make small shapes faster), the ends of waves, and all that a kernel does below its rate. The
constants below are rounded figures for such devices, not measurements of these kernels.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
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

from bench.harness import RESULTS, UNIT, write_json
from symtele_cuda import graphs, kernels, ops
from symtele_cuda.activations import Activation, LeakyReLU, Softplus, Tanh
from symtele_cuda.device_search import run_program
from symtele_cuda.mlp import read_chain
from symtele_cuda.options import make_options
from symtele_cuda.planning import make_plan, match_inputs
from symtele_cuda.problem import Problem
from symtele_cuda.task import Task

# --- what is assumed of the devices ----------------------------------------------------------------------------------

# Seconds from one launch to the next: the processor's work for an operator of torch, and that of a captured graph.
EAGER_LAUNCH = 6e-6
GRAPH_LAUNCH = 2e-6

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
}

# Of one pivot of the inverse: about 230 cycles from one barrier to the next.
PIVOT_SECONDS = 1.3e-7

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
    seconds of what cannot go side by side at all. `captured`: from the second call on they are launched by a graph.
    """

    operator: str
    route: str
    bytes_read: int
    bytes_written: int
    operations: int = 0
    tiles: int | None = None
    kernels: int = 1
    chain: float = 0.0
    captured: bool = False

    def limits(self, device: Device, latency: float) -> dict[str, float]:
        """The least seconds that it takes for each reason."""
        share = 1.0 if self.tiles is None else min(1.0, self.tiles / MULTIPROCESSORS)
        return {
            "launches": latency * self.kernels + self.chain,
            "bytes": (self.bytes_read + self.bytes_written) / device.bytes_per_second,
            "operations": self.operations / (RATES[self.route] * share),
        }

    def seconds(self, device: Device, latency: float) -> float:
        return max(self.limits(device, latency).values())

    def bound(self, device: Device) -> str:
        """The reason that decides in a captured graph."""
        limits = self.limits(device, GRAPH_LAUNCH)
        return max(limits, key=lambda reason: limits[reason])


@dataclass(frozen=True)
class Prediction:
    """Of a program: seconds, with the parts that graphs hold launched by them; as if all were launched one by one, and
    as if all were captured; its totals, and where a graph's time goes."""

    seconds: float
    eager_seconds: float
    graph_seconds: float
    kernels: int
    waits: int  # for a value on the device; a program with any cannot be captured
    gigabytes: float
    gigaflops: float
    share_of_bound: dict[str, float]
    share_of_operator: dict[str, float]


def predict(launches: Sequence[Launch], waits: int, device: Device) -> Prediction:
    graph = sum(launch.seconds(device, GRAPH_LAUNCH) for launch in launches)

    def shares(key: Callable[[Launch], str]) -> dict[str, float]:
        parts: Counter[str] = Counter()
        for launch in launches:
            parts[key(launch)] += launch.seconds(device, GRAPH_LAUNCH) / graph  # type: ignore[assignment]
        return {name: round(share, 3) for name, share in parts.most_common()}

    return Prediction(
        seconds=sum(launch.seconds(device, GRAPH_LAUNCH if launch.captured else EAGER_LAUNCH) for launch in launches),
        eager_seconds=sum(launch.seconds(device, EAGER_LAUNCH) for launch in launches),
        graph_seconds=graph,
        kernels=sum(launch.kernels for launch in launches),
        waits=waits,
        gigabytes=sum(launch.bytes_read + launch.bytes_written for launch in launches) / 1e9,
        gigaflops=sum(launch.operations for launch in launches) / 1e9,
        share_of_bound=shares(lambda launch: launch.bound(device)),
        share_of_operator=shares(lambda launch: f"{launch.operator} ({launch.route})"),
    )


# --- what an operator launches ---------------------------------------------------------------------------------------

# As in csrc: the tiles of the Gram matrix's kernel and the pivot blocks of its inverse's, the multiply-adds up to which
# a product is fused, and the tiles of products, the first that fill the device.
GRAM_TILE, PIVOT_BLOCK = 16, 32
MOST_FUSED = {torch.float32: 2**27, torch.float64: 2**26}
PRODUCTS = ("linear", "linear_activation", "inverse_activation", "over_slope", "times_slope", "masked")
FUSED_TILES, TENSOR_TILES = (64, 32, 16), (128, 64)
ENOUGH_TILES = 96

# Of the library: the tiles of its products, and the panels of its factorizations, which follow each other.
LIBRARY_TILES, PANEL = (128, 64, 32), 64


def bytes_of(values: Any) -> int:
    """Of all tensors among the (nested) values."""
    return sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def count_tiles(rows: int, columns: int, sides: Sequence[int]) -> int:
    """How many tiles: the largest of which there are enough, or else the smallest."""
    counts = [math.ceil(rows / side) * math.ceil(columns / side) for side in sides]
    return next((count for count in counts if count >= ENOUGH_TILES), counts[-1])


def product_route(a: Tensor, columns: int, allow_tf32: bool) -> tuple[str, int]:
    """The route of a product and the tiles that work on it, as choose_route has it for aligned operands."""
    dtype = str(a.dtype).removeprefix("torch.")
    rows, inner = a.shape
    if rows * columns * inner <= MOST_FUSED[a.dtype]:
        return f"fused {dtype}", count_tiles(rows, columns, FUSED_TILES)
    if a.dtype == torch.float32 and not allow_tf32 and columns % 4 == 0 and inner % 4 == 0:
        return "tensor", count_tiles(rows, columns, TENSOR_TILES)
    precision = "tf32" if a.dtype == torch.float32 and allow_tf32 else dtype
    return f"library {precision}", count_tiles(rows, columns, LIBRARY_TILES)


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


def launch_gram(name: str, arguments: Sequence[Any], results: Any) -> list[Launch]:
    n, inner = arguments[0].shape
    read, written = bytes_of(arguments), bytes_of(results)
    if n <= graphs.LARGEST_OWN_FACTOR:  # half of the tiles, the others are mirrored
        edge = math.ceil(n / GRAM_TILE)
        return [Launch(name, "fused float64", read, written, n * (n + 1) * inner, edge * (edge + 1) // 2)]
    wide, exact = 8 * n * inner, 8 * n * n
    return [
        Launch(f"{name}, its copies", "elementwise", read + exact, wide + written - exact, kernels=2),
        Launch(name, "library float64", wide, exact, 2 * n * n * inner, count_tiles(n, n, LIBRARY_TILES)),
    ]


def launch_inverse(name: str, arguments: Sequence[Any], results: Any) -> list[Launch]:
    count, n = len(arguments[0]), len(arguments[0][0])
    read, written = bytes_of(arguments), bytes_of(results)
    if n <= graphs.LARGEST_OWN_FACTOR:  # each step reads and writes all of the matrices
        steps, tiles = math.ceil(n / PIVOT_BLOCK), count * count_tiles(n, n, (PIVOT_BLOCK,))
        chain = n * PIVOT_SECONDS
        return [Launch(name, "fused float64", read * steps, written * steps, 2 * n**3 * count, tiles, steps, chain)]
    panels = 2 * count * math.ceil(n / PANEL)
    operations, tiles = 2 * n**3 * count, count_tiles(n, n, LIBRARY_TILES)
    return [
        Launch(f"{name}, its factors", "solver", 2 * read, 2 * written, (n**3 // 3 + n**3) * count, None, panels),
        Launch(name, "library float64", read, written, operations, tiles, count),
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


def launch_remainder(name: str, arguments: Sequence[Any], results: Tensor, allow_tf32: bool) -> list[Launch]:
    """The vectors, and `rounds` products with g and its transpose each."""
    g, _, rounds = arguments
    products = launch_product("linear", (results, g, results), results, allow_tf32)
    return [Launch(name, "elementwise", 0, bytes_of(results)), *(2 * rounds * products)]


def launch_fused(name: str, arguments: Sequence[Any], results: Any, allow_tf32: bool) -> list[Launch]:
    """The launches of one of csrc's operators."""
    if name == "gram":
        return launch_gram(name, arguments, results)
    if name == "invert_grams":
        return launch_inverse(name, arguments, results)
    if name == "pseudo_inverse":
        return launch_pseudo_inverse(name, arguments, results)
    if name == "identity_remainder":
        return launch_remainder(name, arguments, results, allow_tf32)
    if name in PRODUCTS:
        return launch_product(name, arguments, results, allow_tf32)
    kernels_of_it = 2 if name in ("dot_sum", "squared_norms", "near_dependence") else 1
    return [Launch(name, "elementwise", bytes_of(arguments), bytes_of(results), kernels=kernels_of_it)]


SOLVERS = ("cholesky", "triangular", "linalg_inv", "linalg_lu")


def launch_aten(function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any], results: Any) -> Launch | None:
    """The launch of one of torch's own operators, None for those that launch nothing."""
    schema = function._schema
    namespace, name = schema.name.split("::")
    views = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
    if namespace != "aten" or views or name.startswith(("empty", "new_empty", "detach", "lift")):
        return None
    read = bytes_of([arguments, [value for key, value in keywords.items() if key != "out"]])
    written = bytes_of(results)
    dtype = next((str(leaf.dtype) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)), "")
    if any(word in name for word in SOLVERS):
        n = results[0].shape[-1] if isinstance(results, (list, tuple)) else results.shape[-1]
        return Launch(name, "solver", read, written, n**3 // 3, None, math.ceil(n / PANEL))
    if function._overloadpacket in flop_registry:
        operations = flop_registry[function._overloadpacket](*arguments, **keywords, out_val=results)
        route = "library float64" if dtype == "torch.float64" else "library float32"
        tiles = count_tiles(results.shape[-2], results.shape[-1], LIBRARY_TILES)
        return Launch(name, route, read, written, operations, tiles)
    return Launch(name, "elementwise", read, written)


class Recorder(TorchDispatchMode):
    """Writes down every launch under it: torch's own operators as they come, csrc's through `products`."""

    def __init__(self, allow_tf32: bool) -> None:
        super().__init__()
        self.allow_tf32 = allow_tf32
        self.launches: list[Launch] = []
        self.waits = 0

    def run(self, work: Any, program: Callable[[Any], Any]) -> tuple[Any, str]:
        """What `graphs.run` does from the second call on, its decisions on the size and kind of the work included."""
        tensors = work.tensors()
        if sum(tensor.numel() for tensor in tensors) > graphs.LARGEST_WORK or work.obstacle() is not None:
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
                results = fake(*args, **kwargs)
                self.launches.extend(launch_fused(name, (*args, *kwargs.values()), results, self.allow_tf32))
                return results

            return call

        return SimpleNamespace(**{name: recorded(name, fake) for name, fake in kernels.FAKES.items()})


@contextmanager
def recording(allow_tf32: bool = False) -> Iterator[Recorder]:
    """Inside, tensors have no data, and what is computed with them is written down instead."""
    recorder = Recorder(allow_tf32)
    compiled = patch.object(ops, "products_for", lambda device, backend: recorder.products)
    graphed = patch.object(graphs, "run", recorder.run)
    with compiled, graphed, torch.no_grad(), FakeTensorMode(), recorder:
        yield recorder


def call_kernel(operator: str, *arguments: Any) -> Any:
    """Run the kernel of one of our operators itself, where fake tensors would only ask it for shapes."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return getattr(torch.ops.symtele_cuda, operator).default.redispatch(keys, *arguments)


# --- the programs ----------------------------------------------------------------------------------------------------


# Where fake tensors are said to be. Without a GPU in torch itself, and for the set-up, whose gradient of the loss would
# want a real one, it is the CPU, so that a few decisions are those taken there.
WHERE = torch.device("cuda" if torch.version.cuda else "cpu")


@dataclass(frozen=True)
class LayerShape:
    """W' of one layer and, for a given ∂f/∂W', ∂f/∂g: what `bench.layer` times."""

    n: int
    d_in: int
    d_out: int
    activation: Activation

    def run(self, recorder: Recorder) -> Iterator[str]:
        sigma = self.activation.name, self.activation.parameter
        shapes = (self.d_out, self.d_in), (self.n, self.d_in), (self.d_out, self.d_out)
        layer = (*(torch.empty(shape, device=WHERE) for shape in shapes), None, *sigma, "least_change", "cuda")
        yield "forward and backward"
        new_weight, new_bias, *saved, _ = call_kernel("teleport_layer", *layer)
        changes = torch.empty_like(new_weight), torch.empty_like(new_bias)
        call_kernel("teleport_layer_backward", False, *changes, *saved, *layer)


@dataclass(frozen=True)
class TeleportShape:
    """A teleport of `STEPS` steps: its set-up, the program from the first state to the new weights, and the unit."""

    dims: tuple[int, ...]
    n: int
    activation: Activation
    objective: str

    def run(self, recorder: Recorder) -> Iterator[str]:
        model = self.make_model()
        chain = read_chain(model)
        batch = torch.empty(self.n, self.dims[0]), torch.empty(self.n, dtype=torch.int64)
        options = make_options(**OPTIONS, objective=self.objective, hidden_layers=len(self.dims) - 2)
        yield "set-up"
        problem = Problem.make(model, chain, batch, None, recorder.products)
        matches = tuple(match_inputs(problem))
        plan, _ = make_plan(problem, matches, None, action=options.action, inverse=options.inverse, group_steps=False)
        task = Task(problem, None, matches, plan, options)
        on_device = task.with_tensors([torch.empty_like(tensor, device=WHERE) for tensor in task.tensors()])
        yield "search and weights"
        graphs.run(on_device, run_program)
        yield UNIT
        with torch.enable_grad():
            functional.cross_entropy(model(batch[0]), batch[1]).backward()

    def make_model(self) -> nn.Sequential:
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(self.dims):
            layers += [nn.Linear(d_in, d_out, bias=False), self.make_activation()]
        return nn.Sequential(*layers[:-1])

    def make_activation(self) -> nn.Module:
        modules = {"leaky_relu": nn.LeakyReLU(0.1), "tanh": nn.Tanh(), "softplus": nn.Softplus()}
        return modules[self.activation.name]


STEPS = 10
OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "margin": 4.0,
    "steps": STEPS,
    "step_size": "auto",
    "first_radius": 0.02,
    "max_growth": math.inf,
    "action": "least_change",
    "metric": "euclidean",
    "inverse": "exact",
    "group": "gl",
    "layers": None,
    "drift_tol": 1e-4,
    "holdout_tol": 0.05,
    "min_gain": 0.0,
    "backend": "auto",
}
NETWORKS = [
    ((784, 512, 512, 10), 20),
    ((784, 512, 512, 10), 200),
    ((3072, 1024, 1024, 10), 512),
    ((4096, 4096, 4096, 1000), 1024),
    ((4096, 4096, 4096, 1000), 4096),
]
LEAKY = LeakyReLU(0.1)
ACTIVATIONS = (LEAKY, Tanh(), Softplus(1.0))

SHAPES: dict[str, LayerShape | TeleportShape] = {
    f"mlp-{'-'.join(map(str, dims))}-n{n}-{activation}": TeleportShape(dims, n, activation, "grad_norm")
    for dims, n in NETWORKS
    for activation in ACTIVATIONS
}
SHAPES |= {f"layer-n2048-16384-16384-{sigma}": LayerShape(2048, 16384, 16384, sigma) for sigma in ACTIVATIONS}
SHAPES |= {f"layer-n{d}-{d}-{d}": LayerShape(d, d, d, LEAKY) for d in (128, 256, 512, 1024, 2048, 4096, 8192)}


def measure(name: str, device: Device, allow_tf32: bool) -> dict[str, Prediction]:
    """A prediction for every part of the program."""
    parts: dict[str, tuple[int, int]] = {}
    with recording(allow_tf32) as recorder:
        for part in SHAPES[name].run(recorder):
            parts[part] = len(recorder.launches), recorder.waits
        ends = [*parts.values(), (len(recorder.launches), recorder.waits)][1:]
    return {
        part: predict(recorder.launches[first:last], waits - waits_before, device)
        for (part, (first, waits_before)), (last, waits) in zip(parts.items(), ends, strict=True)
    }


HEADER = (
    f"{'PREDICTED, not measured':<60}{'ms':>11}{'eager ms':>11}{'graph ms':>11}"
    f"{'kernels':>9}{'waits':>7}{'GB':>9}{'GFLOP':>11}"
)


def render(name: str, prediction: Prediction) -> str:
    bounds = ", ".join(f"{reason} {100 * share:.0f} %" for reason, share in prediction.share_of_bound.items())
    return (
        f"{name:<62}"
        f"{1e3 * prediction.seconds:11.3f}{1e3 * prediction.eager_seconds:11.3f}{1e3 * prediction.graph_seconds:11.3f}"
        f"{prediction.kernels:9d}{prediction.waits:7d}{prediction.gigabytes:9.2f}{prediction.gigaflops:11.1f}  {bounds}"
    )


def main(arguments: argparse.Namespace) -> None:
    device = DEVICES[arguments.device]
    predictions = {name: measure(name, device, arguments.tf32) for name in arguments.shape}
    print(f"{device.name}, float32{' with TF32 allowed' if arguments.tf32 else ''}")
    print(HEADER)
    for name, parts in predictions.items():
        for part, prediction in parts.items():
            print(render(f"{name}, {part}", prediction))
    document = {
        "benchmark": "prediction",
        "note": "every time is a PREDICTION from counted launches, bytes and operations; nothing was run on a GPU",
        "assumed": {
            "device": device,
            "multiprocessors": MULTIPROCESSORS,
            "seconds_per_launch": {"eager": EAGER_LAUNCH, "graph": GRAPH_LAUNCH},
            "seconds_per_pivot": PIVOT_SECONDS,
            "operations_per_second": RATES,
            "tf32_allowed": arguments.tf32,
            "tensors_said_to_be_on": WHERE.type,
        },
        "predicted": predictions,
    }
    write_json(arguments.out, document)


def make_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="NAME", help="which")
    parser.add_argument("--device", choices=list(DEVICES), default="H200", help="which device to predict for")
    parser.add_argument("--tf32", action="store_true", help="as if float32 products were allowed to use TF32")
    parser.add_argument("--out", type=Path, default=RESULTS / "prediction.json", help="the JSON to write")
    return parser


if __name__ == "__main__":
    main(make_arguments().parse_args())
