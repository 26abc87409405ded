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
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .. import activations
from ..activations import Activation, Identity, scaled
from ..spelling import Spelling
from . import pieces
from .asserts import AssertingTracer, nodes_of_checks
from .hints import hint
from .pieces import Affine, Flatten, InTurn, LogSoftmax, Piece, Squeeze


@dataclass(frozen=True)
class Chain:
    """M Linear layers in the order of the forward pass, and what is between them.

    linears: the M weight layers; names: their qualified names in the model.
    activations: the m = M − 1 hidden activations, σ_k after linears[k−1]; Identity where two Linears are adjacent.
    output: what is applied to the logits Z_M, Identity if nothing is.
    inputs: what is applied, one after the other, to the model's input before the first layer.
    """

    linears: tuple[nn.Linear, ...]
    activations: tuple[Activation, ...]
    output: Piece
    names: tuple[str, ...]
    inputs: tuple[Affine | Flatten, ...] = ()

    @property
    def flattens(self) -> bool:
        """Whether the model flattens its input's trailing dimensions before the first layer."""
        return any(isinstance(piece, Flatten) for piece in self.inputs)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(qualified name, parameter) of all weight layers: weight, bias, weight, ...

        By name: a Linear may have registered its bias first, as `prune.remove` leaves it.
        """
        for where, linear in zip(self.names, self.linears, strict=True):
            for name in ("weight", "bias"):
                parameter = linear._parameters.get(name)
                if parameter is not None:
                    yield f"{where}.{name}", parameter

    def frozen(self, layer: int) -> str | None:
        """The name of a parameter of weight layer `layer` (0-based) that does not require a gradient, or None."""
        own = self.linears[layer]._parameters.values()
        frozen = {id(parameter) for parameter in own if parameter is not None and not parameter.requires_grad}
        return next((name for name, parameter in self.named_parameters() if id(parameter) in frozen), None)


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


def mark_of(model: nn.Module) -> tuple[Any, ...]:
    """What a chain depends on besides the parameters of its Linear layers: where it is the same, so is the chain.

    Of every module its place, identity, mode, hooks, plain attributes, and the tensors that are no parameters of a
    Linear, by identity and version.
    """
    return tuple((name, *_mark_of_module(module)) for name, module in model.named_modules(remove_duplicate=False))


def _mark_of_module(module: nn.Module) -> tuple[Any, ...]:
    plain = tuple((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, torch.dtype)))
    hooks = (*map(id, module._forward_pre_hooks.values()), *map(id, module._forward_hooks.values()))
    own = {} if isinstance(module, nn.Linear) else module._parameters
    others = ((k, t) for k, t in (*own.items(), *module._buffers.items()) if t is not None)
    constants = ((k, v) for k, v in vars(module).items() if isinstance(v, Tensor))
    tensors = tuple((k, id(t), None if t.is_inference() else t._version) for k, t in (*others, *constants))
    present = tuple(k for k, p in module._parameters.items() if p is not None)
    return id(module), type(module), "forward" in vars(module), plain, hooks, tensors, present


def check_same_structure(before: Chain, now: Chain) -> None:
    """Raise ValueError, which names the difference, unless two chains have layers of the same shapes and kinds."""
    for old, new in itertools.zip_longest(_describe(before), _describe(now), fillvalue="nothing"):
        if old != new:
            raise ValueError(f"model must keep the structure that it had at first, got {new} in the place of {old}")


def _describe(chain: Chain) -> list[str]:
    """A text for each of its layers and activations."""
    parts = []
    for where, linear, activation in zip(chain.names, chain.linears, (*chain.activations, chain.output), strict=True):
        rows, columns = linear.weight.shape
        bias = "" if linear.bias is not None else " without bias"
        parts += [f"{where!r}, a Linear from {columns} to {rows}{bias}", f"{activation} behind {where!r}"]
    return parts


def check_parameters(chain: Chain) -> None:
    """Raise unless all weight layers can be computed with, and rewritten in place.

    Their parameters must be plain dense tensors of one floating dtype (16 bits or more) on one device (not meta),
    finite, contiguous, not made in torch.inference_mode(), no two of them sharing memory. TypeError for wrong kinds of
    tensors and dtypes, ValueError otherwise; the message has the parameter's qualified name.
    """
    parameters = list(chain.named_parameters())
    for name, parameter in parameters:
        _check_kind(name, parameter)
        _check_same_kind(name, parameter, *parameters[0])
    for where, linear in zip(chain.names, chain.linears, strict=True):
        _check_shapes(where, linear)
    _check_untied(parameters)
    for name, parameter in parameters:
        _check_writable(name, parameter)
    if not _all_finite(parameter for _, parameter in parameters):
        name = next(name for name, parameter in parameters if not _all_finite([parameter]))
        raise ValueError(f"parameter {name!r} must be finite, got NaN or Inf")


def check_batch(chain: Chain, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(x, y) of a batch that fits the chain; x is returned as by `check_inputs`.

    y: a tensor of n targets on the same device; its dtype and range are the loss's affair.
    """
    inputs, targets = _check_pair(batch)
    flat = check_inputs(chain, inputs, "batch inputs")
    _check_placed(chain, targets, "batch targets")
    if targets.dim() == 0 or len(targets) != len(flat):
        raise ValueError(
            f"batch targets must have one entry for each of n={len(flat)} inputs, got shape {tuple(targets.shape)}"
        )
    return flat, as_constant(targets)


def as_constant(data: Tensor) -> Tensor:
    """The tensor without its graph, as one that autograd can save: a copy where inference mode has made it."""
    return data.clone() if data.is_inference() else data.detach()


def check_inputs(chain: Chain, inputs: Tensor, argument: str) -> Tensor:
    """Samples as the first Linear gets them (n, d_0), detached: with what the model does before it (`Chain.inputs`).

    inputs: (n, d_0), or (n, ...) for a model that flattens, of the model's dtype and device, finite there, n ≥ 1;
    `argument` is their name in the errors, TypeError for wrong kinds of tensors and dtypes, ValueError otherwise.
    """
    _check_placed(chain, inputs, argument)
    weight = chain.linears[0].weight
    if inputs.dtype != weight.dtype:
        raise TypeError(f"{argument} must have the model's dtype {weight.dtype}, got {inputs.dtype}")
    _check_real(argument, inputs)
    flat = as_constant(inputs)
    for piece in chain.inputs:
        if isinstance(piece, Affine) and not piece.fits(tuple(flat.shape[1:])):
            shapes = " and ".join(str(tuple(constant.shape)) for constant in piece.tensors)
            raise ValueError(
                f"{argument} must be samples whose shape the model's constants of shape {shapes} broadcast to, "
                f"got samples of shape {tuple(flat.shape[1:])}"
            )
        flat = piece.forward(flat)
    features = weight.shape[1]
    if flat.dim() != 2 or flat.shape[1] != features:
        hint = "" if chain.flattens or flat.dim() <= 2 else " (the model has no Flatten before its first Linear)"
        raise ValueError(f"{argument} must have shape (n, d_in={features}), got {tuple(inputs.shape)}{hint}")
    if len(flat) == 0:
        raise ValueError(f"{argument} must hold at least one sample, got 0")
    if not _all_finite([flat]):
        raise ValueError(f"{argument} must be finite, got NaN or Inf")
    return flat


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


# --- checks of single tensors -------------------------------------------------------------------------------------


def _check_kind(name: str, parameter: nn.Parameter) -> None:
    if type(parameter) is not nn.Parameter:
        raise TypeError(f"parameter {name!r} must be a plain torch.nn.Parameter, got {type(parameter).__name__}")
    if parameter.layout != torch.strided:
        raise TypeError(f"parameter {name!r} must be a dense tensor, got layout {parameter.layout}")
    if parameter.is_meta:
        raise ValueError(f"parameter {name!r} must hold data, got a tensor on the meta device")
    if parameter.numel() == 0:
        raise ValueError(f"parameter {name!r} must have elements, got shape {tuple(parameter.shape)}")
    _check_real(f"parameter {name!r}", parameter)


def _check_shapes(where: str, linear: nn.Linear) -> None:
    weight, bias = linear.weight, linear.bias
    if weight.dim() != 2:
        raise ValueError(f"parameter '{where}.weight' must be a matrix, got shape {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"parameter '{where}.bias' must have shape ({weight.shape[0]},), one element a row of the weight, "
            f"got {tuple(bias.shape)}"
        )


def _check_real(argument: str, tensor: Tensor) -> None:
    """Raise for dtypes without the arithmetic of real numbers, such as float8."""
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{argument} must be of a real floating dtype, got {tensor.dtype} (known are "
            f"{', '.join(map(str, _DTYPES))})"
        )


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_placed(chain: Chain, tensor: Tensor, argument: str) -> None:
    """Raise unless `tensor` is a dense tensor on the model's device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{argument} must be a dense tensor, got layout {tensor.layout}")
    device = chain.linears[0].weight.device
    if tensor.device != device:
        raise ValueError(f"{argument} must be on the model's device {device}, got {tensor.device}")


def _check_same_kind(name: str, parameter: nn.Parameter, first_name: str, first: nn.Parameter) -> None:
    if parameter.dtype != first.dtype:
        raise TypeError(
            f"parameter {name!r} must have the dtype {first.dtype} of {first_name!r}, got {parameter.dtype}"
        )
    if parameter.device != first.device:
        raise ValueError(
            f"parameter {name!r} must be on the device {first.device} of {first_name!r}, got {parameter.device}"
        )


def _check_writable(name: str, parameter: nn.Parameter) -> None:
    if parameter.is_inference():
        raise ValueError(
            f"parameter {name!r} must be one that autograd can follow, got one made in torch.inference_mode()"
        )
    if not parameter.is_contiguous():
        raise ValueError(f"parameter {name!r} must be contiguous, got strides {parameter.stride()}")


def _check_untied(parameters: list[tuple[str, nn.Parameter]]) -> None:
    """Raise if two parameters overlap in memory; disjoint slices of one buffer are no tie."""
    extents = sorted((*_extent(parameter), index) for index, (_, parameter) in enumerate(parameters))
    for (_, end, index), (start, _, other) in itertools.pairwise(extents):
        if start < end:
            first, second = (parameters[i][0] for i in sorted((index, other)))
            raise ValueError(f"parameters must not be tied, got {first!r} and {second!r} sharing memory")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor's elements and the one behind the last."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all elements are finite: by their sums, one pass and one transfer, and one by one if a sum overflows."""
    listed = [tensor.detach() for tensor in tensors]
    if all(math.isfinite(total) for total in torch.stack([tensor.sum() for tensor in listed]).tolist()):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in listed)


def _check_pair(batch: object) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(f"batch must be a pair (inputs, targets) of tensors, got {type(batch).__name__}{size}")
    return batch[0], batch[1]
