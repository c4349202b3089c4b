"""SharedTraining: the training loop of several adapters on one base, each with its own optimizer, schedule and end.

A step of every adapter is that of training alone:

    loss of its rows + penalties of its rules, backward, after_backward, clipping, optimizer, after_step, schedule

only that forward and backward are those of all adapters at once. The first step proves it: it is computed again for
each adapter alone, and its gradients are compared. An adapter that has done its steps leaves the batch, as does one
whose loss or gradients are not finite: they are in no sum with those of another.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

import lorary
from lorary.adapters.adapter import Adapter
from lorary.adapters.attached import load_into
from lorary.errors import Diagnostic, TrainingError, not_a
from lorary.model.optim.optimizer import optimizer
from lorary.model.optim.rules import Rules, rules
from lorary.train.config.optimization import SCHEDULES
from lorary.train.shared_base.batches import Batch
from lorary.train.shared_base.proof import check_gradients
from lorary.train.shared_base.rows import HEADLINE
from lorary.train.shared_base.shared_base import SharedBase
from lorary.train.trainer import checkpoint, optimizer_state
from lorary.train.trainer.resume import read_adapter


@dataclass(frozen=True)
class Settings:
    """The settings of one adapter's training.

    Args:
        lr: peak learning rate.
        steps: optimizer steps.
        weight_decay: as for `lorary.param_groups`.
        max_grad_norm: the norm to which its gradients are clipped; 0: they are not.
        schedule: of the learning rate, by Transformers' name.
        warmup: optimizer steps of warmup: a share of the run below 1, or their number.
        optimizer: its class.
    """

    lr: float
    steps: int
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: str = "linear"
    warmup: float = 0.0
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW

    def problems(self) -> list[str]:
        """The fields that are out of range."""
        found = [] if type(self.steps) is int and self.steps > 0 else [f"steps is {self.steps!r}; it takes 1 or more"]
        for field in ("max_grad_norm", "warmup"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                found.append(f"{field} is {value!r}; it takes a finite number of at least 0")
        schedules = [name for name in SCHEDULES if name != "reduce_lr_on_plateau"]
        if self.schedule not in schedules:
            known = ", ".join(schedules)
            found.append(f"schedule is {self.schedule!r}; it takes {known}")
        return found

    def scheduler(self, over: torch.optim.Optimizer) -> Any:
        """Transformers' schedule of this name over an optimizer."""
        warmup = math.ceil(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)
        # Transformers' plain `constant` has no warmup
        name = "constant_with_warmup" if self.schedule == "constant" and warmup else self.schedule
        return get_scheduler(name, over, warmup, self.steps)


class _Member:
    """One adapter in training."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings, self.done = model, settings, 0
        self.optimizer = optimizer(model, settings.lr, weight_decay=settings.weight_decay, cls=settings.optimizer)
        self.scheduler = settings.scheduler(self.optimizer)
        self.rules: Rules = rules(model, settings.steps, self.optimizer)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def take_step(self, loss: float) -> bool:
        """From complete gradients of the loss to the next step's zero ones; False: they are not finite, and no step."""
        norm = torch.nn.utils.get_total_norm(self.gradients)
        # a sum of squares may overflow although no gradient did
        if not math.isfinite(loss) or not (norm.isfinite() or all(g.isfinite().all() for g in self.gradients)):
            return False
        penalty = self.rules.penalty()
        if isinstance(penalty, Tensor) and penalty.requires_grad:
            penalty.backward()
        self.rules.after_backward()
        if self.settings.max_grad_norm:
            if self.rules.rules:  # which may have changed them
                norm = torch.nn.utils.get_total_norm(self.gradients)
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.max_grad_norm, norm)
        self.optimizer.step()
        self.rules.after_step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.done += 1
        return True


def _micro_batches(batches: Any) -> dict[str, list[Batch]]:
    """name -> its micro-batches.

    Raises:
        TrainingError: there is no mapping from names to batches, or to lists of them.
    """
    problems = not_a(Mapping, "a mapping from names to batches", batches=batches)
    if not problems:
        problems = [
            Diagnostic(str(name), f"has a {type(found).__name__}, not a batch or a list of them")
            for name, found in batches.items()
            if not isinstance(found, Mapping | list | tuple)
        ]
    if problems:
        raise TrainingError("batches of other adapters:", problems)
    return {name: [found] if isinstance(found, Mapping) else list(found) for name, found in batches.items()}


class SharedTraining:
    """The training of several adapters on one base.

    Args:
        shared: the adapters.
        settings: of their training: the same for all, or name -> settings.

    Attributes:
        finished: name -> the adapter, of those that have done their steps.
        diverged: name -> the steps it had done, of those whose numbers were no longer finite; they have left, too.

    Raises:
        TrainingError: settings of other adapters, or out of range; every reason.
        ConfigError: a rule does not fit the number of steps; the rate or the optimizer is invalid.

    Example:
        >>> training = SharedTraining(shared, {"seed 0": Settings(2e-4, 100), "seed 1": Settings(1e-3, 100)})
        >>> adapters = training.run({name: iter(batches) for name in shared.names})
    """

    def __init__(self, shared: SharedBase, settings: Settings | Mapping[str, Settings]) -> None:
        self.shared = shared
        if problems := not_a(Settings | Mapping, "Settings, or a mapping of names to them", settings=settings):
            raise TrainingError(HEADLINE, problems)
        each = dict.fromkeys(shared.names, settings) if isinstance(settings, Settings) else dict(settings)
        problems = [
            Diagnostic(name, "has settings and is not here" if name in each else "has no settings")
            for name in sorted(set(each) ^ set(shared.names))
        ]
        for name, one in each.items():
            found = one.problems() if isinstance(one, Settings) else [f"has a {type(one).__name__}, not Settings"]
            problems += [Diagnostic(name, what) for what in found]
        if problems:
            raise TrainingError(HEADLINE, problems)
        self._members = {name: _Member(shared.model(name), each[name]) for name in shared.names}
        self.finished: dict[str, Adapter] = {}
        self.diverged: dict[str, int] = {}
        self._proved = False

    @property
    def steps(self) -> dict[str, int]:
        """Optimizer steps done, of the adapters that are still in training."""
        return {name: member.done for name, member in self._members.items()}

    def step(self, batches: Mapping[str, Batch | Sequence[Batch]]) -> dict[str, float]:
        """One optimizer step of every adapter that is still in training.

        Args:
            batches: name -> its batch, or its micro-batches: the step's loss is then the mean over the labels of all
                of them (over the micro-batches, where the loss is not that of tokens).

        Returns:
            name -> its loss before the step, penalties not included.

        Raises:
            DataError, TrainingError: as `SharedBase.losses`; or, in the first step, the gradients of an adapter are not
                those of training it alone.
        """
        each = _micro_batches(batches)
        if not self._proved:
            self._prove({name: micro[0] for name, micro in each.items() if micro})
        weights = {name: self.shared.weights(micro) for name, micro in each.items()}
        totals = dict.fromkeys(each, 0.0)
        for i in range(max(map(len, each.values()), default=1)):
            losses = self.shared.losses({name: micro[i] for name, micro in each.items() if i < len(micro)}, i > 0)
            weighted = torch.stack([weights[name][i] * loss for name, loss in losses.items()])
            weighted.sum().backward()
            for name, loss in zip(losses, weighted.tolist(), strict=True):
                totals[name] += loss
        for name, loss in totals.items():
            self._finish_step(name, loss)
        return totals

    def _prove(self, batches: Mapping[str, Batch]) -> None:
        """Compare the gradients of every adapter with those that it has alone."""
        losses = self.shared.losses(batches)
        torch.stack(list(losses.values())).sum().backward()
        for name, member in self._members.items():
            alone = partial(self.shared.loss_alone, name, batches[name])
            check_gradients(name, member.model, member.parameters, alone)
        self._proved = True

    def _finish_step(self, name: str, loss: float) -> None:
        member = self._members[name]
        if not member.take_step(loss):
            self.diverged[name] = member.done
            self.leave(name)
        elif member.done == member.settings.steps:
            self.finished[name] = self.leave(name)

    def run(
        self,
        batches: Mapping[str, Iterable[Batch | Sequence[Batch]]],
        after: Callable[[SharedTraining, Mapping[str, float]], None] = lambda training, losses: None,
    ) -> dict[str, Adapter]:
        """Train until every adapter has ended.

        Args:
            batches: name -> what `step` takes of it, as often as it has steps.
            after: called after every step with the losses; it may let adapters leave.

        Returns:
            name -> adapter, of those that have done their steps.

        Raises:
            TrainingError: an adapter has fewer batches than steps; and as `step`.
        """
        left = {name: iter(found) for name, found in batches.items()}
        while self._members:
            found: dict[str, Batch | Sequence[Batch]] = {}
            for name, member in self._members.items():
                batch = next(left[name], None) if name in left else None
                if batch is None:
                    what = f"its batches end after {member.done} of {member.settings.steps} steps"
                    raise TrainingError("training has stopped:", [Diagnostic(name, what)])
                found[name] = batch
            after(self, self.step(found))
        return dict(self.finished)

    def leave(self, name: str) -> Adapter:
        """End the training of an adapter as it is.

        Raises:
            TrainingError: it is not in training.
        """
        adapter = self.shared.leave(name)
        del self._members[name]
        return adapter

    def save(self, name: str, path: str | os.PathLike[str]) -> None:
        """Write the training state of an adapter: a checkpoint folder of `lorary.train.trainer.checkpoint`.

        Raises:
            TrainingError, FileError: it is not in training, or cannot be written.
        """
        model, member = self.shared.model(name), self._members[name]
        state = {
            "optimizer": optimizer_state.capture(member.optimizer, model),
            "rules": member.rules.state_dict(),
            "step": member.done,
        }
        facts = {"step": member.done, "lorary": lorary.__version__}
        checkpoint.write(Path(path), Adapter.of(model), state, facts, lambda folder: None, model)

    def resume(self, name: str, path: str | os.PathLike[str]) -> int:
        """Go on with an adapter from the state that `save` has written, bit for bit.

        Returns:
            The optimizer steps done.

        Raises:
            TrainingError, FileError: the folder is not complete, or belongs to another adapter, optimizer or run.
        """
        model, member = self.shared.model(name), self._members[name]
        state, adapter = checkpoint.read(Path(path)), read_adapter(Path(path))
        if type(done := state.get("step")) is not int:
            what, fix = f"{path} holds no state of this kind", "a run goes on with `lorary train --resume`"
            raise TrainingError("cannot go on with this adapter:", [Diagnostic(name, what, fix)])
        if not 0 <= done < member.settings.steps:
            what = f"has done {done} steps, and this run has {member.settings.steps}"
            raise TrainingError("cannot go on with this adapter:", [Diagnostic(name, what)])
        load_into(model, adapter)
        optimizer_state.restore(member.optimizer, model, state["optimizer"])
        member.scheduler.last_epoch = member.done = done
        optimizer_state.follow_schedule(member.optimizer, member.scheduler)
        member.rules.load_state_dict(state["rules"])
        return member.done
