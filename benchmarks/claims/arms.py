"""The ways of learning one task that are compared, each by its name."""

from __future__ import annotations

from dataclasses import replace

from choosing import half
from tasks import HEADERS
from torch import nn
from training import Arm, attached

import lorary

RANK, WIDE = 8, 12
PROBE_RATE = 5e-3  # LoRA's best, for LoRA-drop's probe


def lora(*presets: str, r: int = RANK, **options: object) -> lorary.Method:
    """Some presets with alpha = r, so s = 1, as PiSSA's paper has it; a tuned learning rate makes up for the rest."""
    return lorary.method(*presets, r=r, alpha=float(r), **options)


def ranks(model: nn.Module) -> dict[str, list[int]]:
    """The directions that each layer has."""
    return {"ranks": [m.factors()[1].shape[0] for m in model.modules() if isinstance(m, lorary.Adapted)]}


def _arm(name: str, method: lorary.Method, first: int) -> Arm:
    return Arm(name, attached(method), HEADERS, (HEADERS,), first)


LORA = replace(_arm("LoRA", lora("lora"), first=4), short=False)
SAME_RATE = 2e-3  # PiSSA's best and OLoRA's: the papers give LoRA the rate that they take themselves
LORA_SAME = replace(LORA, name=f"LoRA at {SAME_RATE:g}, too", short=True, rate=SAME_RATE)
LORA_PLUS = _arm("LoRA+", lora("lora+"), first=2)
PISSA = _arm("PiSSA", lora("pissa"), first=3)
OLORA = _arm("OLoRA", lora("olora"), first=3)
LORA_FA = _arm("LoRA-FA", lora("lora-fa"), first=5)
ADALORA = replace(_arm("AdaLoRA", lora("adalora", r=WIDE, target=RANK), first=5), short=False, also=ranks)
LORA_WIDE = _arm(f"LoRA, r = {WIDE}", lora("lora", r=WIDE), first=4)
LORA_DROP = replace(LORA_WIDE, name="LoRA-drop", build=half(lora("lora", r=WIDE), PROBE_RATE))
FULL_TUNING = _arm("full fine-tuning", lorary.method("full"), first=2)
