"""AdamW whose moments stay in the host's memory, and visit the device for the update of their parameter alone.

    for every parameter:  fetch its moments -> AdamW -> evict them

Where the device has streams, the next parameter's moments arrive while this one is updated, and the one before
leaves: the device holds the moments of two parameters at most. Elsewhere the copies are made in turn. Tensors below
`THRESHOLD` numbers keep their moments beside them: a copy costs them more than it frees (so does bitsandbytes).

The arithmetic is PyTorch's own (`torch.optim.adamw.adamw`), and it is elementwise: the result is that of
`torch.optim.AdamW` with the same settings, bit for bit, wherever the moments have been in between.

Dettmers et al. 2023, arXiv:2305.14314, section 3 (paged optimizers).

*Differs from the paper:* they are in CUDA's managed memory, which the driver moves when memory runs out; these are in
pinned memory and always moved, so that it works on any device, and the peak does not depend on the driver.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lorary.errors import ConfigError, Problem, TrainingError
from lorary.lanes import Lane, room, streams
from lorary.shards import is_sharded

THRESHOLD = 100_000  # numbers in a tensor whose moments are worth a copy

Row = tuple[dict[str, Any], Tensor]  # a group and one of its parameters


class PagingWarning(UserWarning):
    """An optimizer that was to page its states has none to page."""


class PagedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with its moments in the host's memory.

    Args:
        params: parameters, or groups as `lorary.groups` makes them.
        lr: learning rate, per optimizer step.
        betas: of the two running means.
        eps: added to the root of the second one.
        weight_decay: decoupled decay.
        amsgrad: whether the largest second moment counts; it is paged too.
        maximize: whether to climb.
        foreach: as for `torch.optim.AdamW`; None: as it would choose.
        fused: likewise.
        page: whether to page; None: wherever parameters are on a device of their own. True pages on the CPU, too:
            the moments are in buffers apart, which helps nobody but whoever wants to see the paging at work.
        threshold: numbers that a tensor has at least whose moments are paged.

    Parameters in shards (FSDP2) keep their moments beside them: FSDP has an offload of its own.

    Raises:
        ConfigError: the threshold is no number of numbers.

    Example:
        >>> optimizer = PagedAdamW(lorary.groups(model, lr=2e-4))
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        page: bool | None = None,
        threshold: int = THRESHOLD,
    ) -> None:
        if type(threshold) is not int or threshold < 0:
            problem = Problem("threshold", f"{threshold!r} is not a whole number of at least 0")
            raise ConfigError("these are no optimizer settings:", [problem])
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, fused=fused)
        self.page, self.threshold = page, threshold
        self._told = False

    def __getstate__(self) -> dict[str, Any]:
        own = {"page": self.page, "threshold": self.threshold, "_told": self._told}
        return super().__getstate__() | own

    def pages(self, p: Tensor) -> bool:
        """Whether the moments of a parameter are kept in the host's memory."""
        away = p.device.type != "cpu" if self.page is None else self.page
        return away and p.numel() >= self.threshold and not is_sharded(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step. When it returns, all moments are back in the host's memory.

        Args:
            closure: computes the loss again, with gradients.

        Raises:
            TrainingError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rows = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        _check_dense(rows)
        for group, p in rows:
            self._settle(group, p)
        self._tell(rows)
        for group in self.param_groups:
            beside = [p for p in group["params"] if p.grad is not None and not self.pages(p)]
            if beside:
                self._update(group, beside, [self._moments(group, p) for p in beside])
        for device in dict.fromkeys(p.device for _, p in rows):
            self._travel(device, [(group, p) for group, p in rows if p.device == device and self.pages(p)])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A state of this class or of `torch.optim.AdamW`; what is paged never meets the device on the way.

        Raises:
            ValueError: the groups are others.
        """
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        paged = {index: p for index, p in zip(saved, mine, strict=False) if self.pages(p)}  # PyTorch compares them
        rest, kept = {}, {}
        for index, entry in state_dict["state"].items():
            p = paged.get(index)
            large = {k for k, v in entry.items() if p is not None and isinstance(v, Tensor) and v.shape == p.shape}
            kept[index] = {k: entry[k] for k in large}
            rest[index] = {k: v for k, v in entry.items() if k not in large}
        super().load_state_dict(state_dict | {"state": rest})
        for index, p in paged.items():
            for key, value in kept.get(index, {}).items():
                self.state[p][key] = self._new(p).copy_(value.detach())

    # --- where the moments are ----------------------------------------------------------------------------------

    def _settle(self, group: dict[str, Any], p: Tensor) -> None:
        """Makes the moments of a parameter, or brings them where they belong: a rule may have cut them."""
        state = self.state[p]
        if not state:
            kind = torch.promote_types(torch.get_default_dtype(), torch.float32)
            there = group["capturable"] or group["fused"]
            state["step"] = (
                torch.zeros((), dtype=torch.float32, device=p.device) if there else torch.zeros((), dtype=kind)
            )
        for key in _keys(group):
            value = state.get(key)
            if value is None:
                state[key] = self._new(p)
            elif not self._settled(p, value):
                state[key] = self._new(p).copy_(value)

    def _new(self, p: Tensor) -> Tensor:
        if not self.pages(p):
            return torch.zeros_like(p, memory_format=torch.preserve_format)
        pinned = streams(p.device) is not None
        return torch.zeros_like(p, memory_format=torch.preserve_format, device="cpu", pin_memory=pinned)

    def _settled(self, p: Tensor, value: Tensor) -> bool:
        if not self.pages(p):
            return value.device == p.device
        return value.device.type == "cpu" and (streams(p.device) is None or value.is_pinned())

    def _moments(self, group: dict[str, Any], p: Tensor) -> list[Tensor]:
        return [self.state[p][key] for key in _keys(group)]

    def _tell(self, rows: Sequence[Row]) -> None:
        """Says once that nothing is paged, and why."""
        if self._told or not rows:
            return
        self._told = True
        if any(self.pages(p) for _, p in rows):
            return
        if self.page is False:
            why = "page is False"
        elif self.page is None and all(p.device.type == "cpu" for _, p in rows):
            why = "the parameters are on the CPU"
        elif any(is_sharded(p) for _, p in rows):
            why = "the parameters are in shards"
        else:
            why = f"no tensor that trains has {self.threshold:,} numbers"
        text = f"nothing is paged, because {why}: this is torch.optim.AdamW"
        warnings.warn(text, PagingWarning, stacklevel=2)

    # --- the update ---------------------------------------------------------------------------------------------

    def _travel(self, device: torch.device, rows: Sequence[Row]) -> None:
        """Updates the parameters of one device one after the other, their moments fetched and evicted."""
        if not rows:
            return
        homes = [self._moments(group, p) for group, p in rows]
        lane = Lane(device, max(map(room, homes)), min(2, len(rows)))
        try:
            coming = lane.fetch(0, homes[0])
            for i, (group, p) in enumerate(rows):
                here = lane.arrived(coming)
                if i + 1 < len(rows):
                    coming = lane.fetch(i + 1, homes[i + 1])
                self._update(group, [p], [here])
                lane.evict(here, homes[i])
        finally:
            lane.close()

    def _update(self, group: dict[str, Any], params: list[Tensor], moments: list[list[Tensor]]) -> None:
        """AdamW on some parameters of a group; their moments are on their device."""
        columns = [list(column) for column in zip(*moments, strict=True)]
        adamw(
            params,
            [cast(Tensor, p.grad) for p in params],
            columns[0],
            columns[1],
            columns[2] if group["amsgrad"] else [],
            [self.state[p]["step"] for p in params],
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            has_complex=any(torch.is_complex(p) for p in params),
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


def _keys(group: dict[str, Any]) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]


def _check_dense(rows: Sequence[Row]) -> None:
    problems = [
        Problem(f"a parameter of {tuple(p.shape)}", "its gradient is sparse", "use torch.optim.SparseAdam")
        for _, p in rows
        if p.grad is not None and p.grad.is_sparse
    ]
    if problems:
        raise TrainingError("AdamW does not take these gradients:", problems)
