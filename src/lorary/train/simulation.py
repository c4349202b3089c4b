"""One training step without data or memory: what it would keep alive, counted on the meta device.

A copy of the model that has shapes but no values makes a forward and a backward pass; every tensor is counted when
it comes and when it goes. So the count is exact for whatever model it is, adapted however, as far as the meta
device does what another would do. Where it would not, it is helped: attention counts as the fused kernel that every
device has (the meta device has only one that keeps all scores), and whatever a model asks of a tensor's values has
the same answer: that nothing is padded or packed, or, where there is an attention mask, that something is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import _scoped_library
from torch.utils._python_dispatch import TorchDispatchMode

from lorary.accounting import LiveBytes
from lorary.footprint.step import Activations
from lorary.plans import Plan
from lorary.surgery import attach
from lorary.train.loss import LabelledHead

CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of models that change the logits after the head: those take part in the loss in full."""


def simulate(
    model: nn.Module,
    plan: Plan,
    inputs: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    labelled: float = 1.0,
) -> Activations:
    """Counts one training step of the planned model; the model itself is not touched.

    Args:
        model: the model that was planned, on any device.
        plan: what will be attached to it.
        inputs: what the model is called with; only shapes and dtypes matter. An `attention_mask` among them says
            that there is padding, which costs memory of its own.
        dtype: of the frozen weights; None: as they are.
        gradient_checkpointing: whether every block is computed again in the backward pass.
        labelled: share of the tokens that have a label.

    Raises:
        Exception: whatever the model's code raises where it must know a value that the meta device does not have.
    """
    twin: Any = on_meta(model, dtype)
    attach(twin, plan).train()
    if gradient_checkpointing:
        _checkpoint(twin)
    for parameter in twin.parameters():
        if parameter.requires_grad:  # there before the count begins: gradients have a line of their own
            parameter.grad = torch.empty_like(parameter)
    given = {name: torch.empty_like(tensor, device="meta") for name, tensor in inputs.items()}
    with ExitStack() as stack:
        library = stack.enter_context(_scoped_library("aten", "IMPL"))
        library.impl("scaled_dot_product_attention", _fused_attention, "AutogradMeta")
        stack.enter_context(_Answers(int("attention_mask" not in given)))
        live = stack.enter_context(LiveBytes())
        return _step(twin, given, live, labelled)


def on_meta(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the model without values: on the meta device, its floating-point tensors in another dtype."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, dtype=kind, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    twin: Any = copy.deepcopy(model, memo)
    config: Any = getattr(twin, "config", None)
    if getattr(config, "_attn_implementation", "eager") not in ("eager", "sdpa"):
        twin.set_attn_implementation("sdpa")  # another fused kernel, of the same needs
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return twin  # type: ignore[no-any-return]


def _checkpoint(model: Any) -> None:
    """Computes every block again in the backward pass, under the name that this version of Transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _step(model: Any, inputs: Mapping[str, Tensor], live: LiveBytes, labelled: float) -> Activations:
    before = live.now
    head = getattr(model, "get_output_embeddings", lambda: None)()
    config = getattr(model, "config", None)
    plain = head is not None and all(getattr(config, key, None) in (None, 1.0) for key in CHANGED_LOGITS)
    states = (model.base_model if plain else model)(**inputs)[0]
    kept = live.now - before
    peaks = []

    def arrived(gradient: Tensor) -> None:
        peaks.append(live.peak)
        live.restart_peak()

    if states.requires_grad:
        states.register_hook(arrived)
    live.restart_peak()
    loss = _loss(model, head if plain else None, states, labelled)
    del states
    if loss.requires_grad:
        torch.autograd.backward(loss)
    peaks.append(live.peak)
    at_loss = max(0, peaks[0] - before - kept)
    return Activations(kept, at_loss, max(0, peaks[-1] - before - kept) if len(peaks) > 1 else 0)


def _loss(model: Any, head: nn.Module | None, states: Tensor, labelled: float) -> Tensor:
    """The trainer's loss of hidden states [batch, tokens, hidden], or of a whole model's outputs [..., classes]."""
    rows = states[:, :-1].flatten(0, 1) if states.dim() == 3 else states.flatten(0, -2)
    rows = rows[: max(1, round(labelled * len(rows)))].clone()  # the labelled ones are gathered
    targets = torch.zeros(len(rows), dtype=torch.long, device="meta")
    if head is None:
        return F.cross_entropy(rows.float(), targets)
    return -LabelledHead(model)._through_head(head, rows, targets)["log_probs"].sum()


class _Answers(TorchDispatchMode):
    """Answers with one number wherever a value is read from a tensor that has none."""

    def __init__(self, answer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answer = answer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.full((), self.answer, dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


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
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(q.dtype)
    output: Tensor = kernel(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output
