"""lorary, the LoRA library: every method of the family, trained, combined, compared, exported and served.

The names below are loaded when they are first used, so that `import lorary` and `lorary --help` stay quick. No
module may have the name of a function here: importing it would hide the function.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lorary import _deprecated

__version__ = "0.6.0"

_HOMES = {
    "Adapted": "layers.adapted",
    "AdaptedSite": "spec.placement",
    "Adapter": "adapters.adapter",
    "AdapterDiff": "adapters.compose.diff",
    "AdapterInspection": "analysis.inspection.figures",
    "Attachment": "model.state",
    "Compression": "adapters.compose.compression",
    "Comparison": "analysis.comparison.record",
    "ConfigError": "errors",
    "DataError": "errors",
    "Diagnostic": "errors",
    "EvolutionConfig": "analysis.supernet_search",
    "Extraction": "adapters.compose.extraction",
    "FileError": "errors",
    "Fingerprint": "model.fingerprint",
    "FirstGradients": "analysis.inspection.gradients",
    "Importance": "methods.lora_drop",
    "IntrinsicDimension": "analysis.inspection.intrinsic",
    "LoraryError": "errors",
    "LowRankForm": "adapters.low_rank_form",
    "MergeCheck": "analysis.merge_check",
    "MergeError": "analysis.merge_error",
    "Method": "spec.method",
    "MethodError": "errors",
    "NF4": "layers.nf4",
    "NamedAdapters": "adapters.named",
    "Plan": "model.plan",
    "PlanError": "errors",
    "Preset": "spec.presets",
    "RankChange": "adapters.change_rank",
    "Rules": "model.optim.rules",
    "SearchResult": "analysis.supernet_search",
    "Site": "spec.site",
    "StateError": "errors",
    "TrainerCallback": "train.trainer.callback",
    "TrainingError": "errors",
    "WeightSearch": "adapters.compose.lorahub",
    "Verdict": "adapters.readers.reader",
    "Verification": "analysis.verify.verify",
    "add_tokens": "model.vocabulary",
    "attach": "model.attach",
    "attached": "model.state",
    "cached": "model.cached",
    "calibrate": "model.calibration",
    "change_rank": "adapters.change_rank",
    "check": "adapters.readers.check",
    "dequantize": "model.quantize",
    "compare": "train.compare.compare",
    "compress": "analysis.compress",
    "detach": "model.attach",
    "diff": "adapters.compose.diff",
    "disabled": "model.disable",
    "drop_layers": "analysis.importance",
    "first_gradients": "analysis.inspection.gradients",
    "inspect_adapter": "analysis.inspection.adapter",
    "extract": "adapters.compose.extract",
    "intrinsic_dimension": "analysis.inspection.intrinsic",
    "layer_importance": "analysis.importance",
    "load": "adapters.switch",
    "load_adapter": "adapters.save_load",
    "load_quantized": "model.loading.from_pretrained",
    "lorahub": "adapters.compose.lorahub",
    "merge": "model.merge",
    "method": "spec.presets",
    "mix": "adapters.compose.mix",
    "named_adapters": "adapters.named",
    "optimizer": "model.optim.optimizer",
    "param_groups": "model.optim.param_groups",
    "plan": "model.planning",
    "presets": "spec.presets",
    "quantize": "model.quantize",
    "ranks_from_gradients": "analysis.gradient_ranks",
    "resize_vocabulary": "model.vocabulary",
    "rules": "model.optim.rules",
    "save": "adapters.switch",
    "save_adapter": "adapters.save_load",
    "save_quantized": "model.loading.bitsandbytes_checkpoint",
    "scale": "adapters.compose.scale",
    "search_supernet": "analysis.supernet_search",
    "switch": "adapters.switch",
    "unmerge": "model.merge",
    "untie_embeddings": "model.vocabulary",
    "verify": "analysis.verify.verify",
    "with_invocation": "methods.alora",
    "with_prompt_text": "methods.prompt_tuning",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from lorary.adapters.adapter import Adapter as Adapter
    from lorary.adapters.change_rank import RankChange as RankChange
    from lorary.adapters.change_rank import change_rank as change_rank
    from lorary.adapters.compose.compression import Compression as Compression
    from lorary.adapters.compose.diff import AdapterDiff as AdapterDiff
    from lorary.adapters.compose.diff import diff as diff
    from lorary.adapters.compose.extract import extract as extract
    from lorary.adapters.compose.extraction import Extraction as Extraction
    from lorary.adapters.compose.lorahub import WeightSearch as WeightSearch
    from lorary.adapters.compose.lorahub import lorahub as lorahub
    from lorary.adapters.compose.mix import mix as mix
    from lorary.adapters.compose.scale import scale as scale
    from lorary.adapters.low_rank_form import LowRankForm as LowRankForm
    from lorary.adapters.named import NamedAdapters as NamedAdapters
    from lorary.adapters.named import named_adapters as named_adapters
    from lorary.adapters.readers.check import check as check
    from lorary.adapters.readers.reader import Verdict as Verdict
    from lorary.adapters.save_load import load_adapter as load_adapter
    from lorary.adapters.save_load import save_adapter as save_adapter
    from lorary.adapters.switch import load as load
    from lorary.adapters.switch import save as save
    from lorary.adapters.switch import switch as switch
    from lorary.analysis.comparison.record import Comparison as Comparison
    from lorary.analysis.compress import compress as compress
    from lorary.analysis.gradient_ranks import ranks_from_gradients as ranks_from_gradients
    from lorary.analysis.importance import drop_layers as drop_layers
    from lorary.analysis.importance import layer_importance as layer_importance
    from lorary.analysis.inspection.adapter import inspect_adapter as inspect_adapter
    from lorary.analysis.inspection.figures import AdapterInspection as AdapterInspection
    from lorary.analysis.inspection.gradients import FirstGradients as FirstGradients
    from lorary.analysis.inspection.gradients import first_gradients as first_gradients
    from lorary.analysis.inspection.intrinsic import IntrinsicDimension as IntrinsicDimension
    from lorary.analysis.inspection.intrinsic import intrinsic_dimension as intrinsic_dimension
    from lorary.analysis.merge_check import MergeCheck as MergeCheck
    from lorary.analysis.merge_error import MergeError as MergeError
    from lorary.analysis.supernet_search import EvolutionConfig as EvolutionConfig
    from lorary.analysis.supernet_search import SearchResult as SearchResult
    from lorary.analysis.supernet_search import search_supernet as search_supernet
    from lorary.analysis.verify.verify import Verification as Verification
    from lorary.analysis.verify.verify import verify as verify
    from lorary.errors import ConfigError as ConfigError
    from lorary.errors import DataError as DataError
    from lorary.errors import Diagnostic as Diagnostic
    from lorary.errors import FileError as FileError
    from lorary.errors import LoraryError as LoraryError
    from lorary.errors import MethodError as MethodError
    from lorary.errors import PlanError as PlanError
    from lorary.errors import StateError as StateError
    from lorary.errors import TrainingError as TrainingError
    from lorary.layers.adapted import Adapted as Adapted
    from lorary.layers.nf4 import NF4 as NF4
    from lorary.methods.alora import with_invocation as with_invocation
    from lorary.methods.lora_drop import Importance as Importance
    from lorary.methods.prompt_tuning import with_prompt_text as with_prompt_text
    from lorary.model.attach import attach as attach
    from lorary.model.attach import detach as detach
    from lorary.model.cached import cached as cached
    from lorary.model.calibration import calibrate as calibrate
    from lorary.model.disable import disabled as disabled
    from lorary.model.fingerprint import Fingerprint as Fingerprint
    from lorary.model.loading.bitsandbytes_checkpoint import save_quantized as save_quantized
    from lorary.model.loading.from_pretrained import load_quantized as load_quantized
    from lorary.model.merge import merge as merge
    from lorary.model.merge import unmerge as unmerge
    from lorary.model.optim.optimizer import optimizer as optimizer
    from lorary.model.optim.param_groups import param_groups as param_groups
    from lorary.model.optim.rules import Rules as Rules
    from lorary.model.optim.rules import rules as rules
    from lorary.model.plan import Plan as Plan
    from lorary.model.planning import plan as plan
    from lorary.model.quantize import dequantize as dequantize
    from lorary.model.quantize import quantize as quantize
    from lorary.model.state import Attachment as Attachment
    from lorary.model.state import attached as attached
    from lorary.model.vocabulary import add_tokens as add_tokens
    from lorary.model.vocabulary import resize_vocabulary as resize_vocabulary
    from lorary.model.vocabulary import untie_embeddings as untie_embeddings
    from lorary.spec.method import Method as Method
    from lorary.spec.placement import AdaptedSite as AdaptedSite
    from lorary.spec.presets import Preset as Preset
    from lorary.spec.presets import method as method
    from lorary.spec.presets import presets as presets
    from lorary.spec.site import Site as Site
    from lorary.train.compare.compare import compare as compare
    from lorary.train.trainer.callback import TrainerCallback as TrainerCallback

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
