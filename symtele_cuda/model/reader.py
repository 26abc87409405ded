"""Read a torch module as a chain  x ↦ o(Z_M),  Z_k = H_{k−1} W_kᵀ + b_k,  H_k = σ_k(Z_k),  H_0 = i(x).

i is made of constants and flattening, o of constants, activations, squeeze(-1) and log_softmax (`pieces`). Constants
between two Linears are part of the activation there: σ_k(z) = a σ(αz + β) + c.

Teleportation is defined for such chains only, so everything that would make the module's function differ from the
chain that its Linear layers and activations spell out (hooks, parametrizations, active dropout, branches, overridden
forwards) is refused with an error that says where it is, what was expected and what came.
"""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .. import activations
from ..activations import Activation, Identity, scaled
from ..spelling import Spelling
from . import pieces
from .asserts import AssertingTracer, nodes_of_checks
from .chain import Chain
from .hints import hint
from .pieces import Affine, Flatten, InTurn, LogSoftmax, Piece, Squeeze


def read_chain(model: nn.Module) -> Chain:
    """The chain of Linear layers and elementwise activations that `model` computes.

    nn.Sequential is walked directly; other modules are traced symbolically (torch.fx), which follows calls of
    submodules, the functional forms of the supported activations and of dropout, and flattening by `flatten(1)`,
    `view(x.size(0), -1)` or `reshape`. Optional further arguments of a forward have their defaults, as in model(x).
    Numbers and tensors without gradient may be added, subtracted, multiplied and divided by. Their values, and the
    slope of a PReLU, are those of now. An `assert` is taken to hold. Deterministic.

    A traced forward runs once, on a symbolic input and in a stand-in with the module's attributes and copies of its
    lists and dicts: what it keeps there does not reach the model. Other side effects (printing, counting in a buffer)
    it has as in any forward pass.

    Raises TypeError if `model` is no module, ValueError if it is no such chain or has no hidden layer; the message
    names the part of the model to pass instead, if there is one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    try:
        return _read(model)
    except ValueError as error:
        if not (advice := hint(model, _is_chain)):
            raise
        raise ValueError(f"{error}. {advice}") from error


def _read(model: nn.Module) -> Chain:
    return _assemble(_steps_of_module(model, ""))


def _is_chain(module: nn.Module) -> bool:
    try:
        _read(module)
    except ValueError:
        return False
    return True


# --- steps: what a module does, one after the other -------------------------------------------------------------


_Content = nn.Linear | Activation | Affine | Flatten | Squeeze | LogSoftmax
_Step = tuple[str, _Content]  # with the name of the place in the model that it comes from


def _assemble(steps: list[_Step]) -> Chain:
    """The chain that `steps` spell out, if they do."""
    places = [place for place, (_, step) in enumerate(steps) if isinstance(step, nn.Linear)]
    if len(places) < 2:
        raise ValueError(
            "model must have at least two Linear layers (without a hidden layer there is nothing to teleport), "
            f"got {len(places)}"
        )
    names = tuple(steps[place][0] for place in places)
    linears = tuple(step for _, step in steps if isinstance(step, nn.Linear))
    inputs = _read_inputs(steps[: places[0]], names[0], linears[0])
    *hidden, output = (
        steps[place + 1 : following] for place, following in zip(places, [*places[1:], len(steps)], strict=True)
    )
    between = tuple(_read_hidden(*behind) for behind in zip(hidden, names, linears, strict=False))
    for (name, linear), (following, behind) in itertools.pairwise(zip(names, linears, strict=True)):
        _check_width(following, behind.weight.shape[1], name, linear.weight.shape[0])
    return Chain(linears, between, _read_output(output, names[-1], linears[-1]), names, inputs)


def _read_inputs(steps: list[_Step], name: str, linear: nn.Linear) -> tuple[Affine | Flatten, ...]:
    """What happens before the first Linear, called `name`."""
    found: list[Affine | Flatten] = []
    for where, step in steps:
        if not isinstance(step, (Affine, Flatten)):
            raise _no_chain(where, "a Linear before the first activation", str(step))
        if isinstance(step, Flatten):
            _check_flatten(where, step, name, linear.weight.shape[1])
        found.append(step)
    return tuple(found)


def _read_hidden(steps: list[_Step], name: str, linear: nn.Linear) -> Activation:
    """The activation a σ(αz + β) + c that `steps` between two Linears are, the first of them called `name`."""
    base: Activation | None = None
    before, behind = Affine(), Affine()  # σ
    for where, step in steps:
        if isinstance(step, Flatten):
            _check_flatten(where, step, name, linear.weight.shape[0])
        elif isinstance(step, Affine):
            if step.tensors:
                shape = tuple(step.tensors[0].shape)
                raise _no_chain(where, "one number for all units between two Linears", f"a tensor of shape {shape}")
            if base is None:
                before = _then(before, step)
            else:
                behind = _then(behind, step)
        elif not isinstance(step, Activation):
            raise _no_chain(where, f"an activation or a constant behind {name!r}", f"{step}, which may be at the end")
        elif base is not None:
            raise _no_chain(where, f"at most one activation behind {name!r}", f"a second one, {step}")
        else:
            base = step
    if base is None:
        base, before, behind = Identity(), Affine(), before
    numbers = [float(one) for one in (before.factor, before.offset, behind.factor, behind.offset)]
    try:
        return scaled(base, *numbers)
    except ValueError as error:
        raise _no_chain(steps[-1][0], f"constants behind {name!r} that leave an inverse", str(error)) from error


def _then(first: Affine, second: Affine) -> Affine:
    """Two maps by numbers, one after the other."""
    return Affine(second.factor * first.factor, second.factor * first.offset + second.offset)


def _read_output(steps: list[_Step], name: str, linear: nn.Linear) -> Piece:
    """What happens behind the last Linear, called `name`."""
    found: list[Piece] = []
    width = linear.weight.shape[0]
    shape: tuple[int, ...] = (width,)  # of one output
    for where, step in steps:
        if isinstance(step, Flatten) and shape:
            _check_flatten(where, step, name, width)
        elif isinstance(step, Squeeze) and shape and (width == 1 or not step.always):
            found += [step] if width == 1 else []
            shape = () if width == 1 else shape
        elif _is_at_home(step, shape):
            found.append(step)
        else:
            raise _no_chain(where, f"what outputs of shape ({', '.join(['n', *map(str, shape)])}) allow", str(step))
    return found[0] if len(found) == 1 else InTurn(tuple(found)) if found else Identity()


def _is_at_home(step: _Content, shape: tuple[int, ...]) -> TypeGuard[Activation | LogSoftmax | Affine]:
    """Whether `step` can work on outputs of this shape each and keep it."""
    if isinstance(step, Affine):
        return step.fits(shape)
    return isinstance(step, Activation) or (isinstance(step, LogSoftmax) and shape != ())


def _check_flatten(where: str, flatten: Flatten, neighbour: str, expected: int) -> None:
    if flatten.width is not None:
        _check_width(where, flatten.width, neighbour, expected)


def _check_width(where: str, width: int, neighbour: str, expected: int) -> None:
    if width != expected:
        raise _no_chain(where, f"{expected} features, as {neighbour!r} has there", str(width))


def _no_chain(where: str, expected: str, got: str) -> ValueError:
    return ValueError(
        "model must be a chain of Linear layers and elementwise activations: "
        f"at {where or 'model'!r} expected {expected}, got {got}"
    )


def _steps_of_module(module: nn.Module, where: str) -> list[_Step]:
    """What one module does: a Sequential its children's steps, a Linear or activation one, a traced module many."""
    _check_unaltered(module, where)
    forward = getattr(type(module), "forward", None)
    if forward is nn.Sequential.forward:
        # Not named_children(), which leaves out a module that occurs for the second time.
        children = ((f"{where}.{name}" if where else name, child) for name, child in module._modules.items())
        return [step for name, child in children if child is not None for step in _steps_of_module(child, name)]
    if isinstance(module, nn.Linear):
        return [(where, _check_plain_linear(module, where))]
    for spelling in _spellings():
        if spelling.spells(module):
            return [(where, step) for step in _steps_of_call(functools.partial(spelling.read_module, module), where)]
    if _is_torch_function(forward):
        raise _no_chain(where, _supported(), type(module).__name__)
    return _steps_of_traced(module, where)


def _is_torch_function(function: object) -> bool:
    return (getattr(function, "__module__", None) or "").split(".")[0] == "torch"


def _check_unaltered(module: nn.Module, where: str) -> None:
    """Raise if something attached to the module changes the function that its class computes."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise _no_chain(
            where, "initialized parameters", f"a lazy {type(module).__name__}: run one batch through it first"
        )
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        raise _no_chain(where, "plain parameters", f"parametrized {names}")
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if hooks:
        names = ", ".join(getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks)
        raise _no_chain(where, "no forward hooks, as they may change the function", f"hooks {names}")
    if "forward" in vars(module):
        raise _no_chain(
            where, f"the forward of its class {type(module).__name__}", "one set on the instance, as torch.compile does"
        )


def _check_plain_linear(linear: nn.Linear, where: str) -> nn.Linear:
    if type(linear).forward is not nn.Linear.forward:
        raise _no_chain(where, "a plain torch.nn.Linear", f"{type(linear).__name__}, which has a forward of its own")
    if "weight" not in linear._parameters:  # pruned, or normalized the old way
        raise _no_chain(where, "a Linear whose weight is a parameter", f"parameters {[*linear._parameters]}")
    if not {*linear._parameters} <= {"weight", "bias"}:
        raise _no_chain(where, "a Linear with weight and bias alone", f"parameters {[*linear._parameters]}")
    return linear


# --- steps of a module with a forward of its own ------------------------------------------------------------------


class _Tracer(AssertingTracer):
    """Records the calls that one forward makes of one input; submodules are read by themselves, so none is entered."""

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: object = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _steps_of_traced(module: nn.Module, where: str) -> list[_Step]:
    """The steps of the calls in module's forward, each of which has to work on the result of the one before."""
    steps: list[_Step] = []
    known: dict[fx.Node, Any] = {}  # the nodes that are no value of the chain: parts of its shape, and constants
    current: fx.Node | None = None
    twin = _stand_in(module)
    graph = _trace(twin, where)
    checks = nodes_of_checks(graph)
    for node in graph.nodes:
        place = f"{where}.{node.name}" if where else node.name
        if node in checks:
            continue
        if node.op == "placeholder":
            current = node
        elif node.op == "get_attr":
            known[node] = operator.attrgetter(str(node.target))(twin)
        elif (part := _part_of_shape(node, known)) is not None:
            known[node] = part
        elif [source for source in node.all_input_nodes if source not in known] != [current]:
            sources = ", ".join(source.name for source in node.all_input_nodes) or "nothing"
            raise _no_chain(place, f"a call on the result of the one before, {current}", f"one on {sources}")
        elif node.op == "output":
            if node.args[0] is not current:
                raise _no_chain(place, "one tensor", f"{node.args[0]}")
        else:
            steps += _steps_of_node(module, node, where, place, known)
            current = node
    return steps


def _trace(module: nn.Module, where: str) -> fx.Graph:
    try:
        return _Tracer().trace(module)
    except Exception as error:  # whatever a forward raises on symbolic values
        raise _no_chain(
            where,
            "a forward of one tensor that torch.fx can trace",
            f"{type(module).__name__}, {type(error).__name__}: {error}",
        ) from error


def _stand_in(module: nn.Module) -> nn.Module:
    """The same module over again, where a forward can keep its intermediate values, which are symbolic when traced."""
    twin = object.__new__(type(module))
    for name, value in vars(module).items():
        vars(twin)[name] = copy.copy(value) if isinstance(value, _CONTAINERS) else value
    return twin


_CONTAINERS = (list, dict, set, collections.deque)


_SHAPE, _ROWS = "shape", "n"  # what shape arithmetic on a batch may yield here: its shape and its first entry


def _part_of_shape(node: fx.Node, known: dict[fx.Node, Any]) -> str | None:
    """Which part of a batch's shape `node` computes: `x.shape`, `x.size()`, `x.size(0)`, `x.shape[0]`; None if none."""
    call = (node.target, *node.args[1:])
    if call in ((getattr, "shape"), ("size",)):
        return _SHAPE
    if call == ("size", 0) or (call == (operator.getitem, 0) and known.get(node.args[0]) is _SHAPE):  # type: ignore[arg-type]
        return _ROWS
    return None


def _steps_of_node(
    root: nn.Module, node: fx.Node, where: str, place: str, known: dict[fx.Node, Any]
) -> Sequence[_Step]:
    """The steps of one call in a traced forward."""
    if node.op == "call_module":
        target = str(node.target)
        if len(node.args) != 1 or node.kwargs:
            raise _no_chain(place, "a submodule with one argument", f"{len(node.args) + len(node.kwargs)}")
        return _steps_of_module(root.get_submodule(target), f"{where}.{target}" if where else target)
    read = next((spelling.read for spelling in _spellings() if node.target in spelling.calls), None)
    if read is None:
        raise _no_chain(place, _supported(), getattr(node.target, "__name__", str(node.target)))
    args, kwargs = map_arg((node.args, node.kwargs), known.get)
    return [(place, step) for step in _steps_of_call(functools.partial(read, *args, **kwargs), place)]


def _steps_of_call(read: Callable[[], _Content | None], where: str) -> list[_Content]:
    """The step that `read` finds at the place `where`, if it is one that a chain may have; none where it is nothing."""
    try:
        step = read()
    except (TypeError, ValueError) as error:
        raise _no_chain(where, _supported(), str(error)) from error
    return [] if step is None or isinstance(step, Identity) else [step]


# What reads the calls that are no activation, see `Spelling`.


def _dropout(input: None, p: float = 0.5, training: bool = True, inplace: bool = False) -> None:
    if training and p > 0:
        raise ValueError(f"Dropout with p = {p} in training mode: teleport in eval mode, or set p = 0")


def _flatten(input: None, start_dim: int = 0, end_dim: int = -1) -> Flatten:
    if (start_dim, end_dim) != (1, -1):
        raise ValueError(f"Flatten({start_dim}, {end_dim})")
    return Flatten()


def _view(input: None, *shape: Any) -> Flatten | Squeeze:
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if sizes == (-1,):
        return Squeeze(always=True)
    if sizes == (_ROWS, -1):
        return Flatten()
    if len(sizes) == 2 and sizes[0] in (_ROWS, -1) and isinstance(sizes[1], int) and sizes[1] > 0:
        return Flatten(sizes[1])
    raise ValueError(f"a reshape to {sizes}")


_SPELLINGS = (
    *pieces.SPELLINGS,
    Spelling((nn.Flatten,), (torch.flatten, "flatten"), _flatten, "(1)"),
    Spelling((nn.Dropout, nn.AlphaDropout), (F.dropout, F.alpha_dropout), _dropout, " (inactive)"),
    Spelling((), ("view", "reshape"), _view),
)


def _spellings() -> Iterator[Spelling]:
    """How models may write what a chain may have; activations can be registered at any time."""
    yield from activations.spellings()
    yield from _SPELLINGS


def _supported() -> str:
    """What a chain may have, for errors."""
    titles = [spelling.title for spelling in _spellings() if spelling.modules]
    return ", ".join(["Linear", *titles, "or an operation with a constant"])
