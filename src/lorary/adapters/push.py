"""An adapter folder on the Hub: what an upload would hold, and the upload.

Only an adapter's own files and its card are uploaded; the rest of the folder (optimizer states, pickles, logs, secrets)
stays. An adapter that could not be loaded is not uploaded.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from lorary.adapters import card as cards
from lorary.adapters import native
from lorary.adapters.adapter import Adapter
from lorary.adapters.hub import CHAT_TEMPLATE, OWN_FILES
from lorary.adapters.label_names import NAME as LABELS
from lorary.adapters.peft.writer import BASE_README
from lorary.adapters.save_load import load_adapter
from lorary.errors import Diagnostic, FileError
from lorary.files.findings import AdapterWarning
from lorary.files.safe_open import existing_folder, open_inside, read_bytes
from lorary.files.strict_json import show

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

FILES = (*OWN_FILES, LABELS, CHAT_TEMPLATE, BASE_README, cards.NAME)
_MOST = 2**40  # bytes of one file
_MOST_CARD = 2**20


@dataclass(frozen=True)
class Upload:
    """The contents of an upload.

    Args:
        folder: of the adapter, resolved.
        repo: the repository's id.
        files: name -> size in bytes.
        card: the text of the card.
        made: whether the card was made for this upload.
        left_out: the names in the folder that are not uploaded.
        notes: what a user should know before it is public.
    """

    folder: Path
    repo: str
    files: dict[str, int]
    card: str = field(repr=False)
    made: bool
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    @property
    def metadata(self) -> list[str]:
        """The lines of the card's front matter; none if it has none."""
        start, *rest = self.card.partition("\n---")[0].splitlines() or [""]
        return rest if start.strip() == "---" else []


def plan_upload(folder: str | os.PathLike[str], repo: str, *, base: str | None = None) -> Upload:
    """The contents of an upload, without a network.

    Args:
        folder: of the adapter.
        repo: the repository's id, `owner/name`.
        base: the Hub id of the base, for a card that is made now.

    Raises:
        FileError: the adapter could not be loaded, or a file cannot be uploaded; or an id is none.
    """
    path = existing_folder(folder)
    if problems := _bad_ids(repo, base):
        raise FileError(f"cannot push {show(os.fspath(folder), most=400)}:", problems)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AdapterWarning)
        adapter = load_adapter(path)
    listed = _own_files(path)
    sizes = _sizes(path, listed)
    made = cards.NAME not in sizes
    text = cards.adapter_card(path, adapter, name=repo, base=base) if made else cards.load_from(repo, _card(path))
    sizes[cards.NAME] = len(text.encode())
    left_out = tuple(sorted(p.name + "/" * p.is_dir() for p in path.iterdir() if p.name not in listed))
    notes = [str(w.message) for w in caught if issubclass(w.category, AdapterWarning)]
    return Upload(path, repo, sizes, text, made, left_out, (*notes, *_notes(adapter, text, made=made)))


def upload(what: Upload, *, public: bool = False, message: str = "") -> str:
    """Upload in one commit; the repository is made if there is none.

    Args:
        what: from `plan_upload`.
        public: whether everybody may read it.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        FileError: the Hub refuses it or cannot be reached; a file has changed; or the repository is public already,
            and `public` is not asked for.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="lorary")
    sizes = _sizes(what.folder, [name for name in what.files if name != cards.NAME])
    if changed := [name for name, size in sizes.items() if size != what.files[name]]:
        raise _refused(
            what.repo, [Diagnostic(name, "has changed since it was checked", "push again") for name in changed]
        )
    _asked(what.repo, lambda: api.create_repo(what.repo, private=not public, exist_ok=True))
    private = _asked(what.repo, lambda: api.model_info(what.repo).private)
    if not private and not public:
        problem = Diagnostic(what.repo, "exists and is public: everybody could read the adapter", "pass --public if so")
        raise _refused(what.repo, [problem])
    commit = _asked(
        what.repo,
        lambda: api.create_commit(
            what.repo, _operations(what), commit_message=message or f"Upload the adapter {what.folder.name}"
        ),
    )
    return str(commit.commit_url)


def _operations(what: Upload) -> list[CommitOperationAdd]:
    """The files of a commit: the card from its text, the others from the folder."""
    from huggingface_hub import CommitOperationAdd

    paths = {name: what.folder / name for name in what.files if name != cards.NAME}
    adds = [CommitOperationAdd(name, str(path)) for name, path in paths.items()]
    return [*adds, CommitOperationAdd(cards.NAME, what.card.encode())]


def _asked(repo: str, request: Callable[[], Any]) -> Any:
    """The answer of the Hub to a request.

    Raises:
        FileError: it refuses, or cannot be reached.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]  # of its HTTP library

    log_in = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    try:
        return request()
    except (HFValidationError, OfflineModeIsEnabled) as error:
        what, fix = str(error).splitlines()[0], ""
    except LocalTokenNotFoundError:
        what, fix = "no token of the Hub is on this machine", log_in
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        what = f"the Hub answers {status or 'with an error'}: {error.server_message or str(error).splitlines()[0]}"
        fix = log_in if status in (401, 403) else ""
    except RuntimeError as error:  # of a large file, whose own error is its cause
        what, fix = f"the upload failed: {error} {error.__cause__ or ''}".strip(), "push again: it goes on from there"
    except (NetworkError, OSError) as error:
        what = f"the Hub cannot be reached: {(str(error).splitlines() or [type(error).__name__])[0]}"
        fix = "check the network, and HF_ENDPOINT"
    raise _refused(repo, [Diagnostic(repo, what, fix)])


def _bad_ids(repo: str, base: str | None) -> list[Diagnostic]:
    """The ids that are none on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    problems = []
    for what, name in (("the repository", repo), ("--base", base)):
        if name is None:
            continue
        try:
            validate_repo_id(name)
            if "/" not in name and what != "--base":
                problems.append(Diagnostic(what, f"{show(name)} has no owner", "write OWNER/NAME"))
        except HFValidationError as error:
            reason = str(error).splitlines()[0].rstrip(".")
            problems.append(Diagnostic(what, f"{show(name)} is not a Hub id: {reason}", "write OWNER/NAME"))
    return problems


def _own_files(folder: Path) -> list[str]:
    """The adapter's own files and the card, as far as they are there."""
    return [name for name in FILES if os.path.lexists(folder / name)]


def _sizes(folder: Path, names: Sequence[str]) -> dict[str, int]:
    """name -> size of plain files of the folder.

    Raises:
        FileError: one of them is a link that leaves the folder, or no plain file.
    """
    sizes: dict[str, int] = {}
    problems: list[Diagnostic] = []
    for name in names:
        try:
            file, sizes[name] = open_inside(folder, name, _MOST)
            file.close()
        except FileError as error:
            problems += error.problems
    if problems:
        raise FileError(f"cannot push {show(os.fspath(folder), most=400)}:", problems)
    return sizes


def _card(folder: Path) -> str:
    """The card in the folder.

    Raises:
        FileError: it is not text, or too large.
    """
    try:
        return read_bytes(folder, cards.NAME, _MOST_CARD).decode()
    except UnicodeDecodeError:
        problem = Diagnostic(cards.NAME, "is not a text in UTF-8", "remove it: a card is then made")
        raise FileError(f"cannot push {show(os.fspath(folder), most=400)}:", [problem]) from None


def _notes(adapter: Adapter, card: str, *, made: bool) -> list[str]:
    """Remarks for the user before an adapter is on the Hub."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    notes = []
    try:
        named = getattr(ModelCard(card, ignore_metadata_errors=True).data, "base_model", None)
    except (ValueError, YAMLError) as error:
        notes.append(f"the card's metadata cannot be read: {str(error).splitlines()[0]}")
        named = "unknown"
    if not named:
        fix = (
            "pass --base OWNER/NAME" if made else f"write base_model: OWNER/NAME into the front matter of {cards.NAME}"
        )
        notes.append(f"the card does not name a base on the Hub: {fix}")
    parents = adapter.provenance.parents if adapter.provenance else ()
    if paths := [p.name for p in parents if os.path.isabs(p.name) or PureWindowsPath(p.name).is_absolute()]:
        notes.append(f"{native.NAME} names folders of this machine: {', '.join(map(show, paths[:3]))}")
    return notes


def _refused(repo: str, problems: Sequence[Diagnostic]) -> FileError:
    return FileError(f"cannot push to {repo}:", problems)
