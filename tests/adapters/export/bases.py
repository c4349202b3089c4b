"""Tiny bases as checkpoints of several files, and adapters on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import lorary
from lorary.analysis.merge_check import round_weights
from tests import architectures
from tests.tiny import shaken


def saved_base(name: str, folder: Path, shard: str = "4KB", **settings: Any) -> type:
    """Saves a tiny model of a class, in files of at most this size; returns the class."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    dtype = settings.pop("dtype", torch.float32)
    config = cls.config_class(**(architectures.ARCHITECTURES[name] | settings))
    cls(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    found: type = cls
    return found


def saved_adapter(cls: Any, base: Path, folder: Path, *names: str, targets: Any = "all-linear", **options: Any) -> Any:
    """Saves an adapter of random tensors on a base, and returns the adapted model."""
    model = cls.from_pretrained(base)
    method = lorary.method(*(names or ("lora",)), **({"r": 2} | options))
    lorary.attach(model, lorary.plan(model, method, targets))
    shaken(model, 0.05)
    lorary.save(model, folder)
    return model.eval()


def merged(cls: Any, base: Path, adapter: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Merges in memory and saves: what a streamed export has to equal."""
    model = cls.from_pretrained(base, dtype="auto")
    target = dtype or model.dtype
    lorary.load(model, adapter)
    lorary.merge(model, dtype=target)
    lorary.dequantize(model, target)
    round_weights(model, target)
    model.save_pretrained(folder)


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
