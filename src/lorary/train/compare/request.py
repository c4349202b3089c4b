"""The request of a comparison: the configuration of its runs, its arms with their rates, and its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorary.analysis.comparison.record import Arm, Comparison
from lorary.errors import ConfigError, Diagnostic, LoraryError, did_you_mean, not_a
from lorary.model.planning import has_common_targets
from lorary.train.compare.search import HIGHEST, evaluation_steps, ladder, third
from lorary.train.compare.settings import Settings
from lorary.train.config.config import Config, default_lr
from lorary.train.config.load import from_dict

TASKS = ("sft", "classification")
LEFT_OUT = ("keep_best", "early_stopping_patience")
"""Fields of `training` that a comparison leaves out: all methods take the same steps, and are judged after the last."""
HEADLINE = "cannot compare:"
_WHERE = ("targets", "exclude", "layers")  # of the common method: the layers of every arm that says no targets
_OF_ONE = ("train_in_full", "head", "ranks", "alphas", "experts", "also", "after", "drop")  # method alone


@dataclass(frozen=True)
class Request:
    """A comparison before its first run, the same in all of its processes.

    Args:
        config: of all runs but for what differs between them; its paths are absolute.
        arms: with their rates.
        settings: of the comparison.
        folder: of the comparison.
        steps: optimizer steps of a run; 0 until the data has been read.
    """

    config: Config
    arms: tuple[Arm, ...]
    settings: Settings
    folder: Path
    steps: int = 0

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def runs(self) -> int:
        """The number of runs, without further rates outwards."""
        return sum(len(arm.rates) + self.settings.seeds for arm in self.arms)

    def runs_done(self, found: Comparison) -> int:
        """How many of them are recorded."""
        search, done = self.config.training.seed, 0
        for arm in self.arms:
            runs = found.of(arm.name)
            done += len({run.lr for run in runs if run.seed == search} & set(arm.rates))
            done += min(len({run.seed for run in runs} - {search}), self.settings.seeds)
        return done

    def config_of(self, arm: Arm) -> Config:
        """The configuration of the runs of an arm, but for their rate, seed and folder.

        Raises:
            ConfigError: the arm's method is not valid.
        """
        training: dict[str, Any] = {"report_to": ["none"]} | dict.fromkeys(LEFT_OUT)
        if self.steps:
            every = evaluation_steps(self.steps)
            training |= {"max_steps": self.steps, "epochs": None, "eval_steps": every, "save_steps": third(self.steps)}
        tree = self.config.model_dump(mode="json", exclude_unset=True, exclude={"compare"})
        tree |= {"method": dict(arm.method), "output": str(self.folder / "runs")}
        tree["training"] = {k: v for k, v in (tree.get("training", {}) | training).items() if v is not None}
        found = from_dict(tree)
        own, common = found.method, self.config.method
        if own.targets is None and has_common_targets(own.build()):
            shared = {key: getattr(common, key) for key in _WHERE if getattr(common, key) and not getattr(own, key)}
            found = found.model_copy(update={"method": own.model_copy(update=shared)})
        return found


def make_request(config: Config, arms: Sequence[Arm], settings: Settings, folder: Path) -> Request:
    """The request, with the rates of the arms that have none.

    Raises:
        ConfigError: every reason why this cannot be compared.
    """
    problems = [*_config_problems(config), *_arm_problems(arms), *_reference_problems(arms, settings)]
    if problems:
        raise ConfigError(HEADLINE, problems)
    data = config.data
    if data.draws_rows and data.seed is None:  # the same rows for every seed of a run
        config = config.model_copy(update={"data": data.model_copy(update={"seed": config.training.seed})})
    request = Request(config.with_absolute_paths(), tuple(arms), settings, folder)
    configs = each_arm(request.arms, request.config_of)
    factor = config.training.lr / default_lr(config.task, config.method.names) if config.training.lr else 1.0
    rated = [
        dataclasses.replace(arm, rates=arm.rates or _rates(own, factor, settings))
        for arm, own in zip(request.arms, configs, strict=True)
    ]
    return dataclasses.replace(request, arms=tuple(rated))


def each_arm(arms: Sequence[Arm], make: Any) -> list[Any]:
    """`make` of every arm.

    Raises:
        ConfigError: it fails for some of them; the reasons of all, each with the name of its arm.
    """
    found, problems = [], []
    for arm in arms:
        try:
            found.append(make(arm))
        except LoraryError as error:
            own = error.problems or [Diagnostic("", error.headline)]
            problems += [dataclasses.replace(p, where=f"{arm.name}: {p.where}".rstrip(": ")) for p in own]
    if problems:
        raise ConfigError(HEADLINE, problems)
    return found


def _rates(config: Config, factor: float, settings: Settings) -> tuple[float, ...]:
    centre = min(default_lr(config.task, config.method.names) * factor, HIGHEST)
    return ladder(centre, settings.rates, settings.spacing)


def _config_problems(config: Config) -> Iterator[Diagnostic]:
    if config.task not in TASKS:
        yield Diagnostic(
            "task", f"is `{config.task}`, whose loss is not scored row by row", f"use {' or '.join(TASKS)}"
        )
    if config.data.validation is None and not config.data.validation_split:
        what = "no rows are held out, on which rates are chosen and methods judged"
        yield Diagnostic("data.validation", what, "set data.validation or data.validation_split")
    if config.data.streaming:
        yield Diagnostic("data.streaming", "the runs of a comparison read the same rows again and again", "remove it")
    if config.training.data_seed is not None:
        what = "a comparison sets it for each of its runs, from training.seed"
        yield Diagnostic("training.data_seed", what, "remove it, or set training.seed")
    for key in _OF_ONE:
        if getattr(config.method, key):
            what = "has no effect: each method that is compared has its own"
            fix = f"write it into the methods, as {{name: lora, method: {{name: lora, {key}: ...}}}}"
            yield Diagnostic(f"method.{key}", what, fix)
    if config.model.adapter:
        what = "an adapter to go on from brings its method, and there would be nothing to compare"
        yield Diagnostic("model.adapter", what, "remove it")


def _arm_problems(arms: Sequence[Arm]) -> Iterator[Diagnostic]:
    if bad := [*not_a(Arm, "an Arm", **{f"arms[{i}]": arm for i, arm in enumerate(arms)})]:
        yield from bad
        return
    if not arms:
        yield Diagnostic("arms", "there are none", "name at least one method")
    names = [arm.name for arm in arms if isinstance(arm.name, str)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Diagnostic("arms", f"{names.count(name)} are named {name!r}", "give each a name of its own")
    for arm in arms:
        if not isinstance(arm.name, str) or not arm.name.strip() or not arm.name.isprintable() or len(arm.name) > 200:
            yield Diagnostic("arms", f"{arm.name!r} is not a name", "use printable characters, at most 200")
        if not isinstance(arm.method, Mapping):
            what = f"is {arm.method!r}, not a section of a configuration"
            yield Diagnostic(f"{arm.name}: method", what, "such as {'name': 'lora', 'r': 8}")
        yield from _rate_problems(arm)


def _rate_problems(arm: Arm) -> Iterator[Diagnostic]:
    where, rates = f"{arm.name}: rates", arm.rates
    if not isinstance(rates, list | tuple):
        yield Diagnostic(where, f"is {rates!r}", "use a tuple of learning rates; an empty one for the method's own")
    elif any(type(rate) not in (int, float) or not 0 < rate <= HIGHEST for rate in rates):
        yield Diagnostic(where, f"are {list(rates)}", "use numbers above 0 and at most 1")
    elif list(rates) != sorted(set(rates)):
        yield Diagnostic(where, f"are {list(rates)}", "let them rise, each once")


def _reference_problems(arms: Sequence[Arm], settings: Settings) -> Iterator[Diagnostic]:
    names = [str(getattr(arm, "name", "")) for arm in arms]
    if settings.reference and settings.reference not in names:
        what = f"there is no arm {settings.reference!r}"
        yield Diagnostic("reference", what, did_you_mean(settings.reference, names))
