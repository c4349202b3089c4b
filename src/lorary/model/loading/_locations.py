"""The location of a model: a folder, a Hub id or the built-in base; and the checks of a folder before it is read."""

from __future__ import annotations

import json
from pathlib import Path

from lorary.errors import Diagnostic, FileError, did_you_mean, suggested_path
from lorary.model.loading.source import ModelSection

BUILTIN = ("builtin:base",)


def location(section: ModelSection) -> str:
    """The folder or Hub id that Transformers takes.

    Raises:
        FileError: there is no built-in model of that name.
    """
    if not section.id.startswith("builtin:"):
        return str(Path(section.id).expanduser()) if section.id.startswith("~") else section.id
    if section.id not in BUILTIN:
        problem = Diagnostic("model.id", "no such model", did_you_mean(section.id, BUILTIN))
        raise FileError(f"cannot load {section.id}:", [problem])
    from lorary import builtin

    return str(builtin.path())


def check_folder(section: ModelSection) -> None:
    """Refuse a folder that does not hold a model, or would run code.

    Raises:
        FileError: every reason.
    """
    folder = Path(location(section))
    headline = f"cannot load the model {section.id}:"
    if not folder.exists():
        if section.id.startswith((".", "/", "~")) or section.id.count("/") > 1:
            fix = suggested_path(folder, folders=True)
            raise FileError(headline, [Diagnostic(section.id, "there is no such folder", fix)])
        return  # a Hub id
    if not (folder / "config.json").is_file():
        adapter = any((folder / name).is_file() for name in ("adapter_config.json", "lorary.json"))
        what = "it is an adapter, not a model" if adapter else "there is no config.json in it"
        raise FileError(headline, [Diagnostic(section.id, what)])
    problems = []
    try:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(headline, [Diagnostic("config.json", f"is not valid JSON: {error}")]) from None
    if isinstance(written, dict) and "auto_map" in written and not section.trust_remote_code:
        fix = "read that code, then set model.trust_remote_code: true"
        problems.append(Diagnostic("config.json", "`auto_map`: the model would run its own Python code", fix))
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles and not any(folder.glob("*.safetensors")):
        what = "weights as a pickle, which can run code when it is opened"
        problems.append(Diagnostic(pickles[0].name, what, "convert it to safetensors if you trust it"))
    if problems:
        raise FileError(headline, problems)
