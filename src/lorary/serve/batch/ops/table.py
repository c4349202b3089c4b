"""The table of adapters: where the tensors of each lie, for kernels that compute many of them at once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lorary.serve.forms.serving_form import ServingForm, SiteForm

FIELDS = 10  # the addresses of A, B, d, b, gain, shift; the rank; the strides of A's rows, of B's rows and columns
MOST_RANK = 256  # of an adapter that kernels compute; higher ranks are left to matrix products


class Known(NamedTuple):
    """An adapter in the table.

    Args:
        ref: the adapter, which the table does not keep alive.
        slot: its slot; None if kernels cannot compute it.
        additive: whether it may be one of several, with a weight.
        shares: whether it has sites on shared tensors, which are not in the table.
    """

    ref: weakref.ref[ServingForm]
    slot: int | None
    additive: bool
    shares: bool


class AdapterTable:
    """[slots, layers, FIELDS] the adapters' addresses, strides and ranks, all zero where one does not adapt a layer.

    An adapter keeps its slot as long as it exists; its tensors must lie where they lay when it was added.

    Args:
        layers: path -> dtype of the layers that kernels compute; an adapter's tensors must have it.
        device: of the adapters' tensors; the table lies there.
        width: in + out of the median layer, from which one limit of short segments for all layers follows.
    """

    def __init__(self, layers: Mapping[str, torch.dtype], device: torch.device, width: int = 2048) -> None:
        self.dtypes, self.width = dict(layers), width
        self.layers = {path: index for index, path in enumerate(layers)}
        self.tensor = torch.zeros(0, len(layers), FIELDS, dtype=torch.int64, device=device)
        self._known: dict[int, Known] = {}
        self._free: list[int] = []
        self._lock = threading.Lock()

    def get(self, form: ServingForm) -> Known | None:
        """What is known of an adapter; None if it is not in the table."""
        found = self._known.get(id(form))
        return found if found is not None and found.ref() is form else None

    def __contains__(self, form: ServingForm) -> bool:
        return self.get(form) is not None

    def slot(self, form: ServingForm) -> int | None:
        """The slot of an adapter that is in the table."""
        return self._known[id(form)].slot

    def add(self, form: ServingForm) -> None:
        """Take an adapter into the table; its shapes must be those of the layers."""
        with self._lock:
            if form in self:
                return
            key, slot = id(form), None
            own = {path: site for path, site in form.sites.items() if path in self.layers and not site.shared}
            if all(_is_simple(site, self.dtypes[path]) for path, site in own.items()):
                slot = self._free.pop() if self._free else self._grow()
                self.tensor[slot] = self._rows(own).to(self.tensor.device)
            ref = weakref.ref(form, lambda ref: self._forget(key, ref, slot))
            self._known[key] = Known(ref, slot, form.additive, any(site.shared for site in form.sites.values()))

    def _rows(self, sites: Mapping[str, SiteForm]) -> Tensor:
        rows = torch.zeros(len(self.layers), FIELDS, dtype=torch.int64)
        for path, site in sites.items():
            rows[self.layers[path]] = torch.tensor(_fields(site))
        return rows

    def _grow(self) -> int:
        """Twice as many slots. The old tensor stays as it is, for those who read it now."""
        used = len(self.tensor)
        more = max(8, used)
        self.tensor = torch.cat([self.tensor, self.tensor.new_zeros(more, *self.tensor.shape[1:])])
        self._free = list(range(used + more - 1, used, -1))
        return used

    def _forget(self, key: int, ref: weakref.ref[ServingForm], slot: int | None) -> None:
        # without the lock: a garbage collection may call this while `add` holds it
        if key in self._known and self._known[key].ref is ref:
            del self._known[key]
        if slot is not None:
            self._free.append(slot)


def _is_simple(site: SiteForm, dtype: torch.dtype) -> bool:
    """Whether kernels can compute it: a gain in fp32, the rest of this dtype, without gaps in what is read in a run."""
    tensors = [t for t in site[:6] if t is not None]
    rank = 0 if site.A is None else len(site.A)
    matrices = site.A is None or site.B is None or (site.A.stride(1) == 1 and 1 in site.B.stride())
    vectors = all(t.stride() == (1,) for t in tensors if t.dim() == 1)
    one_dtype = all(t.dtype is dtype for t in tensors if t is not site.gain)
    wide = site.gain is None or site.gain.dtype is torch.float32
    return matrices and vectors and one_dtype and wide and rank <= MOST_RANK


def _fields(site: SiteForm) -> list[int]:
    A, B, gain, shift, d, b = site[:6]
    addresses = [0 if t is None else t.data_ptr() for t in (A, B, d, b, gain, shift)]
    if A is None or B is None:
        return [*addresses, 0, 0, 0, 0]
    return [*addresses, len(A), A.stride(0), *B.stride()]
