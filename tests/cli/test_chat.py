"""lorary chat: turns, adapters, a full context, an interrupt; through a pipe as a user would script it."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lorary
from lorary.cli._chat import names_of
from lorary.cli._generation import Printer
from tests.cli.command import Command, Ran
from tests.train.small import PLAIN_CHAT, tokenizer

LENGTH = 6


@pytest.fixture
def talk(command: Command, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`talk(lines, "one")` pipes lines into `lorary chat one`, beside a base and two adapters."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=1, pad_token_id=1, max_position_embeddings=128,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    made.save_pretrained("base")
    tokenizer(template=PLAIN_CHAT, extra=("<|start|>", "<|end|>")).save_pretrained("base")
    for seed, name in enumerate(("one", "two")):
        lorary.attach(made, lorary.plan(made, lorary.method("lora", r=4)))
        for parameter in (p for p in made.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed))
        lorary.save(made, name)
        lorary.detach(made)

    def run(lines: list[str], *arguments: str) -> Ran:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return command("chat", *arguments, "--max-new-tokens", str(LENGTH))

    return run


def answers(turns: list[str], adapter: str | None = None, system: str = "") -> list[str]:
    """The same conversation with Transformers alone."""
    model: Any = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    if adapter is not None:
        lorary.load(model, adapter)
    texts = tokenizer(template=PLAIN_CHAT, extra=("<|start|>", "<|end|>"))
    messages = [{"role": "system", "content": system}] if system else []
    found = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        text = texts.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([texts(text, add_special_tokens=False)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False)
        found.append(texts.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": found[-1]})
    return found


def test_turns_build_on_each_other(talk: Any) -> None:
    turns = ["hello", "the answer?", "two"]
    ran = talk([turns[0], "", *turns[1:]], "base")
    assert ran.code == 0, ran.err
    expected = answers(turns)
    assert ran.out == "".join(f"{text}\n" for text in expected)
    assert answers(["two"])[0] != expected[2], "the answer depends on the turns before"


def test_adapters_are_switched_in_a_conversation(talk: Any) -> None:
    ran = talk(
        ["hello", "/reset", "/adapter two", "hello", "/reset", "/adapter off", "hello"], "one", "two", "--base", "base"
    )
    assert ran.code == 0, ran.err
    expected = [answers(["hello"], name)[0] for name in ("one", "two", None)]
    assert len(set(expected)) == 3
    assert ran.out == "".join(f"{text}\n" for text in expected)
    with_base_first = talk(["/adapter", "hello"], "base", "two")
    assert with_base_first.out == f"{expected[1]}\n"
    assert with_base_first.err.startswith("[two]  off\n")


def test_system_message_and_reset(talk: Any) -> None:
    ran = talk(["two", "/system hello world", "the answer", "/reset", "three", "/system", "two"], "base")
    alone, told, told_again = (
        answers(["two"])[0],
        answers(["the answer"], system="hello world")[0],
        answers(["three"], system="hello world")[0],
    )
    assert ran.out == f"{alone}\n{told}\n{told_again}\n{alone}\n"
    assert "a new conversation, with the system message 'hello world'" in ran.err
    assert talk(["the answer"], "base", "--system", "hello world").out == f"{told}\n"


def test_commands_that_are_none_are_not_sent(talk: Any) -> None:
    ran = talk(["/adaptor two", "/adapter tow", "/help", "/quit", "hello"], "one", "two", "--base", "base")
    assert (ran.code, ran.out) == (0, "")
    assert "/adaptor is not a command, and was not sent: did you mean `adapter`?" in ran.err
    assert "there is no adapter `tow`: did you mean `two`" in ran.err
    assert "/adapter NAME    switch to it" in ran.err


def test_a_full_context_is_told_and_the_conversation_goes_on(talk: Any) -> None:
    ran = talk(["hello " * 60, "two"], "base")
    assert ran.code == 0
    assert "not sent: with it the conversation has " in ran.err
    assert "and the context is 128: /reset" in ran.err
    assert ran.out == answers(["two"])[0] + "\n"


def test_a_conversation_that_the_engine_has_no_memory_for_goes_on(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    talk([], "base")  # the folders
    monkeypatch.setattr("lorary.cli.chat._MOST_TOKENS", 64)
    monkeypatch.setattr("lorary.cli._generation_engine._SPARE", 0)
    long = ("two " * 30).strip()
    ran = talk(["hello", "/reset", long, "hello"], "base")
    assert ran.out == "".join(f"{text}\n" for text in [*answers(["hello"]), *answers([long, "hello"])])
    note = "note: computed without the serving engine: the prompt and its answer may take "
    assert ran.err.count(note) == 1, ran.err
    assert ran.err.index("a new conversation") < ran.err.index(note), "the first turn fits"


def test_an_adapter_without_a_serving_form_can_be_switched_to(talk: Any) -> None:
    talk([], "base")  # the folders
    base: Any = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    method = lorary.method("longlora", r=4, length=256, rope="dynamic", shifted=False).replace(full=())
    lorary.attach(base, lorary.plan(base, method))
    for parameter in (p for p in base.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3)
    lorary.save(base, "long")
    turns = ["hello", "/reset", "/adapter long", "hello", "/reset", "/adapter one", "hello"]
    ran = talk(turns, "one", "long", "--base", "base")
    expected = [answers(["hello"], name)[0] for name in ("one", "long", "one")]
    assert ran.out == "".join(f"{text}\n" for text in expected)
    assert ran.err.count("note: computed without the serving engine: ") == 1, ran.err


def test_an_answer_that_is_cut_off_is_told(talk: Any) -> None:
    ran = talk(["hello"], "base")
    assert f"cut off after {LENGTH} tokens: --max-new-tokens allows more" in ran.err
    # "hello " is 2 tokens: the conversation nearly fills the context
    texts = tokenizer(template=PLAIN_CHAT, extra=("<|start|>", "<|end|>"))

    def length(words: int) -> int:
        turn = [{"role": "user", "content": ("two " * words).strip()}]
        return len(texts(texts.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))["input_ids"])

    words = max(n for n in range(1, 128) if length(n) <= 126)
    assert "cut off: the context of 128 tokens is full; /reset begins again" in talk(["two " * words], "base").err


def test_an_interrupt_stops_the_answer_and_not_the_program(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put, calls = Printer.put, []

    def interrupted(printer: Printer, value: Any) -> None:
        put(printer, value)
        calls.append(value)
        if len(calls) == 4:  # the prompt and three tokens
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Printer, "put", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        ran = talk(["hello", "two"], "base")
    finally:
        signal.signal(signal.SIGINT, before)
    assert ran.code == 0
    first, second = ran.out.split("\n")[:2]
    three = [int(token) for token in calls[1:4]]
    assert first == AutoTokenizer.from_pretrained("base").decode(three)
    assert 1 not in three, "it would have ended by itself"
    assert LENGTH > 3
    assert "stopped" in ran.err
    assert second, "the next answer comes"


def test_a_base_without_a_template_is_told(talk: Any) -> None:
    tokenizer().save_pretrained("base")
    Path("base/chat_template.jinja").unlink(missing_ok=True)
    ran = talk(["hello"], "base")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "error: cannot chat:\n  - base: its tokenizer has no chat template, so it was probably not trained on "
        "conversations\n      hint: give one with --template: builtin:chatml, or a Jinja file\n"
    )
    Path("mine.jinja").write_text(PLAIN_CHAT)
    assert talk(["hello"], "base", "--template", "mine.jinja").code == 0
    assert "cannot read `nothing.jinja`" in talk([], "base", "--template", "nothing.jinja").err


def test_adapters_that_do_not_fit_are_refused(talk: Any) -> None:
    ran = talk([], "one", "base", "--base", "base")
    assert (ran.code, ran.err) == (
        4,
        "error: cannot chat with base:\n  - base: there is no adapter in it: it is a whole model\n",
    )
    other = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    lorary.attach(other, lorary.plan(other, lorary.method("lora", r=2)))
    for parameter in other.parameters():
        torch.nn.init.ones_(parameter)
    lorary.save(other, "other")
    ran = talk(["/adapter other", "hello"], "one", "other", "--base", "base")
    assert "the adapter does not fit this model:" in ran.err
    assert ran.out == answers(["hello"], "one")[0] + "\n"


def test_adapters_have_short_names() -> None:
    assert names_of(["runs/a", "b/adapter", "/x/a/", "off", "ann/sql"]) == {
        "a": "runs/a",
        "b": "b/adapter",
        "a-2": "/x/a/",
        "off-2": "off",
        "sql": "ann/sql",
    }


def test_a_line_that_is_not_utf8_is_refused_alone(talk: Any, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    talk([], "base")  # the folders
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhello\n"), encoding="utf-8"))
    ran = command("chat", "base", "--max-new-tokens", str(LENGTH))
    assert (ran.code, "not sent: the conversation contains half of a surrogate pair" in ran.err) == (0, True), ran.err
    assert ran.out.splitlines() == answers(["hello"])[0].splitlines()
