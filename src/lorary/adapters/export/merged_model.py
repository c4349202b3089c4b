"""The merged model without its weights: its configuration, and the tensors that the base's checkpoint lacks."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from lorary.adapters.adapter import Adapter
from lorary.errors import Diagnostic, FileError, StateError
from lorary.model.bias_flags import enable_bias_flags, unserialisable_biases
from lorary.model.loading.base_weights import BaseWeights
from lorary.model.scan import scan
from lorary.model.tied_config import untie_config
from lorary.spec.placement import replaces_rows


class MergedModel(NamedTuple):
    """A merged model as far as it differs from its base in more than values.

    Args:
        model: on the meta device, with the merged model's configuration.
        untied: whether the modules that share a parameter in the base have one each.
        added: the parameters that the base's checkpoint lacks.
        zero: among these, the biases that only exist because another one's flag brings them along.
    """

    model: Any
    untied: bool
    added: tuple[str, ...]
    zero: frozenset[str]


def merged_model(adapter: Adapter, base: BaseWeights) -> MergedModel:
    """The merged model of an adapter on a base.

    Raises:
        FileError: the base's checkpoint lacks parameters.
        StateError: the architecture has no checkpoint of the merged model; every reason.
    """
    model, modules = copy.deepcopy(base.model), scan(base.model).modules
    if adapter.method.context is not None:
        adapter.method.context.apply(model).make_permanent()
    if missing := base.missing(adapter.full):
        fix = "the folder is incomplete, or its config.json is another model's"
        raise FileError("cannot read the base:", [Diagnostic(name, "is in none of its files", fix) for name in missing])
    lacking = [n for n in base.names if n not in base.groups and n not in base.own]
    untied = any(
        modules[a.site.name].tied_to for a in adapter.sites if a.site.name not in _tied_together(adapter, base)
    )
    if untied:
        untie_config(model)
    added = [name for name in lacking if name in adapter.full or (untied and base.has(name))]
    created = {f"{a.site.name}.bias": a.site for a in adapter.sites if a.changes_bias and not a.site.bias}
    for site in created.values():
        empty = torch.empty(site.out_features, dtype=base.dtype(f"{site.name}.weight"), device="meta")
        model.get_submodule(site.name).bias = nn.Parameter(empty, requires_grad=False)
    flags = enable_bias_flags(model, created.keys())
    zero = [f"{path}.bias" for path, module in model.named_modules() if module in flags.added]
    problems = unserialisable_biases(model) if created else []
    if problems := problems + (_still_tied(model) if untied else []):
        raise StateError("cannot save the merged model:", problems)
    return MergedModel(model, untied, (*added, *created, *zero), frozenset(zero))


def _tied_together(adapter: Adapter, base: BaseWeights) -> set[str]:
    """The sites whose merged weights stay tied: all uses of the weight have the same rows."""
    shares: dict[str, set[str]] = {}
    for a in adapter.sites:
        if replaces_rows(a) and a.share:
            shares.setdefault(a.share, set()).add(f"{a.site.name}.weight")
    return {
        name.removesuffix(".weight")
        for own in shares.values()
        for name in own
        if own == set(base.sharing(name)) & base.names.keys()
    }


def _still_tied(model: Any) -> list[Diagnostic]:
    """The parameters that this class shares between modules, whatever its configuration says."""
    with torch.device("meta"):
        built = scan(type(model)(copy.deepcopy(model.config)))
    what = "is shared with {}, and the adapter gives them different values; this class ties them in every checkpoint"
    fix = "keep the adapter beside its base"
    return [
        Diagnostic(f"{path}.weight", what.format(", ".join(m.tied_to)), fix)
        for path, m in built.modules.items()
        if m.tied_to
    ]
