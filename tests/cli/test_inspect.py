"""lorary inspect context, on real models and files."""

from __future__ import annotations

import json
import math
import weakref
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

import lorary
from lorary import builtin
from lorary.adapters import resolve
from tests import tiny
from tests.cli.command import Command
from tests.train.small import tokenizer

SMALL = ("--tokens", "512", "--passkeys", "0")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Python's own source: some 3,000 tokens of the built-in base."""
    path = tmp_path_factory.mktemp("text") / "held.jsonl"
    source = Path(json.__file__).with_name("decoder.py").read_text(encoding="utf-8")
    path.write_text("".join(json.dumps({"text": source[i : i + 4000]}) + "\n" for i in (0, 4000, 8000)))
    return str(path)


def table(folder: Path, positions: int, **changes: Any) -> str:
    """A GPT-2 with a learnt table of so many positions, and its tokenizer."""
    words = tokenizer()
    tiny.seeded("GPT2LMHeadModel", vocab_size=len(words), n_positions=positions, **changes).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def test_the_numbers_are_the_models_own(command: Command, text: str) -> None:
    ran = command("inspect", "context", "builtin:base", "--lengths", "64,256", "--data", text, *SMALL, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert (found["data"], found["tokens"]) == (text, 512)
    (one,) = found["models"]
    assert (one["model"], one["known"], one["passkeys"]) == ("builtin:base", 256, [])
    model = resolve.load_with_adapter(resolve.find_model("builtin:base")[1], None)  # in this machine's precision
    words = builtin.load_tokenizer()
    rows = [json.loads(line)["text"] for line in Path(text).read_text().splitlines()]
    stream = [i for row in rows for i in [*words(row)["input_ids"], words.eos_token_id]]
    stretches = [stream[:256], stream[-256:]]
    for length in one["lengths"]:
        size = length["tokens"]
        windows = torch.tensor([s[i : i + size] for s in stretches for i in range(0, 256, size)])
        with torch.no_grad():
            own = float(model(input_ids=windows, labels=windows).loss)
        assert length["windows"] == len(windows)
        assert length["perplexity"] == pytest.approx(math.exp(own), rel=1e-4 if model.dtype == torch.float32 else 2e-3)
    assert sum(b["predicted"] for b in one["positions"]) == 2 * 255
    assert [length["perplexity"] > 1 for length in one["lengths"]] == [True, True]


def test_a_run_is_compared_with_its_base_and_everything_is_written(
    command: Command, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base: Any = builtin.load_model()
    lorary.save(tiny.trained(base), "run/adapter")
    alive: list[weakref.ref[Any]] = []

    def watched(*arguments: Any) -> Any:
        assert all(model() is None for model in alive), "two models at once"
        model = resolve.load_with_adapter(*arguments)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr("lorary.cli._context.run.load_with_adapter", watched)
    asked = ("--lengths", "64,128", "--data", text, "--tokens", "256", "--passkeys", "1", "--out", "seen")
    ran = command("inspect", "context", "builtin:base", "run", *asked)
    assert ran.code == 0
    assert ran.err == (
        "note: passkeys need 99 tokens or more with the tokenizer of builtin:base: none at 64\n"
        "note: passkeys need 99 tokens or more with the tokenizer of run: none at 64\n"
        "wrote seen/context.html, context.json and context.svg\n"
    )
    assert len(alive) == 2
    found = json.loads(Path("seen/context.json").read_text())
    first, second = found["models"]
    assert [m["model"] for m in found["models"]] == ["builtin:base", "run"]
    assert all(a["nats"] != b["nats"] for a, b in zip(first["lengths"], second["lengths"], strict=True))
    assert {cell["length"] for cell in first["passkeys"]} == {128}
    assert all(math.isfinite(cell["gain"]) and cell["trials"] == 1 for cell in second["passkeys"])
    for shown in (f"{first['lengths'][1]['perplexity']:.2f}", f"{second['lengths'][0]['nats']:.4f}", "0/5"):
        assert shown in ran.out
    page, picture = Path("seen/context.html").read_text(), Path("seen/context.svg").read_text()
    assert "context 256" not in picture, "what lies beyond the longest length is not drawn"
    assert ET.fromstring(picture).tag.endswith("svg")
    assert page.count("<svg") == 2
    assert "http-equiv" in page
    again = command("inspect", "context", "builtin:base", "--lengths", "64", "--data", text, *SMALL, "--out", "seen")
    assert again.code == 0
    assert len(json.loads(Path("seen/context.json").read_text())["models"]) == 1, "what stood there was replaced"


def test_a_learnt_table_is_read_to_its_end_and_no_further(command: Command, text: str) -> None:
    model = table(Path("gpt2"), 512)
    ran = command("inspect", "context", model, "--data", text, "--tokens", "512", "--passkeys", "1", "--json")
    assert ran.code == 0
    (one,) = json.loads(ran.out)["models"]
    assert [length["tokens"] for length in one["lengths"]] == [128, 256, 512], "none beyond the table"
    assert {cell["length"] for cell in one["passkeys"]} == {256, 512}, "at its very end as well"


def test_every_reason_at_once(command: Command, text: str) -> None:
    model = table(Path("gpt2"), 48)
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    ran = command("inspect", "context", model, "./nowhere", "--lengths", "0,1e3,64,2048", "--out", "mine")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "error: cannot measure the use of context:\n"
        "  - --lengths 0: is not a number of tokens, 2 or more\n"
        "      hint: such as 256,512,1024\n"
        "  - --lengths 1e3: is not a number of tokens, 2 or more\n"
        "      hint: such as 256,512,1024\n"
        "  - --lengths 64, 2,048: gpt2 has learned embeddings of 48 positions only\n"
        "      hint: use at most 48\n"
        "  - --out mine: holds files that are not from this command: thesis.txt\n"
        "      hint: name another folder\n"
        "  - ./nowhere: there is no such folder\n"
    )
    assert Path("mine/thesis.txt").read_text() == "years of work"
    lost = command("inspect", "context", "./nowhere", "./neither")
    assert lost.code == 4
    assert lost.err.count("there is no such folder") == 2
    idle = command("inspect", "context", model, "--base", "builtin:base", "--data", text)
    assert idle.code == 4
    assert "--base builtin:base: none of the models is an adapter" in idle.err


def test_too_little_text_leaves_a_length_out_or_is_an_error(command: Command) -> None:
    Path("short.jsonl").write_text(json.dumps({"text": "def parse(text):\n    return text.split()\n" * 8}) + "\n")
    asked = ("inspect", "context", "builtin:base", "--data", "short.jsonl", *SMALL, "--json")
    ran = command(*asked, "--lengths", "16,4096,8192")
    assert ran.code == 0
    assert "tokens: too few for a length of 4,096, 8,192, which is left out" in ran.err
    assert [length["tokens"] for length in json.loads(ran.out)["models"][0]["lengths"]] == [16]
    none = command(*asked, "--lengths", "4096")
    assert none.code == 3
    assert none.err.startswith("error: not enough text:\n  - short.jsonl: has ")
    wrong = command("inspect", "context", "builtin:base", "--data", "builtin:pyton")
    assert wrong.code == 3
    assert "did you mean `builtin:python`" in wrong.err


def test_a_tokenizer_with_more_tokens_than_its_model_is_refused(command: Command, text: str) -> None:
    model = table(Path("gpt2"), 48)
    tiny.seeded("GPT2LMHeadModel", vocab_size=40).save_pretrained("gpt2")
    ran = command("inspect", "context", model, "--data", text, "--lengths", "16")
    assert ran.code == 3
    assert "but the model has only 40" in ran.err
