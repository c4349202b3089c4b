"""`lorary inspect gradients`: make the first step of a run, and report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lorary.analysis.inspection.gradients import HEAD, FirstGradients, first_gradients
from lorary.analysis.inspection.gradients_page import gradients_page
from lorary.cli._inspect.report import FILES, json_text, report_folder, write_report
from lorary.cli._inspect.runs import configuration, quiet_training, train, trainer_of
from lorary.cli._notes import print_notes
from lorary.cli._out_folder import folder_problems
from lorary.cli._table import print_table
from lorary.errors import ConfigError
from lorary.model.loading.quiet import quiet_progress_bars
from lorary.train.runner.build import build_model
from lorary.train.runner.prepare import RunPlan, prepare

# the full learning rate at once: the first step of a warmup would change nothing
_AT_ONCE: dict[str, Any] = {"warmup": 0.0, "schedule": "constant", "schedule_options": {}, "torch_compile": False}
_AT_ONCE |= {"early_stopping_patience": None, "keep_best": False, "report_to": ("none",)}


class _OneStep(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Stops after the first step of a run that was planned for all of them, as the rules' schedules expect."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True


def run(source: str, data: str, sets: tuple[str, ...], out: Path | None, *, as_json: bool) -> None:
    """Make the step and report.

    Raises:
        ConfigError: an invalid option.
        LoraryError: the configuration, the model or the data cannot be used; or the step fails.
    """
    if problems := folder_problems(out, FILES):
        raise ConfigError("cannot inspect the gradients:", problems)
    config = configuration(source, data, sets, _AT_ONCE)
    name = config.model.id
    with quiet_training() as scratch, report_folder(out) as target:
        with quiet_progress_bars():
            prepared = prepare(config)
            found = _first_step(prepared, scratch)
        if target is not None:
            write_report(target, {"model": name} | found.to_dict(), gradients_page(found, name))
    if as_json:
        print(json_text({"model": name} | found.to_dict()))
    else:
        title = f"{found.method} on {name}: norms in the first step, {len(found.sites):,} sites"
        print_table(title, HEAD, found.rows(), [found.verdict, *_effect(found)])
    print_notes(found.notes)


def _first_step(prepared: RunPlan, scratch: Path) -> FirstGradients:
    model = build_model(prepared)
    alone = dataclasses.replace(prepared, held_out=None)
    trainer = trainer_of(alone, model, scratch, [_OneStep()])
    try:
        found = first_gradients(model, lambda: train(trainer))
    finally:
        trainer.head.remove()
    return dataclasses.replace(found, notes=tuple(_notes(prepared)))


def _effect(found: FirstGradients) -> list[str]:
    """The largest change of a weight, in a line."""
    if not found.sites:
        return []
    largest = max(found.sites, key=lambda site: site.effect)
    return [f"largest change of a weight: {largest.effect:.3%} of its norm, at {largest.site}"]


def _notes(prepared: RunPlan) -> list[str]:
    """Notes about other influences on the gradients and the step."""
    t = prepared.config.training
    rules = sorted({type(rule).__name__ for site in prepared.plan.sites for rule in site.method.rules})
    notes = [f"the gradients include the penalties of {', '.join(rules)}, where they have one"] if rules else []
    if t.weight_decay:
        notes.append(f"weight decay of {t.weight_decay:g} changes tensors without a gradient too")
    return notes
