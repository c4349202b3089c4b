"""The page of a comparison: the verdict, the evidence for it, and everything that is needed to repeat it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from lorary.analysis.comparison import pictures
from lorary.analysis.comparison.statistics import Findings, Interval
from lorary.analysis.comparison.tables import TextTable, costs, limits, quality, runs, serving, settings, views
from lorary.analysis.comparison.words import level, remarks, verdict
from lorary.analysis.html_report import (
    Block,
    Code,
    KeyFigure,
    Paragraph,
    Picture,
    Pictures,
    Section,
    Table,
    html_report,
)

_FOREST = (
    "Each method minus {reference}, on the same test rows. Thick: the 95 % interval of this pair. Thin: the 95 % "
    "interval that holds together with those of all other pairs; it gives the verdict. Arrows: beyond the axis."
)
_QUALITY = (
    "Means over the seeds, with 95 % intervals. Those of the loss are wide, as some rows are harder than others; the "
    "difference between two methods on the same rows is known more precisely, and decides. The intervals of all "
    "differences between two methods are made to hold together in 95 % of comparisons, however many methods there are. "
    "Forgotten is the loss on general text minus that of the base; sd is the standard deviation over the seeds."
)
_COST = (
    "At the best rate. Peak memory is counted for a training step. Seconds per step are medians with quartiles; the "
    "methods took turns, a few steps each. A forward pass is one over a test row, a batch of one; its time is given as "
    "a multiple of that of the base without an adapter, the two taking turns, and again with the adapter merged. "
    "Context taken is the number of positions that the method uses up."
)
_TRADE = (
    "Green diamonds: of the methods none of whose seeds diverged, no other is both smaller and better. Lines: the "
    "range over the seeds."
)
_RATES = (
    "Each method tries its own learning rates, and its best one is chosen on the validation rows: the ring. A method "
    "whose best rate is the lowest or the highest of those tried is called not tuned: another might be better."
)
_CURVES = "At each method's best rate, the mean over its seeds."
_CHANCE = (
    "Two sources of chance count in every interval. The test rows could have been others: they are resampled with "
    "replacement, the same ones for all methods, and the loss is counted by tokens (the paired bootstrap; Efron & "
    "Tibshirani 1993). And the seeds could have been others: they set the order of the data, the same for all methods, "
    "and the initialisation, which is each method's own. "
    "Two or three seeds are too few to resample, so the variance within the methods is pooled over all of them, and "
    "its own error is counted by Student's t. A method that scatters clearly more than the others stands on its own "
    "variance; with two seeds that may go unnoticed, and more seeds help. Differences of single rows between seeds "
    "count in both parts, which makes the intervals a little too wide. In simulations the interval of a pair holds the"
    " true difference in 95 to 99 % of comparisons, and in as few as 84 % where one method scatters far more than the "
    "others; those of all pairs together hold in 91 to 99 %, and in as few as 85 %. Rows cut from one text are "
    "resampled as if they were independent. The choice of the rate on one seed is a third source of chance, which no "
    "interval counts: a verdict is about each method at the rate that was chosen."
)
_TWICE = ("request", "timings")  # settings of the record that the configuration and the table of costs hold too
_FEW = 12  # characters that stay on one line
_CLASSES = "Classifiers are judged by their accuracy; it is never taken to be known better than to three rows."


def comparison_page(found: Findings) -> str:
    """The page.

    Args:
        found: the results.

    Returns:
        A complete HTML document without scripts or external resources.
    """
    count = len(found.comparison.arms)
    title = f"Comparison of {count} methods" if count != 1 else f"One method: {found.comparison.arms[0].name}"
    return html_report(title, verdict(found), [*_figures(found)], [*_sections(found)])


def _figures(found: Findings) -> Iterator[KeyFigure]:
    comparison = found.comparison
    if found.best:
        first = found.standings[0]
        figure, what = (first.accuracy, "accuracy") if found.measure == "accuracy" else (first.loss, "held-out loss")
        value = Interval(figure.value) if figure else None
        label = "Highest accuracy" if found.measure == "accuracy" else "Lowest loss"
        if any(s.diverged for s in found.standings) and not first.diverged:
            label += ", none diverged"
        yield KeyFigure(label, pictures.short(found.best), f"{what} {level(value, found.measure)}")
    if found.base is not None:
        yield KeyFigure("Without adapter", f"{found.base:.3f}", "held-out loss of the base")
    seeds = sorted({s.seeds for s in found.standings if s.seeds})
    judged = f", {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds judged of each" if seeds else ""
    yield KeyFigure("Methods", str(len(comparison.arms)), f"{len(comparison.trials)} runs{judged}")
    if test := next((run.test for run in comparison.trials if run.test), None):
        tokens = f"{sum(test.tokens):,} tokens" if comparison.task == "sft" else "one label each"
        yield KeyFigure("Test rows", f"{len(test.tokens):,}", f"{tokens}, the same for all")


def _sections(found: Findings) -> Iterator[Section]:
    yield Section("Verdict", [*map(Paragraph, remarks(found)), *_forests(found)])
    yield Section("Quality", [_table(quality(found)), Paragraph(_QUALITY)])
    if found.comparison.costs:
        reasons = [_table(table)] if (table := limits(found)).rows else []
        yield Section("Cost", [_table(costs(found)), Paragraph(_COST), *_trade_offs(found)])
        yield Section("Serving", [_table(serving(found)), *reasons])
    for view, about in views(found):
        yield Section(view.title, [Paragraph(about), _table(view)])
    if found.comparison.trials:
        each = [
            Picture(pictures.rates_svg(found, s.arm), s.untuned) for s in found.standings if found.comparison.of(s.arm)
        ]
        yield Section("Learning rates", [Paragraph(_RATES), Pictures(each)])
        yield Section("Loss over the steps", [Picture(pictures.curves_svg(found), _CURVES)])
    if found.comparison.left_out:
        rows = [*found.comparison.left_out.items()]
        yield Section("Left out", [Table(("what", "why"), rows)])
    about_chance = [_CHANCE, *([_CLASSES] if found.measure == "accuracy" else [])]
    yield Section("How chance is counted", [Paragraph(text) for text in about_chance])
    yield Section("To repeat it", [*_repeat(found)])


def _forests(found: Findings) -> Iterator[Block]:
    for others in (found.against_reference, found.against_best):
        if others:
            reference = next(iter(others.values())).reference
            yield Picture(pictures.differences_svg(found, others), _FOREST.format(reference=reference))
        if found.reference == found.best:
            return


def _trade_offs(found: Findings) -> Iterator[Block]:
    if any(s.loss is not None and s.arm in found.comparison.costs for s in found.standings):
        numbers = pictures.trade_off_svg(found, lambda cost: cost.trained, "trained numbers")
        file = pictures.trade_off_svg(found, lambda cost: cost.file_bytes, "bytes of the file")
        yield Pictures([Picture(numbers, _TRADE), Picture(file, "")])


def _repeat(found: Findings) -> Iterator[Block]:
    comparison = found.comparison
    values = {key: value for key, value in comparison.settings.items() if key not in _TWICE}
    if isinstance(base := values.get("base"), Mapping):  # the model has its own configuration
        values["base"] = {key: value for key, value in base.items() if key != "settings"}
    if isinstance(command := values.pop("command", None), str):
        yield Code(command)
    rows = settings(values)
    if lines := [row for row in rows if "\n" not in row[1]]:
        yield Table(("setting", "value"), lines)
    for name, text in rows:
        if "\n" in text:
            yield Paragraph(f"{name}:")
            yield Code(text)
    arms = [
        (arm.name, json.dumps(arm.method, ensure_ascii=False, default=str), ", ".join(f"{r:.3g}" for r in arm.rates))
        for arm in comparison.arms
    ]
    if arms:
        yield Table(("method", "options", "rates tried"), arms)
    if comparison.trials:
        yield _table(runs(found))


def _table(table: TextTable) -> Table:
    return Table(table.head, [[_unbroken(cell) for cell in row] for row in table.rows])


def _unbroken(cell: str) -> str:
    """A cell whose interval, or whose few words, stay on one line."""
    if cell.endswith("]"):
        return cell.replace(", ", ",\N{NO-BREAK SPACE}")
    return cell.replace(" ", "\N{NO-BREAK SPACE}") if len(cell) <= _FEW else cell
