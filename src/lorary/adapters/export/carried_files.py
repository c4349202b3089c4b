"""The files of a model folder that a merged model keeps: tokenizer, chat template, generation settings, processors."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lorary.adapters.hub import CHAT_TEMPLATE
from lorary.errors import FileError
from lorary.files.safe_open import open_inside
from lorary.model.loading.weight_files import INDEX

_TOKENIZER = ("*token*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", CHAT_TEMPLATE, "chat_template.json")
_KEPT = (
    *_TOKENIZER,
    *("generation_config.json", "*processor_config.json", "*.py"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
_TEMPLATES = "additional_chat_templates"
_MOST_BYTES = 2**30


def carry_files(source: Path, target: Path) -> None:
    """Copy those of a model's files that are not its weights and configuration; what the target has already stays.

    Args:
        source: a resolved model folder.
        target: the folder of the merged model.

    Raises:
        FileError: one of them is a link out of its folder, no plain file, or too large.
    """
    _copy(_found(source, _KEPT), source, target)


def carry_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer that an adapter folder has: it may know tokens that were added for the adapter.

    Args:
        source: a resolved adapter folder.
        target: the folder of the same adapter in another form; what it has already stays.

    Raises:
        FileError: a file is a link out of its folder, no plain file, or too large.
    """
    _copy(_found(source, _TOKENIZER), source, target)


def _copy(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        if not (target / name).exists() and name != INDEX:
            (target / name).parent.mkdir(exist_ok=True)
            copy_file(source, name, target / name)


def copy_file(source: Path, name: str, target: Path) -> None:
    """Copy a plain file of a folder.

    Args:
        source: a resolved folder.
        name: of the file in it.
        target: the copy, a new file.

    Raises:
        FileError: it is a link out of the folder, no plain file, or too large.
    """
    try:
        file, _ = open_inside(source, name, _MOST_BYTES)
    except FileError as error:
        raise FileError(f"cannot copy the files of {source.name}:", error.problems) from None
    with file, open(target, "xb") as copy:
        shutil.copyfileobj(file, copy)


def _found(source: Path, kept: Sequence[str]) -> Iterator[str]:
    for folder, patterns in ((source, kept), (source / _TEMPLATES, ("*.jinja",))):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_file() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns):
                yield path.relative_to(source).as_posix()
