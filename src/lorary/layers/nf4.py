"""NF4, QLoRA's 4-bit storage of the frozen weight, and the layers that compute with it.

Blocks of 64 numbers share their largest magnitude, itself stored in 8 bits (double quantisation): 4.127 bits a number.
Layers compute with Dq(Wq), dequantised tile by tile in the forward pass and again in the backward pass.

Dettmers et al. 2023, arXiv:2305.14314, equations 1 to 6; layout and values are bitsandbytes'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.kernels.low_rank import autocasting
from lorary.kernels.nf4 import QuantizedTensor, dequantize, dequantize_rows, linear
from lorary.kernels.nf4 import quantize as quantize_tensor
from lorary.kernels.nf4.experts import dequantize_experts, grouped_linear, quantize_experts
from lorary.layers.bitsandbytes_state import BLOCK_SIZES, KEYS, read_state, write_state
from lorary.layers.experts import ExpertLayer, ExpertMatrix, groups_now
from lorary.layers.kinds import KINDS, kind_of, why_not_adaptable
from lorary.layers.quantized_weight import is_quantized, register_quantized, take_place_of
from lorary.spec.fields import FLAG, added_later, one_of, optional
from lorary.spec.interfaces import Storage, component

BLOCKS: dict[str, Any] = {
    "check": lambda value: type(value) is int and value in BLOCK_SIZES,
    "expects": "a power of two from 32 to 4096",
}
COMPUTES = one_of("float32", "bfloat16", "float16")


@component
class NF4(Storage):
    """Linear layers and fused experts in 4 bits per number; the head, norms and convolutions stay unquantised.

    Args:
        block: numbers that share one largest magnitude.
        double: quantise these magnitudes to 8 bits as well.
        compute: dtype of the matrix products; None for each input's dtype.
        embeddings: also quantise token embeddings that are not tied to another layer.
        experts: also quantise fused experts, each matrix by itself.
    """

    block: int = field(default=64, metadata=BLOCKS)
    double: bool = field(default=True, metadata=FLAG)
    compute: str | None = field(default=None, metadata=optional(COMPUTES))
    embeddings: bool = field(default=False, metadata=FLAG)
    experts: bool = field(default=True, metadata=added_later(FLAG, before=False))

    writable = False

    def quantizes(self, layer: nn.Module) -> bool:
        kind = kind_of(layer)
        if kind is None or is_quantized(layer) or why_not_adaptable(layer) is not None:
            return False
        if kind == "experts":
            return self.experts
        return kind in ("linear", "transposed") or (self.embeddings and type(layer) is nn.Embedding)

    def quantize(self, layer: nn.Module, W: Tensor | None = None) -> nn.Module:
        kind, dtype = KINDS[cast(str, kind_of(layer))], cast(Tensor, layer.weight).dtype
        matrix = kind.matrix(layer) if W is None else W  # [out, in]
        if isinstance(layer, nn.Embedding):
            rows = quantize_tensor(matrix.T.detach(), self.block, self.double)  # [vocabulary, width]
            return take_place_of(layer, NF4Embedding(rows, dtype, layer.padding_idx))
        if isinstance(layer, ExpertMatrix):
            experts = quantize_experts(matrix.detach(), self.block, self.double)  # [E, out, in]
            return take_place_of(layer, NF4Experts(experts, dtype, layer, self.compute))
        weight = quantize_tensor(matrix.detach().contiguous(), self.block, self.double)
        bias = cast("nn.Parameter | None", getattr(layer, "bias", None))
        return take_place_of(layer, NF4Linear(weight, dtype, bias, self.compute, type(layer)))

    def bytes(self, numbers: int, width: int = 0) -> int:
        blocks = -(-numbers // self.block)
        return -(-numbers // 2) + (blocks + 4 * -(-blocks // 256) + 4 if self.double else 4 * blocks)


class _NF4Layer(nn.Module):
    """Base class of layers with a frozen NF4 weight: storage, moving, state dicts.

    State dicts use bitsandbytes' names, so that checkpoints are interchangeable.

    Attributes:
        weight: uint8 [ceil(n / 2), 1], two codes per byte.
        absmax: the largest magnitude of each block: fp32, or uint8 codes with double quantisation.
        nested_absmax, nested_offset: fp32 [ceil(blocks / 256)] and [], or None without double quantisation.
        shape: of the weight.
        block: numbers in a block.
        dtype: of the original and of the dequantised weight.
    """

    _keys: tuple[str, ...] = KEYS

    def __init__(self, quantized: QuantizedTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.block, self.dtype = tuple(quantized.shape), quantized.block, dtype
        self.weight = nn.Parameter(quantized.codes, requires_grad=False)
        for name in _SCALES:
            self.register_buffer(name, getattr(quantized, name), persistent=False)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight in the form that the kernels take."""
        absmax, nested_absmax, nested_offset = (getattr(self, name) for name in _SCALES)
        return QuantizedTensor(self.weight, absmax, nested_absmax, nested_offset, self.shape, self.block)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move all tensors; a change of dtype applies to the dense weight only, not to codes and scales."""
        before = {name: getattr(self, name) for name in _SCALES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            moved = getattr(self, name)
            if value is not None and moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in self._written().items():
            destination[f"{prefix}weight.{key}"] = value

    def _written(self) -> dict[str, Tensor]:
        """The state beside the codes: its key below `weight.` -> tensor."""
        return write_state(self.quantized, self.dtype)

    def _read(
        self, codes: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[QuantizedTensor | None, torch.dtype, list[str]]:
        """(the weight or None, its original dtype, all errors) of the inverse."""
        return read_state(codes, state)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        local_metadata, strict, _, unexpected_keys, error_msgs = args
        start = f"{prefix}weight."
        state = {key.removeprefix(start): state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
        if strict:
            unexpected_keys += [f"{start}{key}" for key in state if key.partition(".")[0] not in self._keys]
        codes = state_dict.get(f"{prefix}weight")
        if codes is not None:
            quantized, dtype, problems = self._read(codes, state)
            if quantized is not None and (tuple(quantized.shape), quantized.block) != (self.shape, self.block):
                what = f"holds {tuple(quantized.shape)} in blocks of {quantized.block}"
                problems.append(f"{what}, expected {self.shape} in blocks of {self.block}")
            error_msgs += [f"{prefix}weight: {problem}" for problem in problems]
            if quantized is not None and not problems:
                self.dtype = dtype
                device = codes.device if local_metadata.get("assign_to_params_buffers") else self.weight.device
                for name in _SCALES:
                    value = getattr(quantized, name)
                    setattr(self, name, None if value is None else value.to(device, copy=True))
        super()._load_from_state_dict(state_dict, prefix, *args)


_SCALES = ("absmax", "nested_absmax", "nested_offset")


def in_compute_dtype(x: Tensor, compute: str | None, product: Callable[[Tensor], Tensor]) -> Tensor:
    """A product of x computed in this dtype, None for x's own, in x's dtype again; autocast decides by itself."""
    dtype = x.dtype
    if compute is not None and x.is_floating_point() and not autocasting(x.device):
        x = x.to(getattr(torch, compute))
    y = product(x)
    return y if y.dtype == dtype or autocasting(x.device) else y.to(dtype)


class NF4Linear(_NF4Layer):
    """A frozen linear layer in NF4, y = x Dq(Wq)^T + b. It also replaces GPT-2's Conv1D, with the weight as [out, in].

    Args:
        quantized: the weight [out, in].
        dtype: of the original weight.
        bias: [out], the layer's own, or None.
        compute: dtype of the matrix product; None for the input's.
        source_cls: the class of the original layer; Transformers uses the same attribute.
    """

    def __init__(
        self,
        quantized: QuantizedTensor,
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
        compute: str | None = None,
        source_cls: type[nn.Module] = nn.Linear,
    ) -> None:
        super().__init__(quantized, dtype)
        self.out_features, self.in_features = quantized.shape
        self.compute, self.source_cls = compute, source_cls
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return in_compute_dtype(x, self.compute, lambda x: linear(x, self.quantized, self.bias))

    def weight_times(self, A: Tensor) -> Tensor:
        """A Dq(Wq)^T [R, out] of A [R, in] in A's precision, differentiable in A; keeps no dense weight."""
        return linear(A, self.quantized)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, NF4"


class NF4Embedding(_NF4Layer):
    """A frozen embedding [vocabulary, width] in NF4.

    Args:
        quantized: the table.
        dtype: of the original table and of the rows that are looked up.
        padding_idx: as for nn.Embedding.
    """

    def __init__(self, quantized: QuantizedTensor, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__(quantized, dtype)
        self.num_embeddings, self.embedding_dim = quantized.shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        return dequantize_rows(self.quantized, ids.flatten(), self.dtype).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, NF4"


class NF4Experts(_NF4Layer, ExpertLayer):
    """One matrix of every expert in NF4, each quantised by itself: all of its tensors have a leading E.

    bitsandbytes has no format for it: a state dict holds the scales under their own names.

    Args:
        quantized: the weights [E, out, in], whatever the layout of the plain parameter.
        dtype: of the original weight.
        plain: the plain layer.
        compute: as for `NF4Linear`.
    """

    _keys = _SCALES

    def __init__(
        self, quantized: QuantizedTensor, dtype: torch.dtype, plain: ExpertMatrix, compute: str | None = None
    ) -> None:
        super().__init__(quantized, dtype)
        self.layout, self.compute = plain.layout, compute
        self.count, self.order = plain.count, plain.order
        self.interleaved, self.swapped = plain.interleaved, plain.swapped

    def forward(self, x: Tensor) -> Tensor:
        return in_compute_dtype(x, self.compute, lambda x: grouped_linear(x, self.quantized, groups_now()))

    def _written(self) -> dict[str, Tensor]:
        return {name: value for name in _SCALES if (value := getattr(self, name)) is not None}

    def _read(
        self, codes: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[QuantizedTensor | None, torch.dtype, list[str]]:
        expected = {"codes": self.weight.detach()} | self._written()
        found = {"codes": codes} | {key: state[key] for key in _SCALES if key in state}
        problems = [
            f"{key} {_described(found.get(key))}, expected {_described(expected.get(key))}"
            for key in expected | found
            if _described(found.get(key)) != _described(expected.get(key))
        ]
        absmax, nested, offset = (cast(Any, found.get(key)) for key in _SCALES)
        weight = QuantizedTensor(codes, absmax, nested, offset, self.shape, self.block)
        return None if problems else weight, self.dtype, problems

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.shape)) + ", NF4"


def _described(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


@register_quantized("linear", NF4Linear)
@register_quantized("embedding", NF4Embedding)
def _dense(layer: _NF4Layer) -> Tensor:
    return dequantize(layer.quantized, layer.dtype)


@register_quantized("experts", NF4Experts)
def _dense_experts(layer: NF4Experts) -> Tensor:
    return dequantize_experts(layer.quantized, layer.dtype)
