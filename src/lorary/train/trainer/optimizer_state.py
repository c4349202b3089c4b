"""The optimizer's state by parameter name: the same on one process, under DDP and under FSDP2.

PyTorch numbers the parameters, so a state has meaning only next to the same parameter list. Names make a checkpoint
verifiable; sharded tensors are gathered, so that it can be resumed on another number of ranks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lorary.errors import Diagnostic, TrainingError
from lorary.kernels.torch_internals import set_next_rates
from lorary.layers.dtensor import distribute_like, full_cpu_copy, is_sharded

_log = logging.getLogger("lorary.train")


def capture(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """The state and settings of every group. Under FSDP every rank must call it: it gathers.

    Returns:
        `{"state": {parameter: {key: value}}, "groups": [{setting: value, …, "params": [parameter, …]}]}`
    """
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [
        {k: v for k, v in group.items() if k != "params"} | {"params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    state = {
        names[id(p)]: {k: full_cpu_copy(v) if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()}
        for group in optimizer.param_groups
        for p in group["params"]
        if p in optimizer.state
    }
    return {"state": state, "groups": groups}


def restore(optimizer: torch.optim.Optimizer, model: nn.Module, saved: dict[str, Any]) -> None:
    """Load a captured state, each tensor sharded and placed like its parameter.

    Args:
        optimizer: over the parameters of `model`.
        model: with its adapter attached.
        saved: from `capture`, also of lorary 0.5.

    Raises:
        TrainingError: the checkpoint's groups hold other parameters than the optimizer's.
    """
    parameters = dict(model.named_parameters())
    saved = _with_current_names(saved, parameters)
    names = {id(p): name for name, p in parameters.items()}
    mine = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    theirs = [group["params"] for group in saved["groups"]]
    if mine != theirs:
        raise TrainingError("the checkpoint holds another optimizer's state:", _differences(mine, theirs))
    numbers = {name: i for i, name in enumerate(name for group in mine for name in group)}
    state = {
        numbers[name]: {k: _shard_like(parameters[name], v) for k, v in entry.items()}
        for name, entry in saved["state"].items()
    }
    groups = [group | {"params": [numbers[name] for name in group["params"]]} for group in saved["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def follow_schedule(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Set the learning rates that the schedule has for the next step.

    They are the restored ones, bit for bit, unless the run has become longer: its schedule may then be elsewhere.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    restored = [group["lr"] for group in optimizer.param_groups]
    rates = [base * f(scheduler.last_epoch) for base, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    if rates == restored:
        return
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    set_next_rates(scheduler, [float(rate) for rate in rates])
    text = "the run is longer now: its learning rate goes on at %.3g, on the schedule of the longer run, after %.3g"
    _log.info(text, rates[0], restored[0])


def _with_current_names(saved: dict[str, Any], parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state with today's parameter names: lorary 0.5 called `….params.A` `….p.A`."""

    def current(name: str) -> str:
        return name if name in parameters else re.sub(r"\.p\.(?=\w+$)", ".params.", name)

    groups = [group | {"params": [current(name) for name in group["params"]]} for group in saved["groups"]]
    return {"state": {current(name): entry for name, entry in saved["state"].items()}, "groups": groups}


def _shard_like(parameter: Tensor, value: Any) -> Any:
    """The value sharded like its parameter; `load_state_dict` places unsharded ones itself, possibly on the host."""
    sharded = is_sharded(parameter) and isinstance(value, Tensor) and value.shape == parameter.shape
    return distribute_like(parameter, value) if sharded else value


def _differences(mine: list[list[str]], theirs: list[list[str]]) -> list[Diagnostic]:
    if len(mine) != len(theirs):
        return [Diagnostic("groups", f"{len(theirs)} in the checkpoint, {len(mine)} here")]
    problems = []
    for index, (here, there) in enumerate(zip(mine, theirs, strict=True)):
        for name in sorted(set(here) ^ set(there)):
            where = "here" if name in here else "in the checkpoint"
            problems.append(Diagnostic(f"group {index}", f"{name} is only {where}"))
        if set(here) == set(there) and here != there:
            problems.append(Diagnostic(f"group {index}", "the same parameters in another order"))
    return problems
