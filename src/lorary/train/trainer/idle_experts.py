"""The share of experts without a token in an optimizer step, for the log.

An expert without a token has a gradient of exactly zero. AdamW moves its adapter all the same, by the momentum of
earlier steps and by weight decay, as it does every parameter whose gradient is zero.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lorary.layers.adapted import Adapted, adapted_layers
from lorary.layers.dtensor import full_tensor
from lorary.train.trainer import trainer_internals

NAME = "idle_experts"


class IdleExperts:
    """The experts whose adapters have no gradient, over all blocks of a model.

    Args:
        model: with a method attached. Adapters that experts share are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def _blocks(self) -> list[list[Adapted]]:
        """The adapted layers of each block of experts."""
        blocks: dict[str, list[Adapted]] = {}
        for name, layer in adapted_layers(self.model).items():
            if layer.site.adapters:
                blocks.setdefault(name.rpartition(".")[0], []).append(layer)
        return list(blocks.values())

    def share(self) -> float | None:
        """The share of idle experts, once the gradients of a step are complete; None without experts.

        It waits for the device once, whatever the number of layers.
        """
        found = [busy for block in self._blocks if (busy := _busy(block)) is not None]
        return 1 - float(torch.cat([busy.to(found[0].device) for busy in found]).float().mean()) if found else None

    def log(self, trainer: Any) -> None:
        """Add the share to the next line of the trainer's log."""
        if (share := self.share()) is not None:
            trainer_internals.log_metric(trainer, NAME, share)


def _busy(block: list[Adapted]) -> Tensor | None:
    """[E] whether an expert's adapters have a gradient; None if none of them is trained."""
    gradients = [
        p.grad
        for layer in block
        for role, p in layer.params.items()
        if role not in layer.shared_shapes and p.grad is not None
    ]
    largest = [full_tensor(g.abs().flatten(1).amax(1)) for g in gradients if g.numel()]
    return torch.stack(largest).amax(0) > 0 if largest else None
