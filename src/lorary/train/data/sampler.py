"""The order of the training rows: a pure function of the seed and the epoch.

Worker processes, evaluation, logging and interruptions do not change it, and the rows of any batch can be computed
afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class SeededSampler(Sampler[int]):
    """All rows, shuffled by `seed` and the current epoch.

    Args:
        rows: number of rows.
        seed: the run's seed.
        shuffle: False keeps the rows in their order.

    Attributes:
        epoch: epoch of the next iteration, from 0; the trainer sets it.
    """

    def __init__(self, rows: int, seed: int, shuffle: bool = True) -> None:
        self.rows, self.seed, self.shuffle = rows, seed, shuffle
        self.epoch = 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def set_epoch(self, epoch: int) -> None:
        """Called by PyTorch's and accelerate's loaders."""
        self.epoch = epoch

    def order(self, epoch: int) -> list[int]:
        """The rows of one epoch, first to last."""
        if not self.shuffle:
            return list(range(self.rows))
        # Hashed, so that seeds and epochs do not add up: seed 1, epoch 2 is not seed 2, epoch 1.
        digest = hashlib.sha256(f"order/{self.seed}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.randperm(self.rows, generator=generator).tolist()


def rows_in_batch(
    sampler: SeededSampler, size: int, epoch: int, batch: int, rank: int = 0, ranks: int = 1, drop_last: bool = False
) -> list[int]:
    """The rows of the `batch`-th batch of a rank in an epoch, all counted from 0.

    Ranks take batches in turn; the last batches are filled up from the beginning of the epoch, so that all ranks have
    equally many (accelerate's `even_batches`). A single process keeps its shorter last batch.

    >>> sampler = SeededSampler(5, seed=0, shuffle=False)
    >>> rows_in_batch(sampler, size=2, epoch=0, batch=1, rank=1, ranks=2)
    [1, 2]
    """
    order = sampler.order(epoch)
    start = (batch * ranks + rank) * size
    if ranks == 1 or drop_last:
        return order[start : start + size]
    return [order[i % len(order)] for i in range(start, start + size)]
