"""The configuration of a training run: `Config` and its sections.

Every field has a range, a default and a description. `lorary init`, the JSON schema and the documentation are
generated from these models, so they cannot disagree. An unknown key is an error, and so is a key without effect
(`lorary.train.config.conflicts`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, PrivateAttr
from pydantic.fields import FieldInfo

from lorary import methods  # noqa: F401 (registers the presets)
from lorary.errors import PlanError
from lorary.files.home import expanded
from lorary.methods.lora_drop import probe_note
from lorary.model.loading.source import Section
from lorary.model.planning import plan
from lorary.spec.method import Method
from lorary.spec.presets import resolve_presets
from lorary.spec.site import EACH
from lorary.train.config._fields import Alpha, Fraction, Layers, Names, PathPattern, Size, SomeNames, Task
from lorary.train.config._paths import absolute
from lorary.train.config._places import located
from lorary.train.config._sections import (
    AlsoSection,
    ModelSection,
    build_method,
    method_defaults,
    methods_with_rows,
    token_ids,
)
from lorary.train.config.compare_section import CompareSection
from lorary.train.config.data_section import DataSection
from lorary.train.config.drop import DropSection
from lorary.train.config.previous_tasks import load_previous_tasks
from lorary.train.config.tasks import TASK_DEFAULTS, TASK_LR, has_reference
from lorary.train.config.training_section import TrainingSection
from lorary.train.config.yaml_source import dump

if TYPE_CHECKING:
    from torch import nn

    from lorary.adapters.adapter import Adapter
    from lorary.model.plan import Plan

LORA_LR = 2e-4
AnySection = TypeVar("AnySection", bound=Section)


class MethodSection(Section):
    """The method and its targets."""

    name: SomeNames = Field(
        default=("lora",), description="presets to combine, such as lora, rslora; see `lorary methods`"
    )
    r: Size | None = Field(default=None, description="rank; empty: the method's default, 16 for lora")
    alpha: Alpha | None = Field(
        default=None, description="numerator of the scale alpha/r (rslora: alpha/sqrt(r)); empty: 32 for lora"
    )
    dropout: Fraction | None = Field(default=None, description="dropout on the adapter's input; empty: 0")
    targets: SomeNames | None = Field(
        default=None,
        description="presets such as all-linear, attention-kv or mlp; names, globs, re:REGEX; empty: the method's own",
    )
    exclude: Names = Field(default=(), description="names, globs or re:REGEX to leave out of targets")
    layers: Layers | None = Field(
        default=None, description="indices of the blocks to adapt: 0-15, [0, -1] or {decoder.block: 0-3}; empty: all"
    )
    train_in_full: Names = Field(
        default=(), description="modules to train in full beside the adapters: names, globs, norms or embeddings"
    )
    head: Literal["full", "frozen", "lora"] | None = Field(
        default=None, description="how the output head trains; empty: a classifier's new head in full, others frozen"
    )
    ranks: dict[PathPattern, Size] = Field(
        default={}, description='ranks by name, glob or re:REGEX, such as {"*.down_proj": 4}'
    )
    alphas: dict[PathPattern, Alpha] = Field(default={}, description="alphas, likewise")
    experts: Literal["each", "shared"] | None = Field(
        default=None, description="an adapter for each expert of a block, or one shared by all; empty: each"
    )
    options: dict[str, Any] = Field(default={}, description="presets' parameters, such as {ratio: 16} for lora+")
    also: tuple[AlsoSection, ...] = Field(
        default=(), description="further methods for other layers, such as [{name: vera, targets: mlp}]"
    )
    after: Names = Field(default=(), description="adapter folders of the earlier tasks, in order (o-lora)")
    drop: DropSection | None = Field(
        default=None, description="LoRA-drop, such as {threshold: 0.9, sample: 0.1}; empty: one LoRA per layer"
    )

    def build(self) -> Method:
        """The method of this section.

        Raises:
            MethodError: unknown presets or options, and every contradiction between them.
        """
        return build_method(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The presets of this method and of those beside it."""
        return tuple(dict.fromkeys([*self.name, *(name for part in self.also for name in part.name)]))

    def plan(
        self,
        model: nn.Module,
        past: Sequence[Adapter] | None = None,
        new: Sequence[str] = (),
        tokens: Mapping[str, int] | None = None,
    ) -> Plan:
        """The plan of this method for a model, which stays unchanged. Raises what `build` and `lorary.plan` raise.

        Args:
            model: the base; it may be on the meta device.
            past: the adapters of `after` if they are loaded already.
            new: parameters besides the head that no checkpoint holds: they train in full.
            tokens: text -> id of the tokens that were added to the tokenizer: their rows train as well.
        """
        past = load_previous_tasks(self.after) if past is None else past
        options: dict[str, Any] = {"ranks": self.ranks, "alphas": self.alphas, "exclude": self.exclude}
        options |= {"experts": self.experts or EACH}
        options |= {"layers": self.layers, "full": (*self.train_in_full, *new), "head": self.head}
        several = {self.targets or (): self.build()} | {part.targets: part.build() for part in self.also}
        if tokens:
            several = methods_with_rows(several, tokens)
        alone = len(several) == 1
        ((targets, one),) = several.items() if alone else [((), None)]
        planned = plan(model, *((one, targets or None) if alone else (several,)), **options, after=past)
        if self.drop is None:
            return planned
        return dataclasses.replace(planned, notes=(*planned.notes, probe_note(self.drop.threshold, self.drop.sample)))


class Config(Section):
    """One training run.

    Built from a file by `lorary.train.config.load`, from a dictionary by `lorary.train.config.from_dict` (both report
    every mistake at once), or from its sections.
    """

    model: ModelSection
    task: Task = Field(
        default="sft",
        description="sft; on pairs: dpo, reward; on judged answers: kto; with a reward function: grpo; classification",
    )
    method: MethodSection = MethodSection()
    data: DataSection
    training: TrainingSection = TrainingSection()
    output: str = Field(default="out", min_length=1, description="run folder: metrics, plots, checkpoints, adapter")
    compare: CompareSection = Field(default=CompareSection(), exclude=True)  # no part of a run, nor of its record

    _notes: tuple[str, ...] = PrivateAttr(())
    _places: dict[str, str] = PrivateAttr({})  # dotted key -> file:line:column, or the flag of a command

    @property
    def notes(self) -> tuple[str, ...]:
        """Translations of other tools' names, and the defaults that `resolve` chose."""
        return self._notes

    def with_notes(self, *notes: str) -> Config:
        """A copy with further notes."""
        copy = self.model_copy()
        copy._notes = (*self._notes, *notes)
        return copy

    def with_places(self, places: dict[str, str]) -> Config:
        """A copy that knows where its values come from, for the errors of `plan`."""
        copy = self.model_copy()
        copy._places = places
        return copy

    def plan(self, model: nn.Module, past: Sequence[Adapter] | None = None, new: Sequence[str] = ()) -> Plan:
        """`MethodSection.plan`, whose errors name the key of the configuration, or the flag of a command."""
        try:
            return self.method.plan(model, past, new, token_ids(self.model) if self.model.tokens else None)
        except PlanError as error:
            raise located(error, self._places) from error.__cause__

    def __eq__(self, other: object) -> bool:
        """Equality of all fields; notes do not count."""
        return isinstance(other, Config) and self.model_dump() == other.model_dump()

    def resolve(self, names: Sequence[str] = ()) -> Config:
        """The configuration with every default filled in that depends on other fields.

        Args:
            names: the presets of `model.adapter`, whose method replaces the section's.
        """
        names = names or self.method.names
        training: dict[str, Any] = {"eval_batch_size": self.training.batch_size}
        no_warmup = {"warmup": 0.0} if self.training.schedule == "reduce_lr_on_plateau" else {}
        notes: list[str] = []
        if self.training.max_steps is None:
            training["epochs"] = 3.0
        training |= TASK_DEFAULTS.get(self.task, {})
        if self.model.adapter and has_reference(self.task, self.training.grpo_beta):
            training["reference"] = "start"
        if self.training.keeps_best and self.training.eval_steps != self.training.save_steps:
            steps = self.training.save_steps or self.training.eval_steps
            training |= {"eval_steps": steps, "save_steps": steps}
        if self.task == "grpo":  # whole groups of answers
            group = self.training.num_generations or training["num_generations"]
            training["eval_batch_size"] = math.ceil(self.training.batch_size / group) * group
        if self.training.lr is None:
            training["lr"] = default_lr(self.task, names)
            notes = [f"training.lr: {training['lr']:g}, the default of {self.task} with {', '.join(names)}"]
        sections = {
            "training": _with_defaults(self.training, training).model_copy(update=no_warmup),
            "method": self.method if self.model.adapter else self._resolved_method(),
            "output": str(expanded(self.output)),
        }
        return self.model_copy(update=sections).with_notes(*notes)

    def with_absolute_paths(self) -> Config:
        """The same configuration for any working directory."""
        located = absolute(self.model_dump(exclude_unset=True), Path.cwd())
        return Config.model_validate(located).with_notes(*self._notes)

    def _resolved_method(self) -> MethodSection:
        section = _with_defaults(self.method, method_defaults(self.method))
        also = tuple(_with_defaults(part, method_defaults(part)) for part in section.also)
        return section.model_copy(update={"also": also}) if also else section

    def record(self) -> dict[str, Any]:
        """Plain data for a file. An adapter to go on from brings its method: only what was said beside it is there."""
        data = self.model_dump(mode="json")
        if self.model.adapter:
            data["method"] = self.method.model_dump(mode="json", exclude_unset=True)
        return data

    def to_yaml(self) -> str:
        """YAML that `load` reads back as an equal configuration, with the notes above it as comments."""
        head = "".join(f"# {note}\n" for note in self.notes)
        return head + dump(self.record())


def _with_defaults(section: AnySection, defaults: dict[str, Any]) -> AnySection:
    """The section with its empty fields filled in."""
    return section.model_copy(update={key: v for key, v in defaults.items() if getattr(section, key) is None})


def default_lr(task: str, names: Sequence[str]) -> float:
    """The default peak learning rate of a task with these presets.

    Ten times the rate of full fine-tuning: 2e-4 for SFT, 5e-6 for DPO (`TASK_LR`). A preset with another rate
    (`lorary.spec.presets.Preset.lr`) scales both; of several such presets the lowest rate counts.
    """
    found = resolve_presets(names)
    rates = [preset.lr for preset in found if preset.adapts] or [preset.lr for preset in found]
    lowest = min((rate for rate in rates if rate != LORA_LR), default=LORA_LR)
    return float(f"{lowest * TASK_LR[task] / LORA_LR:.6g}")


# Section -> its fields; "" is the top level.
SECTIONS: dict[str, dict[str, FieldInfo]] = {
    "": dict(Config.model_fields),
    "model": dict(ModelSection.model_fields),
    "method": dict(MethodSection.model_fields),
    "data": dict(DataSection.model_fields),
    "training": dict(TrainingSection.model_fields),
    "compare": dict(CompareSection.model_fields),
}
