"""The ways of training that are compared, each by its name."""

from __future__ import annotations

import lorary
from tasks import HEADERS
from training import Arm, attached

RANK, ALPHA = 8, 8.0  # alpha = r, so s = 1: as PiSSA's paper has it; a tuned learning rate makes up for the rest


def _headers(name: str, *presets: str, first: int, short: bool = False, **options: object) -> Arm:
    method = lorary.method(*presets, **{"r": RANK, "alpha": ALPHA, **options})
    return Arm(name, attached(method), HEADERS, (HEADERS,), first, short)


LORA = _headers("LoRA", "lora", first=4)
LORA_PLUS = _headers("LoRA+", "lora+", first=2, short=True)
PISSA = _headers("PiSSA", "pissa", first=3, short=True)
OLORA = _headers("OLoRA", "olora", first=3, short=True)
LORA_FA = _headers("LoRA-FA", "lora-fa", first=5)
