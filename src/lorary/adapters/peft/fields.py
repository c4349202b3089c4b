"""The fields of PEFT's `adapter_config.json`: checks of their values, and the fields common to all PEFT types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorary.adapters.wrapper_names import without_wrappers
from lorary.files.bounded_regex import Budget, Pattern, SuffixPattern
from lorary.files.strict_json import show
from lorary.spec.fields import AMOUNT, COUNT, FLAG, POSITIVE, one_of

_MOST_RANK = 2**16
_MOST_ALPHA = 1e6  # an adapter with a larger one is all noise
_MOST_ENTRIES = 20_000


class TolerableError(ValueError):
    """An odd value that PEFT accepts; `value` is the one that it computes with."""

    def __init__(self, message: str, value: object = None) -> None:
        super().__init__(message)
        self.value = value


@dataclass(frozen=True)
class Field:
    """A field of the configuration.

    Args:
        read: (value, budget) -> the value as lorary uses it, or a ValueError that says what is wrong; the budget bounds
            the work of all patterns of a file together.
        default: PEFT's default.
        nullable: whether null means the default.
    """

    read: Callable[[Any, Budget], Any]
    default: Any = None
    nullable: bool = False


def field(rule: dict[str, Any], default: Any = None, *, nullable: bool = False) -> Field:
    """A field with a rule as in `lorary.spec.fields`; a number is read as a float if the default is one."""

    def read(value: Any, budget: Budget) -> Any:
        if not rule["check"](value):
            raise ValueError(f"is {show(value)}; it takes {rule['expects']}")
        return float(value) if isinstance(default, float) else value

    return Field(read, default, nullable)


def unsupported(why: str) -> Field:
    """A field of an unsupported feature: only values that switch it off are accepted."""

    def read(value: Any, budget: Budget) -> None:
        if value not in (None, False, [], {}, 0):
            raise ValueError(f"is {show(value)}: {why}")

    return Field(read)


def unused(title: str, *off: object) -> Field:
    """A field that a PEFT type inherits and ignores: other values than `off` are tolerable."""

    def read(value: Any, budget: Budget) -> None:
        if not any(value == o and type(value) is type(o) for o in off):
            raise TolerableError(f"is {show(value)}, and PEFT's {title} computes without it")

    return Field(read)


RANK: dict[str, Any] = {
    "check": lambda value: COUNT["check"](value) and value <= _MOST_RANK,
    "expects": f"a whole number from 1 to {_MOST_RANK:,}",
}
ALPHA: dict[str, Any] = {
    "check": lambda value: POSITIVE["check"](value) and value <= _MOST_ALPHA,
    "expects": f"a positive number of at most {_MOST_ALPHA:,.0f}",
}
PROBABILITY: dict[str, Any] = {
    "check": lambda value: AMOUNT["check"](value) and value < 1,
    "expects": "a probability in [0, 1)",
}


def _typed(kind: type, expects: str) -> Field:
    return field({"check": lambda value: value is None or isinstance(value, kind), "expects": expects})


def _names_or_pattern(value: Any, budget: Budget) -> tuple[str, ...] | Pattern | None:
    if value is None:
        raise TolerableError("is null: nothing says which modules are adapted")
    if value == "all-linear":  # the tensors tell
        return None
    return Pattern(value, budget) if isinstance(value, str) else _names(value)


def _names(value: Any) -> tuple[str, ...]:
    names = _listed(value, lambda v: isinstance(v, str) and v != "", "names")
    return tuple(without_wrappers(name)[0] for name in names)


def _listed(value: Any, valid: Callable[[Any], bool], what: str) -> tuple[Any, ...]:
    if not isinstance(value, list) or not all(map(valid, value)):
        raise ValueError(f"is {show(value)}, not a list of {what}")
    _check_length(value)
    return tuple(value)


def _plain_names(value: Any, budget: Budget) -> tuple[str, ...]:
    names = _names([value] if isinstance(value, str) else value)
    not_plain = [n for n in names if not all(c.isalnum() or c in "_." for c in n)]
    if not_plain:  # PEFT reads them as regular expressions
        raise ValueError(f"{show(not_plain[0])} is not a plain module name")
    return names


def token_list(value: Any) -> tuple[int, ...]:
    """A list of token ids, in order."""
    return _listed(value, lambda v: type(v) is int and 0 <= v < 2**31, "token ids, which are whole numbers from 0")


def token_ids(value: Any, budget: Budget) -> tuple[int, ...]:
    """A list of token ids, each once."""
    ids = token_list(value)
    if twice := sorted({i for i in ids if ids.count(i) > 1} if len(set(ids)) < len(ids) else ()):
        raise ValueError(f"names token {twice[0]} twice")
    if not ids:
        raise ValueError("names no token")
    return ids


def tokens_by_name(value: Any, budget: Budget) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    """Token ids of the input embedding, or of each layer by its name; None for an empty object, which trains none."""
    if not isinstance(value, dict):
        return token_ids(value, budget) if value != [] else None
    return {name: token_ids(ids, budget) for name, ids in _items(value, "layers and token ids").items()} or None


def _layer_numbers(value: Any, budget: Budget) -> tuple[int, ...] | None:
    values = [value] if type(value) is int else value
    return _listed(values, lambda v: type(v) is int and v >= 0, "layer numbers") or None


def _check_length(value: list[Any] | dict[str, Any]) -> None:
    if len(value) > _MOST_ENTRIES:
        raise ValueError(f"has {len(value):,} entries, more than {_MOST_ENTRIES:,}")


def by_pattern(entry: Field) -> Field:
    """A field such as `rank_pattern` that maps patterns over the ends of paths to values; the first match counts."""

    def read(value: Any, budget: Budget) -> tuple[tuple[SuffixPattern, Any], ...]:
        pairs, wrong = [], []
        for key, item in _items(value, "patterns and values").items():
            try:
                pairs.append((SuffixPattern(key, budget), entry.read(item, budget)))
            except ValueError as error:
                wrong.append(f"{show(key)}: {error}")
        if wrong:
            raise ValueError("; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
        return tuple(pairs)

    return Field(read, (), nullable=True)


def masks(leaf: str) -> Field:
    """A field that maps names of tensors, each a module's path and `leaf`, to lists of true and false."""

    def read(value: Any, budget: Budget) -> dict[str, list[bool]]:
        found = _items(value, "names and masks")
        for name, mask in found.items():
            if not name.endswith(leaf) or not isinstance(mask, list) or not all(isinstance(m, bool) for m in mask):
                what = f"has {show(mask)} for {show(name)}"
                raise ValueError(f"{what}; an entry is a module's {leaf}, and true and false")
        return {name.removesuffix(leaf): mask for name, mask in found.items()}

    return Field(read, {}, nullable=True)


def _items(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"is {show(value)}, not an object of {what}")
    _check_length(value)
    return value


def _base(value: Any, budget: Budget) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        raise ValueError(f"is {show(value)}, not a name or path")
    return value


def bias(only: str) -> Field:
    """`bias`: the base biases in the file; `only` is the type's name for those of the adapted layers."""
    names = ("none", "all", only)
    return field(one_of(*names) | {"expects": f"one of {', '.join(names)}"}, "none")


SHARED: dict[str, Field] = {
    "target_modules": Field(_names_or_pattern),  # absent if the tensors alone tell
    "layers_to_transform": Field(_layer_numbers, nullable=True),
    "layers_pattern": Field(_plain_names, (), nullable=True),
    "modules_to_save": Field(_plain_names, (), nullable=True),
    "bias": bias("lora_only"),
    "fan_in_fan_out": field(FLAG, False),
    "base_model_name_or_path": Field(_base, "", nullable=True),
}
NAMES_OR_PATTERN = Field(_names_or_pattern)
EXCLUDE = Field(_names_or_pattern, (), nullable=True)
PARAMETERS = Field(lambda value, budget: _names(value), (), nullable=True)  # of linear layers and of fused experts

# Fields that matter only while training, or to other programs.
BOOK_KEEPING: dict[str, Field] = {
    **dict.fromkeys(("peft_type", "task_type", "revision", "peft_version", "megatron_core"), _typed(str, "a text")),
    **dict.fromkeys(("auto_mapping", "runtime_config", "loftq_config"), _typed(dict, "an object")),
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"), _typed(dict, "an object")),
    **dict.fromkeys(("inference_mode", "merge_weights"), _typed(bool, "true or false")),
    "qalora_group_size": _typed(int, "a whole number"),
}
