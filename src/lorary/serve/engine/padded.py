"""Forward passes in padded batches: for models that continuous batching refuses, such as Mamba and hybrids.

Sequences that come at the same time form a group, padded on the left, which is computed to its end with the model's own
cache; a few groups take turns. It is slower: groups are not joined, and prefixes are not shared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorary.layers.transformers_internals import cache_of
from lorary.serve.batch.batch import Batch
from lorary.serve.batch.layers import ServedLayers
from lorary.serve.engine.runner import Choose, Row, Shape
from lorary.serve.pool.arena import Arena, PlainArena

_MOST_GROUPS = 4


@dataclass
class _Sequence:
    """A row and its tokens so far."""

    row: Row
    tokens: list[int]


@dataclass
class _Group:
    """Sequences that are computed together; None in place of one that has ended."""

    members: list[_Sequence | None]
    mask: Tensor  # [rows, tokens so far]
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def living(self) -> list[_Sequence]:
        return [member for member in self.members if member is not None]


class PaddedRunner:
    """See `lorary.serve.engine.runner.Runner`.

    Args:
        model: a causal language model in evaluation mode.
        layers: its layers.
        shape: its budget is for adapters alone; keys and values come beside. It has no pages, and prompts are computed
            whole.
        pads: whether sequences of different lengths may share a group: not every model ignores padding exactly.
    """

    most_tokens: int | None = None
    kept = 0

    def __init__(self, model: Any, layers: ServedLayers, shape: Shape, *, pads: bool = True) -> None:
        self.model, self.layers, self.pads = model, layers, pads
        self.kind = "padded batches" if pads else "batches of prompts of equal length"
        self.arena: Arena = PlainArena(shape.budget, device=model.device)
        self.make_room: Callable[[int], bool] = lambda _: False
        self.current: list[str] = []
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self._waiting: dict[str, _Sequence] = {}
        self._groups: list[_Group] = []

    def add(self, row: Row) -> None:
        self._waiting[row.id] = _Sequence(row, list(row.prompt))

    def remove(self, id: str) -> None:
        self._waiting.pop(id, None)
        for group in self._groups:
            group.members = [None if member and member.row.id == id else member for member in group.members]

    def restart(self, id: str) -> None:
        for member in [member for group in self._groups for member in group.living if member.row.id == id]:
            self.remove(id)
            self._waiting[id] = member

    def step(self, choose: Choose, only: str | None = None) -> None:
        self.current = []
        self._groups = [group for group in self._groups if group.living]
        if only is not None:
            self.restart(only)
        for group in self._groups:
            if len(group.living) <= len(group.members) // 2:  # computed again, without those that have ended
                for member in group.living:
                    self.restart(member.row.id)
        if self._waiting and (only is not None or len(self._groups) < _MOST_GROUPS):
            self._groups.append(self._new_group(only))
        else:
            self._groups.append(self._groups.pop(0))
        self._compute(self._groups[-1], choose)

    def _new_group(self, only: str | None) -> _Group:
        members = [self._waiting[only]] if only is not None else list(self._waiting.values())
        if not self.pads:
            members = [member for member in members if len(member.tokens) == len(members[0].tokens)]
        members = sorted(members, key=lambda member: member.row.key)
        for member in members:
            del self._waiting[member.row.id]
        lengths = torch.tensor([len(member.tokens) for member in members])
        mask = torch.arange(int(lengths.max())) >= int(lengths.max()) - lengths[:, None]
        return _Group([*members], mask.long().to(self.model.device))

    def _compute(self, group: _Group, choose: Choose) -> None:
        self.current = [member.row.id for member in group.living]
        rows = [() if member is None else member.row.adapters for member in group.members]
        ids, inputs = self._inputs(group)
        with self.layers.computing(Batch.of([(adapters, ids.shape[1], 1) for adapters in rows])):
            out = self.model(ids, **inputs)
        group.cache = cache_of(out)
        alive = [i for i, member in enumerate(group.members) if member is not None]
        tokens = choose([member.row for member in group.living], out.logits[alive, -1].float())
        for member, token in zip(group.living, tokens, strict=True):
            member.tokens.append(token)
        group.mask = torch.cat([group.mask, group.mask.new_ones(len(group.members), 1)], 1)

    def _inputs(self, group: _Group) -> tuple[Tensor, dict[str, Any]]:
        """The tokens [rows, new], and what else the model takes."""
        width = group.mask.shape[1]
        new = 1 if group.cache else width
        rows = [_last(member, new) for member in group.members]
        positions = (group.mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        inputs: dict[str, Any] = {"position_ids": positions, "use_cache": True, "logits_to_keep": 1}
        if self.pads:
            inputs["attention_mask"] = group.mask
        inputs = {name: value for name, value in inputs.items() if name in self._takes}
        return torch.tensor(rows, device=self.model.device), {**inputs, **group.cache}

    def used_bytes(self) -> int:
        return 0

    def close(self) -> None:
        pass


def _last(sequence: _Sequence | None, count: int) -> Sequence[int]:
    """The last tokens of a sequence, padded on the left."""
    tokens = sequence.tokens[-count:] if sequence is not None else []
    return [0] * (count - len(tokens)) + tokens
