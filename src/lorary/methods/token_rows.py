"""Rows of tokens: E'[t] = R[t] for the chosen tokens t; every other row of the vocabulary stays as it is.

Only the rows of a few tokens train, at the input embedding and at the output head: n d numbers for n tokens, once where
the two are tied. R holds the rows themselves, and not their change, because the rows of a resized vocabulary are drawn
again whenever the base is loaded: a difference from them would mean nothing. As an update of a known base it has rank
n: a selection of n rows times R - W[t].

PEFT's trainable tokens, 2025 (`trainable_token_indices`, TRAINABLE_TOKENS); there is no paper.

Differs from PEFT: where the base computes in 16 bits, the head adds the product with R - W[t], so that steps smaller
than the weight's precision count; PEFT rounds the rows to it first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.errors import Diagnostic, MethodError
from lorary.layers.kinds import embed_scale
from lorary.methods.lora import ConstantScale
from lorary.spec.fields import IDS, TEXTS
from lorary.spec.interfaces import Factors, Join, Layer, Shapes, Tensors, component
from lorary.spec.method import Method
from lorary.spec.no_update import NoInit, NoUpdate
from lorary.spec.presets import preset
from lorary.spec.site import Site


@component
class TokenRows(Join):
    """R [n, width] in place of the rows of n tokens.

    Args:
        tokens: their ids.
        added: the texts of the last of them, if they were added to the tokenizer: their rows start at the mean of
            those before them, whatever a padded table holds there.
    """

    tokens: tuple[int, ...] = field(default=(), metadata=IDS)
    added: tuple[str, ...] = field(default=(), metadata=TEXTS)

    roles = frozenset({"R"})
    targets = ("vocabulary",)
    supports_dropout = False
    adds_delta = False
    replaces_rows = True
    keeps_ties = True

    def shapes(self, site: Site) -> Shapes:
        return {"R": (len(self.tokens), site.out_features if site.kind == "embedding" else site.in_features)}

    def whole(self, site: Site, params: Tensors) -> Tensors:
        return {"columns": params["R"].T} if site.kind == "embedding" else params

    def setup(self, layer: Layer, generator: torch.Generator) -> None:
        R = layer.params["R"]
        R.copy_(self._rows_of_base(layer))
        if self.added and not R.is_meta:
            W = layer.matrix.detach()
            used = (W.T if layer.site.kind == "embedding" else W)[: min(self.tokens[-len(self.added) :])]
            R[-len(self.added) :] = used.double().mean(0).to(R.dtype)  # in 64 bits: processors sum in different orders

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        y, R = layer.run_base(x), layer.params["R"]
        if layer.site.kind == "embedding":
            return self._looked_up(layer, y, x, R)
        change = (R - self._rows_of_base(layer)).to(y.dtype)
        return y.index_add_(-1, self._ids(y), F.linear(x.to(y.dtype), change))  # a copy of all logits would be large

    def _looked_up(self, layer: Layer, y: Tensor, x: Tensor, R: Tensor) -> Tensor:
        """The output of an embedding, with R's rows at the chosen tokens."""
        ids, order = self._ids(y).sort()
        at = torch.searchsorted(ids, x.to(ids.dtype)).clamp(max=len(ids) - 1)
        padding = getattr(layer.base, "padding_idx", None)
        pad = self.tokens.index(padding) if padding in self.tokens else None
        rows = F.embedding(order[at], R, pad).to(y.dtype)  # as in nn.Embedding, the padding row gets no gradient
        return torch.where((ids[at] == x)[..., None], rows * embed_scale(layer.base), y)

    def merged(self, params: Tensors, W: Tensor, b: Tensor | None, BA: Factors) -> tuple[Tensor, Tensor | None]:
        if "columns" in params:
            return W.index_copy(1, self._ids(W), params["columns"].to(W.dtype)), b
        return W.index_copy(0, self._ids(W), params["R"].to(W.dtype)), b

    def on_output(
        self, params: Tensors, W: Callable[[], Tensor], b: Callable[[], Tensor | None], BA: Factors
    ) -> tuple[Factors, Tensor | None, Tensor | None]:
        weight = W()
        dim = int("columns" in params)
        selected = weight.new_zeros(len(self.tokens), weight.shape[dim])  # [n, vocabulary]
        selected.scatter_(1, self._ids(weight)[:, None], 1.0)
        rows = params["columns"] if dim else params["R"]
        change = rows.to(weight) - weight.index_select(dim, self._ids(weight))
        return ((change, selected) if dim else (selected.T, change)), None, None

    def problems(self, site: Site) -> list[str]:
        if site.kind not in ("linear", "embedding") or site.parts:
            return ["is neither an embedding nor a whole linear layer: it has no rows of tokens"]
        if not self.tokens:
            return ["no token is named: tokens=[...]"]
        size = site.in_features if site.kind == "embedding" else site.out_features
        if len(self.added) > len(self.tokens):
            return [f"has texts for {len(self.added)} added tokens, and {len(self.tokens)} tokens"]
        outside = [t for t in self.tokens if t >= size]
        return [f"token {t} is named twice" for t in _twice(self.tokens)[:1]] + [
            f"token {t} is outside its vocabulary of {size:,}: resize the model to at least {max(outside) + 1:,}"
            for t in outside[:1]
        ]

    def _ids(self, like: Tensor) -> Tensor:
        return torch.tensor(self.tokens, device=like.device)

    def _rows_of_base(self, layer: Layer) -> Tensor:
        """[n, width] the base's own rows, in R's precision."""
        dim = int(layer.site.kind == "embedding")
        W = layer.matrix.detach()
        rows = W.index_select(dim, self._ids(W))
        return (rows.T if dim else rows).to(layer.params["R"].dtype)


def _twice(tokens: Sequence[int]) -> list[int]:
    """The tokens that are there more than once."""
    return sorted(t for t, count in Counter(tokens).items() if count > 1)


def with_new_tokens(method: Method, ids: Sequence[int], added: Sequence[str]) -> Method:
    """A method that also trains the rows of these tokens, which were added to the tokenizer.

    Args:
        method: of rows of tokens.
        ids: the tokens' ids.
        added: their texts.
    """
    join = method.join
    if not isinstance(join, TokenRows):
        return method
    old = tuple(t for t in join.tokens if t not in ids)
    return method.replace(join=TokenRows((*old, *ids), tuple(added)))


@preset(
    "rows",
    aliases=("token-rows", "trainable-tokens"),
    citation="PEFT's trainable tokens, 2025",
    lr=1e-3,
    when="For new tokens, or for the meaning of a few: their rows alone, in a file of kilobytes.",
    example={"tokens": (0, 1, 2)},
)
def rows(tokens: int | Sequence[int] = ()) -> dict[str, Any]:
    """E'[t] = R[t] for the tokens t that are named, E'[t] = E[t] for all others

    Args:
        tokens: their ids; those of new tokens come from `lorary.add_tokens`, or from `model.tokens` of a configuration.
    """
    ids = [tokens] if isinstance(tokens, int) else tokens
    if texts := [t for t in ids if isinstance(t, str)] if isinstance(ids, Sequence) else []:
        what = f"{texts[0]!r} is a text, and a method takes ids"
        fix = "lorary.add_tokens(model, tokenizer, texts) gives them; in a configuration: model.tokens"
        raise MethodError("invalid method:", [Diagnostic("tokens", what, fix)])
    if not isinstance(ids, Sequence) or any(type(t) is not int for t in ids):
        raise MethodError("invalid method:", [Diagnostic("tokens", f"is {tokens!r}; it takes ids of tokens")])
    problems = [Diagnostic("tokens", f"token {t} is negative") for t in ids if t < 0][:1]
    problems += [Diagnostic("tokens", f"token {t} is named twice") for t in _twice(ids)[:1]]
    if problems:
        raise MethodError("invalid method:", problems)
    return {"delta": NoUpdate(), "init": NoInit(), "scale": ConstantScale(1.0), "join": TokenRows(tuple(ids))}
