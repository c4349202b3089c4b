"""SubspaceAdam: training a model in a random subspace of its parameters.

    DID     θ  = θ0 + P(θ_d)                      one projection of all parameters
    SAID    θᵢ = θ0ᵢ + λᵢ·P(θ_{d−m})ᵢ             m layers, each with a trained λᵢ that starts at 1

Aghajanyan et al. 2020, arXiv:2012.13255, equations 2 and 3. Only d numbers are trained, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorary.analysis.inspection.fastfood import Fastfood, Projection
from lorary.errors import Diagnostic, PlanError


class SubspaceAdam(torch.optim.Optimizer):
    """An optimizer that moves a model's parameters in a random subspace of dimension d.

    Any training loop can use it: it takes the gradients of the parameters, projects them, steps in the subspace, and
    writes the parameters.

    Args:
        parameters: name -> parameter; their values now are θ0.
        d: the dimension of the subspace, the λ of SAID included.
        lr: the learning rate.
        said: structure-aware: a scale for every layer (`layers_of`).
        seed: of the projection.
        projection: makes it from (d, D, seed).
        inner: makes the optimizer of the trained numbers from (tensors, lr=...).

    Raises:
        PlanError: d is not from 1 to D, or leaves nothing beside the λ.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        d: int,
        *,
        lr: float,
        said: bool = False,
        seed: int = 0,
        projection: Callable[[int, int, int], Projection] = Fastfood,
        inner: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    ) -> None:
        self.names = tuple(parameters)
        self.layers = layers_of(self.names) if said else {}
        sizes = [p.numel() for p in parameters.values()]
        free = d - len(set(self.layers.values()))
        _check(d, free, sum(sizes))
        super().__init__(list(parameters.values()), {"lr": lr})
        self.sizes, self.trained = sizes, list(parameters.values())
        self.device = self.trained[0].device  # of the subspace; a model on several devices has parts of it elsewhere
        self.start = [p.detach().to(self.device, torch.float32, copy=True) for p in self.trained]
        self.projection = projection(free, sum(sizes), seed)
        self.theta = nn.Parameter(torch.zeros(free, device=self.device))
        self.lam = nn.Parameter(torch.ones(len(set(self.layers.values())), device=self.device))
        self.inner = inner([self.theta, self.lam] if said else [self.theta], lr=lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """A step in the subspace by the gradients of the parameters; a parameter without one has a gradient of 0."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        g = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        g = [gi.to(self.device, torch.float32).view_as(start) for gi, start in zip(g, self.start, strict=True)]
        if self.layers:
            products = [(v * gi).sum() for v, gi in zip(self._moves(), g, strict=True)]
            index = self._index()
            self.lam.grad = torch.zeros_like(self.lam).index_add_(0, index, torch.stack(products))
            g = [self.lam[i] * gi for i, gi in zip(index.tolist(), g, strict=True)]
        self.theta.grad = self.projection.transpose(torch.cat([gi.flatten() for gi in g]))
        for group in self.inner.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self.inner.step()
        self.write()
        return loss

    @torch.no_grad()
    def write(self) -> None:
        """Give the parameters the values of the point in the subspace."""
        scales = self.lam[self._index()].tolist() if self.layers else [1.0] * len(self.trained)
        for p, start, move, scale in zip(self.trained, self.start, self._moves(), scales, strict=True):
            p.copy_(start + scale * move)

    def _moves(self) -> list[Tensor]:
        """P(θ_d) in the shapes of the parameters."""
        flat = self.projection(self.theta)
        return [part.view_as(start) for part, start in zip(flat.split(self.sizes), self.start, strict=True)]

    def _index(self) -> Tensor:
        """The number of each parameter's layer."""
        known = list(dict.fromkeys(self.layers.values()))
        return torch.tensor([known.index(self.layers[name]) for name in self.names], device=self.device)


def layers_of(names: tuple[str, ...]) -> dict[str, str]:
    """parameter -> its layer: the path up to the first number, or that of its module outside of the blocks.

    >>> layers_of(("model.layers.3.mlp.up_proj.weight", "lm_head.weight"))
    {'model.layers.3.mlp.up_proj.weight': 'model.layers.3', 'lm_head.weight': 'lm_head'}
    """
    found = {}
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        found[name] = ".".join(parts[:-1] if number is None else parts[: number + 1])
    return found


def _check(d: int, free: int, size: int) -> None:
    """Refuse dimensions that are none.

    Raises:
        PlanError: d is not from 1 to D, or leaves nothing beside the λ.
    """
    if isinstance(d, bool) or not isinstance(d, int) or not 1 <= d <= size:
        raise PlanError("cannot train in a subspace:", [Diagnostic("d", f"is {d!r}, not from 1 to {size:,}")])
    if free < 1:
        what = f"is {d:,}, and SAID takes {d - free:,} of it for the scales of the layers"
        raise PlanError("cannot train in a subspace:", [Diagnostic("d", what, f"use more than {d - free:,}")])
