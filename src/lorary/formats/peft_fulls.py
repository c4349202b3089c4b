"""The base parameters that a PEFT file holds whole: `modules_to_save`, biases, and copies that nobody asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorary.adapted import base_parameters
from lorary.errors import Problem
from lorary.formats.findings import Findings
from lorary.formats.peft_config import PeftConfig
from lorary.formats.safetensors_header import Entry

_BASE = ".base_layer."


@dataclass
class Fulls:
    """Which names of a file are base parameters.

    Args:
        expected: name -> shape of those that replace the base's value.
        parameters: name -> the base parameter's path; tied parameters go by the first of their paths.
        copies: name -> the base parameter's path, for the copies of adapted embeddings' tables that PEFT adds by
            itself; they must be what the base has, and are then dropped.
        base: the model's parameters by path; None without a model.
    """

    expected: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    base: Mapping[str, Tensor] | None = None

    def values(self, values: Mapping[str, Tensor], findings: Findings) -> dict[str, Tensor]:
        """Base parameter -> its value; two names of one tied parameter have to agree."""
        full: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if name not in values:
                continue
            if parameter in full and not torch.equal(full[parameter], values[name]):
                what = f"differs from {parameter}, to which it is tied in this model"
                findings.fatal.append(Problem(name, what, "untie the base's weights before loading"))
            full.setdefault(parameter, values[name])
        return full

    def check_copies(self, values: Mapping[str, Tensor], findings: Findings) -> None:
        """Compares the copies with the base; where they differ, PEFT would overwrite the base with them."""
        for name, parameter in self.copies.items():
            if self.base is None:
                findings.notes.append(f"{name} is a copy of the base's own table; it was left out")
            elif not torch.equal(self.base[parameter].detach().to("cpu", values[name].dtype), values[name]):
                what = "is a copy of the base's own table, and this model's is another"
                findings.tolerable.append(Problem(name, what, "load the base that it was trained on"))


def full_tensors(
    config: PeftConfig,
    model: nn.Module | None,
    sites: set[str],
    found: Mapping[str, Entry],
    findings: Findings,
) -> Fulls:
    """Sorts out which of a file's tensors are base parameters.

    Args:
        config: the file's configuration.
        model: the base, or None.
        sites: the paths of the adapted modules.
        found: the names of the file, without prefix.
        findings: where tied parameters that would come apart go.
    """
    base = dict(base_parameters(model)) if model is not None else None
    fulls = Fulls(base=base)
    first = _first_names(base or {})
    for name, entry in found.items():
        site, inside, leaf = name.rpartition(_BASE)
        parameter = f"{site}.{leaf}" if inside and site in sites else name
        if inside and site in sites and leaf == "weight":
            if base is None or (parameter in base and base[parameter].shape == entry.shape):
                fulls.copies[name] = parameter
        elif _meant(config, parameter, site in sites) and (base is None or parameter in base):
            fulls.parameters[name] = first.get(parameter, parameter)
            fulls.expected[name] = entry.shape if base is None else tuple(base[parameter].shape)
    for parameter, tensor in (base or {}).items():
        if config.keeps(parameter):
            fulls.parameters.setdefault(parameter, first[parameter])
            fulls.expected[parameter] = tuple(tensor.shape)
    _check_ties(config, fulls, first, findings)
    return fulls


def _meant(config: PeftConfig, parameter: str, at_site: bool) -> bool:
    is_bias = "bias" in parameter.rpartition(".")[2]
    return config.keeps(parameter) or (
        is_bias and (config.bias == "all" or (config.bias.endswith("_only") and at_site))
    )


def _first_names(base: Mapping[str, Tensor]) -> dict[str, str]:
    """Every path of every parameter -> the first of the paths that lead to it."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in base.items()}


def _check_ties(config: PeftConfig, fulls: Fulls, first: Mapping[str, str], findings: Findings) -> None:
    """PEFT trains a copy of a module that it keeps, so that what was tied to it stays what it was."""
    for name in sorted(n for n in fulls.parameters if config.keeps(n) and n in first):
        others = [n for n, f in first.items() if f == first[name] and n not in fulls.parameters]
        if others:
            what = f"is tied to {', '.join(others)} in this model, and PEFT trained a copy of its own"
            findings.fatal.append(Problem(name, what, "untie the base's weights before loading"))
