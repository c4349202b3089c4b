"""The files of a model folder that a merged model keeps: tokenizer, chat template, generation settings, processors."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Iterator
from pathlib import Path

from lorary.adapters.hub import CHAT_TEMPLATE
from lorary.errors import FileError
from lorary.files.safe_open import open_inside
from lorary.model.loading.weight_files import INDEX

_KEPT = (
    *("*token*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", CHAT_TEMPLATE, "chat_template.json"),
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
    for name in _found(source):
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


def _found(source: Path) -> Iterator[str]:
    for folder, patterns in ((source, _KEPT), (source / _TEMPLATES, ("*.jinja",))):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_file() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns):
                yield path.relative_to(source).as_posix()
