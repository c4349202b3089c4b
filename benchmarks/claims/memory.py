"""What LoRA-FA is for: the bytes that autograd keeps from the forward pass of one batch for the backward pass."""

from __future__ import annotations

from arms import lora
from protocol import Bench
from tasks import HEADERS, batches
from training import FULL, attached

from lorary.analysis.memory.live_bytes import kept_for_backward

DROPOUT = 0.1
METHODS = {
    "LoRA": lora("lora"),
    "LoRA, dropout": lora("lora", dropout=DROPOUT),
    "LoRA-FA": lora("lora-fa"),
    "LoRA-FA, dropout": lora("lora-fa", dropout=DROPOUT),
}


def measured(bench: Bench) -> dict[str, int]:
    """Bytes by method, of the whole model, without its parameters and buffers; exact, so once is enough."""
    missing = [name for name in METHODS if name not in bench.ledger.bytes_kept]
    batch = next(batches(HEADERS, 0, FULL.batch)) if missing else None
    for name in missing:
        model = attached(METHODS[name])(bench, 0).train()
        known = [batch, *model.parameters(), *model.buffers()]
        bench.ledger.bytes_kept[name] = kept_for_backward(lambda m=model: m(input_ids=batch, labels=batch).loss, known)
    if missing:
        bench.ledger.write()
    return bench.ledger.bytes_kept
