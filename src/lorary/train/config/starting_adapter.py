"""The adapter that training goes on from (`model.adapter`): loaded, identified, compared with what is configured."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lorary.adapters import load_adapter
from lorary.adapters.adapter import Adapter
from lorary.adapters.change_rank import change_rank
from lorary.adapters.resolve import adapter_folder
from lorary.errors import ConfigError, Diagnostic, MethodError
from lorary.files.home import expanded
from lorary.model.planning import plan_of_adapter
from lorary.model.scan import scan
from lorary.model.targets import resolve
from lorary.model.vocabulary import added_tokens
from lorary.spec.method import AXES
from lorary.spec.placement import by_method
from lorary.spec.presets import method as method_of
from lorary.train.config.config import Config, MethodSection
from lorary.train.config.previous_tasks import digest, other_digest, path_of

if TYPE_CHECKING:
    from torch import nn

    from lorary.model.plan import Plan

_FIX = "leave it out: training goes on with the adapter's own"
_FREE = ("storage", "dropout")  # of the training that follows, not of the adapter


class Start(NamedTuple):
    """The adapter to go on from, and its folder with the digest of the values that it has there."""

    adapter: Adapter
    name: str


def load_start(config: Config) -> Start | None:
    """The adapter of `model.adapter`, with the rank, storage and dropout that `method` says; None without one.

    Raises:
        FileError: there is none, or it is damaged.
        ConfigError: it is not the one whose digest the configuration holds.
    """
    if config.model.adapter is None:
        return None
    path = path_of(config.model.adapter)
    folder = expanded(path)
    adapter = load_adapter(adapter_folder(folder) or folder)
    if problems := other_digest("model.adapter", config.model.adapter, adapter):
        raise ConfigError("the adapter to go on from has changed:", problems)
    resized = _at_rank(_for_training(adapter, config.method), config.method, config.training.seed)
    return Start(resized, f"{path}#{digest(adapter)}")


def plan_to_go_on(config: Config, model: nn.Module, start: Adapter, drawn: Sequence[str] = ()) -> Plan:
    """The plan under which the adapter goes on training on a model, which stays unchanged.

    Args:
        config: of the run.
        model: the base.
        start: the adapter.
        drawn: parameters that no checkpoint of the base holds, such as a classifier's new head.

    Raises:
        ConfigError: the method section says something else than the adapter; every difference.
        PlanError: the adapter does not fit the model.
    """
    problems = [*_differences(config.method, start), *_other_targets(config.method, model, start)]
    problems += _other_tokens(config, start)
    if missing := [name for name in drawn if name not in start.full]:
        what = (
            f"task `{config.task}` draws {missing[0]} at random, and the adapter does not hold it: it would not train"
        )
        problems.append(
            Diagnostic("model.adapter", what, "merge the adapter first, and name the merged model as model.id")
        )
    if problems:
        raise ConfigError("the configuration contradicts the adapter that it goes on from:", problems)
    return plan_of_adapter(model, start)


def _for_training(adapter: Adapter, section: MethodSection) -> Adapter:
    """The adapter with the dropout of the section, and in the storage that it names: PEFT's files say nothing of it."""
    said: dict[str, Any] = {} if section.dropout is None else {"dropout": section.dropout}
    if "name" in section.model_fields_set:
        said["storage"] = section.build().storage
    if all(getattr(adapter.method, axis) == value for axis, value in said.items()):
        return adapter
    sites = tuple(dataclasses.replace(s, method=s.method.replace(**said)) for s in adapter.sites)
    return dataclasses.replace(adapter, method=adapter.method.replace(**said), sites=sites)


def _at_rank(adapter: Adapter, section: MethodSection, seed: int) -> Adapter:
    """The adapter at the rank that the section says."""
    before = getattr(adapter.method.delta, "r", None)
    if section.r is None or before is None or section.r == before:
        return adapter
    change = change_rank(adapter, section.r, seed=seed)
    note = f"the adapter's rank changes from {before}: {change}"
    return dataclasses.replace(change.adapter, notes=(*adapter.notes, note))


def _differences(section: MethodSection, adapter: Adapter) -> Iterator[Diagnostic]:
    """What the method section says otherwise than the adapter's method, or one of its methods."""
    said, there = section.model_fields_set, adapter.method
    theirs = {"r": getattr(there.delta, "r", None), "alpha": getattr(there.scale, "alpha", None)}
    for key in ("r", "alpha"):
        value = getattr(section, key)
        if key in said and value is not None and value != theirs.get(key):
            yield Diagnostic(f"method.{key}", f"is {value:g}, and the adapter's is {_shown(theirs.get(key))}", _FIX)
    if "name" not in said:
        return
    options: dict[str, Any] = {k: v for k, v in theirs.items() if v is not None}
    try:
        here = method_of(*section.name, **options, **section.options)
    except MethodError:  # LoRA's options, and a method without them
        here = method_of(*section.name, **section.options)
    names, methods = " + ".join(section.name), [there, *(group[0].method for group in by_method(adapter.sites)[1:])]
    for axis, one in itertools.product(AXES, methods):
        mine, its = getattr(here, axis), getattr(one, axis)
        if mine != its and axis not in _FREE and not _alike(axis, mine, its):
            yield Diagnostic(f"method.name: {axis}", f"`{names}` has {_shown(mine)}, the adapter {_shown(its)}", _FIX)


def _alike(axis: str, mine: Any, its: Any) -> bool:
    """Whether two components differ only in what a trained adapter has left behind: its start and its present ranks."""
    if axis == "init" and None not in (mine, its):
        return not (mine.residual_init or its.residual_init)
    return axis == "delta" and type(mine) is type(its) and not _changed_fields(mine, its) - {"r", "kept", "past"}


def _changed_fields(mine: Any, its: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(mine) if getattr(mine, f.name) != getattr(its, f.name)}


def _shown(value: Any) -> str:
    if isinstance(value, tuple | frozenset) or value is None:
        return ", ".join(sorted(map(str, value or ()))) or "none"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _other_tokens(config: Config, start: Adapter) -> Iterator[Diagnostic]:
    """Tokens to add, if they are others than those of the adapter: their rows would not train."""
    said, theirs = config.model.tokens, tuple(added_tokens(start.sites))
    if said and said != theirs:
        what = f"adds {', '.join(said)}, and the adapter has {', '.join(theirs) or 'no rows for new tokens'}"
        yield Diagnostic("model.tokens", what, _FIX)


def _other_targets(section: MethodSection, model: nn.Module, start: Adapter) -> Iterator[Diagnostic]:
    """The targets, if they are other layers than those of the adapter."""
    if "targets" not in section.model_fields_set or section.targets is None:
        return
    found, problems = resolve(scan(model), section.targets, ())
    yield from (Diagnostic("method.targets", p.what, p.fix) for p in problems)
    here, there = {f.name for f in found}, {s.site.name for s in start.sites}
    if not problems and here != there:
        only = min(here ^ there)
        what = f"`{', '.join(section.targets)}` is {len(here)} layers, and the adapter has {len(there)}"
        what += f"; {only} is only {'here' if only in here else 'in the adapter'}"
        yield Diagnostic("method.targets", what, _FIX)
