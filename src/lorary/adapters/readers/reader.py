"""A reader: a program that reads adapter folders, its rules as data, and its verdict on a folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lorary.adapters import native
from lorary.adapters.mlx import WEIGHTS as MLX_WEIGHTS
from lorary.adapters.peft.config import NAME
from lorary.adapters.peft.reader import WEIGHTS
from lorary.adapters.peft.types import without_low_rank_form
from lorary.adapters.peft.virtual_tokens import FIELDS as VIRTUAL_TOKENS
from lorary.adapters.peft.virtual_tokens import has_virtual_tokens
from lorary.adapters.readers.features import FEATURES
from lorary.adapters.readers.folder import AdapterFolder
from lorary.errors import Diagnostic, deduplicated


class Outcome(StrEnum):
    """The outcome of reading a folder."""

    ACCEPTED = "accepted"
    MISCOMPUTED = "miscomputed"  # read without an error, and computed wrongly
    REJECTED = "rejected"


@dataclass(frozen=True)
class Finding:
    """One thing in a folder that a reader refuses or gets wrong."""

    outcome: Outcome
    problem: Diagnostic


@dataclass(frozen=True)
class Verdict:
    """The verdict of a reader on an adapter folder.

    Args:
        reader: its name, as on the command line.
        release: the release whose source its rules were read from.
        outcome: accepted, rejected, or miscomputed: read without an error, and computed wrongly.
        reasons: why, each with what to export instead; empty if accepted.
    """

    reader: str
    release: str
    outcome: Outcome
    reasons: tuple[Diagnostic, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether the reader computes the adapter's own function."""
        return self.outcome is Outcome.ACCEPTED

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        reasons = [{"where": r.where, "what": r.what, "fix": r.fix} for r in self.reasons]
        return {"reader": self.reader, "release": self.release, "outcome": str(self.outcome), "reasons": reasons}


def no_rules(folder: AdapterFolder) -> Iterator[Finding]:
    """The further rules of a reader that has none."""
    return iter(())


@dataclass(frozen=True)
class Reader:
    """A program that reads adapter folders.

    Args:
        name: on the command line.
        title: in sentences.
        release: the release whose source the rules were read from.
        export: what `lorary export --to` writes for it; empty if there is none but a merged model.
        refuses: the features that it refuses.
        ignores: the features that it computes without.
        types: the PEFT types that it reads; "" if it takes every folder for LORA.
        scale: (folder, site, rank of the tensors) -> the scale that it computes with.
        rules: its further rules, those that need code.
        form: the form of the folders that it reads.
    """

    name: str
    title: str
    release: str
    export: str
    refuses: frozenset[str] = frozenset()
    ignores: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset({"LORA"})
    scale: Callable[[AdapterFolder, str, int], float] = lambda folder, site, rank: folder.scale(site)
    rules: Callable[[AdapterFolder], Iterator[Finding]] = no_rules
    form: str = "peft"

    def verdict(self, folder: AdapterFolder) -> Verdict:
        """The verdict on a folder.

        Raises:
            FileError: a pattern of the folder takes too much work.
        """
        findings = sorted(self._findings(folder), key=lambda f: f.outcome is not Outcome.REJECTED)
        worst = findings[0].outcome if findings else Outcome.ACCEPTED
        return Verdict(self.name, self.release, worst, tuple(deduplicated(f.problem for f in findings)))

    def _findings(self, folder: AdapterFolder) -> Iterator[Finding]:
        if folder.form != self.form:
            where, what = _wrong_form(self, folder)
            if why := self._why_no_export(folder):
                yield Finding(Outcome.REJECTED, Diagnostic(where, what, f"no export helps: {why}"))
            else:
                yield self.finding(Outcome.REJECTED, where, what, merged=False)
            return
        if self.form == "peft" and folder.peft_type not in self.types:
            found = f"the PEFT type {folder.peft_type}" if folder.peft_type else "a configuration without `peft_type`"
            if folder.peft_type in VIRTUAL_TOKENS:
                fix = "no export helps: what stands before the text is neither a LoRA nor a change of weights"
                yield Finding(Outcome.REJECTED, Diagnostic(NAME, f"{self.title} refuses {found}", fix))
                return
            merged = without_low_rank_form(folder.peft_type)
            yield self.finding(Outcome.REJECTED, NAME, f"{self.title} refuses {found}", merged=merged)
            return
        if folder.is_lora:
            yield from self._features(folder)
            yield from self._scales(folder)
        yield from self.rules(folder)

    def _why_no_export(self, folder: AdapterFolder) -> str:
        """Why an adapter in lorary's own form has none that this reader takes; empty if it may have one."""
        if self.types & VIRTUAL_TOKENS.keys() and has_virtual_tokens(folder.own_sites):
            return ""  # PEFT has a prefix and a prompt
        lasting = [f.no_export for f in FEATURES.values() if f.no_export and folder.is_lora and f.places(folder)]
        if lasting:
            return lasting[0]
        joins = (adapted.join for adapted in folder.own_sites)
        return next((f"{type(j).__name__} {j.why_not_merged}" for j in joins if j.why_not_merged), "")

    def _features(self, folder: AdapterFolder) -> Iterator[Finding]:
        for names, outcome, verb in (
            (self.refuses, Outcome.REJECTED, "refuses"),
            (self.ignores, Outcome.MISCOMPUTED, "computes without"),
        ):
            for name, feature in FEATURES.items():
                if name in names and (places := feature.places(folder)):
                    what = f"{self.title} {verb} {feature.noun}"
                    if feature.no_export:
                        fix = f"no export helps: {feature.no_export}"
                        yield Finding(outcome, Diagnostic(first_of(places), what, fix))
                    else:
                        yield self.finding(outcome, first_of(places), what, merged=feature.merged)

    def _scales(self, folder: AdapterFolder) -> Iterator[Finding]:
        wrong = []
        for site, shape in folder.sites.items():
            if is_of_experts(site):
                continue
            theirs, own = self.scale(folder, site, shape[0]), folder.scale(site)
            if not math.isclose(theirs, own, rel_tol=1e-6):
                wrong.append((site, f"{self.title} computes with the scale {theirs:.4g}, and its own is {own:.4g}"))
        if wrong:
            yield self.finding(Outcome.MISCOMPUTED, first_of([site for site, _ in wrong]), wrong[0][1], merged=False)

    def unexplained(self, folder: AdapterFolder) -> list[str]:
        """The tensors that are neither LoRA's factors nor of a feature that it refuses anyway."""
        refused = {place for name in self.refuses for place in FEATURES[name].places(folder)}
        return [name for name in folder.others if name not in refused]

    def finding(self, outcome: Outcome, where: str, what: str, *, merged: bool) -> Finding:
        """A finding with the export that helps.

        Args:
            outcome: rejected or miscomputed.
            where: the field, file, tensor or site.
            what: what the reader does there.
            merged: whether only a merged model helps.
        """
        to = "merged" if merged or not self.export else self.export
        return Finding(outcome, Diagnostic(where, what, f"lorary export ADAPTER OUT --to {to}"))


def first_of(places: list[str]) -> str:
    """The first place and the number of the others."""
    return places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1:,} more"


def missing_fields(reader: Reader, folder: AdapterFolder) -> Iterator[Finding]:
    """The first field that a reader needs and the configuration lacks."""
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in folder.config:
            what = f"is missing, and {reader.title} needs it"
            yield reader.finding(Outcome.REJECTED, f"{NAME}: {key}", what, merged=False)
            return


def rank_findings(reader: Reader, folder: AdapterFolder, outcome: Outcome) -> Iterator[Finding]:
    """The sites whose tensors have another rank than the configuration says."""
    wrong = {}
    for name, shape in folder.sites.items() if folder.is_lora else ():
        rank, _ = folder.rank_and_alpha(name)
        if shape[0] != rank and not is_of_experts(name):
            wrong[name] = f"has the rank {shape[0]}, and the configuration says {rank}"
    if wrong:
        yield reader.finding(outcome, first_of(list(wrong)), next(iter(wrong.values())), merged=False)


def is_of_experts(site: str) -> bool:
    """Whether a site is a fused parameter of all experts of a layer, whose tensors hold every expert's rank."""
    return site.endswith((".experts", ".experts.base_layer"))


def _wrong_form(reader: Reader, folder: AdapterFolder) -> tuple[str, str]:
    """(where, what) for a folder of another form than the reader's."""
    if folder.form == "lorary":
        return native.NAME, f"is lorary's own form, which {reader.title} does not read"
    if folder.form == "mlx":
        return MLX_WEIGHTS, f"is mlx-lm's form, and {reader.title} looks for {WEIGHTS}"
    return WEIGHTS, f"is PEFT's form, and {reader.title} looks for {MLX_WEIGHTS}"
