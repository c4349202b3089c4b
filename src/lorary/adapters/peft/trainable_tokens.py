"""PEFT's TRAINABLE_TOKENS: rows of tokens and nothing beside them; see `lorary.adapters.peft.token_rows`."""

from __future__ import annotations

from typing import Any

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import PeftConfig
from lorary.adapters.peft.fields import SHARED, Field, field, token_ids
from lorary.adapters.peft.token_rows import ALONE, KINDS, LEAF, rows_method, tokens_of
from lorary.adapters.peft.types import PeftType, register
from lorary.adapters.shared_tensors import SharedTensors
from lorary.methods.token_rows import TokenRows
from lorary.spec.fields import FLAG
from lorary.spec.method import Method
from lorary.spec.no_update import NoUpdate
from lorary.spec.placement import unique_tensor_sets


class TrainableTokens(PeftType):
    """R at the rows of the tokens, in layers that have one for every token."""

    name, title = ALONE, "trainable tokens"
    methods = ((NoUpdate, TokenRows),)
    fields = {  # noqa: RUF012 (never written)
        **{key: SHARED[key] for key in ("target_modules", "base_model_name_or_path")},
        "token_indices": Field(token_ids, ()),
        "init_weights": field(FLAG, True),
    }
    leaves = {LEAF: "R"}  # noqa: RUF012
    kinds = KINDS
    rows_alone = True

    def to_method(self, config: PeftConfig, site: str = "") -> Method:
        return rows_method(config["token_indices"])

    def peft_incompatibilities(self, adapter: Adapter, shared: SharedTensors) -> list[str]:
        several = len({a.join for a in adapter.sites}) > 1
        return ["PEFT's trainable tokens are the same at all layers"] if several else []

    def from_adapter(self, adapter: Adapter, shared: SharedTensors) -> dict[str, Any]:
        return {"token_indices": list(tokens_of(adapter.sites[0])), "init_weights": True}

    def targets(self, adapter: Adapter) -> list[str]:
        return [a.site.name for a in unique_tensor_sets(adapter.sites)]


register(TrainableTokens())
