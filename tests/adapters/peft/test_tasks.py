"""`task_type` and `auto_mapping`: every folder opens with PEFT's own classes, and computes the same there."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorary
from lorary.adapters import export_peft
from tests.adapters.models import close

peft = pytest.importorskip("peft")

_BERT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
_LLAMA = _BERT | {"num_key_value_heads": 2, "pad_token_id": 0}
_GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
_VIT = {k: v for k, v in _BERT.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
_BART = {"vocab_size": 40, "d_model": 16, "pad_token_id": 0, "max_position_embeddings": 40}
_STACKS = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in (("layers", 1), ("ffn_dim", 24))}
_STACKS |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
_WHISPER = {"vocab_size": 40, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 12}
_LAST = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}


def _llava() -> Any:
    text = transformers.LlamaConfig(**_LLAMA)
    vision = transformers.CLIPVisionConfig(**_VIT, projection_dim=16)
    return transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=39, vision_feature_layer=-1
    )


IDS = {"input_ids": torch.arange(1, 17).reshape(2, 8)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)}
DECODED = {"decoder_input_ids": torch.arange(1, 9).reshape(2, 4)}
FEATURES = {"input_features": torch.linspace(-1, 1, 2 * 8 * 16).reshape(2, 8, 16)}
IMAGE = {"input_ids": torch.tensor([[1, 39, 39, 39, 39, 2, 3]] * 2)} | PIXELS


@dataclasses.dataclass(frozen=True)
class Case:
    """A base, its inputs, and the Auto class of PEFT that loads it with its adapter.

    Args:
        name: the class of the base.
        config: of the base.
        inputs: of the base's forward.
        task: the `task_type` that is written.
        auto: PEFT's Auto class for it.
    """

    name: str
    config: Callable[[], Any]
    inputs: dict[str, Tensor]
    task: str | None = None
    auto: str = "AutoPeftModel"

    def __str__(self) -> str:
        return self.name


def case(name: str, settings: dict[str, Any], inputs: dict[str, Tensor], *rest: Any) -> Case:
    kind = next(k for k in ("Llama", "GPT2", "Bert", "T5", "Whisper", "ViT", "Bart") if name.startswith(k))
    return Case(name, lambda: getattr(transformers, f"{kind}Config")(**settings), inputs, *rest)


CASES = [
    case("LlamaForCausalLM", _LLAMA, IDS, "CAUSAL_LM", "AutoPeftModelForCausalLM"),
    case("LlamaForSequenceClassification", _LLAMA, IDS, "SEQ_CLS", "AutoPeftModelForSequenceClassification"),
    case("LlamaModel", _LLAMA, IDS, "FEATURE_EXTRACTION", "AutoPeftModelForFeatureExtraction"),
    case("GPT2LMHeadModel", _GPT2, IDS, "CAUSAL_LM", "AutoPeftModelForCausalLM"),
    case("BertModel", _BERT, IDS, "FEATURE_EXTRACTION", "AutoPeftModelForFeatureExtraction"),
    case("BertForMaskedLM", _BERT, IDS),
    case("BertForSequenceClassification", _BERT, IDS, "SEQ_CLS", "AutoPeftModelForSequenceClassification"),
    case("BertForTokenClassification", _BERT, IDS, "TOKEN_CLS", "AutoPeftModelForTokenClassification"),
    case("BertForQuestionAnswering", _BERT, IDS, "QUESTION_ANS", "AutoPeftModelForQuestionAnswering"),
    case("T5ForConditionalGeneration", _T5, IDS | DECODED, "SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM"),
    case("BartForConditionalGeneration", _BART | _STACKS, IDS, "SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM"),
    case("T5EncoderModel", _T5, IDS),  # Auto classes would build a T5Model
    case("WhisperForConditionalGeneration", _WHISPER | _STACKS | _LAST, FEATURES | DECODED),
    case("ViTForImageClassification", _VIT, PIXELS),
    Case("LlavaForConditionalGeneration", _llava, IMAGE),
]
HEADED = [c for c in CASES if c.task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")]  # their heads train by default


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a base is found from by its name."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def base(case: Case) -> Any:
    """The base, read from `base` in the working directory."""
    made = getattr(transformers, case.name)
    if not Path("base").exists():
        torch.manual_seed(3)
        made(case.config()).eval().save_pretrained("base")
    return made.from_pretrained("base").eval()


def adapted(case: Case) -> nn.Module:
    model = base(case)
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2, alpha=8)))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def output(model: Any, case: Case) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**case.inputs)[0]
    return found


def head(folder: Path) -> tuple[Any, Any]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["task_type"], config["auto_mapping"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pefts_classes_open_the_folder(case: Case, folder: Path) -> None:
    model = adapted(case)
    want = output(model, case)
    assert (output(base(case), case) - want).abs().max() > 1e-3
    lorary.save(model, folder / "a")
    assert head(folder / "a")[0] == case.task
    close(output(peft.PeftModel.from_pretrained(base(case), "a").eval(), case), want)
    close(output(getattr(peft, case.auto).from_pretrained("a").eval(), case), want)
    by_transformers = base(case)
    by_transformers.load_adapter("a")
    close(output(by_transformers.eval(), case), want)
    close(output(lorary.load(base(case), "a"), case), want)


@pytest.mark.parametrize("case", HEADED, ids=str)
def test_a_head_that_the_file_lacks_is_not_asked_for(case: Case, folder: Path) -> None:
    adapter = lorary.Adapter.of(adapted(case))
    headless = dataclasses.replace(adapter, method=adapter.method.replace(full=()), full={})
    lorary.save_adapter(headless, folder / "a", model=base(case))
    assert head(folder / "a")[0] is None
    want = output(lorary.load(base(case), "a"), case)
    close(output(peft.PeftModel.from_pretrained(base(case), "a").eval(), case), want)
    close(output(peft.AutoPeftModel.from_pretrained("a").eval(), case), want)


@pytest.mark.parametrize("case", [c for c in HEADED if c.name.startswith("Llama")], ids=str)
def test_a_head_that_is_drawn_again_gets_its_trained_values(case: Case, folder: Path) -> None:
    """The checkpoint has no head, so every load of the base draws another."""
    base(dataclasses.replace(case, name="LlamaForCausalLM"))  # writes the checkpoint
    torch.manual_seed(1)
    model = adapted(case)
    lorary.save(model, folder / "a")
    torch.manual_seed(2)
    other = base(case)
    assert not torch.equal(other.score.weight, lorary.Adapter.of(model).full["score.weight"])
    close(output(peft.PeftModel.from_pretrained(copy.deepcopy(other), "a").eval(), case), output(model, case))
    close(output(lorary.load(copy.deepcopy(other), "a", force=True), case), output(model, case))
    (folder / "a" / "lorary.json").unlink()
    close(output(lorary.load(other, "a"), case), output(model, case))


@pytest.mark.parametrize("case", [c for c in CASES if c not in HEADED and "Image" not in c.name], ids=str)
def test_without_the_base_its_class_is_known_by_its_name(case: Case, folder: Path) -> None:
    adapter = lorary.Adapter.of(adapted(case))
    export_peft(adapter, folder / "a", model=base(case))
    export_peft(adapter, folder / "b")
    assert head(folder / "a") == head(folder / "b")


def test_pefts_auto_mapping_is_ours(folder: Path) -> None:
    whisper = next(c for c in CASES if c.name.startswith("Whisper"))
    lorary.save(adapted(whisper), folder / "a")
    theirs = peft.get_peft_model(base(whisper), peft.LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained("b")
    assert head(folder / "a") == head(folder / "b")


class MineForCausalLM(transformers.LlamaForCausalLM):
    """A class of no library."""


class PixelsForCausalLM(nn.Module):
    """A class that PEFT's would call with arguments that it does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        out: Tensor = self.body(pixel_values)
        return out


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (lambda: MineForCausalLM(transformers.LlamaConfig(**_LLAMA)), "CAUSAL_LM"),
        (PixelsForCausalLM, None),
        (Plain, None),
    ],
    ids=["MineForCausalLM", "PixelsForCausalLM", "Plain"],
)
def test_classes_outside_of_libraries(make: Callable[[], nn.Module], task: str | None, tmp_path: Path) -> None:
    model = make()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2)))
    lorary.save(model, tmp_path / "a")
    assert head(tmp_path / "a") == (task, None)
