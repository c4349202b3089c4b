"""The private names of other libraries that the package uses: where they are, and whether they may be there.

    python scripts/private_names.py        print the table of CONTRIBUTING.md

A name is private if it begins with one underscore and belongs to another library: an attribute that no class of the
package defines, or that a class of another library has as well; a part of an import; a string that is such a name. A
method of the package that replaces a private one of another library is an override.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lorary.layers.transformers_internals import UNDOCUMENTED

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lorary"

TRANSFORMERS = "layers/transformers_internals.py"
# file -> the library whose private names it may use
PLACES = {
    "kernels/torch_internals.py": "PyTorch",
    TRANSFORMERS: "Transformers",
    "layers/other_quantizers.py": "bitsandbytes",
    "serve/engine/continuous.py": "Transformers' continuous batching",
    "train/trainer/trainer_internals.py": "the trainers of Transformers, TRL and accelerate",
}
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "bitsandbytes", "safetensors", "triton")
# Names with an underscore that are documented, as PyTorch's foreach functions and a key of diffusers' files, or the
# standard library's
PUBLIC = re.compile(r"_foreach_\w+|_class_name|_asdict|_getframe|_sysconfigdata|_handle_fromlist|_bundled|_exit")
# Ends of lorary's own names, and attributes that it sets itself
OWN = {"_only", "_like", "_trains", "_K", "_dequantize", "_digest"}
# Modules of these libraries that their documentation describes; what is in others is undocumented
DOCUMENTED = {
    "transformers": {
        *("", "integrations", "quantizers", "trainer_callback", "trainer_utils", "utils", "utils.quantization_config"),
    },
    "accelerate": {"", "state", "utils"},
    "trl": {""},
    "peft": {""},
    "datasets": {""},
    "bitsandbytes": {"", "nn", "functional", "optim"},
}
_PRIVATE = re.compile(r"_[A-Za-z]\w*")


class Use(NamedTuple):
    """A private name in a line of the package.

    Args:
        file: relative to the package.
        line: from 1.
        name: of the other library.
        override: whether a method of the package replaces it.
    """

    file: str
    line: int
    name: str
    override: bool = False


def uses(source: Path = SOURCE) -> list[Use]:
    """Every private name of another library in the package."""
    trees = {str(path.relative_to(source)): ast.parse(path.read_text("utf-8")) for path in sorted(source.rglob("*.py"))}
    own = {name for tree in trees.values() for name in _defined(tree)} - foreign()
    found = {use for file, tree in trees.items() for use in _of(file, tree, own)}
    if source == SOURCE:
        found |= {Use(TRANSFORMERS, 0, f"{module}.{name}") for name, module in UNDOCUMENTED.items()}
    return sorted(use for use in found if not PUBLIC.fullmatch(use.name) and use.name not in OWN)


def misplaced(found: list[Use]) -> list[Use]:
    """The uses outside of the files that may have them; overrides are where their class is."""
    return [use for use in found if not use.override and use.file not in PLACES]


@cache
def foreign() -> frozenset[str]:
    """The private names of the classes of other libraries that the package derives from."""
    from torch import nn

    from lorary.model.loading.quantized import LoraryQuantizer
    from lorary.serve.engine.continuous import SortedScheduler
    from lorary.train.trainer.dpo import DPOTrainer
    from lorary.train.trainer.sft import SFTTrainer

    names: set[str] = set()
    ours = (SFTTrainer, DPOTrainer, LoraryQuantizer, SortedScheduler, nn.Module)
    for cls in {base for derived in ours for base in derived.__mro__}:
        if cls.__module__.partition(".")[0] in LIBRARIES:
            names.update(vars(cls), re.findall(r"\bself\.(_\w+)\b *(?::[^=\n]+)?=", inspect.getsource(cls)))
    names.update(vars(nn.Module()))
    return frozenset(filter(_is_private, names))


def _is_private(name: str) -> bool:
    return _PRIVATE.fullmatch(name) is not None


def _defined(tree: ast.AST) -> Iterator[str]:
    """The attributes that the package's classes define."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                targets = inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]
                yield from (target.id for target in targets if isinstance(target, ast.Name))
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield inner.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def _of(file: str, tree: ast.AST, own: set[str]) -> Iterator[Use]:
    parts_of_strings = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    replaced = {id(node) for method in _overrides(tree) for node in ast.walk(method) if _calls_super(node, method.name)}
    yield from (Use(file, method.lineno, method.name, override=True) for method in _overrides(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own:
            yield Use(file, node.lineno, node.attr, override=id(node) in replaced)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts_of_strings:
            if node.value in foreign() or (_is_private(node.value) and node.value not in own | _names(tree)):
                yield Use(file, node.lineno, node.value)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (Use(file, node.lineno, name) for name in _imports(node))


def _overrides(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (m for m in node.body if isinstance(m, ast.FunctionDef) and m.name in foreign())


def _calls_super(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == name and ast.unparse(node.value) == "super()"


@cache
def _names(tree: ast.AST) -> frozenset[str]:
    """The names that a file defines or that contain the package's own: they are lorary's."""
    inner = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return frozenset(inner | {text for text in strings if "lorary" in text})


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The private or undocumented names among those that a line imports."""
    module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
    for alias in node.names:
        library, _, inside = (module or alias.name).partition(".")
        name = f"{module}.{alias.name}".strip(".")
        undocumented = inside not in DOCUMENTED.get(library, {inside})
        if library in LIBRARIES and (undocumented or any(map(_is_private, name.split(".")))):
            yield name


def table() -> str:
    """The table of CONTRIBUTING.md."""
    rows: dict[tuple[bool, str], set[str]] = defaultdict(set)
    for use in uses():
        rows[use.override, use.file].add(use.name)
    lines = ["| file | of | private names |", "|---|---|---|"]
    for (override, file), names in sorted(rows.items()):
        what = "overridden methods" if override else PLACES.get(file, "not allowed")
        lines.append(f"| `{file}` | {what} | {', '.join(f'`{name}`' for name in sorted(names))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for use in misplaced(uses()):
        print(f"{use.file}:{use.line}: {use.name} belongs into one of {', '.join(PLACES)}")
    print(table(), end="")
