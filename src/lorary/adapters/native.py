"""lorary's own folder: `lorary.json` beside the tensors.

    lorary.json                  format, version, method record, sites, base fingerprint, SHA-256 of the other files
    adapter_config.json          } where PEFT computes the very same function: the folder is a PEFT adapter too
    adapter_model.safetensors    }
    adapter.safetensors          otherwise: `site|role` -> tensor, and base parameters by their own paths; where the
                                 base gave up a part of its weight, where it started as `site|role0`; what all sites
                                 share, once, as `|role`; what the sites of a share train in common (LoRA-drop),
                                 once, as `|share|role`

Which of the two it is stands in `lorary.json`; the tensors are the same numbers either way. PEFT knows no shares: in
its files every site has a copy, which a reader holds to the others and then drops. What earlier tasks have learnt
(O-LoRA) stands below the new task's factors there, as further directions; the record tells how many are whose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lorary import __version__, _deprecated
from lorary.adapters import shared_tensors, tied_sites
from lorary.adapters.adapter import Adapter
from lorary.adapters.expected_tensors import compare_tensors, mixed_dtypes
from lorary.adapters.peft import keys as peft_keys
from lorary.adapters.peft.config import NAME as PEFT_CONFIG
from lorary.adapters.peft.reader import NO_OP, WEIGHTS, parsed_json
from lorary.adapters.peft.types import PeftType, peft_type_of
from lorary.adapters.shared_tensors import SharedTensors
from lorary.adapters.site_records import placed_from, read_sites, site_record
from lorary.adapters.value_checks import does_nothing, not_finite, out_of_range
from lorary.errors import Diagnostic, FileError, MethodError
from lorary.files.findings import Findings
from lorary.files.manifest import sha256
from lorary.files.strict_json import named, show
from lorary.files.tensor_file import TensorFile
from lorary.model.fingerprint import Fingerprint
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, shared_shapes, unique_tensor_sets

NAME = "lorary.json"
TENSORS = "adapter.safetensors"
FORMAT = 2
_READ = (1, 2)  # 1: lorary 0.5 and before, with other names for components and fields
_DIGEST = {"size", "sha256"}
_KEYS = {"format", "lorary", "method", "base", "full", "files", "sites"}
_DRAWN = "drawn"  # only where what the sites share is drawn again from its seed


def write_record(folder: Path, adapter: Adapter, shared: SharedTensors) -> None:
    """Writes `lorary.json` over the files that are in `folder` already."""
    files = {p.name: {"size": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir())}
    head = {
        "format": FORMAT,
        "lorary": __version__,
        "method": adapter.method.to_dict(),
        "base": asdict(adapter.base),
        "full": sorted(adapter.full),
        "files": {name: entry for name, entry in files.items() if name in (PEFT_CONFIG, WEIGHTS, TENSORS)},
    }
    if not shared.kept:
        head[_DRAWN] = shared_tensors.checksums(shared.whole)
    lines = [json.dumps(site_record(p, adapter.method)) for p in adapter.sites]
    sites = "\n    " + ",\n    ".join(lines) + "\n  " if lines else ""
    text = json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "sites": [{sites}]\n}}\n'
    (folder / NAME).write_text(text, encoding="utf-8")


def native_tensors(adapter: Adapter, shared: SharedTensors) -> dict[str, Tensor]:
    """The contents of `adapter.safetensors`."""
    tensors = {
        tied_sites.key(p, role): t
        for p in unique_tensor_sets(adapter.sites)
        for role, t in adapter.tensors[p.site.name].items()
        if role not in p.delta.shared
    }
    common = shared.whole if shared.kept else {}
    return tensors | {f"|{role}": t for role, t in common.items()} | dict(adapter.full)


def read_native(folder: Path, findings: Findings) -> Adapter:
    """Reads the adapter that lorary saved in `folder`.

    Args:
        folder: a resolved folder.
        findings: what is wrong goes there, and is raised from there.

    Raises:
        FileError: every reason why it cannot be used.
    """
    record = parsed_json(folder, NAME)
    _check_record(record, findings)
    findings.settle()
    data = cast("dict[str, Any]", record)
    method = _method(data["method"], findings)
    if data["format"] == 1:
        data["sites"] = [_deprecated.current_site(site) for site in data["sites"]]
    sites = read_sites(data["sites"], findings)
    findings.settle()
    placed = placed_from(sites, data["sites"], cast(Method, method), findings)
    findings.settle()
    if _DRAWN in data and (what := shared_tensors.invalid_record(data[_DRAWN], placed)):
        findings.fatal.append(Diagnostic(f"{NAME}: {_DRAWN}", what))
    findings.settle()
    peft_type = peft_type_of(placed) if WEIGHTS in data["files"] else None
    if peft_type is None and WEIGHTS in data["files"]:
        what = "PEFT has no adapter with the tensors of this method, and they are said to be in PEFT's file"
        findings.fatal.append(Diagnostic(f"{NAME}: files", what))
        findings.settle()
    _check_file(folder, PEFT_CONFIG, data["files"], findings)
    with TensorFile(folder, WEIGHTS if peft_type else TENSORS) as file:
        _check_digest(file.name, file.size, file.sha256(), data["files"], findings)
        values, tensors, full = _tensors(file, placed, data["full"], peft_type, _DRAWN not in data, findings)
    tensors, torn = tied_sites.rejoined(placed, tensors)
    findings.fatal += [Diagnostic(f"{file.name}: {p.where}", p.what) for p in torn]
    tensors = _with_shared(tensors, values, placed, cast(Method, method), data.get(_DRAWN), findings)
    if does_nothing(placed, tensors):
        findings.alerts.append(NO_OP)
    base = Fingerprint(**data["base"])
    return Adapter(cast(Method, method), placed, tensors, full, base, findings.conclude())


def _check_record(record: object, findings: Findings) -> None:
    """The record's outline; what is inside `method` and `sites` has readers of its own."""
    if not isinstance(record, dict):
        findings.fatal.append(Diagnostic(NAME, "is not a JSON object"))
        return
    written = record.get("format")
    if type(written) is int and written > FORMAT:
        what = (
            f"has format {written}, written by lorary {show(record.get('lorary'))}; this version reads up to {FORMAT}"
        )
        findings.fatal.append(Diagnostic(NAME, what, "update lorary"))
        return
    for key in sorted(_KEYS ^ (set(record) - {_DRAWN})):
        what = "is missing" if key in _KEYS else "is no field of the format"
        (findings.fatal if key in _KEYS else findings.tolerable).append(Diagnostic(f"{NAME}: {named(key)}", what))
    if findings.fatal:
        return
    base, files, full = record["base"], record["files"], record["full"]
    names = set(Fingerprint.__dataclass_fields__)
    listed = ({PEFT_CONFIG, WEIGHTS}, {TENSORS})
    texts = isinstance(base, dict) and all(isinstance(v, str) for v in base.values())
    unique = isinstance(full, list) and all(isinstance(n, str) for n in full) and len(set(full)) == len(full)
    digests = isinstance(files, dict) and all(isinstance(e, dict) and set(e) == _DIGEST for e in files.values())
    checks = {
        "format": (type(written) is int and written in _READ, f"is {show(written)}; this version reads up to {FORMAT}"),
        "lorary": (isinstance(record["lorary"], str), "is no version"),
        "base": (texts and set(base) == names, f"has to hold the texts {', '.join(sorted(names))}"),
        "full": (unique, "has to be a list of different names"),
        "files": (digests and set(files) in listed, f"has to be about {PEFT_CONFIG} and {WEIGHTS}, or {TENSORS}"),
        "sites": (isinstance(record["sites"], list), "has to be a list"),
    }
    findings.fatal += [Diagnostic(f"{NAME}: {key}", what) for key, (good, what) in checks.items() if not good]


def _method(record: Any, findings: Findings) -> Method | None:
    try:
        return Method.from_dict(record)
    except MethodError as error:
        findings.fatal += [Diagnostic(f"{NAME}: method: {p.where}", p.what, p.fix) for p in error.problems]
        return None


def _check_file(folder: Path, name: str, files: Mapping[str, Any], findings: Findings) -> None:
    if name in files:
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        _check_digest(name, size, sha256(path) if size == files[name]["size"] else "", files, findings)


def _check_digest(name: str, size: int, digest: str, files: Mapping[str, Any], findings: Findings) -> None:
    if {"size": size, "sha256": digest} != files[name]:
        changed = "is missing" if size < 0 else "is not the file that was saved (SHA-256 differs)"
        fix = "restore it, or save the adapter again"
        if name != TENSORS and size >= 0:
            fix += f"; if PEFT wrote it since, remove {NAME} and the folder is read as PEFT's"
        findings.fatal.append(Diagnostic(name, changed, fix))


def _tensors(
    file: TensorFile,
    placed: tuple[AdaptedSite, ...],
    full: list[str],
    peft_type: PeftType | None,
    shared: bool,
    findings: Findings,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """What the file shares between sites by role, site -> role -> tensor, and base parameter -> tensor."""
    findings.settle()
    own = _expected(placed, peft_type)
    sizes = shared_shapes(placed) if shared else {}
    common = {role: peft_type.shared[role] if peft_type else f"|{role}" for role in sizes}
    sites = {p.site.name for p in placed}
    keys = {name: peft_keys.full_name(name, sites) if peft_type else name for name in full}
    names = {peft_keys.short(name) if peft_type else name: name for name in file.header.tensors}
    found = {name: file.header.tensors[written] for name, written in names.items()}
    expected = {name: shape for layout in own.values() for name, shape in layout.values()}
    expected |= {common[role]: size for role, size in sizes.items()}
    expected |= {key: found[key].shape if key in found else () for key in keys.values()}
    vital = {layout[role][0] for p in placed if (layout := own[p.site.name]) for role in layout if _vital(p, role)}
    explain = "belongs to no site and no parameter of the record"
    usable = compare_tensors(expected, found, findings, lambda name: explain, vital | set(common.values()))
    findings.settle()
    raw = file.read(names[name] for name in usable)
    values = {name: raw[names[name]] for name in usable}
    findings.tolerable += [*not_finite(values), *out_of_range({n: values[n] for n in usable if n not in keys.values()})]
    findings.notes += mixed_dtypes(found)
    findings.settle()
    tensors = {p.site.name: _roles(p, own[p.site.name], values, peft_type) for p in placed}
    parameters = {name: values[key] for name, key in keys.items() if key in values}
    return {role: values[name] for role, name in common.items()}, tensors, parameters


def _with_shared(
    tensors: Mapping[str, dict[str, Tensor]],
    shared: Mapping[str, Tensor],
    placed: tuple[AdaptedSite, ...],
    method: Method,
    record: Mapping[str, Any] | None,
    findings: Findings,
) -> dict[str, dict[str, Tensor]]:
    """The sites' tensors, and of each what it has of those that all share, drawn again where the file has none."""
    if record is not None:
        shared, problems = shared_tensors.regenerate(record, method, placed)
        findings.fatal += [Diagnostic(f"{NAME}: {_DRAWN}: {p.where}", p.what, p.fix) for p in problems]
        findings.settle()
    corners = shared_tensors.leading_slices(placed, shared)
    return {name: roles | corners[name] for name, roles in tensors.items()}


def _vital(p: AdaptedSite, role: str) -> bool:
    """Whether nothing can stand for a tensor that is missing: zero would not be "no change" there."""
    return bool(p.starts) or role not in p.delta.roles


def _expected(
    placed: tuple[AdaptedSite, ...], peft_type: PeftType | None
) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """site -> role -> (name, shape) of its own tensors."""
    if peft_type:
        return {p.site.name: peft_type.layout(p) for p in placed}
    return {
        p.site.name: {
            role: (tied_sites.key(p, role), shape) for role, shape in p.stored.items() if role not in p.delta.shared
        }
        for p in placed
    }


def _roles(
    p: AdaptedSite,
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    values: Mapping[str, Tensor],
    peft_type: PeftType | None,
) -> dict[str, Tensor]:
    here = {role: values[name] if name in values else torch.zeros(shape) for role, (name, shape) in layout.items()}
    if peft_type is None:
        return here
    try:
        return peft_type.decode(p, {name: here[role] for role, (name, _) in layout.items()})
    except FileError as error:
        raise FileError("", [Diagnostic(f"{WEIGHTS}: {q.where}", q.what) for q in error.problems]) from None
