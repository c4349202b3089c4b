"""Adapters of fused experts in PEFT's files: both ways, in every layout, and those of Transformers 4."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorary
from lorary.adapters import export_peft
from lorary.adapters.export.engines import export_for_engine
from lorary.adapters.intake.convert import convert
from lorary.errors import FileError
from lorary.model.scan import scan
from tests.experts import MODELS, logits, moe, shake

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")


def close(a: Tensor, b: Tensor) -> None:
    """Equal to 1e-5 of the largest logit."""
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def saved_by_lorary(name: str, folder: Path, **ranks: int) -> Tensor:
    """The logits of a trained adapter of all linear layers and experts, saved at `folder`."""
    model = moe(name)
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), ranks={"*experts.down_proj": 3}))
    shake(model)
    lorary.save(model, folder)
    return logits(model)


def saved_by_peft(name: str, folder: Path, **fields: Any) -> Tensor:
    """The logits of PEFT's adapter with these fields, saved at `folder`."""
    model = peft.get_peft_model(moe(name), peft.LoraConfig(r=2, init_lora_weights=False, **fields))
    torch.manual_seed(2)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".lora_" in key:
                p.normal_(std=0.1)
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("name", MODELS)
def test_peft_and_transformers_read_a_saved_adapter(name: str, tmp_path: Path) -> None:
    expected = saved_by_lorary(name, tmp_path / "a")
    assert (tmp_path / "a" / "adapter_config.json").exists()
    close(logits(peft.PeftModel.from_pretrained(moe(name), tmp_path / "a")), expected)
    (by_transformers := moe(name)).load_adapter(str(tmp_path / "a"))
    close(logits(by_transformers), expected)
    own = lorary.load(moe(name), tmp_path / "a")
    assert torch.equal(logits(own), expected)
    (tmp_path / "a" / "lorary.json").unlink()
    assert torch.equal(logits(lorary.load(moe(name), tmp_path / "a")), expected)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM"])
def test_the_folded_form_has_one_rank_and_one_scale_for_every_expert(name: str, tmp_path: Path) -> None:
    model = moe(name)
    method, ranks = lorary.method("rslora", r=2), {"*experts.down_proj": 3, "q_proj": 5}
    lorary.attach(model, lorary.plan(model, method, ranks=ranks, alphas={"*experts.gate_up_proj": 4}))
    shake(model)
    export_peft(lorary.Adapter.of(model), tmp_path / "a", model=moe(name), folded=True)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == (5, {}, {}, False)
    by_peft = peft.PeftModel.from_pretrained(moe(name), tmp_path / "a")
    (by_transformers := moe(name)).load_adapter(str(tmp_path / "a"))
    for client in (by_peft, by_transformers, lorary.load(moe(name), tmp_path / "a")):
        close(logits(client), logits(model))


@pytest.mark.parametrize(("engine", "title"), [("vllm", "vLLM"), ("sglang", "SGLang")])
def test_engines_do_not_read_the_layout_of_experts(engine: str, title: str, tmp_path: Path) -> None:
    model = moe("Qwen3MoeForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2)))
    shake(model)
    with pytest.raises(FileError) as error:
        export_for_engine(lorary.Adapter.of(model), tmp_path / "a", engine, model=moe("Qwen3MoeForCausalLM"), base="b")
    sentence = f"is of 4 experts, and {title} does not read PEFT's layout of these"
    assert sentence in str(error.value)
    assert "--to merged" in str(error.value)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "parameters", [["experts.gate_up_proj", "experts.up_proj", "experts.down_proj"], ["experts.down_proj"]]
)
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_of_peft_is_read(name: str, parameters: list[str], tmp_path: Path) -> None:
    expected = saved_by_peft(name, tmp_path / "p", target_modules=["q_proj", "o_proj"], target_parameters=parameters)
    close(logits(lorary.load(moe(name), tmp_path / "p")), expected)


def test_rows_of_tokens_beside_experts(tmp_path: Path) -> None:
    model = moe()
    parts = {"all-linear": lorary.method("lora", r=2), "embedding": lorary.method("rows", tokens=[3, 9])}
    lorary.attach(model, lorary.plan(model, parts))
    shake(model)
    expected = logits(model)
    lorary.save(model, tmp_path / "a")
    close(logits(peft.PeftModel.from_pretrained(moe(), tmp_path / "a")), expected)
    (tmp_path / "a" / "lorary.json").unlink()
    assert torch.equal(logits(lorary.load(moe(), tmp_path / "a")), expected)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"])
def test_all_linear_of_peft_with_its_routers(name: str, tmp_path: Path) -> None:
    expected = saved_by_peft(name, tmp_path / "p", target_modules="all-linear", use_rslora=True)
    model = lorary.load(moe(name), tmp_path / "p")
    close(logits(model), expected)
    assert any(key.endswith("gate.weight") for key in lorary.Adapter.of(model).full)
    lorary.merge(model)
    close(logits(model), expected)


def old_file(
    name: str, folder: Path, leaves: dict[str, str], dora: bool = False, lacks: str = "-"
) -> dict[str, Tensor]:
    """An adapter of Transformers 4 with a LoRA on every projection of every expert, and the update of each.

    Args:
        name: the class of the base.
        folder: where it is written.
        leaves: projection -> its path in an old layer, with `{e}` for the expert.
        dora: whether it has magnitudes.
        lacks: tensors with this in their name are left out.
    """
    config, torch_seed = moe(name).config, torch.manual_seed(3)
    hidden, width = config.hidden_size, getattr(config, "moe_intermediate_size", config.intermediate_size)
    width = config.intermediate_size if name.startswith("Mixtral") else width
    tensors: dict[str, Tensor] = {}
    updates: dict[str, Tensor] = {}
    del torch_seed
    first = 1 if name.startswith("Deepseek") else 0
    for layer in range(first, 2):
        for e in range(4):
            for projection, path in leaves.items():
                out, inp = (hidden, width) if projection == "down" else (width, hidden)
                A, B = torch.randn(2, inp) * 0.3, torch.randn(out, 2) * 0.3
                start = f"base_model.model.model.layers.{layer}.{path.format(e=e)}"
                own = {f"{start}.lora_A.weight": A, f"{start}.lora_B.weight": B}
                if dora:
                    own[f"{start}.lora_magnitude_vector.weight"] = torch.rand(out) + 0.5
                tensors |= {key: t for key, t in own.items() if lacks not in key}
                updates[f"{layer}.{projection}.{e}"] = 2.0 * B @ A
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({path.rpartition(".")[2] for path in leaves.values()})
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets, "use_dora": dora}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return updates


OLD = {half: f"mlp.experts.{{e}}.{half}_proj" for half in ("gate", "up", "down")}
OLD_MIXTRAL = {
    half: f"block_sparse_moe.experts.{{e}}.{w}" for half, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
}


@pytest.mark.parametrize(("name", "leaves"), [("Qwen3MoeForCausalLM", OLD), ("MixtralForCausalLM", OLD_MIXTRAL)])
def test_adapters_of_single_experts_change_the_fused_weights_exactly(
    name: str, leaves: dict[str, str], tmp_path: Path
) -> None:
    updates = old_file(name, tmp_path / "v4", leaves)
    plain, model = moe(name), lorary.load(moe(name), tmp_path / "v4")
    assert any("single experts" in note for note in lorary.load_adapter(tmp_path / "v4", model=moe(name)).notes)
    with torch.no_grad():
        for layer, block in enumerate(plain.model.layers):
            for e in range(4):
                gate_up = torch.cat([updates[f"{layer}.{half}.{e}"] for half in ("gate", "up")])
                block.mlp.experts.gate_up_proj[e] += gate_up
                block.mlp.experts.down_proj[e] += updates[f"{layer}.down.{e}"]
    close(logits(model), logits(plain))
    by_peft = peft.PeftModel.from_pretrained(moe(name), tmp_path / "v4")
    close(logits(model), logits(by_peft))
    live = logits(model)
    lorary.save(model, tmp_path / "again")
    assert torch.equal(logits(lorary.load(moe(name), tmp_path / "again")), live)
    close(logits(peft.PeftModel.from_pretrained(moe(name), tmp_path / "again")), live)
    lorary.merge(model).save_pretrained(tmp_path / "merged")
    close(logits(type(model).from_pretrained(tmp_path / "merged")), live)


def test_parts_of_fused_experts_outside_their_blocks_are_refused(tmp_path: Path) -> None:
    """The record says that gate and up have factors of their own, and the file mixes them."""
    old_file("Qwen3MoeForCausalLM", tmp_path / "v4", OLD)
    lorary.save(lorary.load(moe("Qwen3MoeForCausalLM"), tmp_path / "v4"), tmp_path / "again")
    name = f"{START}.base_layer.lora_B.weight"
    rewritten(tmp_path / "again", lambda t: t[name].fill_(1.0))
    record = json.loads((tmp_path / "again" / "lorary.json").read_text())
    data = (tmp_path / "again" / "adapter_model.safetensors").read_bytes()
    record["files"]["adapter_model.safetensors"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (tmp_path / "again" / "lorary.json").write_text(json.dumps(record))
    assert "is not zero outside the blocks of" in refusal(tmp_path / "again", "Qwen3MoeForCausalLM")


def test_single_experts_of_the_bare_model(tmp_path: Path) -> None:
    """Keys without `model.`, as of an adapter that was trained on AutoModel."""
    old_file("MixtralForCausalLM", tmp_path / "v4", OLD_MIXTRAL)
    expected = logits(lorary.load(moe(), tmp_path / "v4"))
    path = tmp_path / "v4" / "adapter_model.safetensors"
    tensors = {name.replace("model.model.model.", "model.model."): t for name, t in load_file(path).items()}
    save_file(tensors, path)
    assert torch.equal(logits(lorary.load(moe(), tmp_path / "v4")), expected)


def test_dora_of_single_experts_is_exact(tmp_path: Path) -> None:
    old_file("Qwen3MoeForCausalLM", tmp_path / "v4", OLD, dora=True)
    tensors = load_file(tmp_path / "v4" / "adapter_model.safetensors")
    plain, model = moe("Qwen3MoeForCausalLM"), lorary.load(moe("Qwen3MoeForCausalLM"), tmp_path / "v4")

    def dora(W: Tensor, layer: int, e: int, half: str) -> Tensor:
        start = f"base_model.model.model.layers.{layer}.mlp.experts.{e}.{half}_proj.lora_"
        V = W + 2.0 * tensors[f"{start}B.weight"] @ tensors[f"{start}A.weight"]
        return tensors[f"{start}magnitude_vector.weight"][:, None] * V / V.norm(dim=1, keepdim=True)

    with torch.no_grad():
        for layer, block in enumerate(plain.model.layers):
            for e in range(4):
                W = block.mlp.experts.gate_up_proj[e]
                W.copy_(
                    torch.cat(
                        [dora(part, layer, e, half) for part, half in zip(W.chunk(2), ("gate", "up"), strict=True)]
                    )
                )
                W = block.mlp.experts.down_proj[e]
                W.copy_(dora(W, layer, e, "down"))
    close(logits(model), logits(plain))


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(folder: Path, name: str | None = "MixtralForCausalLM", **changed: Any) -> str:
    """The reader's error for a folder, on a base of this class or without one."""
    with pytest.raises(FileError) as error:
        lorary.load_adapter(folder, model=None if name is None else moe(name, **changed))
    return str(error.value)


def rewritten(folder: Path, change: Any) -> None:
    """Change the tensors of a file in place."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")


START = "base_model.model.model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(f"{START}.lora_A.weight"), "experts.down_proj.lora_A.weight: is missing"),
        (
            lambda t: t.update({f"{START}.lora_A.weight": torch.zeros(2, 24)}),
            "experts.down_proj.lora_A.weight: has the shape [2, 24], expected [8, 24]",
        ),
        (
            lambda t: t.update({f"{START}.lora_B.weight": t[f"{START}.lora_B.weight"].T}),
            "experts.down_proj.lora_B.weight: has the shape [8, 16], expected [16, 8]",
        ),
        (lambda t: t[f"{START}.lora_B.weight"].fill_(float("nan")), "NaN or infinite"),
        (
            lambda t: t.update({f"{START}.base_layer.base_layer.lora_A.weight": torch.zeros(8, 24)}),
            "experts.base_layer.base_layer.lora_A.weight: adapts a module that the model does not have",
        ),
    ],
)
def test_a_damaged_file_of_experts_is_refused(change: Any, sentence: str, tmp_path: Path) -> None:
    saved_by_peft("MixtralForCausalLM", tmp_path / "p", target_parameters=["gate_up_proj", "down_proj"])
    rewritten(tmp_path / "p", change)
    assert sentence in refusal(tmp_path / "p")


def test_experts_need_their_base(tmp_path: Path) -> None:
    saved_by_peft("MixtralForCausalLM", tmp_path / "p", target_parameters=["gate_up_proj", "down_proj"])
    assert "names fused experts (down_proj, gate_up_proj), whose layout only the model's class tells" in refusal(
        tmp_path / "p", None
    ).replace("gate_up_proj, down_proj", "down_proj, gate_up_proj")
    wrong = refusal(tmp_path / "p", num_local_experts=8)
    assert "experts.down_proj.lora_A.weight: has the shape [8, 24], expected [16, 24]" in wrong


def test_an_adapter_of_single_experts_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    old_file("Qwen3MoeForCausalLM", tmp_path / "v4", OLD, lacks="experts.2.up_proj.lora_B")
    assert "model.layers.0.mlp.experts.2.up_proj.lora_B.weight: is missing" in refusal(
        tmp_path / "v4", "Qwen3MoeForCausalLM"
    )
    assert "is of expert 3, and model.layers.0.mlp.experts.gate_up_proj has 3" in refusal(
        tmp_path / "v4", "Qwen3MoeForCausalLM", num_experts=3
    )
    config = json.loads((tmp_path / "v4" / "adapter_config.json").read_text())
    config["rank_pattern"] = {"layers.1.mlp.experts.2.up_proj": 3}
    (tmp_path / "v4" / "adapter_config.json").write_text(json.dumps(config))
    assert "has another rank or alpha than model.layers.1.mlp.experts.0.gate_proj" in refusal(
        tmp_path / "v4", "Qwen3MoeForCausalLM"
    )


# --- other orders, other ranks, and factors that experts share --------------------------------------------------------


def regrouped(folder: Path, name: str, **marks: Any) -> None:
    """Change a file of PEFT into one with the columns of `lora_B` expert by expert, with these fields."""
    E = 4

    def change(tensors: dict[str, Tensor]) -> None:
        for key, t in tensors.items():
            if ".experts." in key and key.endswith("lora_B.weight"):
                tensors[key] = t.unflatten(1, (-1, E)).transpose(1, 2).flatten(1)

    rewritten(folder, change)
    reconfigured(folder, **marks)


def reconfigured(folder: Path, **fields: Any) -> None:
    """Write fields into the configuration."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))


UNSLOTH = {"auto_mapping": {"base_model_class": "MixtralForCausalLM", "unsloth_fixed": True}}


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM"])
def test_both_orders_of_experts_are_computed_right(name: str, tmp_path: Path) -> None:
    parameters = ["gate_up_proj", "down_proj"]
    expected = saved_by_peft(name, tmp_path / "p", target_modules=["q_proj"], target_parameters=parameters)
    close(logits(lorary.load(moe(name), tmp_path / "p", expert_layout="rank_major")), expected)
    reconfigured(tmp_path / "p", **UNSLOTH, lora_B_layout="rank_major")
    close(logits(lorary.load(moe(name), tmp_path / "p")), expected)
    regrouped(tmp_path / "p", name, lora_B_layout="grouped_by_expert")
    close(logits(lorary.load(moe(name), tmp_path / "p")), expected)
    reconfigured(tmp_path / "p", lora_B_layout=None)
    close(logits(lorary.load(moe(name), tmp_path / "p", expert_layout="grouped_by_expert")), expected)


def test_a_converted_adapter_has_the_order_of_peft(tmp_path: Path) -> None:
    expected = saved_by_peft("MixtralForCausalLM", tmp_path / "p", target_parameters=["gate_up_proj", "down_proj"])
    regrouped(tmp_path / "p", "MixtralForCausalLM", **UNSLOTH)
    with pytest.raises(FileError, match="in two ways"):
        convert(tmp_path / "p", tmp_path / "refused", to="peft", model=moe())
    assert not (tmp_path / "refused").exists()
    convert(tmp_path / "p", tmp_path / "out", to="peft", model=moe(), expert_layout="grouped_by_expert")
    close(logits(peft.PeftModel.from_pretrained(moe(), tmp_path / "out")), expected)


@pytest.mark.parametrize(
    ("told", "marks", "sentence"),
    [
        (None, UNSLOTH, "lora_B_layout: is not there, and Unsloth has ordered the columns of experts in two ways"),
        ("by_expert", {}, "expert_layout: is 'by_expert'; fused experts are rank_major or grouped_by_expert"),
        ("rank_major", {"lora_B_layout": "grouped_by_expert"}, "is grouped_by_expert, and rank_major is asked for"),
        (None, {"lora_B_layout": "expert_major"}, "lora_B_layout: is 'expert_major'"),
    ],
)
def test_an_order_that_is_not_known_is_refused(
    told: str | None, marks: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    saved_by_peft("MixtralForCausalLM", tmp_path / "p", target_modules=["q_proj"], target_parameters=["down_proj"])
    reconfigured(tmp_path / "p", **marks)
    with pytest.raises(FileError) as error:
        lorary.load_adapter(tmp_path / "p", model=moe(), expert_layout=told)
    assert sentence in str(error.value)


def test_an_order_is_asked_of_pefts_folders_alone(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match="expert_layout: is told, and this is no folder of PEFT"):
        lorary.load_adapter(tmp_path / "a.safetensors", expert_layout="rank_major")
    saved_by_peft("MixtralForCausalLM", tmp_path / "p", target_modules=["q_proj"])
    with pytest.raises(FileError, match="expert_layout: is told, and the file has no factors of fused experts"):
        lorary.load_adapter(tmp_path / "p", model=moe(), expert_layout="rank_major")


def test_a_rank_divided_over_experts_is_refused_with_both_ranks(tmp_path: Path) -> None:
    saved_by_peft("MixtralForCausalLM", tmp_path / "p", target_parameters=["gate_up_proj", "down_proj"])
    reconfigured(tmp_path / "p", r=12)
    assert (
        "experts.down_proj.lora_A.weight: has the shape [8, 24], expected [48, 24]: rank 2 for each of 4 experts, and "
        "the configuration says 12\n      hint: if the rank was divided over the experts, write the rank of one"
    ) in refusal(tmp_path / "p")
    old_file("Qwen3MoeForCausalLM", tmp_path / "v4", OLD)
    reconfigured(tmp_path / "v4", r=12)
    assert "_proj: has rank 2 for each expert, and the configuration says 12" in refusal(
        tmp_path / "v4", "Qwen3MoeForCausalLM"
    )


def stacked_file(name: str, folder: Path, half: str = "w3", shared: bool = True) -> dict[str, Tensor]:
    """An adapter with the factors of all experts in one tensor, those of the hidden side shared, and its updates."""
    model = moe(name)
    torch.manual_seed(4)
    tensors, updates = {}, {}
    for path, layer in scan(model).layers.items():
        owner, _, leaf = path.rpartition(".")
        if not owner.endswith(".experts"):
            continue
        E, out, inp = layer.module.weight.shape
        for key in ("w2",) if leaf == "down_proj" else ("w1", half) if leaf == "gate_up_proj" else ("w1",):
            rows = out // 2 if leaf == "gate_up_proj" else out
            hidden_in = leaf != "down_proj"
            A = torch.randn(1 if shared and hidden_in else E, 2, inp) * 0.3
            B = torch.randn(1 if shared and not hidden_in else E, rows, 2) * 0.3
            tensors |= {f"base_model.model.{owner}.{key}.lora_{r}.weight": t for r, t in (("A", A), ("B", B))}
            updates[path] = torch.cat(
                [u for u in [updates.get(path), 2.0 * (B @ A).expand(E, -1, -1)] if u is not None], 1
            )
        if leaf == "up_proj":  # an expert without a gate
            tensors |= {f"base_model.model.{owner}.w3.lora_{r}.weight": torch.zeros(0) for r in "AB"}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return updates


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "NemotronHForCausalLM"])
def test_factors_that_experts_share_are_read_exactly(name: str, shared: bool, tmp_path: Path) -> None:
    updates = stacked_file(name, tmp_path / "t", shared=shared)
    plain = moe(name)
    with torch.no_grad():
        for path, update in updates.items():
            plain.get_parameter(path).add_(update)
    model = lorary.load(moe(name), tmp_path / "t")
    close(logits(model), logits(plain))
    notes = lorary.load_adapter(tmp_path / "t", model=moe(name)).notes
    assert any("of all experts are on 4 fused ones here" in note for note in notes)
    assert any("a factor that experts share is repeated" in note for note in notes) == shared
    assert any("without numbers are left out" in note for note in notes) == name.startswith("Nemotron")
    lorary.save(model, tmp_path / "again")
    assert torch.equal(logits(lorary.load(moe(name), tmp_path / "again")), logits(model))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t.update({f"{START}.w1.lora_A.weight": torch.zeros(3, 2, 16)}),
            "has the shape [3, 2, 16], expected",
        ),
        (lambda t: t.update({f"{START}.w1.lora_A.weight": torch.zeros(1, 5, 16)}), "has rank 5 for each expert"),
        (lambda t: t.pop(f"{START}.w2.lora_B.weight"), "experts.w2.lora_B.weight: is missing"),
        (lambda t: t[f"{START}.w2.lora_B.weight"].fill_(float("inf")), "NaN or infinite"),
        (
            lambda t: t.update({f"{START}.w9.lora_{r}.weight": torch.zeros(1, 2, 2) for r in "AB"}),
            "experts.w9.lora_A.weight: adapts a module that the model does not have",
        ),
        (
            lambda t: t.update({f"{START}.w2.lora_B.weight": torch.zeros(0)}),
            "experts.w2.lora_B.weight: has the shape [0]",
        ),
    ],
)
def test_a_damaged_file_of_shared_factors_is_refused(change: Any, sentence: str, tmp_path: Path) -> None:
    stacked_file("Qwen3MoeForCausalLM", tmp_path / "t")
    rewritten(tmp_path / "t", change)
    assert sentence in refusal(tmp_path / "t", "Qwen3MoeForCausalLM")


def test_a_dora_of_single_experts_that_lacks_magnitudes_is_refused(tmp_path: Path) -> None:
    """There is nothing to keep in their place: a magnitude of zero would erase the expert."""
    old_file("Qwen3MoeForCausalLM", tmp_path / "v4", OLD, dora=True, lacks="layers.1.mlp.experts.3.")
    text = refusal(tmp_path / "v4", "Qwen3MoeForCausalLM")
    assert "experts.gate_up_proj: has magnitudes for 6 of its 8 projections, and DoRA needs all" in text
    assert "experts.down_proj: has magnitudes for 3 of its 4 projections, and DoRA needs all" in text
    with pytest.raises(FileError, match="has magnitudes for 3 of its 4 projections"):
        lorary.load_adapter(tmp_path / "v4", model=moe("Qwen3MoeForCausalLM"), strict=False)


def test_one_projection_under_two_names_is_refused(tmp_path: Path) -> None:
    old_file("Qwen3MoeForCausalLM", tmp_path / "v4", OLD)
    rewritten(
        tmp_path / "v4",
        lambda t: t.update({n.replace("experts.3.", "experts.03."): 2 * v for n, v in t.items() if "experts.3." in n}),
    )
    text = refusal(tmp_path / "v4", "Qwen3MoeForCausalLM")
    assert "experts.3.down_proj: is there twice: model.layers.0.mlp.experts.03.down_proj is the same" in text


def test_experts_fused_and_single_in_one_file_are_refused(tmp_path: Path) -> None:
    old_file("Qwen3MoeForCausalLM", tmp_path / "v4", {"down": OLD["down"]})
    config = json.loads((tmp_path / "v4" / "adapter_config.json").read_text())
    config["target_parameters"] = ["mlp.experts.down_proj"]
    (tmp_path / "v4" / "adapter_config.json").write_text(json.dumps(config))
    fused = {f"{START}.lora_A.weight": torch.ones(8, 12), f"{START}.lora_B.weight": torch.ones(16, 8)}
    fused |= {name.replace("layers.0", "layers.1"): t for name, t in fused.items()}
    rewritten(tmp_path / "v4", lambda t: t.update({name: value.clone() for name, value in fused.items()}))
    text = refusal(tmp_path / "v4", "Qwen3MoeForCausalLM")
    assert "layers.0.mlp.experts.down_proj: has factors of its own in this file, and factors of single experts" in text


def test_dora_of_target_parameters_is_refused(tmp_path: Path) -> None:
    saved_by_peft("MixtralForCausalLM", tmp_path / "p", target_parameters=["gate_up_proj", "down_proj"])
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    assert "use_dora: is true, and PEFT has no magnitudes for the experts" in refusal(tmp_path / "p")
