"""The trained adapter as a value: read from files, added to others, put on a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lorary._deprecated import RenamedAttribute, forwarding
from lorary.adapters.low_rank_form import LowRankForm, low_rank_forms
from lorary.adapters.provenance import Provenance
from lorary.kernels.torch_internals import storage_id
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.layers.dtensor import full_cpu_copy
from lorary.layers.shared_projections import leading_slice
from lorary.layers.wrappers import gathered
from lorary.methods.prefix_tuning import deployed_method, without_network
from lorary.model.ambient import mode_independent
from lorary.model.buffers import warn_of_changed_buffers
from lorary.model.fingerprint import Fingerprint
from lorary.model.rank_pruning import without_pruned_directions
from lorary.model.state import base_parameter, require_attached
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, start_name


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
            full = {name: floating(full_cpu_copy(base_parameter(model, name))) for name in state.full}
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
        """The adapter without what only training needs: pruned rank directions (AdaLoRA), a prefix's network."""
        sites, tensors = without_network(*without_pruned_directions(self.sites, self.tensors))
        return dataclasses.replace(self, method=deployed_method(self.method), sites=sites, tensors=tensors)

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


def without_empty_sites(adapter: Adapter) -> Adapter:
    """The adapter without pruned rank directions, and without the sites that have none left (AdaLoRA)."""
    adapter = adapter.compact()
    left = tuple(a for a in adapter.sites if any(map(min, a.shapes.values())))
    return dataclasses.replace(adapter, sites=left)


def floating(t: Tensor) -> Tensor:
    """A tensor, or the counter of a batch norm as fp32: adapter files hold floating-point numbers alone."""
    return t if t.is_floating_point() else t.float()
