"""Adapters on the Hub: an id such as `owner/name` wherever an adapter folder is taken.

Only an adapter's own JSON and safetensors files and its chat template are downloaded, into the cache of
`huggingface_hub`; never a pickle, and nothing of a whole model.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lorary.errors import Diagnostic, FileError, suggested_path
from lorary.files.safe_open import is_single_file

RECORDS = ("lorary.json", "adapter_config.json")
_TENSORS = ("adapter.safetensors", "adapter_model.safetensors", "adapters.safetensors")
CHAT_TEMPLATE = "chat_template.jinja"  # as Transformers saves it beside a tokenizer
OWN_FILES = (*RECORDS, *_TENSORS)
DIFFUSERS = "pytorch_lora_weights.safetensors"  # an adapter by itself, as diffusers saves it
_FOLDERS = ("", "adapter/")  # of an adapter folder, and of a whole run folder
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether a name can only be an adapter's or model's id on the Hub: `owner/name`, and no folder `owner` is here."""
    path = Path(name)
    return isinstance(name, str) and _ID.fullmatch(name) is not None and not os.path.lexists(path.parent)


def local_folder(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder itself; for a Hub id, the folder with the downloaded adapter.

    Raises:
        FileError: the Hub has no such adapter, refuses it, or cannot be reached.
    """
    if not is_hub_id(name):
        return name
    folder = download(str(name))
    found = None if folder is None else adapter_folder(folder)
    if found is None:
        what = f"the Hub's repository holds neither {' nor '.join(RECORDS)}"
        raise _refused(str(name), what, "this looks like a whole model: load it as the base")
    return found


def adapter_folder(path: Path) -> Path | None:
    """The adapter folder at `path`, or in the run folder `path`, or the file there; None if there is none."""
    if is_single_file(path):
        return path
    for folder in (path, path / "adapter"):
        if any((folder / name).is_file() for name in (*RECORDS, DIFFUSERS)):
            return folder
    return None


def download(name: str) -> Path | None:
    """The adapter files of a repository on the Hub, in the local cache; None if it has none, as a whole model.

    Raises:
        FileError: there is no such repository, it is private or gated, or the Hub cannot be reached and the cache has
            no copy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    files = [folder + file for folder in _FOLDERS for file in (*OWN_FILES, DIFFUSERS, CHAT_TEMPLATE)]
    try:
        folder = Path(snapshot_download(name, allow_patterns=files))
    except GatedRepoError:
        what, fix = "the Hub gives it to approved users only", "accept its terms on its page, and set HF_TOKEN"
    except RepositoryNotFoundError:
        what, fix = "the Hub has no such repository, or it is private", "check the name, and set HF_TOKEN if it is"
    except HFValidationError as error:
        what, fix = str(error).splitlines()[0], ""
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        offline = "HF_HUB_OFFLINE is set" if _offline() else "the Hub cannot be reached"
        what, fix = f"{offline} and the local cache has no copy", "download it first, or check the network"
    except OSError as error:  # of the network or the disk
        what, fix = f"the download failed: {(str(error).splitlines() or [type(error).__name__])[0]}", ""
    else:
        return folder if adapter_folder(folder) is not None else None
    raise _refused(name, what, fix)


def _offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return bool(is_offline_mode())


def _refused(name: str, what: str, fix: str) -> FileError:
    near = suggested_path(Path(name), folders=True)
    problems = [Diagnostic(name, f"there is no such folder; {what}", near or fix)]
    return FileError(f"cannot load {name}:", problems)
