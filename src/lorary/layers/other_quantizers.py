"""Layers that other libraries have packed: how the dense weight of each is had. None of them is imported here.

    bitsandbytes    Linear4bit (NF4, FP4), Linear8bitLt, Embedding4bit, Embedding8bit
    torchao         any of its tensors, as the weight of nn.Linear or nn.Embedding
    GPT-QModel      GPTQ and AWQ, as Transformers loads them

Each class is named by the module that it is defined in. A class that is not named here is named by its user, with
`lorary.layers.quantized_weight.register_quantized`.
"""

from __future__ import annotations

import copy
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.layers.quantized_weight import quantized_spec, register_quantized, stored_tensors, weight_by_forward

_BITSANDBYTES = "bitsandbytes.nn.modules"
_GPTQ = "gptqmodel.nn_modules.qlinear"


@register_quantized("linear", f"{_BITSANDBYTES}.Linear4bit")
@register_quantized("embedding", f"{_BITSANDBYTES}.Embedding4bit")
def _four_bit(layer: Any) -> Tensor:
    """Dq(Wq) in the precision that the weight came in."""
    state = getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None:  # it is packed by being moved to a device with values, and has not been
        return cast(Tensor, layer.weight.data)
    codes, state = _as_packed(layer.weight.data, state)
    W = cast(Any, sys.modules["bitsandbytes.functional"]).dequantize_4bit(codes.reshape(-1, 1), state)
    return cast(Tensor, W if getattr(layer, "dtype", None) is None else W.to(layer.dtype))


def _as_packed(codes: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Codes and scales laid out as they were packed, whatever evaluating on a CPU has made of them."""
    if not getattr(state, "packing_format_for_cpu", False):
        return codes, state
    state, functional = copy.copy(state), cast(Any, sys.modules["bitsandbytes.functional"])
    # bitsandbytes' way back would quantise the scales anew, or leave them in the other order
    state.original_nested, state.state2, state.offset = False, None, None
    state.absmax = state.absmax.T.reshape(-1).float()
    return cast("tuple[Tensor, Any]", functional._convert_weight_packed_for_cpu_inverse(codes, state))


def keep_layout(model: nn.Module) -> None:
    """Let bitsandbytes' 4-bit layers keep their codes as they were packed, and undo it where they have not.

    On a CPU with AVX512-BF16 evaluating lays them out anew, for good: no gradient goes through such a layer any more,
    not in training either, and it is saved wrongly (bitsandbytes 0.50.2). Undone it computes with the same scales,
    which have been rounded to bfloat16.
    """
    layer: Any
    for layer in model.modules():
        if getattr(quantized_spec(layer), "dense", None) is _four_bit:
            layer.support_avx512bf16_for_cpu = False
            state = getattr(layer.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                layer.weight.data, state = _as_packed(layer.weight.data, state)
                layer.weight.quant_state = layer.quant_state = state


@register_quantized("linear", f"{_BITSANDBYTES}.Linear8bitLt")
@register_quantized("embedding", f"{_BITSANDBYTES}.Embedding8bit")
def _eight_bit(layer: Any) -> Tensor:
    """Each row's codes times its largest value / 127, in 32 bits: what the precision was is not kept."""
    state = getattr(layer, "state", None)
    scales = layer.weight.SCB if getattr(layer.weight, "SCB", None) is not None else getattr(state, "SCB", None)
    if scales is None:  # has_fp16_weights: the weight is dense, and is rounded as it is used
        return cast(Tensor, layer.weight.data)
    W = cast(Any, sys.modules["bitsandbytes.functional"]).int8_vectorwise_dequant(layer.weight.data, scales)
    return cast(Tensor, W if getattr(layer, "dtype", None) is None else W.to(layer.dtype))


@register_quantized("weight", "torchao.utils.TorchAOBaseTensor", "torchao.quantization.TorchAOBaseTensor")
def _tensor(layer: Any) -> Tensor:
    """What the tensor itself says that it stands for."""
    return cast(Tensor, layer.weight.dequantize())


@register_quantized("linear", f"{_GPTQ}.PackableQuantLinear")
def _gptq(layer: Any) -> Tensor:
    """scales * (codes - zeros) [inp, out] of each group, transposed: GPT-QModel's own."""
    if getattr(layer, "linear_mode", None) == "inference":  # evaluating has laid the codes out anew
        return weight_by_forward(layer)
    return cast(Tensor, layer.dequantize_weight().T)


# the order in which AWQ lays eight numbers into a word, inverted: number i lies at the bits of _AWQ[i]
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)


@register_quantized("linear", f"{_GPTQ}.torch_awq.AwqTorchLinear", f"{_GPTQ}.gemm_awq.AwqGEMMLinear")
@register_quantized("linear", f"{_GPTQ}.gemm_awq_triton.AwqGEMMTritonLinear")
def _awq(layer: Any) -> Tensor:
    """scales * (codes - zeros) of AWQ's GEMM layout: qweight int32 [inp, out / 8], qzeros and scales a row a group."""
    if layer.bits != 4:
        return weight_by_forward(layer)
    shifts = 4 * torch.tensor(_AWQ, device=layer.qweight.device)

    def codes(words: Tensor) -> Tensor:
        return (words[..., None] >> shifts & 15).flatten(-2)  # [rows, out]

    group = layer.in_features // layer.scales.shape[0]
    zeros, scales = (t.repeat_interleave(group, 0) for t in (codes(layer.qzeros), layer.scales))
    return ((codes(layer.qweight) - zeros) * scales).T


# kernels that lay the weight out anew, each in its own way: what they multiply by is asked of themselves
register_quantized("linear", f"{_GPTQ}.GPTQQuantLinear", f"{_GPTQ}.AWQuantLinear")(weight_by_forward)


def stored(layer: Any) -> int:
    """Bytes of the memory in which a layer keeps its weight: codes, scales and tables, whoever has packed it."""
    todo: list[Any] = [*stored_tensors(layer), getattr(layer, "state", None)]
    met: list[Any] = []  # objects, kept alive while their addresses stand for them
    memory: dict[int, int] = {}
    while todo:
        one = todo.pop()
        if any(one is other for other in met):
            continue
        met.append(one)
        if isinstance(one, Tensor) and hasattr(one, "__tensor_flatten__"):
            todo += [getattr(one, name) for name in cast(Any, one).__tensor_flatten__()[0]]
        elif isinstance(one, Tensor):
            memory[one.untyped_storage()._cdata] = one.numel() * one.element_size()
            todo += [vars(one)[name] for name in ("quant_state", "CB", "SCB") if name in vars(one)]
        elif type(one).__module__.startswith("bitsandbytes."):
            todo += vars(one).values()
    return sum(memory.values())
