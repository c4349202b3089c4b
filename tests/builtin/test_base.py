"""The shipped base: an ordinary, small, honest model folder that a Transformers user can open."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
from safetensors import safe_open

from lorary import builtin
from lorary.builtin import corpora
from lorary.errors import FileError

CONTEXT = 256


@pytest.fixture(scope="module")
def tokenizer():
    return builtin.load_tokenizer()


@pytest.fixture(scope="module")
def model():
    return builtin.load_model()


@pytest.fixture(scope="module")
def report():
    return json.loads((builtin.path() / "report.json").read_text())


def windows(tokenizer, name: str, count: int) -> torch.Tensor:
    """`count` evenly spaced windows [count, CONTEXT] of the held-out files."""
    stream = [i for r in corpora.load(name, "validation", fallback=True) for i in tokenizer(r["text"])["input_ids"]]
    every = torch.tensor(stream[: len(stream) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    return every[torch.linspace(0, len(every) - 1, count).long()]


@torch.no_grad()
def loss(model, ids: torch.Tensor) -> float:
    return float(model(input_ids=ids, labels=ids).loss)


def test_the_folder_is_small_and_whole():
    files = {file.name: file.stat().st_size for file in builtin.path().iterdir()}
    assert set(files) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 8 * 10**6


def test_no_file_names_the_machine_it_was_made_on():
    for file in builtin.path().iterdir():
        if file.suffix != ".safetensors":
            assert not re.search(r"/(root|home|work|tmp|Users)/", file.read_text())
    with safe_open(builtin.path() / "model.safetensors", "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}


def test_it_is_three_million_parameters_in_bf16(model, report):
    assert model.num_parameters() == report["parameters"] == 3_049_920
    assert model.dtype == torch.float32  # as asked for by default
    assert not model.training
    with safe_open(builtin.path() / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert builtin.load_model("bfloat16").dtype == torch.bfloat16


def test_it_has_learnt_what_the_report_says(model, tokenizer, report):
    figures = {domain: loss["nats_per_token"] for domain, loss in report["held_out"].items()}
    assert figures["code"] < 2.70  # measured: 2.653 code, 2.952 C headers, 3.483 topics
    assert figures["c-headers"] < 3.0
    assert figures["topics"] < 3.55
    assert report["steps"] == report["recipe"]["steps"]
    # Another Python has another library, and sixteen windows are a sample: hence the margin.
    assert loss(model, windows(tokenizer, "builtin:python", 16)) < figures["code"] + 0.3
    assert loss(model, windows(tokenizer, "builtin:topics", 16)) < figures["topics"] + 0.4


def test_the_loss_bound_can_fail(model, tokenizer, report):
    """The same windows with their tokens in another order: what was learnt no longer helps."""
    ids = windows(tokenizer, "builtin:python", 4)
    shuffled = ids[:, torch.randperm(CONTEXT, generator=torch.Generator().manual_seed(0))]
    assert loss(model, shuffled) > report["held_out"]["code"]["nats_per_token"] + 1


def written(model, tokenizer, prompt: str, tokens: int) -> str:
    """What the model continues `prompt` with, greedily."""
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def test_greedy_generation_is_finite_and_repeats(model, tokenizer):
    prompt = tokenizer("def close(self", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(
            **prompt, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        again = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert all(torch.isfinite(step).all() for step in out.logits)
    assert torch.equal(out.sequences, again)
    assert out.sequences.max() < len(tokenizer)


def test_it_writes_python_looks_back_and_ends_its_answer(model, tokenizer):
    assert written(model, tokenizer, "    def close(self", 4).startswith("):\n")
    reader = "class Reader:\n    def __init__(self, path):\n        self.path ="
    assert written(model, tokenizer, reader, 4).startswith(" path\n")  # the argument's name
    question = [{"role": "user", "content": "def parse(text, strict=False):"}]
    chat = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert written(model, tokenizer, chat, 40).endswith("<|eos|>")


def test_every_string_comes_back_from_its_tokens(tokenizer):
    texts = ["", " ", "\n\n  x\t=  1 ;\r\n", "naïve 漢字 🙂 \u200b\x00\x7f", "it 's . ,", "a\u0301 \ufeff"]
    drawn = random.Random(0)
    texts += ["".join(chr(drawn.randrange(1, 0xD7FF)) for _ in range(50)) for _ in range(50)]
    texts += [bytes(drawn.randrange(256) for _ in range(80)).decode("latin-1") for _ in range(50)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)


def test_the_special_tokens_are_distinct_and_agree_with_the_model(tokenizer, model):
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert special == [0, 1, 2]
    for config in (model.config, model.generation_config):
        assert [config.pad_token_id, config.bos_token_id, config.eos_token_id] == special
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    assert model.config.max_position_embeddings == CONTEXT


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "def f():"},
    {"role": "assistant", "content": "Do nothing."},
    {"role": "user", "content": "def g():"},
    {"role": "assistant", "content": "Do it again."},
]


def test_a_conversation_has_one_bos_and_learns_the_end_of_each_answer(tokenizer):
    out = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = out["input_ids"], out["assistant_masks"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 2
    assert all(m for i, m in zip(ids, mask, strict=True) if i == tokenizer.eos_token_id)
    learnt = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(learnt) == "Do nothing.<|eos|>Do it again.<|eos|>"
    # The same through text: the tokenizer adds no second BOS.
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer(text)["input_ids"] == ids


def test_a_prompt_is_the_beginning_of_the_conversation(tokenizer):
    prompt = tokenizer.apply_chat_template(TALK[:4], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(TALK, tokenize=False).startswith(prompt)
    assert prompt.endswith("<|user|>def g():<|assistant|>")


def test_an_unknown_speaker_is_refused(tokenizer):
    with pytest.raises(Exception, match="unknown role tool: use system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "1"}], tokenize=False)


def test_a_prompt_keeps_its_tokens_when_the_completion_follows(tokenizer):
    for record in corpora.load("builtin:docstrings", "validation"):
        alone = tokenizer(record["prompt"])["input_ids"]
        assert tokenizer(record["prompt"] + record["completion"])["input_ids"][: len(alone)] == alone


def test_a_package_without_the_model_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "FOLDER", tmp_path)
    with pytest.raises(FileError) as raised:
        builtin.path()
    assert str(raised.value) == (
        "the built-in base is missing:\n"
        f"  - {tmp_path}: no model.safetensors\n"
        "      hint: reinstall lorary, or run scripts/train_base.py"
    )
