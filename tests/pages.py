"""The code of a Markdown page, so that tests can run what readers would type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n\n?)?"
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
            `<!-- not run: needs two GPUs -->`.
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
        Block(page, text.count("\n", 0, m.start("code")) + 1, m["language"], m["code"], m["reason"] or "")
        for m in _BLOCK.finditer(text)
    ]


def run(page: Path) -> int:
    """Run a page's Python blocks one after another, as a reader would in one session; how many there were."""
    session: dict[str, object] = {"__name__": "__main__"}
    runnable = [block for block in blocks(page) if block.language == "python" and not block.reason]
    for block in runnable:
        # Blank lines before it, so that a traceback names the page's own line.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        exec(code, session)
    return len(runnable)


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every `$ lorary ...` line in a page's console blocks, in order."""
    import shlex

    for block in blocks(page):
        if block.language == "console" and not block.reason:
            joined = block.code.replace("\\\n", " ")
            for line in joined.splitlines():
                if line.startswith("$ lorary "):
                    yield shlex.split(line.removeprefix("$ lorary "), comments=True)
