"""Strict JSON from untrusted files: bounded, without duplicate keys, NaN or infinities.

Python's `json` keeps the last of two equal keys, accepts `NaN` and `Infinity`, turns `1e999` into infinity, and raises
errors of its own for deep nesting and huge integers. Here each of these is a `ValueError` with a sentence.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from functools import partial
from typing import Any

_HARMLESS = re.compile(r"[A-Za-z0-9_.|\-]{1,200}")


def parse(data: bytes, limit: int) -> Any:
    """The value of a JSON document in UTF-8.

    Args:
        data: the file's bytes.
        limit: the largest accepted number of bytes.

    Raises:
        ValueError: the bytes are too many, not UTF-8, not JSON, too deeply nested, name a key twice, or hold
            a number that is not finite.
    """
    if len(data) > limit:
        raise ValueError(f"{len(data):,} bytes of JSON, more than the {limit:,} that are accepted")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None
    return loads(text)


def loads(text: str, most_digits: int = 20) -> Any:
    """The value of a JSON document, with the same strictness.

    Args:
        text: the document.
        most_digits: the largest accepted number of digits of an integer.

    Raises:
        ValueError: as for `parse`.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=partial(_integer, most_digits=most_digits),
        )
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise ValueError(f"not JSON: {error.msg.lower()} ({line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record with None for NaN and infinities, which JSON lacks."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def show(name: object, most: int = 96) -> str:
    """A name from an untrusted file, made safe for a message: quoted, escaped, cut.

    Control characters, escape sequences and marks that reverse the reading direction never reach a terminal.

    >>> show("a\\x1b[31m")
    "'a\\\\x1b[31m'"
    """
    text = name if isinstance(name, str) else json.dumps(name, default=str)
    cut = text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"
    quoted = repr(cut) if isinstance(name, str) else cut
    return "".join(c if unicodedata.category(c)[0] != "C" else f"\\u{ord(c):04x}" for c in quoted)


def named(name: str) -> str:
    """A tensor's or field's name at the head of a message: bare if harmless, else as in `show`.

    >>> named("layers.0.q_proj.lora_A.weight"), named("a b")
    ('layers.0.q_proj.lora_A.weight', "'a b'")
    """
    return name if _HARMLESS.fullmatch(name) else show(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {show(twice)} appears twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {show(digits)} is too large for a float")
    return value


def _integer(digits: str, most_digits: int) -> int:
    if len(digits) > most_digits:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)
