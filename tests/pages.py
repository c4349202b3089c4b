"""The code of a Markdown page, so that tests can run what readers would type."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_BLOCK = re.compile(
    r"^(?:<!-- (?:not run: (?P<reason>.+?)|needs: (?P<needs>\w+)) -->\n\n?)?"
    r"(?P<fence>`{3,})(?P<language>[\w+{}-]*)[^\n]*\n(?P<code>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        page: the file.
        line: the line of its first line of code.
        language: what stands behind the fence.
        code: what it holds.
        reason: why it cannot be run here; empty for a block that can. A page says it in the line before the fence:
            `<!-- not run: needs two GPUs -->`. Also of one that needs a package that is not installed here:
            `<!-- needs: lightning -->`.
    """

    page: Path
    line: int
    language: str
    code: str
    reason: str


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in its order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, m.start("code")) + 1,
            m["language"],
            m["code"],
            m["reason"] or _missing(m["needs"]),
        )
        for m in _BLOCK.finditer(text)
    ]


def _missing(package: str | None) -> str:
    """Why a block that needs a package cannot be run here; empty if it can."""
    return f"{package} is not installed" if package and importlib.util.find_spec(package) is None else ""


def run(page: Path, lorary: Callable[..., object] | None = None) -> int:
    """Run a page's blocks one after another, as a reader would in one session; how many there were.

    Args:
        page: the file. Its Python blocks share one session.
        lorary: runs a command line; without it the page's console blocks are left out.
    """
    session: dict[str, object] = {"__name__": "__main__"}
    count = 0
    for block in blocks(page):
        if block.language == "python" and not block.reason:
            # Blank lines before it, so that a traceback names the page's own line.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), session)
            count += 1
        elif block.language == "console" and not block.reason and lorary is not None:
            for arguments in commands(block):
                lorary(*arguments)
    return count


def commands(block: Block) -> list[list[str]]:
    """The arguments of every `$ lorary ...` line in a console block."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("$ lorary ")]
