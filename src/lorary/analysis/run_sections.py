"""Sections that the reports of runs share: the curves, the continuations before and after, the plan."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorary.analysis.html_report import Block, Code, Paragraph, Picture, Section, SideBySide, Table
from lorary.analysis.loss_plot import History, curves_svg, loss_svg
from lorary.model.plan import Plan

NATS = "nats per token"
_REWARDS = {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"}
_ACCURACY = {"rewards/accuracies": "training pairs", "eval_rewards/accuracies": "held-out pairs"}


@dataclass(frozen=True)
class Sample:
    """Continuations of one prompt.

    Args:
        prompt: the prompt.
        base: the base's continuation.
        adapted: the continuation with the adapter.
        expected: the text that follows in the data, if known.
    """

    prompt: str
    base: str
    adapted: str
    expected: str | None = None


def loss_section(history: History, caption: str, unit: str = NATS) -> Section:
    """The training loss, smoothed, and the held-out loss."""
    title = f"Loss in {unit}" if unit else "Loss"
    return Section("Loss", [Picture(loss_svg(history, title, unit=unit, smooth=True), caption)])


def preference_sections(history: History) -> Iterator[Section]:
    """The rewards of a preference run, if it logged any, and how often the preferred answer has the higher one."""
    if not _logged(history, _REWARDS):
        return
    about = "Beta times the log-probability of an answer over that under the base: zero before the first step, in nats."
    share = "The share of pairs whose preferred answer has the higher reward."
    pictures = [
        Picture(curves_svg(history, _REWARDS, "Rewards of the training pairs", "reward (nats)"), about),
        Picture(curves_svg(history, _ACCURACY, "Reward accuracy", "share of pairs"), share),
    ]
    yield Section("Preferences", pictures)


def optimization_section(history: History) -> Section:
    """The learning rate and the norm of the gradient; of adapted experts also the share without a token."""
    rate = curves_svg(history, {"learning_rate": "learning rate"}, "Learning rate", "learning rate", 1.9)
    norm = curves_svg(history, {"grad_norm": "gradient norm"}, "Gradient norm before clipping", "L2 norm", 1.9)
    words = "Of the optimizer's first group.", "Of all trained parameters, before clipping."
    pictures: list[Block] = [Picture(rate, words[0]), Picture(norm, words[1])]
    if any("idle_experts" in record for record in history):
        idle = curves_svg(history, {"idle_experts": "idle experts"}, "Experts without a token", "share of a step", 1.9)
        pictures.append(Picture(idle, "Of all experts in all blocks, a mean over the logged steps."))
    return Section("Optimization", pictures)


def samples_section(samples: Sequence[Sample], about: str) -> Section:
    """The continuations of both models side by side, and what the data has."""
    blocks: list[Block] = [Paragraph(about)]
    for sample in samples:
        columns = [("base", sample.base), ("with the adapter", sample.adapted)]
        columns += [("in the data", sample.expected)] if sample.expected is not None else []
        blocks.append(SideBySide(sample.prompt, columns))
    return Section("Before and after", blocks)


def plan_section(plan: Plan) -> Section:
    """The method's components, and one row for all sites that differ only in their block number."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for p in plan.sites:
        name = re.sub(r"\d+", "*", p.site.name)
        tensors = ", ".join(f"{role} [{' × '.join(map(str, shape))}]" for role, shape in p.shapes.items())
        key = (name, f"{p.site.out_features} × {p.site.in_features}", tensors, f"{p.scale:g}")
        rows.setdefault(key, []).append(p.trainable)
    head = ("site", "out × in", "tensors", "s", "sites", "trains")
    table = Table(head, [(*key, str(len(sizes)), f"{sum(sizes):,}") for key, sizes in rows.items()])
    return Section("What was trained", [Code(str(plan.method)), *([table] if rows else [])])


def _logged(history: History, keys: Mapping[str, str]) -> bool:
    return any(key in record for record in history for key in keys)
