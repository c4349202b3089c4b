"""Small nets in which one layer is reached, and another is not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn


class Bypassed(nn.Module):
    """`live` is called; the weight of `dead` is read past it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = nn.Linear(4, 4)
        self.dead = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.live(x), self.dead.weight)


def times(layer: Any, x: Tensor) -> Tensor:
    """A helper that is given the layer and reads its weight."""
    return x @ layer.weight.T


class Hidden(Bypassed):
    """The same through a helper, which the source of the forward does not show."""

    def forward(self, x: Tensor) -> Tensor:
        return times(self.dead, self.live(x))


class Kernel(Bypassed):
    """A kernel gets the weight while training; where it is missing, the layer is called."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.live(x)
        if self.training and (y := missing_kernel(x, self.dead.weight)) is not None:
            return y
        z: Tensor = self.dead(x)
        return z


def missing_kernel(x: Tensor, W: Tensor) -> Tensor | None:
    """A kernel's stand-in on a machine without it."""
    return None


class Conditional(Bypassed):
    """Reads the weight on a path that no setting rules out, and that most forwards do not take."""

    def forward(self, x: Tensor, states: Tensor | None = None) -> Tensor:
        x = self.live(x)
        if states is not None:
            return F.linear(states, self.dead.weight)
        y: Tensor = self.dead(x)
        return y


class Switched(Bypassed):
    """Reads the weight on a path that a setting rules out."""

    exact = False

    def __init__(self, slices: int = 1) -> None:
        super().__init__()
        self.slices = slices

    def forward(self, x: Tensor) -> Tensor:
        x = self.live(x)
        if self.slices > 1:
            return F.linear(x, self.dead.weight[:2])
        y: Tensor = self.dead(x)
        return y


class Asked(Bypassed):
    """Asks the weight for its properties only."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.dead.weight, Tensor) and self.dead.weight.dtype == x.dtype:
            x = x.to(self.dead.weight.dtype) + self.dead.weight.new_zeros(4)
        y: Tensor = self.dead(self.live(x.to(self.dead.weight.device)))
        return y


class Direct(Bypassed):
    """Calls a layer's forward without its hooks."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dead.forward(self.live(x))
        return y


class Tied(nn.Module):
    """The head holds the embedding's weight as its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.live = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.live(self.embed(ids)))
        return y


class Experts(nn.Module):
    """A router sends every row to one expert; `unused` never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = int(x.sum().abs().item()) % 4
        y: Tensor = self.experts[chosen](x)
        return y


class Odd(nn.Module):
    """A mask, a count and a random choice, and everything that a forward may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.live = nn.Linear(4, 4)
        self.calls: list[int] = []
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        x = self.norm(x)
        self.cache = x
        if torch.rand(()) > 2:
            return x
        rows = x[(x > 0).any(-1)]
        for _ in range(int((x > 0).sum().item())):
            rows = F.dropout(rows, 0.1, self.training)
        y: Tensor = self.live(rows)
        return y


class Counting(nn.Module):
    """Keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = nn.Linear(4, 4)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        y: Tensor = self.live(x)
        return y


class ByList(transformers.PreTrainedModel):
    """Reads the weights of the layers in a list past them."""

    config_class = transformers.PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, past: list[int]) -> None:
        super().__init__(transformers.PretrainedConfig())
        self.tokens = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.past = past

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.tokens(input_ids)
        for i, layer in enumerate(self.layers):
            x = times(layer, x) if i in self.past else layer(x)
        return x
