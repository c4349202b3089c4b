"""Checkpoints: written atomically, verified before use, and free of pickle.

    checkpoint-120/
      adapter/             the adapter, as `lorary.save` writes it: load it, serve it, merge it
      state.safetensors    the optimizer's moments by parameter name, the rules' tensors, random number streams
      state.json           everything about the run that is not a tensor
      trainer_state.json   Transformers' own record: steps, epoch, log
      MANIFEST.json        size and SHA-256 of each of these

`write` fills the folder under a temporary name and commits it by a rename once everything is on the disk. A matching
manifest therefore marks a complete checkpoint, and resuming takes the newest one that has it.
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
from lorary.adapters.tensor_checks import out_of_range
from lorary.errors import Diagnostic, FileError, TrainingError
from lorary.files import atomic, manifest
from lorary.files.tensor_file import write_tensors

ADAPTER, TENSORS, STATE = "adapter", "state.safetensors", "state.json"
TRAINER_STATE = "trainer_state.json"  # where Transformers looks for it
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")


def write(
    path: Path,
    adapter: Adapter,
    state: dict[str, Any],
    facts: dict[str, Any],
    write_more: Callable[[Path], None],
    model: nn.Module | None = None,
) -> None:
    """Write a checkpoint folder; after a crash or on a full disk the previous one, if any, is unchanged.

    Args:
        path: `…/checkpoint-N`.
        adapter: its current state.
        state: nested dicts, lists, tuples, tensors, numbers, text, None.
        facts: for the manifest: step, versions.
        write_more: writes further files into the folder that it is given.
        model: the model that the adapter is attached to, as for `save_adapter`.

    Raises:
        FileError: the disk is full, or the system refuses.
        TrainingError: the adapter is not finite or has diverged, or a value of the state cannot be stored.
    """
    _check_values(adapter)
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"format": FORMAT, "state": to_json(state, tensors)}, allow_nan=False)
    with atomic.atomic_directory(path, replace=True) as folder:
        try:
            save_adapter(adapter, folder / ADAPTER, model=model)
        except FileError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in atomic.FULL:
                raise error.__cause__ from None  # so that the message names the checkpoint, not the temporary folder
            raise
        write_tensors(folder / TENSORS, tensors)
        (folder / STATE).write_text(text, encoding="utf-8")
        write_more(folder)
        manifest.write_manifest(folder, facts)


def read(path: Path) -> dict[str, Any]:
    """The `state` of a checkpoint.

    Raises:
        FileError: the folder is not a complete checkpoint of this format.
    """
    manifest.verify_manifest(path, hashes=False)
    stored = json.loads((path / STATE).read_text(encoding="utf-8"))
    if stored["format"] != FORMAT:
        what = f"checkpoint format {stored['format']}; this version of lorary reads {FORMAT}"
        raise FileError(f"cannot resume from {path.name}:", [Diagnostic(STATE, what)])
    state: dict[str, Any] = from_json(stored["state"], load_file(path / TENSORS))
    return state


def newest(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The newest complete checkpoint in a folder, every file verified by its hash.

    Returns:
        its path, or None; and one sentence for each newer checkpoint that was passed over.
    """
    skipped = []
    for path in reversed(list_checkpoints(folder)):
        try:
            manifest.verify_manifest(path)
        except FileError as error:
            reason = "; ".join(f"{p.where}: {p.what}" if p.where else p.what for p in error.problems[:3])
            skipped.append(f"passed over {path.name}, which is incomplete or damaged ({reason})")
            continue
        return path, tuple(skipped)
    return None, tuple(skipped)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, complete or not, ordered by step."""
    found = [p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The optimizer step in a checkpoint folder's name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def rotate(folder: Path, keep: int | None, best: str | None = None, step: int | None = None) -> list[Path]:
    """Remove all but the `keep` newest checkpoints and the best one; returns the removed paths.

    Age is measured in steps, not by the clock. The manifest is removed first, so that a process killed half-way leaves
    a folder that counts as incomplete.

    Args:
        folder: the folder of the checkpoints.
        keep: how many stay; None for all.
        best: the best one.
        step: the run's present step. Later checkpoints are of a future that the run has left when it resumed from an
            earlier one; they go first.
    """
    if keep is None:
        return []
    spared = {Path(best).name} if best else set()
    found = [p for p in list_checkpoints(folder) if p.name not in spared]
    later = [p for p in found if step is not None and step_of(p) > step]
    others = found[: len(found) - len(later)]
    removed = later + others[: max(0, len(others) - max(1, keep - len(spared)))]
    for path in removed:
        (path / manifest.NAME).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    return removed


def to_json(value: Any, tensors: dict[str, Tensor], place: str = "") -> Any:
    """JSON for nested plain values; tensors are collected in `tensors` under their path.

    Values without a JSON form become a dictionary with one key that begins with `$`.

    Raises:
        TrainingError: a value that could only be pickled.
    """
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {"$tensor": place}
    if isinstance(value, dict):
        return {str(k): to_json(v, tensors, f"{place}/{k}" if place else str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [to_json(v, tensors, f"{place}/{i}") for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    what = f"a {type(value).__name__} could only be pickled, and a pickle runs code when it is read"
    raise TrainingError("cannot save the training state:", [Diagnostic(place, what, "use another optimizer")])


def from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that `to_json` was given."""
    if isinstance(value, list):
        return [from_json(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": place}:
            return tensors[place]
        case {"$tuple": items}:
            return tuple(from_json(v, tensors) for v in items)
        case {"$float": text}:
            return float(text)
    return {k: from_json(v, tensors) for k, v in value.items()}


def _check_values(adapter: Adapter) -> None:
    """Refuse an adapter that could not be read again.

    Raises:
        TrainingError: values that are not finite, or larger than those of any trained adapter.
    """
    named = {f"{site}.{role}": t for site, roles in adapter.tensors.items() for role, t in roles.items()}
    bad = [name for name, t in {**named, **adapter.full}.items() if not torch.isfinite(t).all()]
    problems = [Diagnostic(name, "contains non-finite values") for name in bad[:10]] or out_of_range(named)[:10]
    if problems:
        raise TrainingError("cannot save a checkpoint:", problems)
