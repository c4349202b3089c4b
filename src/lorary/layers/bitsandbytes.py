"""BnbNF4: NF4 storage in bitsandbytes' layers, computed by its kernels.

The codes equal those of `NF4`, bit for bit. In the backward pass bitsandbytes dequantises the whole weight, one layer
at a time; on CUDA it has compiled kernels for products with a few rows.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, PlanError
from lorary.layers.kinds import KINDS, kind_of
from lorary.layers.nf4 import BLOCKS, COMPUTES, NF4
from lorary.layers.other_quantizers import keep_layout
from lorary.layers.quantized_weight import take_place_of
from lorary.spec.fields import FLAG, optional
from lorary.spec.interfaces import Storage, component


@component
class BnbNF4(Storage):
    """Linear layers as bitsandbytes' Linear4bit; the output head, embeddings and norms stay unquantised.

    Args:
        block: numbers that share one largest magnitude.
        double: quantise these magnitudes to 8 bits as well.
        compute: dtype of the matrix products; None for the dtype of a layer's first input.
    """

    block: int = field(default=64, metadata=BLOCKS)
    double: bool = field(default=True, metadata=FLAG)
    compute: str | None = field(default=None, metadata=optional(COMPUTES))

    writable = False

    def quantizes(self, layer: nn.Module) -> bool:
        if not NF4(experts=False).quantizes(layer):
            return False
        if importlib.util.find_spec("bitsandbytes") is None:
            what, fix = "BnbNF4 needs bitsandbytes, which is not installed", "install it, or set backend='lorary'"
            raise PlanError("cannot quantise the base:", [Diagnostic("storage", what, fix)])
        out, inp = KINDS[cast(str, kind_of(layer))].size(layer)
        if cast(Tensor, layer.weight).is_cpu and inp % self.block:  # as of 0.50.2, measured
            what = f"bitsandbytes' kernel for CPUs misreads a weight of {out} x {inp} in blocks of {self.block}"
            raise PlanError("cannot quantise the base:", [Diagnostic("storage", what, "set backend='lorary'")])
        return True

    def quantize(self, layer: nn.Module, W: Tensor | None = None) -> nn.Module:
        bitsandbytes: Any = importlib.import_module("bitsandbytes.nn")
        matrix = KINDS[cast(str, kind_of(layer))].matrix(layer) if W is None else W  # [out, in]
        compute = None if self.compute is None else getattr(torch, self.compute)
        options = {"compress_statistics": self.double, "quant_type": "nf4"}
        with torch.device("meta"):
            replacement = bitsandbytes.Linear4bit(matrix.shape[1], matrix.shape[0], False, compute, **options)
        matrix = matrix.detach().contiguous()
        weight = bitsandbytes.Params4bit(matrix, False, blocksize=self.block, module=replacement, **options)
        replacement.weight = weight.to(matrix.device)  # quantises, except on the meta device
        if replacement.weight.quant_state is not None:
            replacement.weight.quant_state.dtype = cast(Tensor, layer.weight).dtype
        replacement.bias, replacement.source_cls = getattr(layer, "bias", None), type(layer)
        keep_layout(replacement)
        return take_place_of(layer, replacement)

    def bytes(self, numbers: int, width: int = 0) -> int:
        return NF4(self.block, self.double).bytes(numbers)
