"""PEFT, by its own rules for the sites of a configuration, the ranks of its patterns, and the class of its task.

Read from `peft/utils/save_and_load.py`, `transformers_weight_conversion.py`, `tuners/tuners_utils.py`, `peft_model.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from lorary.adapters.peft.config import NAME
from lorary.adapters.peft.replay import foreign_misreadings
from lorary.adapters.peft.tasks import why_task_misfits
from lorary.adapters.readers.folder import AdapterFolder
from lorary.adapters.readers.reader import Finding, Outcome, Reader, rank_findings

RELEASE = "0.21.2"
TYPES = frozenset(
    {"ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA", "FOURIERFT"}
    | {"FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT"}
    | {"MULTITASK_PROMPT_TUNING", "OSF", "PEANUT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA"}
    | {"P_TUNING", "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA"}
    | {"VBLORA", "VERA", "WAVEFT", "XLORA"}
)


def _rules(folder: AdapterFolder) -> Iterator[Finding]:
    yield from rank_findings(PEFT, folder, Outcome.REJECTED)
    yield from site_findings(PEFT, folder)
    if folder.model is not None and (why := why_task_misfits(folder.model, folder.config.get("task_type"))):
        yield PEFT.finding(Outcome.REJECTED, f"{NAME}: task_type", why, merged=False)


def site_findings(reader: Reader, folder: AdapterFolder) -> Iterator[Finding]:
    """The sites that the reader finds elsewhere than the tensors, by PEFT's rules replayed on the base."""
    if folder.model is None or folder.peft_type != "LORA" or folder.config.get("layer_replication"):
        return
    for problem, refused in foreign_misreadings(folder.fields, list(folder.sites), folder.model):
        outcome = Outcome.REJECTED if refused else Outcome.MISCOMPUTED
        yield reader.finding(outcome, problem.where, problem.what, merged=False)


PEFT = Reader(
    "peft",
    "PEFT",
    f"PEFT {RELEASE}",
    export="peft",
    ignores=frozenset({"fused_parts", "rope", "unknown"}),
    types=TYPES,
    rules=_rules,
)
