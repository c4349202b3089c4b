"""The course of a comparison, from what is recorded to its end.

Which run comes next is a function of what is recorded, so a comparison that is killed ends as one that is not.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lorary.analysis.comparison.record import Arm, Comparison, Cost, Trial
from lorary.train.compare import search
from lorary.train.compare.bench import Bench
from lorary.train.compare.budget import TIMED, TURNS, Forecast, fitted
from lorary.train.compare.costs import cost
from lorary.train.compare.ledger import Ledger
from lorary.train.compare.outcomes import Failure, Stopped, attempted
from lorary.train.compare.request import Request
from lorary.train.compare.timing import Timing, TimingJob
from lorary.train.compare.trial import BaseJob, TrialJob
from lorary.train.compare.workers import Workers

_log = logging.getLogger("lorary.train.compare")


class Course:
    """The course of a comparison, from what is recorded to its end.

    Args:
        request: the comparison.
        bench: of this process.
        ledger: the record.
        progress: takes the progress.
        start: when this session began, by `time.monotonic`.
    """

    def __init__(
        self, request: Request, bench: Bench, ledger: Ledger, progress: Callable[..., Any], start: float
    ) -> None:
        self.request, self.bench, self.ledger = request, bench, ledger
        self.workers = Workers(request, bench, self.tell)
        self.forecast: Forecast | None = None
        self.seed = request.config.training.seed
        self.start, self.before = start, float(ledger.comparison.settings.get("seconds", 0.0))
        budget = request.settings.budget
        self.deadline = math.inf if budget is None else start + budget - self.before
        self._progress, self._lock = progress, threading.Lock()
        self._completed = self._total = 0  # optimizer steps
        self._failed: set[str] = set()
        self.signal = 0  # that has stopped it

    def run(self) -> Comparison:
        """The comparison."""
        self._note(left_out={})  # what was left out before may have room now
        try:
            with self.workers:
                self._fit()
                self._expect()
                self._base()
                self._search()
                self._judge()
                self._costs()
        except Stopped as stop:
            self.signal = stop.signal
            return self._unfinished(stop)
        finally:
            self._write_record()
        return self.ledger.comparison

    def tell(self, steps: int) -> None:
        """Take optimizer steps that have been done, from any thread."""
        with self._lock:
            self._completed += steps
            self._progress(completed=self._completed)

    # --- the parts ------------------------------------------------------------------------------------------------

    def _fit(self) -> None:
        """Measure the first steps of every arm, and drop what does not fit into the budget, if there is one."""
        if self.request.settings.budget is None:
            return
        recorded = self.ledger.comparison.settings.get("timings", {})
        known = {name: one for name, found in recorded.items() if (one := Timing.from_record(found))}
        jobs = [
            TimingJob(arm.name, search.centre_of(arm), self.seed, 2, evaluates=True)
            for arm in self.request.arms
            if arm.name not in known
        ]

        def take(job: TimingJob, timing: Timing | Failure) -> None:
            if isinstance(timing, Failure):
                self._fail(timing)
            else:
                known[job.arm] = timing

        self._describe("the first steps")
        self.workers.run(jobs, take)
        arms = tuple(arm for arm in self.request.arms if arm.name in known)
        self.request = dataclasses.replace(self.request, arms=arms)
        if not arms:
            return
        rows = self.bench.held_out
        scored = (len(rows.test) + len(rows.general)) / len(rows.validation.rows)
        self.forecast = Forecast(known, self.request.steps, scored, self.request.settings.workers)
        self.request, left_out = fitted(self.request, self.forecast)
        timings = {name: {**dataclasses.asdict(one), "steps": list(one.steps)} for name, one in known.items()}
        planned = self.forecast.whole(self.request)
        for what, why in left_out.items():
            _log.info("left out: %s (%s)", what, why)
        _log.info("the rest takes about %.0f s", planned)
        self._note(left_out={**self.ledger.comparison.left_out, **left_out})
        self.ledger.note_settings(timings=timings, planned_seconds=planned)

    def _base(self) -> None:
        """The scores of the base."""
        if self.ledger.comparison.base_test is None and self.request.config.task == "sft":
            self._describe("the base")
            test, general = self.workers.here(BaseJob())
            self.ledger.note(base_test=test, base_general=general)

    def _search(self) -> None:
        """The runs that choose every arm's rate."""
        arms = self.request.arms
        self._do([TrialJob(arm.name, search.centre_of(arm), self.seed) for arm in arms])
        centres = {arm.name: self._tried(arm, [search.centre_of(arm)]) for arm in arms}
        self._do([self._rate_job(arm, lr, centres[arm.name]) for arm in arms for lr in arm.rates])
        self._outwards({arm.name: self._tried(arm, arm.rates) for arm in arms})

    def _outwards(self, tried: dict[str, list[Trial]]) -> None:
        """The runs of rates further out, round by round: one for every arm that needs it, or for none of them."""
        room = self._room()
        for _ in range(self.request.settings.outward):
            jobs = []
            for arm in self.request.arms:
                lr = search.next_outward(tried[arm.name], self.request.settings.spacing)
                if lr is not None and arm.name not in self._failed:
                    jobs.append(self._rate_job(arm, lr, tried[arm.name]))
            if self.forecast:
                room -= sum(self.forecast.run(job.arm) for job in jobs) / self.forecast.workers
            if room < 0:
                for job in jobs:
                    if self._recorded(job) is None:
                        self._leave_out(f"{job.arm} at {job.lr:g}", "the budget has no room for rates further out")
                return
            self._do(jobs)
            for job in jobs:
                tried[job.arm] += self._tried(self.request.arm(job.arm), [job.lr])

    def _rate_job(self, arm: Arm, lr: float, tried: Sequence[Trial]) -> TrialJob:
        """The run of a rate, against the best of those that were tried before."""
        rival = search.best_trial(tried) if self.request.settings.halving else None
        return TrialJob(arm.name, lr, self.seed, rival=rival.curve if rival else ())

    def _room(self) -> float:
        """Seconds of the budget that the planned runs leave for further rates."""
        budget = self.request.settings.budget
        return math.inf if budget is None or self.forecast is None else budget - self.forecast.whole(self.request)

    def _judge(self) -> None:
        """The runs that are scored on the test rows."""
        jobs = []
        for arm in self.request.arms:
            best = search.best_trial(self._tried(arm))
            if arm.name in self._failed:
                continue
            if best is None:
                self._fail(Failure(arm.name, "every rate has diverged"))
                continue
            for k in range(1, self.request.settings.seeds + 1):
                jobs.append(TrialJob(arm.name, best.lr, (self.seed + k) % 2**32, judged=True))
        self._do(jobs)
        for arm_name in dict.fromkeys(job.arm for job in jobs if job.arm not in self._failed):
            if not any(trial.test for trial in self.ledger.comparison.of(arm_name)):
                self._leave_out(arm_name, "every run that was to be judged has diverged")

    def _costs(self) -> None:
        """The costs of the arms that were judged; their steps are timed in turns, with nothing beside them."""
        judged = {t.arm: t for t in reversed(self.ledger.comparison.trials) if t.test is not None}
        trials = [judged[arm.name] for arm in self.request.arms if arm.name in judged]
        if all(trial.arm in self.ledger.comparison.costs for trial in trials):
            return
        self._expect()
        turns: dict[str, list[Timing]] = {trial.arm: [] for trial in trials}
        for turn in range(TURNS):
            self._describe(f"seconds per step, turn {turn + 1} of {TURNS}")
            for trial in trials:
                if time.monotonic() > self.deadline:
                    raise Stopped("the budget is used up")
                timing = self.workers.here(TimingJob(trial.arm, trial.lr, trial.seed, TIMED))
                if isinstance(timing, Timing):
                    turns[trial.arm].append(timing)
                else:
                    self._leave_out(trial.arm, timing.why)
        self.ledger.note(costs=dict(self._cost_of_each(trials, turns)))

    def _cost_of_each(self, trials: Sequence[Trial], turns: Mapping[str, list[Timing]]) -> Iterator[tuple[str, Cost]]:
        """(arm, its cost), of the arms that could be measured."""
        for trial in trials:
            if not (own := turns[trial.arm]):
                continue
            self.workers.check()
            found = attempted(trial.arm, "its costs", partial(cost, self.bench, trial, own))
            if isinstance(found, Failure):
                self._leave_out(found.arm, found.why)
            else:
                yield trial.arm, found

    # --- the runs -------------------------------------------------------------------------------------------------

    def _do(self, jobs: Sequence[TrialJob]) -> None:
        """Do the runs that are not recorded yet, and record each as soon as it has ended."""
        open_jobs = [job for job in jobs if job.arm not in self._failed and self._recorded(job) is None]
        jobs = list({(job.arm, job.lr, job.seed): job for job in open_jobs}.values())
        if not jobs:
            return
        self._expect(sum(not job.judged and job.lr not in self.request.arm(job.arm).rates for job in jobs))
        self._describe(", ".join(dict.fromkeys(job.arm for job in jobs)))
        timed = [dataclasses.replace(job, deadline=self.deadline) for job in jobs]
        self.workers.run(timed, lambda job, result: self._record(result))

    def _record(self, result: Trial | Failure) -> None:
        if isinstance(result, Failure):
            self._fail(result)
        else:
            self._note(trials=(*self.ledger.comparison.trials, result))
            with self._lock:
                self._total = max(self._total - (self.request.steps - result.steps), self._completed)
                self._progress(total=self._total)
        self._write_record()

    def _expect(self, further: int = 0) -> None:
        """Tell the optimizer steps of all runs that are left: the planned ones, and further ones."""
        arms = tuple(arm for arm in self.request.arms if arm.name not in self._failed)
        planned = dataclasses.replace(self.request, arms=arms)
        left = planned.runs - planned.runs_done(self.ledger.comparison) + further
        self._total = self._completed + left * self.request.steps
        self._progress(total=self._total)

    def _note(self, **changes: Any) -> None:
        """Write the record, with the rates of its arms: those of the request and all that were tried beyond them."""
        trials = changes.get("trials", self.ledger.comparison.trials)
        rates = {arm.name: {*arm.rates} for arm in self.request.arms}
        for trial in trials:
            rates.setdefault(trial.arm, set()).add(trial.lr)
        arms = tuple(
            dataclasses.replace(arm, rates=tuple(sorted(rates.get(arm.name, ())))) for arm in self.bench.request.arms
        )
        self.ledger.note(arms=arms, **changes)

    def _write_record(self) -> None:
        self.ledger.note_settings(seconds=round(self.before + time.monotonic() - self.start, 1))

    def _recorded(self, job: TrialJob) -> Trial | None:
        """The recorded run of a job."""
        found = self.ledger.comparison.of(job.arm)
        return next((trial for trial in found if (trial.lr, trial.seed) == (job.lr, job.seed)), None)

    def _tried(self, arm: Arm, rates: Sequence[float] | None = None) -> list[Trial]:
        """The runs of the search for an arm's rate, those at some rates or all."""
        found = [trial for trial in self.ledger.comparison.of(arm.name) if trial.seed == self.seed]
        return [trial for trial in found if rates is None or trial.lr in rates]

    def _fail(self, failure: Failure) -> None:
        self._failed.add(failure.arm)
        self._leave_out(failure.arm, failure.why)

    def _leave_out(self, what: str, why: str) -> None:
        self.ledger.note(left_out={**self.ledger.comparison.left_out, what: why})

    def _unfinished(self, stop: Stopped) -> Comparison:
        """What there is, with the arms that are not finished."""
        found = self.ledger.comparison
        why = f"stopped: {stop.why}; called again, the comparison goes on"
        missing = {arm.name: why for arm in self.request.arms if arm.name not in found.costs}
        return dataclasses.replace(found, left_out={**missing, **found.left_out})

    def _describe(self, what: str) -> None:
        self._progress(description=what)
