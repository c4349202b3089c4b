from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lorary.serve.http.settings import Settings
from lorary.serve.interface import Engine
from tests.serve.http.live import Live, live, save_adapter, started_engine


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters: `a` and `b`, which are loaded, and `c`."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("abc", start=1):
        save_adapter(folder / name, seed)
    return folder


@pytest.fixture(scope="session")
def engine(root: Path) -> Iterator[Engine]:
    """An engine with the adapters `a` and `b`."""
    engine = started_engine({"a": root / "a", "b": root / "b"}, root)
    yield engine
    engine.stop()


@pytest.fixture(scope="session")
def server(engine: Engine, root: Path) -> Iterator[Live]:
    """A server without keys."""
    with live(engine, Settings(root=root)) as running:
        yield running
