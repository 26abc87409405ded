"""A Llama of transformers, trained from its configuration: gains folded, then AdamW in the gradients' eigenbasis.

    pip install . transformers && python examples/llama.py
"""

from __future__ import annotations

import inspect

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import symtele_cuda as st

STEPS, RATE = 100, 6e-3


def run(rotated: bool, steps: int = STEPS) -> float:
    """The mean loss of the last ten steps on the bytes of Python's own sources."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    st.fold_norms(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE)
    if rotated:
        st.EigenbasisTeleporter(model, optimizer)
    text, losses = torch.tensor(list(inspect.getsource(torch.nn.functional).encode("ascii", "ignore"))), []
    for _ in range(steps):
        batch = text[torch.randint(len(text) - 64, (16, 1)) + torch.arange(64)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


if __name__ == "__main__":
    print(f"AdamW {run(False):.3f}, in the gradients' eigenbasis {run(True):.3f}")
