"""What a training run will need in memory, item by item, before it starts: on any machine, without the weights.

Parameters, gradients and the optimizer's state follow from the plan. What the activations take is counted in one
step on the meta device (`simulation`), and computed from a formula where a model's code cannot run there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import LoraryError, PlanError, Problem
from lorary.placed import Placed, distinct
from lorary.plans import Plan, human_bytes
from lorary.train.loss import LOGITS, TOKENS
from lorary.train.simulation import Activations, simulate


@dataclass(frozen=True)
class Memory:
    """What the fullest moment of a training step holds, in bytes.

    Args:
        weights: the base model's parameters and buffers.
        adapters: the adapters' tensors, as float32 masters.
        gradients: of everything that trains, in its own dtype.
        optimizer: the optimizer's state.
        rules: what the method's rules keep from step to step.
        activations: kept by the forward pass for the backward pass; None where it could not be found out.
        logits: what LM head and loss hold on top for a moment; None likewise.
        working: what the backward pass holds on top for a moment, one block at a time; None likewise.
        notes: what the figures assume.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int | None
    logits: int | None
    working: int | None
    notes: tuple[str, ...] = ()
    rules: int = 0

    @property
    def fixed(self) -> int:
        """What is there from the second step on, whatever the batch: all but activations, logits and working."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.rules

    @property
    def total(self) -> int:
        """The fullest moment. The loss and the backward pass come one after the other: the larger one counts."""
        return self.fixed + (self.activations or 0) + max(self.logits or 0, self.working or 0)

    def __str__(self) -> str:
        names = ("weights", "adapters", "gradients", "optimizer", "rules", "activations", "logits", "working")
        texts = {
            name: "unknown" if value is None else human_bytes(value)
            for name in names
            if (value := getattr(self, name)) != 0
        }
        unknown = self.activations is None
        texts["total"] = f"more than {human_bytes(self.total)}" if unknown else human_bytes(self.total)
        if self.logits and self.working:
            smaller = "logits" if self.logits < self.working else "working"
            texts[smaller] += "  (at another moment than the fullest)"
        lines = [f"{name:<12}{text}" for name, text in texts.items()]
        return "\n".join(lines + [f"{'note':<12}{note}" for note in self.notes])


def estimate(
    model: nn.Module,
    plan: Plan,
    *,
    batch: int = 1,
    length: int = 512,
    inputs: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
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
        optimizer_bytes_per_parameter: bytes of state for each number that trains; None: AdamW's two moments in
            the parameter's own dtype (8 bytes for an adapter).
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
    adapter_numbers = sum(p.trainable for p in distinct(plan.placed))
    sizes = {id(t): (t.numel(), t.element_size(), t.is_floating_point()) for t in _tensors(model)}
    width = None if dtype is None else dtype.itemsize
    weights = sum(n * (width if width and floating else size) for n, size, floating in sizes.values())
    full = sum(f.size * width if width else f.bytes for f in plan.full)
    gradients = 4 * adapter_numbers + sum(f.size * width if width else f.bytes for f in plan.full if f.trains)
    rules = sum(rule.holds(p.shapes) for p in plan.placed for rule in plan.method.rules)
    if optimizer_bytes_per_parameter is None:
        optimizer = 2 * gradients
    else:
        optimizer = math.ceil(optimizer_bytes_per_parameter * plan.trainable)
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
        found, why = (
            by_formula(model, plan, given, dtype or _dtype(model), gradient_checkpointing, labelled),
            _why(error),
        )
        what = "the activations are unknown" if found is None else "the activations follow a formula for Llama's block"
        notes.append(f"{type(model).__name__} cannot run without values ({why}): {what}")
    if full:
        text = f"the starting values of what changes in full are kept on the CPU for `detach`: {human_bytes(full)} more"
        notes.append(text)
    activations, logits, working = (None,) * 3 if found is None else (found.kept, found.loss, found.working)
    return Memory(weights, plan.adapter_bytes, gradients, optimizer, activations, logits, working, tuple(notes), rules)


def by_formula(
    model: nn.Module,
    plan: Plan,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    gradient_checkpointing: bool = False,
    labelled: float = 1.0,
) -> Activations | None:
    """The same in closed form for blocks as Llama has them; None for a model that does not say that it has any.

    Per token and block: the inputs of two norms in float32, the rotated q and k, v, attention's output and its
    log-sum-exp, three vectors of the gated MLP; then the inputs of adapted layers whose A trains (q, k, v share
    one, gate and up another, o reads what attention keeps anyway) and, where B trains, their z.
    """
    config: Any = getattr(model, "config", None)
    try:
        H, M, layers, heads = (
            int(getattr(config, key))
            for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        )
        V, T = int(config.vocab_size), inputs["input_ids"].numel()
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    head_width = getattr(config, "head_dim", None) or H // heads
    Q = heads * head_width
    K = (getattr(config, "num_key_value_heads", None) or heads) * head_width
    e = dtype.itemsize
    block = T * (8 * H + 4 * heads + e * (2 * Q + 2 * K + 3 * M))
    adapted = T * e * sum(_kept_by_sites(plan.placed, H, M).values())
    rows = math.ceil(T * labelled)
    loss = e * rows * H + min(rows, max(TOKENS, LOGITS // V)) * V * 16
    ends = T * H * (e + 4)
    if gradient_checkpointing:
        return Activations(T * H * e * layers + ends, loss, block + adapted // max(1, layers) + 2 * T * e * M)
    return Activations(block * layers + adapted + ends, loss, 3 * T * e * M)


_SHARED = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp"}


def _kept_by_sites(placed: tuple[Placed, ...], hidden: int, mlp: int) -> dict[str, int]:
    """Numbers per token kept for the adapters' sake: each input once, and every site's z."""
    kept: dict[str, int] = {}
    for p in placed:
        block, _, name = p.site.name.rpartition(".")
        if "B" in p.method.trained:
            kept[f"{p.site.name} z"] = p.r
        if "A" in p.method.trained and name != "o_proj":
            kept[f"{block} {_SHARED.get(name, name)}"] = p.site.inp
    return kept


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


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


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
