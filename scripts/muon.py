"""Muon: momentum, orthogonalised, for the weight matrices of hidden layers (Jordan et al. 2024).

    M ← μ M + (1 − μ) G        O = the nearest semi-orthogonal matrix to (1 − μ) G + μ M
    W ← (1 − η λ) W − η √max(1, out/in) O

`torch.optim.Muon` computes the same in bf16, which has no fast path on most CPUs; this one stays in fp32 and takes all
matrices of one shape in one batched product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch

# The quintic of the authors: its slope at zero is large, so five iterations bring every singular value near one.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters [out, in], with decoupled weight decay λ = `weight_decay` and momentum μ."""

    def __init__(self, matrices: Iterable[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step on the gradients that are there."""
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for matrix in group["params"]:
                same_shape[matrix.shape].append(matrix)
            for shape, matrices in same_shape.items():
                directions = orthogonal(torch.stack([self._looked_ahead(m, group["momentum"]) for m in matrices]))
                size = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for matrix, direction in zip(matrices, directions, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=size)

    def _looked_ahead(self, matrix: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        """Nesterov's momentum: where the average will be when this gradient is seen once more."""
        state = self.state[matrix]
        if not state:
            state["average"] = torch.zeros_like(matrix)
        average = state["average"].lerp_(matrix.grad, 1 - momentum)
        return torch.lerp(matrix.grad, average, momentum)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """For each of [n, out, in] about the nearest semi-orthogonal matrix: singular values between 0.7 and 1.2."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.mT
