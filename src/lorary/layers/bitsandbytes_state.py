"""The tensors beside a weight's codes in bitsandbytes' 4-bit checkpoints: written and read, without bitsandbytes.

<name>.weight                                    uint8 [ceil(n / 2), 1]     codes, two a byte
<name>.weight.absmax                             fp32, or uint8 where it is quantised itself
<name>.weight.quant_map                          fp32 [16]                  the codes' values
<name>.weight.nested_absmax, .nested_quant_map   fp32 [...], fp32 [256]     of the quantised absmax
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

STATE = "quant_state.bitsandbytes__nf4"
KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")  # below `<name>.weight.`
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # numbers that may share one largest value
_NESTED = 256  # largest values in a block of their own


def written_state(packed: QuantizedTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What stands beside a weight's codes: key below `<name>.weight.` -> tensor."""
    device = packed.codes.device
    said: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": packed.block,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(packed.shape),
    }
    # each weight has maps of its own: files refuse tensors that share memory
    tensors = {"absmax": packed.absmax, "quant_map": CODE.to(device, copy=True)}
    if packed.nested_absmax is not None and packed.nested_offset is not None:
        offset = math.nan if packed.nested_offset.is_meta else packed.nested_offset.item()
        said |= {"nested_blocksize": _NESTED, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {"nested_absmax": packed.nested_absmax, "nested_quant_map": DYNAMIC.to(device, copy=True)}
    text = json.dumps(said).encode()
    return tensors | {STATE: torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)}


def read_state(codes: Tensor, found: Mapping[str, Tensor]) -> tuple[QuantizedTensor | None, torch.dtype, list[str]]:
    """The weight of these codes and of what stands beside them.

    Returns:
        (the weight or None, the precision that it had, every reason why there is none).
    """
    said, problems = _said(found)
    if problems:
        return None, torch.float32, problems
    shape, block = tuple(said["shape"]), said["blocksize"]
    numbers = math.prod(shape)
    blocks = -(-numbers // block)
    nested = "nested_blocksize" in said
    expected = {"absmax": ((blocks,), torch.uint8 if nested else torch.float32)}
    if nested:
        expected["nested_absmax"] = ((-(-blocks // _NESTED),), torch.float32)
    for key, (size, kind) in expected.items():
        tensor = found.get(key)
        if tensor is None:
            problems.append(f"{key} is missing")
        elif tuple(tensor.shape) != size or tensor.dtype != kind:
            problems.append(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, expected {kind} {size}")
        elif kind == torch.float32 and not tensor.is_meta and not tensor.isfinite().all():
            problems.append(f"{key} holds numbers that are NaN or infinite")
    if codes.dtype != torch.uint8 or codes.numel() != -(-numbers // 2):
        what = f"the codes are {codes.dtype} {tuple(codes.shape)}"
        problems.append(f"{what}, expected {-(-numbers // 2)} bytes for a weight of {shape}")
    for key, values in (("quant_map", CODE), ("nested_quant_map", DYNAMIC)):
        if key in found and not torch.equal(found[key].float().cpu(), values):
            problems.append(f"{key} holds other values than those of {'NF4' if values is CODE else 'the dynamic map'}")
    if problems:
        return None, torch.float32, problems
    offset = torch.tensor(said["nested_offset"], dtype=torch.float32, device=codes.device) if nested else None
    packed = QuantizedTensor(codes.reshape(-1, 1), found["absmax"], found.get("nested_absmax"), offset, shape, block)
    return packed, getattr(torch, said["dtype"]), []


def _said(found: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """The sizes and the precision that the JSON says, and what is wrong with it."""
    if STATE not in found:
        other = sorted(key for key in found if key.startswith("quant_state."))
        return {}, [f"{other[0]} is not NF4" if other else f"{STATE} is missing"]
    try:
        said = json.loads(bytes(found[STATE].cpu().to(torch.uint8).flatten().tolist()))
    except (ValueError, RecursionError) as error:
        return {}, [f"{STATE} is no JSON: {error}"]
    if not isinstance(said, dict):
        return {}, [f"{STATE} holds no mapping"]
    problems = []
    shape, block = said.get("shape"), said.get("blocksize")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
        problems.append(f"{STATE}: shape is {shape!r}")
    if type(block) is not int or block not in BLOCK_SIZES:
        problems.append(f"{STATE}: blocksize is {block!r}")
    if said.get("dtype") not in ("float32", "bfloat16", "float16", "float64"):
        problems.append(f"{STATE}: dtype is {said.get('dtype')!r}")
    if said.get("quant_type", "nf4") != "nf4":
        problems.append(f"{STATE}: quant_type is {said['quant_type']!r}")
    nested = {key: said[key] for key in ("nested_blocksize", "nested_dtype", "nested_offset") if key in said}
    offset = nested.get("nested_offset")
    if nested and (
        nested.get("nested_blocksize") != _NESTED
        or nested.get("nested_dtype") != "float32"
        or type(offset) not in (int, float)
        or not abs(cast(float, offset)) <= torch.finfo(torch.float32).max  # NaN is not, either
    ):
        problems.append(f"{STATE}: of the quantised absmax it says {nested}")
    return said, problems
