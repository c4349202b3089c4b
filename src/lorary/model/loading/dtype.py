"""The precision of a model's frozen weights: as saved, as chosen, as quick on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from lorary.model.loading.source import ModelSection


def load_dtype(section: ModelSection, config: PretrainedConfig | SimpleNamespace) -> torch.dtype:
    """The precision of the frozen weights. `auto`: as saved, but float32 on a CPU without 16-bit arithmetic.

    There a product in 16 bits takes several times as long.
    """
    import torch

    if section.dtype != "auto":
        chosen: torch.dtype = getattr(torch, section.dtype)
        return chosen
    saved = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available() or _cpu_is_quick(saved)
    return saved if accelerated else torch.float32


def _cpu_is_quick(dtype: torch.dtype) -> bool:
    flags = Path("/proc/cpuinfo")
    suffix = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(str(dtype))
    try:
        return suffix is not None and any(f"{unit}_{suffix}" in flags.read_text() for unit in ("avx512", "amx"))
    except OSError:
        return False


def dtype_of(settings: Mapping[str, Any]) -> torch.dtype:
    """The precision in which the weights are saved according to `config.json`."""
    import torch

    name = settings.get("dtype") or settings.get("torch_dtype")
    found = getattr(torch, str(name).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.float32
