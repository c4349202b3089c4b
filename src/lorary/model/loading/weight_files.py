"""The safetensors files of a model's checkpoint, from which one tensor at a time is read.

Tensors are read into their own memory: pages of a mapped file would stay in the process until it is closed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorary.errors import Diagnostic, FileError
from lorary.files.safe_open import open_inside, read_json
from lorary.files.strict_json import named, show
from lorary.model.loading.source import ModelSection, check_folder, location

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_INDEX = 2**27  # bytes
_MOST_BYTES = 2**50  # of one file; the disk sets the real limit
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "additional_chat_templates/*")


def model_folder(section: ModelSection) -> Path:
    """The folder with a model's files: its own, or the snapshot of a Hub repository in the local cache.

    Raises:
        FileError: it does not exist, holds code or pickles, or cannot be downloaded.
    """
    check_folder(section)
    folder = Path(location(section))
    if folder.is_dir():
        return folder.resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(section.id, revision=section.revision, allow_patterns=list(_FILES))).resolve()
    except (OSError, ValueError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "no folder has that name either; the Hub needs a network, and HF_TOKEN for gated models"
        raise FileError(f"cannot read the model {section.id}:", [Diagnostic(section.id, what, fix)]) from None


class WeightFiles:
    """The tensors of a checkpoint by name, in one safetensors file or in several with an index. A context manager.

    Args:
        folder: a resolved model folder.

    Attributes:
        files: file name -> the names of its tensors, as the loader would take them from it.
        size: bytes of all files.

    Raises:
        FileError: there are no such files, or they are damaged or hostile; every reason.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.size = folder, 0
        self.files: dict[str, list[str]] = {}
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._stack = ExitStack()
        try:
            self._read_headers()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name, in memory of its own.

        Raises:
            FileError: it cannot be read.
        """
        file = self._file_of[name]
        try:
            tensor: Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._refused([Diagnostic(file, f"{show(name)} cannot be read: {error}")]) from error
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without its values."""
        return tuple(self._open[self._file_of[name]].get_slice(name).get_shape())

    def _read_headers(self) -> None:
        if (self.folder / SINGLE).exists():
            wanted: Mapping[str, set[str]] = {SINGLE: set()}
        elif (self.folder / INDEX).exists():
            wanted = self._index()
        else:
            what = f"there is neither {SINGLE} nor {INDEX} in it"
            raise self._refused([Diagnostic(self.folder.name, what, "`lorary merge` reads what Transformers reads")])
        problems: list[Diagnostic] = []
        for file, names in wanted.items():
            try:
                handle, size = open_inside(self.folder, file, _MOST_BYTES)
                handle.close()
                opened = self._stack.enter_context(safe_open(self.folder / file, framework="pt", backend="pread"))
            except FileError as error:
                problems += error.problems
                continue
            except (SafetensorError, OSError) as error:
                problems.append(Diagnostic(file, f"is not a whole safetensors file: {error}", "download it again"))
                continue
            there = list(opened.keys())
            problems += [Diagnostic(file, f"lacks {named(n)}, which {INDEX} lists") for n in sorted(names - set(there))]
            self._open[file], self.size = opened, self.size + size
            self.files[file] = [name for name in there if not names or name in names]
            self._file_of |= dict.fromkeys(self.files[file], file)
        if problems:
            raise self._refused(problems)

    def _index(self) -> dict[str, set[str]]:
        """file -> the tensors that the index places in it."""
        try:
            record = read_json(self.folder, INDEX, _MOST_INDEX)
        except FileError as error:
            raise self._refused(list(error.problems)) from None
        places = record.get("weight_map") if isinstance(record, dict) else None
        if not isinstance(places, dict) or not places or not all(isinstance(f, str) for f in places.values()):
            raise self._refused([Diagnostic(INDEX, "holds no `weight_map` of tensor names to file names")])
        files: dict[str, set[str]] = {}
        for name, file in places.items():
            files.setdefault(file, set()).add(name)
        wrong = [f for f in files if Path(f).name != f or f.startswith(".") or not f.endswith(".safetensors")]
        if wrong:
            what = "is not the name of a safetensors file in the folder"
            raise self._refused([Diagnostic(f"{INDEX}: {named(f)}", what) for f in wrong])
        return {file: files[file] for file in sorted(files)}

    def _refused(self, problems: list[Diagnostic]) -> FileError:
        return FileError(f"cannot read the weights of {self.folder.name}:", problems)


def write_index(folder: Path, places: Mapping[str, str], total: int) -> None:
    """Write the index of a checkpoint of several files.

    Args:
        folder: of the checkpoint.
        places: name of a tensor -> its file.
        total: bytes of all tensors.
    """
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")
