"""MergeCheck: the outputs of an adapted model, to compare with those of the merged one.

    check = lorary.MergeCheck.of(model, rows)
    print(check.merge(model))

One model at a time is in memory, and one layer at a time is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorary.analysis.merge_error import MergeError, SiteMergeError
from lorary.errors import DataError, Diagnostic, StateError
from lorary.files.strict_json import show
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.layers.kinds import as_matrix
from lorary.layers.quantized_weight import is_quantized
from lorary.layers.transformers_internals import exact_modules
from lorary.model.ambient import callers_device, mode_independent
from lorary.model.merge import merge
from lorary.model.quantize import dequantized_dtype
from lorary.model.residual_base import original_weight
from lorary.model.state import eval_mode, require_attached, require_values

_CHUNK = 2**24  # logits compared at once, in 64 bits

Row = Tensor | Sequence[int] | Mapping[str, Any]


class MergeCheck(NamedTuple):
    """The logits of an adapted model on some rows, the reference for the merged model.

    Logits are stored in 32 bits: 4 bytes per token and vocabulary entry.

    Args:
        rows: the inputs.
        logits: [positions, vocabulary] of each row.
        quantized: the sites with a quantised base.
    """

    rows: tuple[Row, ...]
    logits: tuple[Tensor, ...]
    quantized: frozenset[str]

    @staticmethod
    @mode_independent
    def of(model: nn.Module, rows: Iterable[Row] = ()) -> MergeCheck:
        """The logits of the model as it is.

        Args:
            model: with adapters attached.
            rows: for each row, its token ids or the keyword arguments of its forward pass.

        Raises:
            StateError: nothing is attached.
            DataError: `rows` is not a series.
        """
        require_attached(model, "measure")
        require_values(model)
        if isinstance(rows, Mapping | str) or not isinstance(rows, Iterable):
            what, fix = f"is a {type(rows).__name__}, not a series of rows", "pass a list of rows: [row]"
            raise DataError("cannot measure:", [Diagnostic("rows", what, fix)])
        rows = tuple(rows)
        quantized = frozenset(name for name, layer in adapted_layers(model).items() if is_quantized(layer.base))
        return MergeCheck(rows, tuple(logits(model, row) for row in rows), quantized)

    @mode_independent
    def merge(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> MergeError:
        """`lorary.merge`, and the difference that it makes.

        Args:
            model: the model of `of`; or, if that is quantised, the same adapter on the original base
                (`lorary.load(base, path, quantize=False)`).
            dtype: of the merged model, all its plain weights; None for those that they have.

        Raises:
            StateError: as `lorary.merge`; or the model has other sites.
        """
        sites = self.sites(model, dtype)
        merge(model, dtype=dtype)
        if dtype is not None:
            round_weights(model, dtype)
        return self.against(model, sites)

    @mode_independent
    def sites(self, model: nn.Module, dtype: torch.dtype | None = None) -> tuple[SiteMergeError, ...]:
        """The error of a merge at each site; one layer at a time, without merging.

        Raises:
            StateError: nothing is attached; or a quantised site is missing.
        """
        require_attached(model, "measure")
        require_values(model)
        layers = adapted_layers(model)
        if missing := sorted(self.quantized - layers.keys()):
            fix = "merge the model that was measured, or the same adapter on its original base"
            raise StateError("cannot measure:", [Diagnostic(name, "is not adapted here", fix) for name in missing])
        return tuple(
            _site(model, layer, dtype, original=name in self.quantized and not is_quantized(layer.base))
            for name, layer in layers.items()
        )

    @mode_independent
    def against(self, model: nn.Module, sites: tuple[SiteMergeError, ...] = ()) -> MergeError:
        """The report on the merged model."""
        tokens, same, nats, differences = 0, 0, 0.0, []
        for row, before in zip(self.rows, self.logits, strict=True):
            after = logits(model, row)
            step = max(1, _CHUNK // before.shape[-1])
            for p, q in zip(before.split(step), after.split(step), strict=True):
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
                nats += float(F.kl_div(_log(q), _log(p), reduction="sum", log_target=True))
                differences.append((p - q).abs().max())
            tokens += len(before)
        if not tokens:
            return MergeError(sites)
        largest = float(torch.stack(differences).max())  # Python's `max` would ignore NaN
        return MergeError(sites, tokens, same / tokens, max(nats, 0.0) / tokens, largest)


@torch.no_grad()
def logits(model: nn.Module, row: Row) -> Tensor:
    """The logits of a model in evaluation mode: [positions, vocabulary], in 32 bits on the CPU.

    Args:
        model: its output is logits, or has an attribute `logits`.
        row: token ids, or the keyword arguments of a forward pass.
    """
    device = next(model.parameters()).device
    inputs = row if isinstance(row, Mapping) else {"input_ids": _token_ids(row)}
    with eval_mode(model), callers_device(model):
        output = model(**{name: t.to(device) if isinstance(t, Tensor) else t for name, t in inputs.items()})
    scores = cast(Tensor, getattr(output, "logits", output))
    return scores.reshape(-1, scores.shape[-1]).float().cpu()


def _token_ids(row: Any) -> Tensor:
    """The token ids of a row [1, positions].

    Raises:
        DataError: they are no whole numbers.
    """
    with suppress(TypeError, ValueError, RuntimeError):
        ids = torch.as_tensor(row).reshape(1, -1)
        if ids.numel() and not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
            return ids
    what = f"holds {show(row)}, not token ids or the keyword arguments of a forward pass"
    raise DataError("cannot measure:", [Diagnostic("rows", what)])


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all weights to `dtype`, except those that the architecture keeps in 32 bits.

    Buffers keep their dtype: positions are computed from them.
    """
    exact = exact_modules(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not exact & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def _site(model: nn.Module, layer: Adapted, dtype: torch.dtype | None, *, original: bool) -> SiteMergeError:
    merged, _ = layer.merged()  # [out, in]
    stored = merged.to(dtype or dequantized_dtype(model, layer.base) or layer.dtype)
    W = _matrix(layer, original_weight(model, layer.site.name)).to(merged)
    if original:
        merged, W = _as_quantized(layer, W)
    name = str(stored.dtype).removeprefix("torch.")
    return SiteMergeError(
        layer.site.name, _norm(stored.to(merged) - merged), _norm(merged - W), _norm(W), name, original
    )


def _as_quantized(layer: Adapted, W: Tensor) -> tuple[Tensor, Tensor]:
    """(W', W) [out, in] of a plain layer after quantisation by the method's storage."""
    start = layer.start_factors()
    subtracted = torch.zeros_like(W) if start is None else layer.scale * start[0].to(W) @ start[1].to(W)
    quantized = layer.kind.matrix(layer.method.storage.quantize(layer.base, W - subtracted)).to(W)
    return layer.merged(quantized)[0], quantized + subtracted


def _matrix(layer: Adapted, W: Tensor) -> Tensor:
    """A weight in the layer's own layout as [out, in]."""
    return as_matrix(layer.base, W)


def _norm(M: Tensor) -> float:
    return float(torch.linalg.vector_norm(M, dtype=torch.float64))


def _log(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)
