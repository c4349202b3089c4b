"""The components that wrappers of a model leave in the paths of its modules.

>>> without_wrappers("base_model.model._orig_mod.layers.0.q_proj.lora_A.weight")
('base_model.model.layers.0.q_proj.lora_A.weight', ['_orig_mod'])
"""

from __future__ import annotations

from collections.abc import Iterable

from lorary.layers.wrappers import COMPONENTS

DDP = "module"  # of DistributedDataParallel, and also a name that models give to modules of their own
WRAPPERS = COMPONENTS - {DDP}
_PEFT = "base_model"  # PEFT's own outermost component: what stands before it is a wrapper around PEFT's model


def without_wrappers(name: str) -> tuple[str, list[str]]:
    """A name without the components that only wrappers have, and these components."""
    components = name.split(".")
    before = components.index(_PEFT) if _PEFT in components else 0
    if not before and WRAPPERS.isdisjoint(components):
        return name, []
    outside = set(components[:before]) <= {DDP, *WRAPPERS}
    gone = [c in WRAPPERS or (outside and i < before) for i, c in enumerate(components)]
    kept = [c for c, wrapper in zip(components, gone, strict=True) if not wrapper]
    return ".".join(kept), [c for c, wrapper in zip(components, gone, strict=True) if wrapper]


def left_out(components: Iterable[str]) -> list[str]:
    """The notes of a reader about the components that it left out."""
    return [f"`{c}` in the names of its tensors is a wrapper's, and was left out" for c in dict.fromkeys(components)]
