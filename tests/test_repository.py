"""The house itself: imports go down, files stay short, nothing heavy loads early, nothing names a machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from scripts import import_graph

import lorary

ROOT = Path(__file__).resolve().parents[1]

# Within train/: each package imports only those before it.
TRAIN = ("config", "data", "trainer", "shared_base", "runner", "compare", "advice")
# Within serve/, likewise.
SERVE = (
    *("address", "request", "interface", "forms", "pool", "batch", "scheduler", "budget", "engine"),
    *("open", "http", "vllm", "ray"),
)
# Folders of tests that are of no single room.
ACROSS = {"laws", "papers", "golden", "outside", "clients"}
MOST_LINES = 330  # about 300
MOST_ENTERED, MOST_HOLDING = 84, 35

_MACHINE = re.compile(r"(?<![\w.*:])/(?:home(?!/(?:me|someone)\b)|opt|root|Users|work|workspace)/[\w.]")
_REGISTRY = re.compile(r"\b(?:pypi|pythonhosted|npmjs|anaconda)\.(?:org|com)\b|download\.pytorch", re.IGNORECASE)
_UNDONE = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX)\b")


def misplaced(module: str, other: str) -> str | None:
    """Why a module may not import another, if it may not."""
    order = [*import_graph.ABOVE, *import_graph.ROOMS, *import_graph.BELOW]
    here, there = module.split("."), other.split(".")
    if here[0] != there[0]:
        if order.index(there[0]) < order.index(here[0]):
            return f"{there[0]} is above {here[0]}"
        if any(part.startswith("_") for part in there[1:]):
            return f"it is private to {there[0]}"
    elif len(here) > 1 and (parts := {"train": TRAIN, "serve": SERVE}.get(here[0])):
        if parts.index(there[1]) > parts.index(here[1]):
            return f"{here[0]}.{there[1]} is above {here[0]}.{here[1]}"
        if here[1] != there[1] and any(part.startswith("_") for part in there[2:]):
            return f"it is private to {here[0]}.{there[1]}"
    return None


@cache
def tracked() -> tuple[Path, ...]:
    """The files of the repository."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return tuple(path for name in listing.stdout.decode().split("\0") if name and (path := ROOT / name).is_file())


def texts() -> dict[Path, str]:
    found = {}
    for path in tracked():
        try:
            found[path] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights, pictures
    return found


def test_the_package_has_thirteen_rooms() -> None:
    names = {import_graph.room(name) for name in import_graph.modules()}
    assert names == {*import_graph.ABOVE, *import_graph.ROOMS, *import_graph.BELOW}
    assert len(import_graph.ROOMS) == 13


def test_the_tests_mirror_the_rooms() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/*") if path.parent.name != "__pycache__"}
    assert folders - ACROSS <= set(import_graph.ROOMS)
    assert folders > ACROSS


def test_imports_go_down() -> None:
    wrong = [
        f"{module} imports {other}: {reason}"
        for module, others in import_graph.graph().items()
        for other in others
        if (reason := misplaced(module, other))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("folder", "prefix"),
    [("src/lorary", "lorary."), ("benchmarks", ""), ("benchmarks/claims", ""), ("scripts", ""), ("docs", "")],
)
def test_no_import_goes_in_a_circle(folder: str, prefix: str) -> None:
    """In the package's files, and in the programs beside it, which import each other by their bare names."""
    edges = import_graph.graph(ROOT / folder, prefix)
    assert edges
    assert import_graph.circle(edges) == []


@pytest.mark.parametrize(
    ("module", "other", "reason"),
    [
        ("errors", "train.config.config", "train is above errors"),
        ("spec.method", "methods.lora", "methods is above spec"),
        ("model.attach", "model._checks", None),
        ("adapters.switch", "model._checks", "it is private to model"),
        ("adapters.switch", "model.attach", None),
        ("train.data.load", "train.config.load", None),
        ("train.data.load", "train.runner.run", "train.runner is above train.data"),
        ("serve.pool.pool", "serve.engine.runner", "serve.engine is above serve.pool"),
        ("serve.batch.layers", "serve.forms._overrides", "it is private to serve.forms"),
        ("serve.forms.form", "serve.forms._overrides", None),
        ("files.atomic", "__init__", "__init__ is above files"),
        ("files.atomic", "_deprecated", None),
    ],
)
def test_a_misplaced_import_would_be_seen(module: str, other: str, reason: str | None) -> None:
    assert misplaced(module, other) == reason


def test_an_import_is_found_wherever_it_is(tmp_path: Path) -> None:
    file = tmp_path / "planted.py"
    file.write_text("import lorary.errors\ndef late():\n    from lorary.train import config\n")
    assert import_graph.imports(file, import_graph.modules()) == {"errors", "train", "train.config"}
    file.write_text("from . import config\n")
    with pytest.raises(ValueError, match="a relative import"):
        import_graph.imports(file, ())


def test_a_circle_would_be_seen(tmp_path: Path) -> None:
    for name, text in {
        "a": "import b",
        "b": "def late():\n    from c import x",
        "c": "import a",
        "d": "import a",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert import_graph.circle(import_graph.graph(tmp_path, "")) == ["a", "b", "c", "a"]
    (tmp_path / "c.py").write_text("import json")
    assert import_graph.circle(import_graph.graph(tmp_path, "")) == []


def test_the_picture_of_the_rooms_is_up_to_date() -> None:
    assert import_graph.PICTURE.read_text(encoding="utf-8") == import_graph.svg(), "python scripts/import_graph.py"


def test_the_way_of_one_weight_is_short() -> None:
    """From plan to merge, in a new Python: the files that hold the weight, and all whose functions are called."""
    done = subprocess.run(
        [sys.executable, "scripts/import_graph.py", "--way"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    counts = dict(re.findall(r"^([a-z ]+): (\d+) files", done.stdout, re.MULTILINE))
    assert 10 < int(counts["hold the weight"]) <= MOST_HOLDING, done.stdout
    assert 20 < int(counts["entered"]) <= MOST_ENTERED, done.stdout


def test_files_stay_short() -> None:
    lengths = {
        name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in import_graph.modules().items()
    }
    long = {name: length for name, length in lengths.items() if length > MOST_LINES}
    assert not long, f"files of more than {MOST_LINES} lines: {long}"


def fresh(code: str) -> str:
    """What a new Python prints."""
    env = os.environ | {"PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_lorary_loads_nothing_heavy() -> None:
    heavy = {"transformers", "trl", "datasets", "accelerate", "matplotlib", "peft", "pandas"}
    loaded = fresh("import sys, lorary; print(*sorted({name.partition('.')[0] for name in sys.modules}))").split()
    assert set(loaded) & heavy == set()


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    changes = re.search(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation
    assert changes
    assert {project["version"], citation[1], changes[1]} == {lorary.__version__}


def test_the_repository_speaks_of_itself_alone() -> None:
    """No path of somebody's machine and no package registry's address; nothing left undone."""
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path, text in texts().items()
        for pattern in (_MACHINE, _REGISTRY, _UNDONE)
        if (match := pattern.search(text)) and path != Path(__file__)
    ]
    assert found == []


def test_the_words_it_looks_for_are_found() -> None:
    assert _MACHINE.search('open("/home/ann/x")')
    assert not _MACHINE.search("https://example.com/home/x and a/work/x")
    assert _REGISTRY.search("https://PyPI.org/simple")
    assert _UNDONE.search("# TO" + "DO: later")


def test_set_up_is_pinned_and_torch_comes_first() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._]+", pin) for pin in pins)
    assert pins[0].startswith("torch==")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["dev"], *extras["docs"], *extras["interop"], *extras["track"]]
    named = {re.split(r"[\[<>=~! ]", line)[0].lower() for line in asked} - {"lorary"}
    assert named <= {pin.partition("==")[0].lower() for pin in pins}, "a dependency of the tests is not pinned"


def test_ci_runs_the_readme_s_commands() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    targets = re.findall(r"\btarget (\w+)", script.read_text())
    assert sorted(targets) == ["demo", "laws", "lint", "newest", "test", "types"]
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
        assert f"`make {target}`" in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("broken", ["", "lint", "types", "demo", "newest", "laws", "test"])
def test_ci_fails_where_a_target_fails_and_ends_with_the_tests(tmp_path: Path, broken: str) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    made = ["#!/usr/bin/env bash", 'echo "made $2"', f'[ "$2" != "{broken}" ]']
    (tmp_path / "make").write_text("\n".join(made))
    (tmp_path / "make").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == bool(broken)
    said = re.sub(r": \d+ s$", "", done.stdout, flags=re.MULTILINE).splitlines()
    expected = [
        line
        for name in ("lint", "types", "demo", "newest", "laws", "test")
        for line in (f"made {name}", f"make {name}")
    ]
    assert said == expected + [f"failed: make {broken}"] * bool(broken)
