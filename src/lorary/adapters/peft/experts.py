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

from torch import Tensor, nn

from lorary.layers.experts import ExpertLayer
from lorary.spec.site import Site

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


def why_not_in_peft(site: Site, layer: nn.Module | None) -> str:
    """Why PEFT's `target_parameters` cannot name a site with experts; empty if it can."""
    order = layer.order if isinstance(layer, ExpertLayer) else ()
    if LAST in order and order.index(LAST) < order.index(site.name.rpartition(".")[2]):
        return f"is registered after {LAST}, and the order of PEFT's wrappers is not known"
    return ""
