"""The configuration of a training run: `Config` and its sections.

Every field has a range, a default and a description. `lorary init`, the JSON schema and the documentation are
generated from these models, so they cannot disagree. An unknown key is an error, and so is a key without effect
(`lorary.train.config.conflicts`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, PrivateAttr
from pydantic.fields import FieldInfo

from lorary import methods  # noqa: F401 (registers the presets)
from lorary.methods.lora_drop import probe_note
from lorary.model.loading.source import ModelSection, Section
from lorary.model.planning import default_targets, plan
from lorary.spec.method import Method
from lorary.spec.presets import method, resolve_presets
from lorary.train.config._fields import (
    Alpha,
    Count,
    Fraction,
    Integer,
    Names,
    Number,
    Optimizer,
    Size,
    SomeNames,
    Sources,
    Trackers,
)
from lorary.train.config.previous_tasks import load_previous_tasks
from lorary.train.config.yaml_source import dump

if TYPE_CHECKING:
    from torch import nn

    from lorary.adapters.adapter import Adapter
    from lorary.model.plan import Plan

LORA_LR = 2e-4
_LORA_OPTIONS = ("r", "alpha", "dropout")
AnySection = TypeVar("AnySection", bound=Section)


class DropSection(Section):
    """LoRA-drop: layers that a short probe finds unimportant share one LoRA."""

    threshold: Annotated[Number, Field(gt=0, lt=1)] = Field(
        default=0.9, description="share of a module kind's importance that the layers with their own LoRA must hold"
    )
    sample: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=0.1, description="share of the training rows that the probe trains on"
    )
    steps: Annotated[Integer, Field(ge=2, le=1_000_000_000)] | None = Field(
        default=None, description="optimizer steps of the probe; empty: one pass over its rows"
    )


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
        description="all-linear, attention, attention-qv, mlp, embedding, conv, names, globs; empty: the method's own",
    )
    exclude: Names = Field(default=(), description="component names or globs to leave out of targets")
    ranks: dict[str, Size] = Field(default={}, description='ranks by glob, such as {"*.down_proj": 4}')
    alphas: dict[str, Alpha] = Field(default={}, description="alphas by glob")
    options: dict[str, Any] = Field(default={}, description="presets' parameters, such as {ratio: 16} for lora+")
    after: Names = Field(default=(), description="adapter folders of the earlier tasks, in order (o-lora)")
    drop: DropSection | None = Field(
        default=None, description="LoRA-drop, such as {threshold: 0.9, sample: 0.1}; empty: one LoRA per layer"
    )

    def build(self) -> Method:
        """The method of this section.

        Raises:
            MethodError: unknown presets or options, and every contradiction between them.
        """
        options = {key: value for key in _LORA_OPTIONS if (value := getattr(self, key)) is not None}
        return method(*self.name, **options, **self.options)

    def plan(self, model: nn.Module, past: Sequence[Adapter] | None = None) -> Plan:
        """The plan of this method for a model, which stays unchanged. Raises what `build` and `lorary.plan` raise.

        Args:
            model: the base; it may be on the meta device.
            past: the adapters of `after` if they are loaded already.
        """
        past = load_previous_tasks(self.after) if past is None else past
        options: dict[str, Any] = {"ranks": self.ranks, "alphas": self.alphas, "exclude": self.exclude}
        planned = plan(model, self.build(), self.targets, **options, after=past)
        if self.drop is None:
            return planned
        return dataclasses.replace(planned, notes=(*planned.notes, probe_note(self.drop.threshold, self.drop.sample)))


class DataSection(Section):
    """The training and held-out data."""

    train: Sources = Field(
        description="file (jsonl, json, csv, parquet), folder, Hub id, builtin:NAME, or a list of them"
    )
    validation: Sources | None = Field(default=None, description="the same for held-out data")
    validation_split: Fraction = Field(
        default=0.0, description="share of the training rows to hold out when validation is empty"
    )
    subset: str | None = Field(default=None, description="configuration name of a Hub data set")
    format: Literal["auto", "text", "prompt-completion", "messages", "alpaca", "sharegpt", "preference"] = Field(
        default="auto", description="format of a row; auto: detected from its fields, and shown"
    )
    columns: dict[str, str] = Field(default={}, description="your field names, such as {prompt: question}")
    max_length: Annotated[Integer, Field(ge=8, le=10_000_000)] = Field(
        default=1024, description="maximum tokens per row"
    )
    overlong: Literal["auto", "error", "drop", "truncate", "split"] = Field(
        default="auto", description="rows beyond max_length; auto: plain text is split, anything else is an error"
    )
    packing: bool = Field(default=False, description="pack several examples into one row of max_length")
    loss: Literal["auto", "completion", "all"] = Field(
        default="auto", description="tokens in the loss; auto: the answers, or all of a plain text"
    )
    chat_template: str | None = Field(
        default=None, description="Jinja file or builtin:chatml; empty: the tokenizer's own template"
    )


class TrainingSection(Section):
    """The optimization."""

    epochs: Annotated[Number, Field(gt=0, le=100_000)] | None = Field(
        default=None, description="passes over the training data; 3 if max_steps is empty too"
    )
    max_steps: Count | None = Field(default=None, description="optimizer steps; replaces epochs")
    batch_size: Size = Field(default=4, description="rows per device and forward pass")
    gradient_accumulation_steps: Size = Field(default=4, description="forward passes per optimizer step")
    eval_batch_size: Size | None = Field(default=None, description="rows per device in evaluation; empty: batch_size")
    lr: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        default=None, description="learning rate; empty: 2e-4 (SFT) or 5e-6 (DPO), times the method's factor"
    )
    schedule: Literal["cosine", "linear", "constant", "polynomial", "inverse_sqrt"] = Field(
        default="cosine", description="learning-rate schedule after the warmup"
    )
    warmup: Annotated[Number, Field(ge=0, le=1_000_000_000)] = Field(
        default=0.03, description="share of the steps if below 1, number of steps otherwise"
    )
    optimizer: Optimizer = Field(
        default="adamw_torch",
        description="as Transformers names it; paged_adamw (bitsandbytes, CUDA) keeps its state on the host",
    )
    weight_decay: Annotated[Number, Field(ge=0, le=1)] = Field(
        default=0.0, description="decoupled weight decay, of matrices, of AdaLoRA's E and of all that GLoRA trains"
    )
    max_grad_norm: Annotated[Number, Field(ge=0, le=1e6)] = Field(
        default=1.0, description="gradient clipping norm; 0: no clipping"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory, about a third more time"
    )
    bf16: bool = Field(default=False, description="compute in bfloat16 with float32 weights (autocast)")
    seed: Annotated[Integer, Field(ge=0, le=2**32 - 1)] = Field(
        default=42, description="seed of the data order, the initialisation and dropout"
    )
    logging_steps: Count = Field(default=10, description="optimizer steps between two log lines")
    eval_steps: Count | None = Field(default=None, description="optimizer steps between evaluations; empty: an epoch")
    save_steps: Count | None = Field(default=None, description="optimizer steps between checkpoints; empty: an epoch")
    save_total_limit: Count = Field(default=2, description="checkpoints to keep")
    early_stopping_patience: Count | None = Field(
        default=None, description="stop after so many evaluations without a lower loss; keeps the best"
    )
    keep_best: bool = Field(default=False, description="save the best evaluation's adapter, not the last step's")
    report_to: Trackers = Field(default=("none",), description="tensorboard, wandb or trackio, beside metrics.jsonl")
    dpo_beta: Annotated[Number, Field(gt=0, le=1000)] | None = Field(
        default=None, description="DPO's beta, the pull to the base; empty: 0.1"
    )


class Config(Section):
    """One training run.

    Built from a file by `lorary.train.config.load`, from a dictionary by `lorary.train.config.from_dict` (both report
    every mistake at once), or from its sections.
    """

    model: ModelSection
    task: Literal["sft", "dpo"] = Field(default="sft", description="sft: next-token prediction; dpo: preference pairs")
    method: MethodSection = MethodSection()
    data: DataSection
    training: TrainingSection = TrainingSection()
    output: str = Field(default="out", min_length=1, description="run folder: metrics, plots, checkpoints, adapter")

    _notes: tuple[str, ...] = PrivateAttr(())

    @property
    def notes(self) -> tuple[str, ...]:
        """Translations of other tools' names, and the defaults that `resolve` chose."""
        return self._notes

    def with_notes(self, *notes: str) -> Config:
        """A copy with further notes."""
        copy = self.model_copy()
        copy._notes = (*self._notes, *notes)
        return copy

    def __eq__(self, other: object) -> bool:
        """Equality of all fields; notes do not count."""
        return isinstance(other, Config) and self.model_dump() == other.model_dump()

    def resolve(self) -> Config:
        """The configuration with every default filled in that depends on other fields."""
        training: dict[str, Any] = {"eval_batch_size": self.training.batch_size}
        notes: list[str] = []
        if self.training.max_steps is None:
            training["epochs"] = 3.0
        if self.task == "dpo":
            training["dpo_beta"] = 0.1
        if self.training.lr is None:
            training["lr"] = default_lr(self.task, self.method.name)
            notes = [f"training.lr: {training['lr']:g}, the default of {self.task} with {', '.join(self.method.name)}"]
        sections = {
            "training": _with_defaults(self.training, training),
            "method": _with_defaults(self.method, self._method_defaults()),
            "output": str(Path(self.output).expanduser()),
        }
        return self.model_copy(update=sections).with_notes(*notes)

    def _method_defaults(self) -> dict[str, Any]:
        """r, alpha, dropout and targets of the presets, as far as the method has them."""
        found: dict[str, Any] = {}
        for preset in resolve_presets(self.method.name):
            found |= {key: preset.parameters[key] for key in _LORA_OPTIONS if key in preset.parameters}
        method = self.method.build()
        if not hasattr(method.scale, "alpha"):  # another preset replaced LoRA's scale
            found.pop("alpha", None)
        return found | {"targets": default_targets(method)}

    def to_yaml(self) -> str:
        """YAML that `load` reads back as an equal configuration, with the notes above it as comments."""
        head = "".join(f"# {note}\n" for note in self.notes)
        return head + dump(self.model_dump(mode="json"))

    def folded_yaml(self) -> str:
        """The same YAML without the keys that have their default values, and the number of these in a last line."""
        every, others = self.model_dump(mode="json"), self.model_dump(mode="json", exclude_defaults=True)
        head = "".join(f"# {note}\n" for note in self.notes)
        folded = _keys(every) - _keys(others)
        return f"{head}{dump(others)}# and {folded} keys with their defaults: lorary init - has all\n"


def _keys(tree: dict[str, Any]) -> int:
    """The number of keys that hold a value, at any depth."""
    return sum(_keys(value) if isinstance(value, dict) else 1 for value in tree.values())


def _with_defaults(section: AnySection, defaults: dict[str, Any]) -> AnySection:
    """The section with its empty fields filled in."""
    return section.model_copy(update={key: v for key, v in defaults.items() if getattr(section, key) is None})


def default_lr(task: str, names: Sequence[str]) -> float:
    """The default peak learning rate of a task with these presets.

    2e-4 for SFT and 5e-6 for DPO, ten times the rate of full fine-tuning. A preset with another rate
    (`lorary.spec.presets.Preset.lr`) scales both; of several such presets the lowest rate counts.
    """
    found = resolve_presets(names)
    rates = [preset.lr for preset in found if preset.adapts] or [preset.lr for preset in found]
    lowest = min((rate for rate in rates if rate != LORA_LR), default=LORA_LR)
    return float(f"{lowest * {'sft': 1.0, 'dpo': 5e-6 / LORA_LR}[task]:.6g}")


# Section -> its fields; "" is the top level.
SECTIONS: dict[str, dict[str, FieldInfo]] = {
    "": dict(Config.model_fields),
    "model": dict(ModelSection.model_fields),
    "method": dict(MethodSection.model_fields),
    "data": dict(DataSection.model_fields),
    "training": dict(TrainingSection.model_fields),
}
