"""What the exports share: the update of every site as B A alone, and the reasons why a program has no place for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.low_rank_form import low_rank_forms
from lorary.adapters.peft.lora import is_dora
from lorary.errors import Diagnostic, MethodError
from lorary.layers.adapted import unwrapped_modules
from lorary.model.checks import layer_mismatches
from lorary.model.fingerprint import Fingerprint
from lorary.spec.site import Site

MERGE = "merge it: `lorary export ADAPTER FOLDER --to merged`"


def without_empty_sites(adapter: Adapter) -> Adapter:
    """The adapter without pruned rank directions, and without the sites that have none left (AdaLoRA)."""
    adapter = adapter.compact()
    left = tuple(a for a in adapter.sites if any(map(min, a.shapes.values())))
    return dataclasses.replace(adapter, sites=left)


def plain_factors(
    adapter: Adapter, base: nn.Module, program: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[Diagnostic]]:
    """(site -> (B [out, R], A [R, in]) in fp32 with the scale in B, why a program's adapters cannot hold the rest).

    Args:
        adapter: the adapter; sites without a rank direction are left out.
        base: the base; one on the meta device has no weights, as some methods need.
        program: the name of the program, for the messages.
    """
    adapter = without_empty_sites(adapter)
    weights = None if any(p.is_meta for p in base.parameters()) else base
    factors, problems = {}, []
    for adapted in adapter.sites:
        name = adapted.site.name
        try:
            form = low_rank_forms([adapted], adapter.tensors, weights)[name]
        except MethodError:  # its gain or shift depends on the base's weight
            form = None
        if form is not None and form.is_plain:
            factors[name] = (form.B, form.A)
        else:
            title = "DoRA" if is_dora(adapted) else type(adapted.join).__name__
            what = f"{title} does more than add B A x, and an adapter for {program} does only that"
            problems.append(Diagnostic(name, what, MERGE))
    what = f"is trained in full, and an adapter for {program} holds low-rank updates only"
    problems += [Diagnostic(name, what, MERGE) for name in adapter.full]
    if not factors and not problems:
        problems.append(Diagnostic("sites", "no layer has a rank direction left: there is nothing to export"))
    return factors, problems


def site_problems(adapter: Adapter, base: nn.Module, why_not: Callable[[Site], str]) -> list[Diagnostic]:
    """Why another program cannot put an adapter on this base: another base, a layer that it lacks or that is tied.

    Args:
        adapter: the adapter.
        base: the base, possibly on the meta device.
        why_not: site -> why the program does not compute an adapter of it; empty if it does.
    """
    problems, modules = adapter.base.disagreements(Fingerprint.of(base)), unwrapped_modules(base)
    root: Any = modules[""]
    for adapted in adapter.sites:
        site = adapted.site
        if wrong := layer_mismatches(site, modules.get(site.name)):
            problems += wrong
        elif is_head(site, root) and root.config.tie_word_embeddings:
            what = "the embedding and the LM head are one weight, which an adapter elsewhere cannot change in both"
            problems.append(Diagnostic(site.name, what, MERGE))
        elif what := why_not(site):
            problems.append(Diagnostic(site.name, what, MERGE))
    return problems


def is_head(site: Site, model: Any) -> bool:
    """Whether a site is the token embedding or the LM head."""
    if not hasattr(model, "get_input_embeddings"):  # not a model of Transformers
        return False
    return unwrapped_modules(model)[site.name] in (model.get_input_embeddings(), model.get_output_embeddings())
