"""Patterns over a model's paths: names, globs and regular expressions, by one rule wherever a path is named.

A pattern is
- one or more whole components at the end of a path: `q_proj`, `self_attn.q_proj`;
- a glob over the path or its end, `*` and `?` only: `model.layers.1?.mlp.*`;
- `re:` and a regular expression for the whole path, as PEFT's `target_modules` takes one as text: `re:.*\\.(q|v)_proj`.

Regular expressions are bounded in time (`lorary.files.bounded_regex`): `expression_problems` first asks those of a plan
about every name, within two seconds together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache

from lorary.errors import Diagnostic
from lorary.files.bounded_regex import Budget, Pattern

EXPRESSION = "re:"

# Text that makes sense as a regular expression and not as a glob.
_LOOKS_LIKE_EXPRESSION = re.compile(r"\.[*+?]|[\\()|^$+{}]")


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a path.

    >>> matches("q_proj", "layers.0.q_proj"), matches("layers.*.q_proj", "layers.0.q_proj")
    (True, True)
    >>> matches(r"re:layers\\.[01]\\..*", "layers.0.q_proj"), matches("re:q_proj", "layers.0.q_proj")
    (True, False)

    Raises:
        ValueError: a regular expression that `expression_problems` refuses.
    """
    if is_expression(pattern):
        return _fullmatch(pattern.removeprefix(EXPRESSION), name)
    if "*" in pattern or "?" in pattern:
        pattern = pattern.replace("[", "[[]")  # nothing but * and ? is special
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    return name == pattern or name.endswith(f".{pattern}")


@lru_cache(maxsize=16_384)
def _fullmatch(expression: str, name: str) -> bool:
    return Pattern(expression).fullmatch(name)


def is_expression(pattern: object) -> bool:
    """Whether a pattern is a regular expression."""
    return isinstance(pattern, str) and pattern.startswith(EXPRESSION)


def looks_like_expression(text: str) -> bool:
    """Whether text without `re:` can only be meant as a regular expression.

    >>> looks_like_expression(".*q_proj"), looks_like_expression("*.q_proj"), looks_like_expression("c_attn[q,v]")
    (True, False, False)
    """
    return not is_expression(text) and _LOOKS_LIKE_EXPRESSION.search(text) is not None


def expression_error(pattern: str) -> str:
    """Why a pattern is not a valid regular expression; empty if it is one, or of another kind."""
    try:
        if is_expression(pattern):
            Pattern(pattern.removeprefix(EXPRESSION))
    except ValueError as error:
        return str(error)
    return ""


def expression_problems(fields: Mapping[str, Iterable[object]], names: Collection[str]) -> list[Diagnostic]:
    """The regular expressions that are invalid, or take too long over these names.

    Args:
        fields: name of a field -> its patterns; those that are not regular expressions are left alone.
        names: every path that they will be asked about.
    """
    budget, problems = Budget(), []
    for field, patterns in fields.items():
        for pattern in filter(is_expression, patterns):
            try:
                expression = Pattern(str(pattern).removeprefix(EXPRESSION), budget)
                for name in names:
                    expression.fullmatch(name)
            except ValueError as error:
                what = str(error).replace("its patterns take", "takes")
                problems.append(Diagnostic(field, f"`{pattern}`: {what}"))
    return problems
