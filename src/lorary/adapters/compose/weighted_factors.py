"""The factors of several adapters side by side along the rank: a mixture is one multiplication by the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.compose.plain_lora import plain_lora
from lorary.adapters.low_rank_form import LowRankForm
from lorary.errors import Diagnostic, MethodError
from lorary.layers.adapted import unwrapped_modules
from lorary.layers.quantized_weight import stored_tensors
from lorary.model.checks import layer_mismatches
from lorary.spec.interfaces import Factors, Unquantized
from lorary.spec.placement import AdaptedSite

Forms = Mapping[str, LowRankForm]


class WeightedFactors:
    """The mixture of adapters as a function of their weights; its factors are on the devices of the base's layers.

    Args:
        model: the base of all.
        adapters: by name.
        summed: whether the factors are added, (sum of w_i B_i) (sum of w_i A_i), instead of the updates.

    Raises:
        MethodError: they have no sum in this form; every reason.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter], *, summed: bool) -> None:
        forms, problems = _forms(model, adapters)
        problems = problems or (_unequal(list(adapters), forms) if summed else [])
        if problems:
            raise MethodError("these adapters have no weighted sum:", problems)
        first, *others = adapters.values()
        same = all(adapter.method.storage == first.method.storage for adapter in others)
        self.storage = first.method.storage if same else Unquantized()
        self.base, self.context, self.count, self.summed = first.base, first.method.context, len(adapters), summed
        modules = unwrapped_modules(model)
        every = [a for one in adapters.values() for a in one.sites]
        # NF4 makes transposed layers linear; without ties, because each adapter may tie other sites
        fitting = sorted(every, key=lambda a: not layer_mismatches(a.site, modules.get(a.site.name)))
        found = {a.site.name: AdaptedSite(a.site, a.method) for a in fitting}
        self.sites = tuple(found[name] for name in dict.fromkeys(a.site.name for a in every))
        self._stacks = {name: _stacked(name, forms, stored_tensors(modules[name])[0].device) for name in found}

    def at(self, site: str, weights: Sequence[float]) -> Factors:
        """(B [out, R], A [R, in]) of a site for these weights."""
        B, A, owner = self._stacks[site]
        w = torch.tensor(weights, dtype=B.dtype, device=B.device)[owner]
        if not self.summed:
            return B * w, A
        return (B * w).unflatten(1, (self.count, -1)).sum(1), (A * w[:, None]).unflatten(0, (self.count, -1)).sum(0)

    def adapter(self, weights: Sequence[float]) -> Adapter:
        """The mixture as an adapter, on the CPU."""
        at = {a.site.name: self.at(a.site.name, weights) for a in self.sites}
        copies = {name: (B.cpu(), A.to("cpu", copy=True)) for name, (B, A) in at.items()}
        return Adapter(*plain_lora(self.sites, copies, storage=self.storage, context=self.context), base=self.base)


def _stacked(site: str, forms: Sequence[Forms], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(B [out, sum of R], A [sum of R, in], the adapter of each rank [sum of R]) of a site."""
    found = [(i, form[site]) for i, form in enumerate(forms) if site in form]
    owner = torch.cat([torch.full((one.A.shape[0],), i) for i, one in found])
    B, A = torch.cat([one.B for _, one in found], 1), torch.cat([one.A for _, one in found])
    return B.to(device), A.to(device), owner.to(device)


def _forms(model: nn.Module, adapters: Mapping[str, Adapter]) -> tuple[list[Forms], list[Diagnostic]]:
    """The low-rank forms of every adapter, and the reasons why they have no weighted sum."""
    forms: list[Forms] = []
    modules, problems = unwrapped_modules(model), []
    for name, adapter in adapters.items():
        missing = [a.site.name for a in adapter.sites if a.site.name not in modules]
        problems += [Diagnostic(f"{name}: {site}", "the base has no such layer") for site in missing]
        if adapter.full:
            what = f"trains base parameters in full, such as {min(adapter.full)}, which have no factors to weigh"
            problems.append(Diagnostic(name, what, "lorary.mix adds them with weights that you give"))
        try:
            forms.append(adapter.low_rank(model))
        except MethodError as error:
            problems += [Diagnostic(f"{name}: {p.where}", p.what, p.fix) for p in error.problems]
        else:
            what = "gives its output a gain or a shift of its own, which no weight scales"
            wrong = [site for site, form in forms[-1].items() if not form.is_plain]
            problems += [Diagnostic(f"{name}: {site}", what) for site in wrong]
    return forms, problems


def _unequal(names: Sequence[str], forms: Sequence[Forms]) -> list[Diagnostic]:
    """Why the factors of adapters cannot be added one to one: other sites, or other ranks."""
    first, *others = [{site: form.A.shape[0] for site, form in found.items()} for found in forms]
    return [
        Diagnostic(
            f"{name}: {site}",
            f"has {_rank(ranks.get(site))}, and {_rank(first.get(site))} in {names[0]}: the factors do not add",
            'use form="product"',
        )
        for name, ranks in zip(names[1:], others, strict=True)
        for site in sorted(ranks.keys() | first.keys())
        if ranks.get(site) != first.get(site)
    ]


def _rank(r: int | None) -> str:
    return "no adapter" if r is None else f"rank {r}"
