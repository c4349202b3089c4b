"""The house itself: imports go down, files stay short, nothing heavy loads early, nothing names a machine."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import lorary

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "lorary"

# From the ground up. A module imports from the floors below its own and from its own package, never from above.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "_deprecated"),
    ("kernels", "accounting", "biases", "builtin", "memo", "grid", "fields", "shards", "weights", "attention"),
    ("sites", "attending", "positions"),
    ("words", "contexts"),
    ("storage",),
    ("record",),
    ("preset",),
    ("methods",),
    ("placed", "fused", "combinations", "scan"),
    ("targets",),
    ("adapted", "preconditions", "plans"),
    ("fingerprint", "full_parameters"),
    ("packing", "plan_notes"),
    ("past",),
    ("planning",),
    ("state",),
    ("residual", "shrinking"),
    ("surgery",),
    ("merging", "loop", "forms", "fidelity"),
    ("adapter", "live"),
    ("evolution", "probing"),
    ("formats",),
    ("switching",),
    ("bases",),
    ("inspect",),
    ("footprint",),
    ("train",),
    ("cli",),
    ("__main__",),
)
MOST_LINES = 330  # about 300

_MACHINE = re.compile(r"(?<![\w.*:])/(?:home(?!/(?:me|someone)\b)|opt|root|Users|work|workspace)/[\w.]")
_REGISTRY = re.compile(r"\b(?:pypi|pythonhosted|npmjs|anaconda)\.(?:org|com)\b|download\.pytorch", re.IGNORECASE)
_UNDONE = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX)\b")


def modules() -> dict[str, Path]:
    """Dotted name, without `lorary.`, of every module of the package but its `__init__`."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def floor(module: str) -> int:
    top = module.partition(".")[0]
    return next(i for i, names in enumerate(FLOORS) if top in names)


def imported(path: Path, package: str) -> set[str]:
    """What of lorary a file imports, anywhere in it: inside functions and for type checkers too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written out from lorary"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    known = modules()
    own = {name.removeprefix("lorary.") for name in names if name.startswith("lorary.")}
    return {name for name in own if name in known and name != package}


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


def test_every_module_has_a_floor() -> None:
    known = {name for names in FLOORS for name in names}
    assert {name.partition(".")[0] for name in modules()} - known == set()


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module: str) -> None:
    top = module.partition(".")[0]
    for other in imported(modules()[module], module):
        inside = other.partition(".")[0] == top
        assert inside or floor(other) < floor(module), f"{module} imports {other}, which is not below it"


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: imported(path, name) for name, path in modules().items()}
    # A package's __init__ is run by importing anything in it; that is Python's rule, not a circle of ours.
    graph = {name: {o for o in others if not name.startswith(f"{o}.")} for name, others in graph.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "circle: " + " → ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_a_circle_and_an_upward_import_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "planted.py"
    file.write_text("def late():\n    from lorary.train import config\n")
    assert imported(file, "errors") == {"train", "train.config"}
    assert floor("train.config") > floor("errors")


def test_files_stay_short() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
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
    assert sorted(targets) == ["demo", "laws", "lint", "test", "types"]
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
        assert f"`make {target}`" in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("broken", ["", "lint", "types", "demo", "laws", "test"])
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
    expected = [line for name in ("lint", "types", "demo", "laws", "test") for line in (f"made {name}", f"make {name}")]
    assert said == expected + [f"failed: make {broken}"] * bool(broken)
