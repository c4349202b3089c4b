"""The time of a forward pass of an adapted model over that of its base, the two taking turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

PASSES, UNTIMED = 15, 3  # of each of the two; the first ones are slow


@torch.inference_mode()
def over_base(base: Any, model: Any, row: Sequence[int]) -> tuple[float, ...]:
    """The seconds of a forward pass over those of the base beside it.

    Args:
        base: the model without an adapter, in evaluation mode.
        model: the same with one, attached or merged, on the same device.
        row: token ids.
    """
    ids = torch.tensor([list(row)], device=base.device)
    ratios = []
    for turn in range(UNTIMED + PASSES):
        pair = (base, model) if turn % 2 else (model, base)  # either is as often the first
        seconds = {id(each): _seconds(each, ids) for each in pair}
        ratios.append(seconds[id(model)] / seconds[id(base)])
    return tuple(ratios[UNTIMED:])


def _seconds(model: Any, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
