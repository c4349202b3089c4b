"""Advice for models and data on disk: a configuration that runs, and what cannot be advised on."""

# ruff: noqa: E501 (messages stand here as they are printed)

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig, ViTConfig

import lorary
from lorary import builtin
from lorary.errors import ConfigError, DataError, FileError, LoraryError, PlanError, TrainingError
from lorary.train.advice.advice import Advice, shown
from lorary.train.advice.advise import advise
from lorary.train.advice.gradient import padded
from lorary.train.advice.machine import Machine
from lorary.train.config.load import from_dict, load
from lorary.train.config.template import template
from lorary.train.data.spread import spread
from lorary.train.runner.prepare import prepare
from tests.train.runs import WORDS, base_folder, llama
from tests.train.small import tokenizer

LAPTOP = Machine(False, 64 * 10**9)
FEW = {
    "train": [{"path": "builtin:docstrings", "limit": 64}],
    "validation": [{"path": "builtin:docstrings", "limit": 24}],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(name: str, rows: list[Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def pairs(count: int = 48) -> list[dict[str, str]]:
    return [{"prompt": f"{WORDS[i % 7]} {WORDS[i % 5]}", "completion": f" {WORDS[i % 3]} {i}"} for i in range(count)]


def advice(data: Any = FEW, model: Any = "builtin:base", machine: Machine = LAPTOP, **tree: Any) -> Advice:
    data = data if isinstance(data, dict) else {"train": data}
    return advise(from_dict({"model": model, "data": data} | tree), machine, ranks="uniform")


def values(found: Advice) -> dict[str, Any]:
    return {one.key: one.chosen for one in found.recommendations}


def test_the_advised_run_of_the_builtin_model_is_ready_to_train(folder: Path) -> None:
    found = advice()
    assert found.facts.rows == 64
    assert (found.facts.family, found.facts.hidden, found.facts.context) == ("llama", 192, 256)
    assert found.facts.per_rank * 32 == lorary.plan(builtin.load_model(), lorary.method("lora", r=32)).trainable
    prepared = prepare(found.config)
    assert (prepared.config.task, prepared.config.method.r, prepared.config.method.alpha) == ("sft", 32, 32.0)
    assert prepared.held_out is not None
    assert len(prepared.held_out.rows) == 24
    assert prepared.steps == 48  # 3 epochs of 64 rows, 4 at a time
    training = prepared.config.training
    assert (training.keep_best, training.eval_steps, training.save_steps) == (True, 4, 4)
    assert found.warnings == (
        "a hidden size of 192 is below those of the public sweep: try half and double the rate",
        "48 steps are few: fewer than 100 seldom reach the end of learning",
    )


def test_the_template_of_an_advice_says_why_and_reads_back(folder: Path) -> None:
    found = advice()
    text = template(found.config, found.reasons)
    Path("train.yaml").write_text(text)
    assert load("train.yaml") == found.config
    lines = text.splitlines()
    at = lines.index(f"  lr: {found.config.training.lr}")
    above = "\n".join(lines[:at]).rpartition("# learning rate;")[2]
    assert "# -> Llama, hidden size 192" in above
    assert "  # max_steps:" in lines


def test_the_advice_in_json_and_in_text(folder: Path) -> None:
    found = advice(method={"r": 4})
    record = json.loads(json.dumps(found.to_dict()))
    assert record["facts"]["tokens_per_row"]["100"] == found.facts.longest
    assert record["config"]["method"]["r"] == 4
    (rank,) = (one for one in record["recommendations"] if one["key"] == "method.r")
    assert (rank["value"], rank["given"]) == (32, 4)
    text = str(found)
    assert "\nmethod.r                              4\n    Yours; 32 is advised." in text
    assert text.splitlines()[-1].startswith("warning   48 steps are few")
    assert shown({f"l{i}": i + 1 for i in range(9)}) == "9 entries, 1 to 9"


def test_nothing_is_said_twice(folder: Path) -> None:
    found = advice(written("twice.jsonl", pairs() * 2))
    assert "48 of 96 rows repeat another" in found.warnings
    assert "twice.jsonl: 96 rows in the format prompt-completion (detected)" in found.notes
    assert not {*found.warnings} & {*found.notes}


def test_other_tasks_follow_from_their_rows(folder: Path) -> None:
    base_folder(Path("base"))
    labelled = [{"text": f"{WORDS[i % 7]} {i}", "label": i % 2 == 0} for i in range(40)]
    judged = [pair | {"label": i % 2 == 0} for i, pair in enumerate(pairs(40))]
    preferred = [{"prompt": p["prompt"], "chosen": p["completion"], "rejected": " no"} for p in pairs(40)]
    for task, rows in (("classification", labelled), ("kto", judged), ("dpo", preferred)):
        found = advice(written(f"{task}.jsonl", rows), "base")
        assert found.config.task == task
        assert prepare(found.config).steps
        assert values(found)["training.batch_size"] >= 2
    assert found.config.training.lr == 3.2e-4  # 5e-4 (2000/32)^0.781 over 40


def test_rows_longer_than_the_context_get_longlora(folder: Path) -> None:
    transformers.utils.logging.set_verbosity_error()
    base_folder(Path("base"))
    config = json.loads(Path("base/config.json").read_text()) | {"max_position_embeddings": 16}
    Path("base/config.json").write_text(json.dumps(config))
    rows = [{"prompt": "hello world " * 8, "completion": f" {WORDS[i % 7]}"} for i in range(40)]
    found = advice(written("long.jsonl", rows), "base")
    assert values(found)["method.name"] == ("longlora",)
    prepared = prepare(found.config)
    assert prepared.plan.method.context is not None
    assert prepared.plan.method.context.length == found.config.method.options["length"]


def seven_billion(folder: Path) -> str:
    """LLaMA-7B without weights, with the built-in tokenizer."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    builtin.load_tokenizer().save_pretrained(folder)
    return str(folder)


def test_what_does_not_fit_is_quantised(folder: Path) -> None:
    name = seven_billion(Path("seven"))
    large, small, tiny = (advice(model=name, machine=Machine(True, n * 10**9)) for n in (80, 8, 3))
    assert values(large)["method.name"] == ("lora",)
    assert values(large)["training.gradient_checkpointing"] is False
    assert values(small)["method.name"] == ("qlora",)
    assert small.config.training.batch_size == 1
    assert "to fit into a GPU with 8.0 GB [Dettmers" in small.reasons["method.name"]
    assert prepare(small.config).plan.quantized
    assert any("more than a GPU with 3.0 GB has" in w for w in tiny.warnings)
    kept = advice(
        model=name, machine=Machine(True, 8 * 10**9), method="lora", training={"gradient_checkpointing": False}
    )
    assert kept.config.method.name == ("lora",)
    assert any("more than a GPU with 8.0 GB has" in w for w in kept.warnings)


def test_an_older_gpu_computes_in_float32(folder: Path) -> None:
    name = seven_billion(Path("seven"))
    recent, older = (advice(model=name, machine=Machine(True, 24 * 10**9, bf16)) for bf16 in (True, False))
    assert "model.dtype" not in values(recent)
    assert recent.config.model.dtype == "auto"
    assert values(recent)["method.name"] == ("lora",)
    assert older.config.model.dtype == "float32"
    assert older.reasons["model.dtype"].startswith(
        "the weights are saved in bfloat16, this GPU is older than Ampere and emulates bfloat16, and float16 may overflow"
    )
    assert values(older)["method.name"] == ("qlora",)  # twice as many bytes do not fit
    assert values(older)["training.bf16"] is False
    said = recent.reasons["training.bf16"]
    assert said.startswith("the weights are saved in bfloat16, and compute in it anyway [")


def test_float32_weights_compute_in_bfloat16_where_the_gpu_has_it(folder: Path) -> None:
    llama(bos_token_id=0, eos_token_id=1, pad_token_id=1).save_pretrained("base")
    tokenizer().save_pretrained("base")
    rows = written("rows.jsonl", pairs())
    recent, older = (advice(rows, "base", Machine(True, 24 * 10**9, bf16)) for bf16 in (True, False))
    assert (values(recent)["training.bf16"], values(older)["training.bf16"]) == (True, False)
    assert "model.dtype" not in values(older)
    assert older.reasons["training.bf16"].startswith("this GPU is older than Ampere and emulates bfloat16, which takes")
    said = advice(rows, "base").reasons["training.bf16"]
    assert said.startswith("the weights are saved in float32; autocast is advised on a GPU alone [")
    chosen = advice(rows, {"id": "base", "dtype": "float16"}, Machine(True, 24 * 10**9))
    assert (chosen.config.model.dtype, values(chosen)["training.bf16"]) == ("float16", False)


@pytest.mark.parametrize(("major", "bf16"), [(7, False), (8, True)])
def test_a_gpu_that_only_emulates_bfloat16_is_known(monkeypatch: pytest.MonkeyPatch, major: int, bf16: bool) -> None:
    gpu = SimpleNamespace(major=major, total_memory=16 * 10**9)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert Machine.here() == Machine(True, 16 * 10**9, bf16)
    assert Machine.here(24.0) == Machine(True, 24 * 10**9)


def test_ranks_from_gradients_spend_what_uniform_ranks_do(folder: Path) -> None:
    config = from_dict({"model": "builtin:base", "data": FEW, "method": {"r": 4}})
    found = advise(config, LAPTOP, ranks="gradient")
    assert len(found.config.method.ranks) == 42
    assert set(found.config.method.ranks.values()) <= set(range(1, 17))
    uniform, planned = prepare(advise(config, LAPTOP).config).plan, prepare(found.config).plan
    assert 0.99 * uniform.trainable < planned.trainable <= uniform.trainable
    assert shown(found.config.method.ranks).startswith("42 entries, ")


def test_a_batch_is_spread_over_the_rows_and_padded() -> None:
    rows = [{"input_ids": [i] * (i + 1), "labels": [-100] + [i] * i} for i in range(9)]
    chosen = spread(rows, 3)
    assert [row["input_ids"][0] for row in chosen] == [0, 3, 6]
    batch = padded(chosen, 99, 5)
    assert batch["input_ids"].tolist() == [[0, 99, 99, 99, 99], [3, 3, 3, 3, 99], [6] * 5]
    assert batch["attention_mask"].sum(1).tolist() == [1, 4, 5]
    assert batch["labels"].tolist()[0] == [-100] * 5
    assert len(spread(rows, 100)) == 9


# --- what cannot be advised on ------------------------------------------------------------------------------------


def model_folder(config: Any, name: str, architecture: str) -> str:
    config.architectures = [architecture]
    config.save_pretrained(name)
    tokenizer().save_pretrained(name)
    return name


def vision() -> dict[str, Any]:
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    return {"model": model_folder(config, "vit", "ViTForImageClassification"), "data": written("rows.jsonl", pairs())}


def encoder() -> dict[str, Any]:
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    return {"model": model_folder(config, "bert", "BertForMaskedLM"), "data": written("rows.jsonl", pairs())}


def without_tokenizer() -> dict[str, Any]:
    base_folder(Path("base"))
    for file in Path("base").glob("token*"):
        file.unlink()
    return {"model": "base", "data": written("rows.jsonl", pairs())}


def small_vocabulary() -> dict[str, Any]:
    base_folder(Path("base"))
    tokenizer(extra=[f"<{i}>" for i in range(20)]).save_pretrained("base")
    config = json.loads(Path("base/config.json").read_text()) | {"vocab_size": 30}
    Path("base/config.json").write_text(json.dumps(config))
    return {"model": "base", "data": written("rows.jsonl", pairs())}


def rows(*made: Any, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"model": "builtin:base", "data": {"train": written("rows.jsonl", list(made))}} | more


def truncated() -> dict[str, Any]:
    base_folder(Path("base"))
    file = Path("base/config.json")
    file.write_text(file.read_text()[:40])
    return {"model": "base", "data": written("rows.jsonl", pairs())}


def picture() -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "url": "a.png"}, {"type": "text", "text": "what"}]}


BAD: dict[str, tuple[Callable[[], dict[str, Any]], type[LoraryError], str]] = {
    "a model of images": (vision, ConfigError, "task: ViTForImageClassification is not a causal language model"),
    "an encoder for answers": (encoder, ConfigError, "task: BertForMaskedLM is an encoder: it has no next-token head"),
    "no such model": (lambda: {"model": "./absent", "data": "builtin:docstrings"}, FileError, "./absent: there is no such folder"),
    "no tokenizer": (without_tokenizer, FileError, "base: there is no tokenizer.json in it"),
    "ids beyond the vocabulary": (small_vocabulary, DataError, "but the model has 30 embeddings"),
    "no such data": (lambda: {"model": "builtin:base", "data": "./absent.jsonl"}, DataError, "./absent.jsonl"),
    "no rows": (rows(), DataError, "rows.jsonl"),
    "no answers": (rows({"prompt": "a", "completion": ""}), DataError, "rows.jsonl"),
    "prompts alone": (rows({"prompt": "a"}), ConfigError, "data.train: rows of the format prompt belong to no task that advice knows (sft, dpo, kto, classification)"),
    "one label": (rows(*[{"text": f"t{i}", "label": "x"} for i in range(4)]), DataError, "label: every row has the label `x`"),
    "no label": (rows({"text": "a"}, task="classification"), DataError, "task `classification` trains on labelled texts, not `text`"),
    "rows of another task": (rows({"prompt": "a", "completion": " b"}, task="dpo"), DataError, "task `dpo` trains on preference pairs, not `prompt-completion`"),
    "a task without advice": (rows({"prompt": "a", "chosen": " b", "rejected": " c"}, task="reward"), ConfigError, "task: there is no advice for task `reward`\n      hint: advice is for sft, dpo, kto, classification"),
    "an adapter to go on from": (rows({"text": "a"}, model={"id": "builtin:base", "adapter": "other"}), ConfigError, "model.adapter: training goes on from `other`, which brings its method, ranks and targets"),
    "a stream": (lambda: {"model": "builtin:base", "data": {"train": "builtin:topics", "streaming": True, "overlong": "split"}, "training": {"max_steps": 4}}, ConfigError, "data.streaming: the lengths and the number of rows decide, and a stream's are not known"),
    "texts of nothing": (rows({"text": ""}, {"text": ""}), DataError, "every text of rows.jsonl is empty"),
    "no known field": (rows({"foo": "a"}), DataError, "rows.jsonl:1: found the fields `foo`\n      hint: name the fields with data.columns"),
    "no text": (rows({"text": None}), DataError, "unknown row format in rows.jsonl:"),
    "numbers for texts": (rows({"text": 3}), DataError, "rows.jsonl:1: `text` must be a text, not a number"),
    "images": (rows({"messages": [picture(), {"role": "assistant", "content": "x"}]}), DataError, "`messages[0]` has image; only text is supported"),
    "a label that is NaN": (rows({"text": "a", "label": float("nan")}), DataError, "rows.jsonl:1: NaN is not a JSON number"),
    "rows beyond any context": (rows({"prompt": "x " * 9000, "completion": " b"}, {"prompt": "x " * 9000, "completion": " c"}), ConfigError, "data.train: all 2 rows are longer than 256 tokens, and none is left to train on\n      hint: shorten or split the texts"),
    "rows beyond a length that is set": (lambda: {"model": "builtin:base", "data": {"train": written("rows.jsonl", [{"prompt": "x " * 40, "completion": " b"}] * 2), "max_length": 8}}, ConfigError, "data.train: all 2 rows are longer than 8 tokens"),
    "a truncated configuration": (truncated, FileError, "config.json: is not valid JSON"),
    "targets that match nothing": (lambda: {"model": "builtin:base", "data": FEW, "method": {"targets": "no_proj"}}, PlanError, "`no_proj` matches no layer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_advised_on(folder: Path, name: str) -> None:
    make, kind, sentence = BAD[name]
    tree = make()
    before = sorted(Path().rglob("*"))
    with pytest.raises(kind) as caught:
        advise(from_dict(tree), LAPTOP)
    assert sentence in str(caught.value)
    assert sorted(Path().rglob("*")) == before


def test_gradients_of_another_task_are_refused(folder: Path) -> None:
    base_folder(Path("base"))
    data = written(
        "pairs.jsonl", [{"prompt": p["prompt"], "chosen": p["completion"], "rejected": " no"} for p in pairs()]
    )
    with pytest.raises(ConfigError, match="--ranks: the gradients of task `dpo` depend on a head or a reference"):
        advise(from_dict({"model": "base", "data": data}), LAPTOP, ranks="gradient")


def test_weights_that_are_not_finite_give_no_ranks(folder: Path) -> None:
    base_folder(Path("base"))
    file = Path("base/model.safetensors")
    tensors = load_file(file)
    damaged = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {damaged: torch.full_like(tensors[damaged], float("nan"))}, file, {"format": "pt"})
    config = from_dict({"model": "base", "data": written("rows.jsonl", pairs())})
    with pytest.raises(
        TrainingError, match=f"{damaged}: holds numbers that are not finite\n.*the checkpoint is damaged"
    ):
        advise(config, LAPTOP, ranks="gradient")
