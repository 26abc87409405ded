"""A small Transformer of one's own under AdamW, in the eigenbasis of its gradients: one line before the loop.

    pip install . && python examples/transformer.py

The model is written in the manner of nanoGPT, so its stream and its heads are declared by the names of its modules. The
text is the bytes of Python's own sources. It takes a minute.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import nn

import symtele_cuda as st

WIDTH, HEADS, CONTEXT, STEPS, RATE = 64, 2, 64, 150, 6e-3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.n_head = HEADS  # by which find_sites knows the heads of qkv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def run(rotated: bool, steps: int = STEPS) -> float:
    """The mean loss of the last ten steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(128, WIDTH), Block(), Block(), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 128))
    stream = st.Stream(writers=["0", "1.proj", "1.down", "2.proj", "2.down"], norms={
        "*.norm1": ["*.qkv"], "*.norm2": ["*.up"], "3": ["4"],
    })  # fmt: skip
    st.fold_norms(model, streams=[stream])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE)
    if rotated:
        st.EigenbasisTeleporter(model, optimizer, sites=[stream, *st.find_sites(model)])
    text, losses = torch.tensor(list(inspect.getsource(torch.nn.functional).encode("ascii", "ignore"))), []
    for _ in range(steps):
        pieces = text[torch.randint(len(text) - CONTEXT - 1, (16, 1)) + torch.arange(CONTEXT + 1)]
        loss = F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


if __name__ == "__main__":
    print(f"AdamW {run(False):.3f}, in the gradients' eigenbasis {run(True):.3f}")
