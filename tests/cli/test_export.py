"""lorary export: PEFT's files with the same function, measured where the base is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

import lorary
from tests.cli.command import Command
from tests.cli.test_commands import base
from tests.tiny import shaken

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(12)[None] * 7
DEEPSEEK: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}


def trained(*names: str, **options: object) -> torch.Tensor:
    """Saves a base as `model` and an adapter as `run/adapter`; returns their logits in fp32."""
    base(Path("model"))
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    lorary.attach(model, lorary.plan(model, lorary.method(*names, **options)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        lorary.save(model, "run/adapter")
        return model(input_ids=IDS).logits


def test_the_card_is_that_of_the_exported_adapter(command: Command) -> None:
    trained("pissa", r=4)
    assert command("export", "run", "out").code == 0
    card = Path("out/README.md").read_text()
    assert json.loads(Path("out/adapter_config.json").read_text())["r"] == 8
    assert "LowRank(r=8)" in card
    assert "pissa" in card.partition("Made from")[2]


@pytest.mark.parametrize("names", [("lora",), ("pissa", "rslora"), ("dora",), ("vera",)], ids="+".join)
def test_export_gives_peft_the_same_logits(names: tuple[str, ...], command: Command) -> None:
    expected = trained(*names, r=4)
    ran = command("export", "run", "--to", "peft", "out", "--base", "model")
    assert (ran.code, ran.out) == (0, "out\n")
    assert ran.err.startswith("compared with the adapter: logits differ by at most ")
    plain = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain, "out").eval()(input_ids=IDS).logits
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_export_needs_no_base_where_the_method_needs_none(command: Command) -> None:
    trained("olora", r=4)
    assert command("export", "run", "out") == (0, "out\n", "")
    words = json.loads(Path("out/adapter_config.json").read_text())
    assert (words["r"], words["init_lora_weights"]) == (8, True)


def test_export_refuses_what_peft_has_not(command: Command) -> None:
    base(Path("model"))
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    lorary.attach(model, lorary.plan(model, lorary.Method(full=("*norm*",))))
    lorary.save(model, "adapter")
    ran = command("export", "adapter", "out")
    assert ran.code == 4
    assert ran.err.startswith(
        "error: cannot export an adapter to 'out' for PEFT\n"
        "  - sites: it trains base parameters only, and PEFT's adapters adapt at least one layer\n"
    )
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("", "nowhere: there is no such folder\n"),
        ("run.json", "this run has no adapter yet"),
        ("config.json", "there is no adapter in it: it is a whole model\n"),
        ("adapter.gguf", "hint: name the file: nowhere/adapter.gguf (with --base)\n"),
    ],
)
def test_a_folder_without_an_adapter_is_named_for_what_it_is(file: str, what: str, command: Command) -> None:
    if file:
        Path("nowhere").mkdir()
        Path("nowhere", file).write_text("{}")
    assert what in command("export", "nowhere", "out").err


def test_export_names_what_is_wrong(command: Command) -> None:
    Path("empty").mkdir()
    assert command("export", "empty", "out") == (
        4,
        "",
        "error: cannot export empty:\n  - empty: there is no adapter in it\n",
    )
    assert command("export", "empty", "out", "--to", "pfet") == (
        2,
        "",
        "error: cannot export empty:\n  - --to pfet: is not a known format\n      hint: did you mean `peft`?\n",
    )


def test_what_vllm_ignores_is_a_note_and_shared_experts_are_verified(command: Command) -> None:
    config = DeepseekV3Config(**DEEPSEEK)
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(config).save_pretrained("model")
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2)))
    shaken(model)
    lorary.save(model, "adapter")
    ran = command("export", "adapter", "out", "--base", "model")
    assert ran.code == 0
    assert "note: vLLM folds kv_b_proj into its attention and ignores adapters of it (2 sites here)" in ran.err
    assert float(ran.err.rsplit("at most ")[1].split()[0]) < 1e-5
    assert (
        "model.layers.0.mlp.gate_proj.weight"
        in json.loads(Path("out/adapter_config.json").read_text())["target_parameters"]
    )


def test_the_merged_form_equals_what_merge_writes(command: Command) -> None:
    trained("qlora", "rslora", r=4)
    (Path("run/adapter") / "chat_template.jinja").write_text("{{ messages[0].content }}")
    ran = command("export", "run", "out", "--to", "merged", "--base", "model", "--dtype", "float16")
    assert (ran.code, ran.out) == (0, "out\n")
    assert ran.err == (
        "wrote the merged model to out (float16)\n"
        "as GGUF, in a checkout of llama.cpp: python convert_hf_to_gguf.py out --outfile out.gguf --outtype f16\n"
    )
    assert command("merge", "run", "merged", "--base", "model", "--dtype", "float16", "--rows", "1").code == 0
    ours, theirs = (load_file(f"{folder}/model.safetensors") for folder in ("out", "merged"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, ours[name]) for name, t in theirs.items())
    assert Path("out/config.json").read_text() == Path("merged/config.json").read_text()
    for folder in ("out", "merged"):
        messages = [{"role": "user", "content": "as trained"}]
        assert AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False) == "as trained"


def test_an_option_of_another_form_is_refused(command: Command) -> None:
    Path("empty").mkdir()
    ran = command("export", "empty", "out", "--dtype", "float16", "--force")
    assert (ran.code, ran.out, ran.err) == (
        2,
        "",
        "error: cannot export empty:\n"
        "  - --dtype: --to peft has no such option\n"
        "      hint: leave it out; it is an option of --to merged, --to gguf, --to ollama\n"
        "  - --force: --to peft has no such option\n"
        "      hint: leave it out; it is an option of --to merged\n",
    )
    trained("lora", r=2)
    ran = command("export", "run", "out", "--to", "merged", "--base", "model", "--dtype", "int8", "--onto", "x")
    assert ran.code == 2
    assert "--dtype int8: would quantise the merged weights" in ran.err
    assert "--onto x: is unknown" in ran.err
    assert not Path("out").exists()
