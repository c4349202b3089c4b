"""Proof of reach: which layers of a scanned model an adapter would act on, by the code and by a dry forward."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lorary.kernels.torch_internals import parameters_of
from lorary.layers.module_kinds import module_positions
from lorary.model.reach.bypass import Bypass
from lorary.model.reach.dry_run import Observed, dry_run
from lorary.model.reach.inputs import model_inputs
from lorary.model.scan import Scan
from lorary.model.targets import abbreviated, grouped


@dataclass(frozen=True)
class Reach:
    """The findings of code and dry forwards about the layers of a model.

    Args:
        ran: the paths of the layers that ran in a dry forward.
        not_taken: path -> code that reads the layer's weight, on a path that no dry forward took.
        complete: whether a forward of the whole model reached its end.
        error: why none did; empty also where no inputs are known.
    """

    ran: frozenset[str] = frozenset()
    not_taken: Mapping[str, Bypass] = field(default_factory=dict)
    complete: bool = False
    error: str = ""

    def notes(self, sites: Collection[str]) -> list[str]:
        """The questions about these adapted layers that stay open."""
        if self.error and not self.complete and not self.ran.issuperset(sites):
            later = "the first training forward shows whether every site runs"
            return [f"no dry forward is possible ({self.error}): {later}"]
        readers = {path: bypass.reader for path, bypass in self.not_taken.items() if path in set(sites)}
        notes = [
            f"{names}: {reader} reads the weight without calling the layer, on a path that no dry forward took"
            for names, reader in grouped(readers)
        ]
        if self.complete and (idle := kinds_without(self.ran, sites)):
            notes.append(f"{abbreviated(idle)} did not run in a dry forward: used by other inputs only, or by nothing")
        return notes


def proved(scan: Scan, example: Any = None) -> tuple[Scan, Reach]:
    """The scan with the bypassed layers that dry forwards confirm, and all other findings.

    Args:
        scan: of the model, with the bypasses that its code allows.
        example: the inputs of a forward; None for inputs made from a Transformers model's configuration.
    """
    if example is None and not any(True for _ in model_inputs(scan.model)):
        return scan, Reach()
    layers = scan.layers
    observed = _observed(scan, example)
    verdicts = {path: _verdict(m.bypass, path, observed) for path, m in layers.items()}
    not_taken = {path: m.bypass for path, m in layers.items() if m.bypass and verdicts[path] is None}
    modules = {
        path: dataclasses.replace(m, bypass=verdicts[path]) if path in verdicts else m
        for path, m in scan.modules.items()
    }
    reach = Reach(frozenset(observed.ran), not_taken, observed.complete, observed.error)
    return dataclasses.replace(scan, modules=modules), reach


def _observed(scan: Scan, example: Any) -> Observed:
    """The findings of dry forwards; those of the last models are kept for others of the same structure."""
    structure = None if example is not None else _structure(scan)
    if structure in _KEPT:
        return _KEPT[structure]
    layers = scan.layers
    lines = {path: m.bypass.lines for path, m in layers.items() if m.bypass}
    # a fused parameter is no module: it runs where its experts module does
    watched = dict.fromkeys(path if m.owner is None else m.owner for path, m in layers.items())
    observed = dry_run(scan.model, list(watched), lines, example)
    observed.ran |= {path for path, m in layers.items() if m.owner in observed.ran}
    if structure is not None:
        _KEPT[structure] = observed
        if len(_KEPT) > _MOST_KEPT:
            _KEPT.pop(next(iter(_KEPT)), None)
    return observed


_KEPT: dict[Hashable, Observed] = {}
_MOST_KEPT = 32


def _structure(scan: Scan) -> Hashable:
    """Everything that a forward without values depends on.

    None for a module with a forward of its own, or with attributes that cannot be compared.
    """
    found: list[Hashable] = [repr(getattr(scan.model, "config", None))]
    for m in scan.modules.values():
        attributes = {k: v for k, v in vars(m.module).items() if k != "training"}
        if "forward" in attributes:
            return None
        try:
            plain = _comparable({k: v for k, v in attributes.items() if k not in _INTERNALS})
        except TypeError:
            return None
        shapes = tuple((k, None if p is None else (p.shape, p.dtype)) for k, p in parameters_of(m.module).items())
        found.append((m.paths, m.tied_to, type(m.module), type(m.module).forward, plain, shapes))
    return tuple(found)


def _comparable(value: Any) -> Hashable:
    """A value to compare attributes by, which keeps no tensor, module or closure alive.

    Raises:
        TypeError: for an object whose state is not known.
    """
    match value:
        case None | bool() | int() | float() | str() | bytes() | torch.dtype() | torch.device():
            return type(value), value
        case list() | tuple() | set() | frozenset():
            return type(value), tuple(_comparable(item) for item in value)
        case dict():
            return dict, tuple((_comparable(key), _comparable(item)) for key, item in value.items())
        case Tensor():
            return Tensor, value.shape, value.dtype
        case functools.partial():
            return _comparable([value.func, value.args, value.keywords])
        case type() | BuiltinFunctionType():
            return value
        case FunctionType() if not value.__closure__:
            return value
        case _ if type(value).__name__.endswith("Config"):
            return type(value), repr(value)
    raise TypeError(type(value))


# PyTorch's own dictionaries, which hold what is compared beside them, and hooks, which a dry forward leaves out
_INTERNALS = frozenset(vars(nn.Module()))


def _verdict(bypass: Bypass | None, path: str, observed: Observed) -> Bypass | None:
    """A layer's bypass after the dry forwards: confirmed, found by them, or dropped."""
    ran = path in observed.ran
    if path in observed.read:
        return dataclasses.replace(bypass or Bypass("", ran), called=ran)
    return None if ran and observed.complete else bypass


def kinds_without(ran: Collection[str], sites: Iterable[str]) -> list[str]:
    """The sites of the kinds that never ran: an expert or a block may be skipped, a whole kind rarely is."""
    positions = module_positions([*sites, *ran])
    live = {positions[path].kind for path in ran}
    return [path for path in sites if positions[path].kind not in live]
