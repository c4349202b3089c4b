"""Going on from a trained adapter: `model.adapter`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lorary
from lorary.adapters import load_adapter, save_adapter
from lorary.errors import ConfigError, FileError, LoraryError
from lorary.model.loading.from_pretrained import load_model
from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.config.previous_tasks import digest
from lorary.train.runner.build import build_model, build_trainer
from lorary.train.runner.prepare import prepare
from tests.train.runs import base_folder, changed, configuration, llama

SHORT = {"max_steps": 2, "eval_steps": 2, "save_steps": 1}
PAIRS = "pairs.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, which no test changes."""
    folder = tmp_path_factory.mktemp("first")
    words = changed(configuration(base, folder / "data.jsonl"), "training", **SHORT)
    run(from_dict(words | {"output": str(folder / "sft")}), quiet=True)
    return folder / "sft"


@pytest.fixture
def words(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return changed(configuration(base, Path("data.jsonl")), "training", **SHORT)


def going_on(words: dict[str, Any], adapter: Path | str, **more: Any) -> dict[str, Any]:
    """The configuration without a method of its own, from an adapter."""
    found = {k: v for k, v in words.items() if k != "method"}
    return found | {"model": {"id": words["model"], "adapter": str(adapter)}} | more


def compared(words: dict[str, Any], task: str) -> dict[str, Any]:
    """A run of a task whose loss contains a reference."""
    if task == "dpo":
        return preferences(words)
    rows = [{"prompt": f"hello {i}", "completion": [" world", " two"][i % 2], "label": i % 2 == 0} for i in range(10)]
    Path("compared.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = words | {"task": task, "data": {"train": "compared.jsonl", "max_length": 64, "validation_split": 0.4}}
    if task == "kto":
        return changed(words, "training", batch_size=2)
    prompts = [{"prompt": row["prompt"]} for row in rows]
    Path("compared.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    Path("rewards.py").write_text("def length(completions):\n    return [float(len(text)) for text in completions]\n")
    options = {"reward": "rewards.py:length", "num_generations": 2, "max_completion_length": 4, "batch_size": 2}
    return changed(words, "training", grpo_beta=0.5, eval_batch_size=2, **options)


def preferences(words: dict[str, Any]) -> dict[str, Any]:
    rows = [{"prompt": f"hello {i}", "chosen": " world", "rejected": f" two {i}"} for i in range(10)]
    Path(PAIRS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return words | {"task": "dpo", "data": {"train": PAIRS, "max_length": 64, "validation_split": 0.2}}


def equal(one: lorary.Adapter, other: lorary.Adapter) -> bool:
    return all(
        torch.equal(t, other.tensors[name][role]) for name, roles in one.tensors.items() for role, t in roles.items()
    )


def test_training_starts_at_the_adapter_and_is_recorded(words: dict[str, Any], first: Path, base: Path) -> None:
    prepared = prepare(from_dict(going_on(words, first)))
    model = build_model(prepared)
    assert equal(lorary.Adapter.of(model), load_adapter(first / "adapter"))
    assert all(p.requires_grad for name, p in model.named_parameters() if name.endswith((".A", ".B")))
    x = torch.arange(12)[None]
    saved = lorary.load(load_model(prepared.config.model), first / "adapter")
    assert torch.equal(model(x).logits, saved(x).logits)

    done = run(from_dict(going_on(words, first)), quiet=True)
    resolved = yaml.safe_load((done.folder / "config.resolved.yaml").read_text())
    assert resolved["model"]["adapter"] == f"{first}#{digest(load_adapter(first / 'adapter'))}"
    assert resolved["method"] == {}
    assert "training goes on from the adapter in" in (done.folder / "config.resolved.yaml").read_text()
    assert "| starts from | the adapter sft |" in (done.folder / "README.md").read_text()
    assert not equal(load_adapter(done.adapter), load_adapter(first / "adapter"))


def test_a_run_that_goes_on_is_resumed_bit_for_bit(words: dict[str, Any], first: Path) -> None:
    words = going_on(words, first)
    run(from_dict(words), quiet=True)
    shutil.copytree("out", "again")
    for name in ("adapter", "checkpoints/checkpoint-2"):
        shutil.rmtree(Path("again") / name)
    run(from_dict(words | {"output": "again"}), resume=True, quiet=True)
    assert equal(load_adapter("out/adapter"), load_adapter("again/adapter"))


@pytest.mark.parametrize("name", ["pissa", "adalora", "dora", "lora-fa", "o-lora", "vera"])
def test_other_methods_go_on(words: dict[str, Any], name: str) -> None:
    options = {"options": {"target": 2, "start": 0, "final": 0}} if name == "adalora" else {}
    one = words | {"method": {"name": name, "r": 4} | options, "output": "one"}
    run(from_dict(one), quiet=True)
    two = going_on(words, "one", output="two")
    prepared = prepare(from_dict(two))
    model, start = build_model(prepared), load_adapter("one/adapter")
    assert equal(lorary.Adapter.of(model), start)
    x = torch.arange(12)[None]
    plain = lorary.load(load_model(prepared.config.model), "one/adapter")
    assert torch.equal(model(x).logits, plain(x).logits)
    assert prepared.config.notes[-1].endswith(f": {name}") or name in " ".join(prepared.config.notes)
    run(from_dict(two), quiet=True)
    shutil.rmtree("two/adapter")
    shutil.copytree("two", "again")
    shutil.rmtree("again/checkpoints/checkpoint-2")
    for output in ("two", "again"):
        run(from_dict(two | {"output": output}), resume=True, quiet=True)
    assert equal(load_adapter("two/adapter"), load_adapter("again/adapter"))
    assert {s.site.name for s in load_adapter("two/adapter").sites} == {s.site.name for s in start.sites}


def test_a_peft_adapter_goes_on(words: dict[str, Any], first: Path) -> None:
    folder = Path(shutil.copytree(first / "adapter", "peft"))
    (folder / "lorary.json").unlink()
    words = going_on(words, folder)
    done = run(from_dict(words), quiet=True)
    assert done.steps == 2
    run(from_dict(words | {"output": "own", "model": {"id": words["model"]["id"], "adapter": str(first)}}), quiet=True)
    assert equal(load_adapter("out/adapter"), load_adapter("own/adapter"))


# the loss of a policy that equals its reference: log 2; KTO's 1 - sigmoid(0)
AT_REFERENCE = {"dpo": 0.6931472, "kto": 0.5}


@pytest.mark.parametrize("task", ["dpo", "kto", "grpo"])
def test_the_reference_is_the_starting_adapter_or_the_base(words: dict[str, Any], first: Path, task: str) -> None:
    words = compared(going_on(words, first), task)
    losses = {}
    for reference in ("start", "base"):
        prepared = prepare(from_dict(changed(words, "training", reference=reference)))
        model = build_model(prepared)
        trainer = build_trainer(prepared, model, Path(reference), resumed=True, callbacks=[])
        x = torch.arange(12)[None]
        with torch.no_grad():
            policy = model(x).logits
            theirs = trainer.ref_model(input_ids=x).logits
            assert torch.equal(model(x).logits, policy)
        plain = load_model(prepared.config.model)
        expected = plain if reference == "base" else lorary.load(plain, first / "adapter")
        assert torch.equal(theirs, expected(x).logits)
        losses[reference] = trainer.evaluate()["eval_loss"]
    if task in AT_REFERENCE:
        assert losses["start"] == pytest.approx(AT_REFERENCE[task], abs=1e-6)
        assert abs(losses["base"] - losses["start"]) > 1e-6
    assert prepare(from_dict(words)).config.training.reference == "start"


def test_the_reference_stays_the_start_while_training_and_after_a_resume(words: dict[str, Any], first: Path) -> None:
    words = preferences(going_on(words, first))
    run(from_dict(words), quiet=True)
    shutil.copytree("out", "again")
    for name in ("adapter", "checkpoints/checkpoint-2"):
        shutil.rmtree(Path("again") / name)
    run(from_dict(words | {"output": "again"}), resume=True, quiet=True)
    assert equal(load_adapter("out/adapter"), load_adapter("again/adapter"))
    once, twice = (Path(f, "metrics.jsonl").read_text().splitlines() for f in ("out", "again"))
    assert [json.loads(line).get("eval_loss") for line in once] == [json.loads(line).get("eval_loss") for line in twice]


def test_another_base_is_refused(words: dict[str, Any], first: Path) -> None:
    other = llama(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1)
    shutil.copytree(words["model"], "other")
    other.to(torch.bfloat16).save_pretrained("other")
    with pytest.raises(FileError, match="other weights") as caught:
        run(from_dict(going_on(words | {"model": "other"}, first)), quiet=True)
    assert "set model.id to the base that it was trained on" in str(caught.value)
    larger = llama(bos_token_id=0, eos_token_id=1, pad_token_id=1, hidden_size=64)
    larger.save_pretrained("other")
    with pytest.raises(LoraryError, match="the adapter does not fit this model"):
        prepare(from_dict(going_on(words | {"model": "other"}, first)))


def test_an_adapter_that_has_changed_is_refused(words: dict[str, Any], first: Path) -> None:
    adapter = load_adapter(first / "adapter")
    save_adapter(adapter, "mine")
    words = going_on(words, "mine")
    run(from_dict(words), quiet=True)
    site = adapter.sites[0].site.name
    adapter.tensors[site]["B"].add_(1)
    save_adapter(adapter, "mine")
    with pytest.raises(ConfigError, match="the folder belongs to another run"):
        run(from_dict(words), resume=True, quiet=True)
    with pytest.raises(ConfigError, match="mine contains another adapter"):
        prepare(from_dict(yaml.safe_load(Path("out/config.resolved.yaml").read_text())))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": {"alpha": 99}}, "method.alpha: is 99, and the adapter's is 32"),
    ({"method": "dora"}, "method.name: join: `dora` has MagnitudeDirection(exact=False), the adapter Add()"),
    ({"method": "rslora"}, "method.name: scale: `rslora` has AlphaOverSqrtRank(alpha=32.0), the adapter AlphaOverRank"),
    ({"method": "vera"}, "method.name: delta: `vera` has SharedProjectionDelta"),
    ({"method": "pissa"}, "method.name: init: `pissa` has"),
    ({"method": {"targets": "attention"}}, "method.targets: `attention` is 8 layers, and the adapter has 14"),
    ({"method": {"targets": "q_porj"}}, "method.targets"),
    ({"method": {"exclude": "q_proj"}}, "`method.exclude`: has no effect beside `model.adapter`"),
    ({"method": {"ranks": {"*.q_proj": 2}}}, "`method.ranks`: has no effect beside `model.adapter`"),
    ({"method": {"options": {"ratio": 2}}}, "`method.options`: says nothing without `method.name`"),
    ({"method": {"drop": {"threshold": 0.5}}}, "`method.drop`: probes for layers"),
    ({"output": "."}, "output"),
    ({"training": {"reference": "start"}}, "`training.reference`: has no effect when task is `sft`"),
]


@pytest.mark.parametrize(("more", "sentence"), BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_what_contradicts_the_adapter_is_refused(
    words: dict[str, Any], first: Path, more: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(from_dict(going_on(words, first, **more)))
    assert sentence in str(caught.value)


def test_what_agrees_with_the_adapter_or_concerns_the_training_alone_may_be_said(
    words: dict[str, Any], first: Path
) -> None:
    said = {"name": "lora", "r": 4, "alpha": 32, "targets": "all-linear", "dropout": 0.1}
    plan = prepare(from_dict(going_on(words, first, method=said))).plan
    assert {(s.r, s.method.dropout) for s in plan.sites} == {(4, 0.1)}
    assert prepare(from_dict(going_on(words, first, method="qlora"))).plan.quantized


@pytest.mark.parametrize(("r", "sentence"), [(8, "rank 8: the function is unchanged"), (2, "the update is off by")])
def test_another_rank_is_said_by_the_method_section(words: dict[str, Any], first: Path, r: int, sentence: str) -> None:
    words = going_on(words, first, method={"r": r})
    prepared = prepare(from_dict(words))
    assert {s.r for s in prepared.plan.sites} == {r}
    assert any(
        note.startswith("the adapter's rank changes from 4: rank") and sentence in note for note in prepared.notes
    )
    x, model = torch.arange(12)[None], build_model(prepared)
    if r > 4:
        saved = lorary.load(load_model(prepared.config.model), first / "adapter")
        torch.testing.assert_close(model(x).logits, saved(x).logits, rtol=2e-2, atol=2e-2)  # in bfloat16
    run(from_dict(words), quiet=True)
    shutil.copytree("out", "again")
    for name in ("adapter", "checkpoints/checkpoint-2"):
        shutil.rmtree(Path("again") / name)
    run(from_dict(words | {"output": "again"}), resume=True, quiet=True)
    assert equal(load_adapter("out/adapter"), load_adapter("again/adapter"))


@pytest.mark.parametrize("task", ["classification", "reward"])
def test_an_adapter_without_the_new_head_is_refused(words: dict[str, Any], first: Path, task: str) -> None:
    words = preferences(going_on(words, first)) | {"task": task}
    if task == "classification":
        rows = [{"text": f"hello {i}", "label": i % 2} for i in range(10)]
        Path(PAIRS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LoraryError) as caught:
        prepare(from_dict(words))
    assert str(caught.value) == (
        "the configuration contradicts the adapter that it goes on from:\n"
        f"  - model.adapter: task `{task}` draws score.weight at random, and the adapter does not hold it: "
        "it would not train\n"
        "      hint: merge the adapter first, and name the merged model as model.id"
    )


def test_a_choice_of_the_reference_without_effect_is_refused(words: dict[str, Any], first: Path) -> None:
    for task, values, sentence in (
        ("grpo", {"grpo_beta": 0.0}, "has no effect while `training.grpo_beta` is 0: GRPO then has no reference"),
        ("classification", {}, "when task is `classification`\n      hint: remove it, or set task: dpo or"),
        ("reward", {}, "remove it, or set task: dpo or kto or grpo"),
    ):
        with pytest.raises(ConfigError) as caught:
            from_dict(changed(going_on(words, first), "training", reference="base", **values) | {"task": task})
        assert sentence in str(caught.value)
    for task in ("dpo", "kto"):
        assert from_dict(words | {"task": task, "training": {}}).resolve().training.reference is None
    rewarded = compared(going_on(words, first), "grpo")
    assert from_dict(rewarded).resolve(("lora",)).training.reference == "start"
    without = from_dict(changed(rewarded, "training", grpo_beta=0.0))
    assert without.resolve(("lora",)).training.reference is None


def test_no_adapter_there_is_said(words: dict[str, Any], first: Path) -> None:
    for folder, sentence in (("nowhere", "nowhere"), (str(first / "plots"), "neither lorary.json nor")):
        with pytest.raises(FileError) as caught:
            prepare(from_dict(going_on(words, folder)))
        assert sentence in str(caught.value)
    with pytest.raises(ConfigError, match=r"has no effect without `model\.adapter`"):
        from_dict(changed(words, "training", reference="base") | {"task": "dpo"})


def test_an_output_that_contains_the_adapter_is_refused(words: dict[str, Any], first: Path) -> None:
    shutil.copytree(first, "out")
    with pytest.raises(ConfigError, match="contains the adapter to go on from"):
        from_dict(going_on(words, "out"))
