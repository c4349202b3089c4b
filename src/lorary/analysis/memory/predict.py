"""The predicted memory of a training run, item by item, on any machine and without the weights.

Parameters, gradients and optimizer state follow from the plan. Activations are counted in a simulated step of one block
of every kind and one more, and extrapolated: saved activations grow with the number of blocks; the temporary memory of
head, loss and the largest block does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from lorary.analysis.memory.fixed import fixed
from lorary.analysis.memory.memory import Memory
from lorary.analysis.memory.shorten import Blocks, blocks, without_values
from lorary.analysis.memory.simulation import Activations, simulate
from lorary.analysis.memory.workload import Workload
from lorary.errors import Diagnostic, LoraryError, PlanError
from lorary.layers.transformers_internals import attention_of
from lorary.model.plan import Plan, human_bytes

MOST_KINDS = 6
"""The most kinds of blocks for extrapolation; with more, all blocks are simulated."""


def predict(
    model: nn.Module,
    plan: Plan,
    work: Workload,
    optimizer: str = "adamw_torch",
    *,
    inputs: Mapping[str, Tensor] | None = None,
    whole: bool = False,
) -> Memory:
    """The predicted memory of a training run. The model is unchanged and may be on the meta device.

    Args:
        model: the planned model, or its shapes.
        plan: from `lorary.plan`.
        work: the micro-batch.
        optimizer: as Transformers names it; AdamW keeps two moments in the parameter's own dtype.
        inputs: of a model that is not a language model; only shapes and dtypes matter.
        whole: simulate all blocks instead of extrapolating.

    Returns:
        The items; activations, logits and working are None if the model's code cannot run without values.

    Raises:
        PlanError: `inputs` are missing for a model that is not a language model.
        StateError: the model has an adapter attached.

    Example:
        >>> print(predict(model, plan, Workload(4, 1024, torch.bfloat16)))
    """
    given = _tokens(model, work) if inputs is None else dict(inputs)
    memory = fixed(model, plan, work.dtype, optimizer)
    notes = [_described(given, work, work.dtype or _dtype(model))]
    if attention_of(getattr(model, "config", None)) == "eager":
        notes.append("eager attention keeps all scores, which grow with the square of the length: sdpa does not")
    try:
        found = activations(model, plan, given, work, whole)
        memory = dataclasses.replace(memory, activations=found.kept, logits=found.loss, working=found.working)
    except LoraryError:
        raise
    except Exception as error:  # any error of third-party model code without values
        notes.append(f"{type(model).__name__} cannot run without values ({_why(error)}): the activations are unknown")
    if plan.full:
        start = sum(f.size * work.dtype.itemsize if work.dtype else f.bytes for f in plan.full)
        notes.append(f"the initial values of fully trained parameters are kept on the CPU: {human_bytes(start)} more")
    return dataclasses.replace(memory, notes=tuple(notes))


def activations(
    model: nn.Module, plan: Plan, inputs: Mapping[str, Tensor], work: Workload, whole: bool = False
) -> Activations:
    """The activations of a step, simulated with a few blocks and extrapolated to all."""
    found = None if whole else blocks(model, plan)
    if found is not None and len(found.counts) <= MOST_KINDS and len(found.counts) + 1 < len(found.kinds):
        with suppress(Exception):  # a model whose code needs all of its blocks
            return _extrapolated(model, plan, inputs, work, found)
    return simulate(*without_values(model, plan, work.dtype), inputs, work)


def _extrapolated(
    model: nn.Module, plan: Plan, inputs: Mapping[str, Tensor], work: Workload, found: Blocks
) -> Activations:
    steps = {
        kind: simulate(*without_values(model, plan, work.dtype, (found.path, sample)), inputs, work)
        for kind, sample in found.samples().items()
    }
    least = steps.pop(None)
    kept = least.kept + sum((found.counts[kind] - 1) * (step.kept - least.kept) for kind, step in steps.items())
    several = [least, *steps.values()]
    return Activations(kept, max(step.loss for step in several), max(step.working for step in several))


def _tokens(model: nn.Module, work: Workload) -> dict[str, Tensor]:
    if not hasattr(getattr(model, "config", None), "vocab_size"):
        what = f"a {type(model).__name__} is not a language model with token inputs"
        problems = [Diagnostic("inputs", what, "give the input tensors of the model")]
        raise PlanError("cannot predict the memory of this training:", problems)
    ids = torch.empty(work.batch, work.length, dtype=torch.long, device="meta")
    return {"input_ids": ids} | ({"attention_mask": torch.empty_like(ids)} if work.padding else {})


def _dtype(model: nn.Module) -> torch.dtype:
    return next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.float32)


def _described(inputs: Mapping[str, Tensor], work: Workload, dtype: torch.dtype) -> str:
    sizes = [f"{n:,}" for n in next(iter(inputs.values())).shape]
    padded = "some padding" if work.padding else "no padding"
    what = f"{' x '.join(sizes)} tokens ({padded})" if "input_ids" in inputs else " x ".join([*inputs][:1] + sizes)
    cast = ", computed in bfloat16" if work.autocast else ""
    recomputed = ", every block recomputed in the backward pass" if work.checkpointing else ""
    kind = str(dtype).removeprefix("torch.")
    return f"{what}, weights in {kind}{cast}{recomputed}; gradients stay between micro-batches"


def _why(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 80 else text[:77] + "..."
