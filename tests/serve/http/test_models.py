"""/v1/models: the method and the time of each adapter, before and after it is read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lorary.serve.http.settings import Settings
from tests.serve.http.live import BASE, Live, live, save_adapter, started_engine

METHODS = {"plain": ("lora",), "magnitude": ("dora",), "principal": ("rslora", "pissa")}


def listed(server: Live) -> dict[str, dict[str, Any]]:
    return {card["id"]: card for card in server.ask("GET", "/v1/models").json["data"]}


def test_an_adapters_method_is_named_in_a_word_and_its_time_is_its_folders(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for seed, (name, presets) in enumerate(METHODS.items(), start=1):
        save_adapter(root / name, seed, *presets)
        os.utime(root / name, (1_700_000_000 + seed, 1_700_000_000 + seed))
    (root / "broken").mkdir()
    (root / "broken" / "adapter_config.json").write_text("{")
    os.utime(root / "broken", (1.7e9, 1.7e9))
    times = {"broken": 1_700_000_000} | {name: 1_700_000_001 + i for i, name in enumerate(METHODS)}
    engine = started_engine({}, root)
    try:
        with live(engine, Settings(root=root)) as server:
            before = listed(server)
            assert {name: before[name]["created"] for name in times} == times
            assert {before[name]["lorary"]["method"] for name in times} == {""}
            for name in METHODS:
                body = {"model": name, "prompt": "x", "max_tokens": 1, "temperature": 0}
                assert server.post("/v1/completions", body).status == 200
            after = listed(server)
            assert {name: after[name]["lorary"]["method"] for name in METHODS} == {
                name: ",".join(presets) for name, presets in METHODS.items()
            }
            assert {name: after[name]["created"] for name in times} == times
            assert after["plain"]["permission"][0]["created"] == times["plain"]
            assert after[BASE]["created"] > times["plain"]
            refused = server.post("/v1/completions", {"model": "broken", "prompt": "x", "max_tokens": 1})
            assert refused.status == 400
            assert listed(server)["broken"]["created"] == times["broken"]
            shutil.rmtree(root / "magnitude")
            assert "magnitude" not in listed(server)
    finally:
        engine.stop()
