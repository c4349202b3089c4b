"""Rounding in Triton's kernels, also where they are interpreted on the CPU. Importing this needs Triton."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(numbers, kind: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round to nearest even; Triton's interpreter would truncate to bfloat16."""
    if INTERPRETED and kind == tl.bfloat16:
        bits = numbers.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        numbers = bits.to(tl.uint16).to(kind, bitcast=True)
    else:
        numbers = numbers.to(kind)
    return numbers
