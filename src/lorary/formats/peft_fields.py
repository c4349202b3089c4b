"""The single fields of PEFT's configurations: which are understood, and how each value is checked.

A reader takes a field's value from the JSON and returns it as lorary keeps it, or says in a `ValueError` what is
wrong with it; the caller adds where.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lorary.formats.bounded_regex import Budget, Pattern, TailPattern
from lorary.formats.strict_json import show

MOST_RANK = 2**16
_MOST_ENTRIES = 20_000
_MASK = ".lora_E"


class TolerableError(ValueError):
    """A value that PEFT computes with, however odd."""

    def __init__(self, message: str, value: object) -> None:
        super().__init__(message)
        self.value = value


def _rank(value: object) -> int:
    if type(value) is not int or not 1 <= value <= MOST_RANK:
        raise ValueError(f"is {show(value)}; a rank is a whole number from 1 to {MOST_RANK:,}")
    return value


def _alpha(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"is {show(value)}; alpha is a positive number")
    if value > 1e6:
        raise ValueError(f"is {show(value)}; an alpha above a million makes an adapter that is all noise")
    return float(value)


def _probability(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"is {show(value)}; a probability lies in [0, 1)")
    return float(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"is {show(value)}, neither true nor false")
    return value


def _seed(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"is {show(value)}; a seed is a whole number from 0 to 2^63 - 1")
    return value


def _start(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"is {show(value)}; d starts at a positive number")
    return float(value)


def _count(least: int) -> Callable[[object], int]:
    def reader(value: object) -> int:
        if type(value) is not int or not least <= value < 2**63:
            raise ValueError(f"is {show(value)}, no whole number of at least {least}")
        return value

    return reader


def _share(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"is {show(value)}; it lies between 0 and 1")
    return float(value)


def _amount(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"is {show(value)}, no finite number of at least 0")
    return float(value)


def _masks(value: object) -> dict[str, list[bool]]:
    """AdaLoRA's: site -> for every direction at the start whether it is left."""
    if not isinstance(value, dict) or len(value) > _MOST_ENTRIES:
        raise ValueError(f"is {show(value)}, not an object of names and masks")
    for name, mask in value.items():
        if not name.endswith(_MASK) or not isinstance(mask, list) or not all(isinstance(m, bool) for m in mask):
            raise ValueError(f"has {show(mask)} for {show(name)}; an entry is a module's {_MASK}, and true and false")
    return {name.removesuffix(_MASK): mask for name, mask in value.items()}


def _unused(*off: object) -> Callable[[object], None]:
    """A field of LoRA's that AdaLoRA has inherited and does not look at."""

    def reader(value: object) -> None:
        if not any(value == o and type(value) is type(o) for o in off):
            raise TolerableError(f"is {show(value)}, and PEFT's AdaLoRA computes without it", None)

    return reader


def _no_magnitudes(value: object) -> None:
    if value not in (None, False):
        raise ValueError(f"is {show(value)}, and PEFT's AdaLoRA has no magnitudes")


def _names_or_pattern(budget: Budget) -> Callable[[object], tuple[str, ...] | Pattern | None]:
    def reader(value: object) -> tuple[str, ...] | Pattern | None:
        if value is None:
            raise TolerableError("is null: nothing says which modules are adapted", None)
        return Pattern(value, budget) if isinstance(value, str) else _list_of_names(value)

    return reader


def _list_of_names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"is {show(value)}, not a list of names")
    if len(value) > _MOST_ENTRIES:
        raise ValueError(f"has {len(value):,} entries, more than {_MOST_ENTRIES:,}")
    return tuple(value)


def _plain_names(value: object) -> tuple[str, ...]:
    names = _list_of_names([value] if isinstance(value, str) else value)
    strange = [n for n in names if not all(c.isalnum() or c in "_." for c in n)]
    if strange:  # PEFT reads them as regular expressions
        raise ValueError(f"{show(strange[0])} is no plain module name")
    return names


def _numbers(value: object) -> tuple[int, ...] | None:
    values = [value] if type(value) is int else value
    if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
        raise ValueError(f"is {show(value)}, not a list of layer numbers")
    if len(values) > _MOST_ENTRIES:
        raise ValueError(f"has {len(values):,} entries, more than {_MOST_ENTRIES:,}")
    return tuple(values) or None


def _patterns(read: Callable[[object], Any], budget: Budget) -> Callable[[object], tuple[tuple[TailPattern, Any], ...]]:
    def reader(value: object) -> tuple[tuple[TailPattern, Any], ...]:
        if not isinstance(value, dict):
            raise ValueError(f"is {show(value)}, not an object of patterns and values")
        if len(value) > _MOST_ENTRIES:
            raise ValueError(f"has {len(value):,} entries, more than {_MOST_ENTRIES:,}")
        pairs, wrong = [], []
        for key, entry in value.items():
            try:
                pairs.append((TailPattern(key, budget), read(entry)))
            except ValueError as error:
                wrong.append(f"{show(key)}: {error}")
        if wrong:
            raise ValueError("; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
        return tuple(pairs)

    return reader


def _one_of(*words: str) -> Callable[[object], str]:
    def reader(value: object) -> str:
        if value not in words:
            raise ValueError(f"is {show(value)}; it is one of {', '.join(words)}")
        return str(value)

    return reader


def _base(value: object) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        raise ValueError(f"is {show(value)}, not a name or path")
    return value


def _init(value: object) -> None:
    word = value.lower() if isinstance(value, str) else value
    if isinstance(word, bool | None) or word in ("gaussian", "eva", "orthogonal"):
        return
    if isinstance(word, str) and word.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ValueError(
            f"is {show(value)}: these factors belong to a base that PEFT changes while loading; let PEFT convert the "
            "adapter (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    raise ValueError(f"is {show(value)}, an initialisation that lorary does not know")


def understood(kind: str, budget: Budget) -> dict[str, tuple[str, Callable[[object], Any]]]:
    """PEFT's field -> (the name of ours, its reader); a field with no name of ours is only checked.

    Args:
        kind: PEFT's type of adapter, `LORA`, `ADALORA` or `VERA`.
        budget: the work that all patterns of the file may take together.
    """
    shared = {
        "r": ("r", _rank),
        "target_modules": ("targets", _names_or_pattern(budget)),
        "layers_to_transform": ("layers", _numbers),
        "layers_pattern": ("layers_pattern", _plain_names),
        "modules_to_save": ("modules_to_save", _plain_names),
        "bias": ("bias", _one_of("none", "all", "vera_only" if kind == "VERA" else "lora_only")),
        "fan_in_fan_out": ("transposed", _flag),
        "base_model_name_or_path": ("base", _base),
    }
    own: dict[str, dict[str, tuple[str, Callable[[object], Any]]]] = {
        "LORA": {
            "lora_alpha": ("alpha", _alpha),
            "lora_dropout": ("dropout", _probability),
            "use_rslora": ("rslora", _flag),
            "use_dora": ("dora", _flag),
            "exclude_modules": ("exclude", _names_or_pattern(budget)),
            "rank_pattern": ("ranks", _patterns(_rank, budget)),
            "alpha_pattern": ("alphas", _patterns(_alpha, budget)),
            "init_lora_weights": ("", _init),
        },
        "ADALORA": {
            "r": ("", _rank),  # it is LoRA's; `init_r` is meant
            "init_r": ("r", _rank),
            "lora_alpha": ("alpha", _alpha),
            "lora_dropout": ("dropout", _probability),
            "exclude_modules": ("exclude", _names_or_pattern(budget)),
            "rank_pattern": ("masks", _masks),
            "target_r": ("target", _rank),
            "tinit": ("first", _count(0)),
            "tfinal": ("final", _count(0)),
            "deltaT": ("every", _count(1)),
            "beta1": ("beta1", _share),
            "beta2": ("beta2", _share),
            "orth_reg_weight": ("orthogonality", _amount),
            "total_step": ("", _count(1)),
            "use_rslora": ("", _unused(False)),
            "use_dora": ("", _no_magnitudes),
            "alpha_pattern": ("", _unused({}, None)),
            "init_lora_weights": ("", _unused(True, False, None)),
        },
        "VERA": {
            "vera_dropout": ("dropout", _probability),
            "projection_prng_key": ("seed", _seed),
            "save_projection": ("saved", _flag),
            "d_initial": ("start", _start),
            "init_weights": ("", _flag),
        },
    }
    return shared | own[kind]


# What may be null: not said. (`target_modules` may be absent, where the tensors alone say it.)
NULLABLE = {
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "base_model_name_or_path",
    "use_dora",
}

# What changes the adapter's function, and is off in a file that can be read.
UNSUPPORTED = {
    "enable_lora": "adapters on parts of a fused weight (files of 2023) are not supported",
    "use_qalora": "QA-LoRA pools its input, which is not supported",
    "use_bdlora": "block-diagonal factors are not supported",
    "lora_bias": "biases beside B are not supported",
    "target_parameters": "adapters on bare parameters (fused experts) are not supported",
    "trainable_token_indices": "rows of an embedding trained apart are not supported",
    "layer_replication": "a model with repeated layers is not supported",
    "alora_invocation_tokens": "adapters that start at a token (aLoRA) are not supported",
    "ensure_weight_tying": "adapters tied between two layers are not supported",
    "arrow_config": "routing between adapters (Arrow) is not supported",
    "kasa_config": "KaSA changes the base weight, which is not supported",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "megatron_config": "Megatron's layers are not supported",
}

# What only matters while training, or to somebody else.
BOOK_KEEPING: dict[str, tuple[type, ...]] = {
    "peft_type": (str,),
    "task_type": (str,),
    "auto_mapping": (dict,),
    "revision": (str,),
    "peft_version": (str,),
    "inference_mode": (bool,),
    "merge_weights": (bool,),
    "megatron_core": (str,),
    "qalora_group_size": (int,),
    "runtime_config": (dict,),
    "loftq_config": (dict,),
    "eva_config": (dict,),
    "corda_config": (dict,),
    "lora_ga_config": (dict,),
}


def spelled(types: tuple[type, ...]) -> str:
    """A JSON type in words."""
    return {str: "a text", dict: "an object", bool: "true or false", int: "a whole number"}[types[0]]
