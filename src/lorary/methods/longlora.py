"""LongLoRA: W' = W + s B A at q, k, v and o, with embeddings and norms in full, RoPE scaling and shifted attention.

The token embeddings and all normalisations train in full. Positions are divided by ceil(length / original context). In
training only, a token attends within its group of a quarter of the tokens, and the groups of half of the heads are
shifted by half a group (`lorary.kernels.shifted_attention`). Afterwards attention is full.

Chen et al. 2023, arXiv:2309.12307, section 3; the factor and the group size from the actual length are those of the
authors' code.

Differs from the paper: yarn and dynamic RoPE scaling are available besides position interpolation. Differs from the
authors' code: no group wraps around the end of a sequence, so that no token sees the future; padding and packed
sequences have groups of their own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any, Self

from torch import nn

from lorary.layers import rope
from lorary.layers.shifted_attention import TrainingOnlyAttention, check_support
from lorary.spec.context import Context, ContextPatch
from lorary.spec.fields import COUNT, FLAG, POSITIVE, one_of, optional
from lorary.spec.interfaces import component
from lorary.spec.presets import Restriction, preset


@component
class LongContext(Context):
    """A context of `length` tokens by RoPE scaling, with shifted sparse attention in training.

    Args:
        length: the context length in tokens; a plan refuses None, since no default fits every model.
        rope: the RoPE scaling: linear, yarn or dynamic.
        shifted: shifted sparse attention in training; False: full attention.
        groups: the number of groups in the longest sequence of a batch.
        factor: the RoPE scaling factor; a plan derives it from the model.
        known: the base's original context in tokens, likewise.
    """

    length: int | None = field(default=None, metadata=optional(COUNT))
    rope: str = field(default="linear", metadata=one_of(*rope.FORMS))
    shifted: bool = field(default=True, metadata=FLAG)
    groups: int = field(default=4, metadata=COUNT)
    factor: float | None = field(default=None, metadata=optional(POSITIVE))
    known: int | None = field(default=None, metadata=optional(COUNT))

    targets = ("attention",)

    @property
    def attention_groups(self) -> int:
        return self.groups if self.shifted else 0

    @property
    def config_overrides(self) -> dict[str, Any]:
        return rope.rope_overrides(self.rope, self.factor or 1.0, self.known or 0)

    def planned(self, model: nn.Module) -> Self:
        if self.length is None or self.factor is not None:
            return self
        config = rope.text_config(model)
        return dataclasses.replace(
            self, factor=rope.scaling_factor(config, self.length), known=rope.original_context(config)
        )

    def problems(self, model: nn.Module) -> list[tuple[str, str]]:
        if self.length is None:
            return [("the context length is missing", "set length=32768, or another number of tokens")]
        found = [(what, "") for what in rope.scaling_problems(model, self.rope, self.length)]
        if not found:
            found = [(what, "use the base that it was trained on") for what in self._model_mismatches(model)]
        if self.shifted and self.groups > self.length:
            found.append((f"divides {self.length:,} tokens into {self.groups:,} groups", "set groups=4"))
        if self.shifted:
            fix = "set shifted=False to train with full attention"
            found += [(what, fix) for what in check_support(model, rope.text_config(model), self.length).problems]
        return found

    def _model_mismatches(self, model: nn.Module) -> list[str]:
        """The reasons why this was not planned for this model."""
        config = rope.text_config(model)
        here, known = rope.scaling_factor(config, self.length or 0), rope.original_context(config)
        if self.factor is None:
            return ["the RoPE scaling factor is missing"]
        if here != self.factor:
            return [f"divides positions by {self.factor:g}; for {self.length:,} tokens this model needs {here:g}"]
        if self.factor != 1 and self.rope != "linear" and known != self.known:  # yarn and dynamic use it
            return [f"is for a model of {self.known or 0:,} positions; this one has {known or 0:,}"]
        return []

    def notes(self, model: nn.Module) -> list[str]:
        config, length = rope.text_config(model), self.length or 0
        known = rope.max_context(config)
        notes = [f"reads {length:,} tokens instead of {known:,}: positions divided by {self.factor:g} ({self.rope})"]
        if self.factor == 1:
            notes = [f"the base reads {known:,} tokens: for {length:,} its positions stay as they are"]
        if rope.rope_type(config) in ("linear", "dynamic"):  # some configurations count the factor in already
            notes.append(f"the base divides positions as it is: {known:,} is max_position_embeddings times its factor")
        if self.shifted:
            share = f"1/{self.groups} of the longest sequence in a batch"
            notes.append(f"attends in groups of {share} while it trains, and in full afterwards")
            notes += check_support(model, config, length).notes
        return notes

    def apply(self, model: nn.Module) -> ContextPatch:
        return _LongContextPatch(model, self)


class _LongContextPatch:
    """The reversible change of a model to a longer context."""

    def __init__(self, model: nn.Module, context: LongContext) -> None:
        factor = context.factor or 1.0
        rope.own_config_copy(model)
        self.attention = (
            TrainingOnlyAttention(model, rope.text_config(model), context.groups) if context.shifted else None
        )
        try:
            self.scaled_rope = rope.ScaledRope(model, context.rope, factor) if factor > 1 else None
        except BaseException:
            self.make_permanent()
            raise

    def revert(self) -> None:
        self.make_permanent()
        if self.scaled_rope:
            self.scaled_rope.swap()

    def restore(self) -> None:
        if self.scaled_rope:
            self.scaled_rope.swap()
        self.reapply()

    def make_permanent(self) -> None:
        if self.attention:
            self.attention.remove()

    def reapply(self) -> None:
        if self.attention:
            self.attention.install()


@preset(
    "longlora",
    citation="Chen et al. 2023, arXiv:2309.12307",
    lr=2e-5,
    when="For a context longer than the model's own, at a fraction of the cost of full attention in training.",
    answers={"context=long": {"length": 8192}},
    restrictions={
        "o-lora": Restriction(
            "for the last task only: trained embeddings and norms cannot stay under a later task", advised=False
        )
    },
)
def longlora(length: int | None = None, rope: str = "linear", shifted: bool = True, groups: int = 4) -> dict[str, Any]:
    """W' = W + s B A at q, k, v, o; embeddings and norms train; attention in groups of L/4

    Args:
        length: the context length in tokens; required.
        rope: the RoPE scaling: linear, yarn or dynamic.
        shifted: shifted sparse attention in training; False: full attention.
        groups: the number of groups in the longest sequence of a batch.
    """
    return {"context": LongContext(length, rope, shifted, groups), "full": ("embeddings", "norms")}
