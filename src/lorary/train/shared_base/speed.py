"""Whether a step of several adapters together takes less time than their steps in turn.

Together, the work around the arithmetic is done once for all adapters; the arithmetic stays, and its tensors, as many
times larger, leave the processor's caches. So small batches gain and large ones lose: of 8 adapters on a CPU, at 16
tokens each 1.7 times the speed, at 128 tokens 1.1 to 1.2, at 512 tokens 0.9 (`benchmarks/shared_base.py`).
"""

from __future__ import annotations

import torch

MOST_TOKENS = 128  # of an adapter's batch, at which every method that was measured still gained


def faster_together(adapters: int, tokens: int, device: torch.device | str = "cpu") -> bool:
    """Whether adapters train faster together: measured with 8 of them; fewer gain less.

    Args:
        adapters: their number.
        tokens: of the batch that one of them sees in a forward pass.
        device: of the base. On other devices than a CPU it has not been measured: False.

    Example:
        >>> faster_together(8, tokens=2 * 64), faster_together(8, tokens=16 * 128)
        (True, False)
    """
    return torch.device(device).type == "cpu" and adapters > 1 and 0 < tokens <= MOST_TOKENS
