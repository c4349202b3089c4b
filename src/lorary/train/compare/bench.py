"""The rows and runs of a comparison, as one process uses them: every arm is prepared once, its rows are read once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch

from lorary.adapters.resolve import load_base
from lorary.adapters.save_load import load_adapter
from lorary.adapters.switch import load as put_on
from lorary.analysis.comparison.record import Arm, Scores
from lorary.analysis.evaluation import score_labels, score_rows
from lorary.errors import DataError, Diagnostic
from lorary.model.fingerprint import Fingerprint
from lorary.model.loading.from_pretrained import load_model
from lorary.model.loading.model_kind import set_padding
from lorary.train.compare.request import Request
from lorary.train.compare.search import init_seed
from lorary.train.config.data_section import DataSection
from lorary.train.data import load as data
from lorary.train.data.spread import spread
from lorary.train.data.tokenize import Row, Tokens, tokenize
from lorary.train.runner.prepare import RunPlan, prepare

T = TypeVar("T")


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows, divided by examples, so that no text is in two parts.

    Args:
        validation: for the choice of rates.
        test: for the judgement of methods.
        general: general text; empty: it is not measured.
    """

    validation: Tokens
    test: tuple[Row, ...]
    general: tuple[Row, ...]


class Bench:
    """What the runs of a comparison share in a process.

    Args:
        request: the comparison.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._plans: dict[str, RunPlan] = {}

    def plan(self, arm: Arm) -> RunPlan:
        """The plan of an arm's runs, with all of the held-out rows.

        Raises:
            LoraryError: it cannot be trained.
        """
        if arm.name not in self._plans:
            self._plans[arm.name] = prepare(self.request.config_of(arm))
        return self._plans[arm.name]

    @property
    def any_plan(self) -> RunPlan:
        """The plan of some arm: what is not the method's is the same in all of them."""
        return next(iter(self._plans.values()), None) or self.plan(self.request.arms[0])

    def run_plan(self, arm: Arm, lr: float, seed: int, folder: str, **training: Any) -> RunPlan:
        """The plan of one run.

        Args:
            arm: its method.
            lr: its learning rate.
            seed: of the order of its rows, and with the arm's name of its initialisation.
            folder: of the run, below the comparison's.
            training: further fields of the `training` section.
        """
        plan = self.plan(arm)
        own = {"lr": lr, "seed": init_seed(arm.name, seed), "data_seed": seed}
        section = plan.config.training.model_copy(update=own | training)
        output = str(self.request.folder.absolute() / folder)
        config = plan.config.model_copy(update={"training": section, "output": output})
        return dataclasses.replace(plan, config=config, held_out=self.held_out.validation)

    @cached_property
    def held_out(self) -> HeldOut:
        """The held-out rows.

        Raises:
            DataError: they cannot be read, or are too few.
        """
        plan, settings = self.any_plan, self.request.settings
        section, task = plan.config.data, plan.config.task
        if section.validation is not None:
            examples: Sequence[Any] = data.load_validation(section, task)
        else:
            examples = data.load(section, task, plan.config.training.seed).validation
        parts = (examples[::2], examples[1::2]) if len(examples) > 1 else (examples,)
        both = [tokenize(part, plan.tokenizer, section, labels=plan.labels) for part in parts]
        both = both if len(both) == 2 else _halves(both[0])
        validation, test = ([row for row in tokens.rows if _is_scored(row)] for tokens in both)
        if not validation or len(test) < 2:
            what = f"{len(validation)} of them can be chosen on, and {len(test)} judged on"
            raise DataError("there are too few held-out rows:", [Diagnostic("data.validation", what, "hold out more")])
        rows = spread(validation, settings.validation_rows)
        return HeldOut(
            dataclasses.replace(both[0], rows=tuple(rows)),
            tuple(spread(test, settings.test_rows)),
            self._general(plan) if task == "sft" else (),
        )

    def _general(self, plan: RunPlan) -> tuple[Row, ...]:
        settings = self.request.settings
        if not settings.general:
            return ()
        sources, length = settings.general, plan.config.data.max_length
        section = DataSection(train=sources, validation=sources, max_length=length)
        examples = spread(data.load_validation(section, "sft"), settings.general_rows)
        rows = tokenize(examples, plan.tokenizer, section).rows
        return tuple(spread([row for row in rows if _is_scored(row)], settings.general_rows))

    @property
    def overlaps(self) -> list[str]:
        """What makes the rows on which methods are judged less than unseen, in words."""
        rows, found = self.held_out, []
        for others, what in (
            (self.any_plan.train.rows, "are also trained on: their scores mean nothing"),
            (rows.validation.rows, "are also among those on which rates are chosen"),
        ):
            seen = {tuple(row["input_ids"]) for row in others}
            if both := sum(tuple(row["input_ids"]) in seen for row in rows.test):
                found.append(f"{both:,} of the {len(rows.test):,} rows on which methods are judged {what}")
        return found

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the base, without a head that is drawn again at every load."""
        base = self.any_plan.base
        model = load_model(self.any_plan.config.model, model_class=base)
        return Fingerprint.of(model).without(model, base.fresh if base else ())

    def scored(self, folder: str | None) -> tuple[Scores | None, Scores | None]:
        """The scores on the test rows and on general text.

        Args:
            folder: of an adapter, below the comparison's; None for the base alone, which is no classifier yet.
        """
        config, rows = self.any_plan.config, self.held_out
        options: dict[str, Any] = {
            "batch_size": config.training.eval_batch_size or config.training.batch_size,
            "pad": self.any_plan.tokenizer.pad_token_id or 0,
        }
        if config.task == "classification":
            test = score_labels(on_device(self.trained(folder)), rows.test, **options) if folder else None
            return test, None
        model = on_device(self.trained(folder) if folder else load_model(config.model))
        general = score_rows(model, rows.general, **options) if rows.general else None
        return score_rows(model, rows.test, **options), general

    def trained(self, folder: str) -> Any:
        """The base with the adapter in a folder of the comparison, in evaluation mode."""
        model = self.base_of(folder)
        put_on(model, self.request.folder / folder)
        set_padding(model, self.any_plan.tokenizer.pad_token_id)
        return model

    def base_of(self, folder: str) -> Any:
        """The base of the adapter in a folder of the comparison, in evaluation mode."""
        path = self.request.folder / folder
        return load_base(self.any_plan.config.model, path, load_adapter(path))


def run_name(request: Request, arm: str, lr: float, seed: int) -> str:
    """The folder of a run, below the comparison's: its number keeps two names apart, and paths out."""
    number = [one.name for one in request.arms].index(arm) + 1
    word = re.sub(r"[^A-Za-z0-9+_-]+", "-", arm).strip("-")[:40]
    return f"runs/{f'{number:02d}-{word}'.rstrip('-')}/lr-{lr!r}-seed-{seed}"  # all digits: two rates may be close


def on_device(model: Any) -> Any:
    """The model on the GPU, if there is one."""
    return model.to("cuda") if torch.cuda.is_available() else model


def _halves(tokens: Tokens) -> list[Tokens]:
    """The rows of a single text in two halves."""
    middle = len(tokens.rows) // 2
    return [dataclasses.replace(tokens, rows=part) for part in (tokens.rows[:middle], tokens.rows[middle:])]


def _is_scored(row: Row) -> bool:
    """Whether a row has a label that is predicted: the first token of a row is not."""
    return "label" in row or any(label != -100 for label in row["labels"][1:])
