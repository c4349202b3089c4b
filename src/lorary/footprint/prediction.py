"""The whole prediction: a model's shapes, a plan and a micro-batch give `Memory`, without a step being run."""

from __future__ import annotations

import dataclasses

from torch import nn

from lorary.footprint.architecture import architecture
from lorary.footprint.fixed import fixed
from lorary.footprint.memory import Memory
from lorary.footprint.step import activations
from lorary.footprint.workload import Workload
from lorary.plans import Plan, human_bytes


def predict(model: nn.Module, plan: Plan, work: Workload, optimizer: str = "adamw_torch") -> Memory:
    """What training will hold, in closed form. The model is not touched and may be on the meta device.

    Args:
        model: the model that was planned, or its shapes: `skeleton.skeleton` makes them from a configuration.
        plan: what `lorary.plan` made of it.
        work: the micro-batch.
        optimizer: as Transformers names it.

    Returns:
        activations, logits and working are None for a model that no formula knows: `lorary.train.memory.estimate`
        then runs a step without data.

    Example:
        >>> print(predict(model, plan, Workload(4, 1024, torch.bfloat16)))
    """
    memory = fixed(model, plan, work.dtype, optimizer)
    sizes = architecture(getattr(model, "config", None))
    found = None if sizes is None else activations(sizes, plan, work)
    notes = [described(work)]
    if sizes is not None and sizes.attention == "eager":
        notes.append("eager attention keeps all scores, which grow with the square of the length: sdpa does not")
    if found is None:
        what = type(model).__name__ if sizes is None else "a layer outside of the model's blocks"
        notes.append(f"no formula for {what}: the activations are unknown")
    if plan.full:
        start = sum(f.bytes for f in plan.full)
        notes.append(f"the starting values of what changes in full are kept on the CPU: {human_bytes(start)} more")
    items = (None,) * 3 if found is None else (found.kept, found.loss, found.working)
    activations_, logits, working = items
    return dataclasses.replace(memory, activations=activations_, logits=logits, working=working, notes=tuple(notes))


def described(work: Workload) -> str:
    """What is assumed, in a sentence."""
    kind = str(work.dtype).removeprefix("torch.")
    cast = ", computed in bfloat16" if work.autocast else ""
    again = ", every block computed again in the backward pass" if work.checkpointing else ""
    padded = "some padding" if work.padding else "no padding"
    sizes = f"{work.batch} x {work.length:,} tokens ({padded})"
    return f"{sizes}, weights in {kind}{cast}{again}; gradients stay between micro-batches"
