"""Tiny mixture-of-experts models of eight architectures, whose experts are fused in every layout that there is."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

_TEXT = {
    **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2, "head_dim": 4},
    **{"max_position_embeddings": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
}
_MLA = {
    **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8},
    **{"q_lora_rank": 8, "num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4},
}
_MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1, "expand": 2}
_VISION = {
    **{"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16},
    **{"patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
}

# Class -> the settings of its configuration. E = 4 unless it says otherwise.
MODELS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": _TEXT | {"num_local_experts": 4},
    "Qwen3MoeForCausalLM": _TEXT | {"num_experts": 4},
    "GptOssForCausalLM": _TEXT | {"num_local_experts": 4},
    "Llama4ForCausalLM": _TEXT
    | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
    "DeepseekV3ForCausalLM": {k: v for k, v in _TEXT.items() if k != "head_dim"} | _MLA,
    "GraniteMoeForCausalLM": _TEXT | {"num_local_experts": 4},
    "NemotronHForCausalLM": _TEXT
    | _MAMBA
    | {"layers_block_type": ["moe", "attention", "moe"], "num_hidden_layers": 3, "n_routed_experts": 4}
    | {"moe_shared_expert_intermediate_size": 12, "topk_group": 1, "n_group": 1},
    "Qwen3VLMoeForConditionalGeneration": {
        "text_config": _TEXT
        | {"num_experts": 4, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}},
        "vision_config": _VISION,
    },
    "Lfm2MoeForCausalLM": _TEXT | {"layer_types": ["conv", "full_attention"], "num_experts": 4, "num_dense_layers": 1},
}
_DELTA = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4},
    **{"linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"]},
}
# Further classes, whose layouts are among those above.
MORE: dict[str, dict[str, Any]] = {
    "Qwen2MoeForCausalLM": _TEXT | {"num_experts": 4, "shared_expert_intermediate_size": 12},
    "Qwen3NextForCausalLM": _TEXT | _DELTA | {"num_experts": 4, "shared_expert_intermediate_size": 12},
}
IDS = torch.tensor([[3, 14, 15, 9, 2, 6, 5], [35, 8, 9, 7, 9, 3, 23]])


def moe(name: str = "MixtralForCausalLM", **changed: Any) -> Any:
    """A model of this class in evaluation mode, with weights large enough for every expert to matter."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**((MODELS | MORE)[name] | changed))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.05)
    return model


def logits(model: nn.Module) -> Tensor:
    """[2, 7, vocabulary] of the same tokens."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def shake(model: nn.Module, size: float = 0.1) -> None:
    """Add noise to everything that trains, as training does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * size)
