"""BnbNF4: the frozen weight in 4 bits a number, kept and multiplied by bitsandbytes.

The codes are those of `NF4`, bit for bit; what differs is whose kernels compute with them. bitsandbytes makes the whole
dense weight in every backward pass, one layer at a time; on CUDA its products of a few rows are compiled.
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
from lorary.layers.quantized_weight import in_place_of
from lorary.spec.fields import FLAG, optional
from lorary.spec.interfaces import Storage, component


@component
class BnbNF4(Storage):
    """Linear layers become bitsandbytes' Linear4bit; the output head, embeddings and norms stay as they are.

    Args:
        block: how many numbers share one largest value.
        double: keep these largest values in 8 bits, too.
        compute: the precision of the products; None for that of the first input that a layer meets.
    """

    block: int = field(default=64, metadata=BLOCKS)
    double: bool = field(default=True, metadata=FLAG)
    compute: str | None = field(default=None, metadata=optional(COMPUTES))

    writable = False

    def quantizes(self, layer: nn.Module) -> bool:
        if not NF4().quantizes(layer):
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
        kind, own = KINDS[cast(str, kind_of(layer))], cast(Tensor, layer.weight)
        matrix = (kind.matrix(layer) if W is None else W).detach().contiguous()  # [out, inp]
        compute = None if self.compute is None else getattr(torch, self.compute)
        words = {"compress_statistics": self.double, "quant_type": "nf4"}
        with torch.device("meta"):
            made = bitsandbytes.Linear4bit(matrix.shape[1], matrix.shape[0], False, compute, **words)
        weight = bitsandbytes.Params4bit(matrix, False, blocksize=self.block, module=made, **words)
        made.weight = weight.to(matrix.device)  # packs it, unless there are no values
        if made.weight.quant_state is not None:
            made.weight.quant_state.dtype = own.dtype
        made.bias, made.source_cls = getattr(layer, "bias", None), type(layer)
        keep_layout(made)
        return in_place_of(layer, made)

    def bytes(self, numbers: int, width: int = 0) -> int:
        return NF4(self.block, self.double).bytes(numbers)
