"""The lists of adapters: thousands of them, links to the root, and a clock that is set back."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from lorary import builtin
from lorary.serve.http.observed import Observed
from lorary.serve.http.page import status
from lorary.serve.http.settings import Settings
from lorary.serve.interface import AdapterCard
from lorary.serve.pool.adapter_root import AdapterRoot
from tests.serve.http.live import live
from tests.serve.http.scripted import Scripted


def test_the_root_is_followed_once_and_not_for_each_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    engine = Scripted(None, builtin.load_tokenizer())
    engine.cards = [AdapterCard(f"team/{i}", folder=f"{tmp_path}/here/team/{i}") for i in range(300)]
    engine.cards.append(AdapterCard("own", folder=f"{tmp_path}/elsewhere/out"))
    resolved, resolve = list[Path](), Path.resolve

    def counted(path: Path, strict: bool = False) -> Path:
        resolved.append(path)
        return resolve(path, strict)

    with live(engine, Settings(root=tmp_path / "link", drain=0)) as server:
        monkeypatch.setattr(Path, "resolve", counted)
        models = server.ask("GET", "/v1/models").json["data"]
        assert resolved == []
    assert [model["root"] for model in models] == ["base", *(f"team/{i}" for i in range(300)), "out"]


def test_throughput_on_the_page_does_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = Observed(Scripted(running=0, waiting=0))
    before = status(engine)["time"]
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= status(engine)["time"] - before < 3600


def test_an_adapter_is_found_below_a_root_whose_time_lies_ahead(tmp_path: Path) -> None:
    """As after a clock was set back: the same time stamp does not show that nothing has changed."""
    root, ahead = AdapterRoot(tmp_path), time.time_ns() + 3600 * 10**9
    os.utime(tmp_path, ns=(ahead, ahead))
    assert root.names() == []
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "lorary.json").touch()
    os.utime(tmp_path, ns=(ahead, ahead))
    assert root.names() == ["new"]
