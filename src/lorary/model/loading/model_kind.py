"""The kind of a model, and the class that it was saved with, by its own configuration alone."""

from __future__ import annotations

import copy
from typing import Any

from lorary.model.loading.source import ModelClass

PAGE = "docs/how-to/in-your-own-trainer.md"
ELSEWHERE = f"train it in your own trainer: {PAGE}"


def kind_of_model(config: Any) -> str:
    """decoder, encoder, classifier, seq2seq, or other, by a model's own configuration."""
    name, own = architecture(config), str(config.model_type)
    if name in classes("SEQUENCE_CLASSIFICATION"):
        return "classifier"
    if name in classes("CAUSAL_LM") or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return "decoder"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if own in table("MASKED_LM") and not getattr(config, "is_decoder", False):
        return "encoder"
    if own not in _known_types():  # registered by the user's own code
        return "decoder"
    return "decoder" if own in table("CAUSAL_LM") and "For" not in name else "other"


def architecture(config: Any) -> str:
    """The class that a model was saved with; empty if its configuration does not say."""
    return str((getattr(config, "architectures", None) or [""])[0])


def described(config: Any) -> str:
    """The class of a model, or its type if its configuration names no class."""
    return architecture(config) or f"a model of type `{config.model_type}`"


def why_not_causal(config: Any) -> tuple[str, str] | None:
    """Why a model is not a causal language model, and what trains it; None if it is one."""
    kind, name = kind_of_model(config), described(config)
    if kind == "decoder":
        return None
    if kind == "classifier":
        task = "reward" if getattr(config, "num_labels", 2) == 1 else "classification"
        return f"{name} is a sequence classifier: it has no next-token head", f"task: {task} trains it"
    if kind == "encoder":
        what = f"{name} is an encoder: it has no next-token head"
        return what, f"task: classification trains it; for anything else see {PAGE}"
    if kind == "seq2seq":
        return f"{name} is an encoder-decoder, which no task of `lorary train` trains", ELSEWHERE
    return f"{name} is not a causal language model", ELSEWHERE


def own_class(config: Any) -> ModelClass:
    """The class that a model was saved with, with its own head."""
    import transformers

    name, config = architecture(config), with_padding(config)
    found = getattr(transformers, name, None) if name else None
    if not isinstance(found, type):
        found = transformers.AutoModelForCausalLM if kind_of_model(config) == "decoder" else transformers.AutoModel
    return ModelClass(found, config)


def with_padding(config: Any, token: int | None = None) -> Any:
    """A copy that names a padding token, if it is of a text model: decoders that classify find the last token by it.

    Args:
        config: of a model.
        token: of the tokenizer; None for the end of text.
    """
    changed = copy.deepcopy(config)
    for part in {id(c): c for c in (changed, changed.get_text_config())}.values():
        if hasattr(part, "vocab_size") and getattr(part, "pad_token_id", None) is None:
            end = getattr(part, "eos_token_id", None)
            part.pad_token_id = token if token is not None else end if isinstance(end, int) else 0
    return changed


def set_padding(model: Any, token: int | None) -> None:
    """Let a decoder that classifies find the last token of a row by the token that its tokenizer pads with.

    Training does so, in Transformers' `align_special_tokens`; the configuration of a base may name another token.

    Args:
        model: of Transformers.
        token: of the tokenizer; None if it has none.
    """
    if token is not None:
        model.config.get_text_config().pad_token_id = token


def table(task: str) -> dict[str, Any]:
    """model_type -> class of Transformers' table for a task."""
    from lorary.layers.transformers_internals import modeling_auto

    return dict(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"))


def classes(task: str) -> set[str]:
    """The classes of that table."""
    found = table(task).values()
    return {name for entry in found for name in ((entry,) if isinstance(entry, str) else entry)}


def _known_types() -> set[str]:
    from lorary.layers.transformers_internals import modeling_auto

    return set(modeling_auto.CONFIG_MAPPING_NAMES)
