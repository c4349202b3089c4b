"""The tasks: the built-in data sets, tokenised once, cut into windows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from lorary import builtin
from lorary.builtin import corpora

HEADERS, TOPICS, CODE = "builtin:c-headers", "builtin:topics", "builtin:python"
WIDTH = 128  # tokens of a window
TUNING, REPORT = 0, 1  # the two sets of held-out windows


@cache
def tokens(task: str, split: str) -> Tensor:
    """All tokens of one half of a data set, one text after another. [n]"""
    tokenizer = builtin.load_tokenizer()
    texts = (row["text"] for row in corpora.load(task, split))
    return torch.tensor([i for text in texts for i in tokenizer(text + "\n", verbose=False)["input_ids"]])


@cache
def held_out(task: str, part: int, count: int) -> Tensor:
    """`count` windows, evenly spread over the held-out files. [count, WIDTH]

    Args:
        part: TUNING or REPORT: every second window belongs to each, so that what chose a learning rate judges nothing.
    """
    ids = tokens(task, "validation")
    windows = ids[: len(ids) // WIDTH * WIDTH].view(-1, WIDTH)[part::2]
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def batches(task: str, seed: int, count: int) -> Iterator[Tensor]:
    """Random windows of the training half without end; the same for every method. [count, WIDTH]"""
    ids = tokens(task, "train")
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - WIDTH, (count,), generator=generator)
        yield torch.stack([ids[start : start + WIDTH] for start in starts])
