"""The random number streams of a process: Python's, NumPy's, PyTorch's on the CPU and on the devices."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """The state of every stream, as numbers, text and tensors."""
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    backend = _device_backend()
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), np.asarray(key).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.random.get_rng_state(),
        "devices": [backend.get_rng_state(i) for i in range(backend.device_count())] if backend is not None else [],
    }


def restore(state: dict[str, Any]) -> None:
    """Set every stream to a captured state; devices that this machine lacks are skipped."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, key, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(key, dtype=np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(state["torch"])
    backend = _device_backend()
    for index, value in enumerate(state["devices"]):
        if backend is not None and index < backend.device_count():
            backend.set_rng_state(value, index)


@contextmanager
def preserved() -> Iterator[None]:
    """A context that restores every stream at its end."""
    state = capture()
    try:
        yield
    finally:
        restore(state)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which PyTorch draws from a seed; every stream is restored at its end."""
    with preserved():
        torch.manual_seed(seed)
        yield


def _device_backend() -> Any:
    """`torch.cuda`, `torch.xpu` or the like, if it has a stream for each device."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    backend = getattr(torch, device.type, None) if device is not None else None
    return backend if hasattr(backend, "get_rng_state") and hasattr(backend, "set_rng_state") else None
