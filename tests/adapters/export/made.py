"""Adapters on tiny bases, for the exports."""

from __future__ import annotations

from typing import Any

from torch import nn

import lorary
from tests import tiny
from tests.adapters import models
from tests.adapters.models import BASES

LLAMA = BASES[0]
MERGED = "\n      hint: merge it: `lorary export ADAPTER FOLDER --to merged`"


def plain(*names: str, **options: Any) -> lorary.Adapter:
    return lorary.Adapter.of(models.adapted(LLAMA, *names, **options))


def of(model: nn.Module, method: lorary.Method = tiny.LORA, targets: Any = "all-linear") -> lorary.Adapter:
    lorary.attach(model, lorary.plan(model, method, targets=targets))
    adapter = lorary.Adapter.of(tiny.shaken(model))
    lorary.detach(model)
    return adapter


def longer(base: Any, rope: str) -> lorary.Adapter:
    """LongLoRA of four times the context, without the embeddings and norms that it trains in full."""
    length = base.config.max_position_embeddings * 4
    return of(base, lorary.method("longlora", "lora", r=2, length=length, rope=rope).replace(full=()))
