"""What the laws run over: every registered preset and every legal pair, on every kind of layer, in every dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import lorary
from lorary.errors import MethodError


class Net(nn.Module):
    """One layer under a name of its own, with norms around it that nothing should touch."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, layer)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x) * self.scale


@dataclass(frozen=True)
class Kind:
    """A sort of layer: how to make one, an input for it, what to target, and what the paper says r costs."""

    name: str
    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    numbers: Callable[[int], int]  # trained by LoRA of rank r
    target: str = "layer"

    @property
    def layer(self) -> str:
        return self.target.partition("[")[0]


KINDS = [
    Kind("linear", lambda: nn.Linear(24, 40), lambda: torch.randn(3, 5, 24), lambda r: r * (24 + 40)),
    Kind("linear without bias", lambda: nn.Linear(24, 8, bias=False), lambda: torch.randn(7, 24), lambda r: r * 32),
    Kind("GPT-2 Conv1D", lambda: Conv1D(40, 24), lambda: torch.randn(3, 5, 24), lambda r: r * (24 + 40)),
    Kind("fused q, v", lambda: Conv1D(48, 16), lambda: torch.randn(2, 5, 16), lambda r: 2 * r * 32, "c_attn[q,v]"),
    Kind(
        "conv1d, grouped, strided",
        lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1, groups=4),
        lambda: torch.randn(2, 8, 11),
        lambda r: r * (2 * 3 + 12),
    ),
    Kind(
        "conv2d, dilated, reflecting",
        lambda: nn.Conv2d(6, 10, (3, 2), dilation=2, padding=1, padding_mode="reflect"),
        lambda: torch.randn(2, 6, 9, 8),
        lambda r: r * (6 * 6 + 10),
    ),
    Kind(
        "conv2d, depthwise, same",
        lambda: nn.Conv2d(6, 6, 3, padding="same", groups=6, padding_mode="circular", bias=False),
        lambda: torch.randn(6, 7, 7),  # without a batch
        lambda r: r * (9 + 6),
    ),
    Kind("conv3d", lambda: nn.Conv3d(3, 5, 2), lambda: torch.randn(2, 3, 4, 4, 3), lambda r: r * (3 * 8 + 5)),
    Kind(
        "embedding",
        lambda: nn.Embedding(30, 12, padding_idx=3),
        lambda: torch.randint(0, 30, (3, 7)),
        lambda r: r * (30 + 12),
    ),
    Kind(
        "embedding, scaled",
        lambda: Gemma3TextScaledWordEmbedding(30, 12, 0, embed_scale=3.5),
        lambda: torch.randint(0, 30, (3, 7)),
        lambda r: r * (30 + 12),
    ),
]


@dataclass(frozen=True)
class Case:
    """One law's subject."""

    method: lorary.Method
    kind: Kind
    dtype: torch.dtype = torch.float32

    def base(self) -> Net:
        """The base, the same at every call."""
        torch.manual_seed(1)
        return Net(self.kind.layer, self.kind.make()).to(self.dtype)

    def x(self) -> Tensor:
        torch.manual_seed(2)
        x = self.kind.x()
        return x.to(self.dtype) if x.is_floating_point() else x

    def attached(self) -> Net:
        """The base with the method attached, at step 0."""
        model = self.base()
        return lorary.attach(model, lorary.plan(model, self.method, targets=[self.kind.target]))

    def trained(self) -> Net:
        """As after training: everything that trains has moved."""
        model = self.attached()
        torch.manual_seed(3)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.3)
        return model


def possible(method: lorary.Method, kind: Kind) -> bool:
    """Whether the method says that it can work on this kind; its refusals are pinned elsewhere."""
    layer = Net(kind.layer, kind.make())
    try:
        lorary.plan(layer, method, targets=[kind.target])
    except lorary.errors.PlanError:
        return False
    return True


def methods() -> dict[str, lorary.Method]:
    """Every preset and every pair of presets that is a method."""
    names = list(lorary.presets())
    made = {}
    for chosen in [(n,) for n in names] + list(itertools.combinations(names, 2)):
        adapts = any(lorary.presets()[n].adapts for n in chosen)
        try:
            made["+".join(chosen)] = lorary.method(*chosen, **({"r": 3, "alpha": 6.0} if adapts else {}))
        except MethodError:
            continue
    return made
