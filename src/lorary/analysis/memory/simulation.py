"""The activations of a training step, counted on the meta device without data.

A copy of the model without values runs a forward and a backward pass, and every tensor is counted from creation to
release. The count is exact for any model and method if the meta device behaves like a real one. Where it does not:

- attention counts as the fused kernel of real devices; the meta device's own saves all scores;
- all values that a model reads from tensors are equal: nothing is padded or packed or, with an attention mask, some is;
- autocast does not support the meta device, so matrix products are cast here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorary.analysis.memory.live_bytes import LiveBytes
from lorary.analysis.memory.workload import Workload
from lorary.kernels.chunked_lm_head import chunk_size, scores_in_chunks
from lorary.kernels.torch_internals import FUSED_ATTENTION, replaced_operations, tree_map
from lorary.layers.quantized_weight import is_quantized
from lorary.layers.rope import text_config
from lorary.model.attach import attach
from lorary.model.plan import Plan
from lorary.model.reach.twin import ScalarAnswers

CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Model settings that change the logits after the head: the loss then needs all logits."""
REPORTED = ("entropy", "is_top1")
"""Statistics that the trainer computes with the loss."""

Precision = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Activations:
    """The memory of a training step besides parameters, gradients and optimizer state, in bytes.

    Args:
        kept: alive at the last hidden states: saved for the backward pass.
        loss: the peak of head and loss on top of that.
        working: the peak of the backward pass through the model on top of that.
    """

    kept: int
    loss: int
    working: int


def simulate(model: nn.Module, plan: Plan, inputs: Mapping[str, Tensor], work: Workload) -> Activations:
    """The memory of one training step.

    Args:
        model: on the meta device; adapted in place.
        plan: of the adapters.
        inputs: of the model; only shapes and dtypes matter.
        work: options of the computation.

    Raises:
        Exception: any error of the model's code for lack of values.
    """
    twin: Any = attach(model, plan).train()
    precision = _Autocast if work.autocast else nullcontext
    if work.checkpointing:  # renamed between versions of Transformers
        enable = getattr(twin, "activation_checkpointing_enable", None) or twin.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), precision())})
    for parameter in twin.parameters():
        if parameter.requires_grad:  # allocated before the count: gradients are another item
            parameter.grad = torch.empty_like(parameter)
    given = {name: torch.empty_like(tensor, device="meta") for name, tensor in inputs.items()}
    with ExitStack() as stack:
        library = stack.enter_context(replaced_operations("aten"))
        library.impl("scaled_dot_product_attention", _fused_attention, "AutogradMeta")
        if work.autocast:  # quantised layers compute in their input's dtype
            for module in filter(is_quantized, twin.modules()):
                module.register_forward_pre_hook(lambda _, args: tree_map(_half, args))
        stack.enter_context(ScalarAnswers(int("attention_mask" not in given)))
        live = stack.enter_context(LiveBytes())
        return _step(twin, given, live, work.labelled, precision)


def _step(
    model: Any, inputs: Mapping[str, Tensor], live: LiveBytes, labelled: float, precision: Precision
) -> Activations:
    before = live.now
    head = getattr(model, "get_output_embeddings", lambda: None)()
    config = getattr(model, "config", None)
    plain = head is not None and model.base_model is not model
    plain = plain and all(getattr(config, key, None) in (None, 1.0) for key in CHANGED_LOGITS)
    with precision():
        states = (model.base_model if plain else model)(**inputs)[0]
    kept = live.now - before
    peaks = []

    def end_of_loss(gradient: Tensor) -> None:
        peaks.append(live.peak)
        live.restart_peak()

    if states.requires_grad:
        states.register_hook(end_of_loss)
    live.restart_peak()
    loss = _loss(model, head if plain else None, states, labelled, precision)
    del states
    if loss.requires_grad:
        torch.autograd.backward(loss)
    peaks.append(live.peak)
    at_loss = max(0, peaks[0] - before - kept)
    return Activations(kept, at_loss, max(0, peaks[-1] - before - kept) if len(peaks) > 1 else 0)


def _loss(model: nn.Module, head: Any, states: Tensor, labelled: float, precision: Precision) -> Tensor:
    """The trainer's loss of hidden states [batch, tokens, hidden], or of a whole model's outputs [..., classes]."""
    rows = states[:, :-1].flatten(0, 1) if states.dim() == 3 else states.flatten(0, -2)
    rows = rows[: max(1, round(labelled * len(rows)))].clone()  # the labelled rows are gathered
    targets = torch.zeros(len(rows), dtype=torch.long, device="meta")
    if head is None:
        return F.cross_entropy(rows.float(), targets)

    def logits(rows: Tensor) -> Tensor:
        with precision():  # also in the recomputation of a chunk
            scored: Tensor = head(rows)
        return scored

    size = chunk_size(text_config(model).vocab_size)
    with precision():
        return -scores_in_chunks(logits, rows, targets, REPORTED, size)["log_probs"].sum()


class _Autocast(TorchFunctionMode):
    """Matrix products in bfloat16.

    Not without gradient recording: there lorary's kernels choose their precision. `vecdot` is the trainer's entropy.
    """

    PRODUCTS = frozenset(
        {
            *(F.linear, F.scaled_dot_product_attention, F.conv1d, F.conv2d, F.conv3d),
            *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm),
            *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm),
        }
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorded = func in self.PRODUCTS and torch.is_grad_enabled()
        if recorded or func is torch.linalg.vecdot:
            args, kwargs = tree_map(_half, (args, kwargs))
        return func(*args, **kwargs)


def _half(value: Any) -> Any:
    wide = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.to(torch.bfloat16) if wide else value


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's fused CPU attention, which like all fused kernels saves q, k, v, the output and a log-sum-exp."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # converted by PyTorch in every layer
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
    output: Tensor = FUSED_ATTENTION(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    # this kernel has one width for q, k and v; others have narrower values too, as in DeepSeek's latent attention
    return output if v.shape[-1] == q.shape[-1] else output[..., : v.shape[-1]]
