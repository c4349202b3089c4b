"""Conversion: any adapter that lorary reads, as lorary's or PEFT's folder with the same function."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.card import write_card
from lorary.adapters.export.carried_files import carry_tokenizer
from lorary.adapters.low_rank_form import LowRankForm
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
        difference: the largest difference of a layer's update or of a whole parameter in the written folder, relative
            to its largest entry.
        compared: the number of layers and whole parameters that were compared.
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
            what = "is not there" if difference == float("inf") else f"would differ by {difference:.2g} of itself"
            problem = Diagnostic(worst, f"{what} in the written folder")
            raise FileError(f"cannot convert {os.fspath(source)}:", [problem])
        if check is not None:
            check(Path(written))
        if os.path.isdir(source):
            carry_tokenizer(Path(source).resolve(), Path(written))
        write_card(written, adapter, name=Path(folder).name)
    return Conversion(adapter, difference, len(compared))


def _compare(adapter: Adapter, again: Adapter, model: nn.Module | None) -> dict[str, float]:
    """The relative difference of every layer's update, by its site, and of every whole parameter, by its name."""
    try:
        before, after = adapter.low_rank(model), again.low_rank(model)
    except MethodError:  # no low-rank form, or none without the base: the tensors are the same ones then
        found = _differing_tensors(adapter, again)
    else:
        found = {site: _differing_form(form, after.get(site)) for site, form in before.items()}
    missing = float("inf")
    found |= {n: _relative([(t, again.full[n])]) if n in again.full else missing for n, t in adapter.full.items()}
    return found


def _differing_form(form: LowRankForm, other: LowRankForm | None) -> float:
    """The largest relative difference of a site's update, gain and shift; of experts one by one, to save memory."""
    if other is None:
        return float("inf")
    factors = (t[None] if t.dim() == 2 else t for t in (form.B, form.A, other.B, other.A))
    found = [_relative((B @ A, B2 @ A2) for B, A, B2, A2 in zip(*factors, strict=True))]
    for one, two, neutral in ((form.gain, other.gain, 1.0), (form.shift, other.shift, 0.0)):
        if one is not None and two is not None:
            found.append(_relative([(one, two)]))
        elif (alone := two if one is None else one) is not None:  # the other one has the neutral value
            found.append(_relative([(alone, torch.full_like(alone, neutral))]))
    return max(found)


def _differing_tensors(adapter: Adapter, again: Adapter) -> dict[str, float]:
    found = {}
    for site, roles in adapter.tensors.items():
        other = again.tensors.get(site, {})
        found[site] = max(_relative([(t, other[r])]) if r in other else float("inf") for r, t in roles.items())
    return found


def _relative(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest difference of the pairs, relative to the largest entry of the first ones."""
    largest = difference = 0.0
    for before, after in pairs:
        if before.numel():
            largest = max(largest, before.abs().max().item())
            difference = max(difference, (before - after).abs().max().item())
    return difference / largest if largest else difference
