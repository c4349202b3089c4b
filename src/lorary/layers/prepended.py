"""Keys and values that stand before a text's own, in the attention of a Transformers model.

Prefix tuning and prompt tuning differ only in where these l keys and values come from. The model's forward pass hands
their source on to its attention, as it does with every keyword that it does not know; an attention implementation that
is registered with Transformers puts them before the layer's own, and the text's positions begin at l.

They are not in the cache. So the cache is the text's own: `generate`, beam search, static caches and packed rows need
no change, and gradient checkpointing, under which Transformers drops every cache, works.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorary.errors import Diagnostic, StateError
from lorary.layers.block_names import projects_to
from lorary.layers.rope import max_context, own_config_copy, text_config
from lorary.layers.shifted_attention import sliding_windows
from lorary.layers.transformers_internals import (
    CACHES,
    attention_of,
    checkpoints_reentrantly,
    set_attention,
    uses_attention_interface,
)
from lorary.layers.wrappers import is_sharded_model, named_modules

# (attention layer, its keys, its values) -> keys and values [1, heads, l, width] to stand before them, or None
Source = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor] | None]
# (the model that embeds the tokens, its cache) -> the source of one forward pass
MakeSource = Callable[[Any, Any], Source]

_ARGUMENT = "lorary_prepended"
_NAME = "lorary_prepended_{}_{}"
_OWN = ("sdpa", "eager")  # the attention implementations that take a mask of any shape
_POSITIONS_FROM_MASK = {"opt", "biogpt"}  # models whose positions leave padding out, unless they are given


def text_model(model: nn.Module) -> Any:
    """The module that embeds the tokens and runs the layers; None if there is none of Transformers' kind."""
    try:
        tokens = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    for owner in (m for m in model.modules() if any(child is tokens for child in m.children())):
        taken = _arguments(owner).keys()
        if "position_ids" in taken and not taken.isdisjoint(CACHES):
            return owner
    return None


def attention_layers(model: nn.Module) -> list[str]:
    """The paths of the language model's attention layers that project keys and values of their own."""
    inside, projects_keys = set(text_model(model).modules()), projects_to("k")
    return [
        path
        for path, module in named_modules(model)
        if module in inside
        and hasattr(module, "layer_idx")
        and any(projects_keys(n) for n, _ in module.named_children())
    ]


def _arguments(module: nn.Module) -> dict[str, Any]:
    return dict(inspect.signature(type(module).forward).parameters)


def token_embedding(model: nn.Module) -> str:
    """The path of the layer that embeds the tokens."""
    tokens = text_model(model).get_input_embeddings()
    return next(name for name, module in named_modules(model) if module is tokens)


def support_problems(model: nn.Module, length: int, *, by_position: bool) -> list[tuple[str, str]]:
    """(reason, fix): why keys and values cannot stand before the text of a model.

    Args:
        model: also on the meta device.
        length: how many there are.
        by_position: whether they are those of tokens, which a sliding window sees from nearby only.
    """
    name, config, inner = type(model).__name__, text_config(model), text_model(model)
    if config is None:
        return [(f"{name} is not a Transformers model: only its attention takes keys and values before the text's", "")]
    problems = []
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        problems.append((f"{name} has an encoder and a decoder; only causal language models are supported", ""))
    elif inner is None or any(getattr(m, "is_causal", True) is False for m in inner.modules()):
        problems.append((f"{name} is not a causal language model with a cache of keys and values", ""))
    elif len(attention_layers(model)) != (layers := getattr(config, "num_hidden_layers", 0)):
        what = f"{len(attention_layers(model))} of {layers} layers of {name} project keys and values of their own"
        problems.append((f"{what}; all of them need to", ""))
    if not uses_attention_interface(model):
        what = f"{name} does not use Transformers' attention interface, so nothing can stand before its keys"
        problems.append((what, ""))
    own = attention_of(config)
    if own is not None and own not in _OWN and not own.startswith("lorary_"):
        fix = f"load the model with attn_implementation={_OWN[0]!r}"
        problems.append((f"its attention is {own!r}, which takes no mask of keys before the text's", fix))
    if getattr(config, "reorder_and_upcast_attn", False):
        problems.append(("its attention has a path of its own (reorder_and_upcast_attn)", "set it to False"))
    known = max_context(config)
    window, windowed, _ = sliding_windows(config, known or sys.maxsize) if by_position else (0, 0, 0)
    if windowed:
        what = f"{windowed} layers of {name} use a sliding window of {window:,} tokens, which would lose sight of them"
        problems.append((what, ""))
    if known is not None and length >= known:
        problems.append((f"takes {length:,} positions, and {name} has {known:,}", "use fewer tokens"))
    return problems


class PrependedKeysValues:
    """The reversible change of a model: a source's keys and values stand before the text's, at positions from l on.

    Args:
        model: of Transformers, without problems.
        length: the number of keys and values, l.
        make: makes the source of every forward pass.
    """

    def __init__(self, model: nn.Module, length: int, make: MakeSource) -> None:
        own_config_copy(model)
        self.inner, self.config, self.length, self.make = text_model(model), text_config(model), length, make
        self.names = list(_arguments(self.inner))[1:]
        self.own = attention_of(self.config) or _OWN[0]
        self.restore()

    def restore(self) -> None:
        """Put the keys and values before the text."""
        set_attention(self.config, register(self.own, self.length))
        self.hook = self.inner.register_forward_pre_hook(self._prepend, with_kwargs=True)

    def revert(self) -> None:
        """The original model."""
        self.hook.remove()
        set_attention(self.config, self.own)

    def make_permanent(self) -> None:
        """Nothing is for training only."""

    reapply = make_permanent

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        register(self.own, self.length)  # in a process that unpickles the model

    def _prepend(self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook: the source as a keyword, and the positions from l on.

        Raises:
            StateError: the model's attention implementation was changed after attaching.
        """
        if kwargs.get(_ARGUMENT) is not None:  # the pass of a prompt alone
            return None
        if (found := attention_of(self.config)) != (needed := _NAME.format(self.length, self.own)):
            what = f"is {found!r}, and {needed!r} puts the {self.length} keys and values before the text"
            fix = "choose the attention implementation before attaching"
            raise StateError("cannot prepend keys and values:", [Diagnostic("attention", what, fix)])
        if torch.is_grad_enabled() and inner.training and checkpoints_reentrantly(inner):
            what = "computes layers again in a backward pass of their own (use_reentrant=True)"
            fix = 'set gradient_checkpointing_kwargs={"use_reentrant": False}'
            why = "which the keys and values before the text cannot follow"
            raise StateError("cannot prepend keys and values:", [Diagnostic("checkpointing", f"{what}, {why}", fix)])
        call = dict(zip(self.names, args, strict=False)) | kwargs
        cache = next((call[name] for name in CACHES if call.get(name) is not None), None)
        call["position_ids"] = self._positions(call, cache) + self.length
        call[_ARGUMENT] = self.make(inner, cache)
        return (), call

    def _positions(self, call: dict[str, Any], cache: Any) -> Tensor:
        """The positions of the text without keys and values before it."""
        given: Tensor | None = call.get("position_ids")
        if given is not None:
            return given
        tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        seen, mask = tokens_in(cache), call.get("attention_mask")
        if mask is not None and mask.dim() == 2 and self.config.model_type in _POSITIONS_FROM_MASK:
            positions: Tensor = (mask.cumsum(1) * mask - 1).long()[:, seen:]
            return positions
        return (torch.arange(tokens.shape[1], device=tokens.device) + seen)[None]


def tokens_in(cache: Any) -> int:
    """The number of tokens in a cache of keys and values."""
    return 0 if cache is None else int(cache.get_seq_length())


def keys_values_of(inner: Any, embeddings: Tensor) -> Source:
    """The keys and values that a model computes for embeddings [l, d] alone, as a source; differentiable.

    Raises:
        StateError: FSDP shards the layers, and gradients are asked for.
    """
    if torch.is_grad_enabled() and is_sharded_model(inner):
        what = "FSDP shards the layers, and cannot follow gradients through two passes of them in one step"
        fix = "train a prompt in one process or with DDP, or use prefix-tuning"
        raise StateError("cannot train what stands before the text:", [Diagnostic("model", what, fix)])
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: Any, key: Tensor, value: Tensor) -> None:
        found[layer.layer_idx] = key, value

    positions = torch.arange(len(embeddings), device=embeddings.device)[None]
    inner(inputs_embeds=embeddings[None], position_ids=positions, use_cache=False, **{_ARGUMENT: keep})
    return partial(_kept, dict(found))  # a copy: a checkpoint that computes again keeps again


def _kept(found: dict[int, tuple[Tensor, Tensor]], layer: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return found[layer.layer_idx]


# --- Transformers' attention interface --------------------------------------------------------------------------------


def register(own: str, length: int) -> str:
    """The name of an attention implementation that puts keys and values before those of `own`, registered."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = _NAME.format(length, own)
    AttentionInterface.register(name, partial(_attend, own=own))
    AttentionMaskInterface.register(name, partial(_mask, own=own, length=length))
    return name


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, own: str, **kwargs: Any
) -> Any:
    """Transformers' attention function, on [l + n] keys and values [batch, heads, n, width].

    Raises:
        StateError: the source has not reached this layer.
    """
    source = kwargs.pop(_ARGUMENT, None)
    if source is None:
        what = "gets no keyword arguments from the model's forward pass, so no keys and values reach it"
        raise StateError("cannot prepend keys and values:", [Diagnostic(type(module).__name__, what)])
    before = source(module, key, value)
    if before is not None:
        key, value = (
            torch.cat([p.to(t).expand(len(t), -1, -1, -1), t], 2) for p, t in zip(before, (key, value), strict=True)
        )
    return _own_attention(module, own)(module, query, key, value, _fitted(attention_mask, key.shape[2]), **kwargs)


def _fitted(mask: Tensor | None, keys: int) -> Tensor | None:
    """A mask [..., keys] from one with columns for keys that are not there, or, made by the caller, without them."""
    if mask is None or mask.shape[-1] == keys:
        return mask
    if mask.shape[-1] > keys:
        return mask[..., mask.shape[-1] - keys :]
    return F.pad(mask, (keys - mask.shape[-1], 0), value=mask.dtype == torch.bool)


def _own_attention(module: Any, own: str) -> Any:
    """The attention function that the model uses without lorary; the eager one is in the file of the layer."""
    if own == "eager":
        return vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    from lorary.layers.transformers_internals import sdpa_attention_forward

    return sdpa_attention_forward


def _mask(*, own: str, length: int, **call: Any) -> Tensor:
    """Transformers' mask function: l columns that every token sees, and the model's own mask, always explicit."""
    from transformers import AttentionMaskInterface

    mask: Tensor = AttentionMaskInterface()[own](**call | {"allow_is_causal_skip": False})
    return F.pad(mask, (length, 0), value=mask.dtype == torch.bool)
