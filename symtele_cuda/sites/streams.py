"""Residual streams of the models that people use, by the names of their modules, and what keeps one from rotating."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from .attention import Refused
from .declared import Stream
from .names import ModelNames

_BLOCKS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = Stream(
    writers=("model.embed_tokens", "model.layers.*.self_attn.o_proj", "model.layers.*.mlp.down_proj"),
    norms={
        "model.layers.*.input_layernorm": tuple(f"model.layers.*.{name}" for name in _BLOCKS),
        "model.layers.*.post_attention_layernorm": ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"),
        "model.norm": ("lm_head",),
    },
)
GPT_2 = Stream(
    writers=(
        *("transformer.wte", "transformer.wpe"),
        *("transformer.h.*.attn.c_proj", "transformer.h.*.mlp.c_proj"),
    ),
    norms={
        "transformer.h.*.ln_1": ("transformer.h.*.attn.c_attn",),
        "transformer.h.*.ln_2": ("transformer.h.*.mlp.c_fc",),
        "transformer.ln_f": ("lm_head",),
    },
)
VIT = Stream(
    writers=(
        *("vit.embeddings.cls_token", "vit.embeddings.position_embeddings"),
        *("vit.embeddings.patch_embeddings.projection", "vit.layers.*.attention.o_proj", "vit.layers.*.mlp.fc2"),
    ),
    norms={
        "vit.layers.*.layernorm_before": tuple(f"vit.layers.*.attention.{name}_proj" for name in "qkv"),
        "vit.layers.*.layernorm_after": ("vit.layers.*.mlp.fc1",),
        "vit.layernorm": ("classifier",),
    },
)
TIMM_VIT = Stream(
    writers=("cls_token", "pos_embed", "patch_embed.proj", "blocks.*.attn.proj", "blocks.*.mlp.fc2"),
    norms={"blocks.*.norm1": ("blocks.*.attn.qkv",), "blocks.*.norm2": ("blocks.*.mlp.fc1",), "norm": ("head",)},
)
FAMILIES = (LLAMA, GPT_2, VIT, TIMM_VIT)
"""Each names all that reads and writes the stream; the model's own names may have more before them."""

POST_NORM = "a norm behind the sum is the stream itself, and its gains keep it from rotating"


def known_streams(names: ModelNames) -> list[Stream]:
    """The streams of the families that the model belongs to."""
    return [stream for family in FAMILIES for stream in _fitted(family, names)]


def _fitted(family: Stream, names: ModelNames) -> Iterator[Stream]:
    """The family's stream with what the model's names have before it, where all its names fit something."""
    first = next(iter(family.norms)).replace("*", "0")
    for name in names.modules:
        if name == first or name.endswith(f".{first}"):
            stream = _behind(family, name.removesuffix(first))
            try:
                names.names_of((*stream.writers, *stream.norms))
                names.names_of([reader for readers in stream.norms.values() for reader in readers])
            except ValueError:
                continue
            yield stream


def _behind(stream: Stream, prefix: str) -> Stream:
    norms = {f"{prefix}{norm}": tuple(f"{prefix}{one}" for one in readers) for norm, readers in stream.norms.items()}
    return replace(
        stream,
        readers=tuple(f"{prefix}{one}" for one in stream.readers),
        writers=tuple(f"{prefix}{one}" for one in stream.writers),
        norms=norms,
    )


def post_norms(model: nn.Module) -> Iterator[Refused]:
    """Blocks whose norms stand behind the sum."""
    for name, module in model.named_modules():
        first = isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) and not module.norm_first
        if first or type(module).__name__ in ("BertLayer", "RobertaLayer"):
            yield Refused(f"{name}, stream", POST_NORM)


def obstacle(norm: nn.Module, name: str) -> str | None:
    """Why a rotation does not pass this norm, or None."""
    if isinstance(norm, nn.LayerNorm):
        return f"{name!r} is a LayerNorm: convert_layernorm(model) makes RMSNorms of them"
    gain = gain_of(norm)
    if gain is None:
        return None if isinstance(norm, nn.RMSNorm) else f"{name!r}, a {type(norm).__name__}, is no RMSNorm with gains"
    if not is_rms_norm(norm, gain):
        return f"{name!r}, a {type(norm).__name__}, computes something else than an RMSNorm"
    if gain.requires_grad or not bool((gain == gain[0]).all()):
        return f"{name!r} has gains that train or differ: fold_norms(model) takes them out"
    return None


def gain_of(norm: nn.Module) -> nn.Parameter | None:
    gain = getattr(norm, "weight", None)
    return gain if isinstance(gain, nn.Parameter) and gain.dim() == 1 else None


@torch.no_grad()
def is_rms_norm(norm: nn.Module, gain: Tensor) -> bool:
    """Whether the module computes γ x / √(mean x² + ε), judged by one vector that is large against ε."""
    generator = torch.Generator().manual_seed(0)
    x = 100 * torch.randn(1, len(gain), generator=generator, dtype=torch.float64).to(gain.dtype).to(gain.device)
    expected = gain * x / x.square().mean().sqrt()
    return bool(torch.allclose(norm(x), expected, rtol=1e-2, atol=1e-2 * float(gain.abs().max())))
