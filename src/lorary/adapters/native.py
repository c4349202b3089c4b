"""lorary's adapter folder: `lorary.json` and one of two forms of the tensors, which it names.

    lorary.json                  format, version, method, sites, fingerprint of the base, SHA-256 of the other files
    adapter_config.json          } if PEFT computes exactly the same function: the folder is a PEFT adapter too
    adapter_model.safetensors    }
    adapter.safetensors          otherwise:
                                     site|role      a tensor of one site
                                     site|role0     its start, for a residual base (PiSSA, OLoRA)
                                     |role          a tensor that all sites share (VeRA), once
                                     |share|role    a tensor of tied sites (LoRA-drop), once
                                     path           a base parameter trained in full

In the checkpoint of another library's trainer the last file, too, is called `adapter_model.safetensors`, for which
these trainers look. PEFT's files repeat the tensors of tied sites at each of them; a reader compares the copies and
keeps one. The ranks of earlier tasks (O-LoRA) follow the new task's there, and the record says how many belong to each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lorary import __version__, _deprecated
from lorary.adapters import shared_tensors
from lorary.adapters.adapter import Adapter
from lorary.adapters.peft import attention
from lorary.adapters.peft import keys as peft_keys
from lorary.adapters.peft.config import NAME as PEFT_CONFIG
from lorary.adapters.peft.experts import from_file
from lorary.adapters.peft.reader import MOST_JSON, WEIGHTS
from lorary.adapters.peft.types import PeftType, peft_type_of
from lorary.adapters.peft.virtual_tokens import are_virtual_tokens, virtual_tokens
from lorary.adapters.provenance import Provenance
from lorary.adapters.shared_tensors import SharedTensors
from lorary.adapters.site_records import adapted_sites, read_sites, site_record
from lorary.adapters.tensor_checks import Layout, alert_if_zero, expected_tensors, read_tensors, site_tensors
from lorary.adapters.wrapper_names import left_out, without_wrappers
from lorary.errors import Diagnostic, FileError, MethodError
from lorary.files.findings import Findings
from lorary.files.manifest import digest, sha256
from lorary.files.safe_open import read_json
from lorary.files.strict_json import named, show
from lorary.files.tensor_file import TensorFile
from lorary.model.fingerprint import Fingerprint
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, shared_shapes, unique_tensor_sets

NAME = "lorary.json"
TENSORS = "adapter.safetensors"
FORMAT = 2
_OLDEST = 1  # lorary 0.5 and before, with other names for components and fields
_KEYS = {"format", "lorary", "method", "base", "full", "files", "sites"}
_DRAWN = "drawn"  # only if the tensors that all sites share are regenerated from their seed
_PROVENANCE = "provenance"  # only if it was made from other adapters


def write_record(folder: Path, adapter: Adapter, shared: SharedTensors) -> None:
    """Write `lorary.json`, with the digests of the files that are in `folder` already."""
    head = {
        "format": FORMAT,
        "lorary": __version__,
        "method": adapter.method.to_dict(),
        "base": adapter.base.record(),
        "full": sorted(adapter.full),
        "files": {n: digest(folder / n) for n in (PEFT_CONFIG, WEIGHTS, TENSORS) if (folder / n).exists()},
    }
    if not shared.stored:
        head[_DRAWN] = shared_tensors.checksums(shared.tensors)
    if adapter.provenance is not None:
        head[_PROVENANCE] = adapter.provenance.record()
    lines = [json.dumps(site_record(adapted, adapter.method)) for adapted in adapter.sites]
    sites = "\n    " + ",\n    ".join(lines) + "\n  " if lines else ""
    text = json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "sites": [{sites}]\n}}\n'
    (folder / NAME).write_text(text, encoding="utf-8")


def native_tensors(adapter: Adapter, shared: SharedTensors) -> dict[str, Tensor]:
    """The contents of `adapter.safetensors`."""
    own = {
        name: adapter.tensors[adapted.site.name][role]
        for adapted in unique_tensor_sets(adapter.sites)
        for role, (name, _) in _layout(adapted).items()
    }
    common = {f"|{role}": t for role, t in shared.tensors.items()} if shared.stored else {}
    return own | common | dict(adapter.full)


def read_native(folder: Path, findings: Findings) -> Adapter:
    """The adapter that lorary saved in `folder`.

    Args:
        folder: a resolved folder.
        findings: collects the problems, and raises them.

    Raises:
        FileError: every reason why it cannot be used.
    """
    data, method, sites = _description(folder, findings)
    files = data["files"]
    if _DRAWN in data and (what := shared_tensors.invalid_record(data[_DRAWN], sites)):
        findings.fatal.append(Diagnostic(f"{NAME}: {_DRAWN}", what))
    peft_type = peft_type_of(sites) if PEFT_CONFIG in files else None
    if peft_type is None and PEFT_CONFIG in files and (data["full"] or not are_virtual_tokens(sites)):
        what = f"{WEIGHTS} is listed, but no PEFT adapter type has the tensors of this method"
        findings.fatal.append(Diagnostic(f"{NAME}: files", what))
    provenance = _provenance(data, findings)
    findings.raise_refused()
    if PEFT_CONFIG in files:
        path, recorded = folder / PEFT_CONFIG, files[PEFT_CONFIG]
        size = path.stat().st_size if path.is_file() else -1
        hashed = sha256(path) if size == recorded["size"] else ""
        _check_digest(PEFT_CONFIG, size, hashed, recorded, findings)
    with TensorFile(folder, WEIGHTS if WEIGHTS in files else TENSORS) as file, _compared(file, files, findings):
        tensors, full = _tensors(file, sites, method, data, peft_type, findings)
    tensors, inconsistent = shared_tensors.rejoined(sites, tensors)
    findings.fatal += [Diagnostic(f"{file.name}: {problem.where}", problem.what) for problem in inconsistent]
    alert_if_zero(sites, tensors, findings)
    base, notes = Fingerprint(**data["base"]), findings.conclude()
    return _unwrapped(Adapter(method, sites, tensors, full, base, notes, provenance))


def recorded_sites(folder: Path) -> tuple[AdaptedSite, ...]:
    """The sites in the record of a folder, without their tensors.

    Raises:
        FileError: every reason to refuse the record.
    """
    return _description(folder, Findings("", strict=True))[2]


def check_written(folder: Path) -> None:
    """Read the record and the tensors' header of a new folder as a reader does, without the tensors' values.

    Raises:
        FileError: every reason why a reader would refuse it.
    """
    findings = Findings("", strict=True)
    data = _description(folder.resolve(), findings)[0]
    with TensorFile(folder.resolve(), WEIGHTS if WEIGHTS in data["files"] else TENSORS):
        pass


def _description(folder: Path, findings: Findings) -> tuple[dict[str, Any], Method, tuple[AdaptedSite, ...]]:
    """The record of a folder, its method and its sites.

    Raises:
        FileError: every reason to refuse it.
    """
    data = _record(read_json(folder, NAME, MOST_JSON), findings)
    plain_sites, method = read_sites(data["sites"], findings), _method(data["method"])
    findings.raise_refused()
    sites = adapted_sites(plain_sites, data["sites"], method, findings)
    findings.raise_refused()
    return data, method, sites


def _unwrapped(adapter: Adapter) -> Adapter:
    """The adapter in the names of the plain model: releases up to 0.5 saved those of a compiled one."""
    names = [adapted.site.name for adapted in adapter.sites] + list(adapter.full)
    plain = {name: without_wrappers(name)[0] for name in names}
    notes = left_out(c for name in names for c in without_wrappers(name)[1])
    if not notes:
        return adapter
    return replace(
        adapter,
        sites=tuple(replace(a, site=replace(a.site, name=plain[a.site.name])) for a in adapter.sites),
        tensors={plain[name]: roles for name, roles in adapter.tensors.items()},
        full={plain[name]: value for name, value in adapter.full.items()},
        base=replace(adapter.base, architecture="", structure=""),  # the wrapper's; the weights are still compared
        notes=(*adapter.notes, *notes),
    )


def _record(record: Any, findings: Findings) -> dict[str, Any]:
    """The record with its outline checked, in the names of the present format.

    Raises:
        FileError: every reason to refuse it.
    """
    findings.fatal += _outline_problems(record, findings)
    findings.raise_refused()
    sites = map(_deprecated.current_site, record["sites"]) if record["format"] == _OLDEST else record["sites"]
    return {**record, "sites": list(sites)}


def _outline_problems(record: Any, findings: Findings) -> list[Diagnostic]:
    if not isinstance(record, dict):
        return [Diagnostic(NAME, "is not a JSON object")]
    written, release = record.get("format"), show(record.get("lorary"))
    if type(written) is int and written > FORMAT:
        what = f"has format {written}, written by lorary {release}; this version reads up to {FORMAT}"
        return [Diagnostic(NAME, what, "update lorary")]
    unknown = sorted(set(record) - _KEYS - {_DRAWN, _PROVENANCE})
    findings.tolerable += [Diagnostic(f"{NAME}: {named(key)}", "is not a field of the format") for key in unknown]
    if missing := sorted(_KEYS - set(record)):
        return [Diagnostic(f"{NAME}: {key}", "is missing") for key in missing]
    base, files, full = record["base"], record["files"], record["full"]
    unique = isinstance(full, list) and all(isinstance(n, str) for n in full) and len(set(full)) == len(full)
    digests = isinstance(files, dict) and all(
        isinstance(entry, dict) and set(entry) == {"size", "sha256"} for entry in files.values()
    )
    listed = digests and set(files) in ({PEFT_CONFIG, WEIGHTS}, {TENSORS}, {WEIGHTS})
    known = type(written) is int and written >= _OLDEST
    known_base = Fingerprint.from_record(base) is not None
    checks = {
        "format": (known, f"is {show(written)}; this version reads {_OLDEST} to {FORMAT}"),
        "lorary": (isinstance(record["lorary"], str), "is not a version"),
        "base": (known_base, "must hold the texts architecture, name, structure, weights"),
        "full": (unique, "must be a list of different names"),
        "files": (listed, f"must describe {PEFT_CONFIG} and {WEIGHTS}, or one of {TENSORS} and {WEIGHTS}"),
        "sites": (isinstance(record["sites"], list), "must be a list"),
    }
    return [Diagnostic(f"{NAME}: {key}", what) for key, (good, what) in checks.items() if not good]


def _method(record: Any) -> Method:
    try:
        return Method.from_dict(record)
    except MethodError as error:
        problems = [Diagnostic(f"{NAME}: method: {p.where}", p.what, p.fix) for p in error.problems]
        raise FileError("", problems) from None


def _provenance(record: Mapping[str, Any], findings: Findings) -> Provenance | None:
    """The provenance in a record; a malformed one is a finding."""
    try:
        return Provenance.from_record(record[_PROVENANCE]) if _PROVENANCE in record else None
    except ValueError as error:
        findings.fatal.append(Diagnostic(f"{NAME}: {_PROVENANCE}", str(error)))
        return None


def _check_digest(name: str, size: int, hashed: str, recorded: Mapping[str, Any], findings: Findings) -> None:
    """Note a file that is missing (of size -1) or differs from the recorded one."""
    if {"size": size, "sha256": hashed} != recorded:
        what = "is missing" if size < 0 else "is not the file that was saved (SHA-256 differs)"
        fix = "restore it, or save the adapter again"
        if name != TENSORS and size >= 0:
            fix += f"; if PEFT wrote it since, remove {NAME} and the folder is read as PEFT's"
        findings.fatal.append(Diagnostic(name, what, fix))


@contextmanager
def _compared(file: TensorFile, recorded: Mapping[str, Any], findings: Findings) -> Iterator[None]:
    """Compare a file with its digest while its tensors are read in the block: hashing takes longer than reading."""
    before = list(findings.fatal), list(findings.tolerable)
    with ThreadPoolExecutor(1) as beside:
        hashed = beside.submit(file.sha256)
        try:
            yield
        finally:
            if recorded[file.name] != {"size": file.size, "sha256": hashed.result()}:
                findings.fatal, findings.tolerable = before  # what a changed file holds does not matter
                _check_digest(file.name, file.size, hashed.result(), recorded[file.name], findings)
            findings.raise_refused()


def _tensors(
    file: TensorFile,
    sites: tuple[AdaptedSite, ...],
    method: Method,
    record: Mapping[str, Any],
    peft_type: PeftType | None,
    findings: Findings,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """site -> role -> tensor, and base parameter -> tensor."""
    if peft_type is None and PEFT_CONFIG in record["files"]:
        return virtual_tokens(sites, file, findings), {}
    if peft_type:
        at = {adapted.site.name for adapted in sites}
        layout, decode, shared = peft_type.layout, peft_type.decode, peft_type.shared
        parameters = {name: peft_keys.full_name(name, at) for name in record["full"]}
        names = {peft_type.canonical_name(peft_keys.short(name)): name for name in file.header.tensors}
        names = attention.from_file(names, attention.attentions_in(names))
        names = from_file(names, [adapted.site for adapted in sites])
    else:
        layout, decode, shared = _layout, _decode, {role: f"|{role}" for role in shared_shapes(sites)}
        parameters = {name: name for name in record["full"]}
        names = {name: name for name in file.header.tensors}
    expected, vital = expected_tensors(sites, layout, {} if _DRAWN in record else shared)
    full = {key: file.header.tensors[names[key]].shape if key in names else () for key in parameters.values()}
    explain = "belongs to no site and no parameter of the record"
    values = read_tensors(file, names, expected | full, findings, lambda name: explain, vital, full)
    findings.raise_refused()
    if _DRAWN in record:
        common, problems = shared_tensors.regenerate_recorded(record[_DRAWN], sites)
        findings.fatal += [Diagnostic(f"{NAME}: {_DRAWN}: {p.where}", p.what, p.fix) for p in problems]
    else:
        common = {role: values[name] for role, name in shared.items() if name in values}
    tensors = site_tensors(sites, values, expected, decode, common, findings)
    return tensors, {name: values[key] for name, key in parameters.items() if key in values}


def _layout(adapted: AdaptedSite) -> Layout:
    """The names and shapes of a site's own tensors in `adapter.safetensors`."""
    own = {role: shape for role, shape in adapted.stored.items() if role not in adapted.delta.shared}
    return {role: (shared_tensors.tensor_key(adapted, role), shape) for role, shape in own.items()}


def _decode(adapted: AdaptedSite, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {role: tensors[name] for role, (name, _) in _layout(adapted).items()}
