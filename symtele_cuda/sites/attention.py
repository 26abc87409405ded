"""The pairs of attention, of gated layers and of LoRA, found by the structure of the modules that people write.

Each shape of a module is one function. A pair that such a module looks like having and does not have is `Refused`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .declared import Declaration, LinearPair, QueryKey, Scales

ROTARY = "rotary positions leave queries and keys only rotations and scales of each plane"
NORMED = "queries and keys are normalised one by one"


@dataclass(frozen=True)
class Refused:
    """A place of a model that might be a site, and why it is none."""

    where: str
    reason: str


Found = Iterator[Declaration | Refused]


def pairs_of_attention(model: nn.Module) -> Found:
    """Value and output, query and key of all attention modules; the factors of LoRA; torch's feed-forward layers."""
    rotary = any("rotary" in type(module).__name__.lower() for module in model.modules())
    for where, module in model.named_modules():
        name = f"{where}." if where else ""
        if isinstance(module, nn.MultiheadAttention):
            yield from _of_torch(name, module)
        elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            yield from _of_feed_forward(name, module)
        elif _has(module, "q_proj", "k_proj", "v_proj"):
            yield from _of_projections(name, module, rotary)
        elif _has(module, "c_attn", "c_proj") or _has(module, "qkv", "proj"):
            yield from _of_packed(name, module, *(("c_attn", "c_proj") if _has(module, "c_attn") else ("qkv", "proj")))
        elif _has(module, "self", "output") and _has(module.self, "query", "key", "value"):
            yield from _of_bert(name, module.self)
        elif _has(module, "lora_A", "lora_B"):
            for adapter in module.lora_A:
                yield LinearPair(f"{name}lora_A.{adapter}", f"{name}lora_B.{adapter}")


# Of each function below, `name` is what the names of the module's children begin with.


def _of_torch(name: str, module: nn.MultiheadAttention) -> Found:
    if module.bias_k is not None:
        yield Refused(_place(name), "bias_k and bias_v are one more key and value")
        return
    if module.in_proj_weight is None:
        yield Refused(_place(name), "kdim or vdim give queries, keys and values weights of their own")
        return
    yield LinearPair(f"{name}in_proj[2/3]", f"{name}out_proj", module.num_heads)
    yield QueryKey(f"{name}in_proj[0/3]", f"{name}in_proj[1/3]", module.num_heads)


def _of_feed_forward(name: str, module: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> Found:
    activation = module.activation
    if getattr(activation, "__name__", "") == "relu" or isinstance(activation, (nn.ReLU, nn.LeakyReLU)):
        yield Scales(f"{name}linear1", f"{name}linear2")


def _of_projections(name: str, module: nn.Module, rotary: bool) -> Found:
    output = next((which for which in ("o_proj", "out_proj") if _has(module, which)), None)
    width = getattr(module, "head_dim", None)
    keys = getattr(module.k_proj, "out_features", None)
    if output is None or not isinstance(width, int) or not isinstance(keys, int):
        yield Refused(_place(name), "its heads are not known: declare its pairs")
        return
    yield LinearPair(f"{name}v_proj", f"{name}{output}", keys // width)
    if _has(module, "q_norm") or _has(module, "k_norm"):
        yield Refused(f"{_place(name)}, query and key", NORMED)
    elif rotary:
        yield Refused(f"{_place(name)}, query and key", ROTARY)
    else:
        yield QueryKey(f"{name}q_proj", f"{name}k_proj", keys // width)


def _of_packed(name: str, module: nn.Module, packed: str, output: str) -> Found:
    heads = next((h for h in (getattr(module, n, None) for n in ("num_heads", "n_head")) if isinstance(h, int)), None)
    if heads is None or getattr(module, "is_cross_attention", False):
        yield Refused(_place(name), "its heads are not known: declare its pairs")
        return
    yield LinearPair(f"{name}{packed}[2/3]", f"{name}{output}", heads)
    if any(_has(module, norm) and not isinstance(getattr(module, norm), nn.Identity) for norm in ("q_norm", "k_norm")):
        yield Refused(f"{_place(name)}, query and key", NORMED)
    else:
        yield QueryKey(f"{name}{packed}[0/3]", f"{name}{packed}[1/3]", heads)


def _of_bert(name: str, attention: nn.Module) -> Found:
    heads = int(attention.num_attention_heads)  # type: ignore[arg-type]  # modules answer any name
    yield LinearPair(f"{name}self.value", f"{name}output.dense", heads)
    yield QueryKey(f"{name}self.query", f"{name}self.key", heads)


def _place(name: str) -> str:
    return name.removesuffix(".") or "the model"


def _has(module: nn.Module, *children: str) -> bool:
    return all(isinstance(getattr(module, child, None), nn.Module) for child in children)
