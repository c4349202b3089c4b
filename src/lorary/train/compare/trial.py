"""One run of a comparison, in a run folder of its own, from which it goes on after a kill."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from lorary.analysis.comparison.record import Ending, Scores, Trial
from lorary.errors import Diagnostic, FileError, TrainingError
from lorary.model.out_of_memory import allocator_message, is_out_of_memory
from lorary.train.compare.bench import Bench, run_name
from lorary.train.compare.outcomes import Failure, Stopped, attempted
from lorary.train.compare.search import Curve, why_ended
from lorary.train.runner.folder import ADAPTER, CHECKPOINTS, METRICS, RunFolder
from lorary.train.runner.run import run_prepared
from lorary.train.trainer.nan_guard import NotFiniteError

Tell = Callable[[int], None]  # takes the optimizer steps done since the last call


@dataclass(frozen=True)
class TrialJob:
    """A run to be done.

    Args:
        arm: name of its arm.
        lr: learning rate.
        seed: of the order of its rows, and with the arm's name of its initialisation.
        judged: whether it is scored on the test rows; only a loss that is not finite stops it early.
        rival: the curve with which it is compared after a third of its steps; empty: none.
        deadline: when it has to stop, by `time.monotonic`, the same for all processes of a machine.
    """

    arm: str
    lr: float
    seed: int
    judged: bool = False
    rival: tuple[tuple[int, float], ...] = ()
    deadline: float = math.inf

    def __str__(self) -> str:
        return f"{self.arm} at {self.lr:g}, seed {self.seed}"

    def run(self, bench: Bench, tell: Tell) -> Trial | Failure:
        """Train, or go on with what is in the folder.

        Raises:
            Stopped: a signal, or the deadline.
        """
        return attempted(self.arm, self, lambda: self._trained(bench, tell))

    def _trained(self, bench: Bench, tell: Tell) -> Trial:
        name = run_name(bench.request, self.arm, self.lr, self.seed)
        plan = bench.run_plan(bench.request.arm(self.arm), self.lr, self.seed, name)
        watch = _Watch(self, plan.steps, RunFolder(plan.config.output), tell)
        ending, steps = self._train(plan, watch)
        if ending == "finished":
            watch.check_log()
        curve = tuple((step, loss) for step, loss in watch.curve() if math.isfinite(loss))
        test, general = bench.scored(f"{name}/{ADAPTER}") if self.judged and ending == "finished" else (None, None)
        if any(scores and not all(map(math.isfinite, scores.nats)) for scores in (test, general)):
            ending, test, general = "diverged", None, None
        shutil.rmtree(watch.folder / CHECKPOINTS, ignore_errors=True)  # once nothing can need them
        own = plan.config.training.seed
        return Trial(self.arm, self.lr, self.seed, steps, curve, ending, test, general, name, own)

    def _train(self, plan: Any, watch: _Watch) -> tuple[Ending, int]:
        """(why it ended, optimizer steps)."""
        if watch.verdict() is None:
            try:
                done = run_prepared(
                    plan, resume=watch.folder.path.exists(), quiet=True, callbacks=[watch], report=False
                )
            except NotFiniteError:
                return "diverged", watch.last_step
            if done.interrupted:
                raise Stopped(f"signal {done.interrupted}", done.interrupted)
            if watch.late:
                raise Stopped("the budget is used up")
            if done.steps >= plan.steps:
                return watch.verdict() or "finished", done.steps
        return watch.verdict() or "finished", watch.last_step


class _Watch(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Stops a run whose rate is hopeless, or whose time is up; tells of its progress.

    Args:
        job: of the run.
        steps: of the whole run.
        folder: of the run, whose log has the losses.
        tell: takes the steps done.

    Attributes:
        late: whether the deadline stopped it.
    """

    def __init__(self, job: TrialJob, steps: int, folder: RunFolder, tell: Tell) -> None:
        self.job, self.steps, self.folder, self.tell = job, steps, folder, tell
        self.late = False

    def curve(self) -> Curve:
        """The validation losses so far, as they are logged."""
        found = {}
        for record in self.folder.history():
            loss = record.get("eval_loss", "")
            if loss is None or isinstance(loss, int | float):  # null: not finite
                found[record["step"]] = math.nan if loss is None else float(loss)
        return sorted(found.items())

    @property
    def last_step(self) -> int:
        """The step of the last validation loss; 0 if there is none."""
        return max((step for step, _ in self.curve()), default=0)

    def check_log(self) -> None:
        """Refuse the log of a whole run that lacks its last validation loss: it was damaged while the run was not read.

        Raises:
            FileError: it does.
        """
        if (last := self.last_step) < self.steps:
            what = f"ends at step {last} of {self.steps}, and the run has come to its end"
            fix = f"remove {self.folder.path}, and compare again"
            raise FileError("a run of the comparison is damaged:", [Diagnostic(METRICS, what, fix)])

    def verdict(self) -> Ending | None:
        """Why the run has to stop; None if it does not."""
        return why_ended(self.curve(), self.steps, self.job.rival, judged=self.job.judged)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tell(1)
        if time.monotonic() > self.job.deadline and state.global_step < state.max_steps:
            self.late = control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.verdict() is not None:
            control.should_training_stop = True


@dataclass(frozen=True)
class BaseJob:
    """The scores of the base, to be measured."""

    def __str__(self) -> str:
        return "the base"

    def run(self, bench: Bench, tell: Tell) -> tuple[Scores | None, Scores | None]:
        """(on the test rows, on general text).

        Raises:
            TrainingError: there is too little memory, or the base gives no finite loss.
        """
        try:
            test, general = bench.scored(None)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            fix = "set training.eval_batch_size to a smaller one"
            problems = [Diagnostic("memory", allocator_message(error), fix)]
            raise TrainingError("the base cannot be scored:", problems) from error
        if test is not None and (bad := sum(not math.isfinite(loss) for loss in test.nats)):
            what = f"gives {bad:,} of {len(test.nats):,} test rows a loss that is not finite"
            fix = "is its checkpoint damaged, or model.dtype too narrow for it?"
            raise TrainingError("nothing can be compared on this base:", [Diagnostic("model", what, fix)])
        return test, general
