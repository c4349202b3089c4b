"""The update of every site as B A alone, for an export, and the reasons why a program cannot hold it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lorary.adapters.adapter import Adapter, without_empty_sites
from lorary.adapters.low_rank_form import LowRankForm, low_rank_forms
from lorary.adapters.peft.joins import is_dora
from lorary.adapters.tensor_checks import tensor_problems
from lorary.errors import Diagnostic, MethodError
from lorary.files.strict_json import show
from lorary.layers.adapted import unwrapped_modules
from lorary.model.checks import layer_mismatches
from lorary.model.fingerprint import Fingerprint
from lorary.model.vocabulary import added_tokens
from lorary.spec.join import KEEP_ATTACHED
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Site

MERGE = "merge it: `lorary export ADAPTER FOLDER --to merged`"


def plain_factors(
    adapter: Adapter, base: nn.Module, program: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[Diagnostic]]:
    """(site -> (B [out, R], A [R, in]) in fp32 with the scale in B, why a program's adapters cannot hold the rest).

    Args:
        adapter: the adapter; sites without a rank direction are left out.
        base: the base; one on the meta device has no weights, as some methods need.
        program: the name of the program, for the messages.
    """
    if wrong := [p for s in adapter.sites for p in _tensor_problems(s, adapter)]:
        return {}, wrong
    adapter = without_empty_sites(adapter)
    weights = None if any(p.is_meta for p in base.parameters()) else base
    forms = _forms(adapter.sites, adapter.tensors, weights)
    factors, problems = {}, []
    for adapted in adapter.sites:
        name = adapted.site.name
        if (form := forms.get(name)) is not None and form.is_plain:
            factors[name] = (form.B, form.A)
        else:
            title = "DoRA" if is_dora(adapted) else type(adapted.join).__name__
            what = f"{title} does more than add B A x, and an adapter for {program} does only that"
            fix = KEEP_ATTACHED if adapted.join.why_not_merged else MERGE
            problems.append(Diagnostic(name, what, fix))
    what = f"is trained in full, and an adapter for {program} holds low-rank updates only"
    problems += [Diagnostic(name, what, MERGE) for name in adapter.full]
    problems += _token_problems(adapter, program)
    if not factors and not problems:
        problems.append(Diagnostic("sites", "no layer has a rank direction left: there is nothing to export"))
    return factors, problems


def _token_problems(adapter: Adapter, program: str) -> list[Diagnostic]:
    """The tokens that were added to the base's tokenizer: a program with the base's own never makes their ids."""
    added = ", ".join(f"{show(text)} ({i})" for text, i in added_tokens(adapter.sites).items())
    what = f"{added}: added to the tokenizer, and {program} reads texts with the base's own"
    return [Diagnostic("tokens", what, f"{MERGE}, which holds the tokenizer as well")] if added else []


def _tensor_problems(adapted: AdaptedSite, adapter: Adapter) -> list[Diagnostic]:
    name = adapted.site.name
    return tensor_problems(name, adapted.stored, adapter.tensors.get(name, {}))


def _forms(
    sites: Sequence[AdaptedSite], tensors: Mapping[str, Mapping[str, Tensor]], base: nn.Module | None
) -> dict[str, LowRankForm]:
    """The forms of the sites that have one; the gain or shift of the others depends on the base's weight."""
    try:
        return low_rank_forms(sites, tensors, base)
    except MethodError:
        if len(sites) == 1:
            return {}
        return {name: form for site in sites for name, form in _forms([site], tensors, base).items()}


def site_problems(adapter: Adapter, base: nn.Module, why_not: Callable[[Site, bool], str]) -> list[Diagnostic]:
    """Why another program cannot put an adapter on this base: another base, a layer that it lacks or that is tied.

    Args:
        adapter: the adapter.
        base: the base, possibly on the meta device.
        why_not: (site, whether it is the embedding or the LM head) -> why the program does not compute an adapter of
            it; empty if it does.
    """
    problems, modules = adapter.base.disagreements(Fingerprint.of(base)), unwrapped_modules(base)
    root: Any = modules[""]
    # a model that is not one of Transformers' has neither
    heads = [getattr(root, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    for site in (adapted.site for adapted in adapter.sites):
        layer = modules.get(site.name)
        head = layer is not None and any(layer is end for end in heads)
        if wrong := layer_mismatches(site, layer):
            problems += wrong
        elif head and root.config.tie_word_embeddings:
            what = "the embedding and the LM head are one weight, which an adapter elsewhere cannot change in both"
            problems.append(Diagnostic(site.name, what, MERGE))
        elif what := why_not(site, head):
            problems.append(Diagnostic(site.name, what, MERGE))
    return problems
