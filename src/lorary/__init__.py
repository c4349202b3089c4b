"""lorary, the LoRA library: every method of the family, trained, combined, compared, exported and served.

The names below are loaded when they are first used, so that `import lorary` and `lorary --help` stay quick. No
module may have the name of a function here: importing it would hide the function.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lorary import _deprecated

__version__ = "0.5.0"

_HOMES = {
    "Adapted": "adapted",
    "Adapter": "adapter",
    "Attachment": "state",
    "ConfigError": "errors",
    "DataError": "errors",
    "EvolutionConfig": "evolution",
    "FileError": "errors",
    "Fingerprint": "fingerprint",
    "Importance": "methods.lora_drop",
    "LoraryError": "errors",
    "LowRankForm": "forms",
    "MergeCheck": "live",
    "MergeError": "fidelity",
    "Method": "record",
    "MethodError": "errors",
    "NF4": "storage.nf4",
    "Placed": "placed",
    "Plan": "plans",
    "PlanError": "errors",
    "Preset": "preset",
    "Problem": "errors",
    "Rules": "loop",
    "SearchResult": "evolution",
    "Site": "sites",
    "StateError": "errors",
    "TrainingError": "errors",
    "attach": "surgery",
    "attached": "state",
    "dequantize": "packing",
    "detach": "surgery",
    "disabled": "surgery",
    "drop_layers": "probing",
    "layer_importance": "probing",
    "load": "switching",
    "load_adapter": "formats.adapters",
    "load_quantized": "train.models",
    "merge": "merging",
    "method": "preset",
    "param_groups": "loop",
    "plan": "planning",
    "presets": "preset",
    "quantize": "packing",
    "rules": "loop",
    "save": "switching",
    "save_adapter": "formats.adapters",
    "save_quantized": "bases.bitsandbytes_files",
    "search_supernet": "evolution",
    "switch": "switching",
    "unmerge": "merging",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from lorary.adapted import Adapted as Adapted
    from lorary.adapter import Adapter as Adapter
    from lorary.bases.bitsandbytes_files import save_quantized as save_quantized
    from lorary.errors import ConfigError as ConfigError
    from lorary.errors import DataError as DataError
    from lorary.errors import FileError as FileError
    from lorary.errors import LoraryError as LoraryError
    from lorary.errors import MethodError as MethodError
    from lorary.errors import PlanError as PlanError
    from lorary.errors import Problem as Problem
    from lorary.errors import StateError as StateError
    from lorary.errors import TrainingError as TrainingError
    from lorary.evolution import EvolutionConfig as EvolutionConfig
    from lorary.evolution import SearchResult as SearchResult
    from lorary.evolution import search_supernet as search_supernet
    from lorary.fidelity import MergeError as MergeError
    from lorary.fingerprint import Fingerprint as Fingerprint
    from lorary.formats.adapters import load_adapter as load_adapter
    from lorary.formats.adapters import save_adapter as save_adapter
    from lorary.forms import LowRankForm as LowRankForm
    from lorary.live import MergeCheck as MergeCheck
    from lorary.loop import Rules as Rules
    from lorary.loop import param_groups as param_groups
    from lorary.loop import rules as rules
    from lorary.merging import merge as merge
    from lorary.merging import unmerge as unmerge
    from lorary.methods.lora_drop import Importance as Importance
    from lorary.packing import dequantize as dequantize
    from lorary.packing import quantize as quantize
    from lorary.placed import Placed as Placed
    from lorary.planning import plan as plan
    from lorary.plans import Plan as Plan
    from lorary.preset import Preset as Preset
    from lorary.preset import method as method
    from lorary.preset import presets as presets
    from lorary.probing import drop_layers as drop_layers
    from lorary.probing import layer_importance as layer_importance
    from lorary.record import Method as Method
    from lorary.sites import Site as Site
    from lorary.state import Attachment as Attachment
    from lorary.state import attached as attached
    from lorary.storage.nf4 import NF4 as NF4
    from lorary.surgery import attach as attach
    from lorary.surgery import detach as detach
    from lorary.surgery import disabled as disabled
    from lorary.switching import load as load
    from lorary.switching import save as save
    from lorary.switching import switch as switch
    from lorary.train.models import load_quantized as load_quantized

_deprecated.install()


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        return _deprecated.renamed(name)
    importlib.import_module("lorary.methods")  # the presets register themselves
    value = getattr(importlib.import_module(f"lorary.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
