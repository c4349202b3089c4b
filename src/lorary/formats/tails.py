"""Expressions that match the end of a module's path, as the keys of PEFT's `rank_pattern` and `alpha_pattern` do."""

from __future__ import annotations

import re._constants as op  # type: ignore[import-untyped, import-not-found, unused-ignore]

from lorary.formats.patterns import Budget, Pattern, Test, character, parsed


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
        items = list(parsed(text))  # on its own first: `a)|(b` would make sense inside the brackets below
        self._anchored = bool(items) and items[0] == (op.AT, op.AT_BEGINNING)
        single = items[self._anchored :]
        self._tests: list[Test] | None = None
        self._pattern: Pattern | None = None
        if all(code in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN) for code, _ in single):
            self._tests = [character(code, value) for code, value in single]
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
