"""Predicted times on GPUs that were not there: counted launches, bytes and operations over assumed rates.

    python -m bench.predict [--shape NAME ...] [--device H200] [--tf32] [--out FILE]

Nothing is computed and nothing is timed. Each program runs once on tensors without data (fake tensors), and every
kernel that it would launch on a GPU is written down with the bytes that it reads and writes, each operand once, and its
floating-point operations; `bench.launches` says how long each is taken to last. The opponents of `bench.layer` and
`bench.teleport` are predicted the same way, with what is unknown of them left out in their favour: the published
algorithm without the time of its singular value decompositions, and a compiled program as if only its products and
factorizations were left.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from bench import layer, teleport
from bench.baselines import published_teleport
from bench.harness import RESULTS, UNIT, write_json
from bench.launches import (
    DEVICES,
    EAGER_LAUNCH,
    FURTHER_LAUNCH,
    GRAPH_LAUNCH,
    MULTIPROCESSORS,
    PIVOT_SECONDS,
    RATES,
    SVD,
    SWEEP_SECONDS,
    Device,
    Launch,
    launch_aten,
    launch_fused,
)
from symtele_cuda.activations import Activation, LeakyReLU, Softplus, Tanh
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

# --- a prediction ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """Of a program: seconds, with the parts that graphs hold launched by them; as if all were launched one by one, as
    if all were captured, and of the products and factorizations alone, one by one; its totals, and where a graph's time
    goes."""

    seconds: float
    eager_seconds: float
    graph_seconds: float
    product_seconds: float
    kernels: int
    waits: int  # for a value on the device; a program with any cannot be captured
    decompositions: int  # by singular values, of whose time nothing is assumed
    gigabytes: float
    gigaflops: float
    share_of_bound: dict[str, float]
    share_of_operator: dict[str, float]


def predict(launches: Sequence[Launch], waits: int, device: Device) -> Prediction:
    graph = sum(launch.seconds(device, GRAPH_LAUNCH) for launch in launches)
    products = [launch for launch in launches if launch.route != "elementwise"]

    def shares(key: Callable[[Launch], str]) -> dict[str, float]:
        parts: Counter[str] = Counter()
        for launch in launches:
            parts[key(launch)] += launch.seconds(device, GRAPH_LAUNCH) / graph  # type: ignore[assignment]
        return {name: round(share, 3) for name, share in parts.most_common()}

    return Prediction(
        seconds=sum(launch.seconds(device, GRAPH_LAUNCH if launch.captured else EAGER_LAUNCH) for launch in launches),
        eager_seconds=sum(launch.seconds(device, EAGER_LAUNCH) for launch in launches),
        graph_seconds=graph,
        product_seconds=sum(launch.seconds(device, EAGER_LAUNCH) for launch in products),
        kernels=sum(launch.kernels for launch in launches),
        waits=waits,
        decompositions=sum(launch.route == SVD for launch in launches),
        gigabytes=sum(launch.bytes_read + launch.bytes_written for launch in launches) / 1e9,
        gigaflops=sum(launch.operations for launch in launches) / 1e9,
        share_of_bound=shares(lambda launch: launch.bound(device)),
        share_of_operator=shares(lambda launch: f"{launch.operator} ({launch.route})"),
    )


class Recorder(TorchDispatchMode):
    """Writes down every launch under it: torch's own operators as they come, csrc's through `products`."""

    def __init__(self, allow_tf32: bool) -> None:
        super().__init__()
        self.allow_tf32 = allow_tf32
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
                self.launches.extend(launch_fused(name, (*args, *kwargs.values()), results, self.allow_tf32))
                return results

            return call

        return SimpleNamespace(**{name: recorded(name, operator.fake) for name, operator in OPERATORS.items()})


@contextmanager
def recording(allow_tf32: bool = False) -> Iterator[Recorder]:
    """Inside, tensors have no data, and what is computed with them is written down instead."""
    recorder = Recorder(allow_tf32)
    compiled = patch.object(operator_layer, "products_for", lambda device, backend: recorder.products)
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
    """W' of one layer and, for a given ∂f/∂W', ∂f/∂g: what `bench.layer` times, and its opponents."""

    n: int
    d_in: int
    d_out: int
    activation: Activation

    def run(self, recorder: Recorder) -> Iterator[str]:
        sigma = self.activation.sigma
        weight, inputs, square = (self.d_out, self.d_in), (self.n, self.d_in), (self.d_out, self.d_out)
        tensors = (torch.empty(shape, device=WHERE) for shape in (weight, inputs, square))
        arguments = (*tensors, None, *sigma, "paper", "cuda")
        yield layer.OPERATOR
        new_weight, new_bias, *saved, _ = call_kernel("teleport_layer", True, *arguments)
        changes = torch.empty_like(new_weight), torch.empty_like(new_bias)
        call_kernel("teleport_layer_backward", False, *changes, *saved, *arguments)
        with torch.enable_grad():
            w, h, t, v = (torch.empty(shape) for shape in (weight, inputs, square, weight))
            problem = layer.Problem(w, h, t, v, self.activation)
            yield layer.EAGER
            layer.by_cholesky(problem)
            if max(self.n, self.d_in, self.d_out) <= layer.LARGEST_SMALL:
                yield layer.TWIN
                layer.by_reference(problem)


@dataclass(frozen=True)
class TeleportShape:
    """A teleport: its set-up, the program from the first state to the new weights, of ten steps and of twenty, the unit
    and, where it is an opponent, the published algorithm."""

    dims: tuple[int, ...]
    n: int
    activation: Activation
    objective: str

    def run(self, recorder: Recorder) -> Iterator[str]:
        model = self.make_model()
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
            if self.n <= layer.LARGEST_SVD:
                weights = list(model.parameters())
                yield teleport.PUBLISHED
                published_teleport(weights, x, y, functional.cross_entropy, self.activation, teleport.STEPS, 1.0, True)

    def make_model(self) -> nn.Sequential:
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(self.dims):
            layers += [nn.Linear(d_in, d_out, bias=False), self.make_activation()]
        return nn.Sequential(*layers[:-1])

    def make_activation(self) -> nn.Module:
        modules = {"leaky_relu": nn.LeakyReLU(0.1), "tanh": nn.Tanh(), "softplus": nn.Softplus()}
        return modules[self.activation.name]


SETUP, SEARCH, LONGER_SEARCH = "set-up", "search and weights", "search and weights of twenty steps"
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
            "seconds_per_launch": {"eager": EAGER_LAUNCH, "further": FURTHER_LAUNCH, "graph": GRAPH_LAUNCH},
            "seconds_per_pivot": {"library": PIVOT_SECONDS, "invert_grams": SWEEP_SECONDS},
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
