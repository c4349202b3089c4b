"""Every stream of random numbers of a process: Python's, NumPy's, PyTorch's on the CPU and on the devices."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def capture() -> dict[str, Any]:
    """The state of every stream, as numbers, text and tensors."""
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), np.asarray(key).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.random.get_rng_state(),
        "devices": _devices(),
    }


def restore(state: dict[str, Any]) -> None:
    """Puts every stream back to where `capture` found it.

    Devices that this machine does not have are passed over: their numbers could not be drawn here anyway.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, key, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(key, dtype=np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(state["torch"])
    backend = _backend()
    for index, value in enumerate(state["devices"]):
        if backend is not None and index < backend.device_count():
            backend.set_rng_state(value, index)


@contextmanager
def untouched() -> Iterator[None]:
    """Whatever is drawn on the CPU inside, the streams go on afterwards as if nothing had been."""
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])


def _backend() -> Any:
    """`torch.cuda`, `torch.xpu` or the like, where there is one with a stream for each device."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    backend = getattr(torch, device.type, None) if device is not None else None
    return backend if hasattr(backend, "get_rng_state") and hasattr(backend, "set_rng_state") else None


def _devices() -> list[Tensor]:
    backend = _backend()
    return [backend.get_rng_state(i) for i in range(backend.device_count())] if backend is not None else []
