"""MergeCheck: the answers of a live adapter, to compare with those of the merged model.

    check = lorary.MergeCheck.of(model, rows)
    print(check.merge(model))

There is one model at a time, and one layer of it is measured at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorary.analysis.merge_error import MergeError, SiteMergeError
from lorary.errors import Diagnostic, StateError
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.layers.quantized_weight import is_quantized
from lorary.model.merge import merge
from lorary.model.quantize import exact_modules, precision
from lorary.model.residual_base import original_weight
from lorary.model.state import eval_mode, require

_CHUNK = 2**24  # logits that are compared at once, in 64 bits

Row = Tensor | Sequence[int] | Mapping[str, Any]


class MergeCheck(NamedTuple):
    """What a live adapter says of some rows, to hold the merged model against.

    The logits are kept in 32 bits: 4 bytes for every token and word of the vocabulary.

    Args:
        rows: the inputs.
        logits: [positions, vocabulary] of each row.
        packed: the sites whose base was packed.
    """

    rows: tuple[Row, ...]
    logits: tuple[Tensor, ...]
    quantized: frozenset[str]

    @staticmethod
    def of(model: nn.Module, rows: Iterable[Row] = ()) -> MergeCheck:
        """What the model says now.

        Args:
            model: with adapters attached.
            rows: token ids, or the keyword arguments of one forward pass, of each row.

        Raises:
            StateError: nothing is attached.
        """
        require(model, "measure")
        rows = tuple(rows)
        packed = frozenset(name for name, layer in adapted_layers(model).items() if is_quantized(layer.base))
        return MergeCheck(rows, tuple(logits(model, row) for row in rows), packed)

    def merge(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> MergeError:
        """`lorary.merge`, and how near the merged model is.

        Args:
            model: the model of `of`; or, where that was packed, the same adapter on the base before it was packed
                (`lorary.load(base, path, pack=False)`).
            dtype: of the merged model, all its plain weights; None for those that they have.

        Raises:
            StateError: as `lorary.merge`; the model is not one that these rows were shown to.
        """
        sites = self.sites(model, dtype)
        merge(model, dtype=dtype)
        if dtype is not None:
            round_weights(model, dtype)
        return self.against(model, sites)

    def sites(self, model: nn.Module, dtype: torch.dtype | None = None) -> tuple[SiteMergeError, ...]:
        """What a merge of this model would do to each weight; one layer at a time, and nothing is merged.

        Raises:
            StateError: nothing is attached; or a site that was packed is not there.
        """
        require(model, "measure")
        layers = adapted_layers(model)
        if missing := sorted(self.quantized - layers.keys()):
            fix = "merge the model that was measured, or the same adapter on its original base"
            raise StateError("cannot measure:", [Diagnostic(name, "is not adapted here", fix) for name in missing])
        return tuple(
            _site(model, layer, dtype, original=name in self.quantized and not is_quantized(layer.base))
            for name, layer in layers.items()
        )

    def against(self, model: nn.Module, sites: tuple[SiteMergeError, ...] = ()) -> MergeError:
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
            return MergeError(sites)
        largest = float(torch.stack(far).max())  # and not Python's `max`, which passes over NaN
        return MergeError(sites, tokens, same / tokens, max(nats, 0.0) / tokens, largest)


@torch.no_grad()
def logits(model: nn.Module, row: Row) -> Tensor:
    """[positions, vocabulary] in 32 bits on the CPU: what a model says of one row, in evaluation mode.

    Args:
        model: whose output is logits, or has them by that name.
        row: token ids, or the keyword arguments of a forward pass.
    """
    device = next(model.parameters()).device
    inputs = row if isinstance(row, Mapping) else {"input_ids": torch.as_tensor(row).reshape(1, -1)}
    with eval_mode(model):
        made = model(**{name: t.to(device) if isinstance(t, Tensor) else t for name, t in inputs.items()})
    found = cast(Tensor, getattr(made, "logits", made))
    return found.reshape(-1, found.shape[-1]).float().cpu()


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Every plain weight in this precision, but for those that the architecture wants in 32 bits.

    Buffers stay as they are: positions are computed from them.
    """
    exact = exact_modules(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not exact & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def _site(model: nn.Module, layer: Adapted, dtype: torch.dtype | None, *, original: bool) -> SiteMergeError:
    merged, _ = layer.merged()  # [out, inp]
    kept = merged.to(dtype or precision(model, layer.base) or layer.dtype)
    W = _matrix(layer, original_weight(model, layer.site.name)).to(merged)
    if original:
        merged, W = _as_packed(layer, W)
    name = str(kept.dtype).removeprefix("torch.")
    return SiteMergeError(layer.site.name, _norm(kept.to(merged) - merged), _norm(merged - W), _norm(W), name, original)


def _as_packed(layer: Adapted, W: Tensor) -> tuple[Tensor, Tensor]:
    """(W', W) [out, inp] of a plain layer as they are once the method's storage has packed it."""
    start = layer.start_factors()
    gift = torch.zeros_like(W) if start is None else layer.scale * start[0].to(W) @ start[1].to(W)
    held = layer.kind.matrix(layer.method.storage.quantize(layer.base, W - gift)).to(W)
    B, A = (factor.to(W) for factor in layer.factors())
    b = None if layer.bias is None else layer.bias.to(W)
    merged, _ = layer.join.merged(layer.tensors, held, b, (layer.scale * B, A))
    return merged, held + gift


def _matrix(layer: Adapted, W: Tensor) -> Tensor:
    """A weight in the layer's own layout as [out, inp]."""
    like = SimpleNamespace(weight=W)
    return layer.kind.matrix(like)


def _norm(M: Tensor) -> float:
    return float(torch.linalg.vector_norm(M, dtype=torch.float64))


def _log(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)
