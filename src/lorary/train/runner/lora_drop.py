"""LoRA-drop's probe: a short run on a sample of the rows, and the plan that follows from it.

The probe trains every layer with the run's own settings, in a temporary folder. The measured importance is stored in
the run folder as `importance.json`, with a picture; the run itself starts again with the chosen layers, and a resumed
run reads the choice there.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import random
import shutil
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import release_memory
from transformers.trainer_utils import SaveStrategy

from lorary.analysis.importance import drop_layers, layer_importance
from lorary.errors import Diagnostic, FileError
from lorary.files.atomic import TEMPORARY
from lorary.files.strict_json import parse
from lorary.layers.adapted import Adapted
from lorary.methods.lora_drop import Importance, probe_note
from lorary.model.plan import Plan
from lorary.train.config.drop import DropSection
from lorary.train.data.tokenize import Tokens
from lorary.train.runner.build import build_model, build_trainer
from lorary.train.runner.folder import IMPORTANCE, PLOTS, RunFolder
from lorary.train.runner.prepare import RunPlan, with_plan
from lorary.train.trainer import rng
from lorary.train.trainer.distributed import on_main_process, refuse_sharding_shared_layers, this_process
from lorary.train.trainer.progress import ProgressLines
from lorary.train.trainer.trainer_internals import prepared_inputs

_log = logging.getLogger("lorary.train")

PICTURE = f"{PLOTS}/importance.svg"
SCRATCH = f"{TEMPORARY}probe"  # so that a killed probe's folder is removed when the run folder is opened again
LENGTHS = 4  # strata by length: quartiles
_LIMIT = 64 * 2**20  # bytes of a record
_RESTORE = "restore it, or start again"


def choose_layers(prepared: RunPlan, folder: RunFolder, *, resumed: bool, quiet: bool) -> tuple[RunPlan, int]:
    """The run with the layers that a probe chose. Every process must call this.

    Args:
        prepared: the run with an adapter of its own on every layer.
        folder: of the run; a choice that it already holds is used.
        resumed: whether the run continues from a checkpoint, so that it must hold one.
        quiet: no progress.

    Returns:
        The run, and the number of the signal that interrupted the probe, or 0.

    Raises:
        FileError: the record of the choice is missing in a resumed run, damaged, or modified.
        PlanError: the record is of other layers than the plan.
        TrainingError: the probe met non-finite numbers; or FSDP, which cannot shard layers that share.
    """
    drop = prepared.config.method.drop
    assert drop is not None
    path = folder / IMPORTANCE
    before = probe_note(drop.threshold, drop.sample)
    plan = dataclasses.replace(prepared.plan, notes=tuple(n for n in prepared.plan.notes if n != before))
    record = on_main_process(lambda: _read_record(path))
    if record is not None:
        new = drop_layers(plan, Importance.from_dict(record), drop.threshold)
        if record.get("shares") != _shares(new):
            what = "`shares` does not follow from the importance in the record"
            raise FileError("the importance record was modified:", [Diagnostic(str(path), what, _RESTORE)])
    elif resumed:
        what = "is missing: it holds the run's choice of layers"
        raise FileError("cannot resume this run:", [Diagnostic(str(path), what, _RESTORE)])
    else:
        importance, signal = _run_probe(prepared, drop, folder / SCRATCH, quiet=quiet)
        release_memory()  # the run needs the memory, and a trainer is a reference cycle
        if importance is None:
            return prepared, signal
        new = drop_layers(plan, on_main_process(lambda: importance), drop.threshold)  # the same choice on every rank
        on_main_process(lambda: _write_record(folder, importance, new))
    _log.info("%s", new.notes[-1])
    return with_plan(prepared, new), 0


# --- the record -----------------------------------------------------------------------------------------------------


def _read_record(path: Path) -> Any:
    """The record; None if there is none."""
    try:
        return parse(path.read_bytes(), _LIMIT)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise FileError("invalid importance record:", [Diagnostic(str(path), str(error), _RESTORE)]) from None


def _shares(plan: Plan) -> dict[str, str]:
    return {site.site.name: site.share for site in plan.sites}


def _write_record(folder: RunFolder, importance: Importance, plan: Plan) -> None:
    from lorary.analysis.heatmap import importance_svg  # matplotlib takes a second to import

    record = importance.to_dict() | {"shares": _shares(plan)}
    folder.write(PICTURE, importance_svg(importance, plan))
    folder.write(IMPORTANCE, json.dumps(record, indent=2) + "\n")


# --- the probe ------------------------------------------------------------------------------------------------------


def sample_rows(tokens: Tokens, share: float, seed: int) -> list[int]:
    """Sorted row numbers of a sample that is stratified by source and by quartile of length.

    Args:
        tokens: the rows.
        share: of the rows, at least one.
        seed: of the draw.
    """
    lengths = [sum(len(value) for value in row.values() if isinstance(value, list)) for row in tokens.rows]
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
    generator = random.Random(seed)
    return sorted(i for key in sorted(strata) for i in generator.sample(strata[key], counts[key]))


def _probe_plan(prepared: RunPlan, drop: DropSection) -> RunPlan:
    """The probe as a run: the same settings, fewer rows and steps, no held-out rows and no trackers."""
    t = prepared.config.training
    rows = sample_rows(prepared.train, drop.sample, t.seed)
    train = dataclasses.replace(prepared.train, rows=tuple(prepared.train.rows[i] for i in rows), sources=())
    one_step = len(rows) <= t.batch_size * t.gradient_accumulation_steps * this_process().num_processes
    steps = drop.steps or (2 if one_step else None)  # the first step of a warmup changes nothing
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


def _run_probe(prepared: RunPlan, drop: DropSection, scratch: Path, *, quiet: bool) -> tuple[Importance | None, int]:
    """The importance that a probe measures, and the signal that interrupted it; the random numbers are preserved."""
    probe = _probe_plan(prepared, drop)
    counts = len(probe.train.rows), len(prepared.train.rows)
    _log.info("a probe on %d of %d rows chooses the layers that keep tensors of their own", *counts)
    bar = ProgressLines()
    try:
        with rng.preserved():
            callbacks = [] if quiet else [bar]
            trainer = build_trainer(probe, build_model(probe), scratch, resumed=True, callbacks=callbacks)
            if trainer.is_fsdp_enabled:
                refuse_sharding_shared_layers()
            trainer.args.save_strategy = SaveStrategy.NO
            try:
                trainer.train()
            finally:
                bar.close()
                trainer.head.remove()
            signal = int(trainer.guard.stop)
            return (None if signal else _measure_importance(trainer)), signal
    finally:
        if this_process().is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)


def _measure_importance(trainer: Any) -> Importance:
    """The layer importance of a trained probe on its own rows, divided over the ranks."""
    alone, device = trainer.args.world_size == 1, trainer.args.device
    return layer_importance(
        trainer.unwrapped_model(),
        _batches(trainer),
        over_ranks=None if alone else lambda sums: trainer.accelerator.reduce(sums.to(device), "sum").cpu(),
    )


def _batches(trainer: Any) -> Iterator[dict[str, Any]]:
    """This rank's part of the training rows, in order, as inputs of the model without labels."""
    model, rows, size = trainer.unwrapped_model(), trainer.train_dataset, trainer.args.per_device_eval_batch_size
    accepted = set(inspect.signature(type(model).forward).parameters) - {"labels"}
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in accepted and not isinstance(model.get_output_embeddings(), Adapted):
        options["logits_to_keep"] = 1  # the logits are not used
    for start in range(trainer.args.process_index * size, len(rows), trainer.args.world_size * size):
        batch = trainer.data_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
        yield {k: v for k, v in prepared_inputs(trainer, batch).items() if k in accepted} | options
