"""Names that keep working for one release, each with a `DeprecationWarning` that names the new one.

The two tables are all there is to edit. `lorary.__getattr__` asks `renamed` for a name that it does not have, and a
finder at the end of `sys.meta_path` serves module paths that no longer exist.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

# lorary.<old> -> (the new one's module, its name there)
NAMES: dict[str, tuple[str, str]] = {
    "Evolution": ("lorary.evolution", "EvolutionConfig"),
    "Fidelity": ("lorary.fidelity", "MergeError"),
    "Found": ("lorary.evolution", "SearchResult"),
    "Live": ("lorary.live", "MergeCheck"),
    "PagedAdamW": ("lorary.train.optimizers", "paged_adamw"),
    "Tuning": ("lorary.loop", "Rules"),
    "dropped": ("lorary.probing", "drop_layers"),
    "groups": ("lorary.loop", "param_groups"),
    "importance": ("lorary.probing", "layer_importance"),
    "load_base": ("lorary.train.models", "load_quantized"),
    "pack": ("lorary.packing", "quantize"),
    "save_base": ("lorary.bases.bitsandbytes_files", "save_quantized"),
    "search": ("lorary.evolution", "search_supernet"),
    "tuning": ("lorary.loop", "rules"),
    "unpack": ("lorary.packing", "dequantize"),
}

# old module path -> the modules that its names are in now, searched in this order. A package needs its own line, and
# so does each of its modules.
MODULES: dict[str, tuple[str, ...]] = {}

# (old module path, old name) -> the new name, for names that changed as well as moved
MEMBERS: dict[tuple[str, str], str] = {}


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn the caller's caller that `old` is deprecated."""
    warnings.warn(f"{old} is deprecated: use {new}", DeprecationWarning, stacklevel=stacklevel)


def renamed(name: str) -> Any:
    """The value of a deprecated name of `lorary`.

    Raises:
        AttributeError: there was never such a name.
    """
    if f"lorary.{name}" in MODULES:
        return importlib.import_module(f"lorary.{name}")
    if name not in NAMES:
        raise AttributeError(f"module 'lorary' has no attribute {name!r}")
    module, new = NAMES[name]
    public = new in importlib.import_module("lorary").__all__
    warn(f"lorary.{name}", f"lorary.{new}" if public else f"{module}.{new}", stacklevel=4)
    return getattr(importlib.import_module(module), new)


def forwarding(old: str, new: str) -> Callable[..., Any]:
    """A deprecated method that calls the function `new` of `lorary`, looked up when it is called."""

    def method(*args: Any, **kwargs: Any) -> Any:
        warn(old, f"lorary.{new}")
        return getattr(importlib.import_module("lorary"), new)(*args, **kwargs)

    method.__name__, method.__qualname__ = old.rpartition(".")[2], old
    method.__doc__ = f"Deprecated: use `lorary.{new}`."
    return method


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves the paths in `MODULES` as modules whose names are looked up in the new ones."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MODULES:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)  # it may have had modules of its own

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        homes = MODULES[old]
        warn(old, " or ".join(homes))

        def find(name: str) -> Any:
            new = MEMBERS.get((old, name), name)
            for home in homes:
                found = importlib.import_module(home)
                if hasattr(found, new):
                    return getattr(found, new)
            raise AttributeError(f"module {old!r} has no attribute {name!r}")

        module.__dict__["__getattr__"] = find


def install() -> None:
    """Put the finder at the end of `sys.meta_path`, after those that find real modules."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
