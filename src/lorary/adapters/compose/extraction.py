"""Extraction: an adapter that was extracted from two checkpoints, and its error at every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorary.adapters.adapter import Adapter
from lorary.adapters.compose.truncate import relative
from lorary.model.plan import human_bytes
from lorary.model.targets import abbreviated
from lorary.model.text_table import aligned, first_rows

_SHOWN = 10  # layers in a printed table
HEAD = ("site", "rank", "||dW||", "||dW|| / ||W||", "error")


@dataclass(frozen=True)
class ExtractedSite:
    """The change of one weight, in Frobenius norms, and its approximation.

    Args:
        site: its name.
        rank: of the factors.
        weight: ||W|| of the base.
        change: ||dW||, tuned minus base.
        lost: ||dW - B A||.
        exact: whether no factors of that rank are nearer; otherwise they come from an iteration, whose squared error
            would have changed by less than a thousandth in one more step.
    """

    site: str
    rank: int
    weight: float
    change: float
    lost: float
    exact: bool = True

    @property
    def error(self) -> float:
        """||dW - B A|| / ||dW||: by Eckart and Young the root of the omitted share of the squared singular values."""
        return relative([(self.lost, self.change)])

    def row(self) -> tuple[str, ...]:
        """Its row in a table with `HEAD`."""
        effect = f"{self.change / self.weight:.2%}" if self.weight else "new"
        return self.site, str(self.rank), f"{self.change:.4g}", effect, f"{self.error:.2%}"


@dataclass(frozen=True)
class Extraction:
    """An extracted adapter. Prints as a table, the layers with the largest errors first.

    Args:
        adapter: a plain LoRA on the base, with parameters in full.
        sites: the adapted layers.
        left_out: weight matrix that differs and is not among the targets -> ||dW||.
        unchanged: number of parameters and buffers that are equal.
    """

    adapter: Adapter
    sites: tuple[ExtractedSite, ...] = field(repr=False)
    left_out: Mapping[str, float] = field(default_factory=dict)
    unchanged: int = 0

    @property
    def error(self) -> float:
        """||dW - B A|| / ||dW|| over all adapted layers together."""
        return relative([(s.lost, s.change) for s in self.sites])

    @property
    def worst(self) -> list[ExtractedSite]:
        """The adapted layers, the largest relative error first."""
        return sorted(self.sites, key=lambda s: -s.error)

    def rows(self, most: int = _SHOWN) -> list[tuple[str, ...]]:
        """Rows of a table with `HEAD`: the `most` layers with the largest errors."""
        return first_rows([s.row() for s in self.worst], most)

    def lines(self) -> list[str]:
        """Everything beside the table, in sentences."""
        lines = []
        if self.sites:
            ranks = sorted({s.rank for s in self.sites})
            rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
            off = f"their change is off by {self.error:.2%} in the Frobenius norm"
            lines.append(f"{len(self.sites):,} layers adapted with {rank}: {off}")
            lines.append(self._optimality())
        if full := self.adapter.full:
            size = human_bytes(sum(t.nbytes for t in full.values()))
            lines.append(f"kept in full, exactly ({size}): {abbreviated(full)}")
        if self.left_out:
            out, kept = math.hypot(*self.left_out.values()), math.hypot(*(s.change for s in self.sites))
            share = out**2 / (out**2 + kept**2)
            what = f"{len(self.left_out):,} weights that differ are left out, with {share:.2%} of the squared change"
            lines.append(f"{what}: {abbreviated(self.left_out)}")
        return [*lines, f"{self.unchanged:,} parameters and buffers are equal"]

    def _optimality(self) -> str:
        found = sum(not s.exact for s in self.sites)
        if not found:
            return "no factors of these ranks are nearer (Eckart and Young)"
        where = "all" if found == len(self.sites) else f"{found:,} of them, the largest"
        return f"randomised SVD at {where}: within a thousandth of the least squared error of these ranks"

    def to_dict(self) -> dict[str, Any]:
        """The result in JSON types."""
        full = {name: list(t.shape) for name, t in self.adapter.full.items()}
        whole = {"error": self.error, "full": full, "left_out": dict(self.left_out), "unchanged": self.unchanged}
        return whole | {"sites": [vars(s) | {"error": s.error} for s in self.worst]}

    def __str__(self) -> str:
        return "\n".join([*self.lines(), *(aligned([HEAD, *self.rows()]) if self.sites else [])])
