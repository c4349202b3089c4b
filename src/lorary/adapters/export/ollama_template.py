"""A chat template of Transformers (Jinja) as one of Ollama (Go): where each turn is a fixed text around its content.

The texts are read off renderings of a few conversations, and the result is compared with further ones. A template that
does more (dates, reasoning that is left out later, tools, other roles) is not translated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Messages = list[dict[str, str]]

_ROLES = ("system", "user", "assistant")
_U, _A, _V, _S = ("<first question>", "<first answer>", "<second question>", "<instruction>")
_PROBES = (  # roles of the conversations that are compared
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)


class ChatFormat(NamedTuple):
    """The fixed texts of a chat template.

    Args:
        default: before a conversation without a system message.
        around: role -> the texts before and after the content of a turn; without `system` where it takes none.
        prompt: the start of the next answer.
    """

    default: str
    around: dict[str, tuple[str, str]]
    prompt: str

    def render(self, messages: Messages) -> str:
        """A conversation up to the start of the next answer."""
        turns = "".join(m["content"].join(self.around[m["role"]]) for m in messages)
        return ("" if messages[0]["role"] == "system" else self.default) + turns + self.prompt

    def go(self) -> str:
        """The template in Go's language."""
        found = f"{{{{ if not .System }}}}{self.default}{{{{ end }}}}" if self.default else ""
        found += "{{ range .Messages }}"
        for i, (role, (before, after)) in enumerate(self.around.items()):
            found += f'{{{{ {"else " if i else ""}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        return found + "{{ end }}{{ end }}" + self.prompt


def chat_format(tokenizer: Any) -> tuple[ChatFormat | None, str]:
    """(the format of a tokenizer's chat template, why it has none that Ollama could follow exactly)."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        return None, "the tokenizer has no chat template, or several"
    if "strftime_now" in template:
        return None, "the chat template writes the date"
    try:
        found = _read_off(tokenizer)
        conversations = [_conversation(roles) for roles in _PROBES if set(roles) <= set(found.around)]
        differs = any(found.render(messages) != _render(tokenizer, messages) for messages in conversations)
    except Exception as error:  # a template is a program; and what was sought in its text may not be there
        return None, f"the chat template has no fixed texts around each turn ({type(error).__name__})"
    if differs:
        return None, "the chat template does more than put fixed texts around each turn"
    texts = "".join([found.default, found.prompt, *map("".join, found.around.values())])
    if "{{" in texts or '"""' in texts or found.go().endswith('"'):  # the quotes around a template end at the first
        return None, "the chat template writes marks of Ollama's own"
    return found, ""


def _read_off(tokenizer: Any) -> ChatFormat:
    """The fixed texts, from renderings of conversations that grow by one turn each."""
    turns = [{"role": role, "content": text} for role, text in zip(_ROLES, (_S, _U, _A), strict=True)]
    asked, answered = _render(tokenizer, turns[1:2], prompt=False), _render(tokenizer, turns[1:], prompt=False)
    again = _render(tokenizer, [*turns[1:], {"role": "user", "content": _V}], prompt=False)
    before_answer, after_answer = answered.removeprefix(asked).split(_A)
    before_user, after_user = again.removeprefix(answered).split(_V)
    around = {"user": (before_user, after_user), "assistant": (before_answer, after_answer)}
    question = f"{before_user}{_U}{after_user}"
    try:
        before, after = _render(tokenizer, turns[:2], prompt=False).removesuffix(question).split(_S)
        around = {"system": (before, after), **around}
    except Exception:  # it takes no system message
        pass
    prompt = _render(tokenizer, turns[1:2]).removeprefix(asked)
    return ChatFormat(asked.removesuffix(question), around, prompt)


def _render(tokenizer: Any, messages: Messages, prompt: bool = True) -> str:
    """A conversation as text, without the BOS token that the tokenizer, and so llama.cpp, puts before every text.

    Raises:
        ValueError: the template lacks that token.
    """
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return text
    if not text.startswith(tokenizer.bos_token):
        raise ValueError(f"the chat template does not begin with {tokenizer.bos_token}")
    return text.removeprefix(tokenizer.bos_token)


def _conversation(roles: tuple[str, ...]) -> Messages:
    return [{"role": role, "content": f"turn {i}, of the {role}"} for i, role in enumerate(roles)]
