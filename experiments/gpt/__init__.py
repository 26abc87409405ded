"""A small Transformer on text that every machine has: AdamW, and what rotations and other optimizers make of it."""
