"""PEFT's `target_parameters` of fused experts: the names and the layout of their factors.

PEFT wraps the experts module once for each parameter, in the order in which the module registers them, so the name of a
parameter is in no key: the first one is the innermost.

    <experts>.base_layer.lora_A.weight   gate_up_proj     (E r, in)  expert by expert
    <experts>.base_layer.lora_B.weight                    (out, r E) rank by rank
    <experts>.lora_A.weight              down_proj

A class that stores [E, in, out] and does not say so (Llama 4) has its inputs taken for its outputs: A and B swapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lorary.adapters.peft.config import NAME as CONFIG
from lorary.adapters.peft.config import PeftConfig
from lorary.errors import Diagnostic, FileError
from lorary.files.findings import Findings
from lorary.files.strict_json import show
from lorary.layers.experts import ExpertLayer
from lorary.model.base import Base
from lorary.spec.site import Site

RANK_MAJOR, GROUPED = "rank_major", "grouped_by_expert"  # as Unsloth writes it into the configuration
LAYOUTS = (RANK_MAJOR, GROUPED)
UNTOLD = "--expert-layout grouped_by_expert for files from before September 2026, else rank_major"
OTHER_RANK = "if the rank was divided over the experts, write the rank of one into `r` or `rank_pattern`"
LAST = "down_proj"  # every class of experts registers it after `gate_up_proj` or `up_proj`


def paths_in_file(sites: Iterable[Site]) -> dict[str, str]:
    """Name of a site with experts -> the path that its factors have in PEFT's file."""
    inside: dict[str, list[str]] = {}
    for site in sites:
        if site.experts:
            owner, _, name = site.name.rpartition(".")
            inside.setdefault(owner, []).append(name)
    found = {}
    for owner, names in inside.items():
        ordered = sorted(names, key=lambda name: name == LAST)
        for depth, name in enumerate(reversed(ordered)):
            found[f"{owner}.{name}"] = owner + depth * ".base_layer"
    return found


def to_file(tensors: Mapping[str, Tensor], sites: Iterable[Site]) -> dict[str, Tensor]:
    """Tensors by their names in PEFT's file, for names `<site>.lora_A.weight`."""
    return {_moved(name, paths_in_file(sites)): t for name, t in tensors.items()}


def from_file(names: Mapping[str, str], sites: Iterable[Site]) -> dict[str, str]:
    """The keys of a table by short names as PEFT writes them, with the sites' own names."""
    back = {path: site for site, path in paths_in_file(sites).items()}
    return {_moved(name, back): value for name, value in names.items()}


def _moved(name: str, paths: Mapping[str, str]) -> str:
    path, found, leaf = name.rpartition(".lora_")
    return f"{paths[path]}{found}{leaf}" if found and path in paths else name


def shapes(site: Site, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of `lora_A` and `lora_B` at rank r."""
    out, inp = site.out_features, site.in_features
    out, inp = (inp, out) if site.swapped else (out, inp)
    return (site.experts * r, inp), (out, r * site.experts)


def encode(site: Site, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(`lora_A`, `lora_B`) of the factors A [E, R, in] and B [E, out, R]."""
    A, B = (B.mT, A.mT) if site.swapped else (A, B)
    return A.flatten(0, 1).contiguous(), B.permute(1, 2, 0).flatten(1).contiguous()


def decode(site: Site, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """(A [E, R, in], B [E, out, R]) of PEFT's tensors."""
    E = site.experts
    A = lora_A.reshape(E, -1, lora_A.shape[1])
    B = lora_B.reshape(len(lora_B), -1, E).permute(2, 0, 1)
    A, B = (B.mT, A.mT) if site.swapped else (A, B)
    return A.contiguous(), B.contiguous()


def checked_shape(site: Site, role: str, shape: tuple[int, ...], found: tuple[int, ...]) -> tuple[int, ...]:
    """The expected shape of a factor, where another one is no matter of the rank.

    Raises:
        FileError: the file has another rank for each expert than the configuration says.
    """
    dim, E = "AB".index(role), site.experts
    if len(found) != 2 or found[1 - dim] != shape[1 - dim] or found[dim] % E:
        return shape
    ranks = f"rank {found[dim] // E} for each of {E} experts, and the configuration says {shape[dim] // E}"
    what = f"has the shape {list(found)}, expected {list(shape)}: {ranks}"
    raise FileError("", [Diagnostic(f"{site.name}.lora_{role}.weight", what, OTHER_RANK)])


def order_columns(
    sites: Iterable[Site], values: dict[str, Tensor], config: Mapping[str, Any], told: str | None, findings: Findings
) -> None:
    """Bring the columns of `lora_B` of fused experts into PEFT's order: rank by rank.

    Args:
        sites: of a file.
        values: its tensors by their short names.
        config: the fields of its configuration.
        told: the order in the file, if the caller knows it.
        findings: gets the reason why it is not known.
    """
    fused = [site for site in sites if site.experts]
    if not fused:
        what = "is told, and the file has no factors of fused experts"
        findings.fatal += [Diagnostic("expert_layout", what, "leave it out")] if told else []
        return
    with findings.gathering(CONFIG):
        if _layout_of_file(config, told) == RANK_MAJOR:
            return
        for name, E in ((f"{site.name}.lora_B.weight", site.experts) for site in fused):
            if name in values:
                values[name] = values[name].unflatten(1, (E, -1)).transpose(1, 2).flatten(1).contiguous()
        findings.notes.append("the columns of lora_B of fused experts were ordered expert by expert")


def _layout_of_file(config: Mapping[str, Any], told: str | None) -> str:
    """The order of the columns of `lora_B` in a file of fused experts.

    PEFT has them rank by rank. Unsloth had them expert by expert until September 2026, and says since then which.

    Args:
        config: the fields of the file's configuration.
        told: the order, if the caller knows it.

    Raises:
        FileError: it is not known, or told otherwise than the file says.
    """
    where, marked = f"{CONFIG}: lora_B_layout", config.get("lora_B_layout")
    if told and marked and told != marked:
        raise FileError("", [Diagnostic(where, f"is {marked}, and {told} is asked for", "leave the layout out")])
    if told or marked:
        return str(told or marked)
    if (config.get("auto_mapping") or {}).get("unsloth_fixed"):
        what = "is not there, and Unsloth has ordered the columns of experts in two ways"
        raise FileError("", [Diagnostic(where, what, f"say which: {UNTOLD}")])
    return RANK_MAJOR


def why_not_in_peft(site: Site, layer: nn.Module | None) -> str:
    """Why PEFT's `target_parameters` cannot name a site with experts; empty if it can."""
    order = layer.order if isinstance(layer, ExpertLayer) else ()
    if LAST in order and order.index(LAST) < order.index(site.name.rpartition(".")[2]):
        return f"is registered after {LAST}, and the order of PEFT's wrappers is not known"
    return ""


def experts_named(config: PeftConfig, base: Base | None, findings: Findings) -> list[Site]:
    """The fused experts that `target_parameters` names in the base.

    Raises:
        FileError: it names some, and the base is not at hand.
    """
    named = [name for name in config.values.get("target_parameters") or () if not name.endswith(".weight")]
    if named and base is None:
        what = f"names fused experts ({', '.join(named[:2])}), whose layout only the model's class tells"
        fix = "read it onto its base: lorary.load(model, folder), or --base on the command line"
        raise FileError("", [Diagnostic(f"{CONFIG}: target_parameters", what, fix)])
    if base is None:
        return []
    fused = [path for path, kind in base.kinds.items() if kind == "experts"]
    found = [path for path in fused if config.targets_parameter(path)]
    if named and not found:
        what = f"names {', '.join(map(show, named[:3]))}: the model has no such parameter of experts that is known"
        findings.fatal.append(Diagnostic(f"{CONFIG}: target_parameters", what))
    if found and config.values.get("use_dora"):
        what = "is true, and PEFT has no magnitudes for the experts in `target_parameters`"
        findings.fatal.append(Diagnostic(f"{CONFIG}: use_dora", what))
        findings.raise_refused()
    return [base.site(path) for path in found]
