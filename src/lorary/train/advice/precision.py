"""The precision of an advised run: bfloat16 on a GPU that computes in it, float32 on one that only emulates it."""

from __future__ import annotations

import torch
from torch import nn

from lorary.train.advice.draft import Draft
from lorary.train.advice.facts import Facts, Subject
from lorary.train.advice.machine import Machine

GUIDE = "docs/how-to/large-models.md"
CUDA = "torch.cuda.is_bf16_supported(including_emulation=False)"
OLDER = "this GPU is older than Ampere and emulates bfloat16"


def precision_rules(draft: Draft, subject: Subject, machine: Machine) -> None:
    """Recommend the precision, and give the model on the meta device that of its weights on this machine.

    float16 is not advised for weights saved in bfloat16: their activations may exceed its largest number, 65,504.
    """
    facts, emulated = subject.facts, machine.gpu and not machine.bf16
    if emulated and facts.dtype == "bfloat16":
        why = f"the weights are saved in bfloat16, {OLDER}, and float16 may overflow"
        draft.recommend("model.dtype", "float32", why, CUDA)
    dtype = draft.value("model.dtype")
    if dtype == "auto":  # as this machine reads it, which need not be the one that trains
        dtype = facts.dtype if machine.gpu else facts.computes
    _convert(subject.model, facts.computes, dtype)
    _autocast(draft, facts, machine, dtype)


def _convert(model: nn.Module, before: str, after: str) -> None:
    """Let the weights of one precision have another. Those stored otherwise, in 8 bits perhaps, keep theirs."""
    for p in model.parameters():
        if p.dtype == getattr(torch, before):
            p.data = p.data.to(getattr(torch, after))


def _autocast(draft: Draft, facts: Facts, machine: Machine, dtype: str) -> None:
    """Computation in bfloat16 over float32 weights."""
    reason, source = f"the weights are saved in {facts.dtype}", GUIDE
    half = machine.gpu and machine.bf16 and dtype == "float32" == facts.dtype
    if half:
        reason += ", and a GPU (NVIDIA: from Ampere on) computes in bfloat16 several times as fast"
    elif machine.gpu and not machine.bf16:
        reason, source = f"{OLDER}, which takes longer than float32", CUDA
    elif dtype != facts.dtype and not machine.gpu:
        reason += f"; this processor computes them in {dtype}"
    elif dtype == facts.dtype:
        reason += "; autocast is advised on a GPU alone" if dtype == "float32" else ", and compute in it anyway"
    draft.recommend("training.bf16", half, reason, source)
