"""The plan of a vLLM server: what is converted computes the same in PEFT, and what vLLM cannot compute is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import lorary
from lorary import builtin
from lorary.errors import ConfigError, FileError
from lorary.model.loading.source import ModelSection
from lorary.serve.vllm.plan import VllmPlan, VllmSettings, vllm_plan
from tests import tiny

BASE = ModelSection.of("builtin:base", dtype="float32")
TARGETS = ["q_proj", "v_proj", "down_proj"]
# name -> presets, options, whether vLLM reads another form, the rank there
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any], bool, int]] = {
    "lora": (("lora",), {"r": 3, "alpha": 7}, False, 3),
    "rslora": (("rslora",), {"r": 4}, False, 4),
    "lora-plus": (("lora+",), {"r": 4}, False, 4),
    "lora-fa": (("lora-fa",), {"r": 4}, False, 4),
    "ranks": (("lora",), {"r": 2, "ranks": {"down_proj": 20}, "alphas": {"q_proj": 3.0}}, False, 20),
    "o-lora": (("o-lora",), {"r": 4}, False, 4),
    "adalora": (("adalora",), {"r": 4, "target": 2}, True, 4),
    "pissa": (("pissa",), {"r": 4}, True, 8),
    "olora": (("olora",), {"r": 4}, True, 8),
    "melora": (("melora",), {"r": 4}, True, 8),
    "multilora": (("multilora",), {"r": 4}, True, 12),
    "vera": (("vera",), {"r": 8}, True, 8),
}


def saved(folder: Path, presets: tuple[str, ...], options: dict[str, Any], full: tuple[str, ...] = ()) -> Any:
    """The logits of the base with a filled adapter, which is saved."""
    options = dict(options)
    where = {key: options.pop(key) for key in ("ranks", "alphas", "targets") if key in options}
    model = builtin.load_model()
    method = lorary.method(*presets, **options).replace(full=full)
    lorary.attach(model, lorary.plan(model, method, **({"targets": TARGETS} | where)))
    tiny.shaken(model, 0.05)
    lorary.save(model, folder)
    return model


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Name -> (folder of an adapter, the logits with it)."""
    root, ids = tmp_path_factory.mktemp("adapters"), torch.arange(5, 25)[None]
    found = {}
    for name, (presets, options, _, _) in METHODS.items():
        model = saved(root / name, presets, options)
        with torch.no_grad():
            found[name] = root / name, model(input_ids=ids).logits
    return found


@pytest.fixture(scope="module")
def plan(adapters: dict[str, tuple[Path, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory) -> VllmPlan:
    folders = {name: folder for name, (folder, _) in adapters.items()}
    settings = VllmSettings("env/bin/vllm", port=8123, key="a secret", options="--max-model-len 64")
    return vllm_plan(folders, BASE, tmp_path_factory.mktemp("converted"), settings)


@pytest.mark.parametrize("name", METHODS)
def test_peft_computes_the_same_with_what_vllm_reads(
    name: str, plan: VllmPlan, adapters: dict[str, tuple[Path, torch.Tensor]]
) -> None:
    served = next(adapter for adapter in plan.adapters if adapter.name == name)
    _, _, converted, rank = METHODS[name]
    assert (served.converted, served.rank) == (converted, rank)
    assert served.folder.is_relative_to(adapters[name][0]) != converted
    base = builtin.load_model()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        bare = base(input_ids=ids).logits
        found = PeftModel.from_pretrained(base, str(served.folder)).eval()(input_ids=ids).logits
    want = adapters[name][1]
    assert (found - want).abs().max() < (want - bare).abs().max() / 1000


def test_the_command_is_exact(plan: VllmPlan) -> None:
    modules = [{"name": a.name, "path": str(a.folder), "base_model_name": "builtin:base"} for a in plan.adapters]
    assert plan.command == (
        *("env/bin/vllm", "serve", str(builtin.path()), "--served-model-name", "builtin:base", "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", "8123", "--enable-lora", "--max-lora-rank", "32"),
        *("--max-loras", "12", "--max-cpu-loras", "12", "--lora-modules", *map(json.dumps, modules)),
        *("--max-model-len", "64"),
    )
    assert (plan.url, plan.base) == ("http://127.0.0.1:8123", "builtin:base")


def test_the_key_is_where_other_users_cannot_read_it(plan: VllmPlan) -> None:
    assert plan.environment == {"VLLM_API_KEY": "a secret", "VLLM_NO_USAGE_STATS": "1"}
    assert "secret" not in repr(plan) + str(plan) + repr(VllmSettings(key="a secret"))


def test_the_smallest_rank_and_the_dtype_that_is_asked_for(
    adapters: dict[str, tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    settings = VllmSettings(host="0.0.0.0", name="small")
    found = vllm_plan({"a": adapters["lora"][0]}, ModelSection.of("builtin:base", dtype="bfloat16"), tmp_path, settings)
    said = dict(zip(found.command, found.command[1:], strict=False))
    assert (said["--max-lora-rank"], said["--max-loras"], said["--dtype"]) == ("8", "1", "bfloat16")
    assert (said["--served-model-name"], found.base, found.url) == ("small", "small", "http://127.0.0.1:8000")
    assert list(tmp_path.iterdir()) == []  # nothing is converted without need
    assert "VLLM_API_KEY" not in found.environment


def test_scaled_rope_goes_to_the_base_and_is_not_mixed(
    adapters: dict[str, tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    saved(tmp_path / "long", ("longlora", "lora"), {"r": 4, "length": 512})
    (tmp_path / "converted").mkdir()
    found = vllm_plan({"long": tmp_path / "long"}, BASE, tmp_path / "converted")
    overrides = json.loads(found.command[found.command.index("--hf-overrides") + 1])
    assert overrides == {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}}
    assert found.scaled
    with pytest.raises(FileError) as raised:
        vllm_plan({"a": adapters["lora"][0], "long": tmp_path / "long"}, BASE, tmp_path / "converted")
    assert str(raised.value) == (
        "cannot serve with vLLM:\n"
        "  - a, long need different RoPE scalings, and a vLLM server has one\n"
        "      hint: serve them by separate servers, or by lorary's own engine"
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(folders: dict[str, Path], tmp_path: Path, settings: VllmSettings | None = None) -> str:
    converted = tmp_path / "converted"
    converted.mkdir(exist_ok=True)
    with pytest.raises((FileError, ConfigError)) as raised:
        vllm_plan(folders, BASE, converted, settings or VllmSettings())
    assert list(converted.iterdir()) == []
    return str(raised.value)


def test_every_reason_of_every_adapter_at_once(tmp_path: Path) -> None:
    saved(tmp_path / "dora", ("dora",), {"r": 4, "targets": ["q_proj"]})
    saved(tmp_path / "full", ("lora",), {"r": 4, "targets": ["q_proj"]}, full=("model.norm",))
    saved(tmp_path / "huge", ("lora",), {"r": 576, "targets": ["q_proj"]})
    folders = {name: tmp_path / name for name in ("dora", "full", "huge")}
    said = refused(folders, tmp_path)
    for sentence in (
        "dora: model.layers.0.self_attn.q_proj and 5 more: DoRA does more than add B A x, and an adapter for vLLM does",
        "full: model.norm.weight: is trained in full, and an adapter for vLLM holds low-rank updates only",
        "huge: rank: is 576, and vLLM takes at most 512",
    ):
        assert sentence in said


def damage(folder: Path, how: str) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    tensors = load_file(weights)
    name = next(iter(tensors))
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "not a number":
        save_file(tensors | {name: tensors[name] * float("nan")}, weights)
    elif how == "a shape":
        save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, weights)
    elif how == "an unknown tensor":
        save_file(tensors | {"base_model.model.more.lora_A.weight": tensors[name].clone()}, weights)
    elif how == "no weights":
        weights.unlink()
    elif how == "a pickle":
        weights.rename(folder / "adapter_model.bin")
    elif how == "not JSON":
        config.write_text("{")
    else:
        config.write_text(json.dumps(settings | {"alora_invocation_tokens": [1, 2]}))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("truncated", "adapter_model.safetensors: the tensors need 36,864 bytes, the file has 36,764: it is cut short"),
        ("not a number", "model.layers.0.self_attn.q_proj.lora_A.weight: 768 of 768 values are NaN or infinite"),
        ("a shape", "model.layers.0.self_attn.q_proj: has 192 input features, expected 191"),
        ("an unknown tensor", "more.lora_A.weight: adapts a module that the configuration does not name"),
        ("no weights", "adapter_model.safetensors: is missing"),
        ("a pickle", "adapter_model.bin: is a pickle, which can run code when it is read; it was not opened"),
        ("not JSON", "adapter_config.json: not JSON: expecting property name"),
        (
            "an invocation",
            "model.layers.0.self_attn.q_proj and 5 more: FromInvocation does more than add B A x, and an adapter for vLLM",
        ),
    ],
)
def test_damaged_and_hostile_adapters(how: str, sentence: str, adapters: Any, tmp_path: Path) -> None:
    saved(tmp_path / "bad", ("lora",), {"r": 4, "targets": ["q_proj"]})
    (tmp_path / "bad" / "lorary.json").unlink(missing_ok=True)
    damage(tmp_path / "bad", how)
    said = refused({"bad": tmp_path / "bad", "good": adapters["lora"][0]}, tmp_path)
    assert f"  - bad: {sentence}" in said
    assert "good" not in said


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    model = tiny.trained(tiny.llama())
    lorary.save(model, tmp_path / "other")
    said = refused({"other": tmp_path / "other"}, tmp_path)
    assert "  - other: base: other layers or sizes: " in said
    assert "  - other: model.layers.0.self_attn.q_proj and 5 more: has 192 output features, expected 16" in said


def test_settings_and_names_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    settings = VllmSettings(program="", host="a b", port=70000, options="--x 'y")
    said = refused({"builtin:base": tmp_path / "none", "a/b": tmp_path / "none", ".": tmp_path}, tmp_path, settings)
    assert said == (
        "cannot serve with vLLM:\n"
        "  - --vllm: is empty\n      hint: name the command that runs vLLM\n"
        '  - --vllm-options: "--x \'y": no closing quotation\n'
        "  - --port: is 70000, and must be between 1 and 65535\n"
        "  - --host: 'a b' is not the name or address of this machine\n"
        "  - builtin:base: is the name of the base\n      hint: give the adapter another name: NAME=FOLDER\n"
        "  - 'builtin:base' cannot name an adapter, which takes letters, digits and `.`, `_`, `-`\n"
        "      hint: give the adapter another name: NAME=FOLDER\n"
        "  - 'a/b' cannot name an adapter, which takes letters, digits and `.`, `_`, `-`\n"
        "      hint: give the adapter another name: NAME=FOLDER\n"
        "  - '.' cannot name an adapter, which takes letters, digits and `.`, `_`, `-`\n"
        "      hint: give the adapter another name: NAME=FOLDER"
    )
    assert refused({}, tmp_path) == (
        "cannot serve with vLLM:\n"
        "  - no adapter is given\n      hint: without adapters, start vLLM itself: vllm serve MODEL"
    )
