"""Plots of the use of context: perplexity by length beside passkey retrieval, and loss by position."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lorary.analysis.long_context import Context
from lorary.analysis.passkey import Retrieval
from lorary.analysis.svg import INK, PALETTE, cell, cell_axes, line, style, to_svg

_FAINTEST = 0.25  # nats: smaller gains never get the full shade, so that noise stays faint
_MOST_NAMES = 4  # in a legend inside the axes
_LOG_SCALE_FROM = 10.0  # ratio of the highest to the lowest perplexity


def context_svg(contexts: Sequence[Context], title: str = "How far back a model looks") -> str:
    """Perplexity by length, one line per model; beside it passkey retrieval, if measured.

    A vertical line marks a model's context. A cell of a map shows the share of retrieved passkeys (if any model
    retrieved one) and the gain in nats per token.

    Args:
        contexts: one per model.
        title: the picture's name; plain text.

    Returns:
        One `<svg>` element, from `lorary.analysis.svg.to_svg`.
    """
    maps = [context for context in contexts if context.passkeys]
    with style():
        if maps:
            figure = Figure(figsize=(10.4, max(3.8, 0.7 + 1.95 * len(maps))))
            left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.05))[0]
            _perplexities(left.add_subplot(), contexts)
            _passkeys(right, maps)
        else:
            figure = Figure(figsize=(7.2, 3.8))
            _perplexities(figure.add_subplot(), contexts)
        return to_svg(figure, title, _description(contexts))


def positions_svg(contexts: Sequence[Context], title: str = "Loss by position") -> str:
    """The loss by position in windows of the longest length, one line per model.

    Args:
        contexts: one per model.
        title: the picture's name; plain text.

    Returns:
        As `context_svg`.
    """
    with style():
        figure = Figure(figsize=(7.2, 3.4))
        axes = figure.add_subplot()
        for i, context in enumerate(contexts):
            edges = [context.blocks[0].start, *(block.stop for block in context.blocks)]
            values = [_finite(block.nats) for block in context.blocks]
            axes.stairs(values, edges, baseline=None, label=context.model, linewidth=1.7, **line(i, marker=False))
        _marks(axes, contexts)
        axes.set(title=title, xlabel="position in the window, tokens", ylabel="nats per token")
        axes.set_xlim(0, max(context.blocks[-1].stop for context in contexts))
        axes.margins(y=0.12)
        axes.legend()
        description = (
            f"{c.model}: {c.blocks[0].nats:.3f} nats per token in the first block, {c.blocks[-1].nats:.3f} in the last"
            for c in contexts
        )
        return to_svg(figure, title, "; ".join(description))


def _perplexities(axes: Axes, contexts: Sequence[Context]) -> None:
    for i, context in enumerate(contexts):
        x, y = [length.tokens for length in context.lengths], [_finite(length.perplexity) for length in context.lengths]
        axes.plot(x, y, label=context.model, **line(i))
    axes.set_xscale("log", base=2)
    _marks(axes, contexts)
    lengths = sorted({length.tokens for context in contexts for length in context.lengths})
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(round(x))))
    drawn = [le.perplexity for context in contexts for le in context.lengths if math.isfinite(le.perplexity)]
    if drawn and max(drawn) > _LOG_SCALE_FROM * min(drawn):
        axes.set_yscale("log")
    axes.margins(y=0.12)  # room for the labels of the marks
    axes.set(title="Perplexity by length", xlabel="window, tokens", ylabel="perplexity per token")
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    axes.legend(**beside if len(contexts) > _MOST_NAMES else {})


def _marks(axes: Axes, contexts: Sequence[Context]) -> None:
    """A line at each model's context. Models with the same one share it, in the text's colour if all do."""
    sizes = [context.max_context for context in contexts]
    for value in sorted({size for size in sizes if size}):
        owners = [i for i, size in enumerate(sizes) if size == value]
        colour = PALETTE[owners[0] % len(PALETTE)] if len(owners) < len(sizes) else INK
        axes.axvline(value, color=colour, linewidth=1.0, linestyle=(0, (2, 3)), zorder=0.5)
        axes.annotate(
            f"context {_short(value)} ", (value, 1.0), xycoords=("data", "axes fraction"), rotation=90, fontsize=8,
            ha="right", va="top", annotation_clip=True,
        )  # fmt: skip


def _passkeys(figure: SubFigure, contexts: Sequence[Context]) -> None:
    cells = [found for context in contexts for found in context.passkeys]
    retrieved = any(found.found for found in cells)
    most = max([_FAINTEST, *(abs(found.gain) for found in cells if math.isfinite(found.gain))])
    gain = "gain in nats per token"
    title = f"Passkeys retrieved, and {gain}" if retrieved else f"Passkeys: {gain} (none retrieved)"
    figure.suptitle(title, x=0.02, ha="left")
    grid = figure.subplots(len(contexts), squeeze=False)[:, 0]
    for axes, context in zip(grid, contexts, strict=True):
        _map(axes, context, retrieved, most)
        axes.set_title(context.model, fontsize=9, pad=3)
    grid[-1].set_xlabel("prompt, tokens")


def _map(axes: Axes, context: Context, retrieved: bool, most: float) -> None:
    lengths = sorted({found.length for found in context.passkeys})
    depths = sorted({found.depth for found in context.passkeys})
    cell_axes(axes, len(lengths), len(depths))
    for found in context.passkeys:
        x, y = lengths.index(found.length), depths.index(found.depth)
        share = found.found / found.trials if retrieved else min(abs(found.gain) / most, 1.0)
        colour = PALETTE[0] if retrieved or found.gain >= 0 else PALETTE[1]
        cell(axes, x, y, _text(found, retrieved), share if math.isfinite(share) else 0.0, colour)
    within = sum(length <= context.max_context for length in lengths) if context.max_context else 0
    if 0 < within < len(lengths):
        axes.axvline(within, color=INK, linewidth=1.4, linestyle=(0, (2, 2)))
    axes.set_xticks([i + 0.5 for i in range(len(lengths))], [_short(length) for length in lengths])
    axes.set_yticks([i + 0.5 for i in range(len(depths))], [f"{depth:.0%}" for depth in depths])
    axes.set_ylabel("depth")


def _text(found: Retrieval, retrieved: bool) -> str:
    return f"{found.found / found.trials:.0%}  {found.gain:+.1f}" if retrieved else f"{found.gain:+.2f}"


def _short(tokens: int) -> str:
    """128, 1k, 96k, 1M: multiples of powers of 1,024 are abbreviated."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if tokens and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return f"{tokens:,}"


def _finite(value: float) -> float:
    """The value, or NaN, which leaves a gap, if it is infinite."""
    return value if math.isfinite(value) else math.nan


def _description(contexts: Sequence[Context]) -> str:
    texts = []
    for context in contexts:
        first, last = context.lengths[0], context.lengths[-1]
        text = f"{context.model}: perplexity {first.perplexity:.2f} at {first.tokens:,} tokens"
        if last is not first:
            text += f", {last.perplexity:.2f} at {last.tokens:,}"
        if context.passkeys:
            count = sum(found.trials for found in context.passkeys)
            text += f"; {sum(found.found for found in context.passkeys)} of {count} passkeys retrieved"
        texts.append(text)
    return "; ".join(texts)
