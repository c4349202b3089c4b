"""Tiny, randomly initialised models of real architectures, made from their configurations."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lorary
from lorary.spec.calibration import CalibratedInit

_SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = _SMALL | {"intermediate_size": 24, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4}

# Kind of model -> its configuration at a tiny size.
_SETTINGS: dict[str, dict[str, Any]] = {
    "Bart": {"vocab_size": 40, "d_model": 16, "pad_token_id": 0, "max_position_embeddings": 40, "scale_embedding": True}
    | {f"{side}_{k}": n for side in ("encoder", "decoder") for k, n in (("layers", 1), ("ffn_dim", 24))}
    | {"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    "Bert": _SMALL | {"intermediate_size": 24},
    "Bloom": {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    "CodeGen": _GPT2 | {"rotary_dim": 4, "n_positions": 32},
    "Dbrx": {
        "vocab_size": 40,
        "d_model": 16,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
    },
    "DistilBert": {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24},
    "Falcon": _SMALL,
    "GPT2": _GPT2,
    "GPTBigCode": _GPT2,
    "GPTNeoX": _SMALL | {"intermediate_size": 24},
    "GPTNeoXJapanese": _SMALL | {"intermediate_multiple_size": 1},
    "Gemma3": _GROUPED | {"head_dim": 4},
    "Llama": _GROUPED,
    "Mistral": _GROUPED,
    "Mixtral": _GROUPED | {"num_local_experts": 4},
    "MobileNetV2": {"num_channels": 3, "depth_multiplier": 0.35, "image_size": 32, "tf_padding": True},
    "ModernBert": _SMALL
    | {"intermediate_size": 24}
    | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    "Mpt": {"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_heads": 4},
    "OpenAIGPT": _GPT2,
    "Persimmon": _SMALL | {"intermediate_size": 24},
    "Phi3": _GROUPED | {"pad_token_id": 0},
    "Qwen2": _GROUPED,
    "Roberta": _SMALL | {"intermediate_size": 24, "max_position_embeddings": 40},
    "T5": {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4},
    "ViT": {k: v for k, v in _SMALL.items() if k != "vocab_size"}
    | {"intermediate_size": 24, "image_size": 8, "patch_size": 4},
    "Cohere": _GROUPED,
    "Gemma": _GROUPED | {"head_dim": 4},
    "Gemma2": _GROUPED | {"head_dim": 4},
    "Glm": _GROUPED | {"head_dim": 4, "pad_token_id": 0},
    "GptOss": _GROUPED | {"head_dim": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Granite": _GROUPED,
    "Olmo": _GROUPED,
    "Olmo2": _GROUPED,
    "Phi": _SMALL | {"intermediate_size": 24},
    "Qwen3": _GROUPED | {"head_dim": 4},
    "SmolLM3": _GROUPED | {"pad_token_id": 0},
    "StableLm": _GROUPED,
    "Starcoder2": _GROUPED,
}


FUSED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv")  # the last names of fused projections in these models


def kind_of(name: str) -> str:
    """The kind of a class: `Llama` for `LlamaForCausalLM`."""
    return max((kind for kind in _SETTINGS if name.startswith(kind)), key=len)


def settings(name: str) -> dict[str, Any]:
    """What the configuration of a tiny model is made from."""
    return _SETTINGS[kind_of(name)]


def config(kind: str, **changes: Any) -> Any:
    """The configuration of a tiny model, such as `config("Llama", tie_word_embeddings=True)`."""
    name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    return getattr(transformers, name)(**_SETTINGS[kind] | changes)


def model(name: str, device: str = "cpu", **changes: Any) -> Any:
    """A tiny model in evaluation mode by its class, such as `model("LlamaForCausalLM")`."""
    with torch.device(device):
        return getattr(transformers, name)(config(kind_of(name), **changes)).eval()


def seeded(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny model whose weights are the same at every call."""
    torch.manual_seed(seed)
    return model(name, **changes)


def llama(**changes: Any) -> Any:
    """The language model that most tests use."""
    return model("LlamaForCausalLM", **changes)


def ids() -> Tensor:
    """Token ids [2, 5] that every tiny vocabulary holds, one of them twice."""
    return torch.tensor([[1, 5, 7, 5, 2], [3, 9, 0, 4, 38]])


def logits(model: Any, **inputs: Any) -> Tensor:
    """What a model answers to `ids()`, without gradients."""
    with torch.no_grad():
        out: Tensor = model(**(inputs or {"input_ids": ids()})).logits
    return out


def exact_logits(model: Any, **inputs: Any) -> Tensor:
    """The same of a base that bitsandbytes may have packed to 4 bits, as on every CPU.

    One with AVX512-BF16 evaluates such layers in bfloat16, whatever they compute in, and lays their codes out anew for
    good; it does not where they train, which changes nothing else about them.
    """
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    for layer in layers:
        layer.train()
    out = logits(model, **inputs)
    for layer in layers:
        layer.eval()
    return out


class ConvNet(nn.Module):
    """Three kinds of convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8, padding_mode="reflect")
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(self.depthwise(self.norm(self.stem(x)).relu())).relu()
        y: Tensor = self.head(x.mean((-2, -1)))
        return y


def shaken(model: nn.Module, size: float = 0.3, seed: int = 3) -> nn.Module:
    """As after training: everything that trains has moved at random."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape).to(p) * size)
    return model


LORA = lorary.method("lora", r=2, alpha=8.0)


def data_for(plan: lorary.Plan, ids: Tensor | None = None) -> list[dict[str, Tensor]] | None:
    """Training data for a plan whose start reads some, from a seed; None for others."""
    if not any(isinstance(site.init, CalibratedInit) for site in plan.sites):
        return None
    ids = torch.randint(3, 38, (4, 12), generator=torch.Generator().manual_seed(7)) if ids is None else ids
    return [{"input_ids": ids, "labels": ids}]


def trained(model: Any, method: lorary.Method = LORA, targets: Any = "all-linear", **options: Any) -> Any:
    """The model as after training with a method."""
    plan = lorary.plan(model, method, targets)
    lorary.attach(model, plan, **{"data": data_for(plan)} | options)
    return shaken(model)


def everything(model: nn.Module) -> tuple[Any, ...]:
    """What must be the same after a detach: modules and parameters themselves, flags, modes, values."""
    return (
        [(name, id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters(remove_duplicate=False)],
        [(name, id(b)) for name, b in model.named_buffers(remove_duplicate=False)],
        [sorted(vars(m)) for m in model.modules()],
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def frozen_copy(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state dict."""
    return {k: v.clone() for k, v in model.state_dict().items()}


class Twice(nn.Module):
    """One layer under two paths, and its weight tied to a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.inner = nn.ModuleList([self.a])
        self.c = nn.Linear(4, 4, bias=False)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + 10 * self.inner[0](x) + 100 * self.c(x)


# Models with every kind of layer between them, and what to adapt in each.
MODELS: dict[str, list[str]] = {
    "LlamaForCausalLM": ["all-linear"],
    "GPT2LMHeadModel": ["attention-qv", "embedding"],
    "T5ForConditionalGeneration": ["embedding", "all-linear", "lm_head"],
    "BertForSequenceClassification": ["attention", "embedding"],
    "MixtralForCausalLM": ["attention"],
    "Gemma3ForCausalLM": ["embedding", "lm_head"],
    "MobileNetV2ForImageClassification": ["conv"],
}
