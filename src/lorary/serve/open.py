"""The engine for a base: the base is loaded, and the way to compute it is chosen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from typing import Any

from lorary.layers.rope import max_context, text_config
from lorary.serve.engine import Engine

logger = logging.getLogger(__name__)


def open_engine(
    base: str = "builtin:base",
    adapters: Mapping[str, str | PathLike[str]] | None = None,
    *,
    dtype: str = "auto",
) -> Engine:
    """The engine for a base with adapters; it is not started.

    Args:
        base: builtin:base, a model folder or a Hub id.
        adapters: name -> folder.
        dtype: of the base.

    Raises:
        LoraryError: the base cannot be loaded, or an adapter cannot be served.

    Example:
        >>> engine = open_engine("builtin:base", {"summaries": "out/"})
        >>> engine.start()
    """
    from lorary.model.loading.from_pretrained import load_model, load_tokenizer
    from lorary.model.loading.source import ModelSection

    section = ModelSection.of(base, dtype=dtype)
    model: Any = load_model(section)
    engine = engine_of(model, load_tokenizer(section), base)
    for name, folder in (adapters or {}).items():
        engine.load(name, str(folder))
    return engine


def engine_of(model: Any, tokenizer: Any, name: str) -> Engine:
    """The engine for a base in memory; it is not started.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        name: as requests call it.
    """
    from lorary.serve.batching import BatchingEngine
    from lorary.serve.continuous import PagedRunner
    from lorary.serve.layers import ServedLayers
    from lorary.serve.store import AllInMemory

    layers = ServedLayers(model)
    runner = PagedRunner(model, layers, pages=512)
    ends = model.generation_config.eos_token_id
    return BatchingEngine(
        tokenizer,
        name,
        runner,
        layers,
        AllInMemory(model),
        ends={ends} if isinstance(ends, int) else set(ends or ()),
        max_context=max_context(text_config(model)),
    )
