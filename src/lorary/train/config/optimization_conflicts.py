"""Options of the optimizer and the schedule that have no effect, are unknown or are missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorary.errors import Diagnostic, did_you_mean
from lorary.train.config.config import Config
from lorary.train.config.optimization import SCHEDULES, SET_ELSEWHERE, adam_keys, optimizer_options

_CHOICES = {
    "warmup_type": ("linear", "cosine", "1-sqrt"),
    "decay_type": ("linear", "cosine", "1-sqrt"),
    "mode": ("min",),  # it watches the evaluation loss
    "threshold_mode": ("rel", "abs"),
}
_WHOLE = ("num_decay_steps", "num_stable_steps", "timescale", "patience", "cooldown")


def optimization_problems(config: Config) -> Iterator[Diagnostic]:
    """Every problem; `where` is the dotted key to change."""
    t = config.training
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if getattr(t, key) is not None and key not in adam_keys(t.optimizer):
            yield Diagnostic(f"training.{key}", f"has no effect: {t.optimizer} does not use it", "remove it")
    yield from _optimizer_problems(t.optimizer, t.optimizer_options)
    yield from _schedule_problems(t.schedule, t.schedule_options)
    if t.schedule == "warmup_stable_decay" and t.max_steps is not None and "num_decay_steps" in t.schedule_options:
        decay = t.schedule_options["num_decay_steps"]
        if isinstance(decay, int) and decay > t.max_steps:
            what = f"`num_decay_steps` is {decay}, and the run has {t.max_steps} steps"
            yield Diagnostic("training.schedule_options", what)
    if t.schedule == "reduce_lr_on_plateau":
        if config.data.validation is None and not config.data.validation_split:
            fix = "set data.validation or data.validation_split"
            yield Diagnostic("training.schedule", "reduce_lr_on_plateau needs held-out data", fix)
        if "warmup" in t.model_fields_set and t.warmup:
            yield Diagnostic("training.warmup", "has no effect with reduce_lr_on_plateau", "remove it")


def _optimizer_problems(optimizer: str, options: dict[str, Any]) -> Iterator[Diagnostic]:
    if not options:
        return
    try:
        known = optimizer_options(optimizer)
    except ImportError as error:
        yield Diagnostic("training.optimizer", f"{optimizer} is not available here: {error}")
        return
    for key in options:
        if key in known:
            continue
        home = SET_ELSEWHERE.get(key, "")
        fix = f"set {home}" if home else did_you_mean(key, known) if known else "it has none"
        yield Diagnostic("training.optimizer_options", f"`{key}` is not an option of {optimizer}", fix)


def _schedule_problems(schedule: str, options: dict[str, Any]) -> Iterator[Diagnostic]:
    known = SCHEDULES[schedule]
    for key, value in options.items():
        if key not in known:
            fix = did_you_mean(key, known) if known else "it has none"
            yield Diagnostic("training.schedule_options", f"`{key}` is not an option of {schedule}", fix)
        elif wrong := _wrong_value(key, value):
            yield Diagnostic("training.schedule_options", f"`{key}` must be {wrong}, not {value!r}")
    if schedule == "warmup_stable_decay" and "num_decay_steps" not in options:
        fix = "set schedule_options: {num_decay_steps: 100}"
        yield Diagnostic("training.schedule_options", "warmup_stable_decay needs `num_decay_steps`", fix)
    if "min_lr_rate" in known:
        given = [key for key in ("min_lr", "min_lr_rate") if options.get(key) is not None]
        if len(given) != 1:
            what = "both set the lowest rate" if given else f"{schedule} needs `min_lr` or `min_lr_rate`"
            fix = "keep one of the two" if given else "set schedule_options: {min_lr_rate: 0.1}, a tenth of the peak"
            yield Diagnostic("training.schedule_options", f"`min_lr` and `min_lr_rate` {what}" if given else what, fix)


def _wrong_value(key: str, value: Any) -> str:
    """What an option of a schedule must be; empty if it is."""
    if key in _CHOICES:
        return "" if value in _CHOICES[key] else " or ".join(_CHOICES[key])
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
    if key in _WHOLE:
        return "" if number and isinstance(value, int) else "a whole number"
    return "" if number else "a number of at least 0"
