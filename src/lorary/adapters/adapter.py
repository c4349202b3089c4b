"""The trained adapter as a value: read from files, added to others, put on a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorary._deprecated import RenamedAttribute, forwarding
from lorary.adapters.low_rank_form import LowRankForm, low_rank_forms
from lorary.adapters.provenance import Provenance
from lorary.errors import Diagnostic, MethodError
from lorary.kernels.torch_internals import storage_id
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.layers.dtensor import full_cpu_copy
from lorary.layers.shared_projections import leading_slice
from lorary.layers.wrappers import gathered
from lorary.methods.lora import Add, ConstantScale, Kaiming, LowRank
from lorary.model.ambient import mode_independent
from lorary.model.buffers import warn_of_changed_buffers
from lorary.model.fingerprint import Fingerprint
from lorary.model.rank_pruning import without_pruned_directions
from lorary.model.state import base_parameter, require_attached, state_of
from lorary.spec.interfaces import Storage, Unquantized
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, start_name
from lorary.spec.site import Site


@dataclass(frozen=True)
class Adapter:
    """A trained adapter as a value: method, tensors, and the fingerprint of its base.

    Args:
        method: the method, with the default rank of its sites; the first, if they have several.
        sites: the adapted sites, each with its own method.
        tensors: site -> role -> tensor.
        full: base parameter, or buffer, -> its trained value.
        base: the fingerprint of the base that it was trained on.
        notes: remarks of the reader about the adapter's files.
        provenance: how it was made from other adapters; None for one that was trained.
    """

    method: Method
    sites: tuple[AdaptedSite, ...] = field(repr=False)
    tensors: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    full: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    base: Fingerprint = field(default_factory=Fingerprint)
    notes: tuple[str, ...] = ()
    provenance: Provenance | None = field(default=None, compare=False)

    @staticmethod
    @mode_independent
    def of(model: nn.Module) -> Adapter:
        """A copy of the adapter attached to a model.

        Raises:
            StateError: none is attached.
        """
        state = require_attached(model, "take from the model")
        with gathered(model):
            tensors = _copied_tensors(adapted_layers(model))
            full = {name: _floating(full_cpu_copy(base_parameter(model, name))) for name in state.full}
        warn_of_changed_buffers(model, state.buffers)
        return Adapter(state.method, state.sites, tensors, full, Fingerprint.of(model))

    load = staticmethod(forwarding("Adapter.load", "load_adapter"))
    save = forwarding("Adapter.save", "save_adapter")
    placed = RenamedAttribute("sites")

    @mode_independent
    def low_rank(self, base: nn.Module | None = None) -> dict[str, LowRankForm]:
        """site -> (B, A, gain, shift) relative to the unmodified base, in fp32, for any method.

        The start of a residual base (PiSSA, OLoRA) is subtracted, which doubles the rank.

        Args:
            base: the base, for the methods whose gain or shift depends on its weights (DoRA, GLoRA).

        Raises:
            MethodError: a method has no such form, or none without the base; the base lacks a layer. Each reason once.
        """
        return low_rank_forms(self.sites, self.tensors, base)

    @mode_independent
    def compact(self) -> Adapter:
        """The adapter with its pruned rank directions removed (AdaLoRA)."""
        sites, tensors = without_pruned_directions(self.sites, self.tensors)
        return dataclasses.replace(self, sites=sites, tensors=tensors)

    @property
    def size(self) -> int:
        """Bytes of all tensors; shared tensors count once."""
        every = [t for roles in self.tensors.values() for t in roles.values()] + list(self.full.values())
        return sum({storage_id(t): t.untyped_storage().nbytes() for t in every}.values())


def _copied_tensors(layers: Mapping[str, Adapted]) -> dict[str, dict[str, Tensor]]:
    """site -> role -> a copy of each tensor of the adapter; shared tensors are copied once."""
    shared: dict[str, Tensor] = {}
    own: dict[int, dict[str, Tensor]] = {}  # tied layers train one set of tensors
    for layer in layers.values():
        if not shared and layer.shared is not None:
            shared = {role: full_cpu_copy(t) for role, t in layer.shared.tensors.items()}
        if id(layer.params) not in own:
            own[id(layer.params)] = {role: full_cpu_copy(t) for role, t in layer.params.items()}
    return {
        name: own[id(layer.params)]
        | {role: leading_slice(shared[role], shape) for role, shape in layer.shared_shapes.items()}
        | _copied_start(layer)
        for name, layer in layers.items()
    }


def _copied_start(layer: Adapted) -> dict[str, Tensor]:
    """role -> a copy of the start that was subtracted from the base; on the meta device, its shape."""
    if layer.init.residual_init and not layer.start:
        return {start_name(role): layer.params[role].detach() for role in layer.delta.roles}
    return {role: t.clone() for role, t in layer.start.items()}


def _floating(t: Tensor) -> Tensor:
    """A tensor, or the counter of a batch norm as fp32: adapter files hold floating-point numbers alone."""
    return t if t.is_floating_point() else t.float()


def stacked(adapters: Sequence[Adapter], model: nn.Module, weights: Sequence[float] | None = None) -> Adapter:
    """The weighted sum of adapters as one adapter: exact, by stacking their factors along the rank.

    Args:
        adapters: of any methods whose update is B A alone.
        model: the base, for the parameters that some of them trained in full.
        weights: one for each adapter, all 1 by default. The sum keeps the storage that all were trained with, if one.

    Raises:
        MethodError: one of them has a gain or a shift, or they differ in context.
    """
    weights = weights or [1.0] * len(adapters)
    storage = adapters[0].method.storage if len({a.method.storage for a in adapters}) == 1 else Unquantized()
    contexts = {a.method.context for a in adapters}
    problems: dict[str, Diagnostic] = {}
    if len(contexts) > 1:
        named = "; ".join(sorted(str(c or "the base's own") for c in contexts))
        problems["context"] = Diagnostic("context", f"they use different RoPE scaling or attention: {named}")
    forms: dict[str, list[LowRankForm]] = {}
    sites: dict[str, Site] = {}
    for adapter, w in zip(adapters, weights, strict=True):
        sites = {a.site.name: a.site for a in adapter.sites} | sites
        for name, form in adapter.low_rank(model).items():
            if not form.is_plain:
                problems[name] = Diagnostic(name, "one of them gives its output a gain or a shift of its own")
            forms.setdefault(name, []).append(LowRankForm(w * form.B, form.A))
    if problems:
        raise MethodError("cannot add these adapters:", problems.values())
    full = _summed_full(adapters, weights, model)
    context = contexts.pop()
    added, tensors = [], {}
    for name, terms in forms.items():
        B, A = torch.cat([term.B for term in terms], 1), torch.cat([term.A for term in terms], 0)
        site = dataclasses.replace(sites[name], parts=())  # the blocks between the parts are zero in B
        added.append(AdaptedSite(site, _plain(A.shape[0], storage).replace(context=context)))
        tensors[name] = {"A": A, "B": B}
    method = _plain(max(a.r for a in added), storage) if added else Method(full=tuple(full))
    return Adapter(method.replace(context=context), tuple(added), tensors, full, adapters[0].base)


def _plain(r: int, storage: Storage) -> Method:
    """LoRA of rank r with its scale in B."""
    return Method(LowRank(r), Kaiming(), ConstantScale(1.0), Add(), storage=storage)


def _summed_full(adapters: Sequence[Adapter], weights: Sequence[float], model: nn.Module) -> dict[str, Tensor]:
    """The parameters trained in full: the base's value plus the weighted changes of the adapters."""
    state = state_of(model)
    total: dict[str, Tensor] = {}
    for adapter, w in zip(adapters, weights, strict=True):
        for name, value in adapter.full.items():
            saved = state.full.get(name) if state is not None else None
            before = (saved if saved is not None else base_parameter(model, name).detach()).float().cpu()
            total[name] = total.get(name, before) + w * (value.float() - before)
    return {name: value.to(base_parameter(model, name).dtype) for name, value in total.items()}
