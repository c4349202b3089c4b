"""What LoRA-FA is for: the bytes that autograd keeps from the forward pass of one batch for the backward pass."""

from __future__ import annotations

import lorary
from arms import ALPHA, RANK
from ledger import Ledger
from lorary.accounting import kept_for_backward
from tasks import HEADERS, batches
from training import FULL, attached

DROPOUT = 0.1
METHODS = {
    "LoRA": lorary.method("lora", r=RANK, alpha=ALPHA),
    "LoRA, dropout": lorary.method("lora", r=RANK, alpha=ALPHA, dropout=DROPOUT),
    "LoRA-FA": lorary.method("lora-fa", r=RANK, alpha=ALPHA),
    "LoRA-FA, dropout": lorary.method("lora-fa", r=RANK, alpha=ALPHA, dropout=DROPOUT),
}


def measured(ledger: Ledger) -> dict[str, int]:
    """Bytes by method, of the whole model, without its parameters and buffers; exact, so once is enough."""
    missing = [name for name in METHODS if name not in ledger.bytes_kept]
    batch = next(batches(HEADERS, seed=0)) if missing else None
    for name in missing:
        model = attached(METHODS[name])(0, FULL).train()
        known = [batch, *model.parameters(), *model.buffers()]
        ledger.bytes_kept[name] = kept_for_backward(lambda m=model: m(input_ids=batch, labels=batch).loss, known)
    if missing:
        ledger.write()
    return ledger.bytes_kept
