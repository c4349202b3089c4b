"""The positions of a text from an invocation on, found once in each forward pass of a Transformers model.

The model that embeds the tokens looks for the invocation in their ids and hands the answer on to its blocks, as it
does with every keyword that it does not know. Each block keeps it for the layers inside while it runs. So it belongs to
the call: a block that gradient checkpointing runs again in the backward pass, in whatever thread, gets the same answer.
Transformers checkpoints a block's `forward`, past the hooks of the block; there its attention gets the keyword.

A cache of keys and values remembers which of its rows are active, for the tokens that follow.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorary.errors import Diagnostic, StateError
from lorary.layers.prepended import text_model, tokens_in
from lorary.layers.rope import text_config
from lorary.layers.transformers_internals import CACHES, uses_attention_interface
from lorary.layers.wrappers import named_modules

_ARGUMENT = "lorary_active"
_KEPT = "_lorary_active"  # the attribute of a cache: (the patch's number, [rows] bool)
_NUMBERS = itertools.count()


class _Running(threading.local):
    """The block that runs in this thread, by its path, and the answer for it: [rows, tokens] bool."""

    path: str = ""
    active: Tensor | None = None


_RUNNING = _Running()


def active_positions(x: Tensor, layer: str) -> Tensor:
    """[..., 1] bool: the positions of a layer's input [..., in] from the invocation on.

    Raises:
        StateError: the layer is called outside of its block, or with other rows than the block's.
    """
    active = _RUNNING.active
    if active is None or not layer.startswith(_RUNNING.path):
        what = "is called outside of the model's forward pass, where no text tells from where on it acts"
        raise StateError("cannot find the invocation:", [Diagnostic(layer, what, "call the model")])
    if x.shape[:-1] == active.shape:
        return active[..., None].to(x.device)
    if x.dim() == 2 and len(x) == active.numel():  # the tokens of all rows, one after the other
        return active.reshape(-1, 1).to(x.device)
    rows, tokens = active.shape
    what = f"gets an input of shape {list(x.shape)}, and the text has {rows} rows of {tokens} tokens"
    raise StateError("cannot find the invocation:", [Diagnostic(layer, what, "leave it out of the targets")])


def since_last(ids: Tensor, tokens: Sequence[int], real: Tensor | None, positions: Tensor | None) -> Tensor:
    """[rows, n] bool: the positions from the last occurrence of `tokens` on; none in a text without one.

    Args:
        ids: [rows, n].
        tokens: the invocation's.
        real: [rows, n] whether a token is the text's own, not padding; None: all are.
        positions: [1 or rows, n] of the tokens: where they do not go on by one, another text begins (packed rows).
    """
    rows, n = ids.shape
    length = len(tokens)
    if n < length:
        return torch.zeros_like(ids, dtype=torch.bool)
    texts = torch.zeros_like(ids)
    if positions is not None:
        texts[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1).cumsum(1).expand(rows, -1)
    found = (ids.unfold(1, length, 1) == torch.tensor(tokens, device=ids.device)).all(-1)
    found = found & (texts[:, : n - length + 1] == texts[:, length - 1 :])
    if real is not None:
        found = found & real.unfold(1, length, 1).all(-1)
    found = F.pad(found, (0, length - 1)).long()
    of_text = torch.zeros_like(ids).scatter_add(1, texts, found)  # the occurrences in each text
    in_text, so_far = of_text.gather(1, texts), of_text.cumsum(1).gather(1, texts)
    return (in_text > 0) & (found.cumsum(1) == so_far)


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> block of the model that embeds the tokens."""
    inner = text_model(model)
    inside = {id(block) for child in inner.children() if isinstance(child, nn.ModuleList) for block in child}
    return {path: module for path, module in named_modules(model) if id(module) in inside}


def support_problems(model: nn.Module, tokens: Sequence[int]) -> Iterator[tuple[str, str]]:
    """(reason, fix): why no invocation can be found in the texts of a model."""
    name, config = type(model).__name__, text_config(model)
    if config is None:
        yield f"{name} is not a Transformers model: only there an invocation is found", ""
        return
    inner = text_model(model)
    if inner is None or getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        yield f"{name} is not a causal language model with a cache of keys and values", ""
    elif config is not getattr(model, "config", config):
        yield f"{name} embeds its tokens beside images or sounds, and its language model gets no ids to search", ""
    elif not uses_attention_interface(model) or not blocks(model):
        yield f"{name} hands no keywords on to its blocks, so none can know where the invocation is", ""
    outside = [t for t in tokens if t >= config.vocab_size]
    if outside:
        what = f"token {outside[0]} of the invocation is outside the vocabulary of {config.vocab_size:,}"
        yield what, "use the tokenizer of this model"


class InvocationFinder:
    """The reversible change of a model that finds the invocation in each forward pass.

    Args:
        model: of Transformers, without problems.
        tokens: the invocation's.
    """

    def __init__(self, model: nn.Module, tokens: Sequence[int]) -> None:
        self.inner, self.tokens, self.number = text_model(model), tuple(tokens), next(_NUMBERS)
        self.names = list(inspect.signature(type(self.inner).forward).parameters)[1:]
        self.blocks = blocks(model)
        self.restore()

    def restore(self) -> None:
        """Look for the invocation."""
        self.hooks = [
            self.inner.register_forward_pre_hook(self._find, with_kwargs=True),
            self.inner.register_forward_hook(self._remember, with_kwargs=True),
        ]
        for path, block in self.blocks.items():
            attention = [m for m in block.modules() if m is not block and hasattr(m, "layer_idx")]
            self.hooks += [
                block.register_forward_pre_hook(partial(_enter, f"{path}.", bool(attention)), with_kwargs=True),
                block.register_forward_hook(_leave, always_call=True),
                *(m.register_forward_pre_hook(partial(_attend, f"{path}."), with_kwargs=True) for m in attention),
            ]

    def revert(self) -> None:
        """The original model."""
        for hook in self.hooks:
            hook.remove()

    def make_permanent(self) -> None:
        """Nothing is for training only."""

    reapply = make_permanent

    def _find(self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook: the active positions as a keyword.

        Raises:
            StateError: there are no ids to search.
        """
        call = dict(zip(self.names, args, strict=False)) | kwargs
        if call.get("input_ids") is None:
            what = "gets embeddings without the ids of their tokens, in which the invocation could be found"
            raise StateError("cannot find the invocation:", [Diagnostic(type(inner).__name__, what, "pass input_ids")])
        call[_ARGUMENT] = self._active(call)
        return (), call

    def _active(self, call: dict[str, Any]) -> Tensor:
        ids, mask, positions = call["input_ids"], call.get("attention_mask"), call.get("position_ids")
        real = mask[:, -ids.shape[1] :] != 0 if torch.is_tensor(mask) and mask.dim() == 2 else None
        flat = torch.is_tensor(positions) and positions.dim() == 2 and positions.shape[1] == ids.shape[1]
        found = since_last(ids, self.tokens, real, positions if flat else None)
        cache = next((call[name] for name in CACHES if call.get(name) is not None), None)
        number, before = getattr(cache, _KEPT, (None, found[:, 0]))
        if number != self.number or not tokens_in(cache):
            return found  # what the cache holds is the base's, or nothing
        if ids.shape[1] == 1:  # a generated token: it goes on as the text before it, whatever it is
            return before[:, None]
        here: Tensor = torch.where(found.any(1, keepdim=True), found, before[:, None])
        return here

    def _remember(self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook: the rows that are active at the end, beside the cache of keys and values."""
        cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        cache = next((found for name in CACHES if (found := getattr(output, name, None)) is not None), cache)
        if cache is not None and hasattr(cache, "get_seq_length"):
            setattr(cache, _KEPT, (self.number, kwargs[_ARGUMENT][:, -1]))


def _enter(path: str, attends: bool, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook of a block: keep the answer for the layers inside.

    Raises:
        StateError: the model does not hand it on.
    """
    kwargs = dict(kwargs)
    again = attends and block.training and getattr(block, "gradient_checkpointing", False)
    _RUNNING.path, _RUNNING.active = path, kwargs.get(_ARGUMENT) if again else kwargs.pop(_ARGUMENT, None)
    if _RUNNING.active is None:
        what = "gets no keyword arguments from the model's forward pass, so it does not know where the invocation is"
        raise StateError("cannot find the invocation:", [Diagnostic(type(block).__name__, what)])
    return args, kwargs


def _attend(path: str, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook of attention in a checkpointed block: the block may be running again, past its own hooks."""
    if kwargs.get(_ARGUMENT) is None:
        return None
    _RUNNING.path, _RUNNING.active = path, kwargs[_ARGUMENT]
    return args, {name: value for name, value in kwargs.items() if name != _ARGUMENT}


def _leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook of a block: forget the answer."""
    _RUNNING.active = None
