"""Names that keep working for one release: each warns, names the new one, and is the new one."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorary
from lorary import _deprecated
from tests import tiny


@pytest.mark.parametrize("old", sorted(_deprecated.NAMES))
def test_an_old_name_is_the_new_one(old: str) -> None:
    module, new = _deprecated.NAMES[old]
    with pytest.warns(DeprecationWarning, match=rf"^lorary\.{old} is deprecated: use lorary\.(.*\.)?{new}$") as told:
        found = getattr(lorary, old)
    assert found is getattr(importlib.import_module(module), new)
    assert [Path(w.filename) for w in told] == [Path(__file__)], "the warning points at the caller"
    assert old not in lorary.__all__
    assert getattr(lorary, new, found) is found


def test_every_use_of_an_old_name_warns() -> None:
    for _ in range(2):
        with pytest.warns(DeprecationWarning, match="use lorary.param_groups"):
            lorary.param_groups  # type: ignore[attr-defined] # noqa: B018


def test_a_name_that_never_was_is_unknown() -> None:
    with pytest.raises(AttributeError, match="module 'lorary' has no attribute 'nonsense'"):
        lorary.nonsense  # type: ignore[attr-defined] # noqa: B018


def test_old_methods_call_the_new_functions(tmp_path: Path) -> None:
    model = tiny.trained(tiny.llama(), lorary.method("lora", r=2))
    adapter = lorary.Adapter.of(model)
    with pytest.warns(DeprecationWarning, match=r"Adapter.save is deprecated: use lorary.save_adapter"):
        adapter.save(tmp_path / "a")
    with pytest.warns(DeprecationWarning, match=r"Adapter.load is deprecated: use lorary.load_adapter") as told:
        read = lorary.Adapter.load(tmp_path / "a", strict=True)
    assert [Path(w.filename) for w in told] == [Path(__file__)]
    assert read.sites == lorary.load_adapter(tmp_path / "a").sites == adapter.sites
    with pytest.warns(DeprecationWarning, match=r"Method.but is deprecated: use Method.replace"):
        changed = adapter.method.but(dropout=0.5)
    assert changed == adapter.method.but(dropout=0.5) != adapter.method


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two module paths that have moved: a package into one module, and its module into two, with a name changed."""
    monkeypatch.setitem(_deprecated.MODULES, "lorary.former", ("lorary.spec.method",))
    monkeypatch.setitem(
        _deprecated.MODULES, "lorary.former.inside", ("lorary.layers.kinds", "lorary.model.optim.rules")
    )
    monkeypatch.setitem(_deprecated.MEMBERS, ("lorary.former.inside", "groups"), "param_groups")
    yield
    for name in ("lorary.former.inside", "lorary.former"):
        sys.modules.pop(name, None)
        lorary.__dict__.pop(name.removeprefix("lorary."), None)


@pytest.mark.usefixtures("moved")
def test_an_old_module_path_gives_the_objects_of_the_new_one() -> None:
    with pytest.warns(DeprecationWarning, match="is deprecated") as told:
        from lorary.former.inside import Site, groups  # type: ignore[import-not-found]
    assert Site is lorary.Site
    assert groups is lorary.param_groups
    assert [str(w.message) for w in told] == [
        "lorary.former is deprecated: use lorary.spec.method",
        "lorary.former.inside is deprecated: use lorary.layers.kinds or lorary.model.optim.rules",
    ]
    assert {Path(w.filename) for w in told} == {Path(__file__)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once for a process
        from lorary.former import Method
        from lorary.former.inside import Rules
    assert Method is lorary.Method
    assert Rules is lorary.Rules
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        from lorary.former import nonsense  # noqa: F401


@pytest.mark.usefixtures("moved")
def test_an_old_module_path_is_an_attribute_too() -> None:
    with pytest.warns(DeprecationWarning, match="lorary.former is deprecated: use lorary.spec.method"):
        assert lorary.former.Method is lorary.Method  # type: ignore[attr-defined]


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"lorary\.nonsense"):
        importlib.import_module("lorary.nonsense")


def test_the_tables_name_what_there_is() -> None:
    for old, homes in _deprecated.MODULES.items():
        assert old.startswith("lorary.")
        parent = old.rpartition(".")[0]
        assert parent in _deprecated.MODULES or importlib.util.find_spec(parent), f"{old} cannot be reached"
        for home in homes:
            importlib.import_module(home)
    for (old, _), new in _deprecated.MEMBERS.items():
        assert any(hasattr(importlib.import_module(home), new) for home in _deprecated.MODULES[old]), new


def test_nothing_of_lorary_uses_an_old_name() -> None:
    """Importing every public name gives no warning."""
    code = "import lorary; [getattr(lorary, name) for name in lorary.__all__]"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:lorary", "-c", code], check=True)
