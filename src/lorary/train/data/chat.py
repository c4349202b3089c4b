"""Conversations as token ids with a loss mask, rendered by the tokenizer's chat template.

If the template marks the answers with `{% generation %}`, these marks are the mask. Otherwise the conversation is
rendered up to and through each answer, which requires that every rendering begins with the previous one; a template
that breaks this is refused.
"""

from __future__ import annotations

import re
from typing import Any

from lorary.errors import DataError, Diagnostic, did_you_mean
from lorary.files.home import expanded
from lorary.model.loading import prompt_tokens
from lorary.train.data._messages import Messages
from lorary.train.data.row_formats import Chat

# Answers end with the tokenizer's own EOS, so that a model that has never seen `<|im_end|>` learns to stop.
# Tools and calls are written as Qwen 2.5 and Hermes do.
CHATML = """{%- if tools -%}
{{- '<|im_start|>system\\nThe tools:\\n<tools>\\n' -}}
{%- for tool in tools -%}{{- tool | tojson + '\\n' -}}{%- endfor -%}
{{- '</tools><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- message['content'] -}}
{%- for call in message['tool_calls'] or [] -%}
{{- '\\n' if message['content'] or not loop.first else '' -}}
{{- '<tool_call>\\n{"name": ' + call['function']['name'] | tojson -}}
{{- ', "arguments": ' + call['function']['arguments'] | tojson + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- eos_token -}}
{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
_MARK = re.compile(r"\{%-?\s*generation\b")
TEMPLATES = {"builtin:chatml": CHATML}
Masked = tuple[list[int], list[bool]]  # token ids, and whether each is in the loss


def use_template(tokenizer: Any, name: str | None) -> None:
    """Give `tokenizer` the chat template `name`, built-in or a Jinja file; None keeps its own.

    Raises:
        DataError: the template cannot be read.
    """
    if name is None:
        return
    if name in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[name]
        return
    try:
        text = expanded(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = did_you_mean(name, list(TEMPLATES)) if name.startswith("builtin:") else f"or use {', '.join(TEMPLATES)}"
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        problem = Diagnostic("data.chat_template", f"cannot read `{name}`: {reason}", known)
        raise DataError("unknown chat template:", [problem]) from None
    tokenizer.chat_template = text


def require_template(tokenizer: Any, where: str) -> None:
    """Refuse conversations for a tokenizer without a chat template.

    Raises:
        DataError: it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        what = "the rows are conversations, and the tokenizer has no chat template to render them with"
        fix = f"set data.chat_template: {next(iter(TEMPLATES))}, or to a Jinja file"
        raise DataError("cannot render the conversations:", [Diagnostic(where, what, fix)])


def render(tokenizer: Any, messages: Messages, tools: Any = None, prompt: bool = False) -> str:
    """The conversation as text; with `prompt`, up to the start of the next answer.

    Raises:
        ValueError: the template refuses these messages, with its own reason, or leaves out their tool calls.
    """
    try:
        text = prompt_tokens.render(tokenizer, messages, tools, prompt)
    except ValueError as error:
        fix = "; data.chat_template: builtin:chatml renders tools" if _uses_tools(messages) else ""
        raise ValueError(f"{error}{fix}") from None
    _require_calls(text, messages)
    return text


def _uses_tools(messages: Messages) -> bool:
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def _require_calls(text: str, messages: Messages) -> None:
    """Refuse a rendering without the names of the functions that are called: empty answers would be trained."""
    for i, message in enumerate(messages):
        for call in message.get("tool_calls") or []:
            if call["function"]["name"] not in text:
                raise ValueError(
                    f"the chat template leaves out the tool calls of message {i}; use one that renders tools, such as "
                    "data.chat_template: builtin:chatml"
                )


def encode(tokenizer: Any, chat: Chat) -> list[Masked]:
    """The token ids of a conversation, and whether each is in the loss.

    Several rows, one per answer, where the template renders an answer otherwise once more follows: those of reasoning
    models drop the reasoning of earlier turns. Each answer is then trained after the text that precedes it when the
    model is used.

    Raises:
        ValueError: the template refuses the messages, or its rendering of an answer does not continue the prompt's.
    """
    text = render(tokenizer, chat.messages, chat.tools)
    answers = tuple(turn["role"] == "assistant" for turn in chat.messages)
    template = tokenizer.get_chat_template(None, chat.tools)  # of several, the one for tools
    if _MARK.search(template) and chat.learn == answers:
        marked = tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        if any(marked["assistant_masks"]):
            return [(list(marked["input_ids"]), [bool(bit) for bit in marked["assistant_masks"]])]
    learned = [i for i, learn in enumerate(chat.learn) if learn]
    renderings = [_answer(tokenizer, chat, i) for i in learned]
    if all(text.startswith(through) for _, through in renderings):
        return [mask_spans(tokenizer, text, [(len(before), len(through)) for before, through in renderings])]
    return [mask_spans(tokenizer, through, [(len(before), len(through))]) for before, through in renderings]


def mask_spans(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> Masked:
    """The token ids of `text`, and whether each begins in one of the character `spans`, which are in order."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    mask, at = [], 0
    for start, end in offsets:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        mask.append(at < len(spans) and spans[at][0] <= start and end > start)
    return list(encoded["input_ids"]), mask


def _answer(tokenizer: Any, chat: Chat, i: int) -> tuple[str, str]:
    """The texts of a conversation up to its answer `i`, and through it."""
    before = render(tokenizer, chat.messages[:i], chat.tools, prompt=True) if i else ""
    through = render(tokenizer, chat.messages[: i + 1], chat.tools)
    if not through.startswith(before):
        raise ValueError(
            f"the chat template renders what precedes message {i} differently when the answer follows, so the answer "
            "cannot be separated from the rest; use a template with {% generation %} marks, such as "
            "data.chat_template: builtin:chatml"
        )
    return before, through
