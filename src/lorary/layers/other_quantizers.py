"""Dequantisation of the quantised layers of other libraries, none of which is imported here.

    bitsandbytes    Linear4bit (NF4, FP4), Linear8bitLt, Embedding4bit, Embedding8bit
    torchao         any of its tensors, as the weight of nn.Linear or nn.Embedding
    GPT-QModel      GPTQ and AWQ, as Transformers loads them

Users register other classes with `lorary.layers.quantized_weight.register_quantized`.
"""

from __future__ import annotations

import copy
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.kernels.torch_internals import storage_id
from lorary.layers.quantized_weight import quantized_spec, register_quantized, stored_tensors, weight_by_forward

_BITSANDBYTES = "bitsandbytes.nn.modules"
_GPTQ = "gptqmodel.nn_modules.qlinear"


@register_quantized("linear", f"{_BITSANDBYTES}.Linear4bit")
@register_quantized("embedding", f"{_BITSANDBYTES}.Embedding4bit")
def _four_bit(layer: Any) -> Tensor:
    """The dequantised 4-bit weight, in its original dtype."""
    state = getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None:  # not quantised yet: that happens on the first move to a device
        return cast(Tensor, layer.weight.data)
    codes, state = _original_layout(layer.weight.data, state)
    W = cast(Any, sys.modules["bitsandbytes.functional"]).dequantize_4bit(codes.reshape(-1, 1), state)
    return cast(Tensor, W if getattr(layer, "dtype", None) is None else W.to(layer.dtype))


def _original_layout(codes: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Codes and scales in the layout of quantisation, undoing the one that evaluation on a CPU switches to."""
    if not getattr(state, "packing_format_for_cpu", False):
        return codes, state
    state, functional = copy.copy(state), cast(Any, sys.modules["bitsandbytes.functional"])
    # bitsandbytes' own inverse would requantise the scales, or leave them transposed
    state.original_nested, state.state2, state.offset = False, None, None
    state.absmax = state.absmax.T.reshape(-1).float()
    return cast("tuple[Tensor, Any]", functional._convert_weight_packed_for_cpu_inverse(codes, state))


def keep_layout(model: nn.Module) -> None:
    """Make bitsandbytes' 4-bit layers keep their original layout, and restore it where evaluation has changed it.

    On a CPU with AVX512-BF16, evaluation repacks the codes for good: gradients no longer pass, not even in training,
    and the layer is saved wrongly (bitsandbytes 0.50.2). The scales stay rounded to bfloat16 after restoring.
    """
    layer: Any
    for layer in model.modules():
        if getattr(quantized_spec(layer), "dense", None) is _four_bit:
            layer.support_avx512bf16_for_cpu = False
            state = getattr(layer.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                layer.weight.data, state = _original_layout(layer.weight.data, state)
                layer.weight.quant_state = layer.quant_state = state


@register_quantized("linear", f"{_BITSANDBYTES}.Linear8bitLt")
@register_quantized("embedding", f"{_BITSANDBYTES}.Embedding8bit")
def _eight_bit(layer: Any) -> Tensor:
    """Each row's codes times its largest value / 127, in 32 bits: the layer does not store its original dtype."""
    state = getattr(layer, "state", None)
    scales = layer.weight.SCB if getattr(layer.weight, "SCB", None) is not None else getattr(state, "SCB", None)
    if scales is None:  # has_fp16_weights: the weight is dense and rounded in forward
        return cast(Tensor, layer.weight.data)
    W = cast(Any, sys.modules["bitsandbytes.functional"]).int8_vectorwise_dequant(layer.weight.data, scales)
    return cast(Tensor, W if getattr(layer, "dtype", None) is None else W.to(layer.dtype))


@register_quantized("weight", "torchao.utils.TorchAOBaseTensor", "torchao.quantization.TorchAOBaseTensor")
def _tensor(layer: Any) -> Tensor:
    """The tensor's own dequantisation."""
    return cast(Tensor, layer.weight.dequantize())


@register_quantized("linear", f"{_GPTQ}.PackableQuantLinear")
def _gptq(layer: Any) -> Tensor:
    """scales * (codes - zeros) [in, out] per group, transposed, by GPT-QModel's own method."""
    if getattr(layer, "linear_mode", None) == "inference":  # evaluation has repacked the codes
        return weight_by_forward(layer)
    return cast(Tensor, layer.dequantize_weight().T)


# number i of eight is stored in the 4-bit field _AWQ_ORDER[i] of a 32-bit word
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@register_quantized("linear", f"{_GPTQ}.torch_awq.AwqTorchLinear", f"{_GPTQ}.gemm_awq.AwqGEMMLinear")
@register_quantized("linear", f"{_GPTQ}.gemm_awq_triton.AwqGEMMTritonLinear")
def _awq(layer: Any) -> Tensor:
    """scales * (codes - zeros) of AWQ's GEMM layout: qweight int32 [in, out / 8], qzeros and scales a row a group."""
    if layer.bits != 4:
        return weight_by_forward(layer)
    shifts = 4 * torch.tensor(_AWQ_ORDER, device=layer.qweight.device)

    def codes(words: Tensor) -> Tensor:
        return (words[..., None] >> shifts & 15).flatten(-2)  # [rows, out]

    group = layer.in_features // layer.scales.shape[0]
    zeros, scales = (t.repeat_interleave(group, 0) for t in (codes(layer.qzeros), layer.scales))
    return ((codes(layer.qweight) - zeros) * scales).T


# kernels with layouts of their own: recover the weight from their forward pass
register_quantized("linear", f"{_GPTQ}.GPTQQuantLinear", f"{_GPTQ}.AWQuantLinear")(weight_by_forward)


def stored_bytes(layer: Any) -> int:
    """Bytes that store a layer's weight: codes, scales and tables, for any library's quantised layer."""
    todo: list[Any] = [*stored_tensors(layer), getattr(layer, "state", None)]
    seen: list[Any] = []
    memory: dict[int, int] = {}
    while todo:
        one = todo.pop()
        if any(one is other for other in seen):
            continue
        seen.append(one)
        if isinstance(one, Tensor) and hasattr(one, "__tensor_flatten__"):
            todo += [getattr(one, name) for name in cast(Any, one).__tensor_flatten__()[0]]
        elif isinstance(one, Tensor):
            memory[storage_id(one)] = one.numel() * one.element_size()
            todo += [vars(one)[name] for name in ("quant_state", "CB", "SCB") if name in vars(one)]
        elif type(one).__module__.startswith("bitsandbytes."):
            todo += vars(one).values()
    return sum(memory.values())
