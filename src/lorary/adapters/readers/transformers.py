"""Transformers' `model.load_adapter`: PEFT's layers, put into the model and filled by Transformers' own loader.

Read from `transformers/integrations/peft.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from lorary.adapters.peft.config import NAME
from lorary.adapters.readers.folder import AdapterFolder
from lorary.adapters.readers.peft import PEFT, RELEASE, site_findings
from lorary.adapters.readers.reader import Finding, Outcome, Reader, first_of, rank_findings

_NOT_INJECTED = frozenset(
    {"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
    | {"SHADOW"}
)
_SHARED_STATE = frozenset({"FROD", "PVERA", "TINYLORA", "UNILORA", "VBLORA", "VERA"})


def _rules(folder: AdapterFolder) -> Iterator[Finding]:
    yield from rank_findings(TRANSFORMERS, folder, Outcome.REJECTED)
    yield from site_findings(TRANSFORMERS, folder)
    if folder.peft_type == "ADALORA" and folder.config.get("rank_pattern"):
        what = "Transformers makes every layer of the rank at the start, and refuses those that have lost directions"
        yield TRANSFORMERS.finding(Outcome.REJECTED, f"{NAME}: rank_pattern", what, merged=False)
    if bare := [name for name in folder.others if name.endswith(".lora_magnitude_vector")]:
        what = "Transformers computes without magnitudes whose names do not end in .weight"
        yield TRANSFORMERS.finding(Outcome.MISCOMPUTED, first_of(bare), what, merged=False)


TRANSFORMERS = Reader(
    "transformers",
    "Transformers",
    f"Transformers 5.23.0 with PEFT {RELEASE}",
    export="peft",
    refuses=PEFT.refuses,
    ignores=PEFT.ignores | {"alora"},
    types=PEFT.types - _NOT_INJECTED - _SHARED_STATE,
    rules=_rules,
)
