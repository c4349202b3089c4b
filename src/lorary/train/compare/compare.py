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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from lorary.analysis.comparison import store
from lorary.analysis.comparison.record import Arm, Comparison
from lorary.errors import ConfigError, Diagnostic, PlanError, not_a
from lorary.files.home import expanded
from lorary.model.ambient import mode_independent
from lorary.train.compare.arms import fitted_arms
from lorary.train.compare.asked import Asked, from_config
from lorary.train.compare.bench import Bench
from lorary.train.compare.course import Course
from lorary.train.compare.ledger import FILE, Ledger, check_folder
from lorary.train.compare.request import HEADLINE, Request, each_arm, make_request
from lorary.train.compare.settings import Settings
from lorary.train.config.config import Config
from lorary.train.runner.prepare import RunPlan
from lorary.train.trainer.environment import environment


@mode_independent
def compare(
    config: Config,
    arms: Sequence[Arm] | None = None,
    settings: Settings | None = None,
    folder: str | os.PathLike[str] = "comparison",
    *,
    progress: Callable[..., Any] = lambda **_: None,
    overwrite: bool = False,
) -> Comparison:
    """Compare methods on one base, one task, one order of the data and one number of steps.

    Args:
        config: of all runs: model, data, training. Of its `method` only `targets`, `exclude` and `layers` count, for
            all arms without targets of their own. A `training.lr` moves the centre of every arm by the factor by which
            it differs from the default of that method. Its `keep_best` and `early_stopping_patience` are left out: all
            methods are judged after the last step.
        arms: the methods. Without rates an arm gets `settings.rates` of them around its presets' default. None: those
            of the section `compare` of the configuration.
        settings: of the comparison; None: those of this section, or the defaults if there are arms.
        folder: of the comparison: a run folder for each run, and the record of those that have ended. Called again
            with the same request, the comparison goes on there, after a kill too.
        progress: called with keywords of Rich's `Progress.update`: `total` and `completed`, in optimizer steps, and
            `description`. The total grows with further rates, and falls with runs that stop early.
        overwrite: first remove the comparison in the folder.

    Returns:
        The comparison; after a signal, or at the end of the budget, what has been measured until then, with the reason
        in `left_out`.

    Raises:
        ConfigError: the request contradicts itself or does not fit into its budget; or the folder is not free.
        DataError: the data cannot be read, or has too few held-out rows.
        LoraryError: the base cannot be scored, or the record not be written. An arm whose run fails is left out.
    """
    if problems := _wrong_types(config, arms, settings, folder):
        raise ConfigError(HEADLINE, problems)
    asked = from_config(config) if arms is None else Asked(config, tuple(arms), Settings())
    ready = prepare_comparison(config, asked.arms, settings or asked.settings, folder, overwrite=overwrite)
    return run_comparison(ready, progress).comparison


def _wrong_types(config: Any, arms: Any, settings: Any, folder: Any) -> list[Diagnostic]:
    """Arguments of other types."""
    problems = not_a(Config, "a Config: `lorary.train.config.load` reads one", config=config)
    problems += not_a(str | os.PathLike, "a path", folder=folder)
    problems += [] if arms is None else not_a(Iterable, "a sequence of Arm", arms=arms)
    return problems + ([] if settings is None else not_a(Settings, "a Settings", settings=settings))


@dataclass(frozen=True)
class Ready:
    """A comparison before its first run.

    Args:
        asked: as it was asked for.
        request: with the ranks of its arms, and the steps of a run.
        bench: its rows.
        overwrite: whether the comparison in the folder is removed first.
        start: when it was begun, by `time.monotonic`, which no change of the clock moves.
    """

    asked: Request
    request: Request
    bench: Bench
    overwrite: bool
    start: float

    @property
    def training_rows(self) -> int:
        """The number of rows to train on."""
        return len(self.bench.any_plan.train.rows)

    @property
    def runs_done(self) -> int:
        """The number of its runs that an earlier call has done, without further rates outwards."""
        file = self.request.folder / FILE
        return 0 if self.overwrite or not file.is_file() else self.request.runs_done(store.read(file))


@dataclass(frozen=True)
class Done:
    """The outcome of a comparison.

    Args:
        comparison: what has been measured.
        signal: the number of the signal that stopped it; 0 if none did.
    """

    comparison: Comparison
    signal: int


def prepare_comparison(
    config: Config,
    arms: Sequence[Arm],
    settings: Settings,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Ready:
    """A comparison with its rows read and its methods planned; nothing is written. See `compare`."""
    transformers.logging.set_verbosity_error()
    start = time.monotonic()
    asked = make_request(config, arms, settings, expanded(folder).absolute())
    check_folder(asked, overwrite)
    run = _plan_of_first(asked)
    if run.labels is not None and run.labels.problem == "regression":
        what = "are numbers, and methods are judged by the cross entropy of a label and by accuracy"
        raise ConfigError(HEADLINE, [Diagnostic("the labels", what, "use texts as labels")])
    request = fitted_arms(dataclasses.replace(asked, steps=run.steps), run)
    return Ready(asked, request, Bench(request), overwrite, start)


def _plan_of_first(request: Request) -> RunPlan:
    """The plan of the first arm.

    Raises:
        ConfigError: it cannot be planned on this model, and nor can some of the others; all reasons.
    """
    bench = Bench(request)
    try:
        return bench.plan(request.arms[0])
    except PlanError:
        each_arm(request.arms, bench.plan)
        raise


def run_comparison(ready: Ready, progress: Callable[..., Any] = lambda **_: None) -> Done:
    """Run a comparison, or go on with it. See `compare`."""
    with Ledger.opened(ready.request, ready.asked, _facts(ready.bench), ready.overwrite) as ledger:
        course = Course(ready.request, ready.bench, ledger, progress, ready.start)
        return Done(course.run(), course.signal)


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
        "base": bench.fingerprint().record(),
        "config": request.config.to_yaml(),
        "steps": request.steps,
        "search_seed": seed,
        "judged_seeds": [(seed + k) % 2**32 for k in range(1, request.settings.seeds + 1)],
        "initialisation": "of each method and seed: training.seed of its runs; the order of the rows is data_seed's",
        "rows": {name: len(part) for name, part in parts.items()},
        "digests": {name: _digest(part) for name, part in parts.items()},
        "notes": bench.overlaps,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "environment": environment(),
    }


def _digest(rows: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()
