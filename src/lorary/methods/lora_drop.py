"""LoRA-drop: g_l = sum over x of |s B_l A_l x_l|^2; layers with a small share of it share one LoRA.

A short training run, the probe, trains a LoRA in every layer. Layers whose LoRA has a large output keep one of their
own; all others of the same module kind share one, which trains as well. Then training starts over. It is not a
component of a method but a function from plan to plan: `lorary.layer_importance` measures, `lorary.drop_layers`
chooses.

With z = A x the norm is s^2 z^T (B^T B) z: B^T B is r x r, and the layer's output is never formed.

Zhou et al. 2024, arXiv:2402.07721. I_l = g_l / sum of g; the layers kept are the smallest set, the largest first,
whose I add up to T.

Differs from the paper: layers are ranked and share within their module kind (q with q, down with down), which the paper
leaves open; padding tokens do not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorary.errors import Diagnostic, FileError
from lorary.layers.module_kinds import module_positions
from lorary.methods.lora import Add
from lorary.spec.calibration import CalibratedInit
from lorary.spec.method import Method, braces
from lorary.spec.placement import start_source
from lorary.spec.presets import PlanFunction, register_plan_function

THRESHOLD = 0.9  # the paper's T


@dataclass(frozen=True)
class Measured:
    """One layer's importance.

    Args:
        site: its name.
        g: the sum of |s B A x|^2 over the tokens.
        relative: |s B A x| over |W x|, each the root of the sum over the tokens. Unlike g it does not grow with the
            layer's activations.
    """

    site: str
    g: float
    relative: float


@dataclass(frozen=True)
class Importance:
    """The importance of every layer after a probe, measured on data. Prints as a table.

    Args:
        measured: the layers, in any order.
        tokens: the number of tokens measured.
    """

    measured: tuple[Measured, ...]
    tokens: int = field(default=0, compare=False)

    @property
    def g(self) -> dict[str, float]:
        """site -> g."""
        return {m.site: m.g for m in self.measured}

    @property
    def I(self) -> dict[str, float]:  # noqa: E743, N802 (the paper's letter)
        """site -> its share of the sum over all layers: together 1."""
        total = math.fsum(m.g for m in self.measured)
        return {m.site: m.g / total if total else 0.0 for m in self.measured}

    @property
    def within(self) -> dict[str, float]:
        """site -> its share of the sum over its module kind, which T is compared with."""
        return {
            site: self.g[site] / total if total else 0.0
            for members in self._kinds()
            for total in [math.fsum(self.g[site] for site in members)]
            for site in members
        }

    def kept(self, threshold: float = THRESHOLD) -> frozenset[str]:
        """The fewest layers of every module kind that make up `threshold` of its sum; 1 keeps all.

        The name breaks ties, so that the result does not depend on the order of the layers.
        """
        if threshold >= 1:
            return frozenset(self.g)
        chosen: set[str] = set()
        for members in self._kinds():
            ranked = sorted(members, key=lambda site: (-self.g[site], site))
            enough, count = threshold * math.fsum(self.g[site] for site in ranked), 0
            while math.fsum(self.g[site] for site in ranked[:count]) < enough:
                count += 1
            chosen |= set(ranked[:count])
        return frozenset(chosen)

    def _kinds(self) -> list[list[str]]:
        kinds: dict[str, list[str]] = {}
        for site, position in module_positions(self.g).items():
            kinds.setdefault(position.kind, []).append(site)
        return list(kinds.values())

    def __str__(self) -> str:
        I, within = self.I, self.within  # noqa: E741
        rows = [("site", "g", "I", "of its kind", "|s B A x| / |W x|")]
        for m in sorted(self.measured, key=lambda m: -m.g):
            figures = (f"{m.g:.4g}", f"{I[m.site]:.2%}", f"{within[m.site]:.2%}", f"{m.relative:.3g}")
            rows.append((m.site, *figures))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a file."""
        I = self.I  # noqa: E741
        sites = {m.site: {"g": m.g, "I": I[m.site], "relative": m.relative} for m in self.measured}
        return {"tokens": self.tokens, "sites": sites}

    @staticmethod
    def from_dict(data: Any) -> Importance:
        """The inverse of `to_dict`.

        Raises:
            FileError: `data` is not such a record; every reason.
        """
        sites = data.get("sites") if isinstance(data, Mapping) else None
        if not isinstance(sites, Mapping) or not sites:
            raise FileError("invalid importance record:", [Diagnostic("sites", "holds no layers")])
        problems = [
            Diagnostic(str(site), f"`{key}` is not a finite number of at least 0")
            for site, figures in sites.items()
            for key in ("g", "relative")
            if not _is_size(figures.get(key) if isinstance(figures, Mapping) else None)
        ]
        tokens = data.get("tokens")
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
            problems.append(Diagnostic("tokens", "is not a whole number of at least 0"))
        if problems:
            raise FileError("invalid importance record:", problems)
        found = (Measured(str(site), float(f["g"]), float(f["relative"])) for site, f in sites.items())
        return Importance(tuple(found), tokens)


def _is_size(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def squared_norms(z: Tensor, B: Tensor, s: float, groups: int = 1) -> Tensor:
    """|s B z|^2 as s^2 z^T (B^T B) z, without forming B z.

    Args:
        z: [..., groups * r], which is A x; for a grouped convolution A x of every group, side by side.
        B: [out, r]; the rows of each group act on its own r numbers.
        s: the scale.
        groups: of a convolution.

    Returns:
        [...]
    """
    blocks = B.reshape(groups, -1, B.shape[1])  # [groups, out / groups, r]
    gram = blocks.mT @ blocks  # [groups, r, r]
    z = z.unflatten(-1, (groups, -1))
    return torch.einsum("...gi,gij,...gj->...", z, gram, z).clamp(min=0) * s**2


def measuring_problems(method: Method) -> list[Diagnostic]:
    """The reasons why the importance of a method's layers cannot be measured or is meaningless."""
    if method.delta is None:
        return [Diagnostic("method", "adapts no layers: there are none to choose from")]
    problems, delta, join = [], method.delta, method.join
    if not isinstance(join, Add):
        what = f"{type(join).__name__} changes a layer's output by more than s B A x, which is what is measured"
        problems.append(Diagnostic("join", what, "use a method that adds s B A to W"))
    if delta.shared:
        what = f"all layers share {braces(delta.shared)} of {type(delta).__name__} already"
        problems.append(Diagnostic("delta", what, "leave LoRA-drop out"))
    for rule in method.rules:
        what = f"{type(rule).__name__} decides for each layer while it trains, from that layer's own tensors"
        problems.append(Diagnostic("rules", what, "leave LoRA-drop out, or the rule"))
    return problems


def sharing_problems(method: Method) -> list[Diagnostic]:
    """The reasons why layers cannot be measured, or cannot share a method's tensors afterwards."""
    problems = measuring_problems(method)
    if method.init is not None and (method.init.residual_init or isinstance(method.init, CalibratedInit)):
        own = f"its own {start_source(method.init)}"
        what = f"{type(method.init).__name__} starts each layer from {own}, and layers that share start alike"
        problems.append(Diagnostic("init", what, "use another init"))
    return problems


def probe_note(threshold: float, sample: float) -> str:
    """The note of a plan that a probe will change."""
    return (
        f"LoRA-drop: a probe on {sample:.3g} of the training rows will choose which layers keep tensors of their own "
        f"(T = {threshold:g}); the others of a module kind will share one set"
    )


def unknown_sites(found: Iterable[str], planned: Iterable[str]) -> list[Diagnostic]:
    """The differences between the layers that were measured and those of a plan."""
    here, there = set(planned), set(found)
    missing = [Diagnostic(site, "is planned, but was not measured") for site in sorted(here - there)]
    return missing + [Diagnostic(site, "was measured, but is not planned") for site in sorted(there - here)]


register_plan_function(
    PlanFunction(
        "lora-drop",
        about=__doc__ or "",
        citation="Zhou et al. 2024, arXiv:2402.07721",
        when="For fewer parameters than LoRA's, if a short probe on the same data is affordable.",
        changes="which layers share their tensors",
        what="is not a method: it chooses layers for one",
        say="`drop: {threshold: 0.9}` under `method:` in a configuration, or call lorary.drop_layers",
        section={"drop": {"threshold": THRESHOLD}},
        answers=frozenset({"layers=differ", "layers=search"}),
        why_not=sharing_problems,
    )
)
