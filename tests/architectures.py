"""Tiny models of many architectures of Transformers, made from their configurations, and a training step of each."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._pytree import tree_leaves

_TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GQA = _TEXT | _IDS | {"num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64}
_GPT = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64} | _IDS
_MOE = _GQA | {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
_SEQ2SEQ = {
    **{"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64},
    **_IDS,
    "decoder_start_token_id": 1,
}
_IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}
_VISION = _IMAGE | {k: v for k, v in _TEXT.items() if k != "vocab_size"}
_AUDIO = _TEXT | {
    **{"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0},
}
_SSM = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4} | _IDS
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_expand": 2}
_DELTA = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4},
    "linear_conv_kernel_dim": 4,
}

# Family -> class -> the settings of its configuration.
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "decoder-only": {
        "LlamaForCausalLM": _GQA,
        "MistralForCausalLM": _GQA,
        "Qwen2ForCausalLM": _GQA,
        "Qwen3ForCausalLM": _GQA,
        "Gemma2ForCausalLM": _GQA,
        "Gemma3ForCausalLM": _GQA,
        "Phi3ForCausalLM": _GQA,
        "PhiForCausalLM": _GQA,
        "GPT2LMHeadModel": _GPT,
        "GPTNeoXForCausalLM": _TEXT,
        "GPTJForCausalLM": _GPT | {"rotary_dim": 4},
        "OPTForCausalLM": _TEXT | _IDS | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
        "BloomForCausalLM": {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 4},
        "FalconForCausalLM": _TEXT,
        "CohereForCausalLM": _GQA,
        "Olmo2ForCausalLM": _GQA,
        "GraniteForCausalLM": _GQA,
        "StableLmForCausalLM": _GQA,
        "Starcoder2ForCausalLM": _GQA,
        "GlmForCausalLM": _GQA,
        "SmolLM3ForCausalLM": _GQA,
    },
    "mixture of experts": {
        "MixtralForCausalLM": _MOE | {"num_local_experts": 4},
        "Qwen2MoeForCausalLM": _MOE | {"num_experts": 4, "shared_expert_intermediate_size": 12},
        "Qwen3MoeForCausalLM": _MOE | {"num_experts": 4},
        "GptOssForCausalLM": _MOE | {"num_local_experts": 4},
        "GraniteMoeForCausalLM": _MOE | {"num_local_experts": 4},
        "OlmoeForCausalLM": _MOE | {"num_experts": 4},
        "DeepseekV3ForCausalLM": {k: v for k, v in _MOE.items() if k != "head_dim"}
        | {
            **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8},
            **{
                "q_lora_rank": 8,
                "num_key_value_heads": 4,
                "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 4,
                "v_head_dim": 4,
            },
        },
    },
    "state space and hybrid": {
        "MambaForCausalLM": _SSM,
        "FalconMambaForCausalLM": _SSM,
        "Mamba2ForCausalLM": _SSM | {"num_heads": 4, "head_dim": 8, "n_groups": 1, "expand": 2},
        "FalconH1ForCausalLM": _GQA | _MAMBA2 | {"mamba_d_ssm": 32},
        "NemotronHForCausalLM": _GQA
        | {
            **{"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3, "mamba_num_heads": 4},
            **{"mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1, "expand": 2},
        },
        "BambaForCausalLM": _GQA | _MAMBA2 | {"attn_layer_indices": [1]},
        "JambaForCausalLM": _MOE
        | {
            **{"num_experts": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2},
            **{"attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False},
        },
        "Lfm2ForCausalLM": _GQA | {"layer_types": ["conv", "full_attention"]},
        "Lfm2MoeForCausalLM": _MOE
        | {"layer_types": ["conv", "full_attention"], "num_experts": 4, "num_dense_layers": 1},
        "Qwen3NextForCausalLM": _MOE
        | _DELTA
        | {
            **{"layer_types": ["linear_attention", "full_attention"], "num_experts": 4},
            "shared_expert_intermediate_size": 12,
        },
        "RecurrentGemmaForCausalLM": _GQA | {"num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 8},
    },
    "encoder": {
        "BertForSequenceClassification": _TEXT,
        "RobertaForSequenceClassification": _TEXT | {"max_position_embeddings": 64},
        "DistilBertForSequenceClassification": {
            "vocab_size": 40,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 24,
        },
        "DebertaForSequenceClassification": _TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        "DebertaV2ForSequenceClassification": _TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        "ElectraForSequenceClassification": _TEXT | {"embedding_size": 12},
        "ModernBertForSequenceClassification": _TEXT | _IDS | {"cls_token_id": 1, "sep_token_id": 2},
        "AlbertForSequenceClassification": _TEXT | {"embedding_size": 12},
    },
    "sequence to sequence": {
        "T5ForConditionalGeneration": {
            **{"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4},
            "decoder_start_token_id": 0,
        },
        "BartForConditionalGeneration": _SEQ2SEQ,
        "MarianMTModel": _SEQ2SEQ,
        "PegasusForConditionalGeneration": _SEQ2SEQ,
        "M2M100ForConditionalGeneration": _SEQ2SEQ | {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
    },
    "vision": {
        "ViTForImageClassification": _VISION,
        "Dinov2ForImageClassification": _VISION,
        "SiglipVisionModel": _VISION,
        "ConvNextForImageClassification": {
            "num_channels": 3,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "image_size": 32,
        }
        | {"num_stages": 2},
        "ResNetForImageClassification": {
            **{"num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        },
        "SwinForImageClassification": _IMAGE
        | {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": 32},
        "MobileNetV2ForImageClassification": {"num_channels": 3, "depth_multiplier": 0.35, "image_size": 32},
    },
    "audio": {
        "Wav2Vec2ForCTC": _AUDIO,
        "HubertForCTC": _AUDIO,
        "WavLMForCTC": _AUDIO,
        "WhisperForConditionalGeneration": _SEQ2SEQ
        | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32},
        "ASTForAudioClassification": _TEXT
        | {"num_mel_bins": 16, "max_length": 32, "patch_size": 8}
        | {"frequency_stride": 8, "time_stride": 8},
    },
    "multimodal": {
        "CLIPModel": {"text_config": _TEXT | _IDS, "vision_config": _VISION, "projection_dim": 8},
        "LlavaForConditionalGeneration": {
            **{"text_config": _GQA | {"model_type": "llama"}, "image_token_index": 3},
            "vision_config": _VISION | {"model_type": "clip_vision_model"},
        },
        "PaliGemmaForConditionalGeneration": {
            **{"text_config": _GQA | {"model_type": "gemma"}, "image_token_index": 3, "projection_dim": 16},
            "vision_config": _VISION | {"model_type": "siglip_vision_model"},
        },
        "BlipForConditionalGeneration": {
            **{"text_config": _TEXT | _IDS | {"encoder_hidden_size": 16}, "vision_config": _VISION},
        },
    },
}
ARCHITECTURES = {name: settings for models in FAMILIES.values() for name, settings in models.items()}


def model(name: str, device: str = "cpu") -> Any:
    """The tiny model of a class, with seeded weights."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    with torch.device(device):
        return cls(cls.config_class(**ARCHITECTURES[name]))


def inputs(model: Any) -> dict[str, Tensor]:
    """Real inputs of a training step: tokens, images and sounds, whatever the model takes."""
    torch.manual_seed(1)
    config, takes = model.config, inspect.signature(model.forward).parameters
    ids = torch.randint(4, 38, (2, 24))
    if (image := getattr(config, "image_token_id", None)) is not None:
        ids[:, 1:17] = image  # one for each patch
    found: dict[str, Tensor] = {name: ids for name in ("input_ids", "decoder_input_ids") if name in takes}
    if not getattr(config, "is_encoder_decoder", False):
        found.pop("decoder_input_ids", None)
    if "pixel_values" in takes:
        size = getattr(getattr(config, "vision_config", config), "image_size", 32)
        found["pixel_values"] = torch.randn(2, 3, size, size)
    bins = getattr(config, "num_mel_bins", None)
    if "input_features" in takes:
        found["input_features"] = torch.randn(2, bins, 2 * config.max_source_positions)
    if "input_values" in takes:
        found["input_values"] = torch.randn(2, 400) if bins is None else torch.randn(2, 32, bins)
    return found


def gradients(model: Any) -> None:
    """A training step's backward pass from everything that the model puts out."""
    config = model.config.get_text_config()
    if hasattr(config, "use_cache"):
        config.use_cache = False
    leaves = tree_leaves(tuple(model.train()(**inputs(model)).values()))
    torch.manual_seed(2)
    terms = [(t * torch.randn_like(t)).sum() for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    torch.stack(terms).sum().backward()
