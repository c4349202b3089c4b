"""Loads of tensors between the host's memory and a device: beside its computing where it has streams, else in turn.

Two slots of memory on the device take the loads turn by turn. A load is fetched into a slot, computed with, and
evicted from it, while the next one arrives in the other; the one after that waits until the slot is empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

LINE = 256  # bytes: where a tensor begins in a slot


def streams(device: torch.device) -> Any:
    """The module of a device that has streams (`torch.cuda`, `torch.xpu`), or None."""
    if device.type == "cpu":  # its streams do nothing
        return None
    module = torch.get_device_module(device.type)
    return module if hasattr(module, "Stream") else None


def room(tensors: Iterable[Tensor]) -> int:
    """Bytes that a load takes in a slot."""
    return sum(map(_bytes, tensors))


class Lane:
    """The copies between the host and one device: beside its computing where it has streams, else in turn.

    Args:
        device: where the parameters are.
        room: bytes of the largest load.
        slots: how many loads may be on the device at once.
    """

    def __init__(self, device: torch.device, room: int, slots: int) -> None:
        self.slots = [torch.empty(room, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.device, self.streams = device, streams(device)
        self.copies = self.streams.Stream(device) if self.streams is not None else None
        if self.copies is not None:  # whoever had this memory before may still be at work on it
            self.copies.wait_stream(self._computing())

    def fetch(self, number: int, homes: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Begins to copy a load into the slot of the one before the last, which has to be on its way out.

        Returns:
            the tensors on the device, and the event of their arrival.
        """
        here = _carved(self.slots[number % len(self.slots)], homes)
        with self._beside():
            for tensor, home in zip(here, homes, strict=True):
                tensor.copy_(home, non_blocking=self.copies is not None)
        return here, self.copies.record_event() if self.copies is not None else None

    def arrived(self, load: tuple[list[Tensor], Any]) -> list[Tensor]:
        """What was fetched, for computing with from now on."""
        here, event = load
        if event is not None:
            self._computing().wait_event(event)
        return here

    def evict(self, here: Sequence[Tensor], homes: Sequence[Tensor]) -> None:
        """Begins to copy a load back when everything computed so far is done."""
        if self.copies is not None:
            self.copies.wait_event(self._computing().record_event())
        with self._beside():
            for tensor, home in zip(here, homes, strict=True):
                home.copy_(tensor, non_blocking=self.copies is not None)

    def close(self) -> None:
        """Waits until everything is back: a checkpoint may be next. The slots' memory is free then."""
        if self.copies is not None:
            self._computing().wait_stream(self.copies)
            self.copies.synchronize()

    def _computing(self) -> Any:
        return self.streams.current_stream(self.device)

    def _beside(self) -> Any:
        return self.streams.stream(self.copies) if self.streams is not None else nullcontext()


def _bytes(tensor: Tensor) -> int:
    """That one of its tensors takes."""
    return -(-tensor.numel() * tensor.element_size() // LINE) * LINE


def _carved(slot: Tensor, homes: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in a slot, one after the other, each with the layout of its home so that a copy is one piece."""
    made, at = [], 0
    for home in homes:
        part = slot[at : at + home.numel() * home.element_size()].view(home.dtype)
        made.append(part.as_strided(home.shape, torch.empty_like(home, device="meta").stride()))
        at += _bytes(home)
    return made
