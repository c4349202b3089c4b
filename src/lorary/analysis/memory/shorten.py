"""A copy of a model with fewer blocks on the meta device, one or two of every kind of block."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn

from lorary.layers.rope import text_config
from lorary.layers.transformers_internals import attention_of
from lorary.model.plan import Plan
from lorary.spec.placement import AdaptedSite


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of a model.

    Args:
        path: of their ModuleList.
        kinds: the kind of every block. Blocks of one kind have the same layers, adapters and gradients.
    """

    path: str
    kinds: tuple[Hashable, ...]

    def samples(self) -> dict[Hashable | None, tuple[int, ...]]:
        """The blocks to simulate: under None the last of every kind; under each recurring kind, one more of it."""
        last = {kind: i for i, kind in enumerate(self.kinds)}
        found: dict[Hashable | None, tuple[int, ...]] = {None: tuple(sorted(last.values()))}
        for kind, count in self.counts.items():
            if count > 1:
                second = max(i for i, other in enumerate(self.kinds) if other == kind and i != last[kind])
                found[kind] = tuple(sorted((*last.values(), second)))
        return found

    @property
    def counts(self) -> Counter[Hashable]:
        """kind -> number of blocks."""
        return Counter(self.kinds)


def blocks(model: nn.Module, plan: Plan) -> Blocks | None:
    """The blocks of a model; None if its configuration does not state their number, several lists have it,
    or one block is used several times."""
    number = getattr(text_config(model), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
    ]
    if len(lists) != 1 or len(set(lists[0][1])) != number:  # a shared block would be copied
        return None
    path, layers = lists[0]
    planned: list[list[Any]] = [[] for _ in layers]
    trained = set()
    for name, what in [
        *((p.site.name, (_nameless(p), p.site.name in plan.quantized)) for p in plan.sites),
        *((f.name, f.trains) for f in plan.full),
        *((name, None) for name in plan.quantized),
    ]:
        if (place := _place(name, path)) is not None:
            planned[place[0]].append((place[1], repr(what)))
            trained |= {place[0]} if what not in (None, False) else set()
    first = min(trained, default=0)  # blocks before it save nothing, and this one saves less
    kinds = [
        (_structure(layer), tuple(its), (i > first) - (i < first))
        for i, (layer, its) in enumerate(zip(layers, planned, strict=True))
    ]
    return Blocks(path, tuple(kinds))


def without_values(
    model: nn.Module, plan: Plan, dtype: torch.dtype | None, which: tuple[str, Sequence[int]] | None = None
) -> tuple[nn.Module, Plan]:
    """A copy of the model on the meta device, and the plan for it.

    Args:
        model: the planned model.
        plan: from `lorary.plan`.
        dtype: of floating-point tensors; None: unchanged.
        which: (path of the list of blocks, the blocks to keep); None: all.
    """
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, dtype=kind, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    if which is not None:
        layers: Any = model.get_submodule(which[0])
        memo[id(layers)] = nn.ModuleList(copy.deepcopy(layers[i], memo) for i in which[1])
    twin: Any = copy.deepcopy(model, memo)
    config: Any = getattr(twin, "config", None)
    if attention_of(config) not in (None, "eager", "sdpa"):
        twin.set_attn_implementation("sdpa")  # a fused kernel with the same memory
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if which is None:
        return twin, plan
    config = text_config(twin)
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = [kinds[i] for i in which[1]]
    config.num_hidden_layers = len(which[1])
    return twin, _restricted(plan, *which)


def _restricted(plan: Plan, path: str, kept: Sequence[int]) -> Plan:
    """The part of a plan for the kept blocks, with their new numbers."""
    numbers = {old: new for new, old in enumerate(kept)}

    def renamed(name: str) -> str | None:
        place = _place(name, path)
        if place is None:
            return name
        return f"{path}.{numbers[place[0]]}.{place[1]}" if place[0] in numbers else None

    sites = [
        dataclasses.replace(p, site=dataclasses.replace(p.site, name=name))
        for p in plan.sites
        if (name := renamed(p.site.name))
    ]
    full = [dataclasses.replace(f, name=name) for f in plan.full if (name := renamed(f.name))]
    quantized = [new for name in plan.quantized if (new := renamed(name))]
    given = {new: values for name, values in plan.fixed_tensors.items() if (new := renamed(name))}
    return dataclasses.replace(
        plan, sites=tuple(sites), full=tuple(full), quantized=tuple(quantized), fixed_tensors=given
    )


def _place(name: str, path: str) -> tuple[int, str] | None:
    """(block, path in it); None for a name outside of the blocks."""
    if not name.startswith(f"{path}."):
        return None
    number, _, rest = name[len(path) + 1 :].partition(".")
    return int(number), rest


def _nameless(site: AdaptedSite) -> AdaptedSite:
    return dataclasses.replace(site, site=dataclasses.replace(site.site, name=""), share="")


def _structure(layer: nn.Module) -> Hashable:
    """Modules with their settings (such as the kind of attention), and the shapes of the parameters."""
    settings = tuple(
        (name, type(module), tuple((k, v) for k, v in vars(module).items() if v is None or isinstance(v, bool | str)))
        for name, module in layer.named_modules()
    )
    return settings, tuple((name, p.shape, p.dtype) for name, p in layer.named_parameters())
