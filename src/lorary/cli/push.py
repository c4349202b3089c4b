"""lorary push: an adapter folder to the Hugging Face Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorary.adapters.push import Upload


def push(
    folder: Annotated[Path, typer.Argument(help="Adapter folder, or run folder that holds one.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub; made if there is none.")],
    public: Annotated[bool, typer.Option("--public", help="Readable by everybody; else private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Upload. Without it, only show what would be.")] = False,
    base: Annotated[str | None, typer.Option("--base", help="Hub id of the base, for a card that is made now.")] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="Message of the commit.")] = "",
) -> None:
    """Upload an adapter to the Hub: its own files and its model card, nothing else of the folder.

    Shows the files, their sizes and the card's metadata; --yes uploads them in one commit. An adapter that could not be
    loaded is refused. A card is made if there is none.
    """
    from lorary.adapters.hub import adapter_folder
    from lorary.adapters.push import plan_upload, upload

    what = plan_upload(adapter_folder(folder) or folder, repo, base=base)
    _show(what, public=public)
    if yes:
        print(upload(what, public=public, message=message))
    else:
        print("nothing was uploaded: --yes does", file=sys.stderr)


def _show(what: Upload, *, public: bool) -> None:
    """The files, the card's metadata and the notes, on standard error."""
    from lorary.cli import printable
    from lorary.model.plan import human_bytes

    said = [f"{what.repo} ({'public' if public else 'private'}), from {what.folder}:"]
    said += [
        f"  {human_bytes(size):>10}  {name}{' (made now)' if what.made and name == 'README.md' else ''}"
        for name, size in what.files.items()
    ]
    said.append(f"  {human_bytes(what.size):>10}  in {len(what.files)} files")
    if what.left_out:
        more = f" and {len(what.left_out) - 8} more" if len(what.left_out) > 8 else ""
        said.append(f"left out: {', '.join(what.left_out[:8])}{more}")
    said += ["card:", *(f"  {line}" for line in what.metadata)]
    said += [f"note: {note}" for note in what.notes]
    print(printable("\n".join(said)), file=sys.stderr)
