"""PEFT, by its own rules for the sites of a configuration, the ranks of its patterns, and the class of its task.

Read from `peft/utils/save_and_load.py`, `transformers_weight_conversion.py`, `tuners/tuners_utils.py`, `peft_model.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from lorary.adapters.peft.config import NAME
from lorary.adapters.peft.replay import foreign_misreadings
from lorary.adapters.peft.tasks import why_task_misfits
from lorary.adapters.readers.folder import AdapterFolder, read_folder
from lorary.adapters.readers.reader import Finding, Outcome, Reader, is_of_experts, rank_findings
from lorary.errors import Diagnostic, deduplicated

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
    if folder.model is None or not folder.is_lora or folder.config.get("layer_replication"):
        return
    for problem, refused in foreign_misreadings(folder.fields, list(folder.sites), folder.model):
        outcome = Outcome.REJECTED if refused else Outcome.MISCOMPUTED
        yield reader.finding(outcome, problem.where, problem.what, merged=False)


def misread_export(path: Path, scales: Mapping[str, float], model: nn.Module | None) -> list[Diagnostic]:
    """The differences between an exported folder and what PEFT and Transformers would read from it.

    Args:
        path: the folder with PEFT's two files.
        scales: site -> the scale of its factors, for every site in it.
        model: the base, if at hand: only with it are the sites compared with its modules.
    """
    folder = read_folder(path, model, seconds=600)  # the patterns are our own
    parameters = {name for name in scales if folder.fields.targets_parameter(name)}  # of fused experts
    sites = {name for name in folder.sites if not is_of_experts(name)} | parameters
    problems = [Diagnostic(name, "its tensors are not those of an adapted site") for name in sites ^ scales.keys()]
    for name in sites & scales.keys():
        if not math.isclose(theirs := folder.scale(name), scales[name], rel_tol=1e-6):
            what = f"PEFT would compute with the scale {theirs:.6g}, and its own is {scales[name]:.6g}"
            problems.append(Diagnostic(name, what))
    problems += [finding.problem for finding in _rules(folder)]
    return deduplicated(sorted(problems, key=lambda problem: problem.where))


PEFT = Reader(
    "peft",
    "PEFT",
    f"PEFT {RELEASE}",
    export="peft",
    ignores=frozenset({"fused_parts", "rope", "unknown"}),
    types=TYPES,
    rules=_rules,
)
