"""Conversion: any adapter that lorary reads, as lorary's or PEFT's folder with the same function."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.card import write_card
from lorary.adapters.export.carried_files import carry_tokenizer
from lorary.adapters.peft.export import export_peft
from lorary.adapters.save_load import load_adapter, save_adapter
from lorary.errors import ConfigError, Diagnostic, FileError, MethodError, did_you_mean
from lorary.files.atomic import atomic_directory
from lorary.files.findings import AdapterWarning
from lorary.files.safe_open import checked_path
from lorary.model.ambient import mode_independent

TARGETS = ("lorary", "peft")
_LARGEST = 1e-6  # of the difference of a layer's update, relative to the update


@dataclass(frozen=True)
class Conversion:
    """A conversion.

    Args:
        adapter: the adapter as it was read, with the notes of its reader.
        difference: the largest difference of a layer's update in the written folder, relative to its largest entry.
        compared: the number of layers that were compared.
    """

    adapter: Adapter
    difference: float
    compared: int


@mode_independent
def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    to: str = "lorary",
    model: nn.Module | None = None,
    expert_layout: str | None = None,
    check: Callable[[Path], None] | None = None,
) -> Conversion:
    """Write an adapter of any tool as a folder of lorary's, or of PEFT's, and read it back.

    Args:
        source: the adapter, as for `load_adapter`.
        folder: where to; nothing is written if the conversion is refused.
        to: `lorary`, whose folder PEFT reads too where it has the method; or `peft`, a plain LoRA or DoRA.
        model: the base, if at hand; some tools' names mean nothing without it.
        expert_layout: see `load_adapter`; what is written has PEFT's own order.
        check: a further check of the written folder, before it takes its place.

    Raises:
        ConfigError: `to` is neither.
        FileError: the adapter cannot be read or written, or what was written computes something else.
    """
    checked_path(folder, "cannot convert an adapter:")
    if to not in TARGETS:
        what = f"{to!r} is not a form that lorary converts to"
        fix = did_you_mean(str(to), TARGETS) + "; other programs' forms: lorary export"
        raise ConfigError("cannot convert an adapter:", [Diagnostic("to", what, fix)])
    adapter = load_adapter(source, model=model, expert_layout=expert_layout)
    with atomic_directory(folder) as written:
        if to == "peft":
            export_peft(adapter, written, model=model)
        else:
            save_adapter(adapter, written, model=model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdapterWarning)  # of the source, which was read with it
            again = load_adapter(written, model=model)
        compared = _compare(adapter, again, model)
        if (difference := max(compared.values(), default=0.0)) > _LARGEST:
            worst = max(compared, key=lambda site: compared[site])
            what = f"its update would differ by {difference:.2g} of itself in the written folder"
            raise FileError(f"cannot convert {os.fspath(source)}:", [Diagnostic(worst, what)])
        if check is not None:
            check(Path(written))
        if os.path.isdir(source):
            carry_tokenizer(Path(source).resolve(), Path(written))
        write_card(written, adapter, name=Path(folder).name)
    return Conversion(adapter, difference, len(compared))


def _compare(adapter: Adapter, again: Adapter, model: nn.Module | None) -> dict[str, float]:
    """site -> the relative difference of its update, of the layers that have one."""
    try:
        before, after = adapter.low_rank(model), again.low_rank(model)
    except MethodError:  # no low-rank form, or none without the base: the tensors are the same ones then
        return _differing_tensors(adapter, again)
    found = {}
    for site, form in before.items():
        other = after.get(site)
        pairs = [] if other is None else [(form.B @ form.A, other.B @ other.A)]
        if other is not None and form.gain is not None and other.gain is not None:
            pairs.append((form.gain, other.gain))
        found[site] = max((_relative(a, b) for a, b in pairs), default=float("inf"))
    return found


def _differing_tensors(adapter: Adapter, again: Adapter) -> dict[str, float]:
    found = {}
    for site, roles in adapter.tensors.items():
        other = again.tensors.get(site, {})
        found[site] = max(_relative(t, other[role]) if role in other else float("inf") for role, t in roles.items())
    return found


def _relative(before: Tensor, after: Tensor) -> float:
    largest = before.abs().max().item() if before.numel() else 0.0
    difference = (before - after).abs().max().item() if before.numel() else 0.0
    return difference / largest if largest else difference
