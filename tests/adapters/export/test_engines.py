"""vLLM's and SGLang's adapters: right for a reader that knows r and alpha alone, and served by the saved command."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorary
from lorary.adapters import export_peft
from lorary.adapters.adapter import without_empty_sites
from lorary.adapters.export.engines import export_for_engine
from lorary.adapters.readers.check import check
from lorary.errors import FileError
from lorary.methods.token_rows import TokenRows
from lorary.model.fingerprint import Fingerprint
from tests import tiny
from tests.adapters import models
from tests.adapters.export.made import MERGED, longer, of, plain
from tests.adapters.models import BASES, by_peft, close, outputs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LLAMA, GPT2, _, CONV = BASES
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any], int]] = {
    "LoRA": (("lora",), {"alpha": 12}, 4),
    "rsLoRA": (("rslora",), {}, 4),
    "ranks and alphas": (("lora",), {"ranks": {"down_proj": 9}, "alphas": {"q_proj": 3}}, 9),
    "PiSSA": (("pissa", "rslora"), {}, 8),
    "MELoRA": (("melora",), {}, 8),
    "AdaLoRA": (("adalora",), {"target": 2}, 2),
    "O-LoRA": (("o-lora",), {}, 4),
}


def naive(folder: Path) -> dict[str, Tensor]:
    """Site -> (alpha / r) B A by a reader that knows the two numbers of the configuration alone."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    prefix, end = "base_model.model.", ".lora_A.weight"
    scale = config["lora_alpha"] / config["r"]
    found = {}
    for name, A in tensors.items():
        if name.endswith(end):
            assert A.shape[0] == config["r"]
            B = tensors[name.replace("lora_A", "lora_B")]
            found[name.removeprefix(prefix).removesuffix(end)] = scale * B @ A
    return found


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(("names", "options", "rank"), METHODS.values(), ids=METHODS)
def test_any_reader_computes_the_same_update(
    names: tuple[str, ...], options: dict[str, Any], rank: int, engine: str, tmp_path: Path
) -> None:
    made = models.adapted(LLAMA, *names, **options)
    if "adalora" in names:
        with torch.no_grad():
            for i, module in enumerate(m for m in made.modules() if hasattr(m, "params")):
                module.params["E"][i % 3 :] = 0  # some sites have no direction left
    adapter = lorary.Adapter.of(made)
    export_for_engine(adapter, tmp_path / "out", engine, model=LLAMA.model(), base="org/model")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"]) == (rank, False)
    assert (config["rank_pattern"], config["alpha_pattern"], config["bias"]) == ({}, {}, "none")
    assert isinstance(config["target_modules"], list)
    forms, found = without_empty_sites(adapter).low_rank(), naive(tmp_path / "out")
    for name, form in forms.items():
        torch.testing.assert_close(found[name], form.B @ form.A)
    assert not any(found[name].any() for name in found.keys() - forms.keys())
    assert [v.reasons for v in check(tmp_path / "out", engine, model=LLAMA.model())] == [()]
    close(by_peft(LLAMA, tmp_path / "out"), outputs(made))


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside LoRA"])
def test_rows_of_tokens_that_the_base_has_are_factors_of_both_ends(beside: bool, tmp_path: Path) -> None:
    model, rows = LLAMA.model(), lorary.method("rows", tokens=(3, 7))
    parts = {"attention": tiny.LORA, "vocabulary": rows}
    lorary.attach(model, lorary.plan(model, parts) if beside else lorary.plan(model, rows, targets="vocabulary"))
    made = tiny.shaken(model).eval()
    adapter = lorary.Adapter.of(made)
    export_for_engine(adapter, tmp_path / "out", "vllm", model=LLAMA.model(), base="org/model")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "trainable_token_indices" not in config, "vLLM does not know it"
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    forms = adapter.low_rank(LLAMA.model())
    scale = config["lora_alpha"] / config["r"]
    for name, end in (("model.embed_tokens", "lora_embedding_{}"), ("lm_head", "lora_{}.weight")):
        A, B = (tensors[f"base_model.model.{name}.{end.format(role)}"] for role in "AB")
        torch.testing.assert_close(scale * B @ A, forms[name].B @ forms[name].A)
    assert [v.reasons for v in check(tmp_path / "out", "vllm", model=LLAMA.model())] == [()]
    close(by_peft(LLAMA, tmp_path / "out"), outputs(made))


def test_what_sglang_fuses_is_adapted_together(tmp_path: Path) -> None:
    """It stops at an adapter of q alone, or of up alone; zeros beside them change nothing."""
    made = models.adapted(LLAMA, "rslora", targets=["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"])
    export_peft(lorary.Adapter.of(made), tmp_path / "peft", folded=True)
    export_for_engine(lorary.Adapter.of(made), tmp_path / "sglang", "sglang", model=LLAMA.model(), base="org/model")
    assert [v.accepted for f in ("peft", "sglang") for v in check(tmp_path / f, "sglang")] == [False, True]
    assert {name.split("layers.")[1] for name in naive(tmp_path / "sglang")} == {
        *(f"0.self_attn.{p}_proj" for p in "qkv"),
        *("1.mlp.gate_proj", "1.mlp.up_proj"),
    }
    close(by_peft(LLAMA, tmp_path / "sglang"), outputs(made))


def test_the_commands(tmp_path: Path) -> None:
    adapter, out = plain("lora", ranks={"down_proj": 9}), tmp_path / "my-adapter"
    assert export_for_engine(adapter, out, "vllm", model=LLAMA.model(), base="org/model") == [
        *("vllm", "serve", "org/model", "--enable-lora", "--max-loras", "1", "--max-lora-rank", "16"),
        *("--lora-modules", f"my-adapter={out}"),
    ]
    assert export_for_engine(adapter, out, "sglang", model=LLAMA.model(), base="org/model", name="mine") == [
        *("python", "-m", "sglang.launch_server", "--model-path", "org/model", "--enable-lora"),
        *("--max-lora-rank", "9", "--lora-target-modules", "down_proj", "k_proj", "q_proj", "v_proj"),
        *("--lora-paths", f"mine={out}"),
    ]


def test_the_saved_command_finds_the_folder_wherever_it_is(tmp_path: Path) -> None:
    out = tmp_path / "a folder of mine" / "tuned"
    export_for_engine(plain(), out, "vllm", model=LLAMA.model(), base="my model")
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    ran = subprocess.run(
        ["sh", str(out / "serve.sh"), "--port", "9000"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines() == [
        *("serve", "my model", "--enable-lora", "--max-loras", "1", "--max-lora-rank", "8"),
        *("--lora-modules", f"tuned={out}", "--port", "9000"),
    ]


def test_another_export_into_the_folder_drops_the_command(tmp_path: Path) -> None:
    export_for_engine(plain(), tmp_path, "vllm", model=LLAMA.model(), base="org/model")
    export_peft(plain(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_vllm_is_told_the_rope_scaling(tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = longer(base, "linear")
    command = export_for_engine(adapter, tmp_path, "vllm", model=base, base="org/model")
    given = json.loads(command[command.index("--hf-overrides") + 1])
    before = dict(base.config.rope_parameters)
    context = adapter.method.context
    assert context
    context.apply(base)
    assert given == {"rope_parameters": dict(base.config.rope_parameters)}
    assert given["rope_parameters"] != before


def wide() -> lorary.Adapter:
    return lorary.Adapter.of(models.vera(LLAMA, r=513))


def deepseek() -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from tests.cli.test_export import DEEPSEEK

    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK))


ADDED = lorary.method("rows", tokens=(3, 7)).replace(join=TokenRows((3, 7), ("<b>",)))
REFUSED: dict[str, tuple[str, Any, Any, dict[str, Any], str]] = {
    "DoRA": (
        "vllm",
        lambda: plain("dora"),
        LLAMA.model,
        {},
        "model.layers.0.self_attn.q_proj and 5 more: DoRA does more than add B A x, and an adapter for "
        f"vLLM does only that{MERGED}",
    ),
    "norms in full": (
        "sglang",
        lambda: plain("lora", full=("*norm*",)),
        LLAMA.model,
        {},
        "model.layers.0.input_layernorm.weight and 4 more: is trained in full, and an adapter for SGLang holds "
        f"low-rank updates only{MERGED}",
    ),
    "nothing left": (
        "vllm",
        lambda: lorary.Adapter.of(emptied()),
        LLAMA.model,
        {},
        "sites: no layer has a rank direction left: there is nothing to export",
    ),
    "a rank that vLLM does not have": (
        "vllm",
        wide,
        LLAMA.model,
        {},
        "rank: is 513, and vLLM takes at most 512\n      hint: lower it with `lorary compress`, or merge it: ",
    ),
    "kv_b_proj": (
        "vllm",
        lambda: of(deepseek(), targets=["kv_b_proj"]),
        deepseek,
        {},
        "model.layers.0.self_attn.kv_b_proj and 1 more: vLLM folds it into its attention, and ignores adapters of it"
        f"{MERGED}",
    ),
    "a convolution": (
        "vllm",
        lambda: lorary.Adapter.of(models.adapted(CONV)),
        CONV.model,
        {},
        f"conv1: is of kind conv1d, and vLLM adapts linear layers{MERGED}",
    ),
    "the embedding of an architecture that vLLM does not adapt": (
        "vllm",
        lambda: of(tiny.seeded("MistralForCausalLM"), targets=["embed_tokens"]),
        lambda: tiny.seeded("MistralForCausalLM"),
        {},
        f"model.embed_tokens: vLLM is not known to adapt the embedding or the LM head of mistral{MERGED}",
    ),
    "a tied embedding": (
        "sglang",
        lambda: of(tiny.seeded("LlamaForCausalLM", tie_word_embeddings=True), targets=["embed_tokens"]),
        lambda: tiny.seeded("LlamaForCausalLM", tie_word_embeddings=True),
        {},
        "model.embed_tokens: the embedding and the LM head are one weight, which an adapter elsewhere cannot change in "
        f"both{MERGED}",
    ),
    "layers that SGLang does not adapt": (
        "sglang",
        lambda: lorary.Adapter.of(models.adapted(GPT2)),
        GPT2.model,
        {},
        "transformer.h.0.attn.c_attn and 3 more: SGLang is known to adapt q_proj, k_proj, ",
    ),
    "RoPE scaling": (
        "sglang",
        lambda: longer(tiny.seeded("LlamaForCausalLM"), "linear"),
        lambda: tiny.seeded("LlamaForCausalLM"),
        {},
        f"context: it needs RoPE scaling, which SGLang has to be given{MERGED}",
    ),
    "tokens that the base's tokenizer does not have": (
        "vllm",
        lambda: of(LLAMA.model(), ADDED, "vocabulary"),
        LLAMA.model,
        {},
        "tokens: '<b>' (7): added to the tokenizer, and vLLM reads texts with the base's own"
        f"{MERGED}, which holds the tokenizer as well",
    ),
    "another base": ("vllm", plain, tiny.llama, {}, "base: other layers or sizes: "),
    "a layer that the base lacks": (
        "sglang",
        lambda: dataclasses.replace(plain(), base=Fingerprint()),
        lambda: tiny.llama(num_hidden_layers=1),
        {},
        "model.layers.1.self_attn.q_proj and 2 more: the model has no such module",
    ),
    "a name for two": (
        "vllm",
        plain,
        LLAMA.model,
        {"name": "a=b,c=d"},
        "name: 'a=b,c=d' cannot name an adapter, which takes letters, digits and `.`, `_`, `-`\n"
        "      hint: export to a folder with another name",
    ),
    "an option for a base": (
        "sglang",
        plain,
        LLAMA.model,
        {"base": "--trust-remote-code"},
        "base: '--trust-remote-code' is neither a folder nor a Hub id\n      hint: give --base MODEL",
    ),
    "no base's name": (
        "vllm",
        plain,
        LLAMA.model,
        {"base": ""},
        "base: the adapter does not name its base\n      hint: give --base MODEL",
    ),
}


def emptied() -> nn.Module:
    made = models.adapted(LLAMA, "adalora", target=2)
    with torch.no_grad():
        for module in made.modules():
            if hasattr(module, "params"):
                module.params["E"].zero_()
    return made


@pytest.mark.parametrize(("engine", "make", "base", "options", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused(engine: str, make: Any, base: Any, options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(FileError) as error:
        export_for_engine(make(), tmp_path / "out", engine, model=base(), **({"base": "org/model"} | options))
    title = {"vllm": "vLLM", "sglang": "SGLang"}[engine]
    assert f"cannot export an adapter to '{tmp_path}/out' for {title}\n" in str(error.value)
    assert f"  - {sentence}" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"adapter": "out"}, "adapter: is a str, not an Adapter"),
        ({"engine": ["vllm"]}, 'engine: ["vllm"] is not known'),
        ({"base": 5}, "base: is a int, not a text"),
        ({"adapter": dataclasses.replace(plain(), tensors={})}, "A is missing, expected (4, "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_of_a_wrong_type_are_refused(changed: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"adapter": plain(), "engine": "vllm", "base": "org/base"} | changed
    with pytest.raises(FileError) as error:
        export_for_engine(folder=tmp_path / "out", model=LLAMA.model(), **arguments)
    assert sentence in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_unknown_engine_and_no_model_are_named_together(tmp_path: Path) -> None:
    model: Any = "org/model"
    with pytest.raises(FileError) as error:
        export_for_engine(plain(), tmp_path / "out", "vlm", model=model)
    assert str(error.value).splitlines()[1:] == [
        "  - model: is a str, not a torch.nn.Module",
        "  - engine: 'vlm' is not known",
        "      hint: did you mean `vllm`?",
    ]
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_lorary_in_the_way_is_left_alone(tmp_path: Path) -> None:
    lorary.save_adapter(plain("pissa"), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(FileError, match=r"it holds lorary\.json: the adapter there would be lost"):
        export_for_engine(plain(), tmp_path, "vllm", model=LLAMA.model(), base="org/model")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
