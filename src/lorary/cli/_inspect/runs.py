"""The run that an inspection is made on: a configuration or a model, prepared and built, in a temporary folder."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from lorary.cli import printable
from lorary.errors import ConfigError, Diagnostic
from lorary.train.config.config import Config
from lorary.train.config.load import from_dict, load
from lorary.train.runner.build import build_trainer
from lorary.train.runner.folder import CONFIG
from lorary.train.runner.prepare import RunPlan

_SMALL = {"batch_size": 8, "gradient_accumulation_steps": 1}  # of the built-in model: 0.2 s a step


def configuration(name: str, data: str, sets: Sequence[str], fixed: Mapping[str, Any]) -> Config:
    """The configuration to inspect.

    Args:
        name: a configuration, a run folder, or a model, which is then to be trained on `data`.
        data: a source of training and held-out rows, for a model.
        sets: `key=value` over it.
        fixed: keys of `training` that the inspection decides itself.

    Raises:
        ConfigError: the file cannot be read, or a key is wrong.
    """
    path = Path(name)
    if path.is_dir() and (path / CONFIG).is_file():
        path = path / CONFIG
    if path.suffix in (".yaml", ".yml"):
        config = load(path, list(sets), {})
    else:
        sections = {"data": {"train": data, "validation": data, "max_length": 128}, "training": _SMALL}
        config = from_dict({"model": {"id": name}, **sections}, list(sets))
    return config.model_copy(update={"training": config.training.model_copy(update=dict(fixed))})


def refuse_tasks(config: Config, name: str, refused: Mapping[str, str]) -> None:
    """Refuse tasks that cannot be inspected so.

    Raises:
        ConfigError: with the reason for the task.
    """
    if why := refused.get(config.task):
        raise ConfigError(f"cannot inspect {printable(name)}:", [Diagnostic("task", f"is {config.task}: {why}")])


@contextmanager
def quiet_training() -> Iterator[Path]:
    """A folder for what a trainer writes, removed afterwards, and no messages but errors in the meantime."""
    logger = logging.getLogger("lorary")
    before, verbosity = logger.level, transformers.logging.get_verbosity()
    logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
    finally:
        logger.setLevel(before)
        transformers.logging.set_verbosity(verbosity)


def train(trainer: Any) -> None:
    """Train; after an interrupt exit with its code, once the step is finished."""
    trainer.train()
    if trainer.guard.stop:
        raise SystemExit(128 + int(trainer.guard.stop))


def trainer_of(prepared: RunPlan, model: Any, scratch: Path, callbacks: Sequence[TrainerCallback] = ()) -> Any:
    """The run's trainer, which saves nothing."""
    trainer = build_trainer(prepared, model, scratch, resumed=True, callbacks=list(callbacks))
    trainer.args.save_strategy = SaveStrategy.NO
    return trainer
