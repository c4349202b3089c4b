"""Training on a base that Transformers has packed: what it and TRL would do about that is not for our adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_FLAGS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


@contextmanager
def taken_for_plain(model: nn.Module) -> Iterator[None]:
    """Within, a packed base is taken for a plain one.

    Transformers refuses to train a packed model without PEFT's adapters, and these are others; TRL rounds what trains
    to bfloat16, in which small steps are lost.
    """
    hidden = {flag: vars(model).pop(flag) for flag in _FLAGS if flag in vars(model)}
    try:
        yield
    finally:
        vars(model).update(hidden)
