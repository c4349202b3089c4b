"""The rooms of the package and the imports between them.

    python scripts/import_graph.py          draw docs/pictures/rooms.svg
    python scripts/import_graph.py --way    list the files on the path of a weight

The picture shows every room in the order in which it may import, with the number of imports from room to room.

The path of a weight is that of a tiny model that is planned, attached, run, trained for one step, saved, loaded and
merged, with LoRA, in a fresh process. A file counts as entered if one of its functions is called for this, and not
merely when the file is imported: what an import itself runs (decorators, class bodies) does not count. A file holds the
weight if one of these functions has the weight W of the first layer, or its A or B, at hand: as an argument, as a local
variable or as its result, directly or in a list, a tuple or a dictionary.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "lorary"
PICTURE = ROOT / "docs" / "pictures" / "rooms.svg"

# Each room imports from those below it and from itself.
ROOMS = {
    "cli": "how it is asked for",
    "train": "how it is run",
    "serve": "how it is served",
    "analysis": "what is measured",
    "adapters": "what is kept",
    "model": "what is done to a model",
    "methods": "what papers add",
    "layers": "what computes",
    "spec": "what is said",
    "files": "how bytes are trusted",
    "builtin": "what comes along",
    "kernels": "what is fast",
    "errors": "what went wrong",
}
# Beside the rooms: the two entrances above them, and the old names below.
ABOVE, BELOW = ("__init__", "__main__"), ("_deprecated",)


def room(module: str) -> str:
    """The room of a module: the first part of its name."""
    return module.partition(".")[0]


def modules(source: Path = SOURCE) -> dict[str, Path]:
    """The path of every module below a folder, by dotted name; a package's `__init__` has the package's name."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(path: Path, known: Iterable[str], prefix: str = "lorary.") -> set[str]:
    """The modules among `known` that a file imports anywhere: at its top, in functions, and for type checkers.

    Raises:
        ValueError: an import is relative.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}:{node.lineno}: a relative import")
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)} & set(known)


def graph(source: Path = SOURCE, prefix: str = "lorary.") -> dict[str, set[str]]:
    """What every module imports of the others.

    A package that holds the module is left out: Python runs its `__init__` for any module in it.
    """
    known = modules(source)
    return {
        name: {other for other in imports(path, known, prefix) if not f"{name}.".startswith(f"{other}.")}
        for name, path in known.items()
    }


def circle(edges: dict[str, set[str]]) -> list[str]:
    """One circle of imports, its first module repeated at the end; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(edges[name]):
                if found := visit(other, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


def between_rooms(edges: dict[str, set[str]]) -> Counter[tuple[str, str]]:
    """The number of imports from one room to another."""
    pairs = ((room(name), room(other)) for name, others in edges.items() for other in others)
    return Counter((a, b) for a, b in pairs if a != b and a in ROOMS and b in ROOMS)


ROW, LEFT, STEP, TOP = 44, 350, 50, 96


def svg() -> str:
    """The rooms from the top down, and a column of arrows for every room that is imported."""
    counts, order = between_rooms(graph()), list(ROOMS)
    sizes = Counter(room(name) for name in modules())
    width, height = LEFT + STEP * len(order) + 24, TOP + ROW * len(order) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13" fill="#333">',
        "<title>The rooms of lorary and the imports between them</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#4477aa"/></marker></defs>',
        '<text x="16" y="28" font-size="16" font-weight="bold">Imports go down only</text>',
        '<text x="16" y="50" fill="#666">In a column: how many imports each room above makes of the room '
        "at the arrow&#8217;s head.</text>",
    ]
    for row, (name, purpose) in enumerate(ROOMS.items()):
        y = TOP + ROW * row
        files = f"{sizes[name]} files" if sizes[name] > 1 else "1 file"
        parts += [
            f'<rect x="16" y="{y - 16}" width="{LEFT - 60}" height="32" rx="4" fill="#eef3f8" stroke="#4477aa"/>',
            f'<text x="26" y="{y + 5}" font-weight="bold">{name}</text>',
            f'<text x="98" y="{y + 5}" fill="#666">{escape(purpose)}<tspan fill="#999"> · {files}</tspan></text>',
        ]
    for column, name in enumerate(order):
        users = [row for row, other in enumerate(order) if counts[other, name]]
        if not users:
            continue
        x, end = LEFT + STEP * column, TOP + ROW * column
        parts.append(
            f'<path d="M{x} {TOP + ROW * users[0]} V{end - 16}" fill="none" stroke="#4477aa" marker-end="url(#head)"/>'
        )
        parts.append(f'<text x="{x}" y="{end + 4}" text-anchor="middle" font-weight="bold">{name}</text>')
        for row in users:
            y = TOP + ROW * row
            parts += [
                f'<circle cx="{x}" cy="{y}" r="13" fill="white" stroke="#4477aa"/>',
                f'<text x="{x}" y="{y + 4}" text-anchor="middle" font-size="12">{counts[order[row], name]}</text>',
            ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _holds(value: Any, shapes: set[tuple[int, ...]], depth: int = 3) -> bool:
    """Whether a value is a tensor of one of these shapes, or contains one."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return tuple(value.shape) in shapes
    if not depth or not isinstance(value, dict | list | tuple):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return any(_holds(inner, shapes, depth - 1) for inner in list(inside))


def way() -> tuple[dict[Path, str], set[Path], set[Path]]:
    """The files on the path of a weight.

    Returns:
        The files whose functions are entered, each with its first step; those of them that hold the weight; and all
        files that were imported by the end.
    """
    step, busy, entered, holding = "", False, dict[Path, str](), set[Path]()

    def by_an_import(frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return True
            frame = frame.f_back
        return False

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal busy
        file = frame.f_code.co_filename
        if busy or event not in ("call", "return") or not file.startswith(str(SOURCE)):
            return
        busy = True  # looking at tensors calls functions, too
        path = Path(file)
        if event == "call" and not by_an_import(frame):
            entered.setdefault(path, step)
        if path in entered and path not in holding and _holds([*frame.f_locals.values(), argument], shapes):
            holding.add(path)
        busy = False

    sys.path.insert(0, str(SOURCE.parent))
    import torch

    import lorary

    torch.manual_seed(0)
    model, fresh = (torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.Linear(11, 5)) for _ in range(2))
    shapes = {(11, 7), (3, 7), (11, 3)}  # W, A and B of the first layer; no other tensor has such a shape
    fresh.load_state_dict(model.state_dict())
    x = torch.ones(2, 7)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "adapter"
        sys.setprofile(profile)
        step = "plan"
        plan = lorary.plan(model, lorary.method("lora", r=3), targets="all-linear")
        step = "attach"
        lorary.attach(model, plan)
        step = "forward"
        loss = model(x).square().mean()
        step = "step"
        optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=1e-3))
        loss.backward()
        optimizer.step()
        step = "save"
        lorary.save(model, out)
        step = "load"
        lorary.load(fresh, out)
        step = "merge"
        lorary.merge(fresh)
        sys.setprofile(None)
    loaded = (getattr(module, "__file__", None) or "" for module in list(sys.modules.values()))
    return entered, holding, {Path(file) for file in loaded if file.startswith(str(SOURCE))}


def print_way() -> None:
    entered, holding, imported = way()
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in imported | set(entered)}
    for path, step in entered.items():
        print(f"{step:8} {lines[path]:4}  {'W' if path in holding else ' '}  {path.relative_to(SOURCE.parent)}")
    for name, paths in (("hold the weight", holding), ("entered", set(entered)), ("imported", imported)):
        print(f"{name}: {len(paths)} files, {sum(lines[path] for path in paths):,} lines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", action="store_true", help="list the files on the path of a weight")
    if parser.parse_args().way:
        print_way()
    else:
        PICTURE.write_text(svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
