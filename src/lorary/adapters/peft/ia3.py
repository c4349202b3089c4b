"""PEFT's IA3: (IA)³, with `feedforward_modules` for the layers whose inputs are scaled.

    linear, transposed   <site>.ia3_l  (out, 1), or (1, in) where the inputs are scaled
    convolution          <site>.ia3_l  (1, out, 1, ...)

PEFT's vector for a fused weight has a factor of 1 at the rows of projections that are not scaled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import PeftConfig
from lorary.adapters.peft.fields import EXCLUDE, NAMES_OR_PATTERN, SHARED, Field, field
from lorary.adapters.peft.types import PeftType, register
from lorary.adapters.shared_tensors import SharedTensors
from lorary.adapters.tensor_checks import Layout
from lorary.errors import Diagnostic, FileError
from lorary.files.bounded_regex import Budget, Pattern
from lorary.methods.ia3 import Rescaling
from lorary.methods.lora import ConstantScale
from lorary.spec.fields import FLAG
from lorary.spec.method import Method
from lorary.spec.no_update import NoInit, NoUpdate
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Site

_LEAF = "ia3_l"
_SILENT = "{}: nothing says at which layers the inputs are scaled, and at which the outputs"
_SHARED = ("target_modules", "modules_to_save", "fan_in_fan_out", "base_model_name_or_path")


def _inputs(value: Any, budget: Budget) -> Any:
    if value is None:
        raise ValueError(_SILENT.format("is null"))
    return NAMES_OR_PATTERN.read(value, budget)


class Ia3(PeftType):
    """l * (W x + b), or W (l * x) + b at the layers that `feedforward_modules` names."""

    name, title = "IA3", "(IA)³"
    methods = ((NoUpdate, Rescaling),)
    fields = {  # noqa: RUF012 (never written)
        **{key: SHARED[key] for key in _SHARED},
        "exclude_modules": EXCLUDE,
        "feedforward_modules": Field(_inputs),
        "init_ia3_weights": field(FLAG, True),
    }
    leaves = {_LEAF: "l"}  # noqa: RUF012
    kinds = ("linear", "transposed", "conv2d", "conv3d")

    def to_method(self, config: PeftConfig, site: str = "") -> Method:
        named = config["feedforward_modules"] or ()
        names = () if isinstance(named, Pattern) else named
        join = Rescaling(names)
        if site and join.scales_input(site) != _scales_input(named, site):  # PEFT compares ends of names by letters
            join = Rescaling(() if join.scales_input(site) else (site.rpartition(".")[2],))
        return Method(NoUpdate(), NoInit(), ConstantScale(1.0), join)

    def site_mismatches(self, config: PeftConfig, sites: set[str]) -> list[tuple[str, str]]:
        if config["feedforward_modules"] is None:
            return [("feedforward_modules", _SILENT.format("is missing"))]
        return []

    def from_adapter(self, adapter: Adapter, shared: SharedTensors) -> dict[str, Any]:
        inputs = [a.site.name for a in adapter.sites if "l_ff" in a.shapes]
        outputs = [a.site.name for a in adapter.sites if "l" in a.shapes]
        patterns = sorted({re.sub(r"\d+", r"\\d+", re.escape(name)) for name in inputs})
        if any(re.fullmatch(pattern, name) for pattern in patterns for name in outputs):
            patterns = sorted(map(re.escape, inputs))
        # as a pattern: a list of names would have to be among those of `target_modules`, letter by letter
        return {"feedforward_modules": "|".join(patterns) if patterns else [], "init_ia3_weights": True}

    def why_not_adaptable(self, site: Site, layer: nn.Module | None = None) -> str:
        if site.kind not in self.kinds:  # a scaled output is one of every geometry
            return f"is of kind {site.kind}, which PEFT's {self.title} never adapts"
        return ""

    def layout(self, adapted: AdaptedSite) -> Layout:
        site = adapted.site
        if "l_ff" in adapted.shapes:
            return {"l_ff": (f"{site.name}.{_LEAF}", (1, site.in_features))}
        ones = (1,) * len(site.kernel_size)
        shape = (1, site.out_features, *ones) if ones else (site.out_features, 1)
        return {"l": (f"{site.name}.{_LEAF}", shape)}

    def encode(self, adapted: AdaptedSite, roles: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().encode(adapted, adapted.join.whole(adapted.site, roles))

    def decode(self, adapted: AdaptedSite, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not adapted.site.parts:
            return super().decode(adapted, tensors)
        (name, _) = self.layout(adapted)["l"]
        rows, gain = adapted.site.part_rows(), tensors[name].flatten()
        found = {"l": gain[rows]}
        if not gain.equal(adapted.join.whole(adapted.site, found)["l"]):
            what = "scales rows outside the projections that are adapted"
            raise FileError("", [Diagnostic(name, what, "remove lorary.json to read it as PEFT's")])
        return found


def _scales_input(named: tuple[str, ...] | Pattern, site: str) -> bool:
    """PEFT's rule: a pattern for the whole path, or the end of it, letter by letter."""
    return named.fullmatch(site) if isinstance(named, Pattern) else site.endswith(named)


register(Ia3())
