"""The base parameters in a PEFT file: `modules_to_save`, biases, and the copies of tables that PEFT adds by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import PeftConfig
from lorary.errors import Diagnostic
from lorary.files.findings import Findings
from lorary.files.tensor_file import Entry
from lorary.layers.adapted import base_parameters, unwrapped_modules
from lorary.model.base import Base

_BASE = ".base_layer."
_KEPT = (".modules_to_save.", ".original_module.")  # parts of PEFT's wrapper of a module in `modules_to_save`
UNTIE = "untie the base's weights before loading: lorary.untie_embeddings(model)"


@dataclass
class ModulesToSave:
    """The base parameters in a file.

    Args:
        expected: name -> shape of those that replace the base's value.
        parameters: name -> the base parameter's path; for tied parameters the first of their paths.
        copies: name -> the base parameter's path, for the tables of embeddings that PEFT adds by itself
            (`save_embedding_layers`). They are dropped if they equal the base's. The rows of a resized vocabulary are
            drawn again at every load: a table that differs in these alone replaces the base's, as in PEFT.
        kept: name -> the name of the trained module, for PEFT's own copies of it and of the module from before.
        base: the model's parameters by path; None without a model.
        names: base parameter -> the name in the file whose value it has.
    """

    expected: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    base: Mapping[str, Tensor] | None = None
    names: dict[str, str] = field(default_factory=dict)

    def values(self, values: Mapping[str, Tensor], findings: Findings) -> dict[str, Tensor]:
        """Base parameter -> its value; two names of one tied parameter must agree."""
        full: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if name not in values:
                continue
            if parameter in full and not torch.equal(full[parameter], values[name]):
                what = f"differs from that of {self.names[parameter]}, to which it is tied in this model"
                findings.fatal.append(Diagnostic(name, what, UNTIE))
            full.setdefault(parameter, values[name])
            self.names.setdefault(parameter, name)
        return full

    def check_copies(self, values: Mapping[str, Tensor], findings: Findings) -> None:
        """Compare the copies with the base, which PEFT overwrites with them; those that differ replace its tables."""
        if self.kept:
            findings.notes.append(f"{', '.join(sorted(self.kept))}: left out, PEFT's own copies of a saved module")
        for name, trained in self.kept.items():
            if _KEPT[0] in name and not torch.equal(values[name], values[trained]):
                findings.fatal.append(Diagnostic(name, f"differs from {trained}, of which it is a copy"))
        first: dict[int, str] = {}
        for parameter, tensor in (self.base or {}).items():
            first.setdefault(id(tensor), parameter)
        for name, parameter in self.copies.items():
            if self.base is None:
                findings.notes.append(f"{name} is a copy of the base's own table; it was left out")
                continue
            if name not in values:
                continue
            own = self.base[parameter]
            differ = (own.detach().to("cpu", values[name].dtype) != values[name]).flatten(1).any(1)
            if not differ.any():
                continue
            changed = int(differ.nonzero()[0])
            if 2 * changed > len(differ):  # the rows of a resized vocabulary, and not another table
                findings.notes.append(f"{name} replaces the base's table: it has other rows from {changed:,} on")
                self.parameters[name] = first[id(own)]
            elif _BASE in name:
                what = "is a copy of the base's own table, and this model's is another"
                findings.tolerable.append(Diagnostic(name, what, "load the base that it was trained on"))
            else:
                what = "would overwrite a weight of the base, and `modules_to_save` does not list it"
                findings.tolerable.append(Diagnostic(name, what))


def modules_to_save(
    config: PeftConfig, base: Base | None, sites: set[str], found: Mapping[str, Entry], findings: Findings
) -> ModulesToSave:
    """The base parameters among a file's tensors.

    Args:
        config: the file's configuration.
        base: the base, if at hand.
        sites: the paths of the adapted modules.
        found: the file's tensors by short name.
        findings: collects tied parameters that would be untied.
    """
    tensors, first = (None, {}) if base is None else (base.tensors, base.first_names)
    saved = ModulesToSave(base=tensors)
    paths = base.vocabulary if base is not None else ()
    own = tensors or {}
    tables = {name: tuple(own[name].shape) for name in (f"{path}.weight" for path in paths) if name in own}
    for name, entry in found.items():
        kept = next((part for part in _KEPT if part in name), "")
        if kept and name.replace(kept, ".") in found:
            saved.kept[name] = name.replace(kept, ".")
            continue
        site, inside, leaf = name.rpartition(_BASE)
        parameter = f"{site}.{leaf}" if inside and site in sites else name
        if inside and site in sites and leaf == "weight":
            if tensors is None or (parameter in tensors and tensors[parameter].shape == entry.shape):
                saved.copies[name] = parameter
        elif name in tables and tables[name] == entry.shape and not _asked_for(config, parameter, False, first):
            saved.copies[name] = parameter
        elif _asked_for(config, parameter, site in sites, first) and (tensors is None or parameter in tensors):
            saved.parameters[name] = first.get(parameter, parameter)
            saved.expected[name] = entry.shape if tensors is None else tuple(tensors[parameter].shape)
    for parameter, tensor in (tensors or {}).items():
        if config.saves_module_of(parameter):
            saved.parameters.setdefault(parameter, first[parameter])
            saved.expected[parameter] = tuple(tensor.shape)
    _check_ties(config, saved, first, findings)
    return saved


def _asked_for(config: PeftConfig, parameter: str, at_site: bool, first: Mapping[str, str]) -> bool:
    """Whether the configuration asks for a base parameter, or with `ensure_weight_tying` for one tied to it."""
    is_bias = "bias" in parameter.rpartition(".")[2]
    tied = [parameter]
    if config.values.get("ensure_weight_tying") and config["modules_to_save"]:
        tied += [name for name, one in first.items() if one == first.get(parameter)]
        if not first and parameter.endswith(".weight"):
            return True  # only the base tells which weights are tied
    return any(map(config.saves_module_of, tied)) or (
        is_bias and (config["bias"] == "all" or (config["bias"].endswith("_only") and at_site))
    )


def _check_ties(config: PeftConfig, saved: ModulesToSave, first: Mapping[str, str], findings: Findings) -> None:
    """PEFT copies `modules_to_save`, so weights tied to the original do not change, unless they are kept tied."""
    if config.values.get("ensure_weight_tying"):
        return
    for name in sorted(n for n in saved.parameters if config.saves_module_of(n) and n in first):
        others = [n for n, f in first.items() if f == first[name] and n not in saved.parameters]
        if others:
            what = f"is tied to {', '.join(others)} in this model, and PEFT trained a separate copy"
            findings.fatal.append(Diagnostic(name, what, UNTIE))


def tied_copies(adapter: Adapter, model: nn.Module | None) -> dict[str, str]:
    """A tied end of a vocabulary -> the other one, which the adapter trains in full: PEFT's files hold a copy of each.

    Only where these two alone are tied: with more of them (T5, BART) PEFT puts the head in the place of the embeddings.
    """
    if model is None or not adapter.full:
        return {}
    parameters = dict(base_parameters(model))
    ends = [f"{path}.weight" for path in Base(model).vocabulary]
    table = parameters.get(ends[0]) if len(ends) == 2 else None
    tied = [name for name, t in parameters.items() if t is table]
    trained = [name for name in tied if name in adapter.full]
    if not trained or sorted(tied) != sorted(ends):
        return {}
    return {name: trained[0] for name in tied if name != trained[0]}


def modules_and_biases(adapter: Adapter, model: nn.Module | None) -> tuple[list[str], str, list[Diagnostic]]:
    """`modules_to_save` and `bias` for an adapter's base parameters, and why PEFT cannot save them."""
    sites = {adapted.site.name for adapted in adapter.sites}
    written = [name for name in sorted(adapter.full) if name.removesuffix(".weight") in sites]
    if written:  # Delta-LoRA's, and those of a new head
        what = "is an adapted weight that the adapter holds too, and PEFT never saves the weights that it adapts"
        return [], "none", [Diagnostic(name, what, "merge the adapter, and save the model") for name in written]
    biases = {name for name in adapter.full if name.rpartition(".")[2] == "bias"}
    others = sorted(set(adapter.full) - biases)
    if not others:
        return [], "all" if biases else "none", []
    if model is None:
        where = others[0] + (f", and {len(others) - 1:,} more" if len(others) > 1 else "")
        what = "is trained in full, and only the model knows whether its whole module is"
        return [], "none", [Diagnostic(where, what, "give the model too: model=, or --base on the command line")]
    modules, parameters = unwrapped_modules(model), dict(base_parameters(model))
    copies = tied_copies(adapter, model)
    paths = sorted({name.rpartition(".")[0] for name in (*others, *copies)})
    full = {*adapter.full, *copies}
    problems = [p for path in paths for p in _why_not_saved(path, modules, parameters, full)]
    problems += [
        Diagnostic(name, f"is tied to {one}, and PEFT never saves the weights that it adapts", "merge the adapter")
        for name, one in copies.items()
        if name.removesuffix(".weight") in sites
    ]
    apart = [name for name in biases if name.rpartition(".")[0] not in paths]
    return paths, "all" if apart else "none", problems


def _why_not_saved(
    path: str, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor], full: set[str]
) -> list[Diagnostic]:
    """Why `modules_to_save` cannot hold the module at `path`."""
    inside = {name: t for name, t in parameters.items() if name.startswith(f"{path}.")}
    state = {f"{path}.{name}" for name in modules[path].state_dict()} if path in modules else set()
    left_out = sorted((set(inside) | state) - full)
    others = {name: t for name, t in parameters.items() if name not in inside and name not in full}
    ties = sorted(name for name, t in others.items() if any(t is own for own in inside.values()))
    same = sorted(name for name in modules if name.endswith(path) and name != path)
    reasons = {
        "PEFT saves modules, and this is a parameter of the model itself": not path,
        f"PEFT saves whole modules, and {', '.join(left_out[:3])} is not trained": bool(left_out),
        f"PEFT would take {', '.join(same[:3])} for it": bool(same),
        f"PEFT would untie it from {', '.join(ties[:3])}": bool(ties),
    }
    return [Diagnostic(path, reason) for reason, holds in reasons.items() if holds]
