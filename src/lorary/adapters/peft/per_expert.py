"""Adapters of Transformers 4, with a layer for every projection of every expert, on Transformers 5's fused experts.

    ...mlp.experts.3.gate_proj.lora_A.weight    Mixtral: ...block_sparse_moe.experts.3.w1.lora_A.weight

Transformers' own rules for old checkpoints say which fused parameter a projection belongs to, and to which half of it.
The halves keep factors of their own, as the parts of a fused projection do: the same numbers, expert by expert.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lorary.adapters.peft import keys
from lorary.adapters.peft.config import PeftConfig
from lorary.adapters.peft.types import PeftType
from lorary.adapters.transformers_names import OldNames
from lorary.errors import Diagnostic
from lorary.files.findings import Findings
from lorary.files.strict_json import named
from lorary.layers.fused_qkv import fused_parts
from lorary.layers.kinds import site as site_of_layer
from lorary.model.base import Base
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Part, Site

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


class _Projection(NamedTuple):
    """A projection of one expert in an old file.

    Args:
        path: of its module in the old model.
        expert: its number.
        half: its place in the fused parameter.
    """

    path: str
    expert: int
    half: int


class PerExpert:
    """The adapters of single experts in a file, as adapters of the base's fused parameters.

    Args:
        config: of the file.
        peft_type: its type.
        base: the base; None without it.
        names: the short names of the file's tensors.
        whole: the sites that the file adapts under their present names.
        findings: gets the projections that have no place in the base, or whose place is taken.
    """

    def __init__(
        self,
        config: PeftConfig,
        peft_type: PeftType,
        base: Base | None,
        names: Iterable[str],
        whole: Collection[str],
        findings: Findings,
    ) -> None:
        self.config, self.type = config, peft_type
        self._leaves = peft_type.leaves_of(config)
        self._parts: dict[str, tuple[Part, ...]] = {}
        self._projections: dict[str, list[_Projection]] = {}
        paths = dict.fromkeys(path for name in names if (path := keys.site_of(name, self._leaves)))
        paths = {path: None for path in paths if _EXPERT.search(path)}
        if base is None or not paths:
            return
        old = OldNames(base.model, base.modules)
        for path in paths:
            joined = old.joined(path)
            if path in base.modules or joined is None or base.kinds.get(joined.name) != "experts":
                continue
            fused = joined.name
            expert = int(_EXPERT.findall(path)[-1])
            if expert >= (E := base.site(fused).experts):
                findings.fatal.append(Diagnostic(named(path), f"is of expert {expert}, and {fused} has {E}"))
                continue
            parts = self._parts_of(fused, base, joined.total)
            if parts is None:
                findings.fatal.append(Diagnostic(named(path), f"belongs to {fused}, whose layout here is not known"))
                continue
            self._parts[fused] = parts
            self._projections.setdefault(fused, []).append(_Projection(path, expert, joined.place))
        self.sites = self._adapted(base, findings)
        findings.fatal += self._twice(whole)

    sites: dict[str, AdaptedSite] = {}  # noqa: RUF012  (of a file without such adapters)

    @staticmethod
    def _parts_of(fused: str, base: Base, count: int) -> tuple[Part, ...] | None:
        """The halves of a fused parameter in the order of the rule; () for a whole one, None if they are unknown."""
        if count == 1:
            return ()
        parts = tuple(fused_parts(fused, base.modules[fused], None).values())
        return parts if len(parts) == count else None

    def _adapted(self, base: Base, findings: Findings) -> dict[str, AdaptedSite]:
        """Fused parameter -> its site, whose method all its projections have."""
        found = {}
        for fused, projections in self._projections.items():
            methods = {p.path: self.type.to_method(self.config, p.path) for p in projections}
            first, *_ = methods
            if others := [path for path, method in methods.items() if method != methods[first]]:
                what = f"has another rank or alpha than {first}, and {fused} holds both"
                findings.fatal.append(Diagnostic(named(others[0]), what))
                continue
            site = site_of_layer(fused, base.modules[fused], self._parts[fused])
            found[fused] = AdaptedSite(site, methods[first])
        return found

    def _twice(self, whole: Collection[str]) -> Iterator[Diagnostic]:
        """The projections that a file has under two names, or beside an adapter of the whole parameter."""
        for fused, projections in self._projections.items():
            first: dict[tuple[int, int], _Projection] = {}
            for p in projections:
                if (other := first.setdefault((p.expert, p.half), p)) is not p:
                    yield Diagnostic(named(p.path), f"is there twice: {other.path} too")
            if fused in whole:
                what = f"is adapted as a whole, and expert by expert: {projections[0].path} too"
                yield Diagnostic(named(fused), what)

    @property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Short name -> shape of every tensor in the file."""
        found: dict[str, tuple[int, ...]] = {}
        for fused, adapted in self.sites.items():
            for p in self._projections[fused]:
                found |= dict(self.type.layout(self._of_one(adapted, p)).values())
        return found

    def tensors(self, values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Fused parameter -> role -> tensor; experts that the file does not name do not change."""
        found: dict[str, dict[str, Tensor]] = {}
        for fused, adapted in self.sites.items():
            dtype = next((values[name].dtype for name in self.expected if name in values), torch.float32)
            own = found[fused] = {role: torch.zeros(shape, dtype=dtype) for role, shape in adapted.shapes.items()}
            for p in self._projections[fused]:
                one = self._of_one(adapted, p)
                there = {name: values.get(name, torch.zeros(shape)) for name, shape in self.type.layout(one).values()}
                for role, value in self.type.decode(one, there).items():
                    rows = self._rows(adapted, p, role)
                    own[role][p.expert, rows] = value.to(dtype)
        return found

    def notes(self) -> list[str]:
        """What was translated."""
        count = sum(map(len, self._projections.values()))
        return [f"the adapters of {count:,} projections of single experts are on {len(self.sites)} fused ones here"] * (
            count > 0
        )

    def _of_one(self, adapted: AdaptedSite, p: _Projection) -> AdaptedSite:
        """The projection as a linear layer of its own."""
        rows = adapted.site.rows[p.half]
        return AdaptedSite(Site(p.path, "linear", rows, adapted.site.in_features, bias=False), adapted.method)

    def _rows(self, adapted: AdaptedSite, p: _Projection, role: str) -> slice | Tensor:
        """Where a projection's tensor lies in that of its expert."""
        if not adapted.site.parts:
            return slice(None)
        if role == "m":  # one magnitude for each row of the fused weight
            return adapted.site.parts[p.half].rows()
        sizes = [adapted.r] * len(adapted.site.parts) if role == "A" else adapted.site.rows
        start = sum(sizes[: p.half])
        return slice(start, start + sizes[p.half])
