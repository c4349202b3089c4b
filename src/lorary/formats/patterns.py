"""Regular expressions from a stranger, matched in time linear in the name.

An adapter's configuration may name its modules by a regular expression, and Python's own matcher can be made
to run for days by fifteen characters of it. Here the expression is read by Python's parser and run as an
automaton (Thompson 1968): all its states at once, one step per character, whatever is nested in what, and every step
that was taken once is remembered. What an automaton cannot do (references back to a group, looking behind) is refused
with a sentence.

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
_ROOM = 200_000  # states kept of results
MOST_WORK = 20_000_000  # states and characters visited: some seconds

Test = Callable[[str], bool]
Condition = Callable[[str, int], bool]


@dataclass
class Budget:
    """The work that all patterns of one file may take together, in states and characters visited."""

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
        self._steps: dict[Any, frozenset[int]] = {}
        self._reaches: dict[Any, frozenset[int]] = {}
        self._room = _ROOM
        self._looks_ahead = False
        end = self._add(_State())
        try:
            self._start, self._end = self._sequence(parsed(text), end), end
        except RecursionError:
            raise ValueError("a pattern nested too deeply") from None
        self._looks = any(state.condition is not None for state in self._states)

    def fullmatch(self, name: str) -> bool:
        """Whether the expression matches the whole name.

        Raises:
            ValueError: the budget is used up.
        """
        return self._run(self._start, self._end, name, 0, whole=True)

    def _run(self, start: int, end: int, name: str, at: int, whole: bool) -> bool:
        self._budget.spend(len(name) - at + 1)
        current = self._reach(frozenset([start]), name, at)
        while at < len(name) and current:
            if end in current and not whole:
                return True
            current = self._reach(self._step(current, name[at]), name, at + 1)
            at += 1
        return end in current

    def _step(self, current: frozenset[int], c: str) -> frozenset[int]:
        """The states after eating a character."""
        after = self._steps.get((current, c))
        if after is None:
            states = [self._states[s] for s in current]
            after = frozenset(t for s in states if s.test is not None and s.test(c) for t in s.then)
            self._remember(self._steps, (current, c), after, len(current))
        return after

    def _reach(self, states: frozenset[int], name: str, at: int) -> frozenset[int]:
        """All states that can be reached without eating a character."""
        around = self._around(name, at)
        reached = self._reaches.get((states, around))
        if reached is None:
            seen, waiting = set(states), list(states)
            while waiting:
                state = self._states[waiting.pop()]
                if state.test is None and (state.condition is None or state.condition(name, at)):
                    waiting += (new := set(state.then) - seen)
                    seen |= new
            reached = frozenset(seen)
            self._remember(self._reaches, (states, around), reached, len(seen))
        return reached

    def _around(self, name: str, at: int) -> object:
        """All that the conditions of this expression can see at a position."""
        if self._looks_ahead:
            return name, at
        if not self._looks:
            return None
        return at == 0, _is_word(name[at - 1 : at]), name[at : at + 1], len(name) - at < 2

    def _remember(self, memory: dict[Any, frozenset[int]], key: object, value: frozenset[int], work: int) -> None:
        """Keeps a result, so that the automaton is determined as far as it is used, while there is room."""
        self._budget.spend(work + 1)
        self._room -= len(value) + 1
        if self._room > 0:
            memory[key] = value

    def _add(self, state: _State) -> int:
        if len(self._states) >= MOST_STATES:
            raise ValueError(f"a pattern of more than {MOST_STATES:,} states: its repetitions are too large")
        self._budget.spend(20)  # making one takes as long as visiting some
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
        return self._add(_State(test=character(code, value), then=[then]))

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
        self._looks_ahead = True
        end = self._add(_State())
        start = self._sequence(body, end)

        def condition(name: str, at: int) -> bool:
            return self._run(start, end, name, at, whole=False) == wanted

        return self._add(_State(condition=condition, then=[then]))


def parsed(text: str) -> Any:
    """What Python's parser makes of an expression: (operation, value) pairs.

    Raises:
        ValueError: it is not an expression, too long, too deep, or has flags.
    """
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


def character(code: Any, value: Any) -> Test:
    """Whether a character is one that a single-character operation of the parser accepts.

    Raises:
        ValueError: the operation is not of that sort, and none that an automaton has.
    """
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
    return character(code, value)


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
