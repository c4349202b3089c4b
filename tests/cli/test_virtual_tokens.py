"""A prefix and a prompt on the command line, as PEFT saves them: without `lorary.json`."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorary
from lorary.adapters.resolve import needs_base
from tests.cli.command import Command
from tests.train.small import PLAIN_CHAT, tokenizer

POSITIONS, TAKEN = 64, 4  # of which 60 are left for the text


def saved_by_peft(name: str, **options: int) -> Path:
    """An adapter without `lorary.json`, beside its base, which it does not name by a path."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=1, pad_token_id=1, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    made.save_pretrained("base")
    tokenizer(template=PLAIN_CHAT, extra=("<|start|>", "<|end|>")).save_pretrained("base")
    lorary.attach(made, lorary.plan(made, lorary.method(name, **options)))
    for parameter in (p for p in made.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.5)
    lorary.save(made, "adapter")
    Path("adapter/lorary.json").unlink()
    Path("rows.jsonl").write_text("".join(json.dumps({"text": "hello world " * 60}) + "\n" for _ in range(2)))
    return Path("adapter")


@pytest.fixture(params=["prefix-tuning", "prompt-tuning"])
def folder(request: pytest.FixtureRequest, command: Command) -> Path:
    """In the folder of the test."""
    return saved_by_peft(request.param, tokens=TAKEN)


def test_it_works_where_an_adapter_folder_does(folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs_base(folder)
    base = ("--base", "base")
    ran = command("generate", str(folder), "hello", *base, "--max-new-tokens", "2")
    assert ran.code == 0, ran.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    ran = command("chat", str(folder), *base, "--max-new-tokens", "2")
    assert ran.code == 0, ran.err
    ran = command("eval", "base", str(folder), *base, "--data", "rows.jsonl", "--json", "--quiet")
    assert ran.code == 0, ran.err
    own, adapted = json.loads(ran.out)["results"]
    assert own["loss"] != adapted["loss"]
    assert own["rows"] == adapted["rows"] == 2 * 4  # 182 tokens each, in rows of 60: in rows of 64 they would be 3


@pytest.mark.parametrize("name", ["ia3", "vera"])
def test_so_do_others_whose_layers_only_the_base_knows(name: str, command: Command) -> None:
    folder = saved_by_peft(name, **({"r": 4} if name == "vera" else {}))
    assert needs_base(folder)
    base = ("--base", "base")
    ran = command("eval", "base", str(folder), *base, "--data", "rows.jsonl", "--json", "--quiet")
    assert ran.code == 0, ran.err
    own, adapted = json.loads(ran.out)["results"]
    assert own["loss"] != adapted["loss"]
    for form in ("peft", "merged"):
        ran = command("export", str(folder), form, "--to", form, *base)
        assert ran.code == 0, ran.err
    merged = LlamaForCausalLM.from_pretrained("merged")
    ids = torch.arange(8)[None]
    wanted = lorary.load(LlamaForCausalLM.from_pretrained("base"), folder)(ids).logits
    assert torch.allclose(merged(ids).logits, wanted, atol=1e-4)
    ran = command("export", str(folder), "lost", "--to", "merged")
    assert "it does not name its base\n      hint: give --base MODEL" in ran.err
    assert not Path("lost").exists()


def test_without_its_base_it_says_what_to_name(folder: Path, command: Command) -> None:
    for name in ("inspect adapter", "eval", "chat", "merge"):
        more = {"eval": ("--data", "rows.jsonl"), "merge": ("merged",)}.get(name, ())
        ran = command(*name.split(), str(folder), *more)
        assert ran.code == 4
        assert "it does not name its base\n      hint: give --base MODEL" in ran.err


def test_it_changes_no_weight_to_merge_or_inspect(folder: Path, command: Command) -> None:
    for arguments in (("merge", str(folder), "merged"), ("inspect", "adapter", str(folder))):
        ran = command(*arguments, "--base", "base")
        assert ran.code in (1, 2)
        assert "stands before the text, which no weight and bias can" in ran.err
        assert "keep it attached: the base with the adapter computes it" in ran.err
    assert not Path("merged").exists()


def test_a_damaged_configuration_is_refused_by_its_reader(folder: Path, command: Command) -> None:
    for text in ("{", "[]", '{"peft_type": ["PREFIX_TUNING"]}'):
        (folder / "adapter_config.json").write_text(text)
        assert not needs_base(folder)
        ran = command("inspect", "adapter", str(folder), "--base", "base")
        assert ran.code == 4
        assert ran.err.startswith("error: cannot load ")
        assert "adapter_config.json" in ran.err
