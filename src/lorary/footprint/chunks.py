"""How many tokens the LM head takes at a time in training: what the loss is computed by, and its memory."""

from __future__ import annotations

LOGITS = 2**24
"""Logits per call of the head (64 MiB in fp32), unless that would be fewer than `TOKENS` tokens."""
TOKENS = 512
"""The least number of tokens per call. On a CPU smaller ones cost time: 64 instead of 512 tokens, +80 %."""


def chunk(vocabulary: int) -> int:
    """Tokens per call of the head."""
    return max(TOKENS, LOGITS // vocabulary)
