"""NF4: a frozen weight in 4 bits a number, as QLoRA keeps its base.

Blocks of 64 numbers share a largest value, which is itself kept in 8 bits (double quantisation): 4.127 bits a number.
What a layer computes with is Dq(Wq), made tile by tile in forward and again in backward; the gradient goes through it.

Dettmers et al. 2023, arXiv:2305.14314, equations 1 to 6; layout and values are bitsandbytes'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.kernels.low_rank import autocasting
from lorary.kernels.nf4 import QuantizedTensor, dequantize, dequantize_rows, linear
from lorary.kernels.nf4 import quantize as pack_matrix
from lorary.layers.bitsandbytes_state import BLOCK_SIZES, KEYS, read_state, written_state
from lorary.layers.kinds import KINDS, kind_of, why_not_adaptable
from lorary.layers.quantized_weight import in_place_of, is_quantized, register_quantized
from lorary.spec.fields import FLAG, one_of, optional
from lorary.spec.interfaces import Storage, component

BLOCKS: dict[str, Any] = {
    "check": lambda value: type(value) is int and value in BLOCK_SIZES,
    "expects": "a power of two from 32 to 4096",
}
COMPUTES = one_of("float32", "bfloat16", "float16")


@component
class NF4(Storage):
    """Linear layers are kept in 4 bits a number; the output head, norms and convolutions stay as they are.

    Args:
        block: how many numbers share one largest value.
        double: keep these largest values in 8 bits, too.
        compute: the precision of the products; None for that of each layer's input.
        embeddings: pack token embeddings, too, unless another layer has the same weight.
    """

    block: int = field(default=64, metadata=BLOCKS)
    double: bool = field(default=True, metadata=FLAG)
    compute: str | None = field(default=None, metadata=optional(COMPUTES))
    embeddings: bool = field(default=False, metadata=FLAG)

    writable = False

    def quantizes(self, layer: nn.Module) -> bool:
        kind = kind_of(layer)
        if kind is None or is_quantized(layer) or why_not_adaptable(layer) is not None:
            return False
        return kind in ("linear", "transposed") or (self.embeddings and type(layer) is nn.Embedding)

    def quantize(self, layer: nn.Module, W: Tensor | None = None) -> nn.Module:
        kind = KINDS[cast(str, kind_of(layer))]
        own = cast(Tensor, layer.weight)
        made: NF4Linear | NF4Embedding
        if isinstance(layer, nn.Embedding):
            rows = own if W is None else kind.weight(layer, W)
            made = NF4Embedding(pack_matrix(rows.detach(), self.block, self.double), own.dtype, layer.padding_idx)
        else:
            matrix = kind.matrix(layer) if W is None else W
            bias = cast("nn.Parameter | None", getattr(layer, "bias", None))
            packed = pack_matrix(matrix.detach().contiguous(), self.block, self.double)
            made = NF4Linear(packed, own.dtype, bias, self.compute, type(layer))
        return in_place_of(layer, made)

    def bytes(self, numbers: int, width: int = 0) -> int:
        blocks = -(-numbers // self.block)
        return -(-numbers // 2) + (blocks + 4 * -(-blocks // 256) + 4 if self.double else 4 * blocks)


class _Packed(nn.Module):
    """A frozen weight in NF4: its tensors, and how they move, are saved and are read. Not a layer by itself.

    A state dict has them under bitsandbytes' names, so that its checkpoints are ours and ours are its.

    Attributes:
        weight: uint8 [ceil(n / 2), 1], two codes a byte.
        absmax: the largest value of every block: fp32, or uint8 codes with double quantisation.
        nested_absmax, nested_offset: fp32 [ceil(blocks / 256)] and [], or None without double quantisation.
        shape: of the weight that is packed.
        block: numbers in a block.
        dtype: of the weight that was packed, and of the dense one that is made of it.
    """

    def __init__(self, packed: QuantizedTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.block, self.dtype = tuple(packed.shape), packed.block, dtype
        self.weight = nn.Parameter(packed.codes, requires_grad=False)
        for name in _SCALES:
            self.register_buffer(name, getattr(packed, name), persistent=False)

    @property
    def packed(self) -> QuantizedTensor:
        """The weight as the kernels take it."""
        absmax, nested_absmax, nested_offset = (getattr(self, name) for name in _SCALES)
        return QuantizedTensor(self.weight, absmax, nested_absmax, nested_offset, self.shape, self.block)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves everything; a change of precision is for the dense weight alone: codes and scales are what they are."""
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
        for key, value in written_state(self.packed, self.dtype).items():
            destination[f"{prefix}weight.{key}"] = value

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        start = f"{prefix}weight."
        found = {key.removeprefix(start): state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
        if strict:
            unexpected_keys += [f"{start}{key}" for key in found if key.partition(".")[0] not in KEYS]
        codes = state_dict.get(f"{prefix}weight")
        if codes is not None:
            packed, dtype, problems = read_state(codes, found)
            if packed is not None and (tuple(packed.shape), packed.block) != (self.shape, self.block):
                what = f"holds {tuple(packed.shape)} in blocks of {packed.block}"
                problems.append(f"{what}, expected {self.shape} in blocks of {self.block}")
            error_msgs += [f"{prefix}weight: {problem}" for problem in problems]
            if packed is not None and not problems:
                self.dtype = dtype
                place = codes.device if local_metadata.get("assign_to_params_buffers") else self.weight.device
                for name in _SCALES:
                    value = getattr(packed, name)
                    setattr(self, name, None if value is None else value.to(place, copy=True))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


_SCALES = ("absmax", "nested_absmax", "nested_offset")


class NF4Linear(_Packed):
    """y = x Dq(Wq)^T + b: a frozen linear layer in NF4. GPT-2's Conv1D becomes one as well, of the same matrix.

    Args:
        packed: the weight [out, inp].
        dtype: of the weight that was packed.
        bias: [out], the layer's own, or None.
        compute: the precision of the product; None for that of the input.
        source_cls: the class of the layer that was packed, by Transformers' name for it.
    """

    def __init__(
        self,
        packed: QuantizedTensor,
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
        compute: str | None = None,
        source_cls: type[nn.Module] = nn.Linear,
    ) -> None:
        super().__init__(packed, dtype)
        self.out_features, self.in_features = packed.shape
        self.compute, self.source_cls = compute, source_cls
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self._times(x, self.bias)
        return y if y.dtype == x.dtype or autocasting(x.device) else y.to(x.dtype)

    def weight_times(self, A: Tensor) -> Tensor:
        """A Dq(Wq)^T [R, out] of rows A [R, inp] in A's own precision, differentiable in A; keeps no dense weight."""
        return linear(A, self.packed)

    def _times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.compute is not None and x.is_floating_point() and not autocasting(x.device):
            x = x.to(getattr(torch, self.compute))
        return linear(x, self.packed, bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, NF4"


class NF4Embedding(_Packed):
    """Rows of Dq(Wq) by token id: a frozen embedding [vocabulary, width] in NF4.

    Args:
        packed: the table.
        dtype: of the table that was packed, and of the rows that are looked up.
        padding_idx: as for nn.Embedding.
    """

    def __init__(self, packed: QuantizedTensor, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__(packed, dtype)
        self.num_embeddings, self.embedding_dim = packed.shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        return dequantize_rows(self.packed, ids.flatten(), self.dtype).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, NF4"


@register_quantized("linear", NF4Linear)
@register_quantized("embedding", NF4Embedding)
def _dense(layer: _Packed) -> Tensor:
    return dequantize(layer.packed, layer.dtype)
