"""Adapters to folders and back: the three functions that the rest of the library calls."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from lorary.adapter import Adapter
from lorary.errors import FileError, Problem
from lorary.formats import native, peft_keys, peft_writer
from lorary.formats.atomic import atomic_directory
from lorary.formats.findings import Findings
from lorary.formats.folder import existing_folder, subject
from lorary.formats.peft_config import NAME as PEFT_CONFIG
from lorary.formats.peft_reader import WEIGHTS, read_peft, weights_name
from lorary.formats.safetensors_header import name_problem
from lorary.formats.strict_json import named, show
from lorary.formats.tensor_file import DTYPES, write_tensors
from lorary.formats.values import not_finite

_OWN = (native.NAME, native.TENSORS, PEFT_CONFIG, WEIGHTS, "adapter_model.bin")


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
    tensors = native.native_tensors(adapter)
    _check_values(tensors, folder)
    as_peft = not peft_writer.obstacles(adapter, model)
    needed = sum(t.nbytes for t in tensors.values())
    with atomic_directory(folder, replace=True, keep=True, drop=_OWN, needed=needed) as temporary:
        if as_peft:
            words = peft_writer.config(adapter, model, *peft_writer.scales(adapter))
            (temporary / PEFT_CONFIG).write_text(peft_writer.config_text(words), encoding="utf-8")
            write_tensors(temporary / WEIGHTS, native.peft_tensors(adapter))
        else:
            write_tensors(temporary / native.TENSORS, tensors)
        native.write_record(temporary, adapter)


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

    LoRA and its kin keep their tensors; every other method is written as the two factors that its update stands for,
    with the scale in B.

    Args:
        adapter: what to export.
        folder: a new folder, or one that holds a PEFT adapter to be replaced.
        model: the base, where it is at hand, as for `save_adapter`.

    Raises:
        FileError: PEFT has no LoRA with this function, with every reason; or the folder cannot be written.
        MethodError: the method has no low-rank form.
    """
    problems = [*peft_writer.site_obstacles(adapter), *peft_writer.full_words(adapter, model).problems]
    if (Path(folder) / native.NAME).exists():
        what = f"it holds {native.NAME}: the adapter there would be lost"
        problems.append(Problem("", what, "export to another folder"))
    if problems:
        raise FileError(f"cannot export an adapter to {show(os.fspath(folder), most=400)} for PEFT", problems)
    if peft_writer.obstacles(adapter, model):  # not a LoRA, but its update is one
        sizes = {name: (form.A.shape[0], float(form.A.shape[0])) for name, form in adapter.low_rank().items()}
        root, tensors = False, _low_rank_tensors(adapter)
    else:
        (sizes, root), tensors = peft_writer.scales(adapter), native.peft_tensors(adapter)
    _check_values(tensors, folder)
    needed = sum(t.nbytes for t in tensors.values())
    with atomic_directory(folder, replace=True, keep=True, drop=_OWN, needed=needed) as temporary:
        words = peft_writer.config(adapter, model, sizes, root)
        (temporary / PEFT_CONFIG).write_text(peft_writer.config_text(words), encoding="utf-8")
        write_tensors(temporary / WEIGHTS, tensors)


def _low_rank_tensors(adapter: Adapter) -> dict[str, Tensor]:
    forms = adapter.low_rank()
    moved = [name for name, form in forms.items() if form.gain is not None or form.shift is not None]
    if moved:
        what = "its output has a gain or a shift, which a plain LoRA has not"
        raise FileError("cannot export this adapter for PEFT", [Problem(name, what) for name in moved])
    sites = {p.site.name: p.site for p in adapter.placed}
    tensors = {k: t for name, form in forms.items() for k, t in peft_keys.encoded(sites[name], form.A, form.B).items()}
    tensors |= {peft_keys.full_name(name, set(sites)): t for name, t in adapter.full.items()}
    return {peft_keys.PREFIX + name: t for name, t in tensors.items()}


def _check_values(tensors: dict[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Refuses to write what would be refused when read."""
    problems = [Problem(named(name), what) for name in tensors if (what := name_problem(name))]
    known = tuple(DTYPES.values())
    accepted = ", ".join(str(d).removeprefix("torch.") for d in known)
    for name, tensor in tensors.items():
        if tensor.dtype not in known:
            what = f"is {str(tensor.dtype).removeprefix('torch.')}; adapters are saved as {accepted}"
            problems.append(Problem(named(name), what))
        elif tensor.is_meta:
            problems.append(Problem(named(name), "has no values: its model is on the meta device"))
    if not problems:
        with torch.no_grad():
            problems = not_finite(tensors)
    if problems:
        raise FileError(f"cannot save an adapter to {show(os.fspath(folder), most=400)}", problems)


def _no_adapter(path: Path) -> Problem:
    if (path / "config.json").exists():
        fix = "this looks like a whole model: load it as the base"
    else:
        inside = sorted(p.name for p in path.iterdir() if (p / native.NAME).exists() or (p / PEFT_CONFIG).exists())
        fix = f"an adapter is in its folder {inside[0]!r}" if inside else ""
    try:
        weights_name(path)
    except FileError as error:
        return error.problems[0]
    return Problem("", f"it holds neither {native.NAME} nor {PEFT_CONFIG}", fix)
