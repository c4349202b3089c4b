"""The tokens of prompts: texts, token ids, and conversations through the chat template of their adapter or the base."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorary.adapters.hub import CHAT_TEMPLATE
from lorary.errors import FileError
from lorary.files.safe_open import read_bytes
from lorary.files.strict_json import show
from lorary.model.loading.prompt_tokens import encode_text, render
from lorary.serve.http.errors import ApiError
from lorary.serve.interface import AdapterCard, Engine

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEMPLATE_BYTES = 2**20


def text_prompt(engine: Engine, text: str, param: str) -> tuple[int, ...]:
    """The tokens of a text, encoded as in training.

    Raises:
        ApiError: it is empty, and the tokenizer has no BOS to begin with; or it cannot fit the context.
    """
    tokenizer = engine.tokenizer
    _require_short(engine, text, param)
    ids = encode_text(tokenizer, text) or [i for i in (tokenizer.bos_token_id,) if i is not None]
    if not ids:
        raise ApiError(400, f"`{param}`: it is empty, and the tokenizer has no BOS", param=param)
    return tuple(ids)


def token_prompt(engine: Engine, ids: Sequence[int], param: str) -> tuple[int, ...]:
    """Token ids of a client, checked.

    Raises:
        ApiError: there is none, or one is outside of the vocabulary.
    """
    size = len(engine.tokenizer)
    wrong = [i for i in ids if not 0 <= i < size]
    if wrong or not ids:
        what = f"the token {wrong[0]} is not one of the vocabulary's {size:,}" if wrong else "it has no token"
        raise ApiError(400, f"`{param}`: {what}", param=param)
    return tuple(ids)


def plain_prompt(engine: Engine, prompt: str | list[int], param: str, cards: object = None) -> tuple[int, ...]:
    """The tokens of a text or of token ids; the adapters change nothing about them.

    Raises:
        ApiError: as for the two.
    """
    return text_prompt(engine, prompt, param) if isinstance(prompt, str) else token_prompt(engine, prompt, param)


def chat_prompt(
    engine: Engine, cards: Iterable[AdapterCard], messages: Sequence[Mapping[str, Any]], param: str = "messages"
) -> tuple[int, ...]:
    """The tokens of a conversation up to the start of the next answer.

    Args:
        engine: the engine.
        cards: the adapters of the request: the first that brings a chat template decides; else the base's is used.
        messages: role and content of each, the content as text.
        param: the field's name, for errors.

    Raises:
        ApiError: the template refuses the messages, with its reason; or there is none.
    """
    template = next(filter(None, map(_template, cards)), None)
    if template is None and not getattr(engine.tokenizer, "chat_template", None):
        what = "neither the base nor the adapter has a chat template: use /v1/completions"
        raise ApiError(400, f"`{param}`: {what}", param=param)
    try:
        text = render(engine.tokenizer, messages, prompt=True, template=template)
    except ValueError as error:
        raise ApiError(400, f"`{param}`: {error}", param=param) from None
    _require_short(engine, text, param)
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ApiError(400, f"`{param}`: the chat template makes an empty prompt of them", param=param)
    return tuple(ids)


def _require_short(engine: Engine, text: str, param: str) -> None:
    """Refuse a text that cannot fit the context, whatever its tokens are: to find them in megabytes takes seconds.

    Raises:
        ApiError: it is too long.
    """
    if engine.max_context is None:
        return
    size, most = len(text.encode()), engine.max_context * _longest_token(engine.tokenizer)
    if size > most:
        what = f"{size:,} bytes of text, more than the {engine.max_context:,} tokens of the context can hold"
        raise ApiError(400, f"`{param}`: {what}", param=param)


@functools.lru_cache(maxsize=8)
def _longest_token(tokenizer: Any) -> int:
    """The bytes of the longest token, as the vocabulary writes it: at least those of its text."""
    return max((len(token.encode()) for token in tokenizer.get_vocab()), default=1)


def _template(card: AdapterCard) -> str | None:
    """The chat template in an adapter's folder, if it has one."""
    folder = Path(card.folder)
    if not card.folder or not (folder / CHAT_TEMPLATE).is_file():
        return None
    try:
        return read_bytes(folder.resolve(), CHAT_TEMPLATE, _TEMPLATE_BYTES).decode()
    except (FileError, UnicodeDecodeError) as error:
        what = error.problems[0].what if isinstance(error, FileError) else "is not UTF-8 text"
        raise ApiError(400, f"the chat template of {show(card.name)} {what}") from None


def read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """(messages with their content as text, the problems of those that cannot be served as (field, problem))."""
    checked, problems = [], list[tuple[str, str]]()
    if not messages:
        problems.append(("messages", "is empty"))
    for i, message in enumerate(messages):
        where, role = f"messages.{i}", message.get("role")
        if role not in ROLES:
            what = "is missing" if role is None else f"must be one of {', '.join(ROLES)}, not {show(role)}"
            problems.append((f"{where}.role", what))
        if message.get("tool_calls") or message.get("function_call"):
            problems.append((where, "tool calls are not supported"))
        content = message.get("content")
        text = _text(content)
        if text is None:
            problems.append((f"{where}.content", _why_no_text(content)))
        kept = {key: value for key, value in message.items() if isinstance(value, str)}
        checked.append(kept | {"content": text or ""})
    return checked, problems


def _text(content: Any) -> str | None:
    """The text of a message's content: a text, or a list of parts that are texts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        return None
    return "".join(map(str, texts))


def _why_no_text(content: Any) -> str:
    if content is None:
        return "is missing"
    if isinstance(content, list) and content:
        kinds = {str(part.get("type")) if isinstance(part, dict) else type(part).__name__ for part in content}
        other = sorted(kinds - {"text"})
        return f"only text is supported, not {', '.join(map(show, other))}" if other else "a text part has no text"
    return f"must be a text or a list of text parts, not {'an empty list' if content == [] else type(content).__name__}"
