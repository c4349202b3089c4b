"""The configuration of a model whose tied weights got values of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


def untie_config(model: nn.Module) -> list[Any]:
    """Clear `tie_word_embeddings` in a model's configuration and in those of its parts; the changed configurations.

    Each part of a model that is one by itself, such as the text decoder of BLIP, ties its weights by its own.
    """
    tied = [part for part in _parts(getattr(model, "config", None)) if getattr(part, "tie_word_embeddings", False)]
    for part in tied:
        part.tie_word_embeddings = False
    return tied


def tie_config(configs: Iterable[Any]) -> None:
    """Undo `untie_config`."""
    for part in configs:
        part.tie_word_embeddings = True


def _parts(config: Any) -> Iterator[Any]:
    if config is not None:
        yield config
        for name in getattr(config, "sub_configs", ()):
            yield from _parts(getattr(config, name, None))
