"""A comparison as it is asked for: by a configuration, or by the folder of an earlier one, which is to go on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lorary.analysis.comparison import store
from lorary.analysis.comparison.record import Arm
from lorary.errors import ConfigError, Diagnostic, FileError, LoraryError
from lorary.spec.interfaces import has_rank
from lorary.spec.method import Method
from lorary.spec.presets import method as method_of
from lorary.spec.presets import resolve_presets
from lorary.train.compare.ledger import FILE
from lorary.train.compare.request import HEADLINE
from lorary.train.compare.settings import Settings
from lorary.train.config.config import Config
from lorary.train.config.load import from_dict, read_method

_OF_THE_METHOD = ("r", "alpha", "dropout")  # as far as a method has them


@dataclass(frozen=True)
class Asked:
    """The arguments of `lorary.train.compare.compare.compare`.

    Args:
        config: of all runs.
        arms: the methods.
        settings: of the comparison.
    """

    config: Config
    arms: tuple[Arm, ...]
    settings: Settings


def from_config(config: Config) -> Asked:
    """The comparison that the `compare` section of a configuration asks for.

    Rank, alpha and dropout of the `method` section are those of every method that has them and says no others.

    Raises:
        ConfigError: the section names no methods, or gives some of them more learning rates than others; all reasons.
    """
    section = config.compare
    common = () if isinstance(section.rates, int) else section.rates
    if problems := [*_problems(config)]:
        raise ConfigError(HEADLINE, problems)
    known = {field.name for field in fields(Settings)}
    given = {key: getattr(section, key) for key in section.model_fields_set & known}
    given.pop("rates", None)
    if not common:  # with a list, every arm has its own
        given["rates"] = section.number_of_rates | 1
    arms = tuple(Arm(arm.name, _inherited(config, arm.method), arm.rates or common) for arm in section.methods)
    return Asked(config, arms, Settings(**given))


def _problems(config: Config) -> Iterator[Diagnostic]:
    section, number = config.compare, config.compare.number_of_rates
    if not section.methods:
        yield Diagnostic("compare.methods", "there are none", "name at least one method: --methods lora,dora")
    for arm in section.methods:
        if arm.rates is not None and len(arm.rates) != number:
            what = f"lists {len(arm.rates)} learning rates, and {number} are tried for the other methods"
            yield Diagnostic(f"{arm.name}: rates", what, "give every method the same search")
    if config.task == "classification" and "general" in section.model_fields_set and section.general:
        what = "has no effect on classifiers, which do not predict text"
        yield Diagnostic("compare.general", what, "remove it")


def _inherited(config: Config, method: Mapping[str, Any]) -> dict[str, Any]:
    """The section of an arm's method, with what it takes from the common one."""
    section = read_method(method, config.data.max_length)
    takes = {key for preset in resolve_presets(section.name) for key in preset.parameters}
    common = {key: getattr(config.method, key) for key in config.method.model_fields_set & {*_OF_THE_METHOD} & takes}
    found = {key: value for key, value in common.items() if value is not None and getattr(section, key) is None}
    if not found:
        return {**method}
    bare = method_of(*section.name, **section.options)
    has = {"r": has_rank(bare.delta), "alpha": hasattr(bare.scale, "alpha"), "dropout": _has_dropout(bare)}
    return {**method, **{key: value for key, value in found.items() if has[key]}}


def _has_dropout(method: Method) -> bool:
    """Whether the input of its update can be dropped."""
    join, init = method.join, method.init
    starts_in_base = init is not None and init.residual_init
    return join is not None and join.adds_delta and join.supports_dropout and not starts_in_base


def from_folder(folder: str | os.PathLike[str], **changes: Any) -> Asked:
    """The comparison that a folder was begun with.

    Args:
        folder: of the comparison.
        changes: settings that may differ when it goes on: `budget` and `workers`.

    Raises:
        FileError: it holds no comparison, or one whose request cannot be read.
    """
    path = Path(folder)
    recorded = store.read(path / FILE).settings.get("request")
    try:
        request: Any = recorded
        config = from_dict(request["config"] | {"output": str(path / "runs")})
        names = {field.name for field in fields(Settings)}
        given = {key: value for key, value in request["settings"].items() if key in names}
        given["general"] = tuple(given.get("general", ()))
        arms = tuple(Arm(name, arm["method"], tuple(arm["rates"])) for name, arm in request["arms"].items())
        return Asked(config, arms, Settings(**given | changes))
    except (LoraryError, KeyError, TypeError, AttributeError) as error:
        problems = getattr(error, "problems", ()) or [
            Diagnostic("settings.request", "does not say how the comparison was begun", "compare again")
        ]
        raise FileError(f"cannot go on with the comparison in {str(path)!r}:", problems) from error
