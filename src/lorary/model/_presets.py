"""Target presets: the layers of a model that `all-linear`, `attention`, `mlp` and the others stand for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from lorary.layers.fused_qkv import FUSED, KEYS, VALUES
from lorary.model.scan import Scan, ScannedModule

_Q = {"q", "q_proj", "query", "query_proj", "q_lin", "wq", "to_q"}
_OUT = {"o", "o_proj", "out_proj", "out_lin", "to_out", "o_lin"}
_AMBIGUOUS = {"dense", "c_proj", "proj", "Wo"}  # of attention or of an MLP, as the rest of the path says
_MLP = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "fc_in", "fc_out", "c_fc", "wi", "wi_0"}
_MLP |= {"wi_1", "wo", "w1", "w2", "w3", "lin1", "lin2", "dense_h_to_4h", "dense_4h_to_h", "ff_proj", "ff_out", "Wi"}
_MLP_PARENTS = {"mlp", "ffn", "intermediate", "output", "feed_forward", "ff"}
_ATTENTION_PARENT = re.compile(
    r"^(attn|attention|self_attn|self_attention|selfattention|cross_attn|crossattention|"
    r"encoder_attn|encdecattention|mha|to_out|attn\d)$",
    re.IGNORECASE,
)


def _in_attention(path: Sequence[str]) -> bool:
    return any(_ATTENTION_PARENT.match(component) for component in path)


def _is_linear(m: ScannedModule) -> bool:
    return m.kind in ("linear", "transposed")


def _is_attention(m: ScannedModule) -> bool:
    *path, last = m.path.split(".")
    if not _is_linear(m):
        return False
    return last in _Q | KEYS | VALUES | FUSED | _OUT or (last in _AMBIGUOUS | {"0"} and _in_attention(path))


def _is_mlp(m: ScannedModule) -> bool:
    *path, last = m.path.split(".")
    if not _is_linear(m) or _in_attention(path):
        return False
    return last in _MLP or (last in _AMBIGUOUS and not _MLP_PARENTS.isdisjoint(path))


PRESETS: dict[str, Callable[[ScannedModule], bool]] = {
    "all-linear": _is_linear,
    "attention": _is_attention,
    "attention-qv": lambda m: _is_linear(m) and m.path.rpartition(".")[2] in _Q | VALUES | FUSED,
    "attention-kv": lambda m: _is_linear(m) and m.path.rpartition(".")[2] in KEYS | VALUES | FUSED,
    "mlp": _is_mlp,
    "embedding": lambda m: m.kind == "embedding",
    "conv": lambda m: (m.kind or "").startswith("conv"),
}
LINEAR_PRESETS = {"all-linear", "mlp", "attention", "attention-qv", "attention-kv"}
# preset -> the projections of a fused weight that it takes
PROJECTIONS = {"attention": "qkv", "attention-qv": "qv", "attention-kv": "kv"}


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
