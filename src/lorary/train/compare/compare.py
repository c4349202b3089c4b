"""The comparison of methods: every one with the same search, the best rates judged on rows that no choice has seen.

    search      each arm tries its rates on one seed; the best is chosen on the validation rows
    judgement   each arm's best rate is run on further seeds, and scored on the test rows and on general text
    costs       the arms take turns in short runs, in which steps are timed and bytes are counted

Every run is an ordinary run folder, and every one that has ended is in `comparison.json` at once. Which run comes next
is a function of what is recorded, so a comparison that is killed ends as one that is not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers

from lorary.analysis.comparison.record import Arm, Comparison, Trial
from lorary.files.home import expanded
from lorary.train.compare import search
from lorary.train.compare.arms import fitted_arms
from lorary.train.compare.bench import Bench
from lorary.train.compare.budget import TIMED, TURNS, Forecast, fitted
from lorary.train.compare.costs import cost
from lorary.train.compare.ledger import Ledger
from lorary.train.compare.request import Request, make_request
from lorary.train.compare.settings import Settings
from lorary.train.compare.stopped import Stopped
from lorary.train.compare.timing import Timing, TimingJob
from lorary.train.compare.trial import BaseJob, TrialJob
from lorary.train.compare.workers import Workers
from lorary.train.config.config import Config
from lorary.train.trainer.environment import environment

_log = logging.getLogger("lorary.train")


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
        LoraryError: a run has failed for another reason than its rate.
    """
    transformers.logging.set_verbosity_error()
    start = time.time()
    asked = make_request(config, arms, settings or Settings(), expanded(folder).absolute())
    run = Bench(asked).any_plan
    request = fitted_arms(dataclasses.replace(asked, steps=run.steps), run)
    bench = Bench(request)
    with (
        Ledger.opened(request, asked, _facts(bench), overwrite) as ledger,
        Workers(request, bench, lambda steps: course.tell(steps)) as workers,
    ):
        course = _Course(request, bench, ledger, workers, progress, start)
        return course.run()


class _Course:
    """The course of a comparison, from what is recorded to its end.

    Args:
        request: the comparison.
        bench: of this process.
        ledger: the record.
        workers: do the runs.
        progress: takes the progress.
        start: when this session began, in seconds since the epoch.
    """

    def __init__(
        self, request: Request, bench: Bench, ledger: Ledger, workers: Workers, progress: Any, start: float
    ) -> None:
        self.request, self.bench, self.ledger, self.workers = request, bench, ledger, workers
        self.forecast: Forecast | None = None
        self.seed = request.config.training.seed
        self.start, self.before = start, float(ledger.comparison.settings.get("seconds", 0.0))
        budget = request.settings.budget
        self.deadline = math.inf if budget is None else start + budget - self.before
        self._progress, self._completed, self._lock = progress, 0, threading.Lock()

    def run(self) -> Comparison:
        """The comparison."""
        try:
            if self.request.settings.budget is not None:
                self._fit()
            self._base()
            self._search()
            self._judge()
            self._costs()
        except Stopped as stop:
            self._save()
            return self._unfinished(stop)
        self._save()
        return self.ledger.comparison

    def tell(self, steps: int) -> None:
        """Take optimizer steps that have been done, from any thread."""
        with self._lock:
            self._completed += steps
            self._progress(completed=self._completed)

    # --- the parts ------------------------------------------------------------------------------------------------

    def _fit(self) -> None:
        """Measure the first steps of every arm, and drop what does not fit into the budget."""
        known = {name: Timing(**t) for name, t in self.ledger.comparison.settings.get("timings", {}).items()}
        jobs = [
            TimingJob(arm.name, search.centre_of(arm), self.seed, 2, evaluates=True)
            for arm in self.request.arms
            if arm.name not in known
        ]
        self._describe("the first steps")
        self.workers.run(jobs, lambda job, timing: known.update({job.arm: timing}))
        rows = self.bench.held_out
        scored = (len(rows.test) + len(rows.general)) / len(rows.validation.rows)
        self.forecast = Forecast(known, self.request.steps, scored, self.request.settings.workers)
        self.request, left_out = fitted(self.request, self.forecast)
        timings = {name: dataclasses.asdict(timing) for name, timing in known.items()}
        planned = self.forecast.whole(self.request)
        for what, why in left_out.items():
            _log.info("left out: %s (%s)", what, why)
        _log.info("the rest takes about %.0f s", planned)
        self.ledger.note_settings(timings=timings, planned_seconds=planned)
        self.ledger.note(left_out=left_out)

    def _base(self) -> None:
        """The scores of the base."""
        if self.ledger.comparison.base_test is None and self.request.config.task == "sft":
            self._describe("the base")
            test, general = BaseJob().run(self.bench, self.tell)
            self.ledger.note(base_test=test, base_general=general)

    def _search(self) -> None:
        """The runs that choose every arm's rate."""
        arms = self.request.arms
        self._do([TrialJob(arm.name, search.centre_of(arm), self.seed) for arm in arms])
        self._do([self._search_job(arm, lr) for arm in arms for lr in arm.rates])
        for _ in range(self.request.settings.outward):
            further = {arm.name: search.next_outward(self._tried(arm), self.request.settings.spacing) for arm in arms}
            jobs = [self._search_job(arm, lr) for arm in arms if (lr := further[arm.name]) is not None]
            self._do([job for job in jobs if self._has_room(job)])

    def _search_job(self, arm: Arm, lr: float) -> TrialJob:
        """The run of a rate; its rival is the arm's best so far, the centre in the first round."""
        tried = self._tried(arm)
        if lr in arm.rates:
            tried = [trial for trial in tried if trial.lr == search.centre_of(arm)]
        rival = search.best_trial(tried) if self.request.settings.halving else None
        return TrialJob(arm.name, lr, self.seed, rival=rival.curve if rival else ())

    def _has_room(self, job: TrialJob) -> bool:
        """Whether the budget has room for a further rate, beside those that it has been given to already."""
        budget = self.request.settings.budget
        if self.forecast is None or budget is None or self._trial(job) is not None:
            return True
        first = {(arm.name, lr) for arm in self.request.arms for lr in arm.rates}
        extra = [t for t in self.ledger.comparison.trials if t.seed == self.seed and (t.arm, t.lr) not in first]
        seconds = sum(self.forecast.run(name) for name in [job.arm, *(trial.arm for trial in extra)])
        if self.forecast.whole(self.request) + seconds / self.forecast.workers <= budget:
            return True
        self._leave_out(str(job), "the budget has no room for a rate further out")
        return False

    def _judge(self) -> None:
        """The runs that are scored on the test rows."""
        jobs = []
        for arm in self.request.arms:
            best = search.best_trial(self._tried(arm))
            if best is None:
                self._leave_out(arm.name, "every rate has diverged")
                continue
            for k in range(1, self.request.settings.seeds + 1):
                jobs.append(TrialJob(arm.name, best.lr, (self.seed + k) % 2**32, judged=True))
        self._do(jobs)

    def _costs(self) -> None:
        """The costs of the arms that were judged; their steps are timed in turns, with nothing beside them."""
        trials = {t.arm: t for t in reversed(self.ledger.comparison.trials) if t.test is not None}
        missing = [trials[a.name] for a in self.request.arms if a.name in trials]
        if not [trial for trial in missing if trial.arm not in self.ledger.comparison.costs]:
            return
        turns: dict[str, list[Timing]] = {trial.arm: [] for trial in missing}
        for turn in range(TURNS):
            self._describe(f"seconds per step, turn {turn + 1} of {TURNS}")
            for trial in missing:
                if time.time() > self.deadline:
                    raise Stopped("the budget is used up")
                turns[trial.arm].append(TimingJob(trial.arm, trial.lr, trial.seed, TIMED).run(self.bench, self.tell))
        self.ledger.note(costs={trial.arm: cost(self.bench, trial, turns[trial.arm]) for trial in missing})

    # --- the runs -------------------------------------------------------------------------------------------------

    def _do(self, jobs: Sequence[TrialJob]) -> None:
        """Do the runs that are not recorded yet, and record each as soon as it has ended."""
        jobs = list({(job.arm, job.lr, job.seed): job for job in jobs if self._trial(job) is None}.values())
        if not jobs:
            return
        self._progress(total=self._completed + len(jobs) * self.request.steps)
        self._describe(", ".join(dict.fromkeys(job.arm for job in jobs)))
        timed = [dataclasses.replace(job, deadline=self.deadline) for job in jobs]
        self.workers.run(timed, lambda job, trial: self._record(trial))

    def _record(self, trial: Trial) -> None:
        found = self.ledger.comparison
        arms = tuple(
            dataclasses.replace(arm, rates=tuple(sorted({*arm.rates, trial.lr}))) if arm.name == trial.arm else arm
            for arm in found.arms
        )
        self.ledger.note(trials=(*found.trials, trial), arms=arms)
        self._save()

    def _save(self) -> None:
        self.ledger.note_settings(seconds=round(self.before + time.time() - self.start, 1))

    def _trial(self, job: TrialJob) -> Trial | None:
        """The recorded run of a job."""
        found = self.ledger.comparison.of(job.arm)
        return next((trial for trial in found if (trial.lr, trial.seed) == (job.lr, job.seed)), None)

    def _tried(self, arm: Arm) -> list[Trial]:
        """The runs of the search for an arm's rate."""
        return [trial for trial in self.ledger.comparison.of(arm.name) if trial.seed == self.seed]

    def _leave_out(self, what: str, why: str) -> None:
        self.ledger.note(left_out={**self.ledger.comparison.left_out, what: why})

    def _unfinished(self, stop: Stopped) -> Comparison:
        """What there is, with the arms that are not finished."""
        found = self.ledger.comparison
        why = f"stopped: {stop.why}; called again, the comparison goes on"
        missing = {arm.name: why for arm in self.request.arms if arm.name not in found.costs}
        return dataclasses.replace(found, left_out={**found.left_out, **missing})

    def _describe(self, what: str) -> None:
        self._progress(description=what)


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
