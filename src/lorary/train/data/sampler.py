"""The order of the training rows: a pure function of the seed and the epoch.

Neither the number of worker processes, nor evaluation, nor logging, nor having been interrupted changes it; and
which rows a batch holds can be said afterwards, without having watched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler


class SeededSampler(Sampler[int]):
    """All rows in the order that `seed` and the current epoch give.

    Args:
        rows: number of rows.
        seed: of the whole run.
        shuffle: False gives the rows as they stand.

    Attributes:
        epoch: the epoch that the next iteration is about, from 0; the trainer sets it.
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


@dataclass(frozen=True)
class Position:
    """One forward pass of a run.

    Args:
        epoch: from 0.
        batch: of this rank within the epoch, from 0.
        rank: of the process.
    """

    epoch: int
    batch: int
    rank: int = 0


def rows_of(
    sampler: SeededSampler, at: Position, batch_size: int, ranks: int = 1, drop_last: bool = False
) -> list[int]:
    """Which rows the batch at a position holds.

    Batches go round the ranks in turn; the last ones are filled up from the beginning of the epoch, so that all
    ranks have as many (accelerate's `even_batches`). A single process keeps its shorter last batch.

    >>> rows_of(Shuffled(5, seed=0, shuffle=False), Position(epoch=0, batch=1, rank=1), batch_size=2, ranks=2)
    [1, 2]
    """
    order = sampler.order(at.epoch)
    start = (at.batch * ranks + at.rank) * batch_size
    if ranks == 1 or drop_last:
        return order[start : start + batch_size]
    return [order[i % len(order)] for i in range(start, start + batch_size)]
