"""The token dimension of each module's input: a norm within attention may get heads before tokens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorary.model.reach.twin import MetaAnswers, random_numbers_kept, twin_of

_TOKENS = 61  # of the dry forward: no other dimension of a model has this size


def token_axes(model: nn.Module) -> Mapping[str, int | None]:
    """path -> the dimension of its first input along which the tokens lie, by a dry forward of one sequence.

    Args:
        model: a language model; it does not change.

    Returns:
        None for a module whose input has no such dimension, or not always the same. Modules that do not run are not
        there, and none is if the model does not run without values.
    """
    try:
        twin = twin_of(model)
        seen: dict[str, set[int | None]] = {}
        for path, module in twin.named_modules():
            _watch(module, seen.setdefault(path, set()))
        with random_numbers_kept(), warnings.catch_warnings(), torch.no_grad(), MetaAnswers(answer=1):
            warnings.simplefilter("ignore")
            twin.eval()(**_inputs(model))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # of the model's code, which was not made to run without values
        return {}
    return {path: found.pop() if len(found) == 1 else None for path, found in seen.items() if found}


def _inputs(model: Any) -> dict[str, Tensor]:
    ids = torch.empty(1, _TOKENS, dtype=torch.long, device="meta")
    decodes = getattr(model.config, "is_encoder_decoder", False)
    return {"input_ids": ids, "decoder_input_ids": ids} if decodes else {"input_ids": ids}


def _watch(module: nn.Module, seen: set[int | None]) -> None:
    def look(_: nn.Module, args: Any, kwargs: Any) -> None:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        shape = () if first is None else tuple(first.shape)
        seen.add(shape.index(_TOKENS) if shape.count(_TOKENS) == 1 else None)

    module.register_forward_pre_hook(look, with_kwargs=True)
