"""The measurements of `lorary inspect context`, one model after another."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorary.adapters.resolve import load_with_adapter
from lorary.analysis.long_context import Context, by_length, by_position, losses
from lorary.analysis.passkey import DEPTHS, Haystack, Retrieval, retrieval
from lorary.cli import printable
from lorary.cli._context.plan import ModelUnderTest, Plan, without_warnings
from lorary.cli._progress import progress_bar
from lorary.layers.rope import max_context, text_config
from lorary.model.labelled_head import LabelledHead


@dataclass(frozen=True)
class Measurements:
    """The results of all models, and the settings."""

    contexts: tuple[Context, ...]
    tokens: int
    passkeys: int
    data: str
    notes: tuple[str, ...] = ()


def measure(plan: Plan) -> Measurements:
    """Measure one model after another, with a progress bar on a terminal."""
    notes, contexts = list(plan.notes), []
    cells = plan.passkeys * len(DEPTHS) * sum(plan.lengths)
    total = sum(len(plan.lengths) * text.numel() + 3 * cells for text in plan.texts)
    with without_warnings(), progress_bar(total) as update:
        for tested, text in zip(plan.models, plan.texts, strict=True):
            context, its_notes = _measure(tested, text, plan, update)
            contexts.append(context)
            notes += its_notes
            gc.collect()  # models contain reference cycles, and the next one needs the memory
    return Measurements(tuple(contexts), plan.texts[0].numel(), plan.passkeys, plan.data, tuple(dict.fromkeys(notes)))


class _Model:
    """A loaded model with the functions that `lorary.analysis` calls; it reports its progress."""

    def __init__(self, tested: ModelUnderTest, update: Callable[..., Any]) -> None:
        self.model: Any = load_with_adapter(tested.section, tested.folder)
        if torch.cuda.is_available():
            self.model.to("cuda")
        self.tokenizer = tested.tokenizer
        self.update, self.work = update, tested.name
        self.head = LabelledHead(self.model, statistics=()).install()

    @torch.inference_mode()
    def scores(self, ids: Tensor, start: int) -> Tensor:
        ids = ids.to(self.model.device)
        labels = ids.clone()
        labels[:, :start] = -100
        log_probs: Tensor = self.model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs[:, start - 1 :]
        self.update(advance=ids.numel(), description=self.work)
        return log_probs

    @torch.inference_mode()
    def continuation(self, ids: Tensor, tokens: int) -> str:
        row = ids[None].to(self.model.device)
        options = {"do_sample": False, "num_beams": 1, "pad_token_id": self.tokenizer.pad_token_id}
        output = self.model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=tokens, **options)
        self.update(advance=len(ids) + tokens, description=self.work)
        return str(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def _measure(tested: ModelUnderTest, text: Tensor, plan: Plan, update: Callable[..., Any]) -> tuple[Context, list[str]]:
    """The measurements of one model, and notes."""
    model = _Model(tested, update)
    lengths = []
    for length in plan.lengths:
        model.work = f"{tested.name}: text, {length:,} tokens"
        nats = losses(model.scores, text, length)
        lengths.append(by_length(nats))
    cells, notes = _passkeys(model, tested, plan) if plan.passkeys else ((), [])
    name = printable(tested.name)
    if any(math.isnan(length.nats) for length in lengths):
        notes.append(f"{name} gives NaN probabilities at some lengths")
    model.head.remove()
    return Context(name, max_context(text_config(model.model)), tuple(lengths), by_position(nats), cells), notes


def _passkeys(model: _Model, tested: ModelUnderTest, plan: Plan) -> tuple[tuple[Retrieval, ...], list[str]]:
    haystack = Haystack(tested.tokenizer, plan.lengths[-1])
    cells, too_short = [], []
    for length in plan.lengths:
        model.work = f"{tested.name}: passkeys, {length:,} tokens"
        for depth in DEPTHS:
            cell = retrieval(model.scores, model.continuation, haystack, length, depth, plan.passkeys)
            if cell is not None:
                cells.append(cell)
            elif length not in too_short:
                too_short.append(length)
    left_out = ", ".join(f"{length:,}" for length in too_short)
    need = f"passkeys need {haystack.shortest:,} tokens or more with the tokenizer of {printable(tested.name)}"
    return tuple(cells), [f"{need}: none at {left_out}"] if too_short else []
