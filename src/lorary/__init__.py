"""lorary, the LoRA library: every method of the family, trained, combined, compared, exported and served.

The names below are loaded when they are first used, so that `import lorary` and `lorary --help` stay quick. No
module may have the name of a function here: importing it would hide the function.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.5.0"

_HOMES = {
    "Adapted": "adapted",
    "Adapter": "adapter",
    "Evolution": "evolution",
    "Fidelity": "fidelity",
    "Fingerprint": "fingerprint",
    "Found": "evolution",
    "Importance": "methods.lora_drop",
    "Live": "live",
    "LowRankForm": "forms",
    "Method": "record",
    "NF4": "storage.nf4",
    "PagedAdamW": "paged",
    "Placed": "placed",
    "Plan": "planning",
    "Preset": "preset",
    "Site": "sites",
    "Tuning": "loop",
    "attach": "surgery",
    "detach": "surgery",
    "disabled": "surgery",
    "dropped": "probing",
    "groups": "loop",
    "importance": "probing",
    "load": "switching",
    "load_base": "train.models",
    "merge": "merging",
    "method": "preset",
    "pack": "packing",
    "plan": "planning",
    "presets": "preset",
    "save": "switching",
    "save_base": "bases.bitsandbytes_files",
    "search": "evolution",
    "switch": "switching",
    "tuning": "loop",
    "unmerge": "merging",
    "unpack": "packing",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from lorary.adapted import Adapted as Adapted
    from lorary.adapter import Adapter as Adapter
    from lorary.bases.bitsandbytes_files import save_base as save_base
    from lorary.evolution import Evolution as Evolution
    from lorary.evolution import Found as Found
    from lorary.evolution import search as search
    from lorary.fidelity import Fidelity as Fidelity
    from lorary.fingerprint import Fingerprint as Fingerprint
    from lorary.forms import LowRankForm as LowRankForm
    from lorary.live import Live as Live
    from lorary.loop import Tuning as Tuning
    from lorary.loop import groups as groups
    from lorary.loop import tuning as tuning
    from lorary.merging import merge as merge
    from lorary.merging import unmerge as unmerge
    from lorary.methods.lora_drop import Importance as Importance
    from lorary.packing import pack as pack
    from lorary.packing import unpack as unpack
    from lorary.paged import PagedAdamW as PagedAdamW
    from lorary.placed import Placed as Placed
    from lorary.planning import plan as plan
    from lorary.plans import Plan as Plan
    from lorary.preset import Preset as Preset
    from lorary.preset import method as method
    from lorary.preset import presets as presets
    from lorary.probing import dropped as dropped
    from lorary.probing import importance as importance
    from lorary.record import Method as Method
    from lorary.sites import Site as Site
    from lorary.storage.nf4 import NF4 as NF4
    from lorary.surgery import attach as attach
    from lorary.surgery import detach as detach
    from lorary.surgery import disabled as disabled
    from lorary.switching import load as load
    from lorary.switching import save as save
    from lorary.switching import switch as switch
    from lorary.train.models import load_base as load_base


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'lorary' has no attribute {name!r}")
    importlib.import_module("lorary.methods")  # the presets register themselves
    value = getattr(importlib.import_module(f"lorary.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
