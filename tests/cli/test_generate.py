"""lorary generate: streamed, and many prompts of a file at once."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lorary
from lorary.cli._generation import Printer
from lorary.train.data.prompts import read_prompts
from tests.cli.command import Command
from tests.train.small import PLAIN_CHAT, tokenizer

PROMPTS = ["hello", "the answer is two", "hello world, the answer is three", "two", "is"]


@pytest.fixture
def model(command: Command) -> str:
    """A base of 300 tokens and 64 positions in fp32, and an adapter `run` for it."""
    assert command
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=1, pad_token_id=1, max_position_embeddings=64,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    made.save_pretrained("model")
    tokenizer(template=PLAIN_CHAT).save_pretrained("model")
    lorary.attach(made, lorary.plan(made, lorary.method("lora", r=4)))
    for parameter in (p for p in made.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.2)
    lorary.save(made, "run")
    return "model"


def completions(out: str) -> list[str]:
    return [json.loads(line)["completion"] for line in out.splitlines()]


@pytest.mark.parametrize("adapter", [False, True])
def test_a_batch_answers_as_each_prompt_alone(command: Command, model: str, adapter: bool) -> None:
    Path("prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    name = ("run", "--base", "model") if adapter else (model,)
    length = ("--max-new-tokens", "12")
    alone = [command("generate", *name, prompt, *length).out.removesuffix("\n") for prompt in PROMPTS]
    assert len(set(alone)) > 1
    for size in ("1", "2", "5"):
        ran = command("generate", *name, "--file", "prompts.txt", "-b", size, *length)
        assert ran.code == 0, ran.err
        assert completions(ran.out) == alone
        assert [json.loads(line)["prompt"] for line in ran.out.splitlines()] == PROMPTS


def test_rows_near_the_end_of_the_context_do_not_shorten_the_others(command: Command, model: str) -> None:
    long = "hello " * 12
    rows = [{"prompt": "hello"}, {"prompt": long}, {"prompt": "two"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = [command("generate", model, row["prompt"], "--max-new-tokens", "40").out[:-1] for row in rows]
    ran = command("generate", model, "--file", "rows.jsonl", "--out", "answers.jsonl", "--max-new-tokens", "40")
    assert (ran.code, ran.out) == (0, "")
    assert completions(Path("answers.jsonl").read_text()) == alone
    again = command("generate", model, "--file", "rows.jsonl", "--out", "answers.jsonl")
    assert again.err == (
        "error: nothing was written:\n  - answers.jsonl: exists already, and was not changed\n"
        "      hint: name another file\n"
    )
    assert completions(Path("answers.jsonl").read_text()) == alone


def test_draws_depend_on_the_seed_and_not_on_the_batch(command: Command, model: str) -> None:
    Path("prompts.txt").write_text("\n".join([*PROMPTS, "hello"]))
    options = ("--file", "prompts.txt", "--max-new-tokens", "12", "--temperature", "1")
    others = set(threading.enumerate())
    drawn = {
        (size, seed): completions(command("generate", model, *options, "-b", size, "--seed", seed).out)
        for size, seed in (("1", "3"), ("4", "3"), ("4", "4"))
    }
    assert drawn["1", "3"] == drawn["4", "3"]
    assert drawn["4", "3"] != drawn["4", "4"]
    assert drawn["1", "3"][0] != drawn["1", "3"][-1], "equal prompts are drawn independently"
    assert "lorary-engine" not in {thread.name for thread in set(threading.enumerate()) - others}


def generated(path: str | None = None) -> str:
    """The answer to "hello" by Transformers alone."""
    loaded: Any = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    if path is not None:
        lorary.load(loaded, path)
    texts = AutoTokenizer.from_pretrained("model")
    ids = torch.tensor([texts("hello")["input_ids"]])
    out = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return str(texts.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_generation_configuration_that_the_engine_does_not_know_is_kept(command: Command, model: str) -> None:
    without = generated()
    config = json.loads(Path("model/generation_config.json").read_text())
    Path("model/generation_config.json").write_text(json.dumps({**config, "repetition_penalty": 3.0}))
    assert generated() != without
    ran = command("generate", model, "hello", "--max-new-tokens", "12")
    assert ran.out == generated() + "\n"
    note = "note: computed without the serving engine: the model's generation configuration sets repetition_penalty\n"
    assert note in ran.err
    Path("model/generation_config.json").write_text(json.dumps({**config, "repetition_penalty": 1.0, "top_k": 20}))
    ran = command("generate", model, "hello", "--max-new-tokens", "12")
    assert (ran.out, "note:" in ran.err) == (without + "\n", False)


def test_an_adapter_without_a_serving_form_answers_all_the_same(command: Command, model: str) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    method = lorary.method("longlora", r=4, length=128, rope="dynamic", shifted=False).replace(full=())
    lorary.attach(base, lorary.plan(base, method))
    for parameter in (p for p in base.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.2)
    lorary.save(base, "long")
    ran = command("generate", "long", "hello", "--base", model, "--max-new-tokens", "12")
    assert ran.out == generated("long") + "\n"
    assert generated("long") != generated()
    assert "note: computed without the serving engine: " in ran.err
    assert "dynamic RoPE scaling" in ran.err
    far = command("generate", "long", "hello " * 40, "--base", model, "--max-new-tokens", "2")
    assert far.code == 0, "the context is the adapter's"


def test_conversations_and_texts_of_a_file(command: Command, model: str) -> None:
    asked = [{"role": "user", "content": "hello"}]
    Path("rows.jsonl").write_text(json.dumps({"messages": asked}) + "\n" + json.dumps({"prompt": "hello"}) + "\n")
    length = ("--max-new-tokens", "8")
    chat = command("generate", model, "hello", "--chat", *length).out[:-1]
    plain = command("generate", model, "hello", *length).out[:-1]
    mixed = command("generate", model, "--file", "rows.jsonl", *length)
    assert completions(mixed.out) == [chat, plain]
    assert json.loads(mixed.out.splitlines()[0])["messages"] == asked
    assert completions(command("generate", model, "--file", "rows.jsonl", "--chat", *length).out) == [chat, chat]


def test_streamed_text_is_the_same_text(command: Command, model: str) -> None:
    for prompt in PROMPTS:
        whole = command("generate", model, prompt, "--max-new-tokens", "24")
        streamed = command("generate", model, prompt, "--max-new-tokens", "24", "--stream")
        assert whole.out == streamed.out


def test_a_character_of_several_tokens_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    texts = tokenizer()
    ids = texts("naïve — 語 done", add_special_tokens=False)["input_ids"]
    printer = Printer(texts)
    printer.put(torch.tensor([[1, 2]]))  # the prompt
    pieces = []
    for i in ids:
        printer.put(torch.tensor([i]))
        pieces.append(capsys.readouterr().out)
    printer.end()
    assert len([piece for piece in pieces if piece]) > 5, "it streams"
    assert "".join(pieces) + capsys.readouterr().out == "naïve — 語 done\n"
    assert printer.text == "naïve — 語 done"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_the_template_of_the_run_is_used(command: Command, model: str) -> None:
    """As saved beside the adapter; a base without one is told what to give."""
    tokenizer().save_pretrained("model")
    Path("model/chat_template.jinja").unlink(missing_ok=True)
    refused = command("generate", model, "hello", "--chat")
    assert refused == (
        2,
        "",
        "error: cannot answer conversations:\n  - model: its tokenizer has no chat template, so it was probably not "
        "trained on conversations\n      hint: give one with --template: builtin:chatml, or a Jinja file\n",
    )
    Path("plain.jinja").write_text(PLAIN_CHAT)
    given = command("generate", "run", "hello", "--base", "model", "--chat", "--template", "plain.jinja")
    assert given.code == 0, given.err
    Path("run/chat_template.jinja").write_text(PLAIN_CHAT)
    assert command("generate", "run", "hello", "--base", "model", "--chat").out == given.out


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("none.txt", None, "cannot read none.txt:\n  - there is no such file"),
        ("none.jsonl", None, "it is not a regular file"),
        ("empty.txt", b"\n \n", "empty.txt has no prompts"),
        ("latin.txt", b"caf\xe9\n", "latin.txt: it is not UTF-8 text\n      hint: save it as UTF-8"),
        ("p.docx", b"x", "unknown file type `.docx`"),
        ("rows.jsonl", b'{"text": "a"}\n{"prompt": "b"}\n', "1 of 2 rows of rows.jsonl cannot be used:\n"
         "  - rows.jsonl:1: has neither a text `prompt` nor a list `messages` of {role, content}"),
        ("turns.jsonl", b'{"messages": [{"role": 1}]}\n', "turns.jsonl:1: has neither"),
        ("half.jsonl", b'{"prompt": "\\ud800"}\n', "half.jsonl:1: the prompt contains half of a surrogate"),
        ("long.txt", b"two\n" + b"hello " * 70, "long.txt:2: has "),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_read_are_named(
    command: Command, model: str, file: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        Path(file).write_bytes(content)
    ran = command("generate", model, "--file", file)
    assert (ran.code, ran.out) == (3, "")
    assert said in ran.err


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ messages[0]", "{{ x.y }}"]
)
def test_a_template_that_fails_is_said(command: Command, model: str, template: str) -> None:
    Path("bad.jinja").write_text(template)
    ran = command("generate", model, "hello", "--chat", "--template", "bad.jinja")
    assert (ran.code, "prompt: the chat template refuses it: " in ran.err) == (3, True), ran.err


def test_a_failure_before_the_first_answer_leaves_no_file(command: Command, model: str) -> None:
    Path("long.txt").write_text("hello " * 70)
    assert command("generate", model, "--file", "long.txt", "--out", "answers.jsonl").code == 3
    assert not Path("answers.jsonl").exists()


def test_a_seed_has_32_bits(command: Command, model: str) -> None:
    ran = command("generate", model, "hello", "--temperature", "1", "--seed", str(2**64))
    assert (ran.code, "--seed" in ran.err) == (2, True)


def test_only_line_ends_end_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("one\u2028two\x0cthree\r\n\r\nfour".encode())
    found = [(prompt.value, prompt.where) for prompt in read_prompts(tmp_path / "p.txt")]
    assert found == [("one\u2028two\x0cthree", "p.txt:1"), ("four", "p.txt:3")]


def test_options_that_exclude_each_other_are_refused(command: Command, model: str) -> None:
    ran = command("generate", model, "hello", "--file", "prompts.txt")
    assert ran.err == (
        "error: conflicting options:\n  - --file: names the prompts, and one is an argument\n"
        "      hint: keep one of the two\n"
    )
    ran = command("generate", model, "hello", "--out", "x.jsonl")
    assert (ran.code, "--out: has no effect without --file" in ran.err) == (2, True)
