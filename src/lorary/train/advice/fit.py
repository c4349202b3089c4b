"""Changes with which an advised run fits into the memory of a machine: the mildest that suffices."""

from __future__ import annotations

from typing import Any

from lorary.analysis.memory.gpu_fit import gigabytes
from lorary.train.advice.draft import Draft, changed
from lorary.train.advice.facts import Subject
from lorary.train.advice.machine import Machine
from lorary.train.runner.memory_forecast import Forecast, forecast

_SOURCE = "predicted memory, docs/memory.md"
_QLORA = "Dettmers et al. 2023, arXiv:2305.14314"


def fit(draft: Draft, subject: Subject, machine: Machine) -> None:
    """Recommend smaller forward passes, then recomputed activations, then a base in 4 bits, until the run fits."""
    base = draft.config
    for changes in _ladder(draft):
        found = forecast(changed(base, changes), subject.model, subject.plan(changed(base, changes)))
        if machine.fits(found):
            break
    for key, value in changes.items():
        source = _QLORA if key == "method.name" else _SOURCE
        draft.recommend(key, value, f"to fit into {machine}", source)
    if not machine.fits(found):
        need = gigabytes(machine.need(found))
        draft.warnings.append(f"the run needs {need}, more than {machine} has, in spite of all of these changes")
    elif not changes:
        _fits(draft, machine, found)


def _fits(draft: Draft, machine: Machine, found: Forecast) -> None:
    """Say that nothing need be changed."""
    if found.memory.activations is not None:
        reason = f"{gigabytes(machine.need(found))} fit into {machine} without recomputing activations"
        draft.recommend("training.gradient_checkpointing", False, reason, _SOURCE)


def _ladder(draft: Draft) -> list[dict[str, Any]]:
    """The changes to try, from none to all; keys that the user has set stay."""
    micro, more = draft.value("training.batch_size"), draft.value("training.gradient_accumulation_steps")
    least = 2 if draft.value("task") == "kto" else 1  # KTO compares the answers of a batch
    one = {"training.batch_size": least, "training.gradient_accumulation_steps": max(micro * more // least, 1)}
    steps: list[dict[str, Any]] = [{}, one, {"training.gradient_checkpointing": True}]
    names = draft.value("method.name")
    if "qlora" not in names and "full" not in names:
        steps.append({"method.name": (*(name for name in names if name != "lora"), "qlora")})
    ladder: list[dict[str, Any]] = []
    for step in steps:
        if not any(draft.is_given(key) for key in step):
            ladder.append((ladder[-1] if ladder else {}) | step)
    return ladder
