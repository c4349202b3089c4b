"""The command line, run in this process: as a user would, without paying for the imports again."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

from lorary.cli import main


class Ran(NamedTuple):
    code: int
    out: str
    err: str


class Command:
    """`command("plan", "builtin:base")` is `lorary plan builtin:base`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> Ran:
        self.monkeypatch.setattr(sys, "argv", ["lorary", *arguments])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self.capsys.readouterr()
        return Ran(int(ended.value.code or 0), out, err)
