"""Target presets: the layers of a model that `all-linear`, `attention`, `mlp` and the others stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lorary.layers import block_names
from lorary.model.scan import Scan, ScannedModule
from lorary.model.towers import LINEAR_KINDS, TOWERS, tower_of, tower_roots

Fits = Callable[[ScannedModule], bool]


def _linear(named: Callable[[str], bool]) -> Callable[[Scan], Fits]:
    """Whether a module is a linear layer with such a path, or such a matrix of all experts."""
    return lambda scan: lambda m: m.kind in LINEAR_KINDS and named(m.path)


def _in_tower(tower: str) -> Callable[[Scan], Fits]:
    """Whether a module is a linear layer of a tower, or a matrix of its experts."""

    def of(scan: Scan) -> Fits:
        roots = tower_roots(scan)
        return _linear(lambda path: tower_of(path, roots, scan.heads) == tower)(scan)

    return of


PRESETS: dict[str, Callable[[Scan], Fits]] = {
    **{preset: _linear(named) for preset, named in block_names.TARGETS.items()},
    "embedding": lambda scan: lambda m: m.kind == "embedding",
    "conv": lambda scan: lambda m: (m.kind or "").startswith("conv"),
    "vocabulary": lambda scan: lambda m: m.kind in ("embedding", "linear"),
    **{tower: _in_tower(tower) for tower in TOWERS},
}
LINEAR_PRESETS = {*block_names.TARGETS, *TOWERS}
# preset -> the parts of a fused weight that it stands for
PARTS = {"attention": "qkv", "attention-qv": "qv", "attention-kv": "kv"}


def layers_of_preset(scan: Scan, preset: str) -> list[ScannedModule]:
    """The layers that a preset stands for, adaptable or not, under their own names or their wrappers'."""
    heads = scan.heads if preset in LINEAR_PRESETS else ()
    fits = PRESETS[preset](scan)
    chosen = []
    for path, m in scan.modules.items():
        wrapper = scan.wrapper_of(path)
        named = [m] if wrapper is None else [m, dataclasses.replace(m, path=wrapper)]
        if path and path not in heads and any(fits(name) for name in named):
            chosen.append(m)
    if preset == "vocabulary":
        return _vocabulary(scan, chosen)
    return _token_tables(scan.model, chosen) if preset == "embedding" else chosen


def _vocabulary(scan: Scan, chosen: list[ScannedModule]) -> list[ScannedModule]:
    """The layers with a row for each token: the embeddings of token ids and the language model's head."""
    model: Any = scan.model
    tables = _token_tables(model, [m for m in chosen if m.kind == "embedding"])
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [m for m in chosen if m in tables or m.module is head]


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
