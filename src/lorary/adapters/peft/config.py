"""PEFT's `adapter_config.json`, read field by field without silently ignoring any.

A field is understood and checked; or it matters only in training, and only its type is checked; or it belongs to an
unsupported feature, which must be off; or it is unknown, and refused. Absent fields take PEFT's defaults, so that files
of 2023 can be read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorary.adapters.peft.fields import BOOK_KEEPING, EXCLUDE, SHARED, Field, TolerableError
from lorary.errors import Diagnostic, suggestion
from lorary.files.bounded_regex import MOST_CHARACTERS, Budget, Pattern
from lorary.files.findings import Findings
from lorary.files.strict_json import named, show
from lorary.layers.adapted import unwrapped_modules
from lorary.layers.parameter_layer import ParameterLayer

NAME = "adapter_config.json"


@dataclass(frozen=True)
class PeftConfig:
    """A checked `adapter_config.json`: `config["r"]` is the value of a field, or PEFT's default.

    Args:
        peft_type: the name of the PEFT type.
        values: the fields of all types and of this one, by PEFT's names.
    """

    peft_type: str
    values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def value_at(self, pattern: str, usual: str, name: str) -> Any:
        """The value of a field of patterns at a site, or the usual one; without a name the usual one."""
        return next((value for ending, value in self[pattern] if name and ending.fullmatch(name)), self[usual])

    def targets_module(self, path: str) -> bool:
        """Whether PEFT would adapt the module at this path, if it can adapt modules of its kind.

        Raises:
            ValueError: a pattern takes too much work.
        """
        if _names(self["exclude_modules"], path) or _inside(path, self["modules_to_save"]):
            return False
        if self.targets_parameter(f"{path}.weight"):
            return True
        if self["target_modules"] is None:
            return True
        layers = self["layers_to_transform"]
        return _names(self["target_modules"], path) and (layers is None or self._layer(path) in layers)

    def targets_parameter(self, name: str) -> bool:
        """Whether `target_parameters` names the parameter of this name: a weight, or the fused one of experts."""
        parameters = self.values.get("target_parameters") or ()
        return bool(parameters) and _names(parameters, name)

    def saves_module_of(self, path: str) -> bool:
        """Whether the base parameter at this path belongs to a module of `modules_to_save`."""
        if not self["modules_to_save"]:
            return False
        components = path.split(".")
        ancestors = [".".join(components[:i]) for i in range(1, len(components))]
        return any(a.endswith(m) for a in ancestors for m in self["modules_to_save"])

    def _layer(self, path: str) -> int | None:
        """The layer number of a path by PEFT's rule: the first number in the right place."""
        components, names = path.split("."), self["layers_pattern"]
        for i, component in enumerate(components[:-1]):
            if component.isdecimal() and (
                any(components[i - 1 :: -1][: n.count(".") + 1] == n.split(".")[::-1] for n in names)
                if names
                else i >= 2
            ):
                return int(component)
        return None


def read_config(data: object, types: Mapping[str, Mapping[str, Field]], findings: Findings) -> PeftConfig | None:
    """The configuration in a parsed `adapter_config.json`; None if lorary does not read its type.

    Args:
        data: the parsed JSON.
        types: the fields of each PEFT type by its name.
        findings: collects the problems.
    """
    if not isinstance(data, dict):
        findings.fatal.append(Diagnostic(NAME, "is not a JSON object"))
        return None
    name = data.get("peft_type")
    if not isinstance(name, str) or name not in types:
        what = "has no `peft_type`" if name is None else f"is of type {show(name)}"
        findings.fatal.append(Diagnostic(NAME, what, f"lorary reads PEFT's {', '.join(types)} adapters"))
        return None
    known = {**types[name], **BOOK_KEEPING}
    every = {"exclude_modules": EXCLUDE, **SHARED, **types[name]}
    values = {key: field.default for key, field in every.items()}
    budget = Budget()
    for key, value in data.items():
        where = f"{NAME}: {named(key)}"
        if key not in known:
            fix = suggestion(key, known) or "a newer PEFT may have written it; strict=False ignores it"
            findings.tolerable.append(Diagnostic(where, "is not a field that lorary knows", fix))
            continue
        try:
            if value is not None or not known[key].nullable:
                values[key] = known[key].read(value, budget)
        except TolerableError as error:
            findings.tolerable.append(Diagnostic(where, str(error)))
            values[key] = error.value
        except ValueError as error:
            findings.fatal.append(Diagnostic(where, str(error)))
    if isinstance(values["target_modules"], Pattern) and values["layers_to_transform"] is not None:
        what = "cannot be combined with a pattern in `target_modules`"
        findings.fatal.append(Diagnostic(f"{NAME}: layers_to_transform", what))
    if values["layers_pattern"] and values["layers_to_transform"] is None:
        findings.fatal.append(Diagnostic(f"{NAME}: layers_pattern", "needs `layers_to_transform`"))
    return PeftConfig(name, values)


def config_text(values: Mapping[str, Any]) -> str:
    """The file's text, sorted, so that the same adapter gives the same bytes."""
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def target_modules(sites: list[str], model: nn.Module | None) -> list[str] | str:
    """PEFT's `target_modules` for exactly these sites: ends of names, or whole names, or one pattern.

    >>> target_modules(["layers.0.q_proj", "layers.1.q_proj"], None)
    ['layers.0.q_proj', 'layers.1.q_proj']
    """
    names = sorted(sites)
    pattern = "|".join(map(re.escape, names))
    if model is None:
        # a name of one component may be the end of others
        exact = all("." in name for name in names) or len(pattern) > MOST_CHARACTERS
        return names if exact else pattern
    modules = [path for path, m in unwrapped_modules(model).items() if not isinstance(m, ParameterLayer)]
    for entries in (sorted({name.rpartition(".")[2] for name in names}), names):
        if {m for m in modules if _names(tuple(entries), m)} == set(names):
            return entries
    return pattern


def value_patterns(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """PEFT's `rank_pattern` or `alpha_pattern`: a key for every value that is not the usual one.

    >>> value_patterns({"a.q_proj": 8, "b.q_proj": 8, "a.down_proj": 4, "b.down_proj": 4}, 8)
    {'down_proj': 4}
    """
    by_ending: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_ending.setdefault(name.rpartition(".")[2], set()).add(value)
    found = {}
    for name, value in values.items():
        if value != usual:
            ending = name.rpartition(".")[2]
            key = re.escape(ending) if len(by_ending[ending]) == 1 else f"^{re.escape(name)}"
            found[key] = value
    return dict(sorted(found.items()))


def json_number(value: float | None) -> float | int | None:
    """A whole number as an integer, since readers in other languages expect an integer alpha."""
    return int(value) if value is not None and value == int(value) else value


def _names(entries: tuple[str, ...] | Pattern, path: str) -> bool:
    if isinstance(entries, Pattern):
        return entries.fullmatch(path)
    return any(path == entry or path.endswith(f".{entry}") for entry in entries)


def _inside(path: str, modules: tuple[str, ...]) -> bool:
    """Whether a path is one of these modules or below one, by whole components."""
    return any(f".{m}." in f".{path}." for m in modules)
