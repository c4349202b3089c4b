"""Other libraries' log lines: the one that is not shown is still theirs, and their others are shown."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest

from lorary.cli import main
from lorary.cli._quiet import _LINE, _WHERE, quiet_bitsandbytes


def test_one_line_of_bitsandbytes_is_not_shown_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["lorary", "--version"])
    with pytest.raises(SystemExit):
        main()
    quiet_bitsandbytes()  # again
    theirs, others = logging.getLogger(_WHERE), logging.getLogger("bitsandbytes.other")
    assert theirs.filters == [*dict.fromkeys(theirs.filters)]
    theirs.warning(f"{_LINE}: %s. Please make sure", ImportError("No module named 'kernels'"))
    theirs.warning("another warning: %s", 1)
    others.warning(_LINE)
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        (_WHERE, "another warning: 1"),
        ("bitsandbytes.other", _LINE),
    ]


def test_it_is_still_the_line_of_bitsandbytes() -> None:
    found = importlib.util.find_spec("bitsandbytes")
    if found is None or found.origin is None:
        pytest.skip("bitsandbytes is not installed")
    source = Path(found.origin).parent.joinpath(*_WHERE.split(".")[1:]).with_suffix(".py")
    assert f'"{_LINE}' in source.read_text()
