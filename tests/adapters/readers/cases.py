"""Adapter folders of many kinds, each with its base and the logits that it stands for."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorary
from lorary.adapters import export_peft
from tests import tiny
from tests.adapters.peft.test_replay import base as replay_base

IDS = torch.tensor([[1, 5, 7, 5, 2], [3, 9, 0, 4, 28]])


class Case(NamedTuple):
    """A folder's base, made anew at each call, its logits with the adapter, and the adapted model."""

    base: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]
    logits: Tensor
    model: Any


def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(**inputs).logits
    return out


def inputs_of(base: nn.Module) -> dict[str, Tensor]:
    names = inspect.signature(base.forward).parameters
    if "input_features" in names:
        return {"input_features": torch.linspace(-1, 1, 128).view(1, 4, 32), "decoder_input_ids": IDS[:1]}
    if "pixel_values" in names:
        return {"pixel_values": torch.linspace(-1, 1, 192).view(1, 3, 8, 8)}
    return {"input_ids": IDS}


def case(base: Callable[[], nn.Module], model: nn.Module) -> Case:
    """The case of an adapted model."""
    inputs = inputs_of(base())
    return Case(base, inputs, logits(model, inputs), model)


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sizes = {f"{side}_{k}": n for side in ("encoder", "decoder") for k, n in (("layers", 1), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    shape = {"d_model": 16, "num_mel_bins": 4, "vocab_size": 40, "max_source_positions": 16}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **ends, **shape))


def vit() -> nn.Module:
    return tiny.seeded("ViTForImageClassification")


def mixtral() -> nn.Module:
    return replay_base("Mixtral")


def llama() -> nn.Module:
    return tiny.seeded("LlamaForCausalLM")


def gpt2() -> nn.Module:
    return tiny.seeded("GPT2LMHeadModel")


def filled(model: nn.Module) -> nn.Module:
    """The model with numbers in everything that trains."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def ours(
    *names: str, base: Callable[[], nn.Module] = llama, how: str = "save", **options: Any
) -> Callable[[Path], Case]:
    """An adapter of lorary, as it is saved, or exported for PEFT."""
    plan = {key: options.pop(key) for key in ("ranks", "alphas", "targets", "exclude") if key in options}
    full = options.pop("full", ())

    def make(folder: Path) -> Case:
        model = base()
        given = {"r": 2} | ({} if "vera" in names else {"alpha": 6}) | options
        method = lorary.method(*names, **given).replace(full=tuple(full))
        lorary.attach(model, lorary.plan(model, method, **plan))
        filled(model)
        if how == "save":
            lorary.save(model, folder)
        else:
            export_peft(lorary.Adapter.of(model), folder, model=base())
        return case(base, model)

    return make


def theirs(kind: str = "LoraConfig", base: Callable[[], nn.Module] = llama, **options: Any) -> Callable[[Path], Case]:
    """An adapter that PEFT made and saved."""
    given = {"task_type": "CAUSAL_LM"} | options
    if kind == "LoraConfig":
        given = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]} | given

    def make(folder: Path) -> Case:
        import peft

        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = filled(peft.get_peft_model(base(), getattr(peft, kind)(**given)))
            model.save_pretrained(str(folder))
            return case(base, model)

    return make


def edited(make: Callable[[Path], Case], **fields: Any) -> Callable[[Path], Case]:
    """The folder of another case with fields of its configuration changed by hand; None removes one."""

    def remake(folder: Path) -> Case:
        made = make(folder)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({key: value for key, value in config.items() if fields.get(key, 0) is not None}))
        return made

    return remake


def without(make: Callable[[Path], Case], part: str) -> Callable[[Path], Case]:
    """The folder of another case without the tensors with `part` in their names."""

    def remake(folder: Path) -> Case:
        made = make(folder)
        path = folder / "adapter_model.safetensors"
        save_file({key: value for key, value in load_file(path).items() if part not in key}, path)
        return made

    return remake


def by_suffix(kind: str) -> Callable[[Path], Case]:
    """An adapter of every linear layer beside fused experts, its targets named by their last components."""

    def make(folder: Path) -> Case:
        model = replay_base(kind)
        lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2, alpha=6), exclude="*.experts.*"))
        filled(model)
        lorary.save(model, folder)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        names = {
            name.rpartition(".")[2] for name, module in replay_base(kind).named_modules() if type(module) is nn.Linear
        }
        config |= {"target_modules": sorted(names - {"lm_head"}), "target_parameters": None}
        path.write_text(json.dumps(config))
        (folder / "lorary.json").unlink()
        return case(lambda: replay_base(kind), model)

    return make


def mlx(folder: Path) -> Case:
    """mlx-lm's own form."""
    made = ours("lora", targets="attention-qv")(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {
        name.removeprefix("base_model.model.")
        .replace(".lora_A.weight", ".lora_a")
        .replace(".lora_B.weight", ".lora_b"): (tensor.t().contiguous())
        for name, tensor in tensors.items()
    }
    for name in ("lorary.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    save_file(renamed, folder / "adapters.safetensors")
    parameters = {"rank": 2, "scale": 3.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return made


def pruned(folder: Path) -> Case:
    """An AdaLoRA after its allocation: each layer has lost two of its directions."""
    model = llama()
    lorary.attach(model, lorary.plan(model, lorary.method("adalora", r=8)))
    with torch.no_grad():
        for name, parameter in filled(model).named_parameters():
            if name.endswith("params.E"):
                parameter[1:3] = 0
    lorary.save_adapter(lorary.Adapter.of(model).compact(), folder)
    return case(llama, model)


CASES: dict[str, Callable[[Path], Case]] = {
    "lora": ours("lora"),
    "lora of GPT-2": ours("lora", base=gpt2),
    "rslora": ours("rslora"),
    "dora": ours("dora"),
    "dora, exported": ours("dora", how="export"),
    "peft dora": theirs(use_dora=True),
    "ranks": ours("lora", ranks={"*down_proj": 3}),
    "alphas": ours("lora", alphas={"*down_proj": 3.0}),
    "pissa, saved": ours("pissa"),
    "pissa, exported": ours("pissa", how="export"),
    "melora, exported": ours("melora", how="export", r=1, n=2),
    "vera": ours("vera", r=4),
    "adalora": ours("adalora", r=8),
    "adalora, pruned": pruned,
    "longlora, exported": ours("longlora", how="export", r=4, length=4096),
    "convolutions": ours("lora", base=vit, targets=["conv"]),
    "embeddings": ours("lora", targets=["embedding", "attention-qv"]),
    "norms": ours("lora", full=("*norm*",)),
    "mlx-lm": mlx,
    "peft lora": theirs(),
    "peft, by pattern": theirs(target_modules=r".*\.(q_proj|v_proj)"),
    "peft, patterns": theirs(use_rslora=True, rank_pattern={"v_proj": 4}, alpha_pattern={"0.mlp.down_proj": 3}),
    "peft pissa": theirs(init_lora_weights="pissa"),
    "peft bias": theirs(bias="all", base=gpt2, target_modules=["c_attn"], fan_in_fan_out=True),
    "peft lora_bias": theirs(lora_bias=True),
    "peft lm_head saved": theirs(modules_to_save=["lm_head"]),
    "peft lm_head adapted": theirs(target_modules=["q_proj", "v_proj", "lm_head"]),
    "peft tokens": theirs(trainable_token_indices=[5, 7]),
    "peft alora": theirs(alora_invocation_tokens=[5]),
    "peft layer range": theirs(layers_to_transform=[1]),
    "peft replication": theirs(layer_replication=[[0, 2], [1, 2]]),
    "peft q only": theirs(target_modules=["q_proj"]),
    "peft experts": theirs(base=mixtral, target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    "peft whisper": theirs(base=whisper, task_type=None),
    "whisper as seq2seq": edited(theirs(base=whisper, task_type=None), task_type="SEQ_2_SEQ_LM"),
    "peft loha": theirs("LoHaConfig", r=2, target_modules=["q_proj"]),
    "peft ia3": theirs("IA3Config", target_modules=["v_proj"], feedforward_modules=[]),
    "peft prompt tuning": theirs("PromptTuningConfig", num_virtual_tokens=3),
    "rank 64": theirs(r=64, target_modules=["q_proj", "v_proj"]),
    "unknown field": edited(theirs(), use_gadget=True),
    "wrong rank": edited(theirs(), r=4),
    "untargeted": edited(theirs(), target_modules=["q_proj"]),
    "excluded": edited(theirs(), exclude_modules=["v_proj"]),
    "no alpha": edited(theirs(lora_alpha=8), lora_alpha=None),
    "no type": edited(theirs(), peft_type=None),
    "v_proj missing": without(theirs(), "v_proj"),
    "task of another class": edited(theirs(), task_type="SEQ_2_SEQ_LM"),
    "deepseek by suffix": by_suffix("DeepseekV3"),
    "qwen3-next by suffix": by_suffix("Qwen3Next"),
    "deepseek": ours("lora", base=lambda: replay_base("DeepseekV3")),
    "mixtral": ours("lora", base=mixtral, exclude="*.experts.*"),
    "mixtral's experts": ours("lora", base=mixtral),
}
