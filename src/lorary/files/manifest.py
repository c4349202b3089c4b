"""The manifest of a folder: name, size and SHA-256 of every file, so that damage is found before use."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lorary.errors import Diagnostic, FileError
from lorary.files import strict_json
from lorary.files.strict_json import named, show
from lorary.files.syscalls import fault_point, reason

NAME = "MANIFEST.json"
_FORMAT = 1
_LIMIT = 16 * 2**20  # bytes of JSON; a checkpoint has tens of files, not tens of thousands


def write_manifest(folder: str | os.PathLike[str], facts: Mapping[str, Any] | None = None) -> Path:
    """Write `MANIFEST.json` for every file in `folder` and its subfolders; return its path.

    Call it last inside the block of `atomic_directory`, whose rename commits it together with the files.

    Args:
        folder: the folder to describe.
        facts: further JSON values to record (step, versions, …).

    Raises:
        FileError: the folder holds something other than plain files and folders.
    """
    folder = Path(folder)
    problems, files = [], {}
    for entry in sorted(folder.rglob("*")):
        name = entry.relative_to(folder).as_posix()
        mode = entry.lstat().st_mode
        if stat.S_ISREG(mode) and name != NAME:
            files[name] = digest(entry)
        elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            problems.append(Diagnostic(name, "neither a plain file nor a folder"))
    if problems:
        raise FileError(f"cannot describe {str(folder)!r} in a manifest", problems)
    text = json.dumps({"format": _FORMAT, "facts": dict(facts or {}), "files": files}, indent=1, sort_keys=True)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")
    fault_point("manifest.written")
    return folder / NAME


def verify_manifest(folder: str | os.PathLike[str], *, hashes: bool = True) -> dict[str, Any]:
    """Compare a folder with its manifest; return the manifest's facts.

    Args:
        folder: the folder that `write_manifest` described.
        hashes: whether to compare contents too; otherwise only the manifest is read.

    Raises:
        FileError: every file that is missing, new, of another size or of other contents, or what is wrong
            with the manifest itself.
    """
    folder = Path(folder)
    headline = f"{str(folder)!r} is not what its manifest says"
    try:
        with open(folder / NAME, "rb") as file:
            manifest = strict_json.parse(file.read(_LIMIT + 1), _LIMIT)
        facts, files = _read(manifest)
    except (OSError, ValueError) as error:
        what = reason(error) if isinstance(error, OSError) else str(error)
        fix = "the folder was not written completely: use an older one"
        raise FileError(headline, [Diagnostic(NAME, what, fix)]) from error
    problems = [p for name, entry in files.items() for p in _compare(folder, name, entry, hashes)]
    present = {e.relative_to(folder).as_posix() for e in folder.rglob("*") if not e.is_dir() or e.is_symlink()}
    problems += [Diagnostic(named(n), "not in the manifest") for n in sorted(present - set(files) - {NAME})]
    if problems:
        raise FileError(headline, problems)
    return facts


def digest(path: Path) -> dict[str, Any]:
    """The size and the SHA-256 of a file, as recorded."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(manifest: object) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    if not isinstance(manifest, dict) or set(manifest) != {"format", "facts", "files"}:
        raise ValueError("not a manifest: it must have exactly the keys format, facts and files")
    if manifest["format"] != _FORMAT:
        raise ValueError(f"manifest format {show(manifest['format'])}; this version reads {_FORMAT}")
    facts, files = manifest["facts"], manifest["files"]
    if not isinstance(facts, dict) or not isinstance(files, dict):
        raise ValueError("not a manifest: facts and files must be objects")
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise ValueError(f"the file name {show(name)} leaves the folder")
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise ValueError(f"the entry of {show(name)} must have exactly the keys size and sha256")
    return facts, files


def _compare(folder: Path, name: str, entry: dict[str, Any], hashes: bool) -> list[Diagnostic]:
    path = folder / name
    try:
        status = path.lstat()
        inside = path.parent.resolve().is_relative_to(folder.resolve())
        if not stat.S_ISREG(status.st_mode) or not inside:
            return [Diagnostic(named(name), "not a plain file of this folder")]
        if status.st_size != entry["size"]:
            return [Diagnostic(named(name), f"{status.st_size:,} bytes, the manifest says {show(entry['size'])}")]
        if hashes and sha256(path) != entry["sha256"]:
            return [Diagnostic(named(name), "its contents are not those that were written (SHA-256 differs)")]
    except OSError as error:
        return [Diagnostic(named(name), reason(error))]
    return []
