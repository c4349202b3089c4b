"""Ollama's Modelfile: a template that renders as the tokenizer's does, or the reason why there is none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import pytest

from lorary.adapters.export.ollama import export_ollama, modelfile
from lorary.adapters.export.ollama_template import chat_format
from lorary.builtin import path as builtin_path
from lorary.errors import FileError
from lorary.train.data.chat import CHATML
from tests import tiny
from tests.adapters.export.made import longer, plain
from tests.adapters.models import BASES

LLAMA = BASES[0]
HEADERS = (  # Llama 3's, with the BOS token that its tokenizer also puts before every text
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (  # no system message, and another name for the assistant
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN = (  # a default system message
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EXACT = {
    "ChatML": (CHATML, "<"),
    "Llama 3": (HEADERS, "<|eot_id|>"),
    "Gemma": (GEMMA, "<end_of_turn>"),
    "Qwen 2.5": (QWEN, "<|im_end|>"),
}


def tokenizer(template: Any, bos: bool = False) -> Any:
    """The built-in tokenizer with a chat template, and with a BOS token before every text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(builtin_path())
    if bos:
        found.add_special_tokens({"bos_token": "<s>"})
        template_of_texts = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", found.bos_token_id)])
        found.backend_tokenizer.post_processor = template_of_texts
    found.chat_template = template
    return found


def by_go(text: str, messages: list[dict[str, str]]) -> str:
    """A rendering of the few actions of Go's templates that are used, by way of Jinja."""
    actions = {
        "range .Messages": "{% for m in messages %}",
        "if not .System": "{% if messages[0].role != 'system' %}",
        ".Content": "{{ m.content }}",
    }
    opened: list[str] = []

    def action(match: re.Match[str]) -> str:
        words = match[1]
        if words == "end":
            return "{% endfor %}" if opened.pop() == "range" else "{% endif %}"
        if not words.startswith((".", "else")):
            opened.append(words.split()[0])
        role = re.fullmatch(r'(else )?if eq \.Role "(\w+)"', words)
        if role:
            return f"{{% {'el' if role[1] else ''}if m.role == '{role[2]}' %}}"
        return actions[words]

    translated = re.sub(r"\{\{ (.*?) \}\}", action, text)
    assert not opened
    return jinja2.Environment(keep_trailing_newline=True).from_string(translated).render(messages=messages)


def template_of(text: str) -> str:
    found = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


@pytest.mark.parametrize(("template", "stop"), EXACT.values(), ids=EXACT)
def test_the_template_renders_as_the_tokenizers_does(template: str, stop: str) -> None:
    bos = "bos_token" in template
    made = tokenizer(template, bos)
    text = modelfile(made, "llama3.2")
    go = template_of(text)
    turns = [("user", "a\n\nb {x}"), ("assistant", 'say "hi"'), ("user", "{% no %}"), ("assistant", ""), ("user", "?")]
    conversation = [{"role": role, "content": content} for role, content in turns]
    with_system = [{"role": "system", "content": "Be brief."}, *conversation]
    for messages in (conversation[:1], conversation, *([] if "model" in go else [with_system])):
        expected = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert by_go(go, messages) == expected.removeprefix("<s>" if bos else "")
    assert f'PARAMETER stop "{stop}' in text


UNTRANSLATED = {
    "no template": (None, False, "the tokenizer has no chat template, or several"),
    "a date": ("{{ strftime_now('%d %b') }}" + QWEN, False, "the chat template writes the date"),
    "answers that change once another turn follows": (
        QWEN.replace(
            "m['content'] +", "('' if loop.last or m['role'] == 'user' else '<think></think>') + m['content'] +"
        ),
        False,
        "the chat template ",
    ),
    "numbered turns": (
        "{% for m in messages %}{{ m['role'] ~ loop.index ~ m['content'] }}{% endfor %}",
        False,
        "the chat template does more than put fixed texts around each turn",
    ),
    "no BOS token, where the tokenizer has one": (QWEN, True, "the chat template has no fixed texts around each turn"),
    "an error": ("{{ raise_exception('no') }}", False, "the chat template has no fixed texts around each turn"),
    "a quote at its end": (
        QWEN.replace("<|im_start|>assistant\n", '"'),
        False,
        "the chat template writes marks of Ollama's own",
    ),
    "marks of Go's": (
        QWEN.replace("<|im_end|>", "' ~ '{' ~ '{' ~ '"),
        False,
        "the chat template writes marks of Ollama's own",
    ),
}


@pytest.mark.parametrize(("template", "bos", "reason"), UNTRANSLATED.values(), ids=UNTRANSLATED)
def test_another_template_is_not_written(template: Any, bos: bool, reason: str) -> None:
    made = tokenizer(template, bos)
    found, why = chat_format(made)
    assert found is None
    assert why.startswith(reason)
    text = modelfile(made, "./base.gguf")
    assert f"# no TEMPLATE: {why}; Ollama takes the one of the base's GGUF, if it has one\n" in text
    assert 'TEMPLATE "' not in text


def test_the_folder(tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text("of before")
    export_ollama(plain(), tmp_path, model=LLAMA.model())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Modelfile", "adapter.gguf"]
    assert (tmp_path / "Modelfile").read_text().splitlines() == [
        "# ollama create NAME -f Modelfile",
        "# base.gguf: of the base, by llama.cpp's convert_hf_to_gguf.py BASE --outfile base.gguf",
        "FROM ./base.gguf",
        "ADAPTER ./adapter.gguf",
        "# no TEMPLATE: no tokenizer was given; Ollama takes the one of the base's GGUF, if it has one",
    ]


@pytest.mark.parametrize("base", ["", " ", "a\nTEMPLATE x", "a\0b"])
def test_a_base_that_is_no_line_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"a Modelfile takes a file or the name of a model there"):
        export_ollama(plain(), tmp_path / "out", model=LLAMA.model(), base_gguf=base)
    assert not list(tmp_path.iterdir())


def test_rope_scaling_is_refused(tmp_path: Path) -> None:
    base = tiny.llama()
    with pytest.raises(FileError, match="context: it needs RoPE scaling, which a Modelfile cannot say"):
        export_ollama(longer(base, "linear"), tmp_path / "out", model=base)
    assert not list(tmp_path.iterdir())
