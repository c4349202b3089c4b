"""The settings of a base's configuration that its function depends on, for the fingerprint.

Two models of one class with the same weights may still be different functions: another RoPE base, activation, epsilon,
number of heads or attention window. All settings are compared except those that cannot change an output for given
weights, so a setting that only a later architecture has is compared without a change here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Names and file formats; outputs, caches and losses; training and initialisation; token ids, which change with the
# tokenizer; `max_position_embeddings`, a limit for callers (RoPE's own settings and the shapes say the rest);
# `tie_word_embeddings`, since the weights show whether the head differs from the embedding.
_IRRELEVANT = re.compile(
    r"_.*|architectures|auto_map|model_type|name_or_path|transformers_version|(torch_)?dtype|quantization_config"
    r"|lorary_base|output_.*|return_dict|use_(return_dict|cache|bfloat16|.*kernels?)|torchscript|.*_implementation"
    r"|cache_.*|chunk_size_feed_forward|gradient_checkpointing|pretraining_tp|.*loss.*|.*_coef|.*_noise"
    r"|.*drop.*|init_.*|.*initiali[sz].*|tie_.*|max_position_embeddings"
    r"|.*_token_ids?|id2label|label2id|num_labels|problem_type|task_specific_params|finetuning_task|tokenizer_class|prefix"
)
_SCALARS = (str, int, float, bool, type(None))


def function_settings(model: object) -> dict[str, Any]:
    """Dotted name -> value of each such setting of a Transformers model; empty for other models."""
    config = getattr(model, "config", None)
    if not any(cls.__module__.startswith("transformers.") for cls in type(config).__mro__):
        return {}
    return dict(sorted(_flat(config.to_dict(), "").items()))  # type: ignore[union-attr]


def are_settings(found: object) -> bool:
    """Whether a value from a file is what `function_settings` returns."""
    return isinstance(found, dict) and all(isinstance(k, str) and _is_plain(v) for k, v in found.items())


def _flat(settings: Mapping[Any, Any], place: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if not isinstance(key, str) or _IRRELEVANT.fullmatch(key):
            continue
        value = list(value) if isinstance(value, tuple) else value
        if isinstance(value, Mapping):
            found |= _flat(value, f"{place}{key}.")
        elif _is_plain(value):
            found[f"{place}{key}"] = value
    return found


def _is_plain(value: object) -> bool:
    return isinstance(value, _SCALARS) or (isinstance(value, list) and all(isinstance(v, _SCALARS) for v in value))
