"""The serving form of an adapter: the terms that a mixed batch computes for its rows.

An adapter is brought to it once, when it is loaded. At a site the output of its rows is

    y = gain * y0 + b * (B (d * (A x))) + shift        with y0 the base's output, bias included

with only those of the five terms that it has; scales and the gain of DoRA and GLoRA are folded into B and shift. What
changes other parameters of a layer (a norm's weight, a new head, an embedding trained in full) is an override: the rows
are computed with the adapter's own parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


class SiteForm(NamedTuple):
    """The form at one site.

    Args:
        A: [R, in], B: [out, R]: the low-rank term, with the scale in B, as the layer's kind adds it (a convolution
            filters with A; a scaled embedding scales the term). Both or neither.
        gain: [out] on the base's output, in fp32: most gains differ from 1 by less than bfloat16 resolves.
        shift: [out].
        d: [R] between A and B, b: [out] after B: VeRA's vectors, whose A and B are shared (`shared` is set).
        shared: the key of the shared A and B in `ServingForm.shared`, which A and B are leading slices of; "" if own.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    d: Tensor | None = None
    b: Tensor | None = None
    shared: str = ""


@dataclass(frozen=True, eq=False)
class ServingForm:
    """The serving form of an adapter. Two are equal if they are the same: tensors cannot be compared as wholes.

    Args:
        uid: content hash of the adapter: equal bytes give an equal uid; it salts the prefix cache.
        sites: path of a base layer -> its form.
        overrides: path of a base module -> name of its parameter -> [as the parameter] the adapter's own value.
        rotary: path of a rotary embedding -> a module that its rows use instead (LongLoRA's RoPE scaling).
        shared: key (a content hash) -> role -> the whole shared tensor; adapters with equal ones keep them once.
        kind: in words, such as "low rank with gain"; see `AdapterCard.form`.
        rank: the highest of its sites; None without any.
        method: its presets, as `--method` takes them.
        notes: what a user should know: an approximation, a replica's cost.
        max_context: the context that its RoPE scaling gives; None for the base's.
    """

    uid: str
    sites: Mapping[str, SiteForm]
    overrides: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    rotary: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    kind: str = "low rank"
    rank: int | None = None
    method: str = ""
    notes: tuple[str, ...] = ()
    max_context: int | None = None

    @property
    def additive(self) -> bool:
        """Whether requests may add it, weighted, to others: it has no gain, no override and no RoPE scaling."""
        gains = any(form.gain is not None for form in self.sites.values())
        return not (gains or self.overrides or self.rotary)
