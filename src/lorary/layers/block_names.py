"""The names of a transformer block's linear layers: which one a path means, without a look at the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lorary.layers.fused_qkv import FUSED

_PROJECTIONS = {
    "q": {"q", "q_proj", "query", "query_proj", "q_lin", "wq", "to_q", "q_proj_weight"},
    "k": {"k", "k_proj", "key", "key_proj", "k_lin", "wk", "to_k", "k_proj_weight"},
    "v": {"v", "v_proj", "value", "value_proj", "v_lin", "wv", "to_v", "v_proj_weight"},
}
_ATTENTION_OUTPUT = {"o", "o_proj", "out_proj", "out_lin", "to_out", "o_lin"}
_AMBIGUOUS = {"dense", "c_proj", "proj", "Wo"}  # of attention or of an MLP, as the rest of the path says
_MLP_OUTPUT = {"down_proj", "fc2", "fc_out", "wo", "w2", "lin2", "dense_4h_to_h", "ff_out"}
_MLP = _MLP_OUTPUT | {"gate_proj", "up_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "wi", "wi_0"}
_MLP |= {"wi_1", "w1", "w3", "lin1", "dense_h_to_4h", "ff_proj", "Wi"}
_MLP_PARENTS = {"mlp", "ffn", "intermediate", "output", "feed_forward", "ff"}
_ATTENTION_PARENT = re.compile(
    r"^(attn|attention|self_attn|self_attention|selfattention|cross_attn|crossattention|"
    r"encoder_attn|encdecattention|mha|to_out|attn\d)$",
    re.IGNORECASE,
)


def projects_to(parts: str) -> Callable[[str], bool]:
    """Whether a path is that of one of these projections, `"kv"` or others of q, k and v, or of a fused weight."""
    names = set().union(FUSED, *(_PROJECTIONS[part] for part in parts))
    return lambda path: _last(path) in names


def in_attention(path: str) -> bool:
    """Whether a path is that of a layer of attention."""
    return projects_to("qkv")(path) or ends_attention(path)


def ends_attention(path: str) -> bool:
    """Whether a path is that of attention's output projection."""
    last = _last(path)
    return last in _ATTENTION_OUTPUT or (last in _AMBIGUOUS | {"0"} and _inside_attention(_parents(path)))


def in_feed_forward(path: str) -> bool:
    """Whether a path is that of a layer of a feed-forward block.

    >>> in_feed_forward("layers.0.mlp.up_proj"), in_feed_forward("layers.0.attention.output.dense")
    (True, False)
    """
    last, parents = _last(path), _parents(path)
    if _inside_attention(parents):
        return False
    return last in _MLP or (last in _AMBIGUOUS and not _MLP_PARENTS.isdisjoint(parents))


def ends_feed_forward(path: str) -> bool:
    """Whether a path is that of the last layer of a feed-forward block.

    >>> ends_feed_forward("layer.0.output.dense"), ends_feed_forward("layer.0.intermediate.dense")
    (True, False)
    """
    last = _last(path)
    return in_feed_forward(path) and (
        last in _MLP_OUTPUT or (last in _AMBIGUOUS and "intermediate" not in _parents(path))
    )


# target preset -> whether it stands for the linear layer of a path
TARGETS: dict[str, Callable[[str], bool]] = {
    "all-linear": lambda path: True,
    "attention": in_attention,
    "attention-qv": projects_to("qv"),
    "attention-kv": projects_to("kv"),
    "attention-output": ends_attention,
    "mlp": in_feed_forward,
    "mlp-output": ends_feed_forward,
}


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _parents(path: str) -> list[str]:
    return path.split(".")[:-1]


def _inside_attention(parents: Sequence[str]) -> bool:
    return any(_ATTENTION_PARENT.match(component) for component in parents)
