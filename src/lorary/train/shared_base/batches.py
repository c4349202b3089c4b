"""The batches of several adapters as one: row below row, padded to one length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.errors import DataError, Diagnostic

Batch = Mapping[str, Tensor]

_HEADLINE = "invalid batches:"
_PADDED = {"attention_mask": 0, "labels": -100, "token_type_ids": 0, "input_ids": 0}


def joined(batches: Mapping[str, Batch], pad: int = 0) -> tuple[dict[str, Tensor], dict[str, int]]:
    """(the tensors of all batches below each other, adapter -> its number of rows).

    Tokens are padded on the right, with a mask if no batch has one.

    Args:
        batches: adapter -> its batch: name -> tensor, of which the first dimension counts the rows.
        pad: the token id of the padding.

    Raises:
        DataError: batches of other tensors than the first one's, or without rows; every problem.
    """
    if problems := [p for name, batch in batches.items() for p in _problems(name, batch)]:
        raise DataError(_HEADLINE, problems)
    counts = {name: len(next(iter(batch.values()))) for name, batch in batches.items()}
    together = {name: dict(batch) for name, batch in batches.items()}
    lengths = {batch["input_ids"].shape[1] for batch in together.values() if "input_ids" in batch}
    if len(lengths) > 1 and not any("attention_mask" in batch for batch in together.values()):
        together = {name: b | {"attention_mask": torch.ones_like(b["input_ids"])} for name, b in together.items()}
    _check_alike(together, several_lengths=len(lengths) > 1)
    if len(lengths) > 1:
        fill = _PADDED | {"input_ids": pad}
        together = {name: _padded(batch, max(lengths), fill) for name, batch in together.items()}
    first = next(iter(together.values()))
    return {key: torch.cat([batch[key] for batch in together.values()]) for key in first}, counts


def _problems(name: str, batch: Any) -> list[Diagnostic]:
    if not isinstance(batch, Mapping) or not batch:
        what = f"is a {type(batch).__name__}" if not isinstance(batch, Mapping) else "is empty"
        return [Diagnostic(name, f"{what}; a batch is a mapping from names to tensors")]
    wrong = [key for key, t in batch.items() if not isinstance(t, Tensor) or not t.dim()]
    if wrong:
        return [Diagnostic(name, f"`{key}` is not a tensor with rows") for key in wrong]
    rows = {key: len(t) for key, t in batch.items()}
    if len(set(rows.values())) > 1:
        return [Diagnostic(name, f"its tensors have different numbers of rows: {rows}")]
    return [] if all(rows.values()) else [Diagnostic(name, "has no rows")]


def _check_alike(batches: Mapping[str, Mapping[str, Tensor]], several_lengths: bool) -> None:
    """Refuse batches whose tensors cannot stand below each other.

    Raises:
        DataError: every such tensor.
    """
    (name, first), *others = batches.items()
    problems = []
    for other, batch in others:
        if differing := sorted(first.keys() ^ batch.keys()):
            problems.append(Diagnostic(other, f"{', '.join(differing)}: only in its batch or in that of {name}"))
            continue
        for key, t in batch.items():
            one = first[key]
            if (t.dtype, t.device) != (one.dtype, one.device):
                found = f"is {t.dtype} on {t.device}, and {one.dtype} on {one.device} in the batch of {name}"
                problems.append(Diagnostic(other, f"`{key}` {found}"))
            elif t.shape[1:] != one.shape[1:] and not (several_lengths and key in _PADDED):
                found = f"has rows of shape {list(t.shape[1:])}, and {list(one.shape[1:])} in the batch of {name}"
                problems.append(Diagnostic(other, f"`{key}` {found}", "make the batches of one length"))
    if problems:
        raise DataError(_HEADLINE, problems)


def _padded(batch: Mapping[str, Tensor], length: int, fill: Mapping[str, int]) -> dict[str, Tensor]:
    ids = batch["input_ids"]
    tokens = {key: t for key, t in batch.items() if key in fill and t.shape[:2] == ids.shape[:2]}
    return {**batch} | {
        key: F.pad(t, (0, length - t.shape[1]), value=fill[key]) for key, t in tokens.items() if t.dim() == 2
    }
