"""Reading modules as chains: what is accepted computes the same function, all else is refused with a clear text."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import run_chain
from torch import Tensor, nn
from torch.nn.utils import prune

from symtele_cuda.activations import ELU, Identity, LeakyReLU, ReLU, Sigmoid, Softplus, Tanh, scaled
from symtele_cuda.model.chain import check_batch, check_inputs, check_parameters
from symtele_cuda.model.reader import read_chain


def plain(hidden: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), hidden or nn.LeakyReLU(0.1), nn.Linear(5, 3))


class Custom(nn.Module):
    """Linear 4-5-5-3 with a forward given as a function of the module and its input."""

    def __init__(self, forward: Callable[[Custom, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.act = nn.Tanh()
        self.block = nn.Sequential(nn.Linear(5, 5), nn.ELU(0.5))
        self.layers = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)])
        self.apply_to = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_to(self, x)


def loop(m: Custom, x: Tensor) -> Tensor:
    for layer in m.layers[:-1]:
        x = F.leaky_relu(layer(x), 0.2)
    return m.layers[-1](x)


SEQUENTIALS = {
    "plain": (plain(), [LeakyReLU(0.1)], Identity()),
    "relu": (nn.Sequential(*plain(nn.ReLU()), nn.ReLU()), [ReLU()], ReLU()),
    "nested": (
        nn.Sequential(plain(nn.Tanh()), nn.Sequential(nn.Sigmoid(), nn.Linear(3, 2))),
        [Tanh(), Sigmoid()],
        Identity(),
    ),
    "adjacent linears": (nn.Sequential(nn.Linear(4, 5), nn.Identity(), nn.Linear(5, 3)), [Identity()], Identity()),
    "output activation": (nn.Sequential(*plain(nn.Softplus(2.0)), nn.Sigmoid()), [Softplus(2.0)], Sigmoid()),
    "no bias, inactive dropout": (
        nn.Sequential(
            nn.Dropout(0.0), nn.Linear(4, 5, bias=False), nn.Dropout(0.5).eval(), nn.ELU(0.3), nn.Linear(5, 2)
        ),
        [ELU(0.3)],
        Identity(),
    ),
    "late flatten": (
        nn.Sequential(nn.Linear(4, 5), nn.Flatten(), nn.Tanh(), nn.Linear(5, 3), nn.Flatten()),
        [Tanh()],
        Identity(),
    ),
}


@pytest.mark.parametrize("name", SEQUENTIALS)
def test_sequential_is_read(name: str) -> None:
    model, hidden, output = SEQUENTIALS[name]
    chain = read_chain(model)
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    assert chain.activations == tuple(hidden)
    assert chain.output == output
    assert [model.get_submodule(n) for n in chain.names] == list(chain.linears)
    assert torch.equal(run_chain(chain, x), model(x))


CUSTOMS: dict[str, tuple[Callable[[Custom, Tensor], Tensor], list, tuple[str, ...]]] = {
    "functional leaky_relu": (lambda m, x: m.c(F.leaky_relu(m.a(x), negative_slope=0.3)), [LeakyReLU(0.3)], ("a", "c")),
    "default slope": (lambda m, x: m.c(F.leaky_relu(m.a(x))), [LeakyReLU(0.01)], ("a", "c")),
    "functional relu": (lambda m, x: m.c(torch.relu(m.b(F.relu(m.a(x))))), [ReLU(), ReLU()], ("a", "b", "c")),
    "relu as a method": (lambda m, x: m.c(m.a(x).relu()), [ReLU()], ("a", "c")),
    "elu, softplus": (
        lambda m, x: m.c(F.softplus(m.b(F.elu(m.a(x), alpha=0.7)), beta=2)),
        [ELU(0.7), Softplus(2)],
        ("a", "b", "c"),
    ),
    "tanh, sigmoid": (
        lambda m, x: m.c(torch.sigmoid(m.b(torch.tanh(m.a(x))))),
        [Tanh(), Sigmoid()],
        ("a", "b", "c"),
    ),
    "methods": (lambda m, x: m.c(m.b(m.a(x).tanh()).sigmoid()), [Tanh(), Sigmoid()], ("a", "b", "c")),
    "one activation used twice": (lambda m, x: m.c(m.act(m.b(m.act(m.a(x))))), [Tanh(), Tanh()], ("a", "b", "c")),
    "sequential block": (lambda m, x: m.c(m.block(m.a(x))), [Identity(), ELU(0.5)], ("a", "block.0", "c")),
    "loop over a list": (loop, [LeakyReLU(0.2), LeakyReLU(0.2)], ("layers.0", "layers.1", "layers.2")),
    "dropout": (lambda m, x: m.c(torch.tanh(F.dropout(m.a(x), training=False))), [Tanh()], ("a", "c")),
    "dropout follows the mode": (
        lambda m, x: m.c(torch.tanh(F.dropout(m.a(x), 0.5, m.act.training))),
        [Tanh()],
        ("a", "c"),
    ),
}


@pytest.mark.parametrize("name", CUSTOMS)
def test_custom_forward_is_read(name: str) -> None:
    forward, hidden, names = CUSTOMS[name]
    model = Custom(forward).eval()
    chain = read_chain(model)
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    assert (chain.activations, chain.names) == (tuple(hidden), names)
    assert [model.get_submodule(n) for n in names] == list(chain.linears)
    assert torch.equal(run_chain(chain, x), model(x))


FLATTENINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten method": lambda x: x.flatten(1),
    "torch.flatten": lambda x: torch.flatten(x, start_dim=1),
    "view size": lambda x: x.view(x.size(0), -1),
    "view shape": lambda x: x.view(x.shape[0], -1),
    "view size()": lambda x: x.view(x.size()[0], -1),
    "view with a width": lambda x: x.view(-1, 4),
    "reshape tuple": lambda x: x.reshape((x.shape[0], 4)),
}


@pytest.mark.parametrize("name", FLATTENINGS)
def test_flattening_is_read(name: str) -> None:
    model = Custom(lambda m, x: m.c(m.act(m.a(FLATTENINGS[name](x)))))
    chain = read_chain(model)
    x = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    flat, _ = check_batch(chain, (x, torch.zeros(6)))
    assert chain.flattens
    assert torch.equal(flat, x.flatten(1))
    assert torch.equal(run_chain(chain, x), model(x))


def test_custom_modules_nest() -> None:
    inner = Custom(lambda m, x: m.c(m.act(m.a(x))))
    outer = nn.Sequential(nn.Flatten(), inner, nn.Sigmoid(), nn.Linear(3, 2))
    assert read_chain(outer).names == ("1.a", "1.c", "3")
    assert read_chain(torch.fx.symbolic_trace(outer)).activations == (Tanh(), Sigmoid())


def test_reading_leaves_the_model_alone() -> None:
    model = Custom(lambda m, x: m.c(m.act(m.a(x))))
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    read_chain(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training


def test_what_a_forward_keeps_does_not_reach_the_model() -> None:
    def keeping(m: Custom, x: Tensor) -> Tensor:
        m.kept = m.a(x)
        m.history.append(m.kept)
        m.by_name["last"] = m.kept
        m.new = m.kept
        m.register_buffer("late", torch.ones(1))
        return m.c(m.act(m.kept))

    model = Custom(keeping)
    kept = model.kept = torch.zeros(1)
    model.history, model.by_name = [1], {}
    before = dict(vars(model))
    assert read_chain(model).names == ("a", "c")
    assert model.kept is kept
    assert (model.history, model.by_name, dict(model.named_buffers())) == ([1], {}, {})
    assert vars(model) == before


def test_an_interrupted_trace_leaves_the_model_alone() -> None:
    def interrupted(m: Custom, x: Tensor) -> Tensor:
        m.kept = m.a(x)
        seen.append(dict(vars(model)))
        raise KeyboardInterrupt

    model, seen = Custom(interrupted), list[dict]()
    before = dict(vars(model))
    with pytest.raises(KeyboardInterrupt):
        read_chain(model)
    assert seen == [before]
    assert vars(model) == before


def hooked(register: str) -> nn.Sequential:
    model = plain()
    getattr(model[1], register)(lambda *_: None)
    return model


class DoublingLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Squeezing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(-1)


class TwoInputs(Custom):
    def forward(self, x: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        return self.c(self.act(self.a(x)))


class OptionalArguments(Custom):
    def forward(self, x: Tensor, mask: Tensor | None = None, *others: Tensor, twice: bool = False) -> Tensor:
        hidden = self.a(x) if mask is None else self.a(x) * mask
        return self.c(self.act(self.b(hidden) if twice else hidden))


class OneOfMany(Custom):
    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return self.c(self.act(self.a(x)))


@pytest.mark.parametrize("kind", [OptionalArguments, OneOfMany])
def test_further_arguments_have_their_defaults(kind: type[Custom]) -> None:
    model = kind(lambda m, x: x)
    chain = read_chain(model)
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    assert (chain.activations, chain.names) == ((Tanh(),), ("a", "c"))
    assert torch.equal(run_chain(chain, x), model(x))


def with_replaced_forward() -> nn.Sequential:
    model = plain()
    model[0].forward = lambda x: x.new_zeros(len(x), 5)
    return model


def branching(m: Custom, x: Tensor) -> Tensor:
    return m.c(m.a(x)) if x.sum() > 0 else m.c(torch.tanh(m.a(x)))


def discarding(m: Custom, x: Tensor) -> Tensor:
    hidden = m.a(x)
    hidden.tanh_()
    return m.c(hidden)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "relu6": (lambda: plain(nn.ReLU6()), r"at '1' expected .*LeakyReLU, .*ELU.* got ReLU6"),
    "gelu": (lambda: plain(nn.GELU()), r"at '1' expected .*LeakyReLU, .*ELU.* got GELU"),
    "functional relu6": (
        lambda: Custom(lambda m, x: m.c(F.relu6(m.a(x)))),
        r"at 'relu6' expected .*LeakyReLU.* got relu6",
    ),
    "slope zero": (lambda: plain(nn.LeakyReLU(0.0)), r"at '1' .*negative_slope must be .* got 0.0"),
    "functional slope": (
        lambda: Custom(lambda m, x: m.c(F.leaky_relu(m.a(x), -1.0))),
        r"negative_slope must .* got -1.0",
    ),
    "softplus threshold": (
        lambda: plain(nn.Softplus(1.0, 5.0)),
        r"at '1' .*threshold 20.* got Softplus with threshold 5",
    ),
    "functional threshold": (lambda: Custom(lambda m, x: m.c(F.softplus(m.a(x), 1.0, 5.0))), r"threshold 5"),
    "dropout": (lambda: plain(nn.Dropout(0.5)), r"at '1' .*p = 0.5 in training mode"),
    "functional dropout": (lambda: Custom(lambda m, x: m.c(F.dropout(m.a(x)))), r"p = 0.5 in training mode"),
    "batch norm": (lambda: plain(nn.BatchNorm1d(5)), r"at '1' .* got BatchNorm1d"),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), *plain()), r"at '0' .* got Conv2d"),
    "wrapped": (lambda: nn.DataParallel(plain()), r"at 'model' .* got DataParallel"),
    "flatten dims": (lambda: nn.Sequential(nn.Flatten(0), *plain()), r"at '0' .* got Flatten\(0, -1\)"),
    "view width": (
        lambda: Custom(lambda m, x: m.c(m.a(x.view(-1, 2)))),
        r"expected 4 features, as 'a' has there, got 2",
    ),
    "late view": (
        lambda: Custom(lambda m, x: m.c(m.b(m.a(x)).view(-1, 1))),
        r"expected 5 features, as 'b' has .*got 1",
    ),
    "reshape": (lambda: Custom(lambda m, x: m.c(m.a(x.view(2, -1)))), r"got a reshape to \(2, -1\)"),
    "sizes": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(6, 3)),
        r"at '2' expected 5 features.* got 6",
    ),
    "single linear": (lambda: nn.Linear(4, 3), r"at least two Linear layers .*got 1"),
    "empty": (lambda: nn.Sequential(), r"at least two Linear layers .*got 0"),
    "two activations": (
        lambda: nn.Sequential(*plain()[:2], nn.Tanh(), nn.Linear(5, 3)),
        r"at '2' .*behind '0', got .* tanh",
    ),
    "activation first": (lambda: nn.Sequential(nn.Tanh(), *plain()), r"at '0' expected a Linear before .* got tanh"),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(plain()[0]), *plain()[1:]),
        r"at '0' .*parametrized weight",
    ),
    "pruned": (lambda: nn.Sequential(prune.identity(plain()[0], "weight"), *plain()[1:]), r"at '0' .* hooks "),
    "linear subclass": (lambda: nn.Sequential(DoublingLinear(4, 5), *plain()[1:]), r"at '0' .* got DoublingLinear"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(5), *plain()[1:]), r"at '0' .* lazy LazyLinear"),
    "hook": (lambda: hooked("register_forward_hook"), r"at '1' expected no forward hooks.* got hooks .*lambda"),
    "pre-hook": (lambda: hooked("register_forward_pre_hook"), r"at '1' expected no forward hooks"),
    "replaced forward": (
        with_replaced_forward,
        r"at '0' expected the forward of its class Linear, got one set on the instance",
    ),
    "two inputs": (lambda: TwoInputs(lambda m, x: x), r"a forward of one tensor .* argument: 'scale'"),
    "residual": (
        lambda: Custom(lambda m, x: m.c(m.a(x) + m.b(m.a(x)))),
        r"expected a call on the result of the one before",
    ),
    "unused branch": (
        lambda: Custom(lambda m, x: (m.a(x), m.c(m.b(x)))[1]),
        r"expected a call on the result of the one before",
    ),
    "two outputs": (lambda: Custom(lambda m, x: (m.a(x), x)), r"at 'output'"),
    "branch": (lambda: Custom(branching), r"torch.fx can trace, got Custom, TraceError"),
    "in-place, result discarded": (lambda: Custom(discarding), r"got tanh_"),
    "weight read directly": (lambda: Custom(lambda m, x: m.c(F.linear(x, m.a.weight))), r"at 'linear' .* got linear"),
    "trainable factor": (
        lambda: Custom(lambda m, x: m.c(torch.tanh(m.a(x) * m.b.bias))),
        r"at 'mul' .* got an operation with a trainable tensor of shape \(5,\)",
    ),
    "factor of each unit": (
        lambda: Custom(lambda m, x: m.c(torch.tanh(m.a(x)) * torch.arange(1.0, 6.0))),
        r"at 'mul' expected one number for all units between two Linears, got a tensor of shape \(5,\)",
    ),
    "factor 0": (lambda: Custom(lambda m, x: m.c(0 * m.a(x))), r"at 'mul' .* got a factor 0"),
    "factor that float32 cannot invert": (
        lambda: Custom(lambda m, x: m.c(2.0**-90 * (2.0**-90 * torch.tanh(m.a(x))))),
        r"at 'mul_1' expected constants behind 'a' that leave an inverse, got the size of a factor .* got 6",
    ),
    "constant that is not finite": (
        lambda: Custom(lambda m, x: m.c(m.a(x) + float("inf"))),
        r"got a constant with NaN",
    ),
    "division by 0": (lambda: Custom(lambda m, x: m.c(m.a(x) / 0)), r"got a division by 0"),
    "division by the value": (lambda: Custom(lambda m, x: m.c(1 / m.a(x))), r"got a division by the value itself"),
    "rounded division": (
        lambda: Custom(lambda m, x: m.c(torch.div(m.a(x), 2, rounding_mode="floor"))),
        r"got a division by the value itself, or one that rounds",
    ),
    "value times itself": (
        lambda: Custom(lambda m, x: m.c((lambda z: z * z)(m.a(x)))),
        r"got an operation of the value with itself",
    ),
    "a constant's shape changes the outputs": (
        lambda: Custom(lambda m, x: m.c(m.act(m.a(x))) + torch.ones(2, 1, 1)),
        r"at 'add' expected what outputs of shape \(n, 3\) allow, got .* plus a tensor of shape \(2, 1, 1\)",
    ),
    "squeeze() of everything": (
        lambda: Custom(lambda m, x: m.c(m.act(m.a(x))).squeeze()),
        r"got squeeze\(\), where squeeze\(-1\) is understood",
    ),
    "view(-1) of several outputs": (
        lambda: Custom(lambda m, x: m.c(m.act(m.a(x))).view(-1)),
        r"at 'view' expected what outputs of shape \(n, 3\) allow, got Squeeze\(always=True\)",
    ),
    "log_softmax over the samples": (
        lambda: Custom(lambda m, x: F.log_softmax(m.c(m.act(m.a(x))), dim=0)),
        r"got log_softmax over dimension 0",
    ),
    "log_softmax in another dtype": (
        lambda: Custom(lambda m, x: F.log_softmax(m.c(m.act(m.a(x))), dim=1, dtype=torch.float64)),
        r"got log_softmax over dimension 1 with dtype torch.float64",
    ),
    "log_softmax of squeezed outputs": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), Squeezing(), nn.LogSoftmax(-1)),
        r"at '4' expected what outputs of shape \(n\) allow, got LogSoftmax\(\)",
    ),
    "log_softmax between Linears": (
        lambda: plain(nn.LogSoftmax(dim=-1)),
        r"at '1' expected an activation or a constant behind '0', got LogSoftmax\(\), which may be at the end",
    ),
    "squeeze before the first Linear": (
        lambda: nn.Sequential(Squeezing(), *plain()),
        r"at '0.squeeze' expected a Linear before the first activation, got Squeeze",
    ),
    "PReLU": (lambda: plain(nn.PReLU(init=0.0)), r"at '1' .* got PReLU's weight must be .* got 0.0"),
    "if on a shape": (
        lambda: Custom(lambda m, x: m.c(m.act(m.a(x))) if x.shape[1] == 4 else x),
        r"torch.fx can trace, got Custom, TraceError",
    ),
    "no forward": (lambda: nn.ModuleList(plain()), r"at 'model' .* got ModuleList"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_chain_is_refused(name: str) -> None:
    make, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        read_chain(make())


def test_what_a_subclass_computes_around_its_activation_is_read() -> None:
    class DoublingTanh(nn.Tanh):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert read_chain(plain(DoublingTanh())).activations == (scaled(Tanh(), gain=2.0),)


def test_constants_and_slopes_are_those_of_now() -> None:
    model = Custom(lambda m, x: m.c(m.slope(m.a(x)) * m.factor))
    model.slope = nn.PReLU()
    model.register_buffer("factor", torch.tensor(2.0))
    assert read_chain(model).activations == (scaled(LeakyReLU(0.25), gain=2.0),)
    with torch.no_grad():
        model.slope.weight.fill_(0.5)
        model.factor.fill_(3.0)
    assert read_chain(model).activations == (scaled(LeakyReLU(0.5), gain=3.0),)


@pytest.mark.parametrize("shape", [(5,), (6, 4), (6, 1), (1, 2, 4)], ids=str)
def test_inputs_that_the_model_s_constants_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    """Constants of their own for each of the 6 samples are among them: another batch would have other samples."""
    model = Custom(lambda m, x: m.c(m.act(m.a(x - m.mean))))
    model.register_buffer("mean", torch.ones(shape))
    with pytest.raises(ValueError, match=r"x must be samples whose shape the model's constants of shape .* broadcast"):
        check_inputs(read_chain(model), torch.zeros(6, 4), "x")


def test_inputs_that_the_model_s_constants_make_infinite_are_refused() -> None:
    model = Custom(lambda m, x: m.c(m.act(m.a(x * 1e30))))
    with pytest.raises(ValueError, match=r"x must be finite, got NaN or Inf"):
        check_inputs(read_chain(model), torch.full((6, 4), 1e30), "x")


def test_model_that_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        read_chain(lambda x: x)  # type: ignore[arg-type]


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def sharing() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    model[2].weight = nn.Parameter(model[0].weight.detach().T)
    return model


def applied_twice() -> nn.Sequential:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


def changed(change: Callable[[nn.Sequential], object]) -> Callable[[], nn.Sequential]:
    def make() -> nn.Sequential:
        model = plain()
        change(model)
        return model

    return make


def set_weight(weight: Tensor, requires_grad: bool = True) -> Callable[[], nn.Sequential]:
    return changed(lambda m: setattr(m[0], "weight", nn.Parameter(weight, requires_grad=requires_grad)))


class OwnParameter(nn.Parameter):
    pass


BAD_PARAMETERS: dict[str, tuple[Callable[[], nn.Sequential], type[Exception], str]] = {
    "tied": (tied, ValueError, r"'0.weight' and '2.weight' sharing memory"),
    "sharing storage": (sharing, ValueError, r"sharing memory"),
    "layer applied twice": (applied_twice, ValueError, r"sharing memory"),
    "a bias that broadcasts": (
        changed(lambda m: setattr(m[0], "bias", nn.Parameter(torch.zeros(1)))),
        ValueError,
        r"'0.bias' must have shape \(5,\), .* got \(1,\)",
    ),
    "non-contiguous": (
        set_weight(torch.zeros(4, 5).T),
        ValueError,
        r"'0.weight' must be contiguous, got strides \(1, 5\)",
    ),
    "meta": (changed(lambda m: m.to("meta")), ValueError, r"'0.weight' must hold data, got .*meta"),
    "sparse": (
        set_weight(torch.zeros(5, 4).to_sparse()),
        TypeError,
        r"'0.weight' must be a dense tensor, got .*sparse",
    ),
    "NaN": (changed(lambda m: m[0].weight.data[1, 2].fill_(torch.nan)), ValueError, r"'0.weight' must be finite"),
    "Inf": (changed(lambda m: m[2].bias.data[0].fill_(torch.inf)), ValueError, r"'2.bias' must be finite"),
    "opposite Infs": (
        changed(lambda m: m[2].bias.data[:2].copy_(torch.tensor([torch.inf, -torch.inf]))),
        ValueError,
        r"'2.bias' must be finite",
    ),
    "mixed dtypes": (
        changed(lambda m: m[2].double()),
        TypeError,
        r"'2.weight' must have the dtype torch.float32 of '0.weight', got torch.float64",
    ),
    "mixed devices": (changed(lambda m: m[2].to("meta")), ValueError, r"'2.weight' must hold data"),
    "complex": (
        changed(lambda m: m.to(torch.complex64)),
        TypeError,
        r"'0.weight' must be of a real floating dtype, got torch.complex64",
    ),
    "integer": (
        set_weight(torch.ones(5, 4, dtype=torch.int64), False),
        TypeError,
        r"real floating dtype, got torch.int64",
    ),
    "float8": (
        set_weight(torch.ones(5, 4).to(torch.float8_e4m3fn), False),
        TypeError,
        r"'0.weight' must be of a real floating dtype, got torch.float8_e4m3fn \(known are torch.float64, ",
    ),
    "no elements": (set_weight(torch.zeros(5, 0)), ValueError, r"'0.weight' must have elements, got shape \(5, 0\)"),
    "tensor subclass": (
        changed(lambda m: setattr(m[0], "weight", OwnParameter(torch.zeros(5, 4)))),
        TypeError,
        r"got OwnParameter",
    ),
}


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("name", BAD_PARAMETERS)
def test_bad_parameters_are_named(name: str) -> None:
    make, error, text = BAD_PARAMETERS[name]
    chain = read_chain(make())
    with pytest.raises(error, match=text):
        check_parameters(chain)


def test_a_batch_of_a_dtype_without_arithmetic() -> None:
    model = plain().to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"batch inputs must be of a real floating dtype, got torch.float8_e4m3fn"):
        check_batch(read_chain(model), (X.to(torch.float8_e4m3fn), Y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_with_arithmetic_pass(dtype: torch.dtype) -> None:
    chain = read_chain(plain().to(dtype))
    check_parameters(chain)
    assert check_inputs(chain, X.to(dtype), "x").dtype == dtype


def test_slices_of_one_buffer_are_not_tied() -> None:
    model = plain()
    buffer = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = buffer[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    chain = read_chain(model)
    check_parameters(chain)
    assert len({p.untyped_storage().data_ptr() for _, p in chain.named_parameters()}) == 1


def test_large_finite_weights_pass_though_their_sum_overflows() -> None:
    model = plain()
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    chain = read_chain(model)
    assert torch.isinf(model[0].weight.sum())
    check_parameters(chain)


X, Y = torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)
BAD_BATCHES: dict[str, tuple[object, type[Exception], str]] = {
    "a tensor": (X, TypeError, r"batch must be a pair \(inputs, targets\) of tensors, got Tensor"),
    "a triple": ((X, Y, Y), TypeError, r"batch must be a pair .* got tuple of length 3"),
    "array": ((X.numpy(), Y), TypeError, r"batch inputs must be a tensor, got ndarray"),
    "list of targets": ((X, [0, 0, 0]), TypeError, r"batch targets must be a tensor, got list"),
    "integer inputs": (
        (X.long(), Y),
        TypeError,
        r"batch inputs must have the model's dtype torch.float32, got torch.int64",
    ),
    "float64 inputs": ((X.double(), Y), TypeError, r"dtype torch.float32, got torch.float64"),
    "device of x": ((X.to("meta"), Y), ValueError, r"batch inputs must be on the model's device cpu, got meta"),
    "device of y": ((X, Y.to("meta")), ValueError, r"batch targets must be on the model's device cpu, got meta"),
    "sparse": ((X.to_sparse(), Y), TypeError, r"batch inputs must be a dense tensor, got layout torch.sparse_coo"),
    "features": ((torch.ones(3, 7), Y), ValueError, r"shape \(n, d_in=4\), got \(3, 7\)"),
    "one sample without n": ((torch.ones(4), Y), ValueError, r"shape \(n, d_in=4\), got \(4,\)"),
    "image without flatten": ((torch.ones(3, 2, 2), Y), ValueError, r"got \(3, 2, 2\) \(the model has no Flatten"),
    "empty": ((X[:0], Y[:0]), ValueError, r"batch inputs must hold at least one sample, got 0"),
    "targets missing": ((X, Y[:2]), ValueError, r"one entry for each of n=3 inputs, got shape \(2,\)"),
    "scalar target": ((X, Y[0]), ValueError, r"one entry for each of n=3 inputs, got shape \(\)"),
    "NaN": ((X * torch.nan, Y), ValueError, r"batch inputs must be finite, got NaN or Inf"),
    "Inf": ((X * torch.inf, Y), ValueError, r"batch inputs must be finite, got NaN or Inf"),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batches_are_refused(name: str) -> None:
    batch, error, text = BAD_BATCHES[name]
    with pytest.raises(error, match=text):
        check_batch(read_chain(plain()), batch)  # type: ignore[arg-type]


def test_batch_is_returned_detached_and_unflattened_where_flat() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    flat, targets = check_batch(read_chain(plain()), [x, Y])
    assert targets.data_ptr() == Y.data_ptr()
    assert not flat.requires_grad
    assert flat.data_ptr() == x.data_ptr()
