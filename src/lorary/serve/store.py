"""The interface of a store of adapters, and the simplest one: every adapter in memory."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from lorary.adapters.save_load import load_adapter
from lorary.errors import Diagnostic, FileError, did_you_mean
from lorary.serve.engine import AdapterCard, UnknownAdapterError
from lorary.serve.form import serving_form
from lorary.serve.serving_form import ServingForm


class Loan(Protocol):
    """An adapter that a request uses: it stays as it is, whatever happens to its name, until the loan ends.

    Attributes:
        ready: whether it is in host memory, or has failed.
        error: why it cannot be used; empty if it can, or while it is loaded.
        uid: its content hash; empty before it is ready.
        bytes: that it takes beside the base; 0 before it is ready.
    """

    ready: bool
    error: str
    uid: str
    bytes: int

    def bring(self) -> ServingForm | None:
        """Its form with tensors beside the base, until `release`; None if there is no room now. In the engine's thread.

        Raises:
            LoraryError: there will never be room.
        """
        ...

    def release(self) -> None:
        """The batch needs its tensors no longer; nothing happens if they were not brought. In the engine's thread."""
        ...

    def end(self) -> None:
        """Give it back; `release` comes before."""
        ...


class Store(Protocol):
    """Adapters by name. Every method may be called from any thread."""

    def borrow(self, name: str, when_ready: Callable[[], None]) -> Loan:
        """Use an adapter; it begins to load if it must.

        Args:
            name: of the adapter.
            when_ready: called once from any thread when the loan becomes ready, unless it is when this returns.

        Raises:
            UnknownAdapterError: no adapter has this name.
            FileError: its folder cannot be served, with every reason.
        """
        ...

    def load(self, name: str, folder: str, *, replace: bool = False, pinned: bool = False) -> AdapterCard:
        """See `Engine.load`."""
        ...

    def unload(self, name: str) -> None:
        """See `Engine.unload`."""
        ...

    def cards(self) -> list[AdapterCard]:
        """All adapters that requests may name, by name."""
        ...

    def memory(self) -> Memory:
        """What the scheduling policy must know of memory. In the engine's thread."""
        ...

    def statistics(self) -> dict[str, Any]:
        """Figures of this moment: see `lorary.serve.statistics`."""
        ...

    def close(self) -> None:
        """End what it does in the background."""
        ...


class Memory(NamedTuple):
    """Memory beside the base, as in `lorary.serve.policy.Snapshot`."""

    free: int = 0
    resident: Mapping[str, int] = {}
    sizes: Mapping[str, int] = {}
    pinned: frozenset[str] = frozenset()


class _Lent:
    ready, error = True, ""

    def __init__(self, form: ServingForm) -> None:
        self._form, self.uid, self.bytes = form, form.uid, 0

    def bring(self) -> ServingForm | None:
        return self._form

    def release(self) -> None:
        pass

    def end(self) -> None:
        pass


class AllInMemory:
    """A store that keeps every adapter beside the base.

    Args:
        model: the base.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._lock = model, threading.Lock()
        self._forms: dict[str, ServingForm] = {}
        self._cards: dict[str, AdapterCard] = {}
        self.used: Counter[str] = Counter()

    def borrow(self, name: str, when_ready: Callable[[], None]) -> Loan:
        with self._lock:
            if name not in self._forms:
                what = f"no adapter has the name {name!r}"
                raise UnknownAdapterError("", [Diagnostic("", what, did_you_mean(name, self._forms))])
            return _Lent(self._forms[name])

    def load(self, name: str, folder: str, *, replace: bool = False, pinned: bool = False) -> AdapterCard:
        if not replace and name in self._forms:
            raise FileError("cannot load the adapter:", [Diagnostic(name, "the name is taken")])
        form = _beside(serving_form(load_adapter(folder, model=self._model), self._model), self._model.device)
        card = AdapterCard(name, form.uid, folder, "resident", form.kind, form.rank)
        card = dataclasses.replace(card, method=form.method, created=time.time())
        with self._lock:
            self._forms[name], self._cards[name] = form, card
        return card

    def unload(self, name: str) -> None:
        with self._lock:
            if self._forms.pop(name, None) is None:
                raise UnknownAdapterError("", [Diagnostic(name, "no adapter has this name")])
            del self._cards[name]

    def cards(self) -> list[AdapterCard]:
        with self._lock:
            return sorted(self._cards.values(), key=lambda card: card.name)

    def memory(self) -> Memory:
        with self._lock:
            return Memory(sizes={form.uid: 0 for form in self._forms.values()})

    def statistics(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def _beside(form: ServingForm, device: Any) -> ServingForm:
    """The form with its tensors on the base's device."""
    from torch import Tensor
    from torch.utils._pytree import tree_map_only  # placeholder until the pool places them

    def moved(tree: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.to(device), tree)

    return dataclasses.replace(form, sites=moved(dict(form.sites)), overrides=moved(dict(form.overrides)))
