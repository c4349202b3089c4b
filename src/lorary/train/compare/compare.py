"""The comparison of methods: every one with the same search, the best rates judged on rows that no choice has seen.

    search      each arm tries its rates on one seed; the best is chosen on the validation rows
    judgement   each arm's best rate is run on further seeds, and scored on the test rows and on general text
    costs       the arms take turns in short runs, in which steps are timed and bytes are counted

Every run is an ordinary run folder, and every one that has ended is in `comparison.json` at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers

from lorary.analysis.comparison.record import Arm, Comparison
from lorary.files.home import expanded
from lorary.train.compare.arms import fitted_arms
from lorary.train.compare.bench import Bench
from lorary.train.compare.course import Course
from lorary.train.compare.ledger import Ledger
from lorary.train.compare.request import make_request
from lorary.train.compare.settings import Settings
from lorary.train.config.config import Config
from lorary.train.trainer.environment import environment


def compare(
    config: Config,
    arms: Sequence[Arm],
    settings: Settings | None = None,
    folder: str | os.PathLike[str] = "comparison",
    *,
    progress: Callable[..., Any] = lambda **_: None,
    overwrite: bool = False,
) -> Comparison:
    """Compare methods on one base, one task, one order of the data and one number of steps.

    Args:
        config: of all runs: model, data, training. Of its `method` only the targets count, for all arms that have none
            of their own. A `training.lr` moves the centre of every arm by the factor by which it differs from the
            default of that method.
        arms: the methods. Without rates an arm gets `settings.rates` of them around its presets' default.
        settings: of the comparison.
        folder: of the comparison: a run folder for each run, and the record of those that have ended. Called again
            with the same request, the comparison goes on there, after a kill too.
        progress: called with keywords of Rich's `Progress.update`: `total` and `completed`, in optimizer steps, and
            `description`.
        overwrite: first remove the comparison in the folder.

    Returns:
        The comparison; after a signal, or at the end of the budget, what has been measured until then, with the reason
        in `left_out`.

    Raises:
        ConfigError: the request contradicts itself or does not fit into its budget; or the folder is not free.
        DataError: the data cannot be read, or has too few held-out rows.
        LoraryError: the base cannot be scored, or the record not be written. An arm whose run fails is left out.
    """
    transformers.logging.set_verbosity_error()
    start = time.time()
    asked = make_request(config, arms, settings or Settings(), expanded(folder).absolute())
    run = Bench(asked).any_plan
    request = fitted_arms(dataclasses.replace(asked, steps=run.steps), run)
    bench = Bench(request)
    with Ledger.opened(request, asked, _facts(bench), overwrite) as ledger:
        return Course(request, bench, ledger, progress, start).run()


def _facts(bench: Bench) -> dict[str, Any]:
    """What is needed to repeat a comparison."""
    request, plan, rows = bench.request, bench.any_plan, bench.held_out
    parts = {
        "training": plan.train.rows,
        "validation": rows.validation.rows,
        "test": rows.test,
        "general": rows.general,
    }
    settings = dataclasses.asdict(request.settings)
    seed = request.config.training.seed
    return {
        **settings,
        "model": request.config.model.id,
        "config": request.config.to_yaml(),
        "steps": request.steps,
        "search_seed": seed,
        "judged_seeds": [(seed + k) % 2**32 for k in range(1, request.settings.seeds + 1)],
        "rows": {name: len(part) for name, part in parts.items()},
        "digests": {name: _digest(part) for name, part in parts.items()},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "environment": environment(),
    }


def _digest(rows: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()
