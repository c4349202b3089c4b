"""The files of `tests/adapters/intake/made`: written by the tools' own code, with the updates that it computes.

    python -m tests.clients.adapter_files mlx diffusers torchtune    where mlx-lm, diffusers and torchtune are installed
    python -m tests.clients.adapter_files lycoris                    where lycoris-lora is installed
    python -m tests.clients.adapter_files kohya SD_SCRIPTS           with a checkout of kohya-ss/sd-scripts
    python -m tests.clients.adapter_files gguf LLAMA_CPP             with one of ggml-org/llama.cpp

Each folder has the tool's file as it is, and `updates.safetensors`: layer -> W' - W, [out, in], by the tool.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

MADE = Path(__file__).resolve().parents[1] / "adapters" / "intake" / "made"
_UNET_TARGETS = ["attn1.to_q", "attn2.to_out.0", "mid_block.resnets.0.conv1"]
WIDTH, INNER, HEADS, GROUPS, RANK = 16, 24, 4, 2, 3


def main() -> None:
    """Make the files of the named tools."""
    tools, paths = [a for a in sys.argv[1:] if a in TOOLS], [a for a in sys.argv[1:] if a not in TOOLS]
    for tool in tools:
        folder = MADE / tool
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        updates = TOOLS[tool](folder, *paths)
        plain = {name: t.detach().float().contiguous() for name, t in updates.items()}
        save_file(plain, folder / "updates.safetensors")


def mlx(folder: Path) -> dict[str, torch.Tensor]:
    """mlx-lm's LoRA on its own Llama."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config

    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type="llama", hidden_size=WIDTH, num_hidden_layers=2, intermediate_size=INNER,
            num_attention_heads=HEADS, num_key_value_heads=GROUPS, rms_norm_eps=1e-6, vocab_size=30,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.freeze()
    parameters = {"rank": RANK, "scale": 1.7, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    linear_to_lora_layers(model, 2, parameters)
    for name, t in tree_flatten(model.trainable_parameters()):
        module = model
        *path, leaf = name.split(".")
        for part in path:
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        setattr(module, leaf, mx.random.normal(t.shape) * 0.2)
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    save_config(config, folder / "adapter_config.json")
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "fuse"):
            change = module.fuse().weight - module.linear.weight
            found[name] = torch.from_numpy(np.array(change))
    return found


def diffusers(folder: Path) -> dict[str, torch.Tensor]:
    """diffusers' pipeline: PEFT's LoRA of a UNet and of a text encoder in one file, of other ranks and scales."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=30)
    )
    config = {"init_lora_weights": False}
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=_UNET_TARGETS, **config))
    text.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"], **config))
    models = {"unet": unet, "text_encoder": text}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(text)),
        **_collate_lora_metadata(models),
    )
    return {f"{name}.{site}": delta for name, model in models.items() for site, delta in _deltas(model).items()}


def _deltas(model: Any) -> dict[str, torch.Tensor]:
    found = {n: m.get_delta_weight("default") for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    return {name: delta.flatten(1) for name, delta in found.items()}


def torchtune(folder: Path) -> dict[str, torch.Tensor]:
    """torchtune's LoRA on its own Llama: its own names in one folder, its PEFT form in another."""
    from torchtune.models import convert_weights
    from torchtune.models.llama2 import lora_llama2
    from torchtune.modules.peft import get_adapter_params, get_merged_lora_ckpt

    sizes = {"num_heads": HEADS, "num_kv_heads": GROUPS, "dim": WIDTH}
    model = lora_llama2(
        ["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True, vocab_size=30, num_layers=2,
        num_heads=HEADS, num_kv_heads=GROUPS, embed_dim=WIDTH, intermediate_dim=INNER, max_seq_len=32,
        lora_rank=RANK, lora_alpha=5,
    )  # fmt: skip
    adapter = get_adapter_params(model)
    for parameter in adapter.values():
        parameter.data.normal_(std=0.2)
    modules = ["q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3"]
    said = {"r": RANK, "lora_alpha": 5, "target_modules": modules, "peft_type": "LORA"}
    config = convert_weights.tune_to_peft_adapter_config(said, "org/model")
    own = {name: t.detach().clone() for name, t in adapter.items()}
    for name, tensors in {"own": own, "peft": convert_weights.tune_to_peft_adapter_weights(own, **sizes)}.items():
        (folder / name).mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name / "adapter_model.safetensors")
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    before = {name: t.clone() for name, t in state.items() if "lora_" not in name}
    after = get_merged_lora_ckpt(dict(state), rank=RANK, alpha=5)
    there, here = (convert_weights.tune_to_hf(weights, **sizes) for weights in (before, after))
    changes = {name: here[name] - t for name, t in there.items()}
    return {name.removesuffix(".weight"): t for name, t in changes.items() if t.any()}


def kohya(folder: Path, source: str) -> dict[str, torch.Tensor]:
    """sd-scripts' own modules on a text encoder and a convolution, with ranks and alphas of their own."""
    library = types.ModuleType("library")
    utils, unet = types.ModuleType("library.utils"), types.ModuleType("library.sdxl_original_unet")
    utils.setup_logging = lambda *_, **__: None  # type: ignore[attr-defined]
    unet.SdxlUNet2DConditionModel = type("SdxlUNet2DConditionModel", (), {})  # type: ignore[attr-defined]
    sys.modules |= {"library": library, "library.utils": utils, "library.sdxl_original_unet": unet}
    sys.path.insert(0, source)
    from networks.lora import LoRAInfModule

    layers: dict[str, tuple[torch.nn.Module, int, float]] = {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (torch.nn.Linear(16, 16), 3, 2.0),
        "lora_te_text_model_encoder_layers_1_mlp_fc1": (torch.nn.Linear(16, 24), 5, 5.0),
        "lora_unet_mid_block_attentions_0_proj_in": (torch.nn.Conv2d(8, 12, 1), 3, 1.5),
        "lora_unet_mid_block_resnets_0_conv1": (torch.nn.Conv2d(8, 6, 3, padding=1), 2, 4.0),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0": (torch.nn.Linear(8, 8), 4, 1.0),
    }
    tensors, found = {}, {}
    for name, (layer, rank, alpha) in layers.items():
        module: Any = LoRAInfModule(name, layer, lora_dim=rank, alpha=alpha)
        torch.nn.init.normal_(module.lora_up.weight, std=0.2)
        state = {key: t.detach() for key, t in module.state_dict().items() if not key.startswith("org_module")}
        tensors |= {f"{name}.{key}": t.contiguous() for key, t in state.items()}
        found[name] = module.get_weight(1.0).flatten(1)
    save_file(tensors, folder / "lora.safetensors", metadata={"ss_network_module": "networks.lora"})
    return found


def lycoris(folder: Path) -> dict[str, torch.Tensor]:
    """LyCORIS' own modules: LoHa and LoKr in all of their forms, each on a layer of its own."""
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    def linear() -> torch.nn.Module:
        return torch.nn.Linear(12, 16)

    def conv() -> torch.nn.Module:
        return torch.nn.Conv2d(8, 12, 3, groups=2)

    layers: dict[str, tuple[Any, torch.nn.Module, dict[str, Any]]] = {
        "hada_linear": (LohaModule, linear(), {"lora_dim": 2, "alpha": 1}),
        "hada_conv": (LohaModule, conv(), {"lora_dim": 2, "alpha": 3}),
        "hada_core": (LohaModule, conv(), {"lora_dim": 2, "use_tucker": True}),
        "hada_along": (LohaModule, torch.nn.Conv1d(8, 12, 3), {"lora_dim": 2, "use_tucker": True}),
        "hada_root": (LohaModule, linear(), {"lora_dim": 4, "alpha": 2, "rs_lora": True}),
        "hada_dora": (LohaModule, linear(), {"lora_dim": 2, "weight_decompose": True}),
        "kron_linear": (LokrModule, torch.nn.Linear(16, 36), {"lora_dim": 2, "alpha": 2}),
        "kron_factor": (LokrModule, torch.nn.Linear(16, 36), {"lora_dim": 2, "alpha": 2, "factor": 2}),
        "kron_large": (LokrModule, linear(), {"lora_dim": 1, "factor": 4}),
        "kron_both": (LokrModule, torch.nn.Linear(36, 36), {"lora_dim": 2, "decompose_both": True, "alpha": 3}),
        "kron_whole": (LokrModule, linear(), {"lora_dim": 8, "alpha": 1}),
        "kron_full": (LokrModule, torch.nn.Linear(16, 36), {"lora_dim": 1, "full_matrix": True, "alpha": 3}),
        "kron_turned": (LokrModule, torch.nn.Linear(36, 8), {"lora_dim": 1, "unbalanced_factorization": True}),
        "kron_conv": (LokrModule, torch.nn.Conv2d(9, 16, 3), {"lora_dim": 1, "alpha": 1}),
        "kron_core": (LokrModule, torch.nn.Conv2d(9, 16, 3), {"lora_dim": 1, "use_tucker": True}),
        "kron_along": (LokrModule, torch.nn.Conv1d(8, 12, 3), {"lora_dim": 8}),
        "kron_dora": (LokrModule, torch.nn.Linear(16, 36), {"lora_dim": 2, "weight_decompose": True}),
    }
    tensors, found, weights = {}, {}, {}
    for name, (cls, layer, options) in layers.items():
        module = cls(f"lycoris_blocks_{name}", layer, **options)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        for key, t in module.custom_state_dict().items():
            tensors[f"lycoris_blocks_{name}.{key}"] = t.detach().clone().contiguous()
        W = layer.weight.detach()
        changed = W + module.get_weight(W.shape).detach()  # as in its forward: its merging multiplies by s twice
        changed = module.apply_weight_decompose(changed).detach() if module.wd else changed
        found[f"blocks.{name}"] = (changed - W).flatten(1)
        if module.wd:  # whose update depends on it
            weights[f"blocks.{name}"] = W.clone()
    save_file(tensors, folder / "lycoris.safetensors")
    save_file(weights, folder / "weights.safetensors")
    return found


def gguf(folder: Path, source: str) -> dict[str, torch.Tensor]:
    """llama.cpp's `convert_lora_to_gguf.py` of PEFT's LoRA of a Llama."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=HEADS,
            num_key_value_heads=GROUPS, vocab_size=30, max_position_embeddings=32, tie_word_embeddings=False,
        )
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "down_proj", "embed_tokens", "lm_head"]
    there = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=5, target_modules=targets, init_lora_weights=False))
    with tempfile.TemporaryDirectory() as temporary:
        there.save_pretrained(temporary, save_embedding_layers=False)
        model.config.architectures = ["LlamaForCausalLM"]
        model.config.save_pretrained(f"{temporary}/base")
        script = [sys.executable, f"{source}/convert_lora_to_gguf.py", temporary, "--base", f"{temporary}/base"]
        subprocess.run([*script, "--outfile", str(folder / "adapter.gguf")], check=True)
    return _deltas(model)


TOOLS = {"gguf": gguf, "mlx": mlx, "diffusers": diffusers, "torchtune": torchtune, "kohya": kohya, "lycoris": lycoris}

if __name__ == "__main__":
    main()
