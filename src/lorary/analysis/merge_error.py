"""MergeError: the rounding error of a merge, per site and in total, as measured by `lorary.analysis.merge_check`.

A merge computes W' exactly and rounds it once. The rounding error is small compared with W, but not with the adapter's
update: if that is a hundredth of W, bfloat16 loses a sixth of it. So errors are relative to the update,
||W' stored - W'|| / ||W' - W||, and the outputs of both models on the same rows are compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lorary.files.strict_json import finite
from lorary.model.text_table import aligned, first_rows

LOSS = 0.05  # of the update: a larger rounding error leads to advice
_SHOWN = 10  # sites in a printed report


@dataclass(frozen=True)
class SiteMergeError:
    """The Frobenius norms of one merged weight.

    Args:
        site: its name.
        off: ||W' stored - W'||, with W' the weight of the adapted layer.
        change: ||W' - W||, the adapter's update.
        weight: ||W||, of the base.
        dtype: of the stored weight, such as `bfloat16`.
        original: whether an adapter trained on a quantised weight was merged into the original weight.
    """

    site: str
    off: float
    change: float
    weight: float
    dtype: str
    original: bool = False

    @property
    def error(self) -> float:
        """The rounding error relative to the adapter's update."""
        return _ratio(self.off, self.change)

    @property
    def effect(self) -> float:
        """The adapter's update relative to the base weight."""
        return _ratio(self.change, self.weight)


@dataclass(frozen=True)
class MergeError:
    """The difference between a merged model and the adapted one. Prints as a table, the worst sites first.

    Args:
        sites: the merged weights.
        tokens: number of compared positions; 0: none.
        top1: the share of them at which both models have the same likeliest token.
        kl: KL(adapted || merged) in nats per token.
        largest: the largest difference of a logit.
    """

    sites: tuple[SiteMergeError, ...] = field(repr=False)
    tokens: int = 0
    top1: float = math.nan
    kl: float = math.nan
    largest: float = math.nan

    @property
    def error(self) -> float:
        """The rounding error relative to the update, over all sites together."""
        return _ratio(self._norm("off"), self._norm("change"))

    @property
    def effect(self) -> float:
        """||dW|| / ||W|| over all sites together."""
        return _ratio(self._norm("change"), self._norm("weight"))

    @property
    def original(self) -> bool:
        """Whether the adapter was merged into original weights, though it was trained on quantised ones."""
        return any(site.original for site in self.sites)

    def _norm(self, name: str) -> float:
        return math.sqrt(math.fsum(getattr(site, name) ** 2 for site in self.sites))

    @property
    def worst(self) -> list[SiteMergeError]:
        """The sites, the largest relative error first."""
        return sorted(self.sites, key=lambda site: -site.error)

    @property
    def advice(self) -> tuple[str, ...]:
        """Advice in sentences; empty if the merge is accurate."""
        if self.sites and not any(site.change for site in self.sites):
            return ("the adapter changes no weight: is it the trained one?",)
        advice = []
        if self.original:
            advice.append(
                f"the adapter was trained on quantised weights: undoing the quantisation error changes the weights by "
                f"{self.error:.2g} times as much as the adapter does. Often that is the better model, but it is "
                "another one: evaluate it"
            )
        poor = [site for site in self.worst if site.change and site.error > LOSS and not site.original]
        if poor:
            where = f"at {len(poor):,} of {len(self.sites):,} sites" if len(poor) < len(self.sites) else "everywhere"
            dtypes = sorted({site.dtype for site in poor})
            wider = [] if dtypes == ["float32"] else ["merge in float32"]
            fixes = " or ".join([*wider, "keep the adapter beside its base"])
            advice.append(
                f"{', '.join(dtypes)} loses more than {LOSS:.0%} of a small update {where}: it is "
                f"{poor[0].effect:.2%} of the weight at {poor[0].site}, of which {poor[0].error:.0%} is lost. "
                f"To keep it, {fixes}"
            )
        return tuple(advice)

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON types; None for values that are not finite."""
        sites = [{"site": s.site, "error": s.error, "effect": s.effect, "dtype": s.dtype} for s in self.sites]
        names = ("error", "effect", "tokens", "top1", "kl", "largest")
        whole = {name: getattr(self, name) for name in names} | {"original": self.original}
        plain = [finite(record) for record in (whole, *sites)]
        return plain[0] | {"advice": list(self.advice), "sites": plain[1:]}

    def rows(self, most: int = _SHOWN) -> list[tuple[str, ...]]:
        """Rows of a table: (site, ||dW|| / ||W||, error), the worst `most` sites, then all together."""
        rows = [(s.site, f"{s.effect:.2%}", _percent(s.error)) for s in self.worst]
        return [*first_rows(rows, most), ("together", f"{self.effect:.2%}", _percent(self.error))]

    @property
    def compared(self) -> str:
        """The comparison of the two models in one line."""
        if not self.tokens:
            return "the two models were not compared: no rows were given"
        return (
            f"logits differ by at most {self.largest:.2g}, top-1 agrees at {self.top1:.1%} of {self.tokens:,} tokens, "
            f"KL {self.kl:.2g} nats per token"
        )

    def __str__(self) -> str:
        lines = [*aligned([HEAD, *self.rows()]), self.compared, *(f"advice: {text}" for text in self.advice)]
        return "\n".join(lines)


HEAD = ("site", "||dW|| / ||W||", "error / ||dW||")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0


def _percent(ratio: float) -> str:
    if math.isinf(ratio):
        return "no effect"
    return f"{ratio:.1f} times" if ratio >= 10 else f"{ratio:.2%}"
