"""What adapted layers keep for the backward pass and hold during it, asked of the layers themselves.

The layers that read one input (queries, keys and values; gate and up) make one forward and one backward pass on the
meta device, where tensors have sizes but no memory. So a method of tomorrow is counted as well as LoRA, and there is
no table of methods here. The same layers of the next block are not asked again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lorary.accounting import LiveBytes
from lorary.placed import Placed
from lorary.plans import Plan
from lorary.words import Storage


@dataclass(frozen=True)
class Layer:
    """One layer of a group.

    Args:
        out: its outputs.
        bias: whether it has one.
        placed: what is learnt there, under the name of its place; None for a layer as it is.
        storage: how its weight is packed; None for one that is not.
        full: whether the weight itself trains.
    """

    out: int
    bias: bool = False
    placed: Placed | None = None
    storage: Storage | None = None
    full: bool = False


@dataclass(frozen=True)
class Held:
    """What a group holds, in bytes.

    Args:
        input: whether its input is kept.
        outputs: of each layer, whether its output is kept.
        extra: what is kept beside them.
        takes: the most that the backward pass holds at once, beyond what was kept and the outputs' gradients.
    """

    input: bool
    outputs: tuple[bool, ...]
    extra: int
    takes: int


@lru_cache(maxsize=4096)
def held(layers: tuple[Layer, ...], inp: int, rows: int, stream: torch.dtype, weights: torch.dtype) -> Held:
    """What these layers hold for one input [rows, inp].

    Args:
        layers: those that read it.
        inp: its width.
        rows: tokens.
        stream: its precision.
        weights: the precision of the layers' weights.
    """
    box = _box(layers, inp, weights)
    leaf = torch.empty(rows, inp, dtype=stream, device="meta", requires_grad=True)
    leaf.grad = torch.empty_like(leaf)
    for parameter in box.parameters():
        if parameter.requires_grad:  # gradients have a line of their own
            parameter.grad = torch.empty_like(parameter)
    known = {_address(t) for t in (*box.parameters(), *box.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if (address := _address(tensor)) not in known:
            kept[address] = tensor.untyped_storage().nbytes()
        return tensor

    with LiveBytes() as live:
        x = leaf.clone()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = [layer(x) for layer in box.children()]
        ends = [_address(x), *map(_address, outputs)]
        learns = [y for y in outputs if y.requires_grad]
        edges = [torch.autograd.graph.get_gradient_edge(y) for y in learns]
        gradients = [torch.empty_like(y) for y in learns]
        del x, outputs, learns  # what nobody keeps is given up, what is kept goes when its turn has come
        before = live.now
        live.restart_peak()
        torch.autograd.backward(edges, gradients)
        takes = live.peak - before
    extra = sum(size for address, size in kept.items() if address not in ends)
    return Held(ends[0] in kept, tuple(end in kept for end in ends[1:]), extra, max(0, takes))


def _box(layers: tuple[Layer, ...], inp: int, weights: torch.dtype) -> nn.ModuleDict:
    """The layers on the meta device, packed and adapted as they will be."""
    from lorary.surgery import attach  # here: a plan of well-known words has no need of it

    box = nn.ModuleDict()
    for i, layer in enumerate(layers):
        box[str(i)] = linear(inp, layer.out, layer.bias, weights).requires_grad_(layer.full)
    packed = {str(i): layer.storage for i, layer in enumerate(layers) if layer.storage is not None}
    placed = [
        dataclasses.replace(layer.placed, site=dataclasses.replace(layer.placed.site, name=str(i), kind="linear"))
        for i, layer in enumerate(layers)
        if layer.placed is not None
    ]
    if placed:
        attach(box, Plan(placed[0].method, tuple(placed), (), 0, 0, packed=tuple(packed)))
        for i, layer in enumerate(layers):
            if layer.full:
                _weight(box[str(i)]).requires_grad_(True)
    else:
        for name, storage in packed.items():
            box[name] = storage.pack(box[name])
    return box.train()


def linear(inp: int, out: int, bias: bool = False, dtype: torch.dtype | None = None) -> nn.Linear:
    """A linear layer on the meta device. nn.Linear itself draws its numbers even there, which takes its time."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = inp, out
    layer.weight = nn.Parameter(torch.empty(out, inp, dtype=dtype, device="meta"))
    made = nn.Parameter(torch.empty(out, dtype=dtype, device="meta")) if bias else None
    layer.register_parameter("bias", made)
    return layer


def _weight(layer: Any) -> nn.Parameter:
    weight: nn.Parameter = layer.weight
    return weight


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
