"""Pictures of how models use context: perplexity against length beside passkeys, and loss by position."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lorary.inspect.context import Context
from lorary.inspect.passkey import Retrieval
from lorary.inspect.plots import INK, STYLE, svg

_COLOURS = ("#2f7ebc", "#d97706", "#2f9e44", "#9b6bdf", "#d6487e", "#0d9488")  # 3:1 against white and a dark page
_MARKERS, _LINES = ("o", "s", "^", "D", "v", "P"), ("-", "--", "-.", ":")  # told apart without colour as well
_MORE, _LESS = "#3b82f6", "#d97706"
_STRONGEST = 0.6  # of a cell's colour: the number on it keeps its contrast on light and dark pages
_FAINTEST = 0.25  # nats: the gain below which no cell gets all of its colour; noise is to look like it
_MANY = 10.0  # times as much: from there on perplexities are drawn in powers of ten


def context_svg(contexts: Sequence[Context], title: str = "How far back a model looks") -> str:
    """Perplexity against length, one line for each model; beside it how each finds passkeys, where any were hidden.

    A vertical line marks the context that a model knows. A cell of a map says which share of the passkeys was retrieved
    (where any model retrieved one) and, in nats per token, what the right key gains by having been read.

    Args:
        contexts: one for each model.
        title: what the picture is called; plain text.

    Returns:
        One `<svg>` element, as `lorary.inspect.plots.loss_svg` makes it.
    """
    maps = [context for context in contexts if context.passkeys]
    with rc_context(STYLE):
        high = max(3.8, 0.5 + 1.95 * len(maps))
        figure = Figure(figsize=(10.4 if maps else 7.2, high), layout="constrained")
        if maps:
            left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.05))[0]
            _perplexities(left.add_subplot(), contexts)
            _passkeys(right, maps)
        else:
            _perplexities(figure.add_subplot(), contexts)
        return svg(figure, title, _aloud(contexts))


def positions_svg(contexts: Sequence[Context], title: str = "Loss by position") -> str:
    """The loss by position in windows of the longest length, one line of steps for each model.

    Args:
        contexts: one for each model.
        title: what the picture is called; plain text.

    Returns:
        As `context_svg`.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for i, context in enumerate(contexts):
            edges = [context.blocks[0].start, *(block.stop for block in context.blocks)]
            values = [_drawn(block.nats) for block in context.blocks]
            line = _LINES[i % len(_LINES)]
            axes.stairs(
                values, edges, baseline=None, linewidth=1.8, color=_colour(i), linestyle=line, label=context.model
            )
        _marks(axes, contexts)
        axes.set_xlim(0, max(context.blocks[-1].stop for context in contexts))
        axes.margins(y=0.12)
        axes.set_title(title, loc="left", parse_math=False)
        axes.set_xlabel("position in the window, tokens")
        axes.set_ylabel("nats per token")
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
        _legend(axes)
        said = (
            f"{c.model}: {c.blocks[0].nats:.3f} nats per token in the first block, {c.blocks[-1].nats:.3f} in the last"
            for c in contexts
        )
        return svg(figure, title, "; ".join(said))


def _perplexities(axes: Axes, contexts: Sequence[Context]) -> None:
    for i, context in enumerate(contexts):
        x, y = [length.tokens for length in context.lengths], [_drawn(le.perplexity) for le in context.lengths]
        line = _LINES[i % len(_LINES)]
        axes.plot(
            x, y, line, color=_colour(i), label=context.model, marker=_MARKERS[i % 6], markersize=5, linewidth=1.8
        )
    lengths = sorted({length.tokens for context in contexts for length in context.lengths})
    axes.set_xscale("log", base=2)
    _marks(axes, contexts)
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(round(x))))
    drawn = [le.perplexity for context in contexts for le in context.lengths if math.isfinite(le.perplexity)]
    if drawn and max(drawn) > _MANY * min(drawn):
        axes.set_yscale("log")
    axes.margins(y=0.12)  # room for the words at the marks
    axes.set_title("Perplexity by length", loc="left")
    axes.set_xlabel("window, tokens")
    axes.set_ylabel("perplexity per token")
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    _legend(axes)


def _marks(axes: Axes, contexts: Sequence[Context]) -> None:
    """What each model knows. Models that know as much share a line; it has the colour of one that stands alone."""
    known = [context.known for context in contexts]
    for value in sorted({k for k in known if k}):
        owners = [i for i, k in enumerate(known) if k == value]
        colour = _colour(owners[0]) if len(owners) < len(known) else INK
        axes.axvline(value, color=colour, linewidth=1.0, linestyle=(0, (2, 3)), zorder=0.5)
        axes.annotate(
            f"knows {_short(value)} ", (value, 1.0), xycoords=("data", "axes fraction"), rotation=90, fontsize=8,
            ha="right", va="top", color=colour, annotation_clip=True,
        )  # fmt: skip


def _passkeys(figure: SubFigure, contexts: Sequence[Context]) -> None:
    cells = [cell for context in contexts for cell in context.passkeys]
    found = any(cell.found for cell in cells)
    most = max([_FAINTEST, *(abs(cell.gain) for cell in cells if math.isfinite(cell.gain))])
    what = (
        "Passkeys retrieved, and gain in nats per token"
        if found
        else "Passkeys: gain in nats per token (none retrieved)"
    )
    figure.suptitle(what, x=0.02, ha="left", fontsize=12)
    for i, (axes, context) in enumerate(
        zip(figure.subplots(len(contexts), squeeze=False)[:, 0], contexts, strict=True)
    ):
        _map(axes, context, found, most)
        axes.set_title(context.model, loc="left", fontsize=9, parse_math=False, pad=3)
        if i == len(contexts) - 1:
            axes.set_xlabel("prompt, tokens")


def _map(axes: Axes, context: Context, found: bool, most: float) -> None:
    lengths = sorted({cell.length for cell in context.passkeys})
    depths = sorted({cell.depth for cell in context.passkeys})
    for cell in context.passkeys:
        x, y = lengths.index(cell.length), depths.index(cell.depth)
        share = cell.found / cell.trials if found else min(abs(cell.gain) / most, 1.0)
        colour = _MORE if found or cell.gain >= 0 else _LESS
        alpha = _STRONGEST * share if math.isfinite(share) else 0.0
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=(colour, alpha), edgecolor=(INK, 0.25), linewidth=0.6))
        axes.text(x + 0.5, y + 0.5, _cell(cell, found), ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, len(lengths)), ylim=(len(depths), 0))
    within = sum(length <= context.known for length in lengths) if context.known else 0
    if 0 < within < len(lengths):
        axes.axvline(within, color=INK, linewidth=1.4, linestyle=(0, (2, 2)))
    axes.set_xticks([i + 0.5 for i in range(len(lengths))], [_short(length) for length in lengths])
    axes.set_yticks([i + 0.5 for i in range(len(depths))], [f"{depth:.0%}" for depth in depths])
    axes.set_ylabel("depth")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _cell(cell: Retrieval, found: bool) -> str:
    return f"{cell.found / cell.trials:.0%}  {cell.gain:+.1f}" if found else f"{cell.gain:+.2f}"


def _legend(axes: Axes) -> None:
    """Names are plain text: a `$` begins no formula in them."""
    for text in axes.legend(fontsize=9).get_texts():
        text.set_parse_math(False)


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def _short(tokens: int) -> str:
    """128, 1k, 96k, 1M: whole powers of 1,024 by their letter."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if tokens and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return f"{tokens:,}"


def _drawn(value: float) -> float:
    """What is not finite leaves a gap."""
    return value if math.isfinite(value) else math.nan


def _aloud(contexts: Sequence[Context]) -> str:
    """The picture in words, for those who do not see it."""
    said = []
    for context in contexts:
        first, last = context.lengths[0], context.lengths[-1]
        text = f"{context.model}: perplexity {first.perplexity:.2f} at {first.tokens:,} tokens"
        if last is not first:
            text += f", {last.perplexity:.2f} at {last.tokens:,}"
        if context.passkeys:
            count = sum(cell.trials for cell in context.passkeys)
            text += f"; {sum(cell.found for cell in context.passkeys)} of {count} passkeys retrieved"
        said.append(text)
    return "; ".join(said)
