"""A decoder-only Transformer with RMSNorm without gains, and the text that it learns: Python's standard library."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import symtele_cuda as st

SYMBOLS = 128
MOST_BYTES = 12_000_000
TRAINED_SHARE = 0.95


class Block(nn.Module):
    """Attention and two layers with ReLU² in between, each behind a norm and with a residual around it."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.q, self.k, self.v = (_linear(width, width, width**-0.5) for _ in range(3))
        self.o = _linear(width, width, (2 * layers * width) ** -0.5)
        self.up = _linear(width, 4 * width, width**-0.5)
        self.down = _linear(4 * width, width, (2 * layers * 4 * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x))).square())


def _linear(d_in: int, d_out: int, deviation: float) -> nn.Linear:
    linear = nn.Linear(d_in, d_out, bias=False)
    nn.init.normal_(linear.weight, 0.0, deviation)
    return linear


class GPT(nn.Module):
    """tokens (n×T), at most `context` of them in a row, to logits (n×T×SYMBOLS)."""

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(SYMBOLS, width), nn.Embedding(context, width)
        nn.init.normal_(self.embedding.weight, 0.0, 0.1)
        nn.init.normal_(self.positions.weight, 0.0, 0.03)
        self.blocks = nn.ModuleList(Block(width, heads, layers) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.head = _linear(width, SYMBOLS, 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def sites_of(model: GPT) -> list[st.Stream | st.LinearPair | st.QueryKey]:
    """Its stream, and the pairs of its heads."""
    heads = model.blocks[0].heads
    assert isinstance(heads, int)
    stream = st.Stream(
        readers=["blocks.*.q", "blocks.*.k", "blocks.*.v", "blocks.*.up", "head"],
        writers=["embedding", "positions", "blocks.*.o", "blocks.*.down"],
    )
    return [stream, st.LinearPair("blocks.*.v", "blocks.*.o", heads), st.QueryKey("blocks.*.q", "blocks.*.k", heads)]


@dataclass(frozen=True)
class Text:
    """Bytes below 128, to learn from and to validate on."""

    train: Tensor
    validation: Tensor

    @classmethod
    def of_standard_library(cls) -> Text:
        """The sources of Python's standard library without its tests, in a fixed random order of the files."""
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [path for path in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & {*path.parts}]
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
        content = b"".join(files[place].read_bytes() for place in order)[:MOST_BYTES]
        symbols = torch.tensor(bytearray(content), dtype=torch.uint8)
        symbols = symbols[symbols < SYMBOLS]
        count = int(TRAINED_SHARE * len(symbols))
        return cls(symbols[:count], symbols[count:])


def draw(text: Tensor, count: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` pieces of the text and each one's next symbols, (count×context) each."""
    starts = torch.randint(0, len(text) - context - 1, (count,), generator=generator)
    pieces = text[starts[:, None] + torch.arange(context + 1)].long()
    return pieces[:, :-1], pieces[:, 1:]
