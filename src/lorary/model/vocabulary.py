"""New tokens: added to the tokenizer, and to the model's tables where these have no rows left for them.

Rows are the same on every machine: a resized base can be told from another one, and an adapter on it fits again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, PlanError, StateError
from lorary.layers.quantized_weight import is_quantized
from lorary.methods.token_rows import TokenRows
from lorary.model.ambient import mode_independent
from lorary.model.base import Base, vocabulary_layers
from lorary.model.checks import changeable
from lorary.model.fingerprint import Fingerprint
from lorary.model.merge import untie_parameters
from lorary.model.state import state_of
from lorary.spec.placement import AdaptedSite

_HEADLINE = "cannot add tokens:"
ModelT = TypeVar("ModelT", bound=nn.Module)


@mode_independent
def add_tokens(model: nn.Module, tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Add tokens to a tokenizer and, where its tables have no rows left, to a model of Transformers, in place.

    A vocabulary is often larger than its tokenizer: the rows that nothing uses yet are taken first.

    Args:
        model: the base, without an adapter.
        tokenizer: its tokenizer.
        tokens: their texts.

    Returns:
        Their ids, for `lorary.method("rows", tokens=ids)`.

    Raises:
        PlanError: a text is empty, there twice or a token already, or would get the id of another token; nothing has
            changed.
        StateError: the model cannot be resized.

    Example:
        >>> ids = lorary.add_tokens(model, tokenizer, ["<question>", "<answer>"])
        >>> lorary.attach(model, lorary.plan(model, lorary.method("rows", tokens=ids)))
    """
    inner = changeable(model, "add tokens")
    if problems := [*_not_resizable(inner), *_unusable(tokenizer, tokens)]:
        raise PlanError(_HEADLINE, problems)
    trial = copy.deepcopy(tokenizer)  # the model first: if there is no memory for it, the tokenizer is as it was
    add_to_tokenizer(trial, tokens)
    resized_for(inner, tokens, lambda: trial)
    return add_to_tokenizer(tokenizer, tokens)


def add_to_tokenizer(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Add tokens to a tokenizer; their ids.

    Raises:
        PlanError: a text is empty, there twice or a token already, or would get the id of another token; nothing has
            changed.
    """
    if problems := _unusable(tokenizer, tokens) or _taken(tokenizer, tokens):
        raise PlanError(_HEADLINE, problems)
    return _added(tokenizer, tokens)


def _added(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    from transformers import AddedToken

    # not normalised: a token is found as it is written
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in tokens])
    return tuple(map(int, tokenizer.convert_tokens_to_ids(list(tokens))))


def _taken(tokenizer: Any, tokens: Sequence[str]) -> list[Diagnostic]:
    """The texts that would get the id of another token: a tokenizer counts its tokens, and its ids may have holes."""
    texts = {i: text for text, i in tokenizer.get_vocab().items()}
    if len(texts) == max(texts, default=-1) + 1:
        return []
    ids = zip(tokens, _added(copy.deepcopy(tokenizer), tokens), strict=True)
    what = "{!r} would be token {}, which is {!r} already: the ids of this tokenizer have holes"
    fix = "give its vocabulary an entry for every id, or train the rows of tokens that it has"
    return [Diagnostic("tokens", what.format(text, i, texts[i]), fix) for text, i in ids if i in texts]


def resized_for(model: ModelT, tokens: Sequence[str], tokenizer: Callable[[], Any]) -> ModelT:
    """The model with a row for each of these tokens of its tokenizer, in place.

    Raises:
        PlanError: its token embeddings are quantised.
    """
    if not tokens:
        return model
    if problems := _quantized([_input_embedding(model)]):
        raise PlanError(_HEADLINE, problems)
    size = 1 + max(map(int, tokenizer().convert_tokens_to_ids(list(tokens))))
    if size > vocabulary_of(model):
        resize_vocabulary(model, size)
    return model


def _unusable(tokenizer: Any, tokens: Any) -> list[Diagnostic]:
    """Why texts cannot be new tokens."""
    if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not tokens:
        what = f"is {tokens!r}, not a list of texts" if tokens or isinstance(tokens, str) else "names no token"
        return [Diagnostic("tokens", what, 'write tokens: ["<a>", "<b>"]')]
    if not callable(getattr(tokenizer, "add_tokens", None)):
        return [Diagnostic("tokenizer", f"a {type(tokenizer).__name__} takes no new tokens", "give the base's own")]
    problems, known = [], tokenizer.get_vocab()
    for i, text in enumerate(tokens):
        if not isinstance(text, str) or not text.strip():
            problems.append(Diagnostic("tokens", f"{text!r} is not a text", "name what the token is written as"))
        elif any("\ud800" <= letter <= "\udfff" for letter in text):
            problems.append(Diagnostic("tokens", f"{text!r} has half of a letter, which UTF-8 cannot write"))
        elif text in tokens[:i]:
            problems.append(Diagnostic("tokens", f"{text!r} is there twice", "name it once"))
        elif text in known:
            what = f"{text!r} is token {known[text]} of the tokenizer already"
            problems.append(Diagnostic("tokens", what, f"train its row by its id: tokens: [{known[text]}]"))
    return problems


# --- the model's tables -----------------------------------------------------------------------------------------------


def vocabulary_of(model: Any) -> int:
    """The number of rows of a model's input embedding."""
    return int(vocabulary_layers(model)[0].weight.shape[0])


@mode_independent
def resize_vocabulary(model: nn.Module, size: int) -> nn.Module:
    """Give a model of Transformers a larger vocabulary, in place. The new rows are the mean of those that were there.

    Transformers' own `resize_token_embeddings` draws them near that mean; here they are the same at every call.

    Args:
        model: the base, without an adapter; it may be on the meta device.
        size: rows of its input embedding, and of its output head if it has one.

    Returns:
        The same model.

    Raises:
        StateError: something is attached; it has no vocabulary that can be resized; or it would become smaller.
    """
    inner = changeable(model, "resize")
    problems = _not_resizable(inner)
    if not problems and (type(size) is not int or size < vocabulary_of(inner)):
        what = f"is {size!r}, and the model has {vocabulary_of(inner):,} rows: some would be lost"
        problems.append(Diagnostic("size", what, "give at least as many"))
    if problems:
        raise StateError("cannot resize the vocabulary:", problems)
    before = vocabulary_of(inner)
    if size == before:
        return model
    trained = [p.requires_grad for p in _rows(inner)]
    cast(Any, inner).resize_token_embeddings(size, mean_resizing=False)
    for table, trains in zip(_rows(inner), trained, strict=True):
        _fill(table, before)
        table.requires_grad_(trains)
    Fingerprint.resized(inner, list(_rows(inner)))
    return model


@mode_independent
def untie_embeddings(model: nn.Module) -> nn.Module:
    """Give every layer with a tied weight a copy of its own, in place, and say so in the model's configuration.

    An adapter of PEFT with `modules_to_save` has trained such copies.

    Args:
        model: the base, without an adapter.

    Returns:
        The same model.

    Raises:
        StateError: something is attached, or no weight is tied.
    """
    inner = changeable(model, "untie")
    problems = []
    if state_of(inner) is not None:
        problems.append(Diagnostic("model", "has an adapter attached", "untie the base, and attach then"))
    elif untie_parameters(inner, False) is None:
        problems.append(Diagnostic("model", "its configuration ties no weights", "leave it as it is"))
    if problems:
        raise StateError("cannot untie:", problems)
    Fingerprint.forget(inner)
    return model


def _fill(table: Tensor, before: int) -> None:
    """Set the rows of a table, or the numbers of a bias, from `before` on to the mean of the others."""
    if not table.is_meta:
        with torch.no_grad():
            table.copy_(with_mean_rows(table[:before], len(table)))


def with_mean_rows(table: Tensor, size: int) -> Tensor:
    """A table, or a bias, with the mean of its rows in new ones, if it has fewer than `size`."""
    if len(table) >= size:
        return table
    mean = table.double().mean(0, keepdim=True).to(table.dtype)  # in 64 bits: processors sum in different orders
    return torch.cat([table, mean.expand(size - len(table), *table.shape[1:])])


def _rows(model: Any) -> Iterator[nn.Parameter]:
    """The tables' weights and biases."""
    for layer in vocabulary_layers(model):
        yield from layer.parameters(recurse=False)


def vocabulary_paths(model: nn.Module) -> list[str]:
    """The paths of the layers with a row for every token, the input embedding first."""
    layers = [id(layer) for layer in vocabulary_layers(model)]
    found = {id(module): path for path, module in model.named_modules()}
    return [found[layer] for layer in layers if layer in found]


def why_other_vocabulary(base: Base, sizes: Mapping[str, int]) -> list[Diagnostic]:
    """The error of an adapter with another number of tokens than a base, and what to do.

    Args:
        base: the base.
        sizes: path of a layer -> the tokens that the adapter has for it.
    """
    other = {path: size for path, size in sizes.items() if base.vocabulary.get(path, size) != size}
    if not other:
        return []
    size, here = max(other.values()), next(iter(base.vocabulary.values()))
    what = f"the adapter was trained on a vocabulary of {size:,} tokens, and this model has {here:,}"
    fix = f"resize the base first: lorary.resize_vocabulary(model, {size})"
    return [Diagnostic(", ".join(other), what, fix if size > here else "load the base that it was trained on")]


def _not_resizable(model: Any) -> list[Diagnostic]:
    """Why a model's vocabulary cannot be resized."""
    if state_of(model) is not None:
        return [Diagnostic("model", "has an adapter attached", "resize the base, and attach then")]
    tables = vocabulary_layers(model)
    if problems := _quantized([_input_embedding(model), *tables]):
        return problems
    if not tables or not hasattr(model, "resize_token_embeddings"):
        what = f"a {type(model).__name__} names no table of token embeddings that can be resized"
        return [Diagnostic("model", what, "use a language model of Transformers")]
    return []


def _input_embedding(model: Any) -> Any:
    """The input embedding, also in NF4, where it is no layer of PyTorch; None if the model does not say which."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _quantized(tables: Iterable[Any]) -> list[Diagnostic]:
    """Why quantised tables get no new rows."""
    if not any(map(is_quantized, tables)):
        return []
    return [Diagnostic("model", "its token embeddings are quantised", "load the base without quantising them")]


# --- the tokens of an adapter -----------------------------------------------------------------------------------------


def added_tokens(sites: Iterable[AdaptedSite]) -> dict[str, int]:
    """Text -> id of the tokens that were added to the tokenizer for these sites."""
    joins = [s.join for s in sites if isinstance(s.join, TokenRows)]
    return {text: i for join in joins for text, i in zip(join.added, join.tokens[-len(join.added) :], strict=False)}


def vocabulary_with_added(sites: Iterable[AdaptedSite]) -> int:
    """The rows of the input embedding where tokens were added to the tokenizer for these sites; 0 if none were."""
    rows = (s.site.in_features for s in sites if s.site.kind == "embedding" and added_tokens([s]))
    return max(rows, default=0)


def check_tokens(tokenizer: Any, sites: Iterable[AdaptedSite]) -> None:
    """Refuse a tokenizer that gives an adapter's tokens other ids than those whose rows it has trained.

    Raises:
        PlanError: every one.
    """
    added = added_tokens(sites)
    ids = {text: tokenizer.get_vocab().get(text) for text in added}
    here = {text: "not a token" if i is None else f"token {i}" for text, i in ids.items()}
    what = "is {} of this tokenizer, and the adapter has trained row {} for it"
    fix = "use the tokenizer of the base that it was trained on"
    if wrong := [Diagnostic(repr(t), what.format(here[t], i), fix) for t, i in added.items() if ids[t] != i]:
        raise PlanError("the adapter's tokens are other tokens here:", wrong)


def other_meanings(adapters: Mapping[str, Iterable[AdaptedSite]], fix: str) -> list[Diagnostic]:
    """The tokens whose row two adapters have trained for different texts.

    Args:
        adapters: name -> sites.
        fix: what to do.
    """
    first: dict[int, tuple[str, str]] = {}  # id -> its text, and the adapter that says so
    problems = []
    for name, sites in adapters.items():
        for text, i in added_tokens(sites).items():
            other, whose = first.setdefault(i, (text, name))
            if other != text:
                what = f"has trained the row of token {i} for {text!r}, and {whose} for {other!r}"
                problems.append(Diagnostic(name, what, fix))
    return problems
