"""Prompt tuning: X' = [P; E(x)], where only P [l, d] trains.

l trained embeddings stand before those of the text, at the input alone. Every layer computes their keys and values as
it does a token's; text begins at position l.

Lester et al. 2021, arXiv:2104.08691, section 2. Of the starts in section 2.1, P is drawn uniformly, or from the
embeddings of the 5,000 most common tokens (the first ids of a vocabulary that is sorted by frequency), or is the
embeddings of a text, repeated or cut to l tokens.

The learning rate is the paper's 0.3, about a thousand times that of other methods: Adam moves every number by about
the rate, whatever its gradient, and embeddings have to go far.

Differs from the authors' code: in a causal model nothing before the text depends on it, so P passes through the layers
once for a whole batch, and its keys and values stand before the text's (`lorary.layers.prepended`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, MethodError
from lorary.layers.prepended import (
    PrependedKeysValues,
    Source,
    keys_values_of,
    support_problems,
    token_embedding,
    tokens_in,
)
from lorary.methods.lora import ConstantScale
from lorary.methods.prefix_tuning import STANDS_BEFORE, context_notes, token_problems
from lorary.spec.context import Context, ContextPatch
from lorary.spec.fields import COUNT, IDS, TEXT, one_of
from lorary.spec.interfaces import Join, Layer, Shapes, component
from lorary.spec.method import Method
from lorary.spec.no_update import NoInit, NoUpdate
from lorary.spec.presets import preset
from lorary.spec.site import Site

_KEPT = "_lorary_prompt"  # the attribute of a cache that holds the keys and values of its prompt


@component
class Prompt(Join):
    """P [tokens, d] at the token embedding, which is unchanged: the model reads P before the text.

    Args:
        tokens: the number of trained embeddings, l.
        start: `vocabulary`: embeddings drawn from those of the `common` first tokens; `uniform`: U(-0.5, 0.5);
            `text`: the embeddings of the tokens `ids`.
        text: the text whose tokens are `ids`, as the user wrote it.
        ids: token ids, repeated or cut to the number of embeddings.
        common: how many tokens count as the most common ones.
    """

    tokens: int = field(default=20, metadata=COUNT)
    start: str = field(default="vocabulary", metadata=one_of("vocabulary", "uniform", "text"))
    text: str = field(default="", metadata=TEXT)
    ids: tuple[int, ...] = field(default=(), metadata=IDS)
    common: int = field(default=5000, metadata=COUNT)

    roles = frozenset({"P"})
    targets = ("embedding",)
    supports_dropout = False
    adds_delta = False
    needs_context = True
    why_not_merged = STANDS_BEFORE
    exact_start = False

    def shapes(self, site: Site) -> Shapes:
        return {"P": (self.tokens, site.out_features)}

    def setup(self, layer: Layer, generator: torch.Generator) -> None:
        P = layer.params["P"]
        if P.is_meta:
            return
        if self.start == "text" and not self.ids:
            what = f"the start of the prompt is a text, {self.text!r}, whose token ids are missing"
            fix = "lorary.with_prompt_text(method, tokenizer) adds them"
            raise MethodError("cannot start a prompt:", [Diagnostic("init_text", what, fix)])
        if self.start == "uniform":
            P.copy_(nn.init.uniform_(torch.empty(P.shape), -0.5, 0.5, generator=generator))
        else:
            ids = self._ids(layer.site.in_features, generator)
            P.copy_(layer.base(ids.to(layer.matrix.device)))

    def _ids(self, vocabulary: int, generator: torch.Generator) -> Tensor:
        """[tokens] the tokens whose embeddings P starts at; drawn without repetition as long as there are others."""
        if self.start == "text":
            return torch.tensor(self.ids).repeat(-(-self.tokens // len(self.ids)))[: self.tokens]
        common = min(self.common, vocabulary)
        drawn = [torch.randperm(common, generator=generator) for _ in range(-(-self.tokens // common))]
        return torch.cat(drawn)[: self.tokens]

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        return layer.run_base(x)

    def problems(self, site: Site) -> list[str]:
        if site.kind != "embedding":
            return ["is not the token embedding, before which a prompt could stand"]
        outside = [i for i in self.ids if i >= site.in_features]
        return [f"token {i} of the text is not in its vocabulary of {site.in_features:,}" for i in outside[:1]]


@component
class PromptContext(Context):
    """Trained embeddings before the text's.

    Args:
        tokens: their number, l.
    """

    tokens: int = field(default=20, metadata=COUNT)

    @property
    def taken(self) -> int:  # type: ignore[override]
        return self.tokens

    def problems(self, model: nn.Module) -> list[tuple[str, str]]:
        return support_problems(model, self.tokens, by_position=True)

    def site_problems(self, model: nn.Module, sites: Iterable[tuple[Site, Join]]) -> list[tuple[str, str]]:
        own, path = {site.name: join for site, join in sites if isinstance(join, Prompt)}, token_embedding(model)
        if list(own) != [path]:
            what = f"a prompt stands at the token embedding, {path}, alone"
            return [(what, "leave the targets out: it is the token embedding")]
        return token_problems(self.tokens, [own[path].tokens])

    def notes(self, model: nn.Module) -> list[str]:
        return context_notes(model, self.tokens)

    def apply(self, model: nn.Module) -> ContextPatch:
        return PrependedKeysValues(model, self.tokens, _source)


def with_prompt_text(method: Method, tokenizer: Any) -> Method:
    """A method whose prompt starts at a text, with the ids of the text's tokens.

    Args:
        method: any method; one without such a prompt is returned as it is.
        tokenizer: the model's.

    Raises:
        MethodError: the text has no tokens.

    Example:
        >>> method = lorary.method("prompt-tuning", init_text="Is this review positive?")
        >>> method = lorary.with_prompt_text(method, tokenizer)
    """
    join = method.join
    if not isinstance(join, Prompt) or join.start != "text" or join.ids:
        return method
    ids = tuple(map(int, tokenizer(join.text, add_special_tokens=False)["input_ids"]))
    if not ids:
        problem = Diagnostic("init_text", f"is {join.text!r}, which has no tokens", "write what the task is")
        raise MethodError("cannot start a prompt:", [problem])
    return method.replace(join=dataclasses.replace(join, ids=ids))


def _source(inner: Any, cache: Any) -> Source:
    """The prompt's keys and values. A text that is generated keeps those of its first pass, beside its own."""
    layer = inner.get_input_embeddings()
    kept = {} if cache is None or torch.is_grad_enabled() else vars(cache)
    source: Source
    owner, source = kept.get(_KEPT, (None, None))
    if tokens_in(cache) and owner == id(layer):
        return source
    source = keys_values_of(inner, layer.params["P"].to(layer.dtype))
    kept[_KEPT] = id(layer), source
    return source


@preset(
    "prompt-tuning",
    citation="Lester et al. 2021, arXiv:2104.08691",
    aliases=("prompt",),
    lr=0.3,
    when="As a baseline, or for very many tasks on one large model: a task is a few embeddings.",
)
def prompt_tuning(tokens: int = 20, start: str = "", init_text: str = "") -> dict[str, Any]:
    """X' = [P; E(x)], P trains

    Args:
        tokens: the number of trained embeddings before the text, l in the paper; they take as many positions.
        start: vocabulary (drawn from the most common tokens), uniform, or text; empty: text if there is one.
        init_text: the text whose tokens P starts at, repeated or cut.
    """
    start = start or ("text" if init_text else "vocabulary")
    if problem := _text_problem(start, init_text):
        raise MethodError("invalid method:", [problem])
    return {
        "delta": NoUpdate(),
        "init": NoInit(),
        "scale": ConstantScale(1.0),
        "join": Prompt(tokens, start, init_text),
        "context": PromptContext(tokens),
    }


def _text_problem(start: str, text: object) -> Diagnostic | None:
    """Why a prompt cannot start at a text, or not at another one."""
    if not TEXT["check"](text):
        return Diagnostic("init_text", f"is {text!r}; it takes {TEXT['expects']}")
    if text and start != "text":
        return Diagnostic("start", f"is {start!r}, and init_text is a text to start at", "leave one of the two out")
    if start == "text" and not text:
        return Diagnostic("init_text", "is empty, and the prompt starts at it", "write what the task is")
    return None
