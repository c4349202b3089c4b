"""Prompts as tokens: a text with the tokenizer's own BOS, a conversation through the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text with the tokenizer's own BOS, once, and without the EOS or separator that some append."""
    ids = list(tokenizer(text)["input_ids"])
    if not text:  # Transformers gives some tokenizers an EOS alone
        ids = [i for i in ids if i == tokenizer.bos_token_id]
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        del ids[0]  # the text begins with a BOS of its own
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    if len(ids) > 1 and ids[-1] in ends and tokenizer(text, add_special_tokens=False)["input_ids"][-1:] != ids[-1:]:
        ids.pop()  # the tokenizer's own
    return ids


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Any = None,
    prompt: bool = False,
    template: str | None = None,
) -> str:
    """A conversation as text.

    Args:
        tokenizer: with a chat template, unless `template` is given.
        messages: role and content of each.
        tools: for the template.
        prompt: end with the start of the next answer.
        template: Jinja source, instead of the tokenizer's.

    Raises:
        ValueError: the template refuses these messages, with its own reason.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # a template is a program
        raise ValueError(f"the chat template refuses it: {str(error) or type(error).__name__}") from None
    return str(text)
