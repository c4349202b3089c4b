"""The LM head in chunks of tokens: log-probabilities of labels without all logits in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS = 2**24
"""Logits per call of the head (64 MiB in fp32), unless that would be fewer than `TOKENS` tokens."""
TOKENS = 512
"""The minimum number of tokens per call. Smaller chunks are slower on a CPU: 64 tokens instead of 512, +80 %."""

Head = Callable[[Tensor], Tensor]


def chunk_size(vocabulary: int) -> int:
    """Tokens per call of the head."""
    return max(TOKENS, LOGITS // vocabulary)


def scores_in_chunks(
    head: Head,
    states: Tensor,
    targets: Tensor,
    statistics: tuple[str, ...],
    size: int,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """The scores of all rows, `size` rows at a time; all chunks but the last are recomputed in backward.

    Without rows, one empty chunk is scored to keep the result connected to the model.
    """
    score = functools.partial(scores, head, statistics=statistics, smoothing=smoothing)
    count = max(1, -(-len(targets) // size))
    *most, last = zip(states.tensor_split(count), targets.tensor_split(count), strict=True)
    parts = [checkpoint(score, h, y, use_reentrant=False) for h, y in most] + [score(*last)]
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}


def scores(
    head: Head, states: Tensor, targets: Tensor, statistics: tuple[str, ...], smoothing: float = 0.0
) -> dict[str, Tensor]:
    """Log-probabilities of `targets` `[n]` and the `statistics` of the distributions `softmax(head(states))`.

    With label smoothing ε the log-probability of a target y is (1 − ε) log p(y) + ε · mean log p.
    """
    logits = head(states).float()  # [n, vocabulary]
    log_p = logits.log_softmax(-1)
    found = {"log_probs": -F.nll_loss(log_p, targets, reduction="none")}
    target = found["log_probs"].detach()
    if smoothing:
        found["log_probs"] = (1 - smoothing) * found["log_probs"] + smoothing * log_p.mean(-1)
    # last, because a recomputation stops after the last operation that saves tensors
    with torch.no_grad():
        if "is_top1" in statistics:
            found["is_top1"] = target >= log_p.amax(-1)  # argmax is several times slower on a CPU
        if "mean_logits" in statistics:
            found["mean_logits"] = logits.mean(-1)
        if "log_sum_sq_probs" in statistics:
            found["log_sum_sq_probs"] = (2 * log_p).logsumexp(-1)
        if "entropy" in statistics:
            found["entropy"] = -torch.linalg.vecdot(log_p.exp(), log_p)
    return found
