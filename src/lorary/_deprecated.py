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
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

# lorary.<old> -> (the new one's module, its name there)
NAMES: dict[str, tuple[str, str]] = {
    "Evolution": ("lorary.analysis.supernet_search", "EvolutionConfig"),
    "Fidelity": ("lorary.analysis.merge_error", "MergeError"),
    "Found": ("lorary.analysis.supernet_search", "SearchResult"),
    "Live": ("lorary.analysis.merge_check", "MergeCheck"),
    "PagedAdamW": ("lorary.train.trainer.optimizers", "paged_adamw"),
    "Tuning": ("lorary.model.optim.rules", "Rules"),
    "Placed": ("lorary.spec.placement", "AdaptedSite"),
    "Problem": ("lorary.errors", "Diagnostic"),
    "dropped": ("lorary.analysis.importance", "drop_layers"),
    "groups": ("lorary.model.optim.param_groups", "param_groups"),
    "importance": ("lorary.analysis.importance", "layer_importance"),
    "load_base": ("lorary.model.loading.from_pretrained", "load_quantized"),
    "pack": ("lorary.model.quantize", "quantize"),
    "save_base": ("lorary.model.loading.bitsandbytes_checkpoint", "save_quantized"),
    "search": ("lorary.analysis.supernet_search", "search_supernet"),
    "tuning": ("lorary.model.optim.rules", "rules"),
    "unpack": ("lorary.model.quantize", "dequantize"),
}

# old module path -> the modules that its names are in now, searched in this order. A package needs its own line, and
# so does each of its modules.
MODULES: dict[str, tuple[str, ...]] = {}

# (old module path, old name) -> the new name, for names that changed as well as moved
MEMBERS: dict[tuple[str, str], str] = {}


# A component's class name in files of format 1 (lorary 0.5 and before) -> its module and its name now
COMPONENTS: dict[str, tuple[str, str]] = {
    "AsIs": ("lorary.spec.interfaces", "Unquantized"),
    "AwayFrom": ("lorary.methods.o_lora", "OrthogonalToPast"),
    "Balanced": ("lorary.methods.multilora", "MultiLoRAInit"),
    "ByRank": ("lorary.methods.lora", "AlphaOverRank"),
    "BySqrtRank": ("lorary.methods.rslora", "AlphaOverSqrtRank"),
    "ByStartRank": ("lorary.methods.adalora", "AlphaOverInitialRank"),
    "Direction": ("lorary.methods.dora", "MagnitudeDirection"),
    "Extended": ("lorary.methods.longlora", "LongContext"),
    "Fixed": ("lorary.methods.lora", "ConstantScale"),
    "FollowProduct": ("lorary.methods.delta_lora", "DeltaLoRARule"),
    "Minis": ("lorary.methods.melora", "BlockDiagonal"),
    "Orthogonal": ("lorary.methods.adalora", "OrthogonalityPenalty"),
    "Orthonormal": ("lorary.methods.olora", "QRInit"),
    "Parallel": ("lorary.methods.multilora", "ParallelLowRank"),
    "Principal": ("lorary.methods.pissa", "SVDInit"),
    "Projections": ("lorary.methods.vera", "SharedProjectionInit"),
    "Propagated": ("lorary.methods.delta_lora", "DeltaLoRADelta"),
    "SmallNormal": ("lorary.methods.adalora", "SVDDeltaInit"),
    "Spectral": ("lorary.methods.adalora", "SVDDelta"),
    "Supports": ("lorary.methods.glora", "GLoRAJoin"),
    "Tasks": ("lorary.methods.o_lora", "SequentialLoRA"),
    "Terms": ("lorary.methods.glora_terms", "GLoRADelta"),
    "Vectors": ("lorary.methods.vera", "SharedProjectionDelta"),
    "WriteProduct": ("lorary.methods.delta_lora", "DeltaLoRAPaperRule"),
    "ZeroDown": ("lorary.methods.glora", "ZeroDownInit"),
}
# its name now -> its fields in those files, and a site's
FIELDS: dict[str, dict[str, str]] = {"SharedProjectionInit": {"saved": "store_shared"}}
SITE = {"out": "out_features", "inp": "in_features", "window": "kernel_size"}


def current_component(record: Mapping[str, Any]) -> dict[str, Any]:
    """A component's record of format 1, in today's names."""
    name = record["word"]
    name = COMPONENTS[name][1] if isinstance(name, str) and name in COMPONENTS else name
    fields = FIELDS.get(name, {}) if isinstance(name, str) else {}
    return {"component": name} | {fields.get(k, k): v for k, v in record.items() if k != "word"}


def current_site(record: Any) -> Any:
    """A site's record of format 1, in today's names."""
    return {SITE.get(k, k): v for k, v in record.items()} if isinstance(record, dict) else record


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
