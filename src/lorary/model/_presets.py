"""Target presets: the layers of a model that `all-linear`, `attention`, `mlp` and the others stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lorary.layers import block_names
from lorary.model.scan import Scan, ScannedModule


def _linear(named: Callable[[str], bool]) -> Callable[[ScannedModule], bool]:
    """Whether a module is a linear layer with such a path, or such a matrix of all experts."""
    return lambda m: m.kind in ("linear", "transposed", "experts") and named(m.path)


PRESETS: dict[str, Callable[[ScannedModule], bool]] = {
    **{preset: _linear(named) for preset, named in block_names.TARGETS.items()},
    "embedding": lambda m: m.kind == "embedding",
    "conv": lambda m: (m.kind or "").startswith("conv"),
}
LINEAR_PRESETS = block_names.TARGETS.keys()
# preset -> the parts of a fused weight that it stands for
PARTS = {"attention": "qkv", "attention-qv": "qv", "attention-kv": "kv"}


def layers_of_preset(scan: Scan, preset: str) -> list[ScannedModule]:
    """The layers that a preset stands for, adaptable or not, under their own names or their wrappers'."""
    heads = scan.heads if preset in LINEAR_PRESETS else ()
    fits = PRESETS[preset]
    chosen = []
    for path, m in scan.modules.items():
        wrapper = scan.wrapper_of(path)
        named = [m] if wrapper is None else [m, dataclasses.replace(m, path=wrapper)]
        if path and path not in heads and any(fits(name) for name in named):
            chosen.append(m)
    return _token_tables(scan.model, chosen) if preset == "embedding" else chosen


def _token_tables(model: Any, chosen: list[ScannedModule]) -> list[ScannedModule]:
    """The embeddings of token ids, without those of positions and token types."""
    try:
        tokens = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return chosen
    # encoder and decoder may look tokens up in two modules, tied to the table that the model names
    W = getattr(tokens, "weight", None)
    tied = [m for m in chosen if m.module is not tokens and getattr(m.module, "weight", m) is W]
    return tied or [m for m in chosen if m.module is tokens] or chosen
