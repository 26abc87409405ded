"""Low-rank adapters of peft: one teleport balances their two factors, and the network computes what it did.

    pip install . transformers peft && python examples/lora.py

A and B of an adapter are a pair: A → g A, B → B g⁻¹ for any invertible g. At the start B is zero, so it is trained a
little first.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import symtele_cuda as st


def loss_fn(outputs: dict[str, Tensor], tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs["logits"][:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def run() -> tuple[st.TeleportReport, float]:
    """The report of the teleport, and by how much the logits of other tokens have changed."""
    torch.manual_seed(0)
    llama = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    model = get_peft_model(LlamaForCausalLM(llama), LoraConfig(r=8))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(10):
        tokens = torch.randint(64, (8, 16))
        optimizer.zero_grad()
        loss_fn(model(tokens), tokens).backward()
        optimizer.step()
    print(st.find_sites(model))
    others = torch.randint(64, (8, 16))
    before = model(others)["logits"].detach()
    report = st.teleport(model, (tokens, tokens), loss_fn, optimizer=optimizer)
    change = (model(others)["logits"].detach() - before).norm() / before.norm()
    return report, float(change)


if __name__ == "__main__":
    report, change = run()
    print(report)
    print(f"the logits of other tokens changed by {change:.1e} of their norm")
