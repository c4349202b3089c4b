"""The names of the tensors in a PEFT file: prefixes, base parameters, and explanations of unexpected names.

Names begin with `base_model.model.`, and with `base_model.` for tensors that all sites share. Files written from a bare
module have no prefix, and both are read. The short name is the name without its prefix.
"""

from __future__ import annotations

from collections.abc import Iterable

from lorary.adapters.peft.types import PEFT_TYPES, PeftType

MAGNITUDE = "lora_magnitude_vector"  # of DoRA
BIAS = "lora_B.bias"
PREFIX = "base_model.model."
_OUTER = "base_model."


def _shared() -> set[str]:
    return {name for peft_type in PEFT_TYPES.values() for name in peft_type.shared.values()}


def short(name: str) -> str:
    """A tensor's name without its prefix."""
    if name.startswith(PREFIX):
        return name.removeprefix(PREFIX)
    inner = name.removeprefix(_OUTER)
    return inner if inner in _shared() else name


def full(name: str) -> str:
    """The name in a file of a short name.

    DoRA's magnitudes get the name of a module's weight: PEFT reads them with and without this end, and Transformers'
    `load_adapter` passes over those without it.
    """
    end = ".weight" if name.endswith(f".{MAGNITUDE}") else ""
    return f"{_OUTER if name in _shared() else PREFIX}{name}{end}"


def site_of(name: str, leaves: Iterable[str]) -> str | None:
    """The site of a short name; None if it ends in no leaf."""
    leaf = next((leaf for leaf in leaves if f".{name}".endswith(f".{leaf}")), None)
    return None if leaf is None else name.removesuffix(leaf).removesuffix(".")


def full_name(parameter: str, sites: set[str]) -> str:
    """The short name of a base parameter: PEFT moves those of adapted layers into `base_layer`."""
    path, _, last = parameter.rpartition(".")
    return f"{path}.base_layer.{last}" if path in sites else parameter


def why_unexpected(name: str, peft_type: PeftType, base: set[str] | None) -> str:
    """An explanation of a tensor that the configuration does not call for.

    Args:
        name: its short name.
        peft_type: the configuration's type.
        base: the names of the base's parameters; None without the base.
    """
    leaves = {leaf: why for t in PEFT_TYPES.values() for leaf, why in t.refused_leaves.items()}
    for other in PEFT_TYPES.values():
        if other is not peft_type:
            what = f"belongs to {other.title}, which the configuration does not name"
            leaves |= {leaf: what for leaf in other.leaves if leaf not in leaves}
    for leaf, what in leaves.items():
        if name.endswith((f".{leaf}", f".{leaf}.weight")):
            return what
    if ".lora_A." in name or ".lora_B." in name:
        return "has an adapter's name inside, which PEFT's files never have"
    plain = name.replace(".base_layer.", ".")
    if plain in base if base is not None else plain.endswith((".weight", ".bias")):
        return "would overwrite a weight of the base, and `modules_to_save` does not list it"
    return "is not a tensor of this adapter"
