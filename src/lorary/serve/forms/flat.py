"""The flat form of an adapter: all tensors of its serving form in one buffer, so that one copy moves them all.

Every tensor has its real size, at a multiple of 16 bytes: nothing is padded to a highest rank. Tensors that several
adapters share (VeRA's projections) are a buffer of their own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from lorary.layers.shared_projections import leading_slice
from lorary.serve.forms.serving_form import ServingForm, SiteForm

ALIGNMENT = 16  # bytes, what vector instructions and Triton's loads want
_SHARED = ("A", "B")  # the fields that are slices of shared tensors, where a site has any


class Slot(NamedTuple):
    """Where a tensor lies in the buffer.

    Args:
        offset: its first byte.
        shape, dtype: of the tensor.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor, without a copy."""
        stop = self.stop
        if stop == self.offset:  # PyTorch gives no views of other dtypes of nothing
            return buffer.new_empty(self.shape, dtype=self.dtype)
        return buffer[self.offset : stop].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Flat:
    """An adapter in one buffer, and the table to find its tensors in any copy of it.

    Args:
        buffer: [bytes] uint8.
        sites: path of a layer -> field of its `SiteForm` -> where it lies; at -1 a slice of a shared tensor.
        overrides: path of a module -> name of its parameter -> where it lies.
        form: the serving form without tensors.
        shared: key -> the flat form of the shared tensors, which its own buffer does not hold.
    """

    buffer: Tensor = field(repr=False)
    sites: Mapping[str, Mapping[str, Slot]] = field(repr=False)
    overrides: Mapping[str, Mapping[str, Slot]] = field(repr=False)
    form: ServingForm
    shared: Mapping[str, FlatTensors] = field(default_factory=dict, repr=False)

    @property
    def bytes(self) -> int:
        """Bytes of its own buffer."""
        return self.buffer.numel()

    @cached_property
    def on_host(self) -> ServingForm:
        """The serving form with tensors in its own buffer."""
        return self.views(self.buffer)

    def views(self, buffer: Tensor, shared: Mapping[str, Mapping[str, Tensor]] | None = None) -> ServingForm:
        """The serving form with tensors that are views of a copy of the buffer.

        Args:
            buffer: [bytes] uint8, on any device, at a multiple of 16 bytes.
            shared: key -> role -> the shared tensors beside it; by default those on the host.
        """
        if shared is None:
            shared = {key: flat.views(flat.buffer) for key, flat in self.shared.items()}
        own = {
            path: {name: slot.view(buffer) for name, slot in slots.items()} for path, slots in self.overrides.items()
        }
        sites = {path: _site(self.form.sites[path], slots, buffer, shared) for path, slots in self.sites.items()}
        rotary = {path: _on(module, buffer.device) for path, module in self.form.rotary.items()}
        return replace(self.form, sites=sites, overrides=own, rotary=rotary, shared=shared)


@dataclass(frozen=True)
class FlatTensors:
    """Some tensors in one buffer.

    Args:
        buffer: [bytes] uint8.
        slots: role -> where it lies.
    """

    buffer: Tensor = field(repr=False)
    slots: Mapping[str, Slot]

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """role -> the tensor, a view of a copy of the buffer."""
        return {role: slot.view(buffer) for role, slot in self.slots.items()}


@torch.inference_mode()
def flatten(form: ServingForm, *, pin_memory: bool = False) -> Flat:
    """The flat form of a serving form.

    A tensor that stands at several places (tied layers) is stored once.

    Args:
        form: the serving form, on any device, in the dtypes in which its layers compute.
        pin_memory: whether the buffers are page-locked, for fast copies to a GPU.
    """
    layout = _Layout()
    sites = {path: _slots(site, layout) for path, site in form.sites.items()}
    overrides = {path: {name: layout.add(t) for name, t in own.items()} for path, own in form.overrides.items()}
    shared = {key: _flat_tensors(tensors, pin_memory) for key, tensors in form.shared.items()}
    bare = {path: SiteForm(shared=site.shared) for path, site in form.sites.items()}
    empty = replace(form, sites=bare, overrides={}, shared={})
    return Flat(layout.buffer(pin_memory), sites, overrides, empty, shared)


def _slots(site: SiteForm, layout: _Layout) -> dict[str, Slot]:
    tensors: dict[str, Tensor] = {name: t for name, t in site._asdict().items() if isinstance(t, Tensor)}
    return {
        name: Slot(-1, tuple(t.shape), t.dtype) if site.shared and name in _SHARED else layout.add(t)
        for name, t in tensors.items()
    }


def _flat_tensors(tensors: Mapping[str, Tensor], pin_memory: bool) -> FlatTensors:
    layout = _Layout()
    slots = {role: layout.add(t) for role, t in tensors.items()}
    return FlatTensors(layout.buffer(pin_memory), slots)


class _Layout:
    """Tensors placed one after the other."""

    def __init__(self) -> None:
        self._stop = 0
        self._tensors: dict[tuple[Any, ...], tuple[Tensor, Slot]] = {}

    def add(self, t: Tensor) -> Slot:
        """A place for a tensor."""
        key = (t.device, t.data_ptr(), tuple(t.shape), t.stride(), t.dtype)
        if not t.numel() or key not in self._tensors:
            offset = -(-self._stop // ALIGNMENT) * ALIGNMENT
            slot = Slot(offset, tuple(t.shape), t.dtype)
            self._stop = slot.stop
            self._tensors[key] = t, slot
        return self._tensors[key][1]

    def buffer(self, pin_memory: bool) -> Tensor:
        """[bytes] uint8 with the values of all tensors."""
        if pin_memory:
            buffer = torch.empty(self._stop, dtype=torch.uint8, pin_memory=True)
        else:  # NumPy asks for huge pages, which are touched for the first time in half the time
            buffer = torch.from_numpy(numpy.empty(self._stop, numpy.uint8))
        for t, slot in self._tensors.values():
            slot.view(buffer).copy_(t)
        return buffer


def _site(
    bare: SiteForm, slots: Mapping[str, Slot], buffer: Tensor, shared: Mapping[str, Mapping[str, Tensor]]
) -> SiteForm:
    found: dict[str, Any] = {
        name: slot.view(buffer) if slot.offset >= 0 else leading_slice(shared[bare.shared][name], slot.shape)
        for name, slot in slots.items()
    }
    return bare._replace(**found)


def _on(module: Any, device: torch.device) -> Any:
    """A module of a serving form on a device: itself, or a copy."""
    here = {t.device for t in (*module.parameters(), *module.buffers())}
    return module if here <= {device} else copy.deepcopy(module).to(device)
