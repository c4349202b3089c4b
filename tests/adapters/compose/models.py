"""A small base with every kind of layer, and adapters of many methods on it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorary
from lorary.layers.adapted import adapted_layers
from lorary.methods.o_lora import SequentialLoRA
from tests.laws.cases import made_of, seed


class Net(nn.Module):
    """An embedding, a linear layer, a fused transposed one, and two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.plain, self.c_attn = nn.Embedding(30, 24), nn.Linear(24, 24), Conv1D(72, 24)
        self.conv1, self.conv2 = nn.Conv1d(24, 24, 3, padding=1, groups=2), nn.Conv2d(1, 6, (3, 2), padding=(1, 0))
        nn.init.normal_(self.c_attn.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(self.plain(self.embed(x))).chunk(3, -1)
        y: Tensor = self.conv2(self.conv1((torch.tanh(q) * k + v).mT).unsqueeze(1))
        return y


ALL = ("embed", "plain", "c_attn[q,v]", "conv1", "conv2")
LINEAR = ("plain", "c_attn[q,v]")
X = torch.arange(14).reshape(2, 7)
# name -> presets, targets, options: of different ranks
PLAIN: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]] = {
    "lora": (("lora",), ALL, {}),
    "lora of rank 5": (("lora",), ("plain", "conv2"), {"r": 5, "alpha": 2.0}),
    "rslora": (("rslora",), ALL, {"r": 2}),
    "vera": (("vera",), LINEAR, {"r": 7}),
    "melora": (("melora",), LINEAR, {"n": 2}),
    "pissa": (("pissa",), ALL, {}),
    "olora": (("olora",), LINEAR, {}),
    "adalora": (("adalora",), ("embed", "plain", "conv1"), {}),
    "multilora": (("multilora",), ALL, {}),
    "loha": (("loha",), ALL, {}),
    "lokr": (("lokr",), ALL, {"r": 1}),
    "delta-lora": (("delta-lora",), ALL, {}),
    "lora-fa": (("lora-fa",), LINEAR, {}),
    "o-lora": (("o-lora",), LINEAR, {}),
}


def base() -> Net:
    """The same weights at every call."""
    seed(1)
    return Net().eval()


@cache
def adapter(name: str, number: int = 3) -> lorary.Adapter:
    """An adapter of `PLAIN`, as after training."""
    presets, targets, options = PLAIN[name]
    method = made_of(*presets, **options)
    if name == "o-lora":
        method = method.replace(delta=SequentialLoRA(3, past=(2, 1)))
    return trained(method, targets, number)


def trained(method: lorary.Method, targets: Any = ALL, number: int = 3, model: Any = None) -> lorary.Adapter:
    """An adapter as after training with a method."""
    model = base() if model is None else model
    lorary.attach(model, lorary.plan(model, method, list(targets) if targets else None))
    fixed = {id(x.params[role]) for x in adapted_layers(model).values() for role in x.method.delta.fixed_roles}
    seed(number)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad or id(p) in fixed:
                p.add_(torch.randn_like(p) * 0.3)
    return lorary.Adapter.of(model)


@torch.no_grad()
def changes(value: lorary.Adapter, model: Any = None) -> dict[str, Tensor]:
    """site -> W' - W [out, in] of the merged model, in 64 bits."""
    model = (base() if model is None else model).double()
    layers = adapted_layers(lorary.switch(model, value))
    merged = {name: layer.merged()[0] for name, layer in layers.items()}
    kinds = {name: layer.kind for name, layer in layers.items()}
    lorary.switch(model, None)
    return {name: W - kinds[name].matrix(model.get_submodule(name)) for name, W in merged.items()}


def products(value: lorary.Adapter) -> dict[str, Tensor]:
    """site -> B A of an adapter that is a plain LoRA."""
    return {name: form.B.double() @ form.A.double() for name, form in value.low_rank().items()}


def near(found: Tensor, expected: Tensor, error: float = 1e-6) -> None:
    """Equal up to a relative error in the Frobenius norm."""
    gap = float((found - expected).norm())
    assert gap <= error * float(expected.norm()), f"off by {gap / float(expected.norm()):.2g}"


def output(model: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(X)
    return y
