"""Regular expressions from untrusted files, with the answers of `re.fullmatch` and bounds on time and memory.

PEFT's configuration names modules by regular expressions, and fifteen characters can keep `re` busy for days. The
`regex` package reads the same expressions and stops at a timeout while it matches, but not while it compiles, when it
writes counted repetitions out: so the size of a pattern is bounded first.

`re` decides the syntax. Constructs that `regex` reads differently (fuzzy matching such as `a{e<=1}`, POSIX classes) are
refused, and so are flags. `tests/files/test_bounded_regex.py` compares the answers with those of `re`.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import regex

_Result = TypeVar("_Result")
MOST_CHARACTERS = 20_000
MOST_STATES = 20_000  # characters, classes and groups once the counted repetitions are written out
MOST_STATES_OF_FILE = 200_000  # some 140 MB compiled
MOST_SECONDS = 2.0

_TOKEN = re.compile(
    r"""(?P<escape>\\.)
      | (?P<posix>\[\^?\]?(?:\\.|[^\\\]])*?\[:)
      | (?P<set>\[\^?\]?(?:\\.|[^\\\]])*\])
      | (?P<flags>\(\?[aiLmsux-])
      | (?P<comment>\(\?\#)
      | (?P<open>\()
      | (?P<close>\))
      | (?P<repeat>\+|\{(?=[\d,])\d*,?\d*\})
      | (?P<brace>\{)
      | (?P<other>.)""",
    re.DOTALL | re.VERBOSE,
)
_REFUSED = {
    "posix": "[: in a set of characters is not supported in a pattern",
    "flags": "flags inside a pattern are not supported",
    "comment": "comments are not supported in a pattern",
    "brace": "a brace that is not a repetition must be written \\{ in a pattern",
}
_BACKTRACKING = re.compile(r"[*+?{|(]")
_CLASSES = re.compile(r"\\[wWsSdDbB]")


@dataclass
class Budget:
    """The time and size that all patterns of one file may use together."""

    seconds: float = MOST_SECONDS
    states: int = MOST_STATES_OF_FILE

    def run(self, work: Callable[[], _Result]) -> _Result:
        """The result of `work`, with its time subtracted from the budget.

        Raises:
            ValueError: the time is used up.
        """
        start = time.monotonic()
        try:
            if self.seconds > 0:
                return work()
        except TimeoutError:
            self.seconds = 0
        finally:
            self.seconds -= time.monotonic() - start
        raise ValueError("its patterns take too much time to match")


class Pattern:
    """A regular expression for whole names.

    Args:
        text: the expression, in the syntax of `re`.
        budget: shared by the patterns of one file; by default the pattern has its own.

    Raises:
        ValueError: `text` is not a regular expression, is too large, or uses an unsupported construct.

    >>> Pattern(r"(([a-z]+)+)+\\.q_proj").fullmatch("layers.q_proj")
    True
    """

    _FORM = "{}"

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"a pattern of {len(text):,} characters, more than {MOST_CHARACTERS:,}")
        self._budget = budget or Budget()
        try:
            self._plain, self._timed = self._budget.run(lambda: self._compiled(text))
        except RecursionError:
            raise ValueError("a pattern nested too deeply") from None
        self._classes = _CLASSES.search(text) is not None

    def _compiled(self, text: str) -> tuple[re.Pattern[str], regex.Pattern[str] | None]:
        """The expression for `re`, and for `regex` if it can backtrack."""
        _parsed(text)  # alone first: `a)|(b` would be valid inside the brackets of a suffix pattern
        states = _states(text)
        full = self._FORM.format(text)
        if not _BACKTRACKING.search(text):
            return _parsed(full), None
        self._budget.states -= states
        if self._budget.states < 0:
            raise ValueError("its patterns are too large together")
        return _parsed(full), regex.compile(full, regex.V0)

    def fullmatch(self, name: str) -> bool:
        """Whether the expression matches the whole name.

        Raises:
            ValueError: the budget is used up, or `re` and `regex` may disagree about the characters of this name.
        """
        plain, timed = self._plain, self._timed
        if timed is None:
            return self._budget.run(lambda: plain.fullmatch(name)) is not None
        if self._classes and not (name.isascii() and name.isprintable()):
            raise ValueError(f"classes such as \\w are not supported for the name {name!a}")
        return self._budget.run(lambda: timed.fullmatch(name, timeout=self._budget.seconds)) is not None


class SuffixPattern(Pattern):
    """A regular expression for whole components at the end of a path, as in PEFT's `rank_pattern`.

    It matches what `(.*\\.)?(text)` matches.

    Raises:
        ValueError: as for `Pattern`.

    >>> SuffixPattern("q_proj").fullmatch("layers.0.q_proj"), SuffixPattern("q_proj").fullmatch("layers.0.eq_proj")
    (True, False)
    """

    _FORM = r"(.*\.)?({})"


def _parsed(text: str) -> re.Pattern[str]:
    """The expression as `re` compiles it.

    Raises:
        ValueError: it is not a regular expression.
    """
    with warnings.catch_warnings():  # a later version of `re` may read nested sets
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return re.compile(text)
        except (re.error, OverflowError, ValueError) as error:
            raise ValueError(f"not a regular expression: {error}") from None


def _states(text: str) -> int:
    """The size of a valid expression once `regex` has written its counted repetitions out.

    Raises:
        ValueError: it is too large, or has an unsupported construct.
    """
    sizes, last = [0], 0  # of the open groups, and of the item that a repetition would repeat
    for token in _TOKEN.finditer(text):
        kind = token.lastgroup or ""
        if kind in _REFUSED:
            raise ValueError(_REFUSED[kind])
        if kind == "open":
            sizes.append(1)
        elif kind == "close":
            last = sizes.pop()
            sizes[-1] += last
        elif kind == "repeat":
            copies = _copies(token.group())
            sizes[-1] += last * (copies - 1)
            last *= copies
        else:
            last = 1
            sizes[-1] += 1
        if sizes[-1] > MOST_STATES:
            raise ValueError(f"a pattern of more than {MOST_STATES:,} states: its repetitions are too large")
    return sizes[0]


def _copies(repeat: str) -> int:
    """How often `regex` may write a group out: `a+` becomes `aa*`, once per level of nesting."""
    least, comma, most = repeat.strip("{}").partition(",")
    if repeat == "+":
        return 2
    return max(1, int(most or 0), int(least or 0) + (comma != "" and most == ""))
