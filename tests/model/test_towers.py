"""The towers of multimodal models: presets, and the plan's table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import lorary
from lorary.model.scan import scan
from lorary.model.towers import tower_of, tower_roots
from tests import architectures, tiny
from tests.experts import moe

LORA = lorary.method("lora", r=2)
_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_TEXT = _SIZES | {"vocab_size": 40, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}


def qwen2_vl() -> Any:
    config = transformers.Qwen2VLConfig(
        text_config=_TEXT | {"rope_parameters": _ROPE},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
    )
    with torch.device("meta"):
        return transformers.Qwen2VLForConditionalGeneration(config)


def built(name: str) -> Any:
    return qwen2_vl() if name == "Qwen2VL" else architectures.model(name, "meta")


# model -> tower -> the beginnings of its layers' paths
MODELS = {
    "LlavaForConditionalGeneration": {
        "language": ("model.language_model.",),
        "vision": ("model.vision_tower.",),
        "projector": ("model.multi_modal_projector.",),
    },
    "PaliGemmaForConditionalGeneration": {
        "language": ("model.language_model.",),
        "vision": ("model.vision_tower.",),
        "projector": ("model.multi_modal_projector.",),
    },
    "CLIPModel": {
        "language": ("text_model.",),
        "vision": ("vision_model.",),
        "projector": ("text_projection", "visual_projection"),
    },
    "BlipForConditionalGeneration": {"language": ("text_decoder.",), "vision": ("vision_model.",)},
    "Qwen2VL": {
        "language": ("model.language_model.",),
        "vision": ("model.visual.blocks.",),
        "projector": ("model.visual.merger.",),
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_but_the_head_is_in_one_tower(name: str) -> None:
    scanned = scan(built(name))
    roots, found = tower_roots(scanned), dict[str, set[str]]()
    for path, m in scanned.modules.items():
        if m.kind == "linear" and path not in scanned.heads:
            found.setdefault(tower_of(path, roots, scanned.heads), set()).add(path)
    assert set(found) == set(MODELS[name])
    for tower, beginnings in MODELS[name].items():
        assert all(path.startswith(beginnings) for path in found[tower]), found[tower]


@pytest.mark.parametrize("tower", ["language", "vision", "projector"])
def test_a_preset_is_its_tower_and_the_plan_counts_it(tower: str) -> None:
    model = architectures.model("LlavaForConditionalGeneration", "meta")
    plan = lorary.plan(model, LORA, targets=tower)
    beginnings = MODELS["LlavaForConditionalGeneration"][tower]
    assert plan.sites
    assert all(p.site.name.startswith(beginnings) for p in plan.sites)
    counts = {t.name: (t.adapted, t.trains) for t in plan.towers}
    assert counts.pop(tower) == (len(plan.sites), plan.trainable)
    assert set(counts.values()) == {(0, 0)}
    heads = {id(p): p.numel() for n, p in model.named_parameters() if n.startswith("lm_head")}
    assert sum(t.parameters for t in plan.towers) == plan.total - sum(heads.values())
    assert f"\n{tower} " in str(plan)


def test_the_language_tower_of_a_mixture_has_its_experts() -> None:
    plan = lorary.plan(moe("Qwen3VLMoeForConditionalGeneration"), LORA, targets="language")
    (language,) = (t for t in plan.towers if t.adapted)
    assert sum(p.site.experts > 0 for p in plan.sites) == 4  # two parameters of two layers
    assert (language.name, language.adapted) == ("language", language.layers)


def test_a_tower_can_be_left_out() -> None:
    model = architectures.model("LlavaForConditionalGeneration", "meta")
    plan = lorary.plan(model, LORA, targets=["attention", "projector"], exclude="vision")
    assert {t.name for t in plan.towers if t.adapted} == {"language", "projector"}
    with pytest.raises(lorary.PlanError, match="excludes every layer that the targets name"):
        lorary.plan(model, LORA, targets="vision", exclude="vision")


@pytest.mark.parametrize("tower", ["language", "vision", "audio", "projector"])
def test_a_model_of_one_part_has_no_towers(tower: str) -> None:
    model = tiny.llama()
    assert lorary.plan(model, LORA).towers == ()
    assert "linear layers" not in str(lorary.plan(model, LORA))
    with pytest.raises(lorary.PlanError, match=f"`{tower}` matches no layer of this model"):
        lorary.plan(model, LORA, targets=tower)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a tower that it lacks": ("audio", {}, "targets: `audio` matches no layer of this model"),
    "one of several": (["vision", "audio"], {}, "targets: `audio` matches no layer of this model"),
    "a misspelt tower": ("vison", {}, "targets: `vison` matches no layer\n      hint: did you mean `vision`?"),
    "in capitals": ("Vision", {}, "targets: `Vision` matches no layer\n      hint: did you mean `vision`?"),
    "a part of a tower": ("vision[q]", {}, "targets: `vision[q]` matches no layer"),
    "excluding what it lacks": ("vision", {"exclude": "audio"}, "exclude: `audio` matches no layer of this model"),
    "excluding a misspelt one": ("vision", {"exclude": "languge"}, "hint: did you mean `language`?"),
    "excluding all of it": ("projector", {"exclude": "linear_*"}, "exclude: excludes every layer that the targets"),
    "a rank for a tower": (["language", "vision"], {"ranks": {"vision": 4}}, "ranks: `vision` matches no adapted site"),
    "a tower in full": ("language", {"full": "vision"}, "full: `vision` matches no parameter"),
    "two methods for one tower": (
        {"vision": LORA, "all-linear": lorary.method("dora", r=2)},
        {},
        "(`vision`) and LowRank (`all-linear`) both adapt model.vision_tower.encoder.layers.{0-1}.self_attn.k_proj",
    ),
    "a prefix before pictures": (
        {"vision": lorary.method("prefix-tuning", tokens=2)},
        {},
        "model.vision_tower.encoder.layers.0.self_attn.q_proj: is not a projection of keys or values",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plans_that_cannot_be_are_refused(case: str) -> None:
    targets, options, sentence = REFUSED[case]
    model = architectures.model("LlavaForConditionalGeneration", "meta")
    before = tiny.everything(model)
    with pytest.raises(lorary.PlanError) as caught:
        lorary.plan(model, *([targets] if isinstance(targets, dict) else [LORA, targets]), **options)
    assert sentence in str(caught.value)
    assert tiny.everything(model) == before
