"""The output head of a model: how it is said to train, and its layers that can be adapted."""

from __future__ import annotations

from typing import Any

from lorary.errors import Diagnostic, did_you_mean
from lorary.layers.wrappers import original_class
from lorary.model._full_parameters import HEADS
from lorary.model.scan import Scan


def head_layers(scan: Scan) -> list[str]:
    """The paths of the head's linear layers that can be adapted."""
    return [path for path in scan.layers if path in scan.heads and scan.modules[path].kind in ("linear", "transposed")]


def head_problems(scan: Scan, head: Any) -> list[Diagnostic]:
    """Why a model's head cannot train as it is said."""
    if head is None:
        return []
    if head not in HEADS:
        hint = did_you_mean(head, HEADS) if isinstance(head, str) else f"known: {', '.join(HEADS)}"
        return [Diagnostic("head", f"{head!r} is not a way to train a head", hint)]
    name = original_class(scan.model).__name__
    if not scan.heads:
        return [Diagnostic("head", f"a {name} has no output head", "leave it out")]
    if head == "lora" and not head_layers(scan):
        known = ", ".join(sorted(scan.heads))
        return [Diagnostic("head", f"the head of {name} ({known}) has no linear layer to adapt", "use head: full")]
    return _tied_head(scan, name) if head == "full" else []


def _tied_head(scan: Scan, name: str) -> list[Diagnostic]:
    """A head that is another layer's weight: training it alone is impossible."""
    own = {scan.names[f"{path}.weight"] for path in scan.heads if f"{path}.weight" in scan.names}
    others = sorted({parameter.rpartition(".")[0] for parameter in own} - scan.heads)
    what = f"the head of {name} is the weight of {', '.join(others)}: both would train"
    return [Diagnostic("head", what, f'say so with full=["{others[0]}"], or use head: lora')] if others else []
