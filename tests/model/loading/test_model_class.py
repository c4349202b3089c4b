"""The class that loads a model: its own, or its task's; a task is refused where it would need another model."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorary.errors import ConfigError, FileError
from lorary.model.loading.from_pretrained import fast_skeleton, load_config, load_model
from lorary.model.loading.model_class import check_task, classifier
from lorary.model.loading.model_kind import kind_of_model
from lorary.model.loading.source import ModelSection
from tests.cli.command import Command
from tests.train.tasks import saved

KINDS = {
    "BertForMaskedLM": "encoder",
    "BertModel": "encoder",
    "BertLMHeadModel": "decoder",
    "BertForSequenceClassification": "classifier",
    "DistilBertForTokenClassification": "encoder",
    "GPT2Model": "decoder",
    "LlamaForCausalLM": "decoder",
    "LlamaForSequenceClassification": "classifier",
    "LlamaForTokenClassification": "other",
    "T5ForConditionalGeneration": "seq2seq",
    "ViTForImageClassification": "other",
}
PAGE = "docs/how-to/in-your-own-trainer.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name in KINDS:
        saved(path, name, **({"is_decoder": True} if name == "BertLMHeadModel" else {}))
    return path


@pytest.mark.parametrize("name", KINDS)
def test_a_model_is_planned_with_its_own_head(name: str, folder: Path) -> None:
    section = ModelSection.of(str(folder / name))
    assert kind_of_model(load_config(section)) == KINDS[name]
    model = fast_skeleton(section)
    own = {n for n, _ in model.named_parameters()}
    if name == "LlamaForCausalLM":
        assert type(model).__name__ == "Skeleton"
    else:
        assert type(model).__name__ == name
    assert ("score.weight" in own) == (name in ("LlamaForSequenceClassification", "LlamaForTokenClassification"))


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        (
            "BertForMaskedLM",
            "sft",
            "BertForMaskedLM is an encoder: it has no next-token head\n"
            f"      hint: task: classification trains it; for anything else see {PAGE}",
        ),
        (
            "LlamaForSequenceClassification",
            "dpo",
            "LlamaForSequenceClassification is a sequence classifier: it has no next-token head\n"
            "      hint: task: classification trains it",
        ),
        (
            "BertForSequenceClassification",
            "reward",
            "BertForSequenceClassification is a classifier of 2 labels; a reward model has one output\n"
            "      hint: set task: classification, or start from a model without a head",
        ),
        (
            "T5ForConditionalGeneration",
            "sft",
            "T5ForConditionalGeneration is an encoder-decoder, which no task of `lorary train` trains\n"
            f"      hint: train it in your own trainer: {PAGE}",
        ),
        (
            "T5ForConditionalGeneration",
            "classification",
            "T5ForConditionalGeneration is an encoder-decoder, which no task of `lorary train` trains\n"
            f"      hint: train it in your own trainer: {PAGE}",
        ),
        (
            "ViTForImageClassification",
            "classification",
            "ViTForImageClassification is not a text model that Transformers can make a sequence classifier of\n"
            f"      hint: train it in your own trainer: {PAGE}",
        ),
        (
            "ViTForImageClassification",
            "kto",
            "ViTForImageClassification is not a causal language model\n"
            f"      hint: train it in your own trainer: {PAGE}",
        ),
        (
            "LlamaForTokenClassification",
            "grpo",
            "LlamaForTokenClassification is not a causal language model\n"
            f"      hint: train it in your own trainer: {PAGE}",
        ),
    ],
)
def test_a_wrong_pairing_is_told(name: str, task: str, message: str, folder: Path) -> None:
    section = ModelSection.of(str(folder / name))
    with pytest.raises(ConfigError) as error:
        check_task(section, load_config(section), task)
    assert str(error.value) == f"task `{task}` cannot train {section.id}:\n  - task: {message}"


@pytest.mark.parametrize("name", ["BertForMaskedLM", "T5ForConditionalGeneration", "LlamaForSequenceClassification"])
def test_an_incomplete_folder_is_not_blamed(name: str, folder: Path) -> None:
    with pytest.raises(FileError, match=f"{name} is an? ") as error:
        load_model(ModelSection.of(str(folder / name)))
    assert "incomplete" not in str(error.value)


def test_only_a_new_head_may_be_missing(folder: Path) -> None:
    section = ModelSection.of(str(folder / "BertForMaskedLM"))
    fresh = classifier(load_config(section), ("a", "b", "c"), None, 0, section).fresh
    assert set(fresh) == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias",
    }  # fmt: skip
    section = ModelSection.of(str(folder / "BertForSequenceClassification"))
    assert classifier(load_config(section), ("a", "b"), None, 0, section).fresh == ()
    section = ModelSection.of(str(folder / "LlamaForCausalLM"))
    made = classifier(load_config(section), ("a", "b"), None, 0, section)
    assert made.fresh == ("score.weight",)
    model = load_model(section, model_class=made)
    assert model.config.id2label == {0: "a", 1: "b"}


def test_the_plan_says_which_class_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Command(monkeypatch, capsys)
    for name in ("BertForMaskedLM", "T5ForConditionalGeneration", "ViTForImageClassification", "LlamaForCausalLM"):
        shown = command("plan", str(folder / name), "--set", "data.max_length=32")
        assert shown.code == 0, shown.err
        assert shown.out.startswith(f"model     {name}, the class that it was saved with\n")
        assert "unknown" not in shown.out
    shown = command(
        "plan", str(folder / "BertForMaskedLM"), "--set", "task=classification", "--set", "data.labels=a,b,c"
    )
    assert shown.out.startswith("model     BertForSequenceClassification with 3 labels, for task `classification`\n")
    assert "classifier.weight         48" in shown.out
    assert "bert.pooler.dense.weight  256" in shown.out
    refused = command("plan", str(folder / "BertForMaskedLM"), "--set", "task=sft")
    assert refused.code == 2
    assert "BertForMaskedLM is an encoder" in refused.err
    (folder / "train.yaml").write_text(
        f"model: {folder / 'BertForMaskedLM'}\ndata: builtin:docstrings\n"
    )  # whose task is `sft`
    assert "BertForMaskedLM is an encoder" in command("plan", str(folder / "train.yaml")).err
    refused = command("generate", str(folder / "BertForMaskedLM"), "x")
    assert "BertForMaskedLM is an encoder: it has no next-token head" in refused.err
