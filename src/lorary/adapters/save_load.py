"""Adapters to folders and back: the three functions that the rest of the library calls."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorary.adapters import native, tied_sites
from lorary.adapters.adapter import Adapter
from lorary.adapters.low_rank_form import factors_on_base, low_rank_forms
from lorary.adapters.peft import writer
from lorary.adapters.peft.config import NAME as PEFT_CONFIG
from lorary.adapters.peft.config import config_text
from lorary.adapters.peft.lora import LORA, encode_factors, is_dora, lora_fields
from lorary.adapters.peft.reader import WEIGHTS, read_peft, weights_name
from lorary.adapters.shared_tensors import SharedTensors, collect_shared, inconsistent_copies
from lorary.adapters.value_checks import not_finite
from lorary.errors import Diagnostic, FileError
from lorary.files.atomic import atomic_directory
from lorary.files.findings import Findings
from lorary.files.safe_open import existing_folder, subject
from lorary.files.safetensors_header import name_problem
from lorary.files.strict_json import named, show
from lorary.files.tensor_file import DTYPES, write_tensors
from lorary.layers.rope import PositionsWarning

_BASE = "BASE.md"  # how the base of a PEFT adapter is to be loaded, where positions are divided
_OWN = (native.NAME, native.TENSORS, PEFT_CONFIG, WEIGHTS, "adapter_model.bin", _BASE)


def save_adapter(adapter: Adapter, folder: str | os.PathLike[str], *, model: nn.Module | None = None) -> None:
    """Writes an adapter folder: `lorary.json`, and the tensors, in PEFT's two files wherever PEFT can read them.

    A folder that holds an adapter already is replaced in one step, and its other files (a model card) stay; a killed
    process or a full disk leaves the old adapter or the new one.

    Args:
        adapter: what to save.
        folder: where to.
        model: the base, where it is at hand: with it PEFT's files can hold modules that were trained whole, and name
            their targets briefly.

    Raises:
        FileError: the adapter holds what no reader would accept (NaN, other dtypes), or the folder cannot be written.
    """
    shared = collect_shared(adapter)
    tensors = native.native_tensors(adapter, shared)
    _check_values(tensors, folder, lambda: _torn(adapter, shared))
    # PEFT's files do not say how positions are divided
    peft_type = None if writer.rope_overrides(adapter) else writer.exact_type(adapter, model, shared)
    if peft_type is not None:
        config, tensors = writer.exact_files(adapter, model, shared, peft_type)
    needed = sum(t.nbytes for t in tensors.values())
    with atomic_directory(folder, replace=True, keep=True, drop=_OWN, needed=needed) as temporary:
        if peft_type is not None:
            (temporary / PEFT_CONFIG).write_text(config_text(config), encoding="utf-8")
        write_tensors(temporary / (WEIGHTS if peft_type else native.TENSORS), tensors)
        native.write_record(temporary, adapter, shared)


def load_adapter(folder: str | os.PathLike[str], *, model: nn.Module | None = None, strict: bool = True) -> Adapter:
    """Reads an adapter folder, lorary's or PEFT's.

    Args:
        folder: the folder.
        model: the base, where it is at hand: a PEFT folder is then held to the modules that PEFT would adapt in it.
        strict: refuse whatever is missing, left over, malformed or not finite. False tolerates what PEFT tolerates,
            with one warning that lists it all: a missing tensor is zero, a left-over one is dropped and never
            overwrites a weight of the base.

    Returns:
        The adapter; its `notes` say what is worth knowing about the files.

    Raises:
        FileError: every reason why it cannot be used, at once.
    """
    path = existing_folder(folder)
    findings = Findings(subject(folder), strict)
    try:
        if (path / native.NAME).exists() or (path / native.NAME).is_symlink():
            return native.read_native(path, findings)
        if not (path / PEFT_CONFIG).exists() and not (path / PEFT_CONFIG).is_symlink():
            raise FileError("", [_no_adapter(path)])
        return read_peft(path, model, findings)
    except FileError as error:
        if error.headline:
            raise
        findings.fatal += error.problems
        raise FileError(f"cannot load {findings.subject}", findings.refused()) from error.__cause__


def export_peft(adapter: Adapter, folder: str | os.PathLike[str], *, model: nn.Module | None = None) -> None:
    """Writes an adapter as a plain PEFT LoRA with the same function, whatever method trained it.

    PEFT knows no positions: beside an adapter that divides them (LongLoRA) `BASE.md` says how its base is to be loaded,
    and a warning tells of it.

    LoRA and DoRA keep their tensors; every other method is written as the two factors that its update of the
    unmodified base stands for, with the scale in B, and magnitudes beside them where it has them.

    Args:
        adapter: what to export.
        folder: a new folder, or one that holds a PEFT adapter to be replaced.
        model: the base, where it is at hand, as for `save_adapter`; some methods have no such form without it.

    Raises:
        FileError: PEFT has no LoRA with this function, with every reason; or the folder cannot be written.
        MethodError: the method has no low-rank form.
    """
    problems = writer.base_incompatibilities(adapter, model, LORA)
    if (Path(folder) / native.NAME).exists():
        what = f"it holds {native.NAME}: the adapter there would be lost"
        problems.append(Diagnostic("", what, "export to another folder"))
    if problems:
        raise FileError(_cannot_export(folder), problems)
    shared = collect_shared(adapter)
    if writer.exact_type(adapter, model, shared) is LORA:
        words, tensors = writer.exact_files(adapter, model, shared, LORA)
    else:
        words, tensors = _as_lora(adapter, model, folder)
    _check_values(tensors, folder)
    needed = sum(t.nbytes for t in tensors.values())
    with atomic_directory(folder, replace=True, keep=True, drop=_OWN, needed=needed) as temporary:
        (temporary / PEFT_CONFIG).write_text(config_text(words), encoding="utf-8")
        write_tensors(temporary / WEIGHTS, tensors)
        if changes := writer.rope_overrides(adapter):
            (temporary / _BASE).write_text(writer.base_text(adapter), encoding="utf-8")
    if changes:
        what = f"PEFT's files do not say how positions are divided: load the base with rope_parameters {changes}"
        warnings.warn(f"{what}; {_BASE} there says how", PositionsWarning, stacklevel=2)


def _as_lora(
    adapter: Adapter, model: nn.Module | None, folder: str | os.PathLike[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) of the LoRA, or the DoRA, that an adapter of another method is."""
    adapter = _with_directions(adapter, folder)
    forms = low_rank_forms([p for p in adapter.sites if not is_dora(p)], adapter.tensors, model)
    problems = [
        Diagnostic(name, "its output has a gain or a shift, which PEFT's LoRA has not")
        for name, form in forms.items()
        if form.gain is not None or form.shift is not None
    ]
    if forms and len(forms) < len(adapter.sites):
        problems.append(
            Diagnostic("sites", "some have DoRA's magnitudes and some not; PEFT's adapters have all or none")
        )
    if problems:
        raise FileError(_cannot_export(folder), problems)
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    for p in adapter.sites:
        name, own = p.site.name, adapter.tensors[p.site.name]
        # DoRA's gain follows from the factors and the magnitudes, which PEFT keeps as they are
        B, A = factors_on_base(p, own) if is_dora(p) else forms[name][:2]
        tensors |= encode_factors(p.site, A, B, own["m"] if is_dora(p) else None)
        sizes[name] = (A.shape[0], float(A.shape[0]))
    own_fields = lora_fields(adapter, sizes, root=False, dora=not forms)
    words = writer.peft_config(adapter, model, LORA, own_fields)
    return words, writer.with_prefix(tensors, adapter)


def _with_directions(adapter: Adapter, folder: str | os.PathLike[str]) -> Adapter:
    """The same function without directions that do nothing, and without sites where none is left (AdaLoRA)."""
    small = adapter.compact()
    left = tuple(p for p in small.sites if any(min(shape) for shape in p.shapes.values()))
    if not left:
        what = "no layer has a direction left, and PEFT's adapters adapt at least one layer"
        raise FileError(_cannot_export(folder), [Diagnostic("sites", what)])
    return dataclasses.replace(small, sites=left)


def _cannot_export(folder: str | os.PathLike[str]) -> str:
    return f"cannot export an adapter to {show(os.fspath(folder), most=400)} for PEFT"


def _torn(adapter: Adapter, shared: SharedTensors) -> list[Diagnostic]:
    """The sites that cannot share what they say they do, or have something else."""
    return tied_sites.problems(adapter.sites) or inconsistent_copies(
        adapter, shared.whole
    ) + tied_sites.inconsistent_copies(adapter)


def _check_values(
    tensors: dict[str, Tensor], folder: str | os.PathLike[str], torn: Callable[[], list[Diagnostic]] = list
) -> None:
    """Refuses to write what would be refused when read.

    Args:
        tensors: by their names in the file.
        folder: where to.
        torn: gives what is wrong about what sites share; it is asked where the tensors themselves are good.
    """
    problems = [Diagnostic(named(name), what) for name in tensors if (what := name_problem(name))]
    known = tuple(DTYPES.values())
    accepted = ", ".join(str(d).removeprefix("torch.") for d in known)
    for name, tensor in tensors.items():
        if tensor.dtype not in known:
            what = f"is {str(tensor.dtype).removeprefix('torch.')}; adapters are saved as {accepted}"
            problems.append(Diagnostic(named(name), what))
        elif tensor.is_meta:
            problems.append(Diagnostic(named(name), "has no values: its model is on the meta device"))
    if not problems:
        with torch.no_grad():
            problems = not_finite(tensors) or torn()
    if problems:
        raise FileError(f"cannot save an adapter to {show(os.fspath(folder), most=400)}", problems)


def _no_adapter(path: Path) -> Diagnostic:
    if (path / "config.json").exists():
        fix = "this looks like a whole model: load it as the base"
    else:
        inside = sorted(p.name for p in path.iterdir() if (p / native.NAME).exists() or (p / PEFT_CONFIG).exists())
        fix = f"an adapter is in its folder {inside[0]!r}" if inside else ""
    try:
        weights_name(path)
    except FileError as error:
        return error.problems[0]
    return Diagnostic("", f"it holds neither {native.NAME} nor {PEFT_CONFIG}", fix)
