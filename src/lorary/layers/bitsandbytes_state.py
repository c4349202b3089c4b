"""The quantisation state in bitsandbytes' 4-bit checkpoints, written and read without bitsandbytes.

<name>.weight                                    uint8 [ceil(n / 2), 1]     codes, two per byte
<name>.weight.absmax                             fp32, or uint8 with double quantisation
<name>.weight.quant_map                          fp32 [16]                  the codes' values
<name>.weight.nested_absmax, .nested_quant_map   fp32 [...], fp32 [256]     of the second level
<name>.weight.quant_state.bitsandbytes__nf4      uint8: JSON with sizes, precision and the nested offset
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from lorary.kernels.nf4 import CODE, DYNAMIC, QuantizedTensor
from lorary.kernels.nf4.reference import NESTED

STATE = "quant_state.bitsandbytes__nf4"
KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")  # below `<name>.weight.`
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def write_state(quantized: QuantizedTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of a weight: key below `<name>.weight.` -> tensor."""
    device = quantized.codes.device
    metadata: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": quantized.block,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(quantized.shape),
    }
    # copies of the maps, because safetensors refuses tensors that share memory
    tensors = {"absmax": quantized.absmax, "quant_map": CODE.to(device, copy=True)}
    if quantized.nested_absmax is not None and quantized.nested_offset is not None:
        offset = math.nan if quantized.nested_offset.is_meta else quantized.nested_offset.item()
        metadata |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {"nested_absmax": quantized.nested_absmax, "nested_quant_map": DYNAMIC.to(device, copy=True)}
    text = json.dumps(metadata).encode()
    return tensors | {STATE: torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)}


def read_state(codes: Tensor, state: Mapping[str, Tensor]) -> tuple[QuantizedTensor | None, torch.dtype, list[str]]:
    """The weight with these codes and this state.

    Returns:
        (the weight or None, its original dtype, all errors in the state).
    """
    metadata, problems = _read_metadata(state)
    if problems:
        return None, torch.float32, problems
    shape, block = tuple(metadata["shape"]), metadata["blocksize"]
    numbers = math.prod(shape)
    blocks = -(-numbers // block)
    nested = "nested_blocksize" in metadata
    expected = {"absmax": ((blocks,), torch.uint8 if nested else torch.float32)}
    if nested:
        expected["nested_absmax"] = ((-(-blocks // NESTED),), torch.float32)
    for key, (size, kind) in expected.items():
        tensor = state.get(key)
        if tensor is None:
            problems.append(f"{key} is missing")
        elif tuple(tensor.shape) != size or tensor.dtype != kind:
            problems.append(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, expected {kind} {size}")
        elif kind == torch.float32 and not tensor.is_meta and not tensor.isfinite().all():
            problems.append(f"{key} holds NaN or infinite numbers")
    if codes.dtype != torch.uint8 or codes.numel() != -(-numbers // 2):
        what = f"the codes are {codes.dtype} {tuple(codes.shape)}"
        problems.append(f"{what}, expected {-(-numbers // 2)} bytes for a weight of {shape}")
    for key, values in (("quant_map", CODE), ("nested_quant_map", DYNAMIC)):
        if key in state and not torch.equal(state[key].float().cpu(), values):
            problems.append(f"{key} differs from the values of {'NF4' if values is CODE else 'the dynamic map'}")
    if problems:
        return None, torch.float32, problems
    offset = torch.tensor(metadata["nested_offset"], dtype=torch.float32, device=codes.device) if nested else None
    weight = QuantizedTensor(codes.reshape(-1, 1), state["absmax"], state.get("nested_absmax"), offset, shape, block)
    return weight, getattr(torch, metadata["dtype"]), []


def _read_metadata(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """The JSON with sizes and dtype, and the errors in it."""
    if STATE not in state:
        other = sorted(key for key in state if key.startswith("quant_state."))
        return {}, [f"{other[0]} is not NF4" if other else f"{STATE} is missing"]
    try:
        metadata = json.loads(bytes(state[STATE].cpu().to(torch.uint8).flatten().tolist()))
    except (ValueError, RecursionError) as error:
        return {}, [f"{STATE} is not valid JSON: {error}"]
    if not isinstance(metadata, dict):
        return {}, [f"{STATE} is not a JSON object"]
    shape, block = metadata.get("shape"), metadata.get("blocksize")
    valid = {
        "shape": isinstance(shape, list) and bool(shape) and all(type(n) is int and n > 0 for n in shape),
        "blocksize": type(block) is int and block in BLOCK_SIZES,
        "dtype": metadata.get("dtype") in ("float32", "bfloat16", "float16", "float64"),
        "quant_type": metadata.get("quant_type", "nf4") == "nf4",
    }
    problems = [f"{STATE}: {key} is {metadata.get(key)!r}" for key, ok in valid.items() if not ok]
    nested = {key: metadata[key] for key in ("nested_blocksize", "nested_dtype", "nested_offset") if key in metadata}
    offset = nested.get("nested_offset")
    if nested and (
        nested.get("nested_blocksize") != NESTED
        or nested.get("nested_dtype") != "float32"
        or type(offset) not in (int, float)
        or not abs(cast(float, offset)) <= torch.finfo(torch.float32).max  # false for NaN, too
    ):
        problems.append(f"{STATE}: invalid double quantisation: {nested}")
    return metadata, problems
