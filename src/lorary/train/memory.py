"""What a training run will need in memory, item by item, before it starts: on any machine, without the weights.

Parameters, gradients and the optimizer's state follow from the plan. What the activations take is counted in one
step on the meta device (`simulation`), for whatever model; where a model's code cannot run there, and wherever an
answer has to come at once, it is computed in closed form (`lorary.footprint`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.errors import LoraryError, PlanError, Problem
from lorary.footprint.architecture import architecture
from lorary.footprint.fixed import fixed
from lorary.footprint.memory import Memory
from lorary.footprint.step import Activations, activations
from lorary.footprint.workload import Workload
from lorary.plans import Plan, human_bytes
from lorary.train.simulation import simulate

__all__ = ["Memory", "by_formula", "estimate"]


def estimate(
    model: nn.Module,
    plan: Plan,
    *,
    batch: int = 1,
    length: int = 512,
    inputs: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw_torch",
    optimizer_bytes_per_parameter: float | None = None,
    labelled: float = 1.0,
    padding: bool = False,
) -> Memory:
    """Predicts the memory of a training run. The model is not touched and may be on the meta device.

    Args:
        model: the model that was planned.
        plan: what `lorary.plan` made of it.
        batch: sequences in a micro-batch on one device.
        length: tokens in a sequence, padding included.
        inputs: what the model is called with, where it is no language model; only shapes and dtypes matter.
        dtype: of the frozen weights; None: as they are.
        gradient_checkpointing: whether every block is computed again in the backward pass.
        optimizer: as Transformers names it; AdamW keeps two moments in the parameter's own dtype.
        optimizer_bytes_per_parameter: bytes of state for each number that trains, in place of the optimizer's own.
        labelled: share of the tokens that have a label and reach the LM head.
        padding: whether shorter sequences are padded: attention then takes a mask, and keeps more.

    Raises:
        PlanError: `batch` or `length` is not positive, or a model that is no language model came without `inputs`.
        StateError: the model has an adapter attached.

    Example:
        >>> print(estimate(model, plan, batch=4, length=1024, dtype=torch.bfloat16))
    """
    given = _inputs(model, batch, length) if inputs is None else dict(inputs)
    if padding and "input_ids" in given:
        given["attention_mask"] = torch.empty_like(given["input_ids"], device="meta")
    memory = fixed(model, plan, dtype, optimizer, optimizer_bytes_per_parameter)
    notes = [_described(given, dtype or _dtype(model), gradient_checkpointing)]
    found: Activations | None
    try:
        found = simulate(
            model, plan, given, dtype=dtype, gradient_checkpointing=gradient_checkpointing, labelled=labelled
        )
        padded = "some tokens are" if "attention_mask" in given else "no token is"
        notes.append(f"attention counts as a fused kernel, {padded} padding; the device's own overhead comes on top")
    except LoraryError:
        raise
    except Exception as error:  # whatever foreign model code raises without values
        work = _workload(given, dtype or _dtype(model), gradient_checkpointing, labelled)
        found, why = by_formula(model, plan, work), _why(error)
        what = "the activations are unknown" if found is None else "the activations follow a formula for Llama's block"
        notes.append(f"{type(model).__name__} cannot run without values ({why}): {what}")
    if plan.full:
        size = human_bytes(sum(f.size * dtype.itemsize if dtype else f.bytes for f in plan.full))
        notes.append(f"the starting values of what changes in full are kept on the CPU for `detach`: {size} more")
    items = (None,) * 3 if found is None else (found.kept, found.loss, found.working)
    words = dict(zip(("activations", "logits", "working"), items, strict=True))
    return dataclasses.replace(memory, notes=tuple(notes), **cast(Any, words))


def by_formula(model: nn.Module, plan: Plan, work: Workload | None) -> Activations | None:
    """The same in closed form; None for a model that does not say that its blocks are Llama's or GPT-2's."""
    sizes = architecture(getattr(model, "config", None), guess=True)
    return None if sizes is None or work is None else activations(sizes, plan, work)


def _workload(given: Mapping[str, Tensor], dtype: torch.dtype, again: bool, labelled: float) -> Workload | None:
    if "input_ids" not in given:
        return None
    batch, length = given["input_ids"].shape
    padding = "attention_mask" in given
    return Workload(batch, length, dtype, padding=padding, labelled=labelled, checkpointing=again)


def _inputs(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    problems = [
        Problem(name, f"{value} is not a positive number")
        for name, value in (("batch", batch), ("length", length))
        if value < 1
    ]
    if not problems and not hasattr(getattr(model, "config", None), "vocab_size"):
        what = f"a {type(model).__name__} is no language model with tokens for input"
        problems.append(Problem("inputs", what, "give the tensors that it is called with"))
    if problems:
        raise PlanError("the memory of this training cannot be predicted:", problems)
    return {"input_ids": torch.empty(batch, length, dtype=torch.long, device="meta")}


def _dtype(model: nn.Module) -> torch.dtype:
    return next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.float32)


def _described(inputs: Mapping[str, Tensor], dtype: torch.dtype, checkpointing: bool) -> str:
    shape = " x ".join(str(n) for n in next(iter(inputs.values())).shape)
    what = f"{shape} tokens" if "input_ids" in inputs else f"{next(iter(inputs))} of {shape}"
    extra = ", every block computed again in the backward pass" if checkpointing else ""
    return f"{what}, weights in {str(dtype).removeprefix('torch.')}{extra}; gradients stay between micro-batches"


def _why(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 80 else text[:77] + "..."
