"""What a tensor is that a PEFT file holds and its configuration does not call for."""

from __future__ import annotations

from lorary.formats.peft_keys import LEAVES

_FEATURES = {
    "lora_B.bias": "is a bias beside B, which is not supported",
    "lora_diag": "belongs to KaSA, which is not supported",
}


def strange(name: str, sort: str, base: set[str] | None) -> str:
    """The reason to refuse it, for the message.

    Args:
        name: the tensor's short name; no tensor of a site in this sort of adapter.
        sort: what the configuration says that the adapter is.
        base: the names of the base's parameters; None where it is not at hand.
    """
    others = {leaf: other for other, leaves in reversed(LEAVES.items()) if other != sort for leaf in leaves}
    belongs = {
        leaf: f"belongs to {other}, which the configuration does not say it is" for leaf, other in others.items()
    }
    for leaf, what in (belongs | _FEATURES).items():
        if name.endswith((f".{leaf}", f".{leaf}.weight")):
            return what
    if ".lora_A." in name or ".lora_B." in name:
        return "has an adapter's name inside, which PEFT's files never have"
    plain = name.replace(".base_layer.", ".")
    if plain in base if base is not None else plain.endswith((".weight", ".bias")):
        return "would overwrite a weight of the base, and `modules_to_save` does not list it"
    return "is no tensor of this adapter"
