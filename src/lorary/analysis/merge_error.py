"""MergeError: how near a merged model is to the live adapter, layer by layer and as a whole. `lorary.analysis.merge_check` measures it.

A merge computes W' exactly and rounds it once. What rounding loses is small beside W and need not be small beside the
adapter's own update: where that is a hundredth of W, bfloat16 loses a sixth of it. So errors are told relative to the
update, ||W' as kept - W'|| / ||W' - W||, and with them what the two models say of the same rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

LOSS = 0.05  # of its own effect: an adapter that loses more by rounding is worth advice
_SHOWN = 10  # sites in a printed report


@dataclass(frozen=True)
class SiteMergeError:
    """One merged weight, as Frobenius norms.

    Args:
        site: where.
        off: ||W' as kept - W'||, with W' what the live layer computes with.
        change: ||W' - W||, the adapter's own effect.
        weight: ||W||, of the base.
        dtype: of the weight as it is kept, such as `bfloat16`.
        original: whether W' was trained on a packed weight, and merged into the weight before it was packed.
    """

    site: str
    off: float
    change: float
    weight: float
    dtype: str
    original: bool = False

    @property
    def error(self) -> float:
        """What the merge loses, relative to the adapter's own effect."""
        return _ratio(self.off, self.change)

    @property
    def effect(self) -> float:
        """The adapter's own effect, relative to the base's weight."""
        return _ratio(self.change, self.weight)


@dataclass(frozen=True)
class MergeError:
    """How near a merged model is to the live adapter. Prints as a table, the worst sites first.

    Args:
        sites: the merged weights.
        tokens: how many positions the two models were compared at; 0: they were not.
        top1: the share of them at which both have the same likeliest token.
        kl: KL(live || merged) in nats per token.
        largest: the largest difference of a logit.
    """

    sites: tuple[SiteMergeError, ...] = field(repr=False)
    tokens: int = 0
    top1: float = math.nan
    kl: float = math.nan
    largest: float = math.nan

    @property
    def error(self) -> float:
        """That of all sites together: the norms are those of all weights in one."""
        return _ratio(self._norm("off"), self._norm("change"))

    @property
    def effect(self) -> float:
        """The same of ||dW|| / ||W||."""
        return _ratio(self._norm("change"), self._norm("weight"))

    @property
    def original(self) -> bool:
        """Whether weights were merged into what they had been before they were packed."""
        return any(site.original for site in self.sites)

    def _norm(self, name: str) -> float:
        return math.sqrt(math.fsum(getattr(site, name) ** 2 for site in self.sites))

    @property
    def worst(self) -> list[SiteMergeError]:
        """The sites, the one that loses most of its effect first."""
        return sorted(self.sites, key=lambda site: -site.error)

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do about it, in sentences; nothing where the merge is faithful."""
        if self.sites and not any(site.change for site in self.sites):
            return ("the adapter changes no weight: is it the trained one?",)
        said = []
        if self.original:
            said.append(
                f"these are not the weights that the adapter was trained on: with what packing had lost of them comes "
                f"back {self.error:.2g} times as much as the adapter changes. Often that is the better model, but it "
                "is another one: evaluate it"
            )
        poor = [site for site in self.worst if site.change and site.error > LOSS and not site.original]
        if poor:
            where = f"at {len(poor):,} of {len(self.sites):,} sites" if len(poor) < len(self.sites) else "everywhere"
            dtypes = sorted({site.dtype for site in poor})
            wider = [] if dtypes == ["float32"] else ["merge in float32"]
            fixes = " or ".join([*wider, "keep the adapter beside its base"])
            said.append(
                f"{', '.join(dtypes)} loses more than {LOSS:.0%} of what the adapter changes {where}, since that is "
                f"little: {poor[0].effect:.2%} of the weight at {poor[0].site}, of which {poor[0].error:.0%} is lost. "
                f"To keep it, {fixes}"
            )
        return tuple(said)

    def to_dict(self) -> dict[str, Any]:
        """The whole report in plain values, for a file: what is not finite there is None."""
        sites = [{"site": s.site, "error": s.error, "effect": s.effect, "dtype": s.dtype} for s in self.sites]
        names = ("error", "effect", "tokens", "top1", "kl", "largest")
        whole = {name: getattr(self, name) for name in names} | {"original": self.original}
        finite = [_finite(record) for record in (whole, *sites)]
        return finite[0] | {"advice": list(self.advice), "sites": finite[1:]}

    def rows(self, most: int = _SHOWN) -> list[tuple[str, str, str]]:
        """Cells of a table: (site, ||dW|| / ||W||, error), the worst `most` sites, then all of them together."""
        shown = [(s.site, f"{s.effect:.2%}", _percent(s.error)) for s in self.worst[:most]]
        rest = len(self.sites) - len(shown)
        if rest > 0:
            shown.append((f"and {rest:,} more", "", ""))
        return [*shown, ("together", f"{self.effect:.2%}", _percent(self.error))]

    @property
    def compared(self) -> str:
        """What the comparison of the two models came to, in one line."""
        if not self.tokens:
            return "the two models were not compared: there were no rows"
        return (
            f"logits differ by at most {self.largest:.2g}, top-1 agrees at {self.top1:.1%} of {self.tokens:,} tokens, "
            f"KL {self.kl:.2g} nats per token"
        )

    def __str__(self) -> str:
        rows = [HEAD, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([*map(str.rstrip, lines), self.compared, *(f"advice: {text}" for text in self.advice)])


HEAD = ("site", "||dW|| / ||W||", "error / ||dW||")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0


def _percent(ratio: float) -> str:
    if math.isinf(ratio):
        return "no effect"
    return f"{ratio:.1f} times" if ratio >= 10 else f"{ratio:.2%}"


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
