"""Names that keep working for one release: each warns, names the new one, and is the new one."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorary
from lorary import _deprecated
from tests import fresh, tiny


@pytest.mark.parametrize("old", sorted(_deprecated.NAMES))
def test_an_old_name_is_the_new_one(old: str) -> None:
    module, new = _deprecated.NAMES[old]
    use = re.escape(_deprecated.OTHER_LIBRARIES.get(old, "")) or rf"lorary\.(.*\.)?{new}"
    with pytest.warns(DeprecationWarning, match=rf"^lorary\.{old} is deprecated: use {use}$") as told:
        found = getattr(lorary, old)
    assert found is getattr(importlib.import_module(module), new)
    assert [Path(w.filename) for w in told] == [Path(__file__)], "the warning points at the caller"
    assert old not in lorary.__all__
    assert getattr(lorary, new, found) is found


def test_every_use_of_an_old_name_warns() -> None:
    for _ in range(2):
        with pytest.warns(DeprecationWarning, match="use lorary.param_groups"):
            lorary.groups  # type: ignore[attr-defined] # noqa: B018


def test_importing_old_names_warns_once_for_each() -> None:
    """Python's `from` looks a name up twice."""
    with pytest.warns(DeprecationWarning, match="is deprecated") as told:
        from lorary import groups, load_base  # type: ignore[attr-defined]
    assert groups is lorary.param_groups
    assert load_base is lorary.load_quantized
    assert [str(w.message) for w in told] == [
        "lorary.groups is deprecated: use lorary.param_groups",
        "lorary.load_base is deprecated: use lorary.load_quantized",
    ]
    assert {Path(w.filename) for w in told} == {Path(__file__)}


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
    assert changed == adapter.method.replace(dropout=0.5) != adapter.method


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two module paths that have moved: a package into one module, and its module into two, with a name changed."""
    monkeypatch.setitem(_deprecated.MODULES, "lorary.former", ("lorary.spec.method",))
    monkeypatch.setitem(_deprecated.MODULES, "lorary.former.inside", ("lorary.spec.site", "lorary.model.optim.rules"))
    monkeypatch.setitem(_deprecated.MEMBERS, ("lorary.former.inside", "tuning"), "rules")
    yield
    for name in ("lorary.former.inside", "lorary.former"):
        sys.modules.pop(name, None)
        lorary.__dict__.pop(name.removeprefix("lorary."), None)


@pytest.mark.usefixtures("moved")
def test_an_old_module_path_gives_the_objects_of_the_new_one() -> None:
    with pytest.warns(DeprecationWarning, match="is deprecated") as told:
        from lorary.former.inside import Site, tuning  # type: ignore[import-not-found]
    assert Site is lorary.Site
    assert tuning is lorary.rules
    assert [str(w.message) for w in told] == [
        "lorary.former.inside.Site is deprecated: use lorary.spec.site.Site",
        "lorary.former.inside.tuning is deprecated: use lorary.model.optim.rules.rules",
    ]
    assert {Path(w.filename) for w in told} == {Path(__file__)}
    with pytest.warns(DeprecationWarning, match=r"use lorary\.spec\.method\.Method$") as again:
        from lorary.former import Method  # type: ignore[import-not-found]
    assert Method is lorary.Method
    assert len(again) == 1
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        from lorary.former import nonsense  # noqa: F401


@pytest.mark.usefixtures("moved")
def test_an_old_module_path_is_an_attribute_too() -> None:
    with pytest.warns(
        DeprecationWarning, match=r"^lorary\.former\.Method is deprecated: use lorary\.spec\.method\.Method$"
    ) as told:
        assert lorary.former.Method is lorary.Method  # type: ignore[attr-defined]
    assert [Path(w.filename) for w in told] == [Path(__file__)]


@pytest.mark.usefixtures("moved")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_star_import_of_an_old_module_path_binds_old_and_new_names() -> None:
    names: dict[str, object] = {}
    exec("from lorary.former.inside import *", names)
    assert (names["Site"], names["tuning"], names["rules"]) == (lorary.Site, lorary.rules, lorary.rules)


def test_the_configuration_is_where_it_was() -> None:
    code = "from lorary.train.config import Config; import lorary.train.config.config as c; assert Config is c.Config"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:lorary", "-c", code], check=True)


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
        homes = _deprecated.MODULES.get(old, (old,))
        assert any(hasattr(importlib.import_module(home), new) for home in homes), f"{old}: {new}"


# As they were written in programs for 0.5.
DOCUMENTED = [
    ("lorary.weights", "keeps", "lorary.layers.quantized_weight", "register_quantized"),
    ("lorary.weights", "weight", "lorary.layers.quantized_weight", "weight"),
    ("lorary.weights", "by_forward", "lorary.layers.quantized_weight", "weight_by_forward"),
    ("lorary.contexts", "Context", "lorary.spec.context", "Context"),
    ("lorary.contexts", "Reading", "lorary.spec.context", "ContextPatch"),
    ("lorary.positions", "PositionsWarning", "lorary.layers.rope", "PositionsWarning"),
    ("lorary.formats", "export_peft", "lorary.adapters", "export_peft"),
    ("lorary.formats", "load_adapter", "lorary.adapters", "load_adapter"),
    ("lorary.formats", "save_adapter", "lorary.adapters", "save_adapter"),
    ("lorary.formats", "AdapterWarning", "lorary.adapters", "AdapterWarning"),
    ("lorary.formats.findings", "AdapterWarning", "lorary.files.findings", "AdapterWarning"),
    ("lorary.words", "word", "lorary.spec.interfaces", "component"),
    ("lorary.words", "Delta", "lorary.spec.interfaces", "Delta"),
    ("lorary.record", "Method", "lorary.spec.method", "Method"),
    ("lorary.preset", "preset", "lorary.spec.presets", "preset"),
    ("lorary.sites", "Site", "lorary.spec.site", "Site"),
    ("lorary.sites", "KINDS", "lorary.layers.kinds", "KINDS"),
    ("lorary.placed", "Placed", "lorary.spec.placement", "AdaptedSite"),
    ("lorary.fields", "COUNT", "lorary.spec.fields", "COUNT"),
    ("lorary.loop", "groups", "lorary.model.optim.param_groups", "param_groups"),
    ("lorary.loop", "Tuning", "lorary.model.optim.rules", "Rules"),
    ("lorary.storage.nf4", "NF4", "lorary.layers.nf4", "NF4"),
    ("lorary.storage.as_is", "AsIs", "lorary.spec.interfaces", "Unquantized"),
    ("lorary.methods.loraplus", "loraplus", "lorary.methods.lora_plus", "loraplus"),
    ("lorary.methods.lora", "ByRank", "lorary.methods.lora", "AlphaOverRank"),
    ("lorary.methods.longlora", "Extended", "lorary.methods.longlora", "LongContext"),
    ("lorary.errors", "Problem", "lorary.errors", "Diagnostic"),
    ("lorary.train.config", "DropSection", "lorary.train.config.config", "DropSection"),
]


@pytest.mark.parametrize(("module", "name", "home", "new"), DOCUMENTED)
def test_a_documented_path_of_0_5_works_and_warns(tmp_path: Path, module: str, name: str, home: str, new: str) -> None:
    code = f"""
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always", DeprecationWarning)
    from {module} import {name}
import {home}
assert {name} is {home}.{new}
[message] = [str(w.message) for w in said]
assert message.startswith("{module}.{name} is deprecated: use "), message
assert {home!r} in message or message.rpartition(" ")[2] == {f"{home}.{new}"!r}, message
assert all(w.filename == "<string>" for w in said), said
"""
    status, _, errors = fresh.Program("-c", code, folder=Path(__file__).parent, beside=tmp_path).ended()
    assert status == 0, errors


def test_every_component_has_its_old_name_in_its_module() -> None:
    for old, (module, new) in _deprecated.COMPONENTS.items():
        if module.startswith("lorary.methods."):
            with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} is deprecated: use {module}\.{new}"):
                assert getattr(importlib.import_module(module), old).__name__ == new
    with pytest.raises(AttributeError, match=r"module 'lorary\.methods\.lora' has no attribute 'nonsense'"):
        importlib.import_module("lorary.methods.lora").nonsense  # noqa: B018


def test_old_attributes_are_the_new_ones() -> None:
    model = tiny.trained(tiny.llama(), lorary.method("lora", r=2))
    adapter = lorary.Adapter.of(model)
    plan = lorary.plan(tiny.llama(), lorary.method("lora", r=2))
    layer = next(module for module in model.modules() if isinstance(module, lorary.Adapted))
    renamed = [
        (plan, "placed", "sites"),
        (plan, "given", "fixed_tensors"),
        (plan, "packed", "quantized"),
        (adapter, "placed", "sites"),
        (layer, "p", "params"),
        (layer.site, "out", "out_features"),
        (layer.site, "inp", "in_features"),
        (layer.site, "window", "kernel_size"),
    ]
    for value, old, new in renamed:
        name = type(value).__name__
        with pytest.warns(DeprecationWarning, match=f"^{name}.{old} is deprecated: use {name}.{new}$") as told:
            assert getattr(value, old) is getattr(value, new)
        assert [Path(w.filename) for w in told] == [Path(__file__)]
    assert "placed" not in repr(plan)
    assert lorary.Site("q", "linear", 2, 3, False).out_features == 2


def test_nothing_of_lorary_uses_an_old_name() -> None:
    """Importing every public name gives no warning."""
    code = "import lorary; [getattr(lorary, name) for name in lorary.__all__]"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:lorary", "-c", code], check=True)
