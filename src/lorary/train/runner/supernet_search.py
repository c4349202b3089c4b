"""Supernet search in a finished run: the best structure of each layer, saved beside the run's adapter."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers

import lorary
from lorary.analysis.supernet_search import EvolutionConfig, SearchResult
from lorary.errors import ConfigError, Diagnostic, FileError
from lorary.files.atomic import remove_stale
from lorary.model.loading.from_pretrained import load_model, load_storage
from lorary.train.config.config import Config
from lorary.train.config.load import load
from lorary.train.runner.build import build_trainer
from lorary.train.runner.folder import ADAPTER, CHECKPOINTS, CONFIG, SEARCHED, RunFolder
from lorary.train.runner.prepare import prepare
from lorary.train.trainer import checkpoint, same_run

RECORD = "search.json"


def search_run(
    path: Path,
    evolution: EvolutionConfig,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[Path, SearchResult]:
    """Search the supernet of a finished run on its held-out rows, and save the best adapter.

    The fitness is the negative loss on the run's own held-out rows.

    Args:
        path: the run folder.
        evolution: population, generations, ceiling, seed.
        overwrite: replace the result of an earlier search.
        progress: as for `lorary.search_supernet`.

    Returns:
        The folder of the best adapter, and the result of the search.

    Raises:
        FileError: not the folder of a finished run.
        ConfigError: the run has no held-out rows, its data has changed, or it has been searched before.
        StateError: the run trained no supernet; or another process uses the folder.
    """
    transformers.logging.set_verbosity_error()
    config = _config(path, overwrite=overwrite)
    prepared = prepare(config)
    if prepared.held_out is None or not prepared.held_out.rows:
        what = "the run held no rows out, and a loss on its training rows cannot rank candidates"
        fix = "train with data.validation or data.validation_split"
        raise ConfigError(f"cannot search in {str(path)!r}:", [Diagnostic("data.validation", what, fix)])
    folder = RunFolder(path)
    with ExitStack() as stack:
        stack.enter_context(folder.locked())
        remove_stale(folder.path)
        base = load_model(prepared.config.model, load_storage(prepared.plan.method), prepared.plan.quantized)
        model: Any = lorary.load(base, folder / ADAPTER)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trainer = build_trainer(prepared, model, scratch, resumed=True, callbacks=[])
        stack.callback(trainer.head.remove)
        _check_rows(folder, trainer)
        # each candidate is set in the model that the trainer evaluates
        result = lorary.search_supernet(
            model, lambda _: -float(trainer.evaluate()["eval_loss"]), evolution, progress=progress
        )
        target = folder / SEARCHED
        lorary.save_adapter(result.adapter, target)
        prepared.tokenizer.save_pretrained(str(target))
        folder.write(f"{SEARCHED}/{RECORD}", json.dumps(_record(evolution, result), indent=2) + "\n")
        folder.note_written(SEARCHED)
    return target, result


def _config(path: Path, *, overwrite: bool) -> Config:
    """The configuration of a finished run."""
    headline = f"cannot search in {str(path)!r}:"
    missing = [name for name in (CONFIG, ADAPTER) if not (path / name).exists()]
    if missing:
        what = f"is not the folder of a finished run: {' and '.join(missing)} missing"
        raise FileError(headline, [Diagnostic("", what, "give the folder that `lorary train` wrote")])
    if (path / SEARCHED).exists() and not overwrite:
        what, fix = f"holds the result of an earlier search, in {SEARCHED}", "pass --overwrite to replace it"
        raise ConfigError(headline, [Diagnostic("", what, fix)])
    return load(path / CONFIG)


def _check_rows(folder: RunFolder, trainer: Any) -> None:
    """Refuse changed data, by the newest checkpoint: held-out rows might then be training rows of the run.

    Raises:
        ConfigError: the training rows differ.
    """
    newest, _ = checkpoint.newest(folder / CHECKPOINTS)
    if newest is None or same_run.has_same_rows(trainer, checkpoint.read(newest)):
        return
    what = "the training rows are not those of the run, so the held-out rows may be among its training rows"
    fix = "restore the run's original data"
    raise ConfigError(f"cannot search in {str(folder.path)!r}:", [Diagnostic("data.train", what, fix)])


def _record(evolution: EvolutionConfig, result: SearchResult) -> dict[str, Any]:
    """The record of a search, for `search.json`."""
    return {
        "evolution": asdict(evolution),
        "loss": -result.fitness,
        "numbers": result.size,
        "judged": result.judged,
        "best_loss_by_generation": [-fitness for fitness in result.history],
        "structures": {site: asdict(terms) for site, terms in result.structures.items()},
    }
