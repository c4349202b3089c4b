"""The report of a finished run as one HTML page: curves, continuations, memory, and how to repeat it."""

from __future__ import annotations

import logging
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lorary.adapters.adapter import Adapter
from lorary.adapters.card import public_name
from lorary.analysis.heatmap import ranks_svg
from lorary.analysis.html_report import (
    Code,
    KeyFigure,
    Paragraph,
    Picture,
    Section,
    Table,
    html_report,
    versions_section,
)
from lorary.analysis.run_sections import (
    NATS,
    Sample,
    loss_section,
    optimization_section,
    plan_section,
    preference_sections,
    samples_section,
)
from lorary.model.plan import human_bytes
from lorary.model.rank_pruning import directions_of
from lorary.train.config.sources import paths
from lorary.train.runner.folder import CONFIG, REPORT, RunFolder
from lorary.train.runner.model_card import CardData, evaluations, method_names, seeds
from lorary.train.runner.prepare import RunPlan
from lorary.train.runner.result import Run
from lorary.train.runner.samples import continuations
from lorary.train.trainer.resume import read_adapter

_log = logging.getLogger("lorary.train")

_LOSSES = {  # task -> the unit of its loss, and its name
    "sft": (NATS, "Cross entropy per labelled token"),
    "dpo": ("nats per pair", "DPO's loss per pair"),
    "reward": ("nats per pair", "Bradley-Terry's loss per pair"),
    "kto": ("", "KTO's loss per answer"),
    "grpo": ("", "The policy's loss, which is near zero at every reward"),
    "classification": ("nats per row", "The classifier's loss per row"),
}
_ACCURACIES = (
    ("eval_rewards/accuracies", "Reward accuracy", "held-out pairs whose preferred answer wins"),
    ("eval_accuracy", "Accuracy", "of the held-out rows"),
)
_SAMPLES = (
    "The first prompts of the {rows}, continued greedily by the same model with its adapter disabled and enabled."
)


def write_report(prepared: RunPlan, folder: RunFolder, run: Run, trainer: Any) -> None:
    """Write `report.html`. A failure is logged with its reason, and does not fail the run: the adapter is saved."""
    samples: tuple[Sample, ...] = ()
    with _told(f"{REPORT} has no samples"):  # the model's own code generates them
        samples = _continuations(prepared, trainer)
    lint, tokens = prepared.lint, max((int(r.get("num_tokens", 0)) for r in run.history), default=0)
    data = CardData(
        prepared.config, prepared.plan, (lint.rows, lint.held_out), lint.labelled, tokens, run, lint.sources
    )
    with _told(f"no {REPORT}"):
        ranks = read_adapter(folder.path) if any("ranks" in record for record in run.history) else None
        folder.write(REPORT, run_report(folder.path.absolute(), data, samples, ranks))
        _log.info("report: %s", folder / REPORT)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """A context whose failure is logged; the traceback goes to the event log."""
    try:
        yield
    except Exception as error:
        _log.warning("%s: %s: %s", what, type(error).__name__, error)
        _log.debug("the report's traceback", exc_info=True)


def _continuations(prepared: RunPlan, trainer: Any) -> tuple[Sample, ...]:
    if trainer.is_fsdp_enabled or prepared.base is not None:  # a shard cannot generate alone, a classifier not at all
        return ()
    rows = (prepared.held_out or prepared.train).rows
    return continuations(trainer.unwrapped_model(), prepared.tokenizer, rows)


def run_report(folder: Path, data: CardData, samples: Sequence[Sample] = (), ranks: Adapter | None = None) -> str:
    """The page.

    Args:
        folder: of the run.
        data: the facts of the run, as for its model card.
        samples: continuations before and after.
        ranks: the saved adapter, if its ranks changed in training.
    """
    config, plan = data.config, data.plan
    lead = (
        f"{' + '.join(method_names(config, plan))} on {public_name(config.model.id)}: {plan.trainable:,} trained "
        f"parameters ({plan.share:.3%} of the base), {len(plan.sites)} adapted layers, task {config.task}."
    )
    return html_report(folder.name, lead, [*_figures(data)], [*_sections(folder, data, samples, ranks)])


def _sections(folder: Path, data: CardData, samples: Sequence[Sample], ranks: Adapter | None) -> Iterator[Section]:
    history = data.run.history
    yield loss_section(history, _caption(data), _LOSSES[data.config.task][0])
    yield from preference_sections(history)
    if samples:
        yield samples_section(samples, _SAMPLES.format(rows="held-out rows" if data.rows[1] else "training rows"))
    yield optimization_section(history)
    if ranks is not None:
        found = {site.site.name: directions_of(site) for site in ranks.sites}
        yield Section("Ranks", [Picture(ranks_svg(found, max(s.r for s in ranks.sites)), "After the last step.")])
    yield plan_section(data.plan)
    yield Section("Data and training", [Table(("setting", "value"), [*_facts(data)])])
    yield Section("Memory", [Table(("tensors", "measured", "predicted"), _memory(data)), Paragraph(_process(data))])
    yield Section("Repeat it, and go on", [Code(_commands(folder, data.config.task))])
    yield versions_section()


def _figures(data: CardData) -> Iterator[KeyFigure]:
    run, found = data.run, evaluations(data)
    if found is not None:
        first, kept = (record["eval_loss"] for record in found)
        before = f"{first:.2f} → " if found[0]["step"] == 0 else ""
        yield KeyFigure("Held-out loss", f"{before}{kept:.2f}", f"at step {found[1]['step']:,}; lower is better")
        if data.config.task == "sft" and max(first, kept) < 20:
            before = f"{math.exp(first):.1f} → " if found[0]["step"] == 0 else ""
            yield KeyFigure("Perplexity", f"{before}{math.exp(kept):.1f}", "held out; lower is better")
        for key, label, note in _ACCURACIES:
            if (share := found[1].get(key)) is not None:
                yield KeyFigure(label, f"{share:.0%}", note)
    elif losses := [r["loss"] for r in run.history if r.get("loss") is not None]:
        yield KeyFigure("Training loss", f"{losses[0]:.2f} → {losses[-1]:.2f}", "no data was held out")
    yield KeyFigure("Steps", f"{run.steps:,}", f"{data.tokens:,} tokens")
    yield KeyFigure("Time", f"{run.seconds:,.0f} s", "in the last session")
    if run.step_memory is not None:
        counted = run.step_memory.counted
        note = f"tensors in step {counted.step}; {human_bytes(run.step_memory.predicted)} predicted"
        yield KeyFigure("Memory", human_bytes(counted.peak), note)


def _caption(data: CardData) -> str:
    t = data.config.training
    unit = _LOSSES.get(data.config.task, ("", "The loss"))[1]
    held_out = " Dashed: of the held-out rows, which are not trained on." if data.rows[1] else ""
    rows = t.batch_size * t.gradient_accumulation_steps
    return f"{unit}, of batches of {rows} rows per process. A faint line is the loss as it was logged.{held_out}"


def _facts(data: CardData) -> Iterator[tuple[str, str]]:
    t, c = data.config.training, data.config
    held_out = f", {data.rows[1]:,} held out" if data.rows[1] else ""
    yield "data", ", ".join(paths(c.data.train))
    yield "rows", f"{data.rows[0]:,}{held_out}; {data.labelled:.1%} of the tokens are labelled"
    yield "batch", f"{t.batch_size} × {t.gradient_accumulation_steps} rows of at most {c.data.max_length:,} tokens"
    yield "learning rate", f"{t.lr:g}, {t.schedule}, warmup {t.warmup:g}"
    yield "optimizer", f"{t.optimizer}, weight decay {t.weight_decay:g}, gradients clipped at {t.max_grad_norm:g}"
    yield "seed", seeds(t)


def _memory(data: CardData) -> list[tuple[str, str, str]]:
    run, rows = data.run, []
    if run.step_memory is not None:
        c = run.step_memory.counted
        what = f"step {c.step}, the second of the session: {c.batch} × {c.length} tokens, {c.labelled:.0%} labelled"
        rows = [(what, human_bytes(c.peak), human_bytes(run.step_memory.predicted))]
    predicted = "unknown" if run.predicted is None else human_bytes(run.predicted)
    return [*rows, ("a batch of the longest rows", "", predicted)]


def _process(data: CardData) -> str:
    where = "by its device's allocator" if torch.cuda.is_available() else "in resident memory"
    return (
        "Both columns are the most bytes of tensors alive at once: weights, adapter, gradients, optimizer and "
        f"activations. The process itself grew by {human_bytes(max(data.run.measured, 0))} at its peak since before "
        f"the model was loaded, {where}, which also counts libraries, evaluation, and free blocks that are kept."
    )


def _commands(folder: Path, task: str) -> str:
    out = shlex.quote(str(folder))
    program = Path(sys.argv[0])
    from_shell = "lorary" in (program.stem, program.parent.name)  # also `python -m lorary`
    typed = [f"lorary {shlex.join(sys.argv[1:])}"] if from_shell else []
    figures = "loss and accuracy" if task == "classification" else "loss, perplexity and accuracy"
    measured = [(f"lorary eval {out}", f"{figures} on the held-out rows")]
    spoken = [(f"lorary chat {out}", "talk to it")]
    rows = [
        *((line, "as it was typed") for line in typed),
        (f"lorary train {out}/{CONFIG} --set output=NEW", "the same run again"),
        *(measured if task != "reward" else ()),
        *(spoken if task not in ("classification", "reward") else ()),
        (f"lorary merge {out} merged", "base and adapter as one plain model"),
    ]
    return "\n".join(f"{command}\n    # {why}" for command, why in rows)
