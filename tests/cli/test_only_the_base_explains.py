"""Files of other tools whose names only the base explains, where a command takes an adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import lorary
from lorary.adapters.resolve import needs_base, read_adapter
from tests.adapters.models import BASES
from tests.adapters.peft.test_experts import OLD_MIXTRAL, old_file
from tests.cli.command import Command
from tests.experts import moe, shake
from tests.train.small import PLAIN_CHAT, tokenizer

MADE = Path(__file__).parents[1] / "adapters" / "intake" / "made"


def mixtral() -> None:
    """A base of experts with a tokenizer."""
    moe(vocab_size=300).save_pretrained("base")
    tokenizer(template=PLAIN_CHAT, extra=("<|start|>", "<|end|>")).save_pretrained("base")


def fused() -> str:
    """PEFT's `target_parameters`, without `lorary.json`."""
    mixtral()
    model = moe(vocab_size=300)
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), targets=["q_proj", "*experts.down_proj"]))
    shake(model)
    lorary.save(model, "adapter")
    Path("adapter/lorary.json").unlink()
    assert json.loads(Path("adapter/adapter_config.json").read_text())["target_parameters"]
    return "adapter"


def single() -> str:
    """A LoRA for every projection of every expert, as of Transformers 4."""
    mixtral()
    old_file("MixtralForCausalLM", Path("adapter"), OLD_MIXTRAL)
    return "adapter"


def llama(path: str) -> Callable[[], str]:
    def copied() -> str:
        BASES[0].model().save_pretrained("base")  # type: ignore[operator]
        source, target = MADE / path, Path(Path(path).name)
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
        return str(target)

    return copied


ADAPTERS = {
    "fused experts": fused,
    "single experts": single,
    "GGUF": llama("gguf/adapter.gguf"),
    "torchtune's own names": llama("torchtune/own"),
    "mlx-lm": llama("mlx"),
}


@pytest.mark.parametrize("made", ADAPTERS.values(), ids=ADAPTERS)
def test_merge_export_and_inspect_read_it_onto_the_base(made: Callable[[], str], command: Command) -> None:
    adapter = made()
    base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32).eval()
    ids = torch.arange(12)[None] * 7 % 30
    plain = base(ids).logits.detach()
    wanted = lorary.load(base, adapter)(ids).logits.detach()
    assert (wanted - plain).abs().max() > 1e-3
    for run in (("merge", adapter, "merged"), ("export", adapter, "exported", "--to", "merged")):
        ran = command(*run, "--base", "base")
        assert ran.code == 0, ran.err
        found = AutoModelForCausalLM.from_pretrained(run[2], dtype=torch.float32).eval()(ids).logits
        assert torch.allclose(found, wanted, atol=1e-4), run
    ran = command("inspect", "adapter", adapter, "--base", "base")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("made", [fused, single])
def test_eval_and_generate_too(made: Callable[[], str], command: Command) -> None:
    adapter = made()
    Path("rows.jsonl").write_text(json.dumps({"text": "hello world " * 20}) + "\n")
    ran = command("eval", "base", adapter, "--base", "base", "--data", "rows.jsonl", "--json", "--quiet")
    assert ran.code == 0, ran.err
    own, adapted = json.loads(ran.out)["results"]
    assert own["loss"] != adapted["loss"]
    ran = command("generate", adapter, "hello", "--base", "base", "--max-new-tokens", "2")
    assert ran.code == 0, ran.err


def test_single_experts_are_merged_into_the_base_that_they_name(command: Command) -> None:
    config = Path(single(), "adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "base"}))
    assert not needs_base(Path("adapter"))
    assert all(".experts." in a.site.name and not a.site.experts for a in read_adapter(Path("adapter")).sites)
    assert all(a.site.experts for a in read_adapter(Path("adapter"), "base").sites)
    ran = command("merge", "adapter", "merged")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("path", ["gguf/adapter.gguf", "kohya/lora.safetensors", "lycoris/lycoris.safetensors"])
def test_without_a_base_it_says_what_to_name(path: str, command: Command) -> None:
    adapter = llama(path)()
    assert needs_base(Path(adapter))
    ran = command("merge", adapter, "merged")
    assert ran.code == 4
    assert "hint: give --base MODEL" in ran.err
    assert not Path("merged").exists()


def test_only_such_files_need_it(tmp_path: Path) -> None:
    save_file({"unet.mid.proj.hada_w1_a": torch.ones(2, 2)}, tmp_path / "loha.safetensors")
    assert needs_base(tmp_path / "loha.safetensors")
    (tmp_path / "damaged.safetensors").write_text("{")
    plain = ["diffusers", "diffusers/pytorch_lora_weights.safetensors", "mlx", "torchtune/peft"]
    for path in (tmp_path, tmp_path / "damaged.safetensors", *(MADE / name for name in plain)):
        assert not needs_base(path), path


@pytest.mark.parametrize("base", [(), ("--base", "base")], ids=["alone", "with the base"])
def test_experts_are_exported_for_peft_with_a_card(base: tuple[str, ...], command: Command) -> None:
    mixtral()
    model = moe(vocab_size=300)
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2)))
    shake(model)
    lorary.save(model, "adapter")
    ran = command("export", "adapter", "exported", "--to", "peft", *base)
    assert ran.code == 0, ran.err
    assert json.loads(Path("exported/adapter_config.json").read_text())["target_parameters"]
    assert "PEFT reads the folder as well" in Path("exported/README.md").read_text()
