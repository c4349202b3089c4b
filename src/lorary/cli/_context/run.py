"""The work of `lorary inspect context`: models are loaded one after another, and measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorary.adapters.resolve import with_adapter
from lorary.analysis.long_context import Context, by_length, by_position, losses
from lorary.analysis.passkey import DEPTHS, Haystack, Retrieval, retrieval
from lorary.cli import printable
from lorary.cli._context.plan import ModelUnderTest, Plan, quietly
from lorary.layers.rope import max_context, text_config
from lorary.model.labelled_head import LabelledHead


@dataclass(frozen=True)
class Found:
    """What was measured, and on what."""

    contexts: tuple[Context, ...]
    tokens: int
    passkeys: int
    data: str
    notes: tuple[str, ...] = ()


def measure(plan: Plan) -> Found:
    """The numbers, of one model after the other; how far it is shows on a terminal."""
    notes, contexts = list(plan.notes), []
    cells = plan.passkeys * len(DEPTHS) * sum(plan.lengths)
    total = sum(len(plan.lengths) * text.numel() + 3 * cells for text in plan.texts)
    with quietly(), _progress(total) as advance:
        for subject, text in zip(plan.subjects, plan.texts, strict=True):
            context, said = _measured(subject, text, plan, advance)
            contexts.append(context)
            notes += said
            gc.collect()  # a model holds itself in circles, and the next one needs its room
    return Found(tuple(contexts), plan.texts[0].numel(), plan.passkeys, plan.data, tuple(dict.fromkeys(notes)))


class _Model:
    """A model that answers what `lorary.analysis` asks; it tells how many tokens it has read, and of which work."""

    def __init__(self, subject: ModelUnderTest, advance: Callable[[str, int], None]) -> None:
        self.model: Any = with_adapter(subject.section, subject.folder)
        if torch.cuda.is_available():
            self.model.to("cuda")
        self.tokenizer = subject.tokenizer
        self.advance, self.work = advance, subject.name
        self.head = LabelledHead(self.model, statistics=()).install()

    @torch.inference_mode()
    def scores(self, ids: Tensor, start: int) -> Tensor:
        ids = ids.to(self.model.device)
        labels = ids.clone()
        labels[:, :start] = -100
        found: Tensor = self.model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs[:, start - 1 :]
        self.advance(self.work, ids.numel())
        return found

    @torch.inference_mode()
    def continued(self, ids: Tensor, tokens: int) -> str:
        row = ids[None].to(self.model.device)
        words = {
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": tokens,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        made = self.model.generate(row, attention_mask=torch.ones_like(row), **words)[0, len(ids) :]
        self.advance(self.work, len(ids) + tokens)
        return str(self.tokenizer.decode(made, skip_special_tokens=True))


def _measured(
    subject: ModelUnderTest, text: Tensor, plan: Plan, advance: Callable[[str, int], None]
) -> tuple[Context, list[str]]:
    """One model's numbers, and what is worth knowing about them."""
    model = _Model(subject, advance)
    lengths = []
    for length in plan.lengths:
        model.work = f"{subject.name}: text, {length:,} tokens"
        lost = losses(model.scores, text, length)
        lengths.append(by_length(lost))
    cells, notes = _passkeys(model, subject, plan) if plan.passkeys else ((), [])
    known = max_context(text_config(model.model))
    name = printable(subject.name)
    if not all(length.nats == length.nats for length in lengths):
        notes.append(f"{name} gives probabilities that are no numbers at some lengths")
    model.head.remove()
    return Context(name, known, tuple(lengths), by_position(lost), cells), notes


def _passkeys(model: _Model, subject: ModelUnderTest, plan: Plan) -> tuple[tuple[Retrieval, ...], list[str]]:
    haystack = Haystack(subject.tokenizer, plan.lengths[-1])
    cells, without = [], []
    for length in plan.lengths:
        model.work = f"{subject.name}: passkeys, {length:,} tokens"
        for depth in DEPTHS:
            cell = retrieval(model.scores, model.continued, haystack, length, depth, plan.passkeys)
            cells += [cell] if cell is not None else []
            without += [length] if cell is None and length not in without else []
    left = ", ".join(f"{length:,}" for length in without)
    what = f"passkeys take {haystack.least:,} tokens or more in the words of {printable(subject.name)}: none at {left}"
    return tuple(cells), [what] if without else []


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda work, tokens: None
        return
    columns = (BarColumn(bar_width=24), TaskProgressColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, TimeRemainingColumn(), console=console) as shown:
        task = shown.add_task("", total=total)
        yield lambda work, tokens: shown.update(task, advance=tokens, description=work)
