"""Trainers on a quantised base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_FLAGS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


@contextmanager
def hide_quantization(model: nn.Module) -> Iterator[None]:
    """A context in which Transformers and TRL take a quantised base for a plain one.

    Transformers refuses to train a quantised model without PEFT's adapters, and TRL rounds trainable parameters to
    bfloat16, which loses small steps.
    """
    hidden = {flag: vars(model).pop(flag) for flag in _FLAGS if flag in vars(model)}
    try:
        yield
    finally:
        vars(model).update(hidden)
