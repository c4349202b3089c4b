"""Names that keep working for one release, each with a `DeprecationWarning` that names the new one.

The tables are all there is to edit. `lorary.__getattr__` asks `renamed` for a name that it does not have, and a
finder at the end of `sys.meta_path` serves module paths that no longer exist: importing one is silent, using a name
from it warns. Modules that are still there call `keep_old_names`, and classes have a `RenamedAttribute` for each
attribute.
"""

from __future__ import annotations

import functools
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

# lorary.<old> -> the class of another library to use instead; the name in `NAMES` forwards to it for this release
OTHER_LIBRARIES = {"PagedAdamW": "bitsandbytes.optim.PagedAdamW32bit"}

# old module path -> the modules that its names are in now, searched in this order. A package needs its own line, and
# so does each of its modules.
MODULES: dict[str, tuple[str, ...]] = {
    "lorary.accounting": ("lorary.analysis.memory.live_bytes",),
    "lorary.adapted": ("lorary.layers.adapted",),
    "lorary.adapter": ("lorary.adapters.adapter",),
    "lorary.attending": ("lorary.layers.shifted_attention",),
    "lorary.attention": ("lorary.kernels.shifted_attention",),
    "lorary.bases": ("lorary.model.loading",),
    "lorary.biases": ("lorary.model.bias_flags",),
    "lorary.combinations": ("lorary.methods.compatibility",),
    "lorary.contexts": ("lorary.spec.context",),
    "lorary.evolution": ("lorary.analysis.supernet_search",),
    "lorary.fidelity": ("lorary.analysis.merge_error",),
    "lorary.fields": ("lorary.spec.fields",),
    "lorary.fingerprint": ("lorary.model.fingerprint",),
    "lorary.footprint": ("lorary.analysis.memory",),
    "lorary.formats": ("lorary.adapters",),
    "lorary.formats.findings": ("lorary.files.findings",),
    "lorary.forms": ("lorary.adapters.low_rank_form",),
    "lorary.fused": ("lorary.layers.fused_qkv",),
    "lorary.grid": ("lorary.layers.module_kinds",),
    "lorary.inspect": ("lorary.analysis",),
    "lorary.inspect.canvas": ("lorary.analysis.svg",),
    "lorary.inspect.context": ("lorary.analysis.long_context",),
    "lorary.inspect.context_plot": ("lorary.analysis.long_context_plot",),
    "lorary.inspect.heatmap": ("lorary.analysis.heatmap",),
    "lorary.inspect.passkey": ("lorary.analysis.passkey",),
    "lorary.inspect.plots": ("lorary.analysis.loss_plot",),
    "lorary.inspect.report": ("lorary.analysis.html_report",),
    "lorary.live": ("lorary.analysis.merge_check",),
    "lorary.loop": ("lorary.model.optim.param_groups", "lorary.model.optim.rules", "lorary.model.state"),
    "lorary.merging": ("lorary.model.merge",),
    "lorary.methods.loraplus": ("lorary.methods.lora_plus",),
    "lorary.packing": ("lorary.model.quantize",),
    "lorary.past": ("lorary.model.previous_tasks",),
    "lorary.placed": ("lorary.spec.placement",),
    "lorary.planning": ("lorary.model.planning",),
    "lorary.plans": ("lorary.model.plan",),
    "lorary.positions": ("lorary.layers.rope",),
    "lorary.preconditions": ("lorary.model.checks",),
    "lorary.preset": ("lorary.spec.presets",),
    "lorary.probing": ("lorary.analysis.importance",),
    "lorary.record": ("lorary.spec.method",),
    "lorary.residual": ("lorary.model.residual_base",),
    "lorary.shards": ("lorary.layers.dtensor",),
    "lorary.shrinking": ("lorary.model.rank_pruning",),
    "lorary.sites": ("lorary.spec.site", "lorary.layers.kinds"),
    "lorary.state": ("lorary.model.state",),
    "lorary.storage": ("lorary.layers",),
    "lorary.storage.as_is": ("lorary.spec.interfaces",),
    "lorary.storage.bitsandbytes_state": ("lorary.layers.bitsandbytes_state",),
    "lorary.storage.bnb_nf4": ("lorary.layers.bitsandbytes",),
    "lorary.storage.foreign": ("lorary.layers.other_quantizers",),
    "lorary.storage.nf4": ("lorary.layers.nf4",),
    "lorary.surgery": ("lorary.model.attach", "lorary.model.disable"),
    "lorary.switching": ("lorary.adapters.switch",),
    "lorary.targets": ("lorary.model.targets",),
    "lorary.train.config": ("lorary.train.config.config",),
    "lorary.weights": ("lorary.layers.quantized_weight",),
    "lorary.words": ("lorary.spec.interfaces",),
}

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

# (old module path, old name) -> the new name, for names that changed. Where the module itself did not move, it calls
# `keep_old_names`.
MEMBERS: dict[tuple[str, str], str] = {
    ("lorary.contexts", "Reading"): "ContextPatch",
    ("lorary.errors", "Problem"): "Diagnostic",
    ("lorary.evolution", "Evolution"): "EvolutionConfig",
    ("lorary.evolution", "Found"): "SearchResult",
    ("lorary.evolution", "search"): "search_supernet",
    ("lorary.fidelity", "Fidelity"): "MergeError",
    ("lorary.fidelity", "SiteFidelity"): "SiteMergeError",
    ("lorary.live", "Live"): "MergeCheck",
    ("lorary.loop", "Tuning"): "Rules",
    ("lorary.loop", "evaluating"): "eval_mode",
    ("lorary.loop", "groups"): "param_groups",
    ("lorary.loop", "tuning"): "rules",
    ("lorary.packing", "PackingWarning"): "QuantizationWarning",
    ("lorary.packing", "pack"): "quantize",
    ("lorary.packing", "unpack"): "dequantize",
    ("lorary.placed", "Placed"): "AdaptedSite",
    ("lorary.probing", "dropped"): "drop_layers",
    ("lorary.probing", "importance"): "layer_importance",
    ("lorary.storage.as_is", "AsIs"): "Unquantized",
    ("lorary.weights", "by_forward"): "weight_by_forward",
    ("lorary.weights", "is_packed"): "is_quantized",
    ("lorary.weights", "keeps"): "register_quantized",
    ("lorary.words", "WORDS"): "COMPONENTS",
    ("lorary.words", "word"): "component",
}
MEMBERS |= {(module, old): new for old, (module, new) in COMPONENTS.items()}

# its name now -> its fields in those files, and a site's
FIELDS: dict[str, dict[str, str]] = {"SharedProjectionInit": {"saved": "store_shared"}}
SITE = {"out": "out_features", "inp": "in_features", "window": "kernel_size"}


def current_component(record: Mapping[str, Any]) -> dict[str, Any]:
    """A component's record of format 1, in today's names."""
    name = record["word"]
    name = COMPONENTS[name][1] if isinstance(name, str) and name in COMPONENTS else name
    fields = FIELDS.get(name, {}) if isinstance(name, str) else {}
    return {"component": name} | _with_new_keys({k: v for k, v in record.items() if k != "word"}, fields)


def current_site(record: Any) -> Any:
    """A site's record of format 1, in today's names."""
    return _with_new_keys(record, SITE) if isinstance(record, dict) else record


def _with_new_keys(record: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The record in today's names; an old name beside its new one stays, and readers refuse it."""
    return {k if renamed.get(k) in record else renamed.get(k, k): v for k, v in record.items()}


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn the caller's caller that `old` is deprecated.

    `from package import name` looks the name up twice: `_handle_fromlist` asks whether it exists before the import
    statement fetches it. Only the second look-up warns.
    """
    if sys._getframe(stacklevel - 1).f_code.co_name == "_handle_fromlist":
        return
    warnings.warn(f"{old} is deprecated: use {new}", DeprecationWarning, stacklevel=stacklevel)


def renamed(name: str) -> Any:
    """The value of a deprecated name of `lorary`.

    Raises:
        AttributeError: there was never such a name.
    """
    if (path := f"lorary.{name}") in MODULES:
        return importlib.import_module(path)  # its names warn when they are used
    if name not in NAMES:
        raise AttributeError(f"module 'lorary' has no attribute {name!r}")
    module, new = NAMES[name]
    public = new in importlib.import_module("lorary").__all__
    replacement = OTHER_LIBRARIES.get(name) or (f"lorary.{new}" if public else f"{module}.{new}")
    warn(f"lorary.{name}", replacement, stacklevel=4)
    return getattr(importlib.import_module(module), new)


def forwarding(old: str, new: str) -> Callable[..., Any]:
    """A deprecated method that calls the function `new` of `lorary`, looked up when it is called."""

    def method(*args: Any, **kwargs: Any) -> Any:
        warn(old, f"lorary.{new}")
        return getattr(importlib.import_module("lorary"), new)(*args, **kwargs)

    method.__name__, method.__qualname__ = old.rpartition(".")[2], old
    method.__doc__ = f"Deprecated: use `lorary.{new}`."
    return method


class RenamedAttribute:
    """A deprecated attribute of a class: `inp = RenamedAttribute("in_features")`."""

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner, self.old = owner.__name__, name

    def __get__(self, instance: object | None, owner: type | None = None) -> Any:
        if instance is None:
            return self
        warn(f"{self.owner}.{self.old}", f"{self.owner}.{self.new}")
        return getattr(instance, self.new)


def _member(module: str, name: str) -> tuple[str, Any]:
    """The module in which a name of an old module path is now, and its value.

    Raises:
        AttributeError: there was never such a name.
    """
    new = MEMBERS.get((module, name), name)
    special = name.startswith("__")  # `__file__` and the like, for which Python's own tools ask any module
    for home in () if special else MODULES.get(module, (module,)):
        found = importlib.import_module(home)
        # a module that is asked for its own old names would ask this function again
        if new in vars(found) or (home != module and hasattr(found, new)):
            return f"{home}.{new}", getattr(found, new)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def _star(module: str) -> list[str]:
    """The names that `from <an old module path> import *` binds."""
    names = {old for path, old in MEMBERS if path == module}
    for home in map(importlib.import_module, MODULES[module]):
        names |= set(getattr(home, "__all__", [name for name in vars(home) if not name.startswith("_")]))
    return sorted(names)


def _old_member(module: str, name: str) -> Any:
    """The value of a name of an old module path, with a warning that names its new place."""
    if name == "__all__" and module in MODULES:
        return _star(module)
    path, value = _member(module, name)
    warn(f"{module}.{name}", path)
    return value


def keep_old_names(package: str) -> None:
    """Let `package` and the modules in it give their old names too, each use with a warning."""
    for module in {*MODULES, *(module for module, _ in MEMBERS)}:
        if f"{module}.".startswith(f"{package}.") and module in sys.modules:
            sys.modules[module].__dict__["__getattr__"] = functools.partial(_old_member, module)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves the paths in `MODULES` as modules whose names are looked up in the new ones."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MODULES:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)  # it may have had modules of its own

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = functools.partial(_old_member, module.__name__)


def install() -> None:
    """Put the finder at the end of `sys.meta_path`, after those that find real modules; keep the names of `errors`."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    importlib.import_module("lorary.errors")
    keep_old_names("lorary.errors")
