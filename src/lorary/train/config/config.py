"""What a training run is, as one strict value: `Config`, read from YAML by `lorary.train.config.load`.

Every field has a range, a default and a sentence; `lorary init`, the JSON schema and the documentation are
generated from these models, so they cannot disagree. Nothing is ignored: an unknown key is an error, and so
is a key that would have no effect beside another one (`lorary.train.config.conflicts`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr
from pydantic.fields import FieldInfo

from lorary.model.loading.source import ModelSection, Section
from lorary.train.config.fields import Alpha, Count, Optimizer, Rank, Real, Sources, Tracker, Whole, Words, words_of
from lorary.train.config.yaml_source import dump

if TYPE_CHECKING:
    from torch import nn

    from lorary.adapters.adapter import Adapter
    from lorary.model.plan import Plan
    from lorary.spec.method import Method

LORA_LR = 2e-4


class DropSection(Section):
    """LoRA-drop: layers in which a short probe learns little share one LoRA."""

    threshold: Annotated[Real, Field(gt=0, lt=1)] = Field(
        default=0.9, description="layers are kept until they have this share of their module kind's importance"
    )
    sample: Annotated[Real, Field(gt=0, le=1)] = Field(
        default=0.1, description="share of the training rows that the probe learns from"
    )
    steps: Annotated[Whole, Field(ge=2, le=1_000_000_000)] | None = Field(
        default=None, description="optimizer steps of the probe; empty: one pass over its rows"
    )


class MethodSection(Section):
    """What is learnt, and where."""

    name: Words = Field(
        default=("lora",), description="presets that combine, such as lora, rslora; see `lorary methods`"
    )
    r: Rank | None = Field(default=None, description="rank of every adapter; empty: the method's own, 16 for lora")
    alpha: Alpha | None = Field(
        default=None, description="adapters are scaled by alpha/r (rslora: alpha/sqrt(r)); empty: 32 for lora"
    )
    dropout: Annotated[Real, Field(ge=0, lt=1)] | None = Field(
        default=None, description="dropout of an adapter's input; empty: 0"
    )
    targets: Words | None = Field(
        default=None,
        description="all-linear, attention, attention-qv, mlp, embedding, conv, names, globs; empty: the method's own",
    )
    exclude: Annotated[tuple[str, ...], BeforeValidator(words_of)] = Field(
        default=(), description="component names or globs that stay frozen although targets names them"
    )
    ranks: dict[str, Rank] = Field(default={}, description='ranks of single sites by glob, such as {"*.down_proj": 4}')
    alphas: dict[str, Alpha] = Field(default={}, description="alphas of single sites by glob")
    options: dict[str, Any] = Field(
        default={}, description="parameters of the presets themselves, such as {ratio: 16} for lora+"
    )
    after: Annotated[tuple[str, ...], BeforeValidator(words_of)] = Field(
        default=(), description="adapter folders of the tasks before this one, the first one first (o-lora)"
    )
    drop: DropSection | None = Field(
        default=None, description="LoRA-drop, such as {threshold: 0.9, sample: 0.1}; empty: every layer has its own"
    )

    def build(self) -> Method:
        """The method that this section asks for.

        Raises:
            MethodError: unknown presets or options, and every contradiction between them.
        """
        from lorary import methods  # noqa: F401 (registers the presets)
        from lorary.spec.presets import method

        given = {key: getattr(self, key) for key in ("r", "alpha", "dropout")}
        options = {key: value for key, value in given.items() if value is not None}
        return method(*self.name, **options, **self.options)

    def plan(self, model: nn.Module, past: Sequence[Adapter] | None = None) -> Plan:
        """Where that method goes in a model; nothing is touched. Raises what `build` and `lorary.plan` raise.

        Args:
            model: the base; it may be on the meta device.
            past: the adapters of `after`, where they have been read before.
        """
        from lorary.model.planning import plan

        if past is None and self.after:
            from lorary.train.config.previous_tasks import past_of

            past = past_of(self.after)
        words: dict[str, Any] = {"ranks": self.ranks, "alphas": self.alphas, "exclude": self.exclude}
        made = plan(model, self.build(), self.targets, **words, after=past or ())
        if self.drop is None:
            return made
        from lorary.methods.lora_drop import announced

        return dataclasses.replace(made, notes=(*made.notes, announced(self.drop.threshold, self.drop.sample)))


class DataSection(Section):
    """What it is learnt from."""

    train: Sources = Field(
        description="file (jsonl, json, csv, parquet), folder, Hub id, builtin:NAME, or a list of them"
    )
    validation: Sources | None = Field(default=None, description="the same for held-out data")
    validation_split: Annotated[Real, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of the training rows that is held out when validation is empty"
    )
    subset: str | None = Field(default=None, description="configuration name of a Hub data set")
    format: Literal["auto", "text", "prompt-completion", "messages", "alpaca", "sharegpt", "preference"] = Field(
        "auto", description="shape of a row; auto: detected from its fields, and shown"
    )
    columns: dict[str, str] = Field(
        default={}, description="your names of a shape's fields, such as {prompt: question}"
    )
    max_length: Annotated[Whole, Field(ge=8, le=10_000_000)] = Field(default=1024, description="longest row, in tokens")
    overlong: Literal["auto", "error", "drop", "truncate", "split"] = Field(
        default="auto",
        description="a row beyond max_length; auto: text is split into rows, anything else is an error",
    )
    packing: bool = Field(default=False, description="fill rows of max_length with several examples")
    loss: Literal["auto", "completion", "all"] = Field(
        default="auto",
        description="tokens that are learnt; auto: the answers alone, in plain text everything",
    )
    chat_template: str | None = Field(
        default=None, description="Jinja file or builtin:chatml; empty: the tokenizer's own template"
    )


class TrainingSection(Section):
    """How it is learnt."""

    epochs: Annotated[Real, Field(gt=0, le=100_000)] | None = Field(
        default=None, description="passes over the training data; 3 when max_steps is empty too"
    )
    max_steps: Count | None = Field(default=None, description="optimizer steps, instead of epochs")
    batch_size: Annotated[Whole, Field(ge=1, le=65_536)] = Field(
        default=4, description="rows per device and forward pass"
    )
    gradient_accumulation_steps: Annotated[Whole, Field(ge=1, le=65_536)] = Field(
        default=4, description="forward passes per optimizer step"
    )
    eval_batch_size: Annotated[Whole, Field(ge=1, le=65_536)] | None = Field(
        default=None, description="rows per device in evaluation; empty: batch_size"
    )
    lr: Annotated[Real, Field(gt=0, le=1)] | None = Field(
        default=None, description="learning rate; empty: 2e-4 (SFT) or 5e-6 (DPO), times the method's factor"
    )
    schedule: Literal["cosine", "linear", "constant", "polynomial", "inverse_sqrt"] = Field(
        default="cosine", description="learning rate after the warmup"
    )
    warmup: Annotated[Real, Field(ge=0, le=1_000_000_000)] = Field(
        default=0.03, description="share of the steps when below 1, otherwise their number"
    )
    optimizer: Optimizer = Field(
        default="adamw_torch",
        description="as Transformers names it; paged_adamw (bitsandbytes, CUDA) keeps its state on the host",
    )
    weight_decay: Annotated[Real, Field(ge=0, le=1)] = Field(default=0.0, description="decoupled decay")
    max_grad_norm: Annotated[Real, Field(ge=0, le=1e6)] = Field(
        default=1.0, description="gradients are clipped to this norm; 0: never"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory, a third more time"
    )
    bf16: bool = Field(
        default=False, description="compute in bfloat16 where the weights are kept in float32 (autocast)"
    )
    seed: Annotated[Whole, Field(ge=0, le=2**32 - 1)] = Field(
        default=42, description="of the data order, the start and dropout"
    )
    logging_steps: Count = Field(default=10, description="optimizer steps between two lines of the log")
    eval_steps: Count | None = Field(
        default=None, description="optimizer steps between evaluations; empty: once per epoch"
    )
    save_steps: Count | None = Field(
        default=None, description="optimizer steps between checkpoints; empty: once per epoch"
    )
    save_total_limit: Count = Field(default=2, description="checkpoints that are kept")
    early_stopping_patience: Count | None = Field(
        default=None, description="stop after this many evaluations without a better loss, and keep the best"
    )
    keep_best: bool = Field(
        default=False, description="the result is the adapter of the best evaluation, not of the last step"
    )
    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(words_of), Field(min_length=1)] = Field(
        default=("none",), description="tensorboard, wandb, trackio; metrics.jsonl is always written"
    )
    dpo_beta: Annotated[Real, Field(gt=0, le=1000)] | None = Field(
        default=None, description="strength of the pull to the base model in DPO; 0.1 when empty"
    )


class Config(Section):
    """One training run.

    Build it from a file with `lorary.train.config.load.load`, from a dictionary with
    `lorary.train.config.load.from_dict` (both explain every mistake at once), or from its sections.
    """

    model: ModelSection
    task: Literal["sft", "dpo"] = Field(default="sft", description="sft: next tokens; dpo: preference pairs")
    method: MethodSection = MethodSection()
    data: DataSection
    training: TrainingSection = TrainingSection()
    output: str = Field(
        default="out", min_length=1, description="run folder: config, metrics, plots, checkpoints, adapter"
    )

    _notes: tuple[str, ...] = PrivateAttr(())

    @property
    def notes(self) -> tuple[str, ...]:
        """How the file was read where not word for word: other tools' names, defaults of `resolve`."""
        return self._notes

    def noted(self, *notes: str) -> Config:
        """The same configuration with further notes."""
        copy = self.model_copy()
        copy._notes = (*self._notes, *notes)
        return copy

    def __eq__(self, other: object) -> bool:
        """Two configurations are equal when they ask for the same; notes do not count."""
        return isinstance(other, Config) and self.model_dump() == other.model_dump()

    def resolve(self) -> Config:
        """The same run with every default that depends on other fields filled in."""
        training: dict[str, Any] = {}
        notes: list[str] = []
        if self.training.epochs is None and self.training.max_steps is None:
            training["epochs"] = 3.0
        if self.training.eval_batch_size is None:
            training["eval_batch_size"] = self.training.batch_size
        if self.training.lr is None:
            training["lr"] = default_lr(self.task, self.method.name)
            of = f"{self.task} with {', '.join(self.method.name)}"
            notes.append(f"training.lr: {training['lr']:g}, the default of {of}")
        if self.task == "dpo" and self.training.dpo_beta is None:
            training["dpo_beta"] = 0.1
        sections = {
            "training": self.training.model_copy(update=training),
            "method": self.method.model_copy(update=self._method_defaults()),
            "output": str(Path(self.output).expanduser()),
        }
        return self.model_copy(update=sections).noted(*notes)

    def _method_defaults(self) -> dict[str, Any]:
        """r, alpha, dropout and targets where they are empty and the method has them."""
        from lorary import methods  # noqa: F401 (registers the presets)
        from lorary.model.planning import default_targets
        from lorary.spec.presets import resolve_presets

        found: dict[str, Any] = {}
        for preset in resolve_presets(self.method.name):
            found |= {key: preset.parameters[key] for key in ("r", "alpha", "dropout") if key in preset.parameters}
        made = self.method.build()
        found["targets"] = default_targets(made)
        if not hasattr(made.scale, "alpha"):  # another preset's scale has taken the place of LoRA's
            found.pop("alpha", None)
        return {key: value for key, value in found.items() if getattr(self.method, key) is None}

    def to_yaml(self) -> str:
        """This configuration as YAML that `load` reads back equal; notes stand above it as comments."""
        head = "".join(f"# {note}\n" for note in self.notes)
        return head + dump(self.model_dump(mode="json"))


def default_lr(task: str, names: tuple[str, ...]) -> float:
    """The peak learning rate that `task` and the presets `names` start from when none is given.

    2e-4 for SFT and 5e-6 for DPO, ten times what full fine-tuning takes; a preset that asks for another rate
    (`lorary.spec.presets.Preset.lr`) scales both, and among several such presets the lowest rate counts.
    """
    from lorary import methods  # noqa: F401 (registers the presets)
    from lorary.spec.presets import resolve_presets

    rates = [preset.lr for preset in resolve_presets(names) if preset.adapts] or [p.lr for p in resolve_presets(names)]
    asked = [rate for rate in rates if rate != LORA_LR] or [LORA_LR]
    return float(f"{min(asked) * {'sft': 1.0, 'dpo': 5e-6 / LORA_LR}[task]:.6g}")


# Section -> its keys; "" is the top level.
SECTIONS: dict[str, dict[str, FieldInfo]] = {
    "": dict(Config.model_fields),
    "model": dict(ModelSection.model_fields),
    "method": dict(MethodSection.model_fields),
    "data": dict(DataSection.model_fields),
    "training": dict(TrainingSection.model_fields),
}
