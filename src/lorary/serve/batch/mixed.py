"""The forward of a covered module: its own output plus the adapters' terms on their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorary.errors import Diagnostic
from lorary.kernels.torch_internals import with_parameters
from lorary.layers.kinds import KINDS, kind_of
from lorary.serve.batch.batch import Piece
from lorary.serve.batch.merged import MergedWeights, Pair
from lorary.serve.batch.ops import cpu
from lorary.serve.batch.ops.reference import with_terms
from lorary.serve.batch.ops.table import AdapterTable
from lorary.serve.batch.prepared import PreparedBatch, Rows, RowsError
from lorary.serve.forms.serving_form import SiteForm

Forward = Callable[..., Any]


class Served(Protocol):
    """The layers of a model, and the batch that they compute."""

    batch: PreparedBatch | None
    table: AdapterTable


class Covered:
    """A module that computes mixed batches.

    Args:
        path: of the module.
        module: the module.
        axis: the dimension of its input along which the tokens lie; -1 if unknown. For modules that are no layers.
    """

    def __init__(self, path: str, module: nn.Module, axis: int | None) -> None:
        self.path, self.module, self.axis = path, module, axis
        self.kind = kind_of(module)
        self.own = vars(module).get("forward")  # another library's, such as a device hook
        self.plain: Forward = module.forward

    def restore(self, module: nn.Module) -> None:
        """Give the module its forward back."""
        if self.own is None:
            del module.forward
        else:
            module.forward = self.own


def forward_of(served: Served, covered: Covered) -> Forward:
    """The forward of a covered module: its plain one while no row has an adapter."""
    plain, compute = covered.plain, _compute(covered)

    def forward(*args: Any, **kwargs: Any) -> Any:
        batch = served.batch
        if batch is None:
            return plain(*args, **kwargs)
        if batch.merged is not None and (pair := _merged(covered.path, batch, batch.merged, args, kwargs)) is not None:
            return F.linear(_input(args, kwargs), *pair)
        return compute(served, covered, batch, plain(*args, **kwargs), args, kwargs)

    return forward


def _compute(covered: Covered) -> Callable[[Served, Covered, PreparedBatch, Any, Any, Any], Any]:
    kind = covered.kind
    if kind is None:
        return _other
    return _linear if KINDS[kind].rowwise else _embedding if kind == "embedding" else _convolution


def _input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _owned(covered: Covered, y: Tensor) -> Tensor:
    """The output in memory that may be overwritten: a forward of another library may return what it keeps."""
    return y if covered.own is None else y.clone()


def _merged(path: str, batch: PreparedBatch, merged: MergedWeights, args: Any, kwargs: Any) -> Pair | None:
    """The merged weight and bias of a linear layer of which all rows have the same adapters."""
    if path not in merged:
        return None
    x = _input(args, kwargs)
    rows = batch.rows_of(path, x.numel() // x.shape[-1])
    return merged.of(path, rows.pieces)


# --- layers -----------------------------------------------------------------------------------------------------------


def _linear(served: Served, covered: Covered, batch: PreparedBatch, y: Tensor, args: Any, kwargs: Any) -> Tensor:
    """[..., in] -> [..., out]: a row for every token."""
    x, y, path = _input(args, kwargs), _owned(covered, y).contiguous(), covered.path
    x, flat = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    rows = batch.rows_of(path, len(x))
    if rows.overriding:
        _override(covered, rows.overriding, flat, x)
    long = rows.long
    if rows.short is not None and batch.kernels is not None:
        if x.dtype is flat.dtype is served.table.dtypes[path] and x.dtype in batch.kernels.types:
            batch.kernels.add_rows(batch.table, served.table.layers[path], rows.short, x.contiguous(), flat)
        else:
            long = rows.pieces
    for start, stop, form, weight in long:
        site = form.sites.get(path)
        if site is not None and not site.shared:
            cpu.add_terms(flat[start:stop], x[start:stop], site, weight)
    if rows.shared:
        _add_shared(path, rows.shared, flat, x)
    return y


def _embedding(served: Served, covered: Covered, batch: PreparedBatch, y: Tensor, args: Any, kwargs: Any) -> Tensor:
    x = _input(args, kwargs).reshape(-1)
    flat = _owned(covered, y).reshape(-1, y.shape[-1])
    _by_definition(covered, batch.rows_of(covered.path, len(x)), flat, x)
    return flat.view(y.shape)


def _convolution(served: Served, covered: Covered, batch: PreparedBatch, y: Tensor, args: Any, kwargs: Any) -> Tensor:
    x = _input(args, kwargs)
    y = _owned(covered, y)
    _by_definition(covered, batch.rows_of(covered.path, len(x)), y, x)
    return y


def _by_definition(covered: Covered, rows: Rows, y: Tensor, x: Tensor) -> None:
    _override(covered, rows.overriding, y, x)
    kind = KINDS[str(covered.kind)]
    for start, stop, form, weight in rows.pieces:
        site = form.sites.get(covered.path)
        if site is not None:
            y[start:stop] = with_terms(kind, covered.module, y[start:stop], x[start:stop], site, weight)


def _override(covered: Covered, pieces: Sequence[Piece], y: Tensor, x: Tensor) -> None:
    """Compute the rows of adapters with parameters of their own.

    They are put into a copy of the module: adapters load in other threads, which read the base's parameters meanwhile.
    """
    for start, stop, form, _ in pieces:
        own = form.overrides.get(covered.path)
        if own is not None:
            y[start:stop] = with_parameters(covered.module, own)(x[start:stop])


def _add_shared(path: str, pieces: Sequence[Piece], y: Tensor, x: Tensor) -> None:
    """VeRA: one product with the shared A for all rows, one with the shared B; the vectors are each adapter's own."""
    groups: dict[tuple[str, int], list[tuple[slice, SiteForm, float]]] = {}
    for start, stop, form, weight in pieces:
        site = form.sites.get(path)
        if site is not None and site.shared and site.A is not None:
            groups.setdefault((site.shared, len(site.A)), []).append((slice(start, stop), site, weight))
    for members in groups.values():
        _add_group(members, y, x)


def _add_group(members: Sequence[tuple[slice, SiteForm, float]], y: Tensor, x: Tensor) -> None:
    A, B = cast(tuple[Tensor, Tensor], members[0][1][:2])
    parts = [part for part, _, _ in members]
    whole = slice(parts[0].start, parts[-1].stop)
    together = all(a.stop == b.start for a, b in pairwise(parts))
    h = (x[whole] if together else torch.cat([x[part] for part in parts])) @ A.T.to(x.dtype)
    lengths = [part.stop - part.start for part in parts]
    for (_, site, _), rows in zip(members, h.split(lengths), strict=True):
        if site.d is not None:
            rows.mul_(site.d)
    z = h @ B.T.to(h.dtype)
    for (part, site, weight), rows in zip(members, z.split(lengths), strict=True):
        if site.gain is not None:
            y[part].mul_(site.gain)
        y[part].add_(rows if site.b is None else rows.mul_(site.b), alpha=weight)
        if site.shift is not None:
            y[part].add_(site.shift, alpha=weight)


# --- other modules ----------------------------------------------------------------------------------------------------


def _other(served: Served, covered: Covered, batch: PreparedBatch, y: Any, args: Any, kwargs: Any) -> Any:
    """A module that is no layer: a rotary embedding, or one with parameters to override."""
    if any(covered.path in piece.form.rotary for rows in batch.rows.values() for piece in rows.pieces):
        return _rotary(served, covered, batch, y, args, kwargs)
    if not any(covered.path in piece.form.overrides for rows in batch.rows.values() for piece in rows.overriding):
        return y  # another adapter covers it, for other batches
    x, axis = _input(args, kwargs), covered.axis
    if axis == -1:  # not known: a row, or a sequence of rows
        axis = x.dim() - 2 if x.dim() in (2, 3) else None
    if axis is None or not isinstance(y, Tensor) or y.shape != x.shape:
        shapes = f"{list(x.shape)} to {list(y.shape) if isinstance(y, Tensor) else type(y).__name__}"
        what = f"it computes {shapes}: which of it are the rows is not known"
        raise RowsError("cannot compute the batch:", [Diagnostic(covered.path, what)])
    y = _owned(covered, y)
    rows_x, rows_y = _rows_first(x, axis), _rows_first(y, axis)
    rows = batch.rows_of(covered.path, len(rows_x))
    _override(covered, rows.overriding, rows_y, rows_x)
    return y if rows_y.data_ptr() == y.data_ptr() else _rows_back(rows_y, y, axis)


def _rows_first(x: Tensor, axis: int) -> Tensor:
    """[batch, ..., tokens, ...] as [batch * tokens, ...]; a view if possible."""
    return x if axis == 0 else x.movedim(axis, 1).flatten(0, 1)


def _rows_back(rows: Tensor, like: Tensor, axis: int) -> Tensor:
    batched: Tensor = rows.unflatten(0, (len(like), -1))
    return batched.movedim(1, axis)


def _rotary(served: Served, covered: Covered, batch: PreparedBatch, y: Any, args: Any, kwargs: Any) -> Any:
    """(cos, sin) [batch, tokens, ...]: those of an adapter with RoPE scaling of its own are its module's."""
    named = dict(zip(("x", "position_ids"), args, strict=False)) | kwargs
    x, ids = named.pop("x"), named.pop("position_ids")
    size, tokens = x.shape[:2]
    ids = ids.expand(size, -1).reshape(1, -1)
    parts = [part.expand(size, *part.shape[1:]).flatten(0, 1).clone() for part in y]
    for start, stop, form, _ in batch.rows_of(covered.path, size * tokens).pieces:
        if covered.path in form.rotary:
            own = form.rotary[covered.path](x, ids[:, start:stop], *args[2:], **named)
            for whole, part in zip(parts, own, strict=True):
                whole[start:stop] = part[0]
    return tuple(part.unflatten(0, (size, tokens)) for part in parts)
