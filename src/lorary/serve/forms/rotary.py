"""The RoPE scaling of an adapter, for its own rows of a mixed batch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorary.errors import Diagnostic
from lorary.layers import rope
from lorary.methods.alora import InvocationContext
from lorary.methods.longlora import LongContext
from lorary.spec.context import Context


def scaled_rotary(
    base: nn.Module, context: Context | None
) -> tuple[Mapping[str, nn.Module], int | None, list[Diagnostic]]:
    """The rotary embeddings with an adapter's RoPE scaling, by path; its context in tokens; and why it has none.

    Args:
        base: the base, which the context fits; it is not changed.
        context: of the adapter's method; None for the base's own.
    """
    if context is None:
        return {}, None, []
    if context.taken:
        what = f"{context.taken:,} keys and values stand before the text, and a batch cannot add them to some rows only"
        fix = "use it alone: lorary generate, chat and eval compute it without the serving engine"
        return {}, None, [Diagnostic("context", what, fix)]
    if isinstance(context, InvocationContext):
        what = "acts from an invocation on, and a batch cannot add it to a part of a row only"
        fix = "use it alone: lorary generate, chat and eval compute it without the serving engine"
        return {}, None, [Diagnostic("context", what, fix)]
    if type(context) is not LongContext:
        what = f"{type(context).__name__} changes more than RoPE scaling, and other rows of the batch with it"
        return {}, None, [Diagnostic("context", what, "merge it into a copy of the base, and serve that")]
    factor = context.factor or 1.0
    if factor == 1:
        return {}, None, []
    if context.rope == "dynamic":
        what = "dynamic RoPE scaling depends on the length of the input so far, so that rows cannot share a batch"
        return {}, None, [Diagnostic("context", what, "train it with rope='linear' or 'yarn'")]
    known = rope.original_context(rope.text_config(base)) or 0
    return rope.scaled_modules(base, context.rope, factor), int(known * factor), []
