"""New tokens from a configuration: added, trained, kept in kilobytes, and known to every command afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification
from typer.testing import CliRunner

import lorary
from lorary import builtin
from lorary.adapters.resolve import with_tokens_of
from lorary.cli import app
from lorary.errors import ConfigError, FileError, PlanError
from lorary.model.loading.from_pretrained import load_config, load_model, skeleton
from lorary.model.loading.source import ModelClass, ModelSection
from lorary.model.vocabulary import check_tokens
from lorary.serve.pool.loader import Loader
from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.runner.prepare import prepare
from tests.train.runs import base_folder, changed, configuration
from tests.train.small import tokenizer

TOKENS = ["<question>", "<answer>", "<end>"]  # for the base's two unused rows, and one more


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    tree = configuration(base_folder(tmp_path / "base"), tmp_path / "data.jsonl")
    rows = [json.loads(line) for line in Path("data.jsonl").read_text().splitlines()]
    marked = [{"prompt": f"<question>{r['prompt']}", "completion": f"<answer>{r['completion']}"} for r in rows]
    Path("data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in marked))
    tree = changed(tree, "training", lr=0.02, max_steps=8)
    return tree | {"model": {"id": "base", "tokens": TOKENS}, "method": {"name": "rows"}}


def invoked(*arguments: str) -> str:
    ran = CliRunner().invoke(app(), list(arguments))
    assert ran.exit_code == 0, f"{arguments}: {ran.output} {ran.exception!r}"
    return ran.output


def test_trained_resumed_and_used_by_every_command(words: dict[str, Any], tmp_path: Path) -> None:
    prepared = prepare(from_dict(words))
    assert prepared.plan.trainable == 3 * 2 * 32  # three tokens, two ends
    assert len(prepared.tokenizer) == 301
    done = run(from_dict(words), quiet=True)
    assert done.steps == 8
    losses = [record["loss"] for record in done.history if "loss" in record]
    assert losses[-1] < losses[0]
    adapter = tmp_path / "out" / "adapter"
    own = ("lorary.json", "adapter_config.json", "adapter_model.safetensors")
    assert sum((adapter / name).stat().st_size for name in own) < 10_000
    files = {path.name: path.read_bytes() for path in adapter.glob("*.safetensors")}
    for late in ("adapter", "checkpoint-8", "checkpoints/checkpoint-8"):  # as a kill leaves it
        shutil.rmtree(tmp_path / "out" / late, ignore_errors=True)
    run(from_dict(words), quiet=True, resume=True)
    assert {path.name: path.read_bytes() for path in adapter.glob("*.safetensors")} == files

    invoked("eval", "out", "--data", "data.jsonl")
    invoked("generate", "out", "<question>hello world<answer>", "--max-new-tokens", "3")
    invoked("merge", "out", "merged")
    merged, vocabulary = AutoModelForCausalLM.from_pretrained("merged"), AutoTokenizer.from_pretrained("merged")
    assert merged.config.vocab_size == len(vocabulary) == 301
    ids = vocabulary("<question>the answer<answer>", return_tensors="pt")
    assert {298, 299} <= set(ids["input_ids"][0].tolist())
    base = AutoModelForCausalLM.from_pretrained("base").float()
    mine = lorary.load(lorary.resize_vocabulary(base, 301), adapter)
    expected, found = mine(**ids).logits, merged.float()(**ids).logits
    assert (found - expected).abs().max() < 2e-2 * expected.abs().max()  # rounded to the base's 16 bits


def test_beside_lora_and_further_on(words: dict[str, Any], tmp_path: Path) -> None:
    tree = words | {"method": {"name": "lora", "r": 2}}
    prepared = prepare(from_dict(tree))
    names = [p.site.name for p in prepared.plan.sites if p.join != lorary.method("lora").join]
    assert names == ["model.embed_tokens", "lm_head"]
    run(from_dict(tree), quiet=True)
    further = {"model": {"id": "base", "adapter": "out"}, "output": "further", "method": {}}
    done = run(from_dict(words | further), quiet=True)
    assert done.steps == 8
    adapter = lorary.load_adapter(tmp_path / "further" / "adapter")
    assert {text for a in adapter.sites for text in getattr(a.join, "added", ())} == set(TOKENS)
    with pytest.raises(ConfigError, match=r"adds <other>, and the adapter has <question>, <answer>, <end>"):
        prepare(from_dict(words | further | {"model": {"id": "base", "adapter": "out", "tokens": ["<other>"]}}))


def test_tokens_are_learnt_on_the_built_in_base(tmp_path: Path) -> None:
    """A tied model: what a new token means is learnt by its row alone, and every other row stays."""
    model, words = builtin.load_model(), builtin.load_tokenizer()
    before = model.get_input_embeddings().weight.detach().clone()
    ids = lorary.add_tokens(model, words, ["<define>"])
    lorary.attach(model, lorary.plan(model, lorary.method("rows", tokens=ids)))
    batch = words(["<define> f(x):\n    return x\n"] * 2, return_tensors="pt")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trained] == [(1, before.shape[1])]
    optimizer, losses = torch.optim.Adam(trained, lr=0.02), []
    for _ in range(15):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    lorary.save(model, tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 10_000
    lorary.merge(model)
    assert torch.equal(model.get_input_embeddings().weight[:-1], before)
    assert model.lm_head.weight is model.get_input_embeddings().weight


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": {"id": "base", "tokens": ["</s>"]}}, "'</s>' is token 1 of the tokenizer already"),
    ({"model": {"id": "base", "tokens": ["<a>", "<a>"]}}, "'<a>' is there twice"),
    ({"model": {"id": "base", "tokens": [" "]}}, "' ' is not a text"),
    ({"model": {"id": "base"}}, "no token is named: tokens=[...]"),
    ({"method": {"name": "rows", "options": {"tokens": [-3]}}}, "token -3 is negative"),
    ({"model": {"id": "base"}, "method": {"name": "rows", "options": {"tokens": [300]}}}, "token 300 is outside"),
    ({"method": {"name": "lora", "targets": ["q_proj", "embedding"]}}, "both adapt model.embed_tokens"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=lambda v: str(v)[:70])
def test_configurations_that_cannot_be_are_refused(
    words: dict[str, Any], changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(lorary.LoraryError) as caught:
        run(from_dict(words | changes), quiet=True)
    assert sentence in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_classifier_of_more_tokens_than_its_base(words: dict[str, Any]) -> None:
    """The configuration is the base's own until the weights are there: a skeleton with more rows does not change it."""
    section = ModelSection.of("base", tokens=tuple(TOKENS))
    kind = ModelClass(LlamaForSequenceClassification, load_config(section), fresh=("score.weight",))
    assert skeleton(section, kind).config.vocab_size == 301
    assert kind.config.vocab_size == 300
    assert load_model(section, model_class=kind).get_input_embeddings().weight.shape[0] == 301


def test_a_tokenizer_with_other_ids_is_refused(words: dict[str, Any]) -> None:
    run(from_dict(words), quiet=True)
    adapter = lorary.load_adapter("out/adapter")
    other = tokenizer()
    other.add_tokens(["<first>", *TOKENS])
    with pytest.raises(PlanError) as caught:
        check_tokens(other, adapter.sites)
    assert "'<question>': is token 299 of this tokenizer, and the adapter has trained row 298" in str(caught.value)
    plain = AutoModelForCausalLM.from_pretrained("base")
    with pytest.raises(FileError, match=r"resize the base first: lorary\.resize_vocabulary\(model, 301\)"):
        lorary.load(plain, "out/adapter")
    assert ModelSection.of("base").tokens == ()


def test_exported_and_served_with_its_tokens(words: dict[str, Any], tmp_path: Path) -> None:
    run(from_dict(words), quiet=True)
    invoked("export", "out", "merged", "--to", "merged")
    merged, vocabulary = AutoModelForCausalLM.from_pretrained("merged"), AutoTokenizer.from_pretrained("merged")
    assert merged.config.vocab_size == len(vocabulary) == 301
    ids = vocabulary("<question>the answer<end>", return_tensors="pt")
    assert {298, 300} <= set(ids["input_ids"][0].tolist())
    base = AutoModelForCausalLM.from_pretrained("base").float()
    mine = lorary.load(lorary.resize_vocabulary(base, 301), tmp_path / "out" / "adapter")
    expected, found = mine(**ids).logits, merged.float()(**ids).logits
    assert (found - expected).abs().max() < 2e-2 * expected.abs().max()  # rounded to the base's 16 bits
    invoked("export", "out", "peft", "--to", "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["token_indices"] == [298, 299, 300]
    invoked("convert", "out", "converted")
    for folder in ("peft", "converted"):
        assert AutoTokenizer.from_pretrained(folder)("<end>", add_special_tokens=False)["input_ids"] == [300]

    section = with_tokens_of(ModelSection.of("base"), {"mine": "out"})
    assert section.tokens == tuple(TOKENS)
    run(from_dict(words | {"model": {"id": "base", "tokens": ["<other>"]}, "output": "other"}), quiet=True)
    with pytest.raises(FileError) as caught:
        with_tokens_of(ModelSection.of("base"), {"mine": "out", "theirs": "other"})
    said = "theirs: has trained the row of token 298 for '<other>', and mine for '<question>'"
    assert said in str(caught.value)
    plain = AutoModelForCausalLM.from_pretrained("base")
    loader = Loader(plain, tokenizer=AutoTokenizer.from_pretrained("base"))
    with pytest.raises(PlanError, match="'<other>': is not a token of this tokenizer"):
        loader.load((tmp_path / "other" / "adapter").resolve(), "theirs")
    loader.close()
    both = {name: lorary.load_adapter(f"{name}/adapter") for name in ("out", "other")}
    with pytest.raises(lorary.MethodError, match="other: has trained the row of token 298 for '<other>', and out for"):
        lorary.mix(both, base=plain, approximate=True, force=True)
    half = lorary.mix({"out": both["out"]}, [0.5], base=lorary.resize_vocabulary(plain, 301), approximate=True)
    assert "its record does not name the tokens that were added for it: '<question>' (298), " in " ".join(half.notes)


def test_they_get_no_rows_in_quantised_embeddings(words: dict[str, Any], tmp_path: Path) -> None:
    method = {"name": ["lora", "qlora"], "r": 2, "options": {"embeddings": True}}
    with pytest.raises(PlanError, match="model: its token embeddings are quantised"):
        run(from_dict(words | {"method": method}), quiet=True)
    assert not (tmp_path / "out" / "adapter").exists()
