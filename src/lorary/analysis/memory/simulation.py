"""One training step without data, counted on the meta device.

A copy of the model that has shapes but no values makes a forward and a backward pass, and every tensor is counted
from its creation to its release. The count is exact for any model and method, as far as the meta device does what
another would do. Where it would not, it is helped:

- attention counts as the fused kernel that every device has; the meta device's own keeps all scores;
- values that a model reads from a tensor are all the same: nothing is padded or packed, or, with an attention mask,
  something is;
- autocast does not know the meta device, so products are cast here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import _scoped_library
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lorary.analysis.memory.live_bytes import LiveBytes
from lorary.analysis.memory.shorten import text_config
from lorary.analysis.memory.workload import Workload
from lorary.kernels.chunked_lm_head import chunk, scores_in_chunks
from lorary.layers.quantized_weight import is_quantized
from lorary.model.attach import attach
from lorary.model.plan import Plan

CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of models that change the logits after the head: those take part in the loss in full."""
REPORTED = ("entropy", "is_top1")
"""Statistics that the trainer computes beside the loss."""

Precision = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Activations:
    """What a training step holds beside parameters, their gradients and the optimizer's state, in bytes.

    Args:
        kept: alive when the forward pass has reached the last hidden states: kept for the backward pass.
        loss: what head and loss hold on top of that at their fullest moment.
        working: what the backward pass through the model holds on top of that at its fullest moment.
    """

    kept: int
    loss: int
    working: int


def simulate(model: nn.Module, plan: Plan, inputs: Mapping[str, Tensor], work: Workload) -> Activations:
    """Counts one training step.

    Args:
        model: on the meta device; it is adapted in place.
        plan: what is attached to it.
        inputs: what the model is called with; only shapes and dtypes matter.
        work: how it is computed.

    Raises:
        Exception: whatever the model's code raises where it must know a value that the meta device does not have.
    """
    twin: Any = attach(model, plan).train()
    precision = _Autocast if work.autocast else nullcontext
    if work.checkpointing:  # under the name that this version of Transformers has for it
        enable = getattr(twin, "activation_checkpointing_enable", None) or twin.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), precision())})
    for parameter in twin.parameters():
        if parameter.requires_grad:  # there before the count begins: gradients have a line of their own
            parameter.grad = torch.empty_like(parameter)
    given = {name: torch.empty_like(tensor, device="meta") for name, tensor in inputs.items()}
    with ExitStack() as stack:
        library = stack.enter_context(_scoped_library("aten", "IMPL"))
        library.impl("scaled_dot_product_attention", _fused_attention, "AutogradMeta")
        if work.autocast:  # packed layers compute in the dtype that comes in
            for module in filter(is_quantized, twin.modules()):
                module.register_forward_pre_hook(lambda _, args: tree_map(_half, args))
        stack.enter_context(_Answers(int("attention_mask" not in given)))
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

    def arrived(gradient: Tensor) -> None:
        peaks.append(live.peak)
        live.restart_peak()

    if states.requires_grad:
        states.register_hook(arrived)
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
    rows = rows[: max(1, round(labelled * len(rows)))].clone()  # the labelled ones are gathered
    targets = torch.zeros(len(rows), dtype=torch.long, device="meta")
    if head is None:
        return F.cross_entropy(rows.float(), targets)

    def logits(rows: Tensor) -> Tensor:
        with precision():  # also where a chunk is computed again
            scored: Tensor = head(rows)
        return scored

    size = chunk(text_config(model).vocab_size)
    with precision():
        return -scores_in_chunks(logits, rows, targets, REPORTED, size)["log_probs"].sum()


class _Answers(TorchDispatchMode):
    """Answers with one number wherever a value is read from a tensor that has none."""

    def __init__(self, answer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answer = answer

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in LiveBytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.full((), self.answer, dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


class _Autocast(TorchFunctionMode):
    """Products in bfloat16, whatever comes in.

    But not where nothing is recorded for the backward pass: there lorary's kernels have chosen their precision. The
    entropy that is reported with the loss is a product of the trainer's.
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
    """PyTorch's fused attention of the CPU, which keeps q, k, v, the output and a log-sum-exp, as they all do."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # PyTorch makes it additive in every layer
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
    output: Tensor = kernel(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output
