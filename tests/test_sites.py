"""Sites of the models that people have: what is found, that it is exact on every input, what is refused and why."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import snapshot, unchanged
from teleports import UNBOUNDED
from torch import Tensor, nn

import symtele_cuda as st
from symtele_cuda.sites import resolve
from symtele_cuda.sites.action import GL, ORTHOGONAL, POSITIVE_DIAGONAL
from symtele_cuda.sites.exactness import change_of, floating_outputs

TOKENS = torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


def gpt2(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the models of transformers are needed")
    config = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=31, n_positions=8, **options)
    return transformers.GPT2LMHeadModel(config)


def llama(key_heads: int = 2, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the models of transformers are needed")
    heads = {"num_attention_heads": 4, "num_key_value_heads": key_heads}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=31, **SIZES, **heads, **options))


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the models of transformers are needed")
    config = transformers.ViTConfig(num_attention_heads=2, image_size=8, patch_size=4, **SIZES)
    return transformers.ViTForImageClassification(config)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the models of transformers are needed")
    config = transformers.BertConfig(num_attention_heads=2, vocab_size=31, **SIZES)
    return transformers.BertForSequenceClassification(config)


def lora() -> nn.Module:
    peft = pytest.importorskip("peft", reason="its low-rank layers are needed")
    return peft.get_peft_model(llama(), peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))


class Convolutions(nn.Module):
    """Scales pass a batch normalisation, pooling, flattening and a square."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.pool, self.third = nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), nn.Conv2d(6, 5, 1)
        self.fourth, self.last = nn.Linear(5 * 3 * 3, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = F.leaky_relu(self.third(self.pool(self.second(x).relu())))
        return self.last(torch.relu(self.fourth(x.flatten(1))) ** 2)


class Gated(nn.Module):
    """SwiGLU, and a decoder layer of torch's with its two attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 24, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.decoder(x, x.flip(1))


class PreNorm(nn.Module):
    """An encoder of torch's between an embedding and a head: a stream that no family knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Linear(5, 16), nn.Linear(16, 3)
        layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)))


PRE_NORM = st.Stream(
    writers=["embedding", "encoder.layers.*.self_attn.out_proj", "encoder.layers.*.linear2"],
    norms={
        "encoder.layers.*.norm1": ["encoder.layers.*.self_attn.in_proj"],
        "encoder.layers.*.norm2": ["encoder.layers.*.linear1"],
        "encoder.norm": ["head"],
    },
)


def images(size: int, channels: int) -> Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Case:
    """A model, an input, the sites it has by kind and group, and what makes its norms let a rotation pass."""

    make: Callable[[], nn.Module]
    x: Tensor
    sites: dict[tuple[str, str], int]
    prepare: Callable[[nn.Module], None] | None = None
    declared: tuple[Any, ...] = ()


PAIR, QUERY_KEY, SCALES, STREAM = (
    ("LinearPair", GL),
    ("QueryKey", GL),
    ("Scales", POSITIVE_DIAGONAL),
    ("Stream", ORTHOGONAL),
)
CASES = {
    "chain": Case(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.Linear(6, 7)),
        vectors(3, 4),
        {SCALES: 1, PAIR: 1},
    ),
    "convolutions": Case(Convolutions, images(8, 1), {SCALES: 4}),
    "gated": Case(Gated, vectors(2, 5, 16), {SCALES: 2, PAIR: 2, QUERY_KEY: 2}),
    "encoder": Case(
        PreNorm,
        vectors(2, 4, 5),
        {SCALES: 2, PAIR: 2, QUERY_KEY: 2, STREAM: 1},
        lambda model: st.convert_layernorm(model, streams=[PRE_NORM]),
        (PRE_NORM,),
    ),
    "GPT-2": Case(
        lambda: gpt2(tie_word_embeddings=False), TOKENS, {PAIR: 2, QUERY_KEY: 2, STREAM: 1}, st.convert_layernorm
    ),
    "Llama": Case(llama, TOKENS, {PAIR: 2, SCALES: 2, STREAM: 1}, st.fold_norms),
    "Llama, one key head": Case(lambda: llama(1), TOKENS, {PAIR: 2, SCALES: 2, STREAM: 1}, st.fold_norms),
    "ViT": Case(vit, images(8, 3), {PAIR: 2, QUERY_KEY: 2, STREAM: 1}, st.convert_layernorm),
    "BERT": Case(bert, TOKENS, {PAIR: 2, QUERY_KEY: 2}),
    "LoRA": Case(lora, TOKENS, {PAIR: 4}),
}


def make(case: Case, dtype: torch.dtype = torch.float64, *, prepared: bool = True) -> nn.Module:
    """The case's model with all parameters random, biases and gains too."""
    torch.manual_seed(0)
    model = case.make().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if prepared and case.prepare is not None:
        case.prepare(model)
    return model


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return [t.clone() for t in floating_outputs(model(x.to(dtype) if x.is_floating_point() else x))]


def element(site: st.Site, parameters: dict[str, Tensor], seed: int, near: float) -> Tensor:
    identity = site.identity(parameters)
    noise = near * torch.randn(identity.shape, generator=torch.Generator().manual_seed(seed)).to(identity)
    if site.group == POSITIVE_DIAGONAL:
        return noise.exp()
    if site.group == ORTHOGONAL:
        return torch.linalg.matrix_exp(noise - noise.mT)
    return identity + noise / site.units**0.5


@torch.no_grad()
def move(model: nn.Module, sites: list[st.Site], seed: int, near: float = 0.3) -> None:
    parameters = dict(model.named_parameters())
    for place, site in enumerate(sites):
        values = {name: parameter.detach() for name, parameter in parameters.items()}
        for name, value in site.act(values, element(site, values, 1000 * seed + place, near)).items():
            parameters[name].copy_(value)


def own_norms(name: str) -> float:
    """How precise the outputs are at best: the norms of transformers' Llama compute in float32."""
    return 1e-6 if name.startswith("Llama") else 1e-12


def sites_of(model: nn.Module, case: Case) -> list[st.Site]:
    return resolve(model, [*st.find_sites(model), *case.declared])


# --- what is found, and that it is exact ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_sites_of_a_model_are_found(name):
    case = CASES[name]
    sites = sites_of(make(case), case)
    kinds = [(site.kind, site.group) for site in sites]
    assert {kind: kinds.count(kind) for kind in kinds} == case.sites


@pytest.mark.parametrize("name", CASES)
def test_each_site_keeps_the_outputs_on_every_input(name):
    case = CASES[name]
    model = make(case)
    before = outputs(model, case.x)
    for place, site in enumerate(sites_of(model, case)):
        moved, weights = copy.deepcopy(model), snapshot(model)
        move(moved, [site], place + 1)
        assert not unchanged(moved, weights)
        assert change_of(before, outputs(moved, case.x)) <= own_norms(name), site


@pytest.mark.parametrize("name", CASES)
def test_a_hundred_teleports_in_a_row_keep_them(name):
    case = CASES[name]
    for dtype, tolerance in ((torch.float64, own_norms(name)), (torch.float32, 1e-5)):
        model = make(case, dtype)
        before, sites = outputs(model, case.x), sites_of(model, case)
        for seed in range(100):
            move(model, sites, seed, near=0.03)
        assert change_of(before, outputs(model, case.x)) <= tolerance, dtype


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.prepare is not None])
def test_folding_and_converting_norms_keeps_the_outputs(name):
    case = CASES[name]
    model = make(case, prepared=False)
    before = outputs(model, case.x)
    case.prepare(model)
    assert change_of(before, outputs(model, case.x)) <= own_norms(name)
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    gains = [p for n, p in model.named_parameters() if "norm" in n or "ln_" in n]
    assert gains and all(not gain.requires_grad and bool((gain == 1).all()) for gain in gains)
    again = snapshot(model)
    st.fold_norms(model, streams=case.declared or None)
    assert unchanged(model, again)


def test_tied_embeddings_rotate_once():
    model = llama(tie_word_embeddings=True).double().eval()
    st.fold_norms(model)
    before = outputs(model, TOKENS)
    (stream,) = (site for site in st.find_sites(model) if site.kind == "Stream")
    assert [axis.name for axis in stream.axes].count("model.embed_tokens.weight") == 1
    move(model, [stream], 1)
    assert change_of(before, outputs(model, TOKENS)) <= 1e-6
    model = gpt2().double().eval()
    before = outputs(model, TOKENS)
    st.convert_layernorm(model)
    assert change_of(before, outputs(model, TOKENS)) <= 1e-12


# --- one teleport -----------------------------------------------------------------------------------------------------


def batch_of(case: Case, model: nn.Module) -> tuple[Any, Callable[[Any, Tensor], Tensor]]:
    """A batch of the case's kind of input, and a loss of its outputs."""
    generator = torch.Generator().manual_seed(5)
    if case.x.is_floating_point():
        x = torch.randn(case.x.shape, generator=generator).to(next(model.parameters()).dtype)
    else:
        x = torch.randint(31, case.x.shape, generator=generator)
    wanted = [torch.randn(t.shape, generator=generator).to(t) for t in outputs(model, x)]

    def loss_fn(out: Any, y: Tensor) -> Tensor:
        return F.mse_loss(floating_outputs(out)[0], y)

    return (x, wanted[0]), loss_fn


@pytest.mark.parametrize("name", CASES)
def test_a_teleport_doubles_the_gradient_and_keeps_the_outputs_on_other_inputs(name):
    case = CASES[name]
    model = make(case)
    before, (batch, loss_fn) = outputs(model, case.x), batch_of(case, model)
    method = st.Ascent(max_growth=2.0, steps=30, first_radius=0.1)
    report = st.teleport(model, batch, loss_fn, method=method, guards=UNBOUNDED)
    assert report.accepted and report.grad_norm_before < report.grad_norm_after <= 2.0 * report.grad_norm_before
    assert report.grad_norm_after > 1.5 * report.grad_norm_before or name == "LoRA"
    assert change_of(before, outputs(model, case.x)) <= own_norms(name)
    loss = loss_fn(model(batch[0]), batch[1])
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    norm = torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt()
    assert report.grad_norm_after == pytest.approx(norm.item(), rel=1e-6)


def test_a_16_bit_model_is_rounded_once():
    model = make(CASES["gated"], torch.bfloat16)
    x = CASES["gated"].x.bfloat16()
    batch, loss_fn = batch_of(CASES["gated"], model)
    exact = copy.deepcopy(model).float()
    before = outputs(exact, x)
    report = st.teleport(model, batch, loss_fn, guards=replace(UNBOUNDED, drift_tol=0.1))
    assert report.accepted and next(model.parameters()).dtype == torch.bfloat16
    assert change_of(before, outputs(copy.deepcopy(model).float(), x)) <= 0.03


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
def test_the_optimizer_s_state_moves_as_gradients_do(kind):
    torch.manual_seed(0)
    model = CASES["chain"].make().double()
    (x, y), loss_fn = batch_of(CASES["chain"], model)
    optimizer = kind(model.parameters(), 0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    loss_fn(model(x), y).backward()
    optimizer.step()
    up, down = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    old = {name: optimizer.state[p] for name, p in model.named_parameters()}
    old = {name: {kind: v.clone() for kind, v in state.items() if torch.is_tensor(v)} for name, state in old.items()}
    report = st.teleport(
        model, (x, y), loss_fn, sites=[st.Scales("0", "2")], optimizer=optimizer, method=st.Ascent(), guards=UNBOUNDED
    )
    scale = (model[0].weight[:, :1] / up[:, :1]).detach()
    assert report.accepted and not torch.allclose(scale, torch.ones_like(scale), atol=1e-3)
    torch.testing.assert_close(model[2].weight.detach(), down / scale.T, rtol=1e-12, atol=0)
    powers = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "square_avg": 2, "sum": 2}
    moved = 0
    for kind_of_state, power in powers.items():
        if kind_of_state in old["0.weight"]:
            got = [optimizer.state[model[place].weight][kind_of_state] for place in (0, 2)]
            torch.testing.assert_close(got[0], old["0.weight"][kind_of_state] / scale**power, rtol=1e-12, atol=0)
            torch.testing.assert_close(got[1], old["2.weight"][kind_of_state] * scale.T**power, rtol=1e-12, atol=0)
            moved += 1
    assert moved == (2 if kind is torch.optim.Adam else 1)


# --- refusals ---------------------------------------------------------------------------------------------------------


def said(model: nn.Module) -> str:
    return str(st.find_sites(model))


def test_what_is_no_site_says_why():
    assert "rotary positions leave queries and keys only rotations" in said(llama())
    assert "has gains that train or differ: fold_norms(model)" in said(llama())
    assert "is a LayerNorm: convert_layernorm(model)" in said(gpt2())
    assert "a norm behind the sum is the stream itself" in said(bert())
    assert "which is frozen" in said(lora())
    assert "a norm behind the sum" in said(nn.TransformerEncoderLayer(16, 2))
    shared = nn.Linear(6, 6)
    assert len(st.find_sites(nn.Sequential(shared, nn.ReLU(), shared))) == 0
    tied = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6))
    tied[4].weight = tied[0].weight
    assert "it would change '0.weight', which other modules share" in said(tied)


class Normed(nn.Module):
    """Attention with norms on queries and keys, and with rotary positions or none."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.q_norm, self.k_norm, self.head_dim = nn.RMSNorm(4), nn.RMSNorm(4), 4

    def forward(self, x: Tensor) -> Tensor:
        heads = [f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)]
        mixed = F.scaled_dot_product_attention(self.q_norm(heads[0]), self.k_norm(heads[1]), heads[2])
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def test_normed_queries_are_no_pair_and_values_are():
    model = Normed()
    assert [site.kind for site in st.find_sites(model)] == ["LinearPair"]
    assert "queries and keys are normalised one by one" in said(model)


X = vectors(6, 4)
WRONG: dict[str, tuple[list[Any], type[Exception], str]] = {
    "rotations alone": ([st.Stream(["0"], ["2"])], ValueError, "one width a stream, got readers and writers of"),
    "heads": ([st.LinearPair("2", "3", heads=4)], ValueError, r"heads must divide the 6 outputs of '2', got 4"),
    "no module": ([st.Scales("0", "nothing")], ValueError, "got 'nothing', which fits none"),
    "no layer": ([st.Scales("0", "1")], ValueError, "got '1', a ReLU, for inputs"),
    "sizes": ([st.Scales("0", "3")], ValueError, "sides of one size, got 5 and 6 units"),
    "stars": ([st.Scales("0", "*")], ValueError, "as many stars in every name"),
    "part": ([st.LinearPair("2[1/4]", "3")], ValueError, "part i of n equal ones"),
    "no symmetry": ([st.LinearPair("0", "2")], st.TeleportError, r"LinearPair of 0.weight.*changes the outputs by"),
    "overlap": ([st.LinearPair("2", "3"), st.Scales("2", "3")], ValueError, "must not overlap, got LinearPair and Sc"),
    "units": ([st.Site("mine", GL, (st.Axis("0.weight", 0),), 7)], ValueError, "must fit the parameters, got mine"),
    "dimension": ([st.Site("mine", GL, (st.Axis("0.bias", 1),), 5)], ValueError, "must fit the parameters"),
    "class": ([st.Scales], TypeError, "sites must be Sites, or declare them .*, got type"),
    "power": ([st.Scales("0", "2", power=2)], st.TeleportError, "Scales of .* changes the outputs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sites_are_named_and_nothing_changes(name):
    sites, error, text = WRONG[name]
    torch.manual_seed(0)
    model = CASES["chain"].make()
    before = snapshot(model)
    with pytest.raises(error, match=text):
        st.teleport(model, (X, torch.randint(7, (6,))), sites=sites)
    assert unchanged(model, before)


def test_rotations_alone_are_for_another_method():
    model = make(CASES["encoder"], torch.float32)
    batch, loss_fn = batch_of(CASES["encoder"], model)
    with pytest.raises(st.TeleportError, match="got rotations alone: EigenbasisTeleporter is for these"):
        st.teleport(model, batch, loss_fn, sites=[PRE_NORM])


def test_a_frozen_half_a_missing_parameter_and_an_unknown_state_are_refused():
    model = CASES["chain"].make()
    optimizer = torch.optim.SGD([model[0].weight], 0.1)
    batch = X, torch.randint(7, (6,))
    with pytest.raises(ValueError, match="optimizer must hold all trainable parameters of the model"):
        st.teleport(model, batch, optimizer=optimizer)
    optimizer = torch.optim.Adadelta(model.parameters())
    F.cross_entropy(model(X), batch[1]).backward()
    optimizer.step()
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(st.TeleportError, match=r"expected a state that can be moved, .* got 'acc_delta' of a Adadelta"):
        st.teleport(model, batch, optimizer=optimizer)
    assert unchanged(model, before) and str(optimizer.state_dict()) == str(state)
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"must name trainable parameters of the model, got \['2.weight'\]"):
        st.teleport(model, batch, sites=[st.Scales("0", "2")])


@pytest.mark.parametrize("act", [st.fold_norms, st.convert_layernorm])
def test_norms_that_cannot_be_folded_are_named_and_nothing_changes(act):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        act("model")
    with pytest.raises(st.TeleportError, match="of no family that is known"):
        act(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="streams must be Streams, got str"):
        act(nn.Linear(3, 3), streams=["stream"])
    model = make(CASES["encoder"], prepared=False)
    wrong = replace(PRE_NORM, norms={"encoder.layers.*.self_attn": ["head"]})
    before = snapshot(model)
    with pytest.raises(st.TeleportError, match=r"expected (RMSNorms with gains|LayerNorms over one)"):
        act(model, streams=[wrong])
    assert unchanged(model, before)


def test_gains_before_a_tied_head_are_refused():
    for model, act in ((llama(tie_word_embeddings=True), st.fold_norms), (gpt2(), st.convert_layernorm)):
        norm = model.get_submodule("model.norm" if act is st.fold_norms else "transformer.ln_f")
        with torch.no_grad():
            norm.weight.mul_(torch.linspace(1, 2, 16))
        before, modules = snapshot(model), [*map(id, model.modules())]
        with pytest.raises(st.TeleportError, match=r"shares '.*' with another module.*a weight of its own first"):
            act(model)
        assert unchanged(model, before) and [*map(id, model.modules())] == modules


def test_the_table_names_kind_group_and_parameters():
    lines = str(st.find_sites(CASES["chain"].make())).splitlines()
    assert re.split(r"\s{2,}", lines[2]) == ["LinearPair", "GL(6)", "every input", "2.weight, 2.bias, 3.weight"]
