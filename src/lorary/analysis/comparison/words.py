"""The results of a comparison in words: the verdict, numbers with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from lorary.analysis.comparison.statistics import Difference, Findings, Interval, Measure, Standing

MINUS = "\N{MINUS SIGN}"
_MOST_NAMES = 6
_UNITS: dict[Measure, str] = {"loss": "nats per token", "accuracy": "of the test rows right"}


def verdict(found: Findings) -> str:
    """The result in one or two plain sentences: the best method, those that may be as good, those that are worse."""
    if not found.best:
        return "No method was judged on the test rows."
    best, others = _level(found), found.against_best
    open_ = [d for d in others.values() if d.verdict == "not judged"]
    alike = [arm for arm, d in others.items() if d.verdict == "no difference shown"]
    worse = {arm: d for arm, d in others.items() if d.verdict == "worse"}
    diverged = {s.arm for s in found.standings if s.diverged}
    apart = found.best not in diverged and any(d.arm in diverged for d in open_)
    steady = " of the methods none of whose seeds diverged" if apart else ""
    first = f"{found.best} has the {_best(found)}{steady}, {best}"
    whose = "its" if len(open_) == 1 else "their"
    last = f" Undecided: {names([d.arm for d in open_])}, as some of {whose} seeds diverged." if open_ else ""
    if not others:
        return f"Only {found.best} was judged: {best}."
    if len(open_) == len(others):
        return f"{first}, and nothing is decided: {open_[0].why}."
    if not alike:
        second = next(iter(worse.values()))
        return f"{found.best} is better than {_all(worse, of=others)}: {best}, {_ahead(second, found.measure)}.{last}"
    if not worse:
        between = names([found.best, *alike]) if open_ else f"the {len(others) + 1} methods"
        return f"No difference is shown between {between}. {first}.{last}"
    return f"{first}; no difference from {names(alike)} is shown. Worse: {names([*worse])}.{last}"


def remarks(found: Findings) -> Iterator[str]:
    """The verdicts on the reference, and what weakens the results, one sentence each."""
    for note in found.comparison.settings.get("notes", ()):
        yield f"{note[:1].upper()}{note[1:]}."
    against = found.against_reference
    groups = {
        word: [arm for arm, d in against.items() if d.verdict == word]
        for word in ("better", "worse", "no difference shown")
    }
    parts = [f"{word}: {names(arms)}" for word, arms in groups.items() if arms]
    if parts and found.reference != found.best:  # else the verdict has said so
        yield f"Compared with {found.reference}: {'; '.join(parts)}."
    if halves := [d.joint.high - d.joint.value for d in against.values() if d.verdict == "no difference shown"]:
        scale, unit = (100, "percentage points") if found.measure == "accuracy" else (1, "nats per token")
        least = scale * sorted(halves)[len(halves) // 2]
        yield f"Differences of less than about {least:.2g} {unit} are not shown by so few seeds and rows."
    for s in found.standings:
        if s.diverged:
            yield f"{s.arm} diverged with {s.diverged} of {s.seeds + s.diverged} seeds at its best rate."
    if untuned := [s.arm for s in found.standings if s.untuned and s.lr is not None]:
        yield f"Not tuned, as the best rate is the lowest or the highest that was tried: {names(untuned)}."
    if missing := [s.arm for s in found.standings if s.loss is None]:
        yield f"Not judged: {names(missing)}."
    if single := [s.arm for s in found.standings if s.seeds == 1]:
        yield f"With a single seed, and taken to scatter over seeds as the others do: {names(single)}."


def names(of: Sequence[str]) -> str:
    """Names in a sentence, at most six.

    >>> names(["a", "b", "c"]), names(["LoRA, r = 8", "full"])
    ('a, b and c', 'LoRA, r = 8; full')
    """
    shown = [*of[:_MOST_NAMES], *([f"{len(of) - _MOST_NAMES} more"] if len(of) > _MOST_NAMES else [])]
    if any("," in name for name in shown):
        return "; ".join(shown)
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def level(interval: Interval | None, measure: Measure = "loss") -> str:
    """A measure with its interval.

    >>> level(Interval(3.41234, 3.35, 3.47)), level(Interval(0.875, 0.8, 0.95), "accuracy"), level(None)
    ('3.412 [3.350, 3.470]', '87.5 % [80.0, 95.0]', '')
    """
    if interval is None:
        return ""
    text = (lambda value: f"{100 * value:.1f}") if measure == "accuracy" else "{:.3f}".format
    ends = f" [{text(interval.low)}, {text(interval.high)}]" if interval.known else ""
    return f"{text(interval.value)}{' %' if measure == 'accuracy' else ''}{ends}"


def change(interval: Interval | None, measure: Measure = "loss") -> str:
    """A difference with its interval, all with their signs.

    >>> change(Interval(-0.0712, -0.1034, -0.039))
    '−0.071 [−0.103, −0.039]'
    """
    if interval is None:
        return ""
    scale, unit, digits = (100, " pp", 1) if measure == "accuracy" else (1, "", 3)
    value, low, high = (signed(scale * v, digits) for v in (interval.value, interval.low, interval.high))
    return f"{value}{unit} [{low}, {high}]" if interval.known else f"{value}{unit}"


def signed(value: float, digits: int) -> str:
    """A number with its sign; zero has none, nor what is rounded to it.

    >>> signed(0.5, 1), signed(-0.5, 1), signed(-0.001, 1)
    ('+0.5', '−0.5', '0.0')
    """
    text = f"{abs(value):.{digits}f}"
    return text if math.isnan(value) or float(text) == 0 else f"{'+' if value > 0 else MINUS}{text}"


def _level(found: Findings) -> str:
    first = found.standings[0]
    interval = first.accuracy if found.measure == "accuracy" else first.loss
    assert interval is not None
    return f"{level(Interval(interval.value), found.measure)} {_UNITS[found.measure]}"


def _best(found: Findings) -> str:
    return "highest accuracy" if found.measure == "accuracy" else "lowest held-out loss"


def _all(worse: Mapping[str, Difference], of: Mapping[str, Difference]) -> str:
    return f"all {len(worse)} other methods" if len(worse) == len(of) > 1 else names([*worse])


def _ahead(second: Difference, measure: Measure) -> str:
    """How far the best is ahead of the second."""
    joint, sign = second.joint, -1 if measure == "accuracy" else 1
    ends = sorted((sign * joint.low, sign * joint.high))
    ahead = Interval(sign * joint.value, *ends)
    return f"{level(ahead, measure).replace(' %', ' points')} {'above' if sign < 0 else 'below'} {second.arm}"


def rate(standing: Standing) -> str:
    """The best rate of an arm, marked if it was not tuned.

    >>> rate(Standing("lora", 3e-4, 2, "it is the highest that was tried"))
    '0.0003 (not tuned)'
    """
    if standing.lr is None:
        return ""
    return f"{standing.lr:.3g}" + (" (not tuned)" if standing.untuned else "")
