"""Adapters with factors for each projection of the experts, on Transformers 5's fused experts.

    ...mlp.experts.3.gate_proj.lora_A.weight    Mixtral: ...block_sparse_moe.experts.3.w1.lora_A.weight
    ...mlp.experts.w1.lora_A.weight             [E, r, in] of all experts, or [1, r, in] that they share (Tinker)

Transformers' own rules for old checkpoints say which fused parameter a projection belongs to, and to which half of it.
The halves keep factors of their own, as the parts of a fused projection do: the same numbers, expert by expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lorary.adapters.peft import keys
from lorary.adapters.peft.config import NAME, PeftConfig
from lorary.adapters.peft.experts import OTHER_RANK
from lorary.adapters.peft.types import PeftType
from lorary.adapters.tensor_checks import Layout
from lorary.adapters.transformers_names import OldNames
from lorary.errors import Diagnostic, FileError
from lorary.files.findings import Findings
from lorary.files.strict_json import named
from lorary.files.tensor_file import Entry
from lorary.layers.fused_qkv import fused_parts
from lorary.layers.kinds import site as site_of_layer
from lorary.model.base import Base
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Part, Site

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_STACKED = re.compile(r"(.*\.experts)\.(\w+)")
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_HALVES = ("gate_proj", "up_proj")


class _Projection(NamedTuple):
    """A projection in a file, of one expert or of all.

    Args:
        path: of its module in the old model.
        expert: its number; None for all of them.
        half: its place in the fused parameter.
    """

    path: str
    expert: int | None
    half: int


class PerExpert:
    """The adapters of single experts in a file, as adapters of the base's fused parameters.

    Args:
        config: of the file.
        peft_type: its type.
        base: the base; None without it.
        found: short name -> entry of the file's tensors.
        findings: gets the projections that have no place in the base.
    """

    def __init__(
        self,
        config: PeftConfig,
        peft_type: PeftType,
        base: Base | None,
        found: Mapping[str, Entry],
        findings: Findings,
    ) -> None:
        self.config, self.type, self.found = config, peft_type, found
        self._leaves = peft_type.leaves_of(config)
        self._parts: dict[str, tuple[Part, ...]] = {}
        self._projections: dict[str, list[_Projection]] = {}
        self._empty: list[str] = []
        self.sites: dict[str, AdaptedSite] = {}
        paths = dict.fromkeys(path for name in found if (path := keys.site_of(name, self._leaves)))
        single = [path for path in paths if _EXPERT.search(path)]
        stacked = [path for path in paths if _STACKED.fullmatch(path)]
        stacked = [path for path in stacked if len(self._shape(path, "A")) == 3 or self._is_empty(path)]
        if base is None or not (single or stacked):
            return
        self._place_single(single, base, findings)
        for path in stacked:
            self._place_stacked(path, base, findings)
        self.sites = self._adapted(base, findings)
        findings.fatal += [*self._other_ranks(), *self._without_magnitudes()]
        findings.raise_refused()  # the shapes follow from the ranks

    def _shape(self, path: str, role: str) -> tuple[int, ...]:
        """The shape of a factor in the file; () if it has none."""
        entry = self.found.get(f"{path}.lora_{role}.weight")
        return () if entry is None else entry.shape

    def _place_single(self, paths: list[str], base: Base, findings: Findings) -> None:
        """Find the fused parameters of the projections of single experts."""
        old = OldNames(base.model, base.modules)
        for path in paths:
            joined = old.joined(path)
            if path in base.modules or joined is None or base.kinds.get(joined.name) != "experts":
                continue
            fused = joined.name
            if not self._targeted(path, findings):
                findings.fatal.append(Diagnostic(named(path), "adapts a module that the configuration does not name"))
                continue
            expert = int(_EXPERT.findall(path)[-1])
            if expert >= (E := base.site(fused).experts):
                findings.fatal.append(Diagnostic(named(path), f"is of expert {expert}, and {fused} has {E}"))
                continue
            parts = self._parts_of(fused, base, joined.total)
            if parts is None:
                findings.fatal.append(Diagnostic(named(path), f"belongs to {fused}, whose layout here is not known"))
                continue
            self._parts[fused] = parts
            self._place(fused, _Projection(path, expert, joined.place), findings)

    def _place_stacked(self, path: str, base: Base, findings: Findings) -> None:
        """Find the fused parameter of a projection of all experts; nothing if there is none."""
        owner, leaf = cast("re.Match[str]", _STACKED.fullmatch(path)).groups()
        leaf = _PROJECTIONS.get(leaf, leaf)
        both, alone = f"{owner}.gate_up_proj", f"{owner}.{leaf}"
        if self._is_empty(path):
            self._empty.append(path)
        elif leaf in _HALVES and base.kinds.get(both) == "experts":
            parts = self._parts_of(both, base, 2)
            if parts is None:
                findings.fatal.append(Diagnostic(named(path), f"belongs to {both}, whose layout here is not known"))
                return
            self._parts[both] = parts
            self._place(both, _Projection(path, None, _HALVES.index(leaf)), findings)
        else:  # experts without a gate: w1 is their first matrix
            alone = alone if alone in base.kinds or leaf != "gate_proj" else f"{owner}.up_proj"
            if base.kinds.get(alone) == "experts":
                self._parts[alone] = ()
                self._place(alone, _Projection(path, None, 0), findings)

    def _place(self, fused: str, one: _Projection, findings: Findings) -> None:
        """Note a projection of a fused parameter; refuse one that is there already."""
        there = self._projections.setdefault(fused, [])
        for other in there:
            if one.half == other.half and (one.expert == other.expert or None in (one.expert, other.expert)):
                what = f"is there twice: {other.path} is the same projection"
                findings.fatal.append(Diagnostic(named(one.path), what))
                break
        there.append(one)

    def _is_empty(self, path: str) -> bool:
        """Whether both factors hold no number: the place of a projection that the model does not have."""
        return all(0 in self._shape(path, role) for role in "AB")

    def _other_ranks(self) -> list[Diagnostic]:
        """The first projection with another rank than the configuration's, as where that is divided over experts."""
        for fused, adapted in self.sites.items():
            for p in self._projections[fused]:
                shape = self._shape(p.path, "A")
                if len(shape) >= 2 and shape[-2] != adapted.r:
                    what = f"has rank {shape[-2]} for each expert, and the configuration says {adapted.r}"
                    return [Diagnostic(named(p.path), what, OTHER_RANK)]
        return []

    def _without_magnitudes(self) -> Iterator[Diagnostic]:
        """The fused parameters of which a DoRA has magnitudes for some rows only: the others have none to keep."""
        for fused, adapted in self.sites.items():
            if "m" not in adapted.shapes:
                continue
            E = adapted.site.experts
            there = [p for p in self._projections[fused] if self._layout(adapted, p)["m"][0] in self.found]
            count, wanted = sum(E if p.expert is None else 1 for p in there), E * len(adapted.site.rows)
            if count < wanted:
                what = f"has magnitudes for {count:,} of its {wanted:,} projections, and DoRA needs all"
                yield Diagnostic(fused, what)

    def _targeted(self, path: str, findings: Findings) -> bool:
        try:
            return self.config.targets_module(path)
        except ValueError as error:  # the patterns' budget
            findings.fatal.append(Diagnostic(NAME, str(error)))
            raise FileError("") from None

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

    @property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Short name -> shape of every tensor in the file."""
        found: dict[str, tuple[int, ...]] = {}
        for fused, adapted in self.sites.items():
            for p in self._projections[fused]:
                found |= dict(self._layout(adapted, p).values())
        for path in self._empty:
            found |= {f"{path}.lora_{role}.weight": self._shape(path, role) for role in "AB"}
        return found

    def _layout(self, adapted: AdaptedSite, p: _Projection) -> Layout:
        """role -> name and shape of a projection's tensors; those of all experts have E in front, or 1 if shared."""
        layout = self.type.layout(self._of_one(adapted, p))
        if p.expert is not None:
            return layout
        E = adapted.site.experts
        leading = {role: (self._shape(p.path, role) or (E,))[0] for role in layout}
        return {
            role: (name, (leading[role] if leading[role] in (1, E) else E, *shape))
            for role, (name, shape) in layout.items()
        }

    def tensors(self, values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Fused parameter -> role -> tensor; experts that the file does not name do not change."""
        found: dict[str, dict[str, Tensor]] = {}
        dtype = next((values[name].dtype for name in self.expected if name in values), torch.float32)
        for fused, adapted in self.sites.items():
            own = found[fused] = {role: torch.zeros(shape, dtype=dtype) for role, shape in adapted.shapes.items()}
            for p in self._projections[fused]:
                layout = self._layout(adapted, p)
                there = {name: values.get(name, torch.zeros(shape)) for name, shape in layout.values()}
                if p.expert is None:
                    decoded = {role: there[name] for role, (name, _) in layout.items()}
                else:
                    decoded = self.type.decode(self._of_one(adapted, p), there)
                at = slice(None) if p.expert is None else slice(p.expert, p.expert + 1)
                for role, value in decoded.items():
                    own[role][at, self._rows(adapted, p, role)] = value.to(dtype)
        return found

    def notes(self) -> list[str]:
        """What was translated."""
        every = [p for projections in self._projections.values() for p in projections]
        single, fused = sum(p.expert is not None for p in every), len(self.sites)
        shared = sum(1 in (self._shape(p.path, "A")[0], self._shape(p.path, "B")[0]) for p in every if p.expert is None)
        said = {
            f"the adapters of {single:,} projections of single experts are on {fused} fused ones here": single,
            f"the adapters of {len(every) - single:,} projections of all experts are on {fused} fused ones here": (
                len(every) - single
            ),
            f"a factor that experts share is repeated for each of them, in {shared:,} projections": shared,
            f"{len(self._empty):,} projections without numbers are left out": len(self._empty),
        }
        return [text for text, count in said.items() if count]

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
