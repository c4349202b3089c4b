"""The findings of a reader: refused all at once, or tolerated in one warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from lorary.errors import Diagnostic, FileError, caller_stacklevel

_MOST = 40  # reasons shown; a file made for another model has one for every tensor


class AdapterWarning(UserWarning):
    """An adapter was read, but something about it deserves attention."""


@dataclass
class Findings:
    """All findings about one adapter.

    Args:
        subject: its name in messages, such as "the adapter 'out'".
        strict: whether tolerable findings are refused too.
        fatal: errors that no reader can ignore.
        tolerable: errors that PEFT ignores: missing and unexpected tensors, values that are not finite, unknown fields.
        alerts: surprises worth a warning.
        notes: remarks.
    """

    subject: str
    strict: bool
    fatal: list[Diagnostic] = field(default_factory=list)
    tolerable: list[Diagnostic] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def gathering(self, where: str = "") -> Iterator[None]:
        """Turn the errors of a block into fatal findings, so that later reasons are found too."""
        try:
            yield
        except FileError as error:
            self.fatal += [replace(p, where=p.where or where) for p in error.problems]

    def refused(self) -> list[Diagnostic]:
        """The reasons to refuse, as many as fit into a message."""
        reasons = [*self.fatal, *(self.tolerable if self.strict else [])]
        if len(reasons) <= _MOST:
            return reasons
        return [*reasons[:_MOST], Diagnostic("", f"and {len(reasons) - _MOST:,} more reasons")]

    def raise_refused(self) -> None:
        """Raise the findings so far that are to be refused.

        Raises:
            FileError: every reason at once.
        """
        if refused := self.refused():
            raise FileError(f"cannot load {self.subject}", refused)

    def conclude(self) -> tuple[str, ...]:
        """The notes of an adapter that has been read; one warning lists the tolerated errors and the alerts.

        Raises:
            FileError: every reason to refuse it, at once.
        """
        self.raise_refused()
        tolerated = [f"{p.where}: {p.what}" if p.where else p.what for p in self.tolerable]
        warned = [*tolerated, *self.alerts]
        if warned:
            lines = [f"  - {text}" for text in warned[:_MOST]]
            if len(warned) > _MOST:
                lines.append(f"  - and {len(warned) - _MOST:,} more")
            warnings.warn("\n".join([f"{self.subject}:", *lines]), AdapterWarning, stacklevel=caller_stacklevel())
        return (*warned, *self.notes)
