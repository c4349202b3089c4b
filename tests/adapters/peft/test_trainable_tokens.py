"""PEFT's trainable tokens, tied ends and resized vocabularies: its files here, ours there, with equal logits."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorary
from lorary.adapters import export_peft
from lorary.errors import FileError
from tests import tiny
from tests.methods.test_token_rows import attached, close, ids, llama, moved
from tests.train.small import tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
ENDS = ["embed_tokens", "lm_head"]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "target_modules": ["q_proj"]} | options))


def by_peft(config: Any, folder: Path, model: Any = None, **saving: Any) -> Tensor:
    """The logits of a model that PEFT has trained, which is saved in `folder`."""
    config = copy.deepcopy(config)  # PEFT writes into it
    trained: Any = moved(get_peft_model(llama() if model is None else model, config)).eval()
    trained.save_pretrained(folder, **saving)
    logits: Tensor = trained(ids()).logits.detach()
    return logits


def read_by_peft(folder: Path, *, tied: bool) -> tuple[Tensor, Tensor]:
    """The logits by PEFT, and by Transformers' `load_adapter`."""
    peft: Any = PeftModel.from_pretrained(llama(tied=tied), folder).eval()
    transformers = llama(tied=tied)
    transformers.load_adapter(folder)
    return peft(ids()).logits, transformers(ids()).logits


TRAINED = {
    "list": lora(trainable_token_indices=[3, 7]),
    "embedding": lora(trainable_token_indices={"embed_tokens": [7, 3]}),
    "both ends": lora(trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [3, 7]}),
    "both ends, kept tied": lora(
        trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [3, 7]}, ensure_weight_tying=True
    ),
    "each its own": lora(trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [5]}),
    "head": lora(trainable_token_indices={"lm_head": [5]}),
    "alone": TrainableTokensConfig(token_indices=[3, 7]),
    "alone, at the head": TrainableTokensConfig(token_indices=[3], target_modules=["lm_head"]),
    "lora of both ends, kept tied": lora(target_modules=ENDS, ensure_weight_tying=True),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", TRAINED)
def test_pefts_files_both_ways(name: str, tied: bool, tmp_path: Path) -> None:
    config = TRAINED[name]
    y = by_peft(config, tmp_path / "theirs", llama(tied=tied))
    model = lorary.load(llama(tied=tied), tmp_path / "theirs")
    close(model(ids()).logits, y, 1e-5)
    lorary.save(model, tmp_path / "ours")
    assert (tmp_path / "ours" / "adapter_config.json").exists()
    for logits in read_by_peft(tmp_path / "ours", tied=tied):
        close(logits, y, 1e-5)
    assert torch.equal(lorary.load(llama(tied=tied), tmp_path / "ours")(ids()).logits, model(ids()).logits)
    lorary.merge(model)
    close(model(ids()).logits, y, 1e-5)


def test_tied_rows_are_one_tensor_that_goes_on_training(tmp_path: Path) -> None:
    by_peft(TRAINED["list"], tmp_path)
    model = lorary.load(llama(), tmp_path, trainable=True)
    head, table = model.lm_head.params["R"], model.model.embed_tokens.params["R"]
    assert head is table
    assert lorary.merge(model).config.tie_word_embeddings


def test_without_its_base_the_least_vocabulary_is_known(tmp_path: Path) -> None:
    by_peft(TRAINED["list"], tmp_path)
    adapter = lorary.load_adapter(tmp_path)
    (rows,) = (a for a in adapter.sites if a.site.kind == "embedding")
    assert (rows.site.in_features, rows.site.out_features) == (8, 16)


def test_ours_alone_is_a_peft_adapter_and_a_lora_of_its_rank(tmp_path: Path) -> None:
    model = moved(attached())
    y = model(ids()).logits
    lorary.save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["peft_type"] == "TRAINABLE_TOKENS"
    for logits in read_by_peft(tmp_path / "saved", tied=True):
        close(logits, y, 1e-5)


def test_beside_a_method_that_peft_has_no_rows_for_it_is_exported_as_plain_lora(tmp_path: Path) -> None:
    model = llama(tied=False)
    parts = {"attention": lorary.method("melora", r=2, n=2), "vocabulary": lorary.method("rows", tokens=[3, 7])}
    y = moved(lorary.attach(model, lorary.plan(model, parts)))(ids()).logits
    export_peft(lorary.Adapter.of(model), tmp_path / "lora", model=llama(tied=False))
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in written.items() if "embedding_A" in name} == {2}
    for logits in read_by_peft(tmp_path / "lora", tied=False):
        close(logits, y, 1e-5)


# --- modules in full at tied ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", [ENDS, ["embed_tokens"], ["lm_head"]], ids=str)
def test_modules_that_are_kept_tied_are_one_parameter(modules: list[str], tmp_path: Path) -> None:
    y = by_peft(lora(modules_to_save=modules, ensure_weight_tying=True), tmp_path)
    model = lorary.load(llama(), tmp_path)
    close(model(ids()).logits, y, 1e-5)
    assert list(lorary.Adapter.of(model).full) == ["model.embed_tokens.weight"]
    assert lorary.merge(model).config.tie_word_embeddings


@pytest.mark.parametrize("size", [40, 44])
@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight"])
def test_a_tied_table_that_trains_here_is_exported_as_a_tied_one(name: str, size: int, tmp_path: Path) -> None:
    def base() -> Any:
        return lorary.resize_vocabulary(llama(), size)

    model = base()
    plan = lorary.plan(model, lorary.method("lora", r=2, full=(name,)), targets=["q_proj"])
    assert "lm_head.weight is model.embed_tokens.weight, tied: both train" in plan.notes
    y = moved(lorary.attach(model, plan))(ids()).logits
    export_peft(lorary.Adapter.of(model), tmp_path / "peft", model=base())
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (fields["modules_to_save"], fields["ensure_weight_tying"]) == (["lm_head", "model.embed_tokens"], True)
    reader: Any = PeftModel.from_pretrained(base(), tmp_path / "peft").eval()
    transformers = base()
    transformers.load_adapter(tmp_path / "peft")
    back = lorary.load(base(), tmp_path / "peft")
    for read in (reader, transformers, back):
        close(read(ids()).logits, y, 1e-5)
    assert list(lorary.Adapter.of(back).full) == ["model.embed_tokens.weight"]
    lorary.save(model, tmp_path / "own")  # once
    assert "lm_head.weight" not in load_file(tmp_path / "own" / "adapter.safetensors")
    close(lorary.load(base(), tmp_path / "own")(ids()).logits, y, 0.0)
    assert lorary.merge(back).config.tie_word_embeddings


def test_more_than_two_tied_tables_are_not_exported(tmp_path: Path) -> None:
    """PEFT puts T5's head in the place of its embeddings."""
    model = tiny.model("T5ForConditionalGeneration")
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2, full=("shared.weight",)), targets=["q"]))
    with pytest.raises(FileError, match=r"shared: PEFT would untie it from decoder\.embed_tokens\.weight"):
        export_peft(lorary.Adapter.of(model), tmp_path / "peft", model=tiny.model("T5ForConditionalGeneration"))
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("modules", [ENDS, ["embed_tokens"], ["lm_head"]], ids=str)
def test_copies_that_peft_trained_apart_need_an_untied_base(modules: list[str], tmp_path: Path) -> None:
    y = by_peft(lora(modules_to_save=modules), tmp_path)
    for strict in (True, False):
        with pytest.raises(FileError) as caught:
            lorary.load(llama(), tmp_path, strict=strict)
        assert "untie the base's weights before loading: lorary.untie_embeddings(model)" in str(caught.value)
    assert "model.embed_tokens.weight: differs from model.embed_tokens.weight" not in str(caught.value)
    model = lorary.load(lorary.untie_embeddings(llama()), tmp_path)
    close(model(ids()).logits, y, 1e-5)


# --- resized vocabularies ---------------------------------------------------------------------------------------------


def resized(*, tied: bool) -> Any:
    """A base whose four new rows are drawn, as Transformers does."""
    model = llama(tied=tied)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        model.resize_token_embeddings(44)
    return model


RESIZED = {
    "linear layers": lora(),
    "embedding": lora(target_modules=["q_proj", "embed_tokens"]),
    "both ends": lora(target_modules=ENDS),
    "in full": lora(modules_to_save=ENDS),
    "in full, kept tied": lora(modules_to_save=ENDS, ensure_weight_tying=True),
}


APART = {("in full", True), ("in full, kept tied", False)}  # copies of a tied base, and a tie that there is not


@pytest.mark.parametrize(("name", "tied"), sorted({(n, t) for n in RESIZED for t in (True, False)} - APART))
def test_tables_of_a_resized_base_come_with_the_adapter(name: str, tied: bool, tmp_path: Path) -> None:
    y = by_peft(RESIZED[name], tmp_path, resized(tied=tied), save_embedding_layers=True)
    for strict in (True, False):
        with pytest.raises(FileError) as caught:
            lorary.load(llama(tied=tied), tmp_path, strict=strict)
        assert "was trained on a vocabulary of 44 tokens, and this model has 40" in str(caught.value)
        assert "lorary.resize_vocabulary(model, 44)" in str(caught.value)
        model = lorary.load(lorary.resize_vocabulary(llama(tied=tied), 44), tmp_path, strict=strict)
        # an untied head that is neither adapted nor saved has its new rows from the base
        close(model(ids()).logits[..., :40], y[..., :40], 1e-5)
    x = torch.tensor([[41, 3, 43]])
    reference: Any = PeftModel.from_pretrained(resized(tied=tied), tmp_path).eval()
    close(model(x).logits[..., :40], reference(x).logits[..., :40], 1e-5)


def test_a_table_of_another_base_is_refused_and_taken_as_in_peft_if_told(tmp_path: Path) -> None:
    y = by_peft(lora(target_modules=["embed_tokens"]), tmp_path, save_embedding_layers=True)
    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1
    with pytest.raises(FileError, match="is a copy of the base's own table, and this model's is another"):
        lorary.load(other, tmp_path)
    reference: Any = PeftModel.from_pretrained(llama(), tmp_path).eval()
    close(reference(ids()).logits, y)


# --- files that are wrong ---------------------------------------------------------------------------------------------


def changed(source: Path, target: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """A copy of a folder with other fields, and with other tensors; None removes one."""
    shutil.copytree(source, target)
    file = target / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    found: dict[str, Any] = load_file(target / "adapter_model.safetensors") | tensors
    save_file({k: v for k, v in found.items() if v is not None}, target / "adapter_model.safetensors")
    return target


NAME = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"trainable_token_indices": [3, 3]}, {}, "trainable_token_indices: names token 3 twice"),
    ({"trainable_token_indices": [-1, 3]}, {}, "not a list of token ids"),
    (
        {"trainable_token_indices": [3, 99]},
        {},
        "token 99 is outside its vocabulary of 40: resize the model to at least 100",
    ),
    ({"trainable_token_indices": [3, True]}, {}, "not a list of token ids"),
    ({"trainable_token_indices": "3,7"}, {}, "not a list of token ids"),
    ({"trainable_token_indices": {"embed_tokens": []}}, {}, "names no token"),
    ({"trainable_token_indices": {"wte": [3, 7]}}, {}, "names 'wte', and the model has no such layer"),
    ({"trainable_token_indices": [3, 7, 9]}, {}, "has the shape [2, 16], expected [3, 16]"),
    ({"trainable_token_indices": None}, {}, "belongs to trainable tokens, which the configuration does not name"),
    ({}, {NAME: None}, f"{NAME.removeprefix('base_model.model.')}: is missing"),
    ({}, {NAME: torch.full((2, 16), float("nan"))}, "32 of 32 values are NaN or infinite"),
    ({}, {NAME: torch.ones(2, 8)}, "has the shape [2, 8], expected [2, 16]"),
    (
        {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [5]}, "ensure_weight_tying": True},
        {},
        "ensure_weight_tying: is true, and `trainable_token_indices` names other tokens for a head",
    ),
    ({"ensure_weight_tying": "yes"}, {}, "ensure_weight_tying: is 'yes'; it takes true or false"),
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "theirs"
    by_peft(TRAINED["list"], folder)
    return folder


@pytest.mark.parametrize(("config", "tensors", "sentence"), WRONG, ids=lambda v: str(v)[:60])
def test_files_that_are_wrong_are_refused(
    config: dict[str, Any], tensors: dict[str, Any], sentence: str, theirs: Path, tmp_path: Path
) -> None:
    folder = changed(theirs, tmp_path / "wrong", config, tensors)
    model = llama()
    with pytest.raises(FileError) as caught:
        lorary.load(model, folder)
    assert sentence.replace("'", '"') in str(caught.value).replace("'", '"')
    assert not any(isinstance(m, lorary.Adapted) for m in model.modules())


def test_copies_in_one_file_must_agree(tmp_path: Path) -> None:
    by_peft(TrainableTokensConfig(token_indices=[3, 7]), tmp_path / "theirs")
    name = "base_model.model.lm_head.trainable_tokens_delta"
    folder = changed(tmp_path / "theirs", tmp_path / "wrong", {}, {name: torch.ones(2, 16)})
    with pytest.raises(FileError, match=r"its R differs from that of model\.embed_tokens, to which it is tied"):
        lorary.load(llama(), folder)


def test_a_base_without_token_embeddings_is_refused(theirs: Path) -> None:
    with pytest.raises(FileError, match="names no layer, and the model has no input embedding"):
        lorary.load(nn.Sequential(nn.Linear(16, 16)), theirs)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"wte": [3, 7]}, "embed_tokens.token_adapter.trainable_tokens_delta: is there, and `trainable_token_indices`"),
        (
            {"embed_tokens": [3, 7], "lm_head": [5, 6]},
            "lm_head.token_adapter.trainable_tokens_delta: is missing, and `trainable_token_indices` names tokens",
        ),
    ],
)
def test_names_that_fit_no_tensor_are_refused_without_a_base_too(
    asked: dict[str, list[int]], sentence: str, theirs: Path, tmp_path: Path
) -> None:
    folder = changed(theirs, tmp_path / "wrong", {"trainable_token_indices": asked}, {})
    with pytest.raises(FileError) as caught:
        lorary.load_adapter(folder)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_of_a_padded_vocabulary_take_its_padding_and_peft_reads_them(tied: bool, tmp_path: Path) -> None:
    """As after `resize_token_embeddings(pad_to_multiple_of=64)`: the rows follow the tokenizer's last one."""
    words = tokenizer()

    def padded() -> Any:
        model = llama(tied=tied, size=300)
        torch.manual_seed(5)
        model.resize_token_embeddings(pad_to_multiple_of=64)
        return model

    model, first = padded(), len(words)
    assert first < 300 < model.config.vocab_size == 320
    new = lorary.add_tokens(model, words, ["<a>", "<b>"])
    assert new == (first, first + 1)
    assert model.config.vocab_size == 320
    moved(attached(model=model, tokens=new))
    x = words("<a> two <b>", return_tensors="pt")["input_ids"]
    assert {*new} <= {*x[0].tolist()}
    y = model(x).logits
    lorary.save(model, tmp_path)
    theirs: Any = PeftModel.from_pretrained(padded(), tmp_path).eval()
    close(theirs(x).logits, y, 1e-5)
    merged = lorary.merge(model)
    close(merged(x).logits, y, 1e-5)
    changed_rows = (merged.model.embed_tokens.weight != padded().model.embed_tokens.weight).any(1).nonzero().flatten()
    assert tuple(changed_rows.tolist()) == new
