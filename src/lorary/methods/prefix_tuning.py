"""Prefix tuning: o = softmax(Q [P_k; K]^T / sqrt(d_h)) [P_v; V] in every layer, where P_k and P_v [l, d_kv] train.

l keys and values of every attention layer stand before those of the text. They are parameters, not the keys and values
of any token: nothing is prepended to the embeddings. Text begins at position l.

Li & Liang 2021, arXiv:2101.00190, equation 3 and section 4.3. As in the authors' code, the prefix may be computed by a
network in training: an embedding E [l, d], a linear layer W1 [mlp, d], tanh, and a linear layer for all keys and
values, whose rows belong to the layers. Afterwards it is dropped (`Adapter.compact`).

Differs from the authors' code: keys and values do not go through the cache (`lorary.layers.prepended`), so that
gradient checkpointing and packed rows work; with grouped heads they have d_kv numbers, not d.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorary.layers.adapted import Adapted
from lorary.layers.block_names import projects_to
from lorary.layers.fused_qkv import FUSED
from lorary.layers.prepended import PrependedKeysValues, Source, attention_layers, support_problems
from lorary.layers.rope import max_context, text_config
from lorary.layers.shifted_attention import sliding_windows
from lorary.methods.lora import ConstantScale
from lorary.spec.context import Context, ContextPatch
from lorary.spec.fields import COUNT, FLAG, POSITIVE, WHOLE
from lorary.spec.interfaces import Join, Layer, Shapes, Tensors, component
from lorary.spec.method import Method
from lorary.spec.no_update import NoInit, NoUpdate
from lorary.spec.placement import AdaptedSite
from lorary.spec.presets import preset
from lorary.spec.site import Site

_LEAVE_OUT = "leave the targets out: they are all projections of keys and values"
STANDS_BEFORE = "stands before the text, which no weight and bias can"
_NETWORK = frozenset({"E", "W1", "b1", "W_k", "b_k", "W_v", "b_v"})


@component
class Prefix(Join):
    """P_k and P_v [tokens, d_kv] at the projections of keys and values, which are unchanged: attention reads them.

    Args:
        tokens: the number of keys and values, l.
        mlp: the width of the network that computes them in training; 0: P_k and P_v themselves train.
        std: of the start of P_k and P_v, N(0, std^2). The network's is PyTorch's, with E ~ N(0, 1).
    """

    tokens: int = field(default=10, metadata=COUNT)
    mlp: int = field(default=0, metadata=WHOLE)
    std: float = field(default=1.0, metadata=POSITIVE)

    supports_dropout = False
    adds_delta = False
    needs_context = True
    why_not_merged = STANDS_BEFORE
    exact_start = False

    @property
    def roles(self) -> frozenset[str]:  # type: ignore[override]
        return _NETWORK if self.mlp else frozenset({"P_k", "P_v"})

    @property
    def targets(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("embedding", "attention-kv") if self.mlp else ("attention-kv",)

    def shapes(self, site: Site) -> Shapes:
        if site.kind == "embedding":
            return {"E": (self.tokens, site.out_features), "W1": (self.mlp, site.out_features), "b1": (self.mlp,)}
        rows = projections(site)
        if not self.mlp:
            return {f"P_{name}": (self.tokens, n) for name, n in rows.items()}
        return {f"W_{name}": (n, self.mlp) for name, n in rows.items()} | {
            f"b_{name}": (n,) for name, n in rows.items()
        }

    def setup(self, layer: Layer, generator: torch.Generator) -> None:
        for role, tensor in sorted(layer.params.items()):
            drawn = torch.empty(tensor.shape)  # on the CPU: the same numbers on every machine
            if role == "E" or role.startswith("P_"):
                nn.init.normal_(drawn, std=1.0 if role == "E" else self.std, generator=generator)
            else:  # a linear layer's weight, or the bias beside it
                bound = 1 / math.sqrt(layer.params[role.replace("b", "W")].shape[1])
                nn.init.uniform_(drawn, -bound, bound, generator=generator)
            tensor.copy_(drawn)

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        return layer.run_base(x)

    def hidden(self, params: Tensors) -> Tensor:
        """[tokens, mlp] the network's hidden layer, from the tensors of the token embedding."""
        return torch.tanh(F.linear(params["E"], params["W1"], params["b1"]))

    def keys_values(self, site: Site, params: Tensors, hidden: Tensor | None) -> dict[str, Tensor]:
        """`k` and `v`, as far as a site projects them -> [tokens, d_kv]."""
        if hidden is None:
            return {name: params[f"P_{name}"] for name in projections(site)}
        here = hidden.to(next(iter(params.values())).device)  # the embedding may be on another one
        return {name: F.linear(here, params[f"W_{name}"], params[f"b_{name}"]) for name in projections(site)}

    def problems(self, site: Site) -> list[str]:
        if site.kind == "embedding" and self.mlp:
            return []
        if site.kind in ("linear", "transposed") and projections(site):
            return []
        return ["is not a projection of keys or values, before which a prefix could stand"]


def projections(site: Site) -> dict[str, int]:
    """`k` and `v`, as far as a site projects them -> the number of rows, d_kv."""
    if site.parts:
        rows = dict(zip((part.name for part in site.parts), site.rows, strict=True))
        return rows if rows.keys() <= {"k", "v"} else {}
    if site.name.rpartition(".")[2] in FUSED:
        return {}
    return {name: site.out_features for name in "kv" if projects_to(name)(site.name)}


@component
class PrefixContext(Context):
    """Keys and values before the text's in every attention layer.

    Args:
        tokens: their number, l.
        network: whether a network computes them in training.
    """

    tokens: int = field(default=10, metadata=COUNT)
    network: bool = field(default=False, metadata=FLAG)

    @property
    def taken(self) -> int:  # type: ignore[override]
        return self.tokens

    def problems(self, model: nn.Module) -> list[tuple[str, str]]:
        return support_problems(model, self.tokens, by_position=False)

    def site_problems(self, model: nn.Module, sites: Iterable[tuple[Site, Join]]) -> list[tuple[str, str]]:
        own = [(site, join) for site, join in sites if isinstance(join, Prefix)]
        problems = _layer_problems(model, [site for site, _ in own if site.kind != "embedding"])
        if self.network and not any(site.kind == "embedding" for site, _ in own):
            what = "the token embedding holds the first half of the network, and is not among the targets"
            problems.append((what, _LEAVE_OUT))
        return problems + token_problems(self.tokens, {join.tokens for _, join in own})

    def notes(self, model: nn.Module) -> list[str]:
        window, windowed, _ = sliding_windows(text_config(model), max_context(text_config(model)) or sys.maxsize)
        note = f"{windowed} layers with a sliding window of {window:,} tokens see the prefix at any distance"
        return context_notes(model, self.tokens) + ([note] if windowed else [])

    def apply(self, model: nn.Module) -> ContextPatch:
        return PrependedKeysValues(model, self.tokens, _source)


def without_network(
    sites: Sequence[AdaptedSite], tensors: Mapping[str, Mapping[str, Tensor]]
) -> tuple[tuple[AdaptedSite, ...], dict[str, Mapping[str, Tensor]]]:
    """The sites and tensors of an adapter whose prefix is P_k and P_v alone, not the network that computes them."""
    kept, values = [], dict(tensors)
    networks = {s.site.name: s.join for s in sites if isinstance(s.join, Prefix) and s.join.mlp}
    hidden = {name: join.hidden(tensors[name]) for name, join in networks.items() if "E" in tensors[name]}
    if not hidden:
        return tuple(sites), values
    for s in sites:
        if s.site.name in hidden:  # it is of the network only
            del values[s.site.name]
            continue
        if (join := networks.get(s.site.name)) is not None:
            found = join.keys_values(s.site, tensors[s.site.name], next(iter(hidden.values())))
            values[s.site.name] = {f"P_{name}": P for name, P in found.items()}
        kept.append(dataclasses.replace(s, method=deployed_method(s.method)))
    return tuple(kept), values


def deployed_method(method: Method) -> Method:
    """A method without the network that computes a prefix in training; any other one as it is."""
    join, context = method.join, method.context
    if not isinstance(context, PrefixContext) or not context.network:
        return method
    join = dataclasses.replace(join, mlp=0) if isinstance(join, Prefix) else join
    return method.replace(join=join, context=PrefixContext(context.tokens))


def context_notes(model: nn.Module, tokens: int) -> list[str]:
    """The positions that stand before the text."""
    known = max_context(text_config(model))
    left = "" if known is None else f": of {known:,} positions, {known - tokens:,} are left for the text"
    return [f"takes {tokens:,} positions before the text{left}"]


def _layer_problems(model: nn.Module, sites: list[Site]) -> list[tuple[str, str]]:
    """Every attention layer of the language model needs keys and values; no other one can have them."""
    have: dict[str, set[str]] = {}
    for site in sites:
        have.setdefault(site.name.rpartition(".")[0], set()).update(projections(site))
    layers, problems = attention_layers(model), []
    if outside := sorted(have.keys() - set(layers)):
        problems.append((f"{', '.join(outside)} is not an attention layer of the language model", "exclude it"))
    if lacking := [name for name in layers if have.get(name, set()) != {"k", "v"}]:
        what = "a prefix stands before the keys and the values of every attention layer; here not at"
        problems.append((f"{what} {', '.join(lacking[:3])}{' and others' if len(lacking) > 3 else ''}", _LEAVE_OUT))
    return problems


def token_problems(tokens: int, found: Iterable[int]) -> list[tuple[str, str]]:
    """A join for another number of tokens than the context's."""
    other = sorted(set(found) - {tokens})
    return [(f"{n} tokens stand before the text, and the context has room for {tokens}", "") for n in other]


def _source(inner: Any, cache: Any) -> Source:
    """The prefix of one forward pass; the network's hidden layer is computed once for all layers."""
    tokens = inner.get_input_embeddings()
    network = isinstance(tokens, Adapted) and isinstance(tokens.join, Prefix)
    hidden = tokens.join.hidden(tokens.tensors) if network else None
    return partial(_prefix, hidden=hidden)


def _prefix(layer: nn.Module, key: Tensor, value: Tensor, *, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """[1, heads, tokens, width] keys and values of an attention layer's prefix."""
    found: dict[str, Tensor] = {}
    for child in layer.children():
        if isinstance(child, Adapted) and isinstance(child.join, Prefix):
            found |= child.join.keys_values(child.site, child.tensors, hidden)
    return _by_head(found["k"], key), _by_head(found["v"], value)


def _by_head(P: Tensor, like: Tensor) -> Tensor:
    """[1, heads, tokens, width] of P [tokens, heads * width]."""
    _, heads, _, width = like.shape
    return P.view(len(P), heads, width).transpose(0, 1)[None]


@preset(
    "prefix-tuning",
    citation="Li & Liang 2021, arXiv:2101.00190",
    aliases=("prefix",),
    lr=3e-2,
    when="As a baseline, or where the weights must not change at all: attention reads l trained keys and values more.",
)
def prefix_tuning(tokens: int = 10, mlp: int = 0, std: float = 1.0) -> dict[str, Any]:
    """o = softmax(Q [P_k; K]^T / sqrt(d_h)) [P_v; V] in every layer, P_k and P_v train

    Args:
        tokens: the number of keys and values before the text, l in the paper; they take as many positions.
        mlp: the width of the network that computes them in training, such as 512; 0: they train themselves.
        std: the standard deviation of their start, without the network.
    """
    return {
        "delta": NoUpdate(),
        "init": NoInit(),
        "scale": ConstantScale(1.0),
        "join": Prefix(tokens, mlp, std),
        "context": PrefixContext(tokens, bool(mlp)),
    }
