"""The provenance of an adapter, and its content hash."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import lorary
from lorary.adapters.content_hash import content_hash
from lorary.adapters.provenance import Parent, Provenance
from lorary.errors import FileError
from lorary.methods.lora import ConstantScale
from tests import tiny

PROVENANCE = Provenance("sum", (Parent("one", "a" * 64, 0.5), Parent("two", "", -1.0)), {"rank": 4, "error": 0.25})


def trained(*presets: str) -> lorary.Adapter:
    """An adapter whose tensors are not those of a new one."""
    return lorary.Adapter.of(tiny.trained(tiny.llama(), lorary.method(*(presets or ("lora",)), r=2)))


@pytest.mark.parametrize("preset", ["lora", "vera", "lora-fa", "pissa"])
def test_provenance_and_content_hash_survive_saving_and_loading(tmp_path: Path, preset: str) -> None:
    adapter = dataclasses.replace(trained(preset), provenance=PROVENANCE)
    lorary.save_adapter(adapter, tmp_path / "a")
    loaded = lorary.load_adapter(tmp_path / "a")
    assert loaded.provenance == PROVENANCE
    assert content_hash(loaded) == content_hash(adapter)


def test_a_trained_adapter_has_no_provenance(tmp_path: Path) -> None:
    lorary.save_adapter(trained(), tmp_path / "a")
    assert "provenance" not in json.loads((tmp_path / "a" / "lorary.json").read_text())
    assert lorary.load_adapter(tmp_path / "a").provenance is None


def test_the_content_hash_tells_adapters_apart() -> None:
    adapter = trained()
    name = adapter.sites[0].site.name
    changed = {site: dict(roles) for site, roles in adapter.tensors.items()}
    changed[name]["B"] = changed[name]["B"].clone()
    changed[name]["B"][0, 0] += 1e-6
    method = adapter.method.replace(scale=ConstantScale(9.0))
    other_scale = dataclasses.replace(
        adapter, sites=tuple(dataclasses.replace(s, method=method) for s in adapter.sites)
    )
    hashes = {content_hash(a) for a in (adapter, dataclasses.replace(adapter, tensors=changed), other_scale)}
    assert len(hashes) == 3
    assert content_hash(dataclasses.replace(adapter, provenance=PROVENANCE)) == content_hash(adapter)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "must be an object with how, parents and settings"),
        ({"how": "", "parents": [], "settings": {}}, "how is '', not the name of an operation"),
        ({"how": "sum", "parents": {}, "settings": {}}, "parents must be a list of at most 10,000"),
        ({"how": "sum", "parents": [], "settings": []}, "settings must be an object"),
        ({"how": "sum", "parents": [{}], "settings": {}}, r"parents\[0\] must be an object with name, sha256 and"),
        (
            {"how": "sum", "parents": [{"name": "a", "sha256": "..", "weight": 1}], "settings": {}},
            "not a SHA-256",
        ),
        (
            {"how": "sum", "parents": [{"name": "a", "sha256": "", "weight": True}], "settings": {}},
            "weight is true, not a number",
        ),
    ],
)
def test_a_malformed_provenance_is_refused(tmp_path: Path, record: object, reason: str) -> None:
    lorary.save_adapter(trained(), tmp_path / "a")
    path = tmp_path / "a" / "lorary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"provenance": record}))
    with pytest.raises(FileError, match=f"provenance: .*{reason}"):
        lorary.load_adapter(tmp_path / "a")
