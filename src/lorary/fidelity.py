"""Fidelity: how near a merged model is to the live adapter, layer by layer and as a whole.

A merge computes W' exactly and rounds it once. What rounding loses is small beside W and need not be small beside the
adapter's own update: where that is a hundredth of W, bfloat16 loses a sixth of it. So errors are told relative to the
update, ||W' as kept - W'|| / ||W' - W||, and with them what the two models say of the same rows.

    live = lorary.Live.of(model, rows)
    print(live.merge(model))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorary.adapted import Adapted, adapted
from lorary.errors import Problem, StateError
from lorary.loop import evaluating
from lorary.merging import merge
from lorary.residual import pristine
from lorary.state import require
from lorary.weights import is_packed
from lorary.words import Join

LOSS = 0.05  # of its own effect: an adapter that loses more by rounding is worth advice
_SHOWN = 10  # sites in a printed report
_CHUNK = 2**24  # logits that are compared at once, in 64 bits

Row = Tensor | Sequence[int] | Mapping[str, Any]


@dataclass(frozen=True)
class SiteFidelity:
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
class Fidelity:
    """How near a merged model is to the live adapter. Prints as a table, the worst sites first.

    Args:
        sites: the merged weights.
        tokens: how many positions the two models were compared at; 0: they were not.
        top1: the share of them at which both have the same likeliest token.
        kl: KL(live || merged) in nats per token.
        largest: the largest difference of a logit.
    """

    sites: tuple[SiteFidelity, ...] = field(repr=False)
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
    def worst(self) -> list[SiteFidelity]:
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


class Live(NamedTuple):
    """What a live adapter says of some rows, to hold the merged model against.

    The logits are kept in 32 bits: 4 bytes for every token and word of the vocabulary.

    Args:
        rows: the inputs.
        logits: [positions, vocabulary] of each row.
        packed: the sites whose base was packed.
    """

    rows: tuple[Row, ...]
    logits: tuple[Tensor, ...]
    packed: frozenset[str]

    @staticmethod
    def of(model: nn.Module, rows: Iterable[Row] = ()) -> Live:
        """What the model says now.

        Args:
            model: with adapters attached.
            rows: token ids, or the keyword arguments of one forward pass, of each row.

        Raises:
            StateError: nothing is attached.
        """
        require(model, "measure")
        rows = tuple(rows)
        packed = frozenset(name for name, layer in adapted(model).items() if is_packed(layer.base))
        return Live(rows, tuple(logits(model, row) for row in rows), packed)

    def merge(self, model: nn.Module, *, dtype: torch.dtype | None = None, keep: bool = False) -> Fidelity:
        """`lorary.merge`, and how near the merged model is.

        Args:
            model: the model of `of`; or, where that was packed, the same adapter on the base before it was packed
                (`lorary.load(base, path, pack=False)`).
            dtype, keep: as for `lorary.merge`.

        Raises:
            StateError: as `lorary.merge`; the model is not one that these rows were shown to.
        """
        sites = self.sites(model, dtype)
        merge(model, keep=keep, dtype=dtype)
        return self.against(model, sites)

    def sites(self, model: nn.Module, dtype: torch.dtype | None = None) -> tuple[SiteFidelity, ...]:
        """What a merge of this model would do to each weight; one layer at a time, and nothing is merged.

        Raises:
            StateError: nothing is attached; or a site that was packed is not there.
        """
        require(model, "measure")
        layers = adapted(model)
        if missing := sorted(self.packed - layers.keys()):
            fix = "merge the model that was measured, or the same adapter on its original base"
            raise StateError("cannot measure:", [Problem(name, "is not adapted here", fix) for name in missing])
        return tuple(
            _site(model, layer, dtype, original=name in self.packed and not is_packed(layer.base))
            for name, layer in layers.items()
        )

    def against(self, model: nn.Module, sites: tuple[SiteFidelity, ...] = ()) -> Fidelity:
        """The report, once the model is merged."""
        tokens, same, nats, far = 0, 0, 0.0, []
        for row, before in zip(self.rows, self.logits, strict=True):
            after = logits(model, row)
            step = max(1, _CHUNK // before.shape[-1])
            for p, q in zip(before.split(step), after.split(step), strict=True):
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
                nats += float(F.kl_div(_log(q), _log(p), reduction="sum", log_target=True))
                far.append((p - q).abs().max())
            tokens += len(before)
        if not tokens:
            return Fidelity(sites)
        largest = float(torch.stack(far).max())  # and not Python's `max`, which passes over NaN
        return Fidelity(sites, tokens, same / tokens, max(nats, 0.0) / tokens, largest)


@torch.no_grad()
def logits(model: nn.Module, row: Row) -> Tensor:
    """[positions, vocabulary] in 32 bits on the CPU: what a model says of one row, in evaluation mode.

    Args:
        model: whose output is logits, or has them by that name.
        row: token ids, or the keyword arguments of a forward pass.
    """
    device = next(model.parameters()).device
    inputs = row if isinstance(row, Mapping) else {"input_ids": torch.as_tensor(row).reshape(1, -1)}
    with evaluating(model):
        made = model(**{name: t.to(device) if isinstance(t, Tensor) else t for name, t in inputs.items()})
    found = cast(Tensor, getattr(made, "logits", made))
    return found.reshape(-1, found.shape[-1]).float().cpu()


@torch.no_grad()
def _site(model: nn.Module, layer: Adapted, dtype: torch.dtype | None, *, original: bool) -> SiteFidelity:
    merged, _ = layer.merged()  # [out, inp]
    kept = merged.to(layer.dtype if dtype is None else dtype)
    W = _matrix(layer, pristine(model, layer.site.name)).to(merged)
    if original:
        merged, W = _as_packed(layer, W)
    name = str(kept.dtype).removeprefix("torch.")
    return SiteFidelity(layer.site.name, _norm(kept.to(merged) - merged), _norm(merged - W), _norm(W), name, original)


def _as_packed(layer: Adapted, W: Tensor) -> tuple[Tensor, Tensor]:
    """(W', W) [out, inp] of a plain layer as they are once the method's storage has packed it."""
    start = layer.start_factors()
    gift = torch.zeros_like(W) if start is None else layer.scale * start[0].to(W) @ start[1].to(W)
    held = layer.kind.matrix(layer.method.storage.pack(layer.base, W - gift)).to(W)
    B, A = (factor.to(W) for factor in layer.factors())
    b = None if layer.bias is None else layer.bias.to(W)
    merged, _ = cast(Join, layer.method.join).merged(layer.tensors, held, b, (layer.scale * B, A))
    return merged, held + gift


def _matrix(layer: Adapted, W: Tensor) -> Tensor:
    """A weight in the layer's own layout as [out, inp]."""
    like = SimpleNamespace(weight=W)
    return layer.kind.matrix(like)


def _norm(M: Tensor) -> float:
    return float(torch.linalg.vector_norm(M, dtype=torch.float64))


def _log(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0


def _percent(ratio: float) -> str:
    if math.isinf(ratio):
        return "no effect"
    return f"{ratio:.1f} times" if ratio >= 10 else f"{ratio:.2%}"


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
