"""Regular expressions from a stranger, matched in time linear in the name.

An adapter's configuration may name its modules by a regular expression, and Python's own matcher can be made
to run for days by fifteen characters of it. Here the expression is read by Python's parser and run as an
automaton (Thompson 1968): all its states at once, one step per character, whatever is nested in what. What an
automaton cannot do (references back to a group, looking behind) is refused with a sentence.

The answer is the one that `re.fullmatch` gives; `tests/formats/test_patterns.py` holds it to that.
"""

from __future__ import annotations

import re
import re._constants as op  # type: ignore[import-untyped, import-not-found, unused-ignore]
import re._parser as reader  # type: ignore[import-untyped, import-not-found, unused-ignore]
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MOST_CHARACTERS = 20_000
MOST_STATES = 20_000
MOST_WORK = 10_000_000  # states visited: some seconds

Test = Callable[[str], bool]
Condition = Callable[[str, int], bool]


@dataclass
class Budget:
    """The work that all patterns of one file may take together, in states made and visited."""

    left: int = MOST_WORK

    def spend(self, work: int) -> None:
        """Takes `work` from what is left.

        Raises:
            ValueError: there is not enough left.
        """
        self.left -= work
        if self.left < 0:
            raise ValueError("its patterns take too much work to match")


@dataclass
class _State:
    """A state of the automaton: at most one of `test` (eats a character), `condition` (looks) or neither
    (splits)."""

    test: Test | None = None
    condition: Condition | None = None
    then: list[int] = field(default_factory=list)


class Pattern:
    """A regular expression that matches whole names.

    Args:
        text: the expression, as Python spells them.
        budget: shared by the patterns of one file; one of its own if silent.

    Raises:
        ValueError: it is not a regular expression, too long or too large, or uses what is not supported.

    >>> Pattern(r"(([a-z]+)+)+\\.q_proj").fullmatch("layers.q_proj")
    True
    """

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        self._budget = budget or Budget()
        self._states: list[_State] = []
        end = self._add(_State())
        try:
            self._start, self._end = self._sequence(_parsed(text), end), end
        except RecursionError:
            raise ValueError("a pattern nested too deeply") from None

    def fullmatch(self, name: str) -> bool:
        """Whether the expression matches the whole name.

        Raises:
            ValueError: the budget is used up.
        """
        return self._run(self._start, self._end, name, 0, whole=True)

    def _run(self, start: int, end: int, name: str, at: int, whole: bool) -> bool:
        current = self._reach({start}, name, at)
        while at < len(name) and current:
            if end in current and not whole:
                return True
            states = [self._states[s] for s in current]
            after = {t for s in states if s.test is not None and s.test(name[at]) for t in s.then}
            at += 1
            current = self._reach(after, name, at)
        return end in current

    def _reach(self, states: set[int], name: str, at: int) -> set[int]:
        """All states that can be reached without eating a character."""
        seen, waiting = set(states), list(states)
        while waiting:
            state = self._states[waiting.pop()]
            if state.test is None and (state.condition is None or state.condition(name, at)):
                waiting += (new := set(state.then) - seen)
                seen |= new
        self._budget.spend(len(seen))
        return seen

    def _add(self, state: _State) -> int:
        if len(self._states) >= MOST_STATES:
            raise ValueError(f"a pattern of more than {MOST_STATES:,} states: its repetitions are too large")
        self._budget.spend(1)
        self._states.append(state)
        return len(self._states) - 1

    # Every builder below takes the state that follows and returns the state to begin at.

    def _sequence(self, items: Any, then: int) -> int:
        for code, value in reversed(list(items)):
            then = self._item(code, value, then)
        return then

    def _item(self, code: Any, value: Any, then: int) -> int:
        if code in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, body = value
            return self._repeat(least, most, body, then)
        if code is op.SUBPATTERN:
            _, on, off, body = value
            if on or off:
                raise ValueError("flags inside a pattern are not supported")
            return self._sequence(body, then)
        if code is op.BRANCH:
            return self._add(_State(then=[self._sequence(option, then) for option in value[1]]))
        if code in (op.ASSERT, op.ASSERT_NOT):
            direction, body = value
            if direction < 0:
                raise ValueError("looking behind is not supported in a pattern")
            return self._look_ahead(body, code is op.ASSERT, then)
        if code is op.AT:
            return self._add(_State(condition=_position(value), then=[then]))
        return self._add(_State(test=_character(code, value), then=[then]))

    def _repeat(self, least: int, most: Any, body: Any, then: int) -> int:
        if most is op.MAXREPEAT:
            loop = self._add(_State())
            self._states[loop].then = [self._sequence(body, loop), then]
            then = loop
        else:
            end = then
            for _ in range(most - least):
                then = self._add(_State(then=[self._sequence(body, then), end]))
        for _ in range(least):
            before, then = len(self._states), self._sequence(body, then)
            if len(self._states) == before:  # an empty body repeats nothing
                break
        return then

    def _look_ahead(self, body: Any, wanted: bool, then: int) -> int:
        end = self._add(_State())
        start = self._sequence(body, end)

        def condition(name: str, at: int) -> bool:
            return self._run(start, end, name, at, whole=False) == wanted

        return self._add(_State(condition=condition, then=[then]))


class Tail:
    """A regular expression that matches whole components at the end of a path, as PEFT's `rank_pattern` does.

    What it matches is `(.*\\.)?(text)`. Most such texts match paths of one length only (a name, with or without the
    dots escaped); those are compared character by character, which is what keeps hundreds of them quick.

    Raises:
        ValueError: as for `Pattern`.

    >>> Tail("q_proj").fullmatch("layers.0.q_proj"), Tail("q_proj").fullmatch("layers.0.eq_proj")
    (True, False)
    """

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        self._budget = budget or Budget()
        items = list(_parsed(text))  # on its own first: `a)|(b` would make sense inside the brackets below
        self._anchored = bool(items) and items[0] == (op.AT, op.AT_BEGINNING)
        single = items[self._anchored :]
        self._tests: list[Test] | None = None
        self._pattern: Pattern | None = None
        if all(code in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN) for code, _ in single):
            self._tests = [_character(code, value) for code, value in single]
        else:
            self._pattern = Pattern(rf"(.*\.)?({text})", self._budget)

    def fullmatch(self, name: str) -> bool:
        """Whether the expression matches the end of the path, from the start of a component on.

        Raises:
            ValueError: the budget is used up.
        """
        if self._tests is None:
            return self._pattern is not None and self._pattern.fullmatch(name)
        at = len(name) - len(self._tests)
        self._budget.spend(1)
        if at < 0 or (at > 0 and (self._anchored or name[at - 1] != ".")):
            return False
        return all(test(c) for test, c in zip(self._tests, name[at:], strict=True))


def _parsed(text: str) -> Any:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"a pattern of {len(text):,} characters, more than {MOST_CHARACTERS:,}")
    try:
        with warnings.catch_warnings():  # of what may become a set of sets one day
            warnings.simplefilter("ignore", FutureWarning)
            tree = reader.parse(text)
    except (re.error, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from None
    except RecursionError:
        raise ValueError("a pattern nested too deeply") from None
    if tree.state.flags & ~re.UNICODE:
        raise ValueError("flags inside a pattern are not supported")
    return tree


def _character(code: Any, value: Any) -> Test:
    if code is op.LITERAL:
        return lambda c: ord(c) == value
    if code is op.NOT_LITERAL:
        return lambda c: ord(c) != value
    if code is op.ANY:
        return lambda c: c != "\n"
    if code is op.IN:
        negated = value[0][0] is op.NEGATE
        tests = [_member(*item) for item in value[negated:]]
        return lambda c: any(test(c) for test in tests) != negated
    raise ValueError("references to groups, conditions and atomic groups are not supported in a pattern")


def _member(code: Any, value: Any) -> Test:
    if code is op.RANGE:
        low, high = value
        return lambda c: low <= ord(c) <= high
    if code is op.CATEGORY:
        letter = {
            op.CATEGORY_DIGIT: r"\d",
            op.CATEGORY_NOT_DIGIT: r"\D",
            op.CATEGORY_SPACE: r"\s",
            op.CATEGORY_NOT_SPACE: r"\S",
            op.CATEGORY_WORD: r"\w",
            op.CATEGORY_NOT_WORD: r"\W",
        }[value]
        compiled = re.compile(letter)
        return lambda c: compiled.match(c) is not None
    return _character(code, value)


def _position(where: Any) -> Condition:
    if where in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
        return lambda name, at: at == 0
    if where is op.AT_END_STRING:
        return lambda name, at: at == len(name)
    if where is op.AT_END:
        return lambda name, at: name[at:] in ("", "\n")
    inside = where is op.AT_BOUNDARY

    def boundary(name: str, at: int) -> bool:
        return (_is_word(name[at - 1 : at]) != _is_word(name[at : at + 1])) == inside

    return boundary


def _is_word(c: str) -> bool:
    return bool(c) and (c.isalnum() or c == "_")
