"""Layer kinds: every layer with a weight, seen as an [out, in] matrix.

Linear, transposed linear (GPT-2's Conv1D), convolution (grouped too), embedding, the fused matrices of experts and the
projections of nn.MultiheadAttention each implement `lorary.spec.layer.Kind`; only this file knows how they lay out
their weights.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorary.kernels.grouped import add_grouped_low_rank, grouped_product
from lorary.kernels.low_rank import add_low_rank
from lorary.kernels.torch_internals import padding_of, parameters_of
from lorary.layers.experts import ExpertMatrix, expert_count, groups_now
from lorary.layers.multihead_attention import InProjection
from lorary.layers.quantized_weight import (
    is_quantized,
    is_unrecognised_quantized,
    quantized_spec,
    unrecognised_quantized_layer,
    weight,
)
from lorary.spec.layer import Kind
from lorary.spec.site import Part, Site


@dataclass(frozen=True)
class Linear:
    """nn.Linear, quantised linear layers, and with `transposed` GPT-2's Conv1D, which stores [in, out]."""

    transposed: bool = False
    rowwise = True

    def size(self, layer: Any) -> tuple[int, int]:
        if is_quantized(layer):
            return layer.out_features, layer.in_features
        rows, columns = layer.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix(self, layer: Any) -> Tensor:
        W = weight(layer)
        return W.T if self.transposed else W

    def weight(self, layer: Any, M: Tensor) -> Tensor:
        return M.T.contiguous() if self.transposed else M

    def broadcast_over_rows(self, v: Tensor) -> Tensor:
        return v

    def run(self, layer: Any, x: Tensor, M: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, M, b)

    def add(self, layer: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, dropout: float) -> Tensor:
        return add_low_rank(y, x, A, B, s, dropout)


@dataclass(frozen=True)
class Convolution:
    """nn.Conv1d, nn.Conv2d, nn.Conv3d: A is R filters with the layer's own geometry, B a 1x1 convolution.

    Grouped convolutions: all groups share A, and each group has its own rows of B, so that B A has the shape of the
    layer's kernel and merges exactly.
    """

    dims: int
    rowwise = False

    def size(self, layer: Any) -> tuple[int, int]:
        return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)

    def matrix(self, layer: Any) -> Tensor:
        return cast(Tensor, layer.weight.flatten(1))

    def weight(self, layer: Any, M: Tensor) -> Tensor:
        return M.reshape(layer.weight.shape)

    def broadcast_over_rows(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *[1] * self.dims)

    def run(self, layer: Any, x: Tensor, M: Tensor, b: Tensor | None) -> Tensor:
        return self._convolve(layer, x, M.reshape(M.shape[0], *layer.weight.shape[1:]), b, layer.groups)

    def add(self, layer: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, dropout: float) -> Tensor:
        if not len(A):  # AdaLoRA may prune all directions, and a convolution needs at least one filter
            return y
        unbatched = x.dim() == self.dims + 1
        x = F.dropout(x.unsqueeze(0) if unbatched else x, dropout).to(y.dtype)
        z = self._filter_groups(layer, x, A.to(y.dtype).reshape(-1, *layer.weight.shape[1:]))
        pointwise = B.to(y.dtype).reshape(*B.shape, *[1] * self.dims)
        delta = self._function()(z, pointwise, groups=layer.groups)
        return torch.add(y, delta.squeeze(0) if unbatched else delta, alpha=s)

    def _filter_groups(self, layer: Any, x: Tensor, filters: Tensor) -> Tensor:
        """[batch, groups * R, ...]: the same filters [R, C_in / groups, *kernel_size] applied to each group of x."""
        batch, channels, *size = x.shape
        z = self._convolve(layer, x.reshape(batch * layer.groups, channels // layer.groups, *size), filters, None, 1)
        return z.reshape(batch, layer.groups * z.shape[1], *z.shape[2:])  # -1 is ambiguous for an empty batch

    def _convolve(self, layer: Any, x: Tensor, kernel: Tensor, b: Tensor | None, groups: int) -> Tensor:
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x = F.pad(x, padding_of(layer), mode=layer.padding_mode)
            padding = 0
        return cast(Tensor, self._function()(x, kernel, b, layer.stride, padding, layer.dilation, groups))

    def _function(self) -> Any:
        return (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]


@dataclass(frozen=True)
class Embedding:
    """nn.Embedding [vocabulary, width], seen as the matrix [width, vocabulary] applied to one-hot vectors.

    Dropout does not apply, because A's input is token ids. Scaled embeddings (Gemma, BART: `embed_scale`) scale the
    delta as well.
    """

    rowwise = False

    def size(self, layer: Any) -> tuple[int, int]:
        return layer.embedding_dim, layer.num_embeddings

    def matrix(self, layer: Any) -> Tensor:
        return weight(layer).T

    def weight(self, layer: Any, M: Tensor) -> Tensor:
        return M.T.contiguous()

    def broadcast_over_rows(self, v: Tensor) -> Tensor:
        return v

    def run(self, layer: Any, x: Tensor, M: Tensor, b: Tensor | None) -> Tensor:
        return cast(Tensor, F.embedding(x, M.T) * embed_scale(layer))

    def add(self, layer: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, dropout: float) -> Tensor:
        # as in nn.Embedding, the padding row gets no gradient
        z = F.embedding(x, A.T, layer.padding_idx).to(y.dtype)  # [..., R]
        return torch.add(y, F.linear(z, B.to(y.dtype)) * embed_scale(layer), alpha=s)


@dataclass(frozen=True)
class Experts:
    """One matrix of every expert of a block: M is [E, out, in], A [E, R, in] and B [E, out, R].

    The input's rows are sorted by expert (`lorary.layers.experts`). A [R, in] and B [out, R] are an adapter that all
    experts share: it is the same for every row, and needs no groups.
    """

    rowwise = False

    def size(self, layer: Any) -> tuple[int, int]:
        rows, columns = self.matrix(layer).shape[1:] if isinstance(layer, ExpertMatrix) else layer.shape[1:]
        return rows, columns

    def matrix(self, layer: Any) -> Tensor:
        W = weight(layer)
        return W.mT if getattr(layer, "transposed", False) else W

    def weight(self, layer: Any, M: Tensor) -> Tensor:
        return M.mT.contiguous() if getattr(layer, "transposed", False) else M

    def broadcast_over_rows(self, v: Tensor) -> Tensor:
        return v[groups_now().ids]

    def run(self, layer: Any, x: Tensor, M: Tensor, b: Tensor | None) -> Tensor:
        y = grouped_product(x, M.mT, groups_now())
        return y if b is None else y + self.broadcast_over_rows(b)

    def add(self, layer: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, dropout: float) -> Tensor:
        if A.dim() == 2:
            return add_low_rank(y, x, A, B, s, dropout)
        return add_grouped_low_rank(y, x, A, B, s, groups_now(), dropout)


KINDS: dict[str, Kind] = {
    "linear": Linear(),
    "transposed": Linear(transposed=True),
    "conv1d": Convolution(1),
    "conv2d": Convolution(2),
    "conv3d": Convolution(3),
    "embedding": Embedding(),
    "experts": Experts(),
    "in_projection": Linear(),
    "out_projection": Linear(),
}

# Linear layers that override forward and still compute W x + b.
_PLAIN_FORWARD = {"FalconLinear"}

_CLASSES: dict[str, type[nn.Module]] = {
    "out_projection": nn.modules.linear.NonDynamicallyQuantizableLinear,  # of nn.MultiheadAttention
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "embedding": nn.Embedding,
    "experts": ExpertMatrix,
    "in_projection": InProjection,
}


def kind_of(layer: nn.Module) -> str | None:
    """The kind of a layer; None for a module without an adaptable weight matrix."""
    spec = quantized_spec(layer)
    if spec is not None and spec.kind != "weight":
        return spec.kind
    if _is_conv1d(type(layer)):
        return "transposed"
    return next((kind for kind, cls in _CLASSES.items() if isinstance(layer, cls)), None)


def _is_conv1d(cls: type) -> bool:
    # without importing transformers: if it is not loaded, there is no Conv1D
    gpt2 = sys.modules.get("transformers.pytorch_utils")
    return gpt2 is not None and issubclass(cls, gpt2.Conv1D)


def was_transposed(layer: nn.Module) -> bool:
    """Whether a quantised linear layer replaces GPT-2's Conv1D; lorary and Transformers store this as `source_cls`."""
    return _is_conv1d(getattr(layer, "source_cls", nn.Linear))


def why_not_adaptable(layer: nn.Module) -> str | None:
    """The reason why a layer cannot be adapted, or None."""
    kind = kind_of(layer)
    if is_unrecognised_quantized(layer):
        return unrecognised_quantized_layer(layer)
    if kind is None:
        return f"a {type(layer).__name__} has no weight matrix that lorary knows"
    if is_quantized(layer):
        return None
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "its max_norm rewrites the weight in every forward pass"
    weight = parameters_of(layer).get("weight")
    if weight is None:
        return "its weight is computed from other parameters (weight_norm, spectral_norm or another parametrization)"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight has no shape before the model has seen its first input"
    cls = _CLASSES.get(kind)
    if cls is None or type(layer).forward is cls.forward or type(layer).__name__ in _PLAIN_FORWARD:
        return None
    if isinstance(layer, nn.Embedding) and hasattr(layer, "embed_scale"):
        return None
    return f"{type(layer).__name__} overrides forward, so it may not compute W x + b"


def site(name: str, layer: nn.Module, parts: tuple[Part, ...] = ()) -> Site:
    """The site of a layer of a known kind."""
    kind = kind_of(layer)
    if kind is None:
        raise TypeError(f"{name}: {why_not_adaptable(layer)}")
    out, inp = KINDS[kind].size(layer)
    conv: Any = layer if kind.startswith("conv") else None
    return Site(
        name=name,
        kind=kind,
        out_features=out,
        in_features=inp,
        bias=getattr(layer, "bias", None) is not None,
        parts=parts,
        groups=conv.groups if conv else 1,
        kernel_size=tuple(conv.kernel_size) if conv else (),
        experts=expert_count(layer),
        swapped=getattr(layer, "swapped", False),
    )


def as_matrix(layer: nn.Module, W: Tensor) -> Tensor:
    """A weight in the layout of this layer's own, as [out, in]."""
    held = SimpleNamespace(weight=W, transposed=getattr(layer, "transposed", False))
    return KINDS[cast(str, kind_of(layer))].matrix(held)


def embed_scale(layer: nn.Module) -> Any:
    """The factor of a scaled embedding's rows, a number or a tensor; 1 for other layers."""
    if isinstance(layer, nn.Embedding) and type(layer).forward is not nn.Embedding.forward:
        scale = getattr(layer, "embed_scale", 1.0)
        return scale.to(layer.weight.dtype) if isinstance(scale, Tensor) else scale
    return 1.0
