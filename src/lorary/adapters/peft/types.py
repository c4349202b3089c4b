"""PEFT adapter types: their interface, and the registry of those that lorary reads and writes.

A type is registered after its class, in this package or in your own file:

    register(Vera())
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol, cast

from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import PeftConfig
from lorary.adapters.peft.fields import Field
from lorary.adapters.shared_tensors import SharedTensors
from lorary.adapters.tensor_checks import Layout
from lorary.kernels.torch_internals import padding_of
from lorary.layers.kinds import kind_of
from lorary.spec.interfaces import all_in_join
from lorary.spec.method import Method
from lorary.spec.no_update import NoUpdate
from lorary.spec.placement import AdaptedSite, replaces_rows
from lorary.spec.site import Site


class PeftType(Protocol):
    """An adapter type of PEFT: its configuration, its tensors, and the methods that it can express.

    Attributes:
        name: the `peft_type` of the configuration, such as `VERA`.
        title: the name in messages, such as `VeRA`.
        methods: the (delta, join) classes of the methods with exactly its tensors.
        fields: the fields of its configuration by PEFT's names.
        leaves: the end of a tensor's name -> the role: `<site>.vera_lambda_b` is `b`.
        shared: role -> the name of a tensor that all sites share, after `base_model.`.
        refused_leaves: the end of a tensor's name -> why it is refused, for tensors of unsupported features.
        factors: pairs of leaves whose shapes determine the layer's; without any, only the model knows it.
        kinds: the kinds of layers that it adapts; all if empty.
        dilates: whether it dilates its own filters with a dilated convolution.
        rows_alone: whether its sites are rows of tokens, which PEFT finds by rules of their own.
    """

    name: str
    title: str
    methods: Collection[tuple[type, type]]
    fields: Mapping[str, Field]
    leaves: Mapping[str, str]
    shared: Mapping[str, str] = {}
    refused_leaves: Mapping[str, str] = {}
    factors: Collection[tuple[str, str]] = ()
    kinds: Collection[str] = ()
    dilates: bool = False
    rows_alone: bool = False

    # --- the method ---

    def to_method(self, config: PeftConfig, site: str = "") -> Method:
        """The method of a configuration: at a site, or at sites without their own values."""
        ...

    def site_mismatches(self, config: PeftConfig, sites: set[str]) -> list[tuple[str, str]]:
        """(field, reason) for the fields of a configuration that do not fit these sites."""
        return []

    def peft_incompatibilities(self, adapter: Adapter, shared: SharedTensors) -> list[str]:
        """Why this type cannot express an adapter of its methods."""
        return []

    def from_adapter(self, adapter: Adapter, shared: SharedTensors) -> dict[str, Any]:
        """The type-specific fields of an adapter's configuration."""
        ...

    def targets(self, adapter: Adapter) -> list[str]:
        """The sites that `target_modules` names; fused experts are in `target_parameters`."""
        return [adapted.site.name for adapted in adapter.sites if not adapted.site.experts]

    # --- the layers ---

    def why_not_adaptable(self, site: Site, layer: nn.Module | None = None) -> str:
        """Why PEFT cannot adapt a site, or computes something else there; empty if it can.

        Args:
            site: the site.
            layer: the layer, if at hand: only it has a convolution's dilation and padding.
        """
        if (self.kinds and site.kind not in self.kinds) or site.experts:
            return f"is of kind {site.kind}, which PEFT's {self.title} never adapts"
        if site.groups > 1:
            why = f"PEFT's {self.title} of it does not equal a change of its weight"
            return f"is a convolution with {site.groups} groups: {why}"
        if layer is None or not (kind_of(layer) or "").startswith("conv"):
            return ""
        conv = cast(nn.Conv1d, layer)
        dilated = any(d != 1 and n != 1 for d, n in zip(conv.dilation, conv.kernel_size, strict=True))
        if dilated and not self.dilates:
            return f"is a convolution of dilation {conv.dilation}, which PEFT's {self.title} leaves out"
        if conv.padding_mode != "zeros" and any(padding_of(conv)):
            return f"is a convolution with {conv.padding_mode} padding, for which PEFT's {self.title} pads with zeros"
        return ""

    def why_another_function(self, adapted: AdaptedSite) -> str:
        """Why PEFT computes something else from the tensors of this site; empty if it does not."""
        return ""

    # --- the tensors: by default one for each role ---

    def leaves_of(self, config: PeftConfig) -> Mapping[str, str]:
        """The leaves of an adapter with this configuration."""
        return self.leaves

    def layout(self, adapted: AdaptedSite) -> Layout:
        """role -> (name without prefix, shape) of a site's own tensors."""
        return {role: (f"{adapted.site.name}.{leaf}", adapted.shapes[role]) for leaf, role in self.leaves.items()}

    def canonical_name(self, name: str) -> str:
        """PEFT's spelling of a tensor's name that another program wrote."""
        return name

    def read_shape(
        self, adapted: AdaptedSite, role: str, shape: tuple[int, ...], found: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The expected shape of a tensor: the layout's, or the one found if it is known to mean the same.

        Raises:
            FileError: the shape found is known to mean something else.
        """
        return shape

    def encode(self, adapted: AdaptedSite, roles: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a site by their names without prefix."""
        return {name: roles[role].reshape(shape) for role, (name, shape) in self.layout(adapted).items()}

    def decode(self, adapted: AdaptedSite, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """role -> tensor of a site's own, from tensors by the layout's names.

        Raises:
            FileError: the tensors do not belong to such a site.
        """
        return {role: tensors[name].reshape(adapted.shapes[role]) for role, (name, _) in self.layout(adapted).items()}


PEFT_TYPES: dict[str, PeftType] = {}
ROWS_FIELD = "trainable_token_indices"


def register(peft_type: PeftType) -> None:
    """Register a PEFT type for reading and writing.

    Raises:
        TypeError: its name or one of its methods is registered already.
    """
    for other in PEFT_TYPES.values():
        if other.name == peft_type.name or set(other.methods) & set(peft_type.methods):
            raise TypeError(f"the PEFT type {other.name} has the name or a method of {peft_type.name} already")
    PEFT_TYPES[peft_type.name] = peft_type


def without_rows(adapter: Adapter) -> list[AdaptedSite]:
    """The sites with factors: rows of tokens train beside them."""
    return [adapted for adapted in adapter.sites if not replaces_rows(adapted)]


def without_low_rank_form(name: str) -> bool:
    """Whether adapters of the PEFT type of this name add no B A, and so have no LoRA to be exported as."""
    methods = PEFT_TYPES[name].methods if name in PEFT_TYPES else ()
    return any(all_in_join(delta) or issubclass(delta, NoUpdate) for delta, _ in methods)


def peft_type_of(sites: Iterable[AdaptedSite]) -> PeftType | None:
    """The PEFT type with the tensors of all these sites' methods; None if no single one has them.

    Rows of tokens may train beside the sites of a type that has a field for them.
    """
    sites = list(sites)
    others = [adapted for adapted in sites if not replaces_rows(adapted)]
    if others and len(others) < len(sites):
        beside = peft_type_of(others)
        return beside if beside is not None and ROWS_FIELD in beside.fields else None
    found = {
        next((n for n, t in PEFT_TYPES.items() if (type(adapted.delta), type(adapted.method.join)) in t.methods), "")
        for adapted in sites
    }
    return PEFT_TYPES.get(found.pop()) if len(found) == 1 else None
