"""What cannot become a merged model: a clear error with every reason, and nothing written."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorary
from lorary.adapters import export_merged
from lorary.adapters.adapter import Adapter
from lorary.errors import LoraryError
from tests.adapters.export.bases import saved_adapter, saved_base
from tests.files.test_atomic import largest_file

LLAMA: Any = "LlamaForCausalLM"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of several files and an adapter on it."""
    folder = tmp_path_factory.mktemp("made")
    saved_adapter(saved_base(LLAMA, folder / "base"), folder / "base", folder / "adapter")
    return folder


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    """A copy of the base, to be damaged."""
    return Path(shutil.copytree(made / "base", tmp_path / "base"))


def refused(adapter: Adapter, base: Any, folder: Path, **options: Any) -> str:
    """The error of an export; nothing is left of it."""
    with pytest.raises(LoraryError) as caught:
        export_merged(adapter, base, folder / "out", **options)
    assert sorted(p.name for p in folder.iterdir()) in (["base"], [])
    assert caught.value.headline
    return str(caught.value)


def index(base: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((base / INDEX).read_text())
    changed = change(record)
    (base / INDEX).write_text(json.dumps(record if changed is None else changed))


def first(base: Path) -> Path:
    return sorted(base.glob("*.safetensors"))[0]


def cut(base: Path) -> None:
    first(base).write_bytes(first(base).read_bytes()[:-100])


def without_a_norm(base: Path) -> None:
    index(base, lambda record: record["weight_map"].pop("model.norm.weight") and None)


def quantised(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))


def wider(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 28}))


def pickled(base: Path) -> None:
    for file in base.glob("*.safetensors"):
        file.unlink()
    (base / INDEX).unlink()
    (base / "pytorch_model.bin").write_bytes(b"x")


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (
        cut,
        r"model-00001-of-\d+.safetensors: is not a whole safetensors file: .*\n.*hint: download it again",
    ),
    "file missing": (lambda base: first(base).unlink(), r"model-00001-of-\d+.safetensors: is missing"),
    "no index": (
        lambda base: (base / INDEX).unlink(),
        "there is neither model.safetensors nor model.safetensors.ind",
    ),
    "no map": (lambda base: index(base, lambda record: {}), f"{INDEX}: holds no `weight_map` of tensor names"),
    "index that is no JSON": (
        lambda base: (base / INDEX).write_text("{"),
        f"weights of base:\n  - {INDEX}: not JSON: expecting",
    ),
    "path out of the folder": (
        lambda base: index(base, lambda record: record["weight_map"].update(x="../../etc/x.safetensors")),
        "is not the name of a safetensors file in the folder",
    ),
    "tensor not in its file": (
        lambda base: index(
            base, lambda r: r["weight_map"].update({"model.norm.bias": r["weight_map"]["lm_head.weight"]})
        ),
        'safetensors: lacks "?model.norm.bias"?, which model.safetensors.index.json lists',
    ),
    "weights missing": (without_a_norm, "cannot read the base:\n  - model.norm.weight: is in none of its files"),
    "quantised on disk": (quantised, "is quantised on disk: .*\n.*hint: `lorary merge` loads the whole model"),
    "other sizes": (
        wider,
        "does not fit .*:\n  - model.layers.0.mlp.gate_proj: has 28 output features, expected 24",
    ),
    "pickles": (pickled, "pytorch_model.bin: weights as a pickle, which can run code"),
    "no configuration": (lambda base: (base / "config.json").unlink(), "there is no config.json in it"),
    "code": (
        lambda base: (base / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}'),
        "`auto_map`: the model would run its own Python code",
    ),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGED.values(), ids=DAMAGED)
def test_a_base_that_cannot_be_read(
    damage: Callable[[Path], Any], expected: str, made: Path, base: Path, tmp_path: Path
) -> None:
    damage(base)
    assert re.search(expected, refused(lorary.load_adapter(made / "adapter"), base, tmp_path))


def test_a_link_out_of_the_folder(made: Path, base: Path, tmp_path: Path) -> None:
    moved = tmp_path / "base" / "kept"
    moved.mkdir()
    file = first(base)
    shutil.move(file, moved / "file")
    file.symlink_to(made / "base" / file.name)
    text = refused(lorary.load_adapter(made / "adapter"), base, tmp_path)
    assert f"{file.name}: is a link that leaves the folder" in text


def test_a_chat_template_that_is_another_file(made: Path, tmp_path: Path) -> None:
    """An adapter from somewhere must not bring a file of this machine into a model that is then shared."""
    (made / "private").mkdir()
    (made / "private" / "key").write_text("secret")
    template = made / "adapter" / "chat_template.jinja"
    template.symlink_to(made / "private" / "key")
    text = refused(lorary.load_adapter(made / "adapter"), made / "base", tmp_path, chat_template=template)
    template.unlink()
    assert "chat_template.jinja: is a link that leaves the folder" in text


def test_every_bad_option_at_once(made: Path, tmp_path: Path) -> None:
    text = refused("adapter", made / "base", tmp_path, dtype=torch.int8, onto="frozen")  # type: ignore[arg-type]
    assert text == (
        "cannot export the merged model:\n"
        "  - adapter: is a str, not an Adapter\n"
        "  - dtype: is torch.int8: the steps between 4-bit or 8-bit numbers are coarser than what an adapter changes, "
        "and rounding would undo it\n"
        "      hint: use torch.bfloat16 or torch.float32\n"
        "  - onto: is 'frozen', expected one of trained, original"
    )


def test_paths_that_are_none(made: Path, tmp_path: Path) -> None:
    adapter = lorary.load_adapter(made / "adapter")
    assert "base: there is no such folder" in refused(adapter, tmp_path / "base", tmp_path)
    assert "it is an adapter, not a model" in refused(adapter, made / "adapter", tmp_path)
    assert "is a int, not a path" in refused(adapter, 3, tmp_path)
    with pytest.raises(lorary.FileError, match="the folder is not empty"):
        export_merged(adapter, made / "base", made / "adapter")


def test_another_base_of_the_same_shapes(made: Path, base: Path, tmp_path: Path) -> None:
    """Its weights are compared while they are read: so the refusal comes last, before anything is in place."""
    file = first(base)
    save_file({name: t + 1 for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    adapter = lorary.load_adapter(made / "adapter")
    text = refused(adapter, base, tmp_path)
    assert re.search(r"base: other weights: \w{12} when it was trained, \w{12} here", text)
    assert "hint: name the base that it was trained on, or pass force=True" in text
    export_merged(adapter, base, tmp_path / "forced", force=True)
    assert (tmp_path / "forced" / "config.json").is_file()


def test_values_that_are_not_finite_are_all_named(made: Path, tmp_path: Path) -> None:
    adapter = lorary.load_adapter(made / "adapter")
    names = [site.site.name for site in adapter.sites[:2]]
    big = dict(adapter.tensors)
    for name in names:
        big[name] = {role: t * 1e25 for role, t in big[name].items()}
    text = refused(dataclasses.replace(adapter, tensors=big), made / "base", tmp_path)
    for name in names:
        assert f"{name}: merged, the weight is not finite in torch.float32" in text
    assert text.count("not finite") == 2


def test_numbers_that_float16_cannot_hold(made: Path, base: Path, tmp_path: Path) -> None:
    file = next(f for f in base.glob("*.safetensors") if "lm_head.weight" in load_file(f))
    tensors = load_file(file)
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    text = refused(lorary.load_adapter(made / "adapter"), base, tmp_path, dtype=torch.float16, force=True)
    assert "lm_head.weight: has numbers that float16 cannot hold\n      hint: write bfloat16 or float32" in text


def test_a_bias_that_no_checkpoint_of_the_class_has(tmp_path: Path) -> None:
    cls = saved_base("Gemma2ForCausalLM", tmp_path / "base")
    saved_adapter(cls, tmp_path / "base", tmp_path / "adapter", "glora", targets=["up_proj"])
    adapter = lorary.load_adapter(tmp_path / "adapter")
    with pytest.raises(lorary.StateError, match=r"up_proj.bias: Gemma2ForCausalLM has no bias there"):
        export_merged(adapter, tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_is_said_and_nothing_is_left(made: Path, tmp_path: Path) -> None:
    adapter = lorary.load_adapter(made / "adapter")
    largest = max(file.stat().st_size for file in (made / "base").glob("*.safetensors"))
    with largest_file(largest - 1):
        said = refused(adapter, made / "base", tmp_path)
    assert said.startswith(f"cannot write '{tmp_path / 'out'}'; what was there before is unchanged")
    assert "hint: free some space" in said
