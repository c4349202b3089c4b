"""A linear layer in GPTQ's own layout, written from the format's description: 4 bits, 8 numbers in an int32.

    qweight   int32 [inp / 8, out]            eight numbers down a column, the first in the lowest bits
    qzeros    int32 [groups, out / 8]         the zero points of eight columns
    scales    fp16  [groups, out]
    g_idx     int32 [inp]                     which group a row belongs to: act-order scatters them

W[i, o] = scales[g_idx[i], o] * (q[i, o] - z[g_idx[i], o])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class QuantLinear(nn.Module):
    """As such layers are: no parameter at all, and no `weight`; even the bias is a buffer."""

    def __init__(self, layer: nn.Linear, group: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        W = layer.weight.detach().T.float()  # [inp, out]
        groups = self.in_features // group
        order = torch.randperm(self.in_features, generator=torch.Generator().manual_seed(seed))
        rows = torch.empty(self.in_features, dtype=torch.int32)
        rows[order] = torch.arange(groups, dtype=torch.int32).repeat_interleave(group)
        members = [(rows == i).nonzero().flatten() for i in range(groups)]
        low = torch.stack([W[m].amin(0).clamp(max=0) for m in members])  # [groups, out]
        high = torch.stack([W[m].amax(0).clamp(min=0) for m in members])
        scales = ((high - low) / 15).clamp(min=1e-6).half()
        zeros = (-low / scales.float()).round().clamp(0, 15).int()
        codes = (W / scales[rows.long()].float() + zeros[rows.long()]).round().clamp(0, 15).int()
        self.register_buffer("qweight", _packed(codes.T).T.contiguous())
        self.register_buffer("qzeros", _packed(zeros))
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", rows)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def dequantize_weight(self) -> Tensor:
        """[inp, out]"""
        own: Any = self
        groups = own.g_idx.long()
        zeros = _unpack_words(own.qzeros)
        codes = _unpack_words(own.qweight.T).T
        W: Tensor = own.scales[groups] * (codes - zeros[groups])
        return W

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.dequantize_weight().to(x.dtype)
        bias: Any = self.bias
        return y if bias is None else y + bias.to(x.dtype)


def _packed(numbers: Tensor) -> Tensor:
    """int32 [rows, n / 8] of numbers below 16 [rows, n]."""
    eights = numbers.long().unflatten(-1, (-1, 8))
    words = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _unpack_words(words: Tensor) -> Tensor:
    return (words[..., None] >> (4 * torch.arange(8)) & 15).flatten(-2)


def quantise(model: Any) -> Any:
    """The model with every linear layer but the head in this layout, in place."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, QuantLinear(layer))
    return model
