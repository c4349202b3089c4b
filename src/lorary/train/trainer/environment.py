"""The versions and hardware that can influence the bits of a run."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import Any

import torch

import lorary
from lorary.train.trainer.distributed import this_process


def environment() -> dict[str, Any]:
    """Versions and hardware, as far as they can influence a result."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": this_process().num_processes,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
    }


@cache
def versions() -> dict[str, str]:
    """The versions of the packages that influence a result."""
    packages = ("torch", "transformers", "trl", "accelerate", "datasets", "safetensors")
    return {"lorary": lorary.__version__} | {p: metadata.version(p) for p in packages}


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The facts that have changed, such as `threads: 2 then, 1 now`; what only one of them knows is not compared."""
    old, new = _flat(then), _flat(now)
    return [f"{key}: {old[key]} then, {new[key]} now" for key in old if key in new and old[key] != new[key]]


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with the packages among them by name."""
    packages = facts.get("packages")
    own = {k: v for k, v in facts.items() if k not in ("packages", "step", "resumed")}
    return own | (packages if isinstance(packages, dict) else {})
