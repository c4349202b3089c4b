"""The summary of a serving form for users: its kind in words, and notes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.serve.forms.serving_form import SiteForm

Overrides = Mapping[str, Mapping[str, Tensor]]

REPLICA = 0.5  # of the base's bytes: with more overrides than that, little of the base is shared


def kind_of_form(
    base: nn.Module, sites: Mapping[str, SiteForm], overrides: Overrides, rotary: Mapping[str, object]
) -> str:
    """The kind of a form, such as `low rank` or `low rank with gain, overrides`."""
    if overrides and override_bytes(overrides) > REPLICA * sum(p.numel() * p.element_size() for p in base.parameters()):
        return "replica"
    forms = list(sites.values())
    first = [
        name
        for name, there in {
            "shared projections": any(form.shared for form in forms),
            "low rank": any(form.A is not None and not form.shared for form in forms),
        }.items()
        if there
    ]
    more = {
        "gain": any(form.gain is not None for form in forms),
        "shift": any(form.shift is not None for form in forms),
        "overrides": bool(overrides),
        "RoPE scaling": bool(rotary),
    }
    rest = ", ".join(name for name, there in more.items() if there)
    return " with ".join(filter(None, (" and ".join(first), rest))) or "no change"


def override_bytes(overrides: Overrides) -> int:
    """The bytes of all overrides."""
    return sum(t.numel() * t.element_size() for own in overrides.values() for t in own.values())


def notes_of(adapter: Adapter, quantized: Collection[str], overrides: Overrides) -> tuple[str, ...]:
    """The adapter's own notes, and what its form costs or approximates.

    Args:
        adapter: the adapter.
        quantized: the paths of the base's quantised layers.
        overrides: of its form.
    """
    notes = list(adapter.notes)
    trained = adapter.method.storage
    here = {a.site.name in quantized for a in adapter.sites}
    if not trained.writable and False in here:
        kind = type(trained).__name__
        notes.append(f"it was trained on a base quantised to {kind}; this base has the weights from before")
    if trained.writable and True in here:
        notes.append("it was trained on a base that is not quantised; this base is")
    if overrides:
        size = override_bytes(overrides)
        notes.append(f"{len(overrides)} modules compute its rows with weights of their own: {size / 2**20:,.1f} MiB")
    return tuple(notes)
