"""The low-rank form: the update of any adapter at one site, relative to the unmodified base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, MethodError, deduplicated, not_a
from lorary.layers.adapted import unwrapped_modules
from lorary.layers.kinds import as_matrix
from lorary.model.checks import layer_mismatches
from lorary.model.residual_base import original_weight
from lorary.spec.per_expert import joined_tensors
from lorary.spec.placement import AdaptedSite, start_name


class LowRankForm(NamedTuple):
    """y = gain * (W x + B A x) + b + shift at one site; with a leading E for the experts of a block.

    Args:
        B: [out, R], with the scale in it.
        A: [R, in].
        gain: [out], or None for 1.
        shift: [out], or None for 0.
    """

    B: Tensor
    A: Tensor
    gain: Tensor | None = None
    shift: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the update is B A alone."""
        return self.gain is None and self.shift is None


def low_rank_forms(
    sites: Sequence[AdaptedSite], tensors: Mapping[str, Mapping[str, Tensor]], base: nn.Module | None = None
) -> dict[str, LowRankForm]:
    """site -> its form, in fp32. The start of a residual base is subtracted, which doubles the rank.

    Args:
        sites: the adapted sites.
        tensors: site -> role -> tensor.
        base: the base, with or without an adapter, for the joins whose gain or shift depends on its weights.

    Raises:
        MethodError: a join has no such form, or none without the base; the base lacks a layer. Each reason once.
    """
    if problems := not_a(nn.Module | None, "a torch.nn.Module", base=base):
        raise MethodError("this adapter has no low-rank form:", problems)
    forms = {}
    modules = unwrapped_modules(base) if base is not None else {}
    for adapted in sites:
        name = adapted.site.name
        try:
            forms[name] = form_at(adapted, tensors[name], BaseLayer(base, adapted, modules.get(name)))
        except MethodError as error:
            problems += [Diagnostic(name, problem.what, problem.fix) for problem in error.problems]
    if problems:
        raise MethodError("this adapter has no low-rank form:", deduplicated(problems))
    return forms


def form_without_base(adapted: AdaptedSite, tensors: Mapping[str, Tensor]) -> LowRankForm | None:
    """The form of one site, in fp32; None if it has none, or its gain or shift depends on the base's weight."""
    try:
        return form_at(adapted, tensors, BaseLayer(None, adapted, None))
    except MethodError:
        return None


def form_at(adapted: AdaptedSite, tensors: Mapping[str, Tensor], layer: BaseLayer) -> LowRankForm:
    """The form of one site, in fp32.

    Raises:
        MethodError: the join has no such form, or none without the base; the base lacks the layer.
    """
    update = factors_on_base(adapted, tensors)
    own = joined_tensors(adapted.join, adapted.site, tensors, adapted.scale)
    BA, gain, shift = adapted.join.on_output(own, layer.weight, layer.bias, update)
    return LowRankForm(*BA, gain, shift)


def factors_on_base(adapted: AdaptedSite, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(s B [out, R], A [R, in]) of a site in fp32, as an update of the unmodified weight, without its join."""
    exact = {role: t.float() for role, t in tensors.items()}  # products of bf16 tensors (VeRA's b B d) would be rounded
    B, A = adapted.factors(exact)
    if adapted.starts:
        start = {role: exact[start_name(role)] for role in adapted.starts}
        B0, A0 = adapted.factors(start)
        B, A = torch.cat([B, -B0], -1), torch.cat([A, A0], -2)
    return adapted.scale * B, A


@dataclass(frozen=True, eq=False)
class BaseLayer:
    """The base's layer at a site, checked once, when its weight or bias is first asked for.

    Args:
        base: the base; None if it is not known.
        adapted: the site.
        layer: the layer.
        values: parameter of the layer -> the value to use instead of the base's.
    """

    base: nn.Module | None
    adapted: AdaptedSite
    layer: nn.Module | None
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def weight(self) -> Tensor:
        """The unmodified weight [out, in], in fp32 on the CPU."""
        base, layer = self._checked
        W = self.values.get("weight")
        W = original_weight(base, self.adapted.site.name) if W is None else W
        return as_matrix(layer, W).cpu().float()

    def bias(self) -> Tensor | None:
        """The bias [out], in fp32 on the CPU."""
        b = self.values.get("bias", getattr(self._checked[1], "bias", None))
        return None if b is None else b.detach().cpu().float()

    @cached_property
    def _checked(self) -> tuple[nn.Module, nn.Module]:
        if self.base is None:
            what = f"{type(self.adapted.join).__name__} has no such form without the base's weight"
            raise MethodError("", [Diagnostic(self.adapted.site.name, what, "give the base")])
        if wrong := layer_mismatches(self.adapted.site, self.layer):
            raise MethodError("", wrong)
        return self.base, cast(nn.Module, self.layer)
