"""search_run: from the folder of a finished supernet run to the best structure of each layer, beside it."""

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
from lorary.train.run.build import trainer_of
from lorary.train.run.folder import ADAPTER, CHECKPOINTS, CONFIG, SEARCHED, RunFolder
from lorary.train.run.prepare import prepare
from lorary.train.trainer import checkpoint, resume

RECORD = "search.json"


def search_run(
    path: Path,
    evolution: EvolutionConfig,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[Path, SearchResult]:
    """Search in the supernet that a run has trained, on the rows that it held out, and write what is found.

    Fitness is the negative loss on the run's validation rows: the run's own, no others are read.

    Args:
        path: the run folder.
        evolution: how many candidates, the ceiling, the seed.
        overwrite: replace what an earlier search found.
        progress: as for `lorary.search_supernet`.

    Returns:
        The folder of the adapter that was found, and what was found.

    Raises:
        FileError: it is no folder of a finished run.
        ConfigError: the run held nothing out, its data has changed since, or something was found before.
        StateError: the run trained no supernet; or another process is at work in the folder.
    """
    transformers.logging.set_verbosity_error()
    config = _config(path, overwrite=overwrite)
    prepared = prepare(config)
    if prepared.held_out is None or not prepared.held_out.rows:
        what = "the run held no rows out, and what it has learnt cannot judge itself"
        fix = "train with data.validation or data.validation_split"
        raise ConfigError(f"cannot search in {str(path)!r}:", [Diagnostic("data.validation", what, fix)])
    folder = RunFolder(path)
    with ExitStack() as stack:
        stack.enter_context(folder.held())
        remove_stale(folder.path)
        base = load_model(prepared.config.model, load_storage(prepared.plan.method), prepared.plan.quantized)
        model: Any = lorary.load(base, folder / ADAPTER)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trainer = trainer_of(prepared, model, scratch, resumed=True, callbacks=[])
        stack.callback(trainer.head.remove)
        _check_rows(folder, trainer)
        # the trainer has the model: what is judged is what the candidate has made of it
        found = lorary.search_supernet(
            model, lambda _: -float(trainer.evaluate()["eval_loss"]), evolution, progress=progress
        )
        target = folder / SEARCHED
        lorary.save_adapter(found.adapter, target)
        prepared.tokenizer.save_pretrained(str(target))
        folder.write(f"{SEARCHED}/{RECORD}", json.dumps(_record(evolution, found), indent=2) + "\n")
    return target, found


def _config(path: Path, *, overwrite: bool) -> Config:
    """The configuration of a finished run."""
    headline = f"cannot search in {str(path)!r}:"
    missing = [name for name in (CONFIG, ADAPTER) if not (path / name).exists()]
    if missing:
        what = f"holds no {' and no '.join(missing)}: it is not the folder of a finished run"
        raise FileError(headline, [Diagnostic("", what, "give the folder that `lorary train` wrote")])
    if (path / SEARCHED).exists() and not overwrite:
        what, fix = f"holds what was found before, in {SEARCHED}", "pass --overwrite to replace it"
        raise ConfigError(headline, [Diagnostic("", what, fix)])
    return load(path / CONFIG)


def _check_rows(folder: RunFolder, trainer: Any) -> None:
    """Where the data has changed since, what is held out may be what was learnt; the newest checkpoint can tell.

    Raises:
        ConfigError: the training rows are others.
    """
    newest, _ = checkpoint.newest(folder / CHECKPOINTS)
    if newest is None or resume.has_rows(trainer, checkpoint.read(newest)):
        return
    what = "the training rows are not those of the run, and so the rows held out may be among those that it learnt"
    fix = "restore the data that the run began with"
    raise ConfigError(f"cannot search in {str(folder.path)!r}:", [Diagnostic("data.train", what, fix)])


def _record(evolution: EvolutionConfig, found: SearchResult) -> dict[str, Any]:
    """What one may want to know of a search later."""
    return {
        "evolution": asdict(evolution),
        "loss": -found.fitness,
        "numbers": found.size,
        "judged": found.judged,
        "best_loss_by_generation": [-fitness for fitness in found.history],
        "structures": {site: asdict(terms) for site, terms in found.structures.items()},
    }
