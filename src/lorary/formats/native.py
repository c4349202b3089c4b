"""lorary's own folder: `lorary.json` beside the tensors.

    lorary.json                  format, version, method record, sites, base fingerprint, SHA-256 of the other files
    adapter_config.json          } where PEFT computes the very same function: the folder is a PEFT adapter too
    adapter_model.safetensors    }
    adapter.safetensors          otherwise: `site|role` -> tensor, and base parameters by their own paths

Which of the two it is stands in `lorary.json`; the tensors are the same numbers either way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lorary import __version__
from lorary.adapter import Adapter
from lorary.errors import FileError, MethodError, Problem
from lorary.fingerprint import Fingerprint
from lorary.formats import peft_keys
from lorary.formats.compare import compare, mixed_dtypes
from lorary.formats.findings import Findings
from lorary.formats.manifest import sha256
from lorary.formats.peft_config import NAME as PEFT_CONFIG
from lorary.formats.peft_reader import NO_OP, WEIGHTS, parsed_json
from lorary.formats.records import placed_from, read_sites, site_record
from lorary.formats.strict_json import named, show
from lorary.formats.tensor_file import TensorFile
from lorary.formats.values import absurd, does_nothing, not_finite
from lorary.placed import Placed
from lorary.record import Method

NAME = "lorary.json"
TENSORS = "adapter.safetensors"
FORMAT = 1
_DIGEST = {"size", "sha256"}
_KEYS = {"format", "lorary", "method", "base", "full", "files", "sites"}


def write_record(folder: Path, adapter: Adapter) -> None:
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
    lines = [json.dumps(site_record(p, adapter.method)) for p in adapter.placed]
    sites = "\n    " + ",\n    ".join(lines) + "\n  " if lines else ""
    text = json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "sites": [{sites}]\n}}\n'
    (folder / NAME).write_text(text, encoding="utf-8")


def native_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The contents of `adapter.safetensors`."""
    tensors = {f"{site}|{role}": t for site, roles in adapter.tensors.items() for role, t in roles.items()}
    return tensors | dict(adapter.full)


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The same numbers as PEFT's `adapter_model.safetensors`, with prefix."""
    tensors: dict[str, Tensor] = {}
    for p in adapter.placed:
        roles = adapter.tensors[p.site.name]
        tensors |= peft_keys.encoded(p.site, roles["A"], roles["B"])
    sites = {p.site.name for p in adapter.placed}
    tensors |= {peft_keys.full_name(name, sites): t for name, t in adapter.full.items()}
    return {peft_keys.PREFIX + name: t for name, t in tensors.items()}


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
    sites = read_sites(data["sites"], findings)
    findings.settle()
    placed = placed_from(sites, data["sites"], cast(Method, method), findings)
    findings.settle()
    as_peft = WEIGHTS in data["files"]
    _check_file(folder, PEFT_CONFIG, data["files"], findings)
    with TensorFile(folder, WEIGHTS if as_peft else TENSORS) as file:
        _check_digest(file.name, file.size, file.sha256(), data["files"], findings)
        tensors, full = _tensors(file, placed, data["full"], as_peft, findings)
    if does_nothing(placed, tensors):
        findings.alerts.append(NO_OP)
    base = Fingerprint(**data["base"])
    return Adapter(cast(Method, method), placed, tensors, full, base, findings.conclude())


def _check_record(record: object, findings: Findings) -> None:
    """The record's outline; what is inside `method` and `sites` has readers of its own."""
    if not isinstance(record, dict):
        findings.fatal.append(Problem(NAME, "is not a JSON object"))
        return
    written = record.get("format")
    if type(written) is int and written > FORMAT:
        what = f"has format {written}, written by lorary {show(record.get('lorary'))}; this version reads {FORMAT}"
        findings.fatal.append(Problem(NAME, what, "update lorary"))
        return
    for key in sorted(_KEYS ^ set(record)):
        what = "is missing" if key in _KEYS else "is no field of the format"
        (findings.fatal if key in _KEYS else findings.tolerable).append(Problem(f"{NAME}: {named(key)}", what))
    if findings.fatal:
        return
    base, files, full = record["base"], record["files"], record["full"]
    names = set(Fingerprint.__dataclass_fields__)
    listed = ({PEFT_CONFIG, WEIGHTS}, {TENSORS})
    texts = isinstance(base, dict) and all(isinstance(v, str) for v in base.values())
    unique = isinstance(full, list) and all(isinstance(n, str) for n in full) and len(set(full)) == len(full)
    digests = isinstance(files, dict) and all(isinstance(e, dict) and set(e) == _DIGEST for e in files.values())
    checks = {
        "format": (type(written) is int and written == FORMAT, f"is {show(written)}; this version reads {FORMAT}"),
        "lorary": (isinstance(record["lorary"], str), "is no version"),
        "base": (texts and set(base) == names, f"has to hold the texts {', '.join(sorted(names))}"),
        "full": (unique, "has to be a list of different names"),
        "files": (digests and set(files) in listed, f"has to be about {PEFT_CONFIG} and {WEIGHTS}, or {TENSORS}"),
        "sites": (isinstance(record["sites"], list), "has to be a list"),
    }
    findings.fatal += [Problem(f"{NAME}: {key}", what) for key, (good, what) in checks.items() if not good]


def _method(record: Any, findings: Findings) -> Method | None:
    try:
        return Method.from_dict(record)
    except MethodError as error:
        findings.fatal += [Problem(f"{NAME}: method: {p.where}", p.what, p.fix) for p in error.problems]
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
        findings.fatal.append(Problem(name, changed, fix))


def _tensors(
    file: TensorFile, placed: tuple[Placed, ...], full: list[str], as_peft: bool, findings: Findings
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """site -> role -> tensor, and base parameter -> tensor."""
    findings.settle()
    expected = _expected(placed, as_peft)
    sites = {p.site.name for p in placed}
    keys = {name: peft_keys.full_name(name, sites) if as_peft else name for name in full}
    names = {name.removeprefix(peft_keys.PREFIX) if as_peft else name: name for name in file.header.tensors}
    found = {name: file.header.tensors[written] for name, written in names.items()}
    expected |= {key: found[key].shape if key in found else () for key in keys.values()}
    usable = compare(expected, found, findings, lambda name: "belongs to no site and no parameter of the record")
    findings.settle()
    raw = file.read(names[name] for name in usable)
    values = {name: raw[names[name]] for name in usable}
    findings.tolerable += [*not_finite(values), *absurd({n: values[n] for n in usable if n not in keys.values()})]
    findings.notes += mixed_dtypes(found)
    findings.settle()
    tensors = {p.site.name: _roles(p, values, as_peft) for p in placed}
    return tensors, {name: values[key] for name, key in keys.items() if key in values}


def _expected(placed: tuple[Placed, ...], as_peft: bool) -> dict[str, tuple[int, ...]]:
    if not as_peft:
        return {f"{p.site.name}|{role}": shape for p in placed for role, shape in p.shapes.items()}
    layouts = (peft_keys.shapes(p.site, peft_keys.rank(p)).values() for p in placed)
    return {name: shape for layout in layouts for name, shape in layout}


def _roles(p: Placed, values: Mapping[str, Tensor], as_peft: bool) -> dict[str, Tensor]:
    if not as_peft:
        names = {role: f"{p.site.name}|{role}" for role in p.shapes}
        return {role: values[n] if n in values else torch.zeros(p.shapes[role]) for role, n in names.items()}
    layout = peft_keys.shapes(p.site, peft_keys.rank(p)).values()
    here = {name: values.get(name, torch.zeros(shape)) for name, shape in layout}
    try:
        return peft_keys.decoded(p, here)
    except FileError as error:
        raise FileError("", [Problem(f"{WEIGHTS}: {q.where}", q.what) for q in error.problems]) from None
