"""Checkpoints: whole or not at all, checked before they are used, and without pickle.

    checkpoint-120/
      adapter/             the adapter, as `lorary.save` writes it: load it, serve it, merge it
      state.safetensors    the optimizer's moments by parameter name, the rules' tensors, random number streams
      state.json           everything about the run that is not a tensor
      trainer_state.json   Transformers' own record: steps, epoch, log
      MANIFEST.json        size and SHA-256 of each of these

The folder is filled under a temporary name and renamed when all of it is on the disk. A manifest that fits is
therefore the mark of a complete checkpoint, and resuming takes the newest one that has it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lorary.adapters import save_adapter
from lorary.adapters.adapter import Adapter
from lorary.errors import Diagnostic, FileError, TrainingError
from lorary.files import atomic, manifest
from lorary.files.tensor_file import write_tensors

ADAPTER, TENSORS, STATE = "adapter", "state.safetensors", "state.json"
RECORD = "trainer_state.json"  # where Transformers looks for it
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")


def write(
    path: Path,
    adapter: Adapter,
    state: dict[str, Any],
    facts: dict[str, Any],
    also: Callable[[Path], None],
    model: nn.Module | None = None,
) -> None:
    """Writes a checkpoint folder; a killed process or a full disk leaves none, or the one that was there.

    Args:
        path: `…/checkpoint-N`.
        adapter: what has been learnt so far.
        state: nested dicts, lists, tuples, tensors, numbers, text, None.
        facts: of the manifest: step, versions.
        also: writes further files into the folder that it is given.
        model: what the adapter is attached to, as for `save_adapter`.

    Raises:
        FileError: the disk is full, or the system refuses.
        TrainingError: something in the adapter is not finite, or something in the state has no place in a file.
    """
    _check_finite(adapter)
    tensors: dict[str, Tensor] = {}
    plain = pack(state, tensors)
    with atomic.atomic_directory(path, replace=True) as folder:
        try:
            save_adapter(adapter, folder / ADAPTER, model=model)
        except FileError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in atomic.FULL:
                raise error.__cause__ from None  # the checkpoint could not be written, not a folder of no name
            raise
        write_tensors(folder / TENSORS, tensors)
        text = json.dumps({"format": FORMAT, "state": plain}, allow_nan=False)
        (folder / STATE).write_text(text, encoding="utf-8")
        also(folder)
        manifest.write_manifest(folder, facts)


def read(path: Path) -> dict[str, Any]:
    """The `state` that `write` was given.

    Raises:
        FileError: the folder is not a complete checkpoint of this format.
    """
    manifest.verify_manifest(path, hashes=False)
    stored = json.loads((path / STATE).read_text(encoding="utf-8"))
    if stored["format"] != FORMAT:
        what = f"checkpoint format {stored['format']}; this version of lorary reads {FORMAT}"
        raise FileError(f"cannot resume from {path.name}:", [Diagnostic(STATE, what)])
    state: dict[str, Any] = unpack(stored["state"], load_file(path / TENSORS))
    return state


def newest(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The newest complete checkpoint in a folder, every file compared with its hash.

    Returns:
        its path, or None; and one sentence for each newer one that was passed over.
    """
    skipped = []
    for path in sorted(saved(folder), key=step_of, reverse=True):
        try:
            manifest.verify_manifest(path)
        except FileError as error:
            reason = "; ".join(f"{p.where}: {p.what}" if p.where else p.what for p in error.problems[:3])
            skipped.append(f"passed over {path.name}, which is incomplete or damaged ({reason})")
            continue
        return path, tuple(skipped)
    return None, tuple(skipped)


def saved(folder: Path) -> list[Path]:
    """The checkpoint folders, complete or not, in the order of their steps."""
    found = [p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The optimizer step that a checkpoint folder is named after."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def rotate(folder: Path, keep: int | None, best: str | None = None) -> list[Path]:
    """Removes all but the `keep` newest checkpoints and the best one; returns what was removed.

    The manifest goes first: a process killed half-way leaves a folder that nobody takes for a checkpoint. What the
    clock says does not count, only the steps.
    """
    spared = {Path(best).name} if best else set()
    others = [p for p in saved(folder) if p.name not in spared]
    if keep is None:
        return []
    doomed = others[: max(0, len(others) - max(1, keep - len(spared)))]
    for path in doomed:
        (path / manifest.NAME).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    return doomed


def pack(value: Any, tensors: dict[str, Tensor], place: str = "") -> Any:
    """JSON for any nest of plain values; its tensors go into `tensors` under the path to them.

    What JSON cannot say is written as a dictionary with one key that begins with `$`.

    Raises:
        TrainingError: a value that could only be pickled.
    """
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {"$tensor": place}
    if isinstance(value, dict):
        return {str(k): pack(v, tensors, f"{place}/{k}" if place else str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [pack(v, tensors, f"{place}/{i}") for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    what = f"a {type(value).__name__} could only be pickled, and a pickle runs code when it is read"
    raise TrainingError("cannot save the training state:", [Diagnostic(place, what, "use another optimizer")])


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `pack` was given."""
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": place}:
            return tensors[place]
        case {"$tuple": items}:
            return tuple(unpack(v, tensors) for v in items)
        case {"$float": text}:
            return float(text)
    return {k: unpack(v, tensors) for k, v in value.items()}


def _check_finite(adapter: Adapter) -> None:
    named = {f"{site}.{role}": t for site, roles in adapter.tensors.items() for role, t in roles.items()}
    bad = [name for name, t in {**named, **adapter.full}.items() if not torch.isfinite(t).all()]
    if bad:
        problems = [Diagnostic(name, "holds numbers that are not finite") for name in bad[:10]]
        raise TrainingError("cannot save a checkpoint:", problems)
