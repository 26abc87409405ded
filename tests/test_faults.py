"""All or nothing: an exception at every operation of a call, and an interrupt at every line of the package.

Afterwards parameters, optimizer state, modes, random state and `torch.nn.Module` itself are what they were.
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exhaustive import mostly
from networks import make_batch, make_mlp
from teleports import make_teleporter, teleport_mlp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import symtele_cuda as st

PACKAGE = os.path.dirname(st.__file__)


class Traced(nn.Module):
    """A model that torch.fx has to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@dataclass
class World:
    """A model, what trains it, and a call that is to be all or nothing."""

    model: nn.Module
    call: Callable[[], Any]
    optimizer: torch.optim.Optimizer | None = None
    teleporter: st.Teleporter | None = None
    moves: bool = True  # whether the call changes the weights


SHORT = {"objective": "grad_norm", "steps": 1, "first_radius": 0.02, "min_gain": 0.0, "batch_size": 8}


class Weighted:
    """An objective of the user's, which takes the path with the weights formed."""

    maximise = True

    def value(self, loss_of: Callable[..., Tensor], parameters: list[Tensor]) -> Tensor:
        gradients = torch.autograd.grad(loss_of(parameters), parameters, create_graph=True)
        return sum(gradient.square().sum() for gradient in gradients[:2])


def in_loop(make_optimizer: Callable[[Any], torch.optim.Optimizer], **options: Any) -> World:
    """A teleporter on the call that has enough samples."""
    torch.manual_seed(0)
    model = Traced()
    optimizer = make_optimizer(model.parameters())
    x, y = (t.float() if t.is_floating_point() else t for t in make_batch(34, 12, 4))
    teleporter = make_teleporter(model, optimizer, holdout_size=16, **{**SHORT, **options})
    for part in (slice(0, 8), slice(8, 16)):  # gathered, and an optimizer with state
        teleporter.step((x[part], y[part]), epoch=0)
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    return World(model, lambda: teleporter.step((x[16:], y[16:]), epoch=0), optimizer, teleporter)


def alone(**options: Any) -> World:
    torch.manual_seed(0)
    model = make_mlp([12, 16, 4], "tanh").float()
    x, y = (t.float() if t.is_floating_point() else t for t in make_batch(24, 12, 4))
    weighted = options.pop("weighted", False)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        noise = 0 * torch.rand(())  # draws from the global random state
        return F.cross_entropy(outputs, targets) + noise + (1e-3 * model[0].weight.square().sum() if weighted else 0)

    def call() -> st.TeleportReport:
        return teleport_mlp(model, (x[:8], y[:8]), loss_fn, holdout=(x[8:], y[8:]), steps=1, **options)

    return World(model, call)


def published() -> World:
    torch.manual_seed(0)
    model = make_mlp([12, 16, 4], "tanh").float()
    x, y = (t.float() if t.is_floating_point() else t for t in make_batch(8, 12, 4))
    return World(model, lambda: st.teleport_mlp(model, (x, y), method=st.Published(1e-3, steps=1)))


def exact() -> World:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), block)
    x, y = (t.float() if t.is_floating_point() else t for t in make_batch(24, 12, 4))
    sites = st.find_sites(model)
    return World(model, lambda: st.teleport(model, (x, y), sites=sites, method=st.Ascent(steps=1)))


def choosing() -> World:
    model = make_mlp([12, 16, 14, 4]).float()
    return World(model, lambda: st.matched_samples(model, make_batch(24, 12, 4)[0].float()), moves=False)


WORLDS: dict[str, Callable[[], World]] = {
    "alone": alone,
    "weight terms": lambda: alone(weighted=True),
    "user's objective": lambda: alone(objective=Weighted()),
    "reset": lambda: in_loop(torch.optim.Adam, optimizer_state="reset"),
    "published": published,
    "exact": exact,
    "several samples to choose from": lambda: in_loop(lambda p: torch.optim.SGD(p, lr=0.1), batch_size="auto"),
    "matched_samples": choosing,
}


# Every PARTS-th operation or line, from the first, the second and so on.
PARTS = 5
every_part = pytest.mark.parametrize("part", mostly(range(PARTS), lambda part: part == 0))


def picture(world: World) -> dict[str, Any]:
    """Everything that a failed call must leave as it was."""
    state = None if world.optimizer is None else copy.deepcopy(world.optimizer.state_dict())
    return {
        "parameters": [p.detach().clone() for p in world.model.parameters()],
        "objects": [id(p) for m in world.model.modules() for p in m._parameters.values()],
        "trainable": [p.requires_grad for p in world.model.parameters()],
        "optimizer": state,
        "teleporter": None if world.teleporter is None else world.teleporter.state_dict(),
        "training": [m.training for m in world.model.modules()],
        "grad mode": torch.is_grad_enabled(),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "random state": torch.get_rng_state(),
        "module": (nn.Module.__call__, nn.Module.__getattr__),
        "tracing": torch.fx._symbolic_trace.is_fx_symbolic_tracing(),
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return [*left] == [*right] and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def assert_unchanged(before: dict[str, Any], world: World, where: str) -> None:
    after = picture(world)
    changed = [name for name in before if not same(before[name], after[name])]
    assert not changed, f"{where}: {changed} changed"


class FailsAt(TorchDispatchMode):
    """Raises at the k-th operation; counts them all."""

    def __init__(self, k: int | None = None) -> None:
        super().__init__()
        self.k, self.count = k, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.k:
            raise MemoryError(f"operation {self.k}")
        return func(*args, **(kwargs or {}))


@every_part
@pytest.mark.parametrize("name", WORLDS)
def test_an_exception_at_any_operation_leaves_everything_as_it_was(name: str, part: int) -> None:
    WORLDS[name]().call()  # what is done once in a process is done
    world = WORLDS[name]()
    before = picture(world)
    with FailsAt() as counting:
        world.call()
    assert counting.count > 50 and world.moves != same(before["parameters"], picture(world)["parameters"])
    world = WORLDS[name]()
    before = picture(world)
    for k in range(1 + part, counting.count + 1, PARTS):
        with pytest.raises(MemoryError), FailsAt(k):
            world.call()
        assert_unchanged(before, world, f"operation {k}")


Place = tuple[CodeType, int]


def places_of(call: Callable[[], Any]) -> dict[Place, None]:
    """The lines of the package that a call runs through, in order."""
    found: dict[Place, None] = {}

    def note(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            found.setdefault((frame.f_code, frame.f_lineno))
        return note

    trace(call, note)
    return found


def interrupt_at(call: Callable[[], Any], place: Place) -> None:
    """The call, with a KeyboardInterrupt the first time that it comes to that line."""

    def strike(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and (frame.f_code, frame.f_lineno) == place:
            sys.settrace(None)
            raise KeyboardInterrupt
        return strike

    trace(call, strike)


def trace(call: Callable[[], Any], local: Callable[[FrameType, str, Any], Any]) -> None:
    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    own = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(own)


@every_part
@pytest.mark.parametrize("name", WORLDS)
def test_an_interrupt_at_any_line_leaves_everything_as_it_was(name: str, part: int) -> None:
    WORLDS[name]().call()  # what is done once in a process is done
    places = places_of(WORLDS[name]().call)
    assert len(places) > 100
    world = WORLDS[name]()
    before = picture(world)
    for code, line in itertools.islice(places, part, None, PARTS):
        with pytest.raises(KeyboardInterrupt):
            interrupt_at(world.call, (code, line))
        assert_unchanged(before, world, f"{os.path.basename(code.co_filename)}:{line}")
