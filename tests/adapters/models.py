"""Small bases of four architectures, and adapters on them with numbers in every tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import lorary


class ConvNet(nn.Module):
    """Tokens to classes through a strided Conv1d and a padded Conv2d."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.conv1 = nn.Conv1d(8, 12, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(1, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(6, 5))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.conv1(self.embed(ids).transpose(1, 2)))
        return self.head(self.conv2(x.unsqueeze(1)).mean((2, 3)))


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=30,
            max_position_embeddings=32,
            tie_word_embeddings=False,
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=32, bos_token_id=0, eos_token_id=0)
    )


def bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=30,
            max_position_embeddings=32,
        )
    )


@dataclass(frozen=True)
class Base:
    """An architecture, what to adapt in it, and the one target whose rank is set apart."""

    name: str
    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    special: str
    embedding: str
    transposed: bool = False

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        """The same weights at every call, in evaluation mode."""
        torch.manual_seed(3)
        return self.make().eval()


BASES = (
    Base("Llama", llama, ("q_proj", "v_proj", "down_proj"), "down_proj", "embed_tokens"),
    Base("GPT-2", gpt2, ("c_attn", "c_fc"), "c_fc", "wte", transposed=True),
    Base("BERT", bert, ("query", "value", "attention.output.dense"), "value", "word_embeddings"),
    Base("ConvNet", ConvNet, ("conv1", "conv2", "head.1"), "conv2", "embed"),
)


def ids() -> Tensor:
    """Some tokens."""
    return torch.arange(24).reshape(2, 12) * 7 % 30


def outputs(model: nn.Module) -> Tensor:
    """A model's answer to `ids`."""
    with torch.no_grad():
        out: Any = model(ids())
    return out if isinstance(out, Tensor) else out.logits


def fill(parameters: Any) -> None:
    """Numbers of a trained adapter's size, the same at every call."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def adapted(base: Base, *names: str, targets: Any = None, **options: Any) -> nn.Module:
    """The base with a filled adapter on it, in evaluation mode."""
    model = base.model()
    words = {k: options.pop(k) for k in ("ranks", "alphas", "exclude") if k in options}
    method = lorary.method(*(names or ("lora",)), **({"r": 4, "alpha": 6} | options))
    lorary.attach(model, lorary.plan(model, method, targets=targets or base.targets, **words))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    return model.eval()


def vera(base: Base, *names: str, targets: Any = None, **options: Any) -> nn.Module:
    """The base with a filled VeRA on it, which has no alpha."""
    model = base.model()
    method = lorary.method("vera", *names, **({"r": 6} | options))
    lorary.attach(model, lorary.plan(model, method, targets=targets or base.targets))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    return model.eval()


def by_peft(base: Base, folder: Path) -> Tensor:
    """The outputs of the base with PEFT's reading of an adapter folder."""
    from peft import PeftModel

    return outputs(PeftModel.from_pretrained(base.model(), str(folder)).eval())


def by_transformers(base: Base, folder: Path) -> Tensor:
    """The outputs of the base with Transformers' reading of an adapter folder."""
    model: Any = base.model()
    model.load_adapter(str(folder))
    return outputs(model.eval())


def close(a: Tensor, b: Tensor) -> None:
    """Equal to a millionth of the largest logit."""
    assert torch.isfinite(a).all()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * max(1.0, b.abs().max().item()))


def same(a: lorary.Adapter, b: lorary.Adapter) -> None:
    """Equal in everything, the tensors bit for bit."""
    assert (a.method, a.sites, a.base) == (b.method, b.sites, b.base)
    assert a.tensors.keys() == b.tensors.keys()
    for site, roles in a.tensors.items():
        assert roles.keys() == b.tensors[site].keys()
        assert all(torch.equal(t, b.tensors[site][role]) for role, t in roles.items())
    assert a.full.keys() == b.full.keys()
    assert all(torch.equal(t, b.full[name]) for name, t in a.full.items())
