"""LoRA-drop's probe: a short run on a sample of the rows, and the plan that comes of it.

The probe trains every layer with the run's own settings, in a scratch folder of which nothing is left. What it found is
`importance.json` in the run folder, with a picture; the run itself starts afresh with the layers that were chosen, and
a run that is resumed reads the choice there.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import random
import shutil
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from transformers.trainer_utils import SaveStrategy

from lorary.analysis.importance import drop_layers, layer_importance
from lorary.errors import Diagnostic, FileError
from lorary.files.atomic import TEMPORARY
from lorary.files.strict_json import parse
from lorary.layers.adapted import Adapted
from lorary.methods.lora_drop import Importance, announced
from lorary.model.plan import Plan
from lorary.train.config.config import DropSection
from lorary.train.data.tokenize import Tokens
from lorary.train.run.build import model_of, trainer_of
from lorary.train.run.folder import IMPORTANCE, PLOTS, RunFolder
from lorary.train.run.prepare import RunPlan, replanned
from lorary.train.trainer import rng
from lorary.train.trainer.distributed import on_main_process, processes, refuse_shares
from lorary.train.trainer.progress import ProgressLines

_log = logging.getLogger("lorary.train")

PICTURE = f"{PLOTS}/importance.svg"
SCRATCH = f"{TEMPORARY}probe"  # a killed probe's is removed when the folder is opened again
LENGTHS = 4  # strata by length: quartiles
_MOST = 64 * 2**20  # bytes of a record


def drop_run(prepared: RunPlan, folder: RunFolder, *, resumed: bool, quiet: bool) -> tuple[RunPlan, int]:
    """The run with the layers that a probe has chosen. Every process has to call this.

    Args:
        prepared: with every layer's own.
        folder: of the run; where it holds a choice already, that one counts.
        resumed: whether the run goes on from a checkpoint, so that there must be one.
        quiet: no progress.

    Returns:
        The run, and the number of the signal that ended the probe early; 0 if it came to its end.

    Raises:
        FileError: the record of the choice is missing though the run goes on, is damaged, or was changed.
        PlanError: the record is of other layers than the plan.
        TrainingError: the probe met numbers that are not finite; or layers that share cannot be distributed so.
    """
    drop = prepared.config.method.drop
    assert drop is not None
    path = folder / IMPORTANCE
    before = announced(drop.threshold, drop.sample)
    plan = dataclasses.replace(prepared.plan, notes=tuple(n for n in prepared.plan.notes if n != before))
    data = on_main_process(lambda: _read(path))
    if data is not None:
        new = drop_layers(plan, Importance.from_dict(data), drop.threshold)
        _check(path, data, new)
    elif resumed:
        what, fix = "is missing: which layers the run has chosen cannot be told", "restore it, or start again"
        raise FileError("cannot resume this run:", [Diagnostic(str(path), what, fix)])
    else:
        found, signal = _probed(prepared, drop, folder / SCRATCH, quiet=quiet)
        clear_device_cache(garbage_collection=True)  # the run needs the memory: a trainer holds itself alive
        if found is None:
            return prepared, signal
        new = drop_layers(plan, on_main_process(lambda: found), drop.threshold)  # no rank may choose another way
        on_main_process(lambda: _write(folder, found, new))
    _log.info("%s", new.notes[-1])
    return replanned(prepared, new), 0


# --- the record -----------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """What the record holds; None where there is none."""
    try:
        return parse(path.read_bytes(), _MOST)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        fix = "restore it, or start again"
        raise FileError("invalid importance record:", [Diagnostic(str(path), str(error), fix)]) from None


def _check(path: Path, data: Mapping[str, Any], plan: Plan) -> None:
    """Whether the record says the very choice that follows from it."""
    if data.get("shares") != _shares(plan):
        what, fix = "`shares` is not what follows from the importance that it holds", "restore it, or start again"
        raise FileError("the importance record was modified:", [Diagnostic(str(path), what, fix)])


def _shares(plan: Plan) -> dict[str, str]:
    return {p.site.name: p.share for p in plan.sites}


def _write(folder: RunFolder, found: Importance, plan: Plan) -> None:
    from lorary.analysis.heatmap import importance_svg

    record = found.to_dict() | {"shares": _shares(plan)}
    folder.write(PICTURE, importance_svg(found, plan))
    folder.write(IMPORTANCE, json.dumps(record, indent=2) + "\n")


# --- the probe ------------------------------------------------------------------------------------------------------


def sample(tokens: Tokens, share: float, seed: int) -> list[int]:
    """The numbers of some rows, in order: of every source and every quartile of the lengths the same share.

    Args:
        tokens: the rows.
        share: how many of them; at least one.
        seed: the same one draws the same rows.
    """
    lengths = [sum(map(len, row.values())) for row in tokens.rows]
    ordered = sorted(lengths)
    bounds = [ordered[len(ordered) * i // LENGTHS] for i in range(1, LENGTHS)]
    strata: dict[tuple[str, int], list[int]] = {}
    for i, length in enumerate(lengths):
        source = tokens.sources[i] if tokens.sources else ""
        strata.setdefault((source, bisect_left(bounds, length)), []).append(i)
    wanted = {key: share * len(rows) for key, rows in strata.items()}
    counts = {key: int(n) for key, n in wanted.items()}
    left = max(round(share * len(lengths)), 1) - sum(counts.values())
    for key in sorted(strata, key=lambda key: (counts[key] - wanted[key], key))[:left]:  # the largest remainders
        counts[key] += 1
    draw = random.Random(seed)
    return sorted(i for key in sorted(strata) for i in draw.sample(strata[key], counts[key]))


def _short(prepared: RunPlan, drop: DropSection) -> RunPlan:
    """The probe as a run: the same settings, fewer rows and steps, nothing held out and nothing told to trackers."""
    t = prepared.config.training
    rows = sample(prepared.train, drop.sample, t.seed)
    train = dataclasses.replace(prepared.train, rows=tuple(prepared.train.rows[i] for i in rows), sources=())
    one = len(rows) <= t.batch_size * t.gradient_accumulation_steps * processes().num_processes
    steps = drop.steps or (2 if one else None)  # the first step of a warmup moves nothing
    changes = {
        "epochs": None if steps else 1.0,
        "max_steps": steps,
        "warmup": t.warmup if t.warmup < 1 else min(t.warmup / prepared.steps, 0.5),
        "early_stopping_patience": None,
        "eval_steps": None,
        "save_steps": None,
        "report_to": ("none",),
    }
    config = prepared.config.model_copy(update={"training": t.model_copy(update=changes)})
    return dataclasses.replace(prepared, config=config, train=train, held_out=None)


def _probed(prepared: RunPlan, drop: DropSection, scratch: Path, *, quiet: bool) -> tuple[Importance | None, int]:
    """What a probe has learnt, and the signal that ended it early; the random numbers are as before."""
    short = _short(prepared, drop)
    bar = ProgressLines()
    counts = len(short.train.rows), len(prepared.train.rows)
    _log.info("a probe on %d of %d rows chooses the layers that keep tensors of their own", *counts)
    try:
        with rng.untouched():
            trainer = trainer_of(short, model_of(short), scratch, resumed=True, callbacks=[] if quiet else [bar])
            if trainer.is_fsdp_enabled:
                refuse_shares()
            trainer.predicted = prepared.memory
            trainer.args.save_strategy = SaveStrategy.NO
            try:
                trainer.train()
            finally:
                bar.close()
                trainer.head.remove()
            if trainer.guard.stop:
                return None, int(trainer.guard.stop)
            return _measured(trainer), 0
    finally:
        if processes().is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)


def _measured(trainer: Any) -> Importance:
    """The importance of the layers of a trained probe, on its own rows; each rank measures some of them."""
    alone = trainer.args.world_size == 1
    device = trainer.args.device
    return layer_importance(
        trainer.plain_model(),
        _batches(trainer),
        over_ranks=None if alone else lambda sums: trainer.accelerator.reduce(sums.to(device), "sum").cpu(),
    )


def _batches(trainer: Any) -> Iterator[dict[str, Any]]:
    """This rank's part of the training rows, in order, as the model takes them: without labels."""
    model, rows, size = trainer.plain_model(), trainer.train_dataset, trainer.args.per_device_eval_batch_size
    known = set(inspect.signature(type(model).forward).parameters) - {"labels"}
    whole: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in known and not isinstance(model.get_output_embeddings(), Adapted):
        whole["logits_to_keep"] = 1  # nobody reads the logits
    for start in range(trainer.args.process_index * size, len(rows), trainer.args.world_size * size):
        batch = trainer.data_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
        yield {k: v for k, v in trainer._prepare_inputs(batch).items() if k in known} | whole
