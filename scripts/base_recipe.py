"""What decides the built-in base, but for the machine and the versions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import LlamaConfig


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model, lengths of the training, rates of the optimizers."""

    vocabulary: int = 2048
    hidden: int = 192
    mlp: int = 576
    layers: int = 6
    heads: int = 6
    key_value_heads: int = 3
    context: int = 256  # tokens
    batch: int = 8  # windows of `context` tokens per optimizer step
    steps: int = 3200
    cycle: int = 1600  # steps of one warm-up and cosine; a further cycle starts at `again` of the first one's rate
    again: float = 0.6
    warmup: int = 100  # optimizer steps
    lr: float = 3e-3  # AdamW: the embedding and the norms
    matrix_lr: float = 0.02  # Muon: every other matrix
    weight_decay: float = 0.1
    momentum: float = 0.95
    clip: float = 1.0
    echoes: int = 2  # of a batch's windows, in the first third of the first cycle: a passage again and again
    chat_one_in: int = 4  # this share of the docstring pairs is learned as conversations: 2 % of all tokens
    seed: int = 0


def share_of_lr(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to zero; and once more from a lower peak for every further cycle."""
    cycles, step = divmod(step, recipe.cycle)
    peak = recipe.again**cycles
    if step < recipe.warmup:
        return peak * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.cycle - recipe.warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def config(recipe: Recipe) -> LlamaConfig:
    """The architecture: Llama with grouped queries and one matrix for the input and the output tokens."""
    return LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
