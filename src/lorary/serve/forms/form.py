"""The serving form of an adapter, made once, when it is loaded.

At a site of the low-rank form y = g (W x + B A x) + b + c, and with y0 = W x + b:

    y = g y0 + (g B)(A x) + c + b' - g b        where b' is the bias, which the adapter may have trained

A site whose update has no such form (GLoRA with a low-rank A), or whose weight the adapter has trained as well
(Delta-LoRA), is merged: its weight becomes an override. All is computed in fp32 and rounded once, to the precision in
which the layer computes; only a gain stays in fp32, because most gains differ from 1 by less than bfloat16 resolves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter, without_empty_sites
from lorary.adapters.content_hash import content_hash
from lorary.adapters.low_rank_form import BaseLayer, LowRankForm, factors_on_base, form_at
from lorary.adapters.shared_tensors import whole_tensors
from lorary.adapters.switch import check_base
from lorary.errors import Diagnostic, MethodError, StateError, deduplicated, not_a
from lorary.layers.kinds import KINDS, kind_of
from lorary.layers.quantized_weight import stored_tensors
from lorary.layers.shared_projections import leading_slice
from lorary.methods.lora import Add, LowRank
from lorary.methods.vera import SharedProjectionDelta
from lorary.model.ambient import mode_independent
from lorary.model.base import Base
from lorary.model.state import state_of
from lorary.serve.forms._overrides import foreign_rows, trained_values
from lorary.serve.forms._summary import kind_of_form, notes_of
from lorary.serve.forms.rotary import scaled_rotary
from lorary.serve.forms.serving_form import ServingForm, SiteForm
from lorary.spec.join import not_mergeable
from lorary.spec.placement import AdaptedSite
from lorary.spec.presets import presets_of
from lorary.spec.site import PROJECTIONS

_HEADLINE = "this adapter cannot be served beside others:"
_NOT_FINITE = "check its training; or serve the base in a precision of more range"


@mode_independent
@torch.no_grad()
def serving_form(
    adapter: Adapter,
    base: nn.Module | Base,
    *,
    uid: str = "",
    force: bool = False,
    where: str = "the adapter",
) -> ServingForm:
    """The serving form of an adapter, on the CPU, relative to the base as it is served.

    Args:
        adapter: of any method with such a form; others raise MethodError.
        base: the served base, without an adapter; it is not changed. A `Base` of it is walked once for many adapters.
        uid: its content hash, if known.
        force: accept an adapter of another base, if every tensor fits.
        where: its name or folder, for errors.

    Raises:
        FileError: it does not fit the base: the reasons for which `lorary.switch` refuses it.
        MethodError: rows of a mixed batch cannot be computed with it; every reason.
        StateError: `base` is not a model, or has an adapter attached.

    Example:
        >>> form = serving_form(lorary.load_adapter("french"), model)
        >>> form.kind, form.rank
        ('low rank', 16)
    """
    problems = not_a(nn.Module | Base, "a torch.nn.Module", base=base) + not_a(Adapter, "an Adapter", adapter=adapter)
    if problems:
        raise StateError("cannot serve:", problems)
    base = Base.of(base)
    if state_of(base.model) is not None:
        raise StateError("cannot serve:", [Diagnostic("base", "has an adapter attached", "detach it first")])
    check_base(base, adapter, where, force=force)
    return _Forming(without_empty_sites(adapter), base).form(uid or content_hash(adapter))


class _Forming:
    """The forming of one adapter.

    Args:
        adapter: with pruned directions removed.
        base: the base, which it fits.
    """

    def __init__(self, adapter: Adapter, base: Base) -> None:
        self.adapter, self.base, self.modules = adapter, base, base.modules
        self.trained, self.problems = trained_values(adapter.full, base.model, self.modules)
        self.overrides: dict[str, dict[str, Tensor]] = {}
        self.sites: dict[str, SiteForm] = {}
        self.shared: dict[str, dict[str, Tensor]] = {}
        self._key_of: dict[torch.dtype, str] = {}

    def form(self, uid: str) -> ServingForm:
        """The form under this uid.

        Raises:
            MethodError: it has none; every reason.
        """
        rotary, max_context, problems = scaled_rotary(self.base.model, self.adapter.method.context)
        self.problems += problems
        for adapted in self.adapter.sites:
            self.problems += foreign_rows(adapted.site.name)
            if adapted.site.experts or adapted.site.kind in PROJECTIONS:
                inside = f"{n} fused experts" if (n := adapted.site.experts) else "nn.MultiheadAttention"
                what = f"is of {inside}, where a batch cannot use another adapter for each request"
                self.problems.append(Diagnostic(adapted.site.name, what, "merge the adapter, and serve the model"))
                continue
            self._form_site(adapted, self.modules[adapted.site.name])
        adapted_paths = {adapted.site.name for adapted in self.adapter.sites}
        for path in self.trained:
            if path not in adapted_paths:
                self._form_trained(path, self.modules[path])
        self.problems += _not_finite(self.sites, self.overrides)
        if self.problems:
            raise MethodError(_HEADLINE, deduplicated(self.problems))
        ranks = [len(form.A) for form in self.sites.values() if form.A is not None]
        return ServingForm(
            uid,
            self.sites,
            self.overrides,
            rotary,
            self.shared,
            kind_of_form(self.base.model, self.sites, self.overrides, rotary),
            max(ranks, default=None),
            ",".join(presets_of(self.adapter.method)),
            notes_of(self.adapter, self.base.quantized, self.overrides),
            max_context,
        )

    def _form_site(self, adapted: AdaptedSite, module: nn.Module) -> None:
        name = adapted.site.name
        layer = BaseLayer(self.base.model, adapted, module, self.trained.get(name, {}))
        if "weight" in layer.values:
            self._merge_site(layer)
            return
        if type(adapted.delta) is LowRank and type(adapted.join) is Add and not adapted.starts:
            self.sites[name] = self._low_rank(layer)
            return
        on_shared = isinstance(adapted.delta, SharedProjectionDelta) and not adapted.site.parts
        try:
            if on_shared and isinstance(adapted.join, Add):  # its product of B, b and d is not needed
                found = LowRankForm(torch.empty(0, 0), torch.empty(0, 0))
            else:
                found = form_at(adapted, self.adapter.tensors[name], layer)
        except MethodError as error:
            if why := not_mergeable([(name, adapted.join)]):
                if not adapted.join.needs_context:  # `scaled_rotary` has refused its context
                    self.problems += why
                return
            if name not in self.base.quantized:
                self._merge_site(layer)
                return
            whats = [f"{problem.what}; and the base's weight is quantised" for problem in error.problems]
            self.problems += [Diagnostic(name, what, "serve it on a base that is not quantised") for what in whats]
            return
        dtype = self.base.dtype(name)
        form = _folded(found, _bias_change(layer, found.gain), dtype)
        if on_shared:
            form = self._on_shared(adapted, form, dtype)
        self.sites[name] = form

    def _low_rank(self, layer: BaseLayer) -> SiteForm:
        """The form of plain LoRA: its A as it is, without a pass through fp32."""
        adapted, dtype = layer.adapted, self.base.dtype(layer.adapted.site.name)
        B, A = adapted.delta.factors(adapted.site, self.adapter.tensors[adapted.site.name])
        shift = _bias_change(layer, None)
        B = (adapted.scale * B.float()).to(dtype)
        return SiteForm(A.to(dtype), B, None, None if shift is None else shift.to(dtype))

    def _merge_site(self, layer: BaseLayer) -> None:
        """Give a site a merged weight of its own; a bias that the base lacks becomes a shift."""
        adapted, module = layer.adapted, cast(nn.Module, layer.layer)
        name, kind, dtype = adapted.site.name, KINDS[adapted.site.kind], stored_tensors(module)[0].dtype
        tensors, b = self.adapter.tensors[name], layer.bias()
        W, bias = adapted.merged(tensors, layer.weight(), b, factors_on_base(adapted, tensors))
        self.overrides[name] = {"weight": kind.weight(module, W).to(dtype)}
        if bias is not None and b is not None:
            self.overrides[name]["bias"] = bias.to(dtype)
        elif bias is not None:
            self.sites[name] = SiteForm(shift=bias.to(dtype))

    def _form_trained(self, path: str, module: nn.Module) -> None:
        """The form of a module that trained in full: the change of a bias alone is a shift."""
        trained = self.trained[path]
        if trained.keys() == {"bias"} and kind_of(module) not in (None, "embedding"):
            change = trained["bias"].float() - cast(Tensor, module.bias).detach().float().cpu()
            self.sites[path] = SiteForm(shift=change.to(self.base.dtype(path)))
        else:
            self.overrides[path] = trained

    def _on_shared(self, adapted: AdaptedSite, form: SiteForm, dtype: torch.dtype) -> SiteForm:
        """VeRA's form on the shared A and B: y0 + b * (B (d * (A x)))."""
        tensors, key = self.adapter.tensors[adapted.site.name], self._shared_pair(dtype)
        whole, shapes = self.shared[key], adapted.shapes
        b = adapted.scale * tensors["b"].float() * (1 if form.gain is None else form.gain)
        return form._replace(
            A=leading_slice(whole["A"], shapes["A"]),
            B=leading_slice(whole["B"], shapes["B"]),
            d=tensors["d"].to(dtype),
            b=b.to(dtype),
            shared=key,
        )

    def _shared_pair(self, dtype: torch.dtype) -> str:
        """The key of the shared A and B in this precision."""
        if dtype not in self._key_of:
            whole = whole_tensors(self.adapter.sites, self.adapter.tensors)
            cast = {role: t.detach().cpu().to(dtype) for role, t in sorted(whole.items())}
            key = self._key_of[dtype] = _content_key(cast)
            self.shared[key] = cast
        return self._key_of[dtype]


def _folded(found: LowRankForm, bias: Tensor | None, dtype: torch.dtype) -> SiteForm:
    """The form on the base's output, of a form on its product W x; `bias` is b' - g b."""
    B, gain = found.B, found.gain
    if gain is not None:
        gain = gain.float().contiguous()
        B = gain[:, None] * B
    shift = bias if found.shift is None else found.shift if bias is None else found.shift + bias
    shift = None if shift is None else shift.to(dtype)
    return SiteForm(found.A.to(dtype), B.to(dtype), gain, shift) if len(found.A) else SiteForm(None, None, gain, shift)


def _bias_change(layer: BaseLayer, gain: Tensor | None) -> Tensor | None:
    """b' - g b [out]: what the adapter's bias adds to the base's output; None for nothing."""
    own: Tensor | None = getattr(layer.layer, "bias", None)
    if own is None or (gain is None and "bias" not in layer.values):
        return None
    b, trained = own.detach().float().cpu(), layer.bias()
    assert trained is not None
    return trained - (b if gain is None else gain * b)


def _not_finite(sites: Mapping[str, SiteForm], overrides: Mapping[str, Mapping[str, Tensor]]) -> list[Diagnostic]:
    """The tensors with values that are not finite, after rounding."""
    named = [(f"{path}: {role}", t) for path, form in sites.items() for role, t in form._asdict().items()]
    named += [(f"{path}.{name}", t) for path, own in overrides.items() for name, t in own.items()]
    return [
        Diagnostic(where, f"holds NaN, or numbers too large for {str(t.dtype).removeprefix('torch.')}", _NOT_FINITE)
        for where, t in named
        if isinstance(t, Tensor) and not (math.isfinite(float(t.sum())) or t.isfinite().all())  # a sum may overflow
    ]


def _content_key(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 over named tensors."""
    total = hashlib.sha256()
    for role, t in tensors.items():
        total.update(f"{role} {t.dtype} {tuple(t.shape)}\n".encode())
        total.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data if t.numel() else b"")
    return total.hexdigest()
