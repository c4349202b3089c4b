"""aLoRA: y_t = W x_t + b + s B A x_t from the invocation on, y_t = W x_t + b before it.

A sequence of tokens in the text invokes the adapter, which acts only on the tokens from its last occurrence on. The
keys and values of everything before it are the base's, so the cache of a conversation serves the base and any number of
such adapters.

Greenewald et al. 2025, arXiv:2504.12397, section 3. The paper adapts q, k and v, at rank 32: it needs a higher rank
than LoRA, as the keys and values before the invocation cannot adapt.

A text without the invocation is the base's. A text that is generated stays as its prompt was: an invocation counts
where one forward pass reads all of it. Padding is not part of a text, and of packed texts each has its own invocation.

Differs from PEFT: padding that looks like the invocation is not one; packed texts; a cache that goes from one forward
pass to the next by hand stays active; gradient checkpointing allows several forward passes before a backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, MethodError
from lorary.layers.invocation import InvocationFinder, active_positions, blocks, support_problems
from lorary.spec.context import Context, ContextPatch
from lorary.spec.fields import IDS, TEXT
from lorary.spec.interfaces import Join, Layer, component
from lorary.spec.method import Method
from lorary.spec.presets import preset
from lorary.spec.site import Site


@component
class FromInvocation(Join):
    """W x + b, and from the invocation on s B A x as well."""

    adds_apart = True
    needs_context = True
    acts_everywhere = False
    why_not_merged = "acts on the tokens from the invocation on alone, which no weight and bias can"

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        y = layer.run_base(x)
        return torch.where(active_positions(x, layer.site.name), layer.add_delta(y.clone(), x), y)


@component
class InvocationContext(Context):
    """The sequence of tokens from whose last occurrence in a text on the adapter acts.

    Args:
        tokens: their ids.
        text: the text whose tokens they are, as the user wrote it.
    """

    tokens: tuple[int, ...] = field(default=(), metadata=IDS)
    text: str = field(default="", metadata=TEXT)

    targets = ("all-linear",)

    def problems(self, model: nn.Module) -> list[tuple[str, str]]:
        if not self.tokens and not self.text:
            fix = "set the option `invocation` (method.options.invocation): a text, or token ids"
            return [("has no invocation, from which on it could act", fix)]
        return list(support_problems(model, self.tokens))

    def site_problems(self, model: nn.Module, sites: Iterable[tuple[Site, Join]]) -> list[tuple[str, str]]:
        own = [site for site, join in sites if isinstance(join, FromInvocation)]
        if not own:
            return [("has an invocation, and no adapter that waits for it", "name the preset: alora")]
        inside, found = tuple(f"{path}." for path in blocks(model)), []
        for site in own:
            if site.kind not in ("linear", "transposed"):
                found.append((f"{site.name} is of kind {site.kind}: aLoRA adapts linear layers", "leave it out"))
            elif not site.name.startswith(inside):
                what = f"{site.name} is outside of the model's blocks, where positions are not those of the text"
                found.append((what, "leave it out"))
            elif "experts" in site.name.split("."):
                what = f"{site.name} is an expert: it sees some of the tokens, in another order"
                found.append((what, "leave it out"))
        return found

    def notes(self, model: nn.Module) -> list[str]:
        shown = repr(self.text) if self.text else ", ".join(map(str, self.tokens))
        return [f"acts from the last {shown} of a text on; before it, and in texts without it, this is the base"]

    def apply(self, model: nn.Module) -> ContextPatch:
        if not self.tokens:
            what = f"is a text, {self.text!r}, whose token ids are missing"
            fix = "lorary.with_invocation(method, tokenizer) adds them"
            raise MethodError("cannot look for an invocation:", [Diagnostic("invocation", what, fix)])
        return InvocationFinder(model, self.tokens)


def with_invocation(method: Method, tokenizer: Any) -> Method:
    """A method that is invoked by a text, with the ids of the text's tokens.

    Args:
        method: any method; one without such a text is returned as it is.
        tokenizer: the model's.

    Raises:
        MethodError: the text has no tokens.

    Example:
        >>> method = lorary.method("alora", invocation="<|start_of_role|>certainty<|end_of_role|>")
        >>> method = lorary.with_invocation(method, tokenizer)
    """
    context = method.context
    if not isinstance(context, InvocationContext) or context.tokens:
        return method
    ids = tuple(map(int, tokenizer(context.text, add_special_tokens=False)["input_ids"]))
    if not ids:
        what = f"is {context.text!r}, which has no tokens"
        raise MethodError("cannot look for an invocation:", [Diagnostic("invocation", what, "write another text")])
    return method.replace(context=dataclasses.replace(context, tokens=ids))


def invocation_of(method: Method) -> tuple[int, ...]:
    """The tokens of a method's invocation; none for other methods."""
    return method.context.tokens if isinstance(method.context, InvocationContext) else ()


@preset(
    "alora",
    aliases=("activated-lora",),
    citation="Greenewald et al. 2025, arXiv:2504.12397",
    when="For many small tasks in the middle of a conversation: the base's cache is used up to the invocation.",
    example={"invocation": (17, 5)},
)
def alora(invocation: str | Sequence[int] = "") -> dict[str, Any]:
    """y_t = W x_t + b + (alpha / r) B A x_t from the last invocation on, W x_t + b before it

    Args:
        invocation: the text, or its token ids, from which on the adapter acts.
    """
    if isinstance(invocation, str):
        return {"join": FromInvocation(), "context": InvocationContext((), invocation)}
    ids: Any = tuple(invocation) if isinstance(invocation, Sequence) else ()
    if not IDS["check"](ids) or not ids:
        what = f"is {invocation!r}; it takes a text, or token ids"
        raise MethodError("invalid method:", [Diagnostic("invocation", what)])
    return {"join": FromInvocation(), "context": InvocationContext(ids)}
