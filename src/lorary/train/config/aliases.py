"""The names that people know from elsewhere, and where they live here.

PEFT's, TRL's, LLaMA-Factory's, Axolotl's and Unsloth's names of the same thing are understood, in their section or
at the top level where those tools' flat files have them, and every one that is met is noted. A right key in a wrong
section, and a key that cannot be translated, are errors that say what to write.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorary.errors import Diagnostic, did_you_mean, nearest, suggestion
from lorary.train.config.config import SECTIONS
from lorary.train.config.yaml_source import ParsedYaml, Place

ALIASES = {
    "model.id": "model_name_or_path model_name base_model",
    "model.revision": "model_revision",
    "model.dtype": "torch_dtype",
    "method.r": "lora_r lora_rank rank",
    "method.alpha": "lora_alpha",
    "method.dropout": "lora_dropout",
    "method.targets": "target_modules lora_target_modules lora_target",
    "method.exclude": "exclude_modules",
    "data.train": "dataset_name train_file",
    "data.validation": "validation_file",
    "data.validation_split": "val_set_size val_size",
    "data.subset": "dataset_config",
    "data.max_length": "max_seq_length max_seq_len cutoff_len sequence_len",
    "data.packing": "sample_packing",
    "data.overlong": "excess_length_strategy",
    "data.chat_template": "chat_template_path",
    "data.loss": "completion_only_loss assistant_only_loss train_on_inputs train_on_input",
    "training.epochs": "num_train_epochs num_epochs",
    "training.batch_size": "per_device_train_batch_size micro_batch_size",
    "training.eval_batch_size": "per_device_eval_batch_size",
    "training.gradient_accumulation_steps": "grad_accumulation_steps",
    "training.lr": "learning_rate",
    "training.schedule": "lr_scheduler_type lr_scheduler",
    "training.warmup": "warmup_ratio warmup_steps",
    "training.optimizer": "optim",
    "training.max_grad_norm": "gradient_clipping",
    "training.keep_best": "load_best_model_at_end",
    "training.dpo_beta": "beta",
    "output": "output_dir",
}
CANONICAL = {alias: key for key, aliases in ALIASES.items() for alias in aliases.split()}

# Keys that TRL's flat files have under the very name that a section has here.
FLAT = {
    "model": "attn_implementation trust_remote_code dtype",
    "data": "max_length packing",
    "training": "max_steps weight_decay max_grad_norm gradient_checkpointing gradient_accumulation_steps seed bf16 "
    "eval_steps save_steps save_total_limit logging_steps report_to",
}
CANONICAL_AT_TOP = CANONICAL | {key: f"{name}.{key}" for name, keys in FLAT.items() for key in keys.split()}

# Switches that stand for a preset: true adds it to method.name.
PRESET_OF = {"use_rslora": "rslora", "peft_use_rslora": "rslora", "use_dora": "dora", "peft_use_dora": "dora"}
PRESET_OF["load_in_4bit"] = "qlora"

SHORTHAND = {"model": "id", "method": "name", "data": "train"}  # a plain value in place of the section

HINTS = {
    "rank_pattern": "PEFT's patterns are regular expressions; write globs under `method.ranks`, such as '*.q_proj': 8",
    "alpha_pattern": "PEFT's patterns are regular expressions; write globs under `method.alphas`",
    "modules_to_save": "base weights stay frozen; the methods `bitfit` and `full` train them",
    "bias": "biases stay frozen; the method `bitfit` trains them",
    "task_type": "`task` is sft or dpo; the kind of model is read from the model",
    "fp16": "write model.dtype: float16",
    "loraplus_lr_ratio": "write method: {name: lora+, ratio: 16}",
    "eval_strategy": "evaluation runs every training.eval_steps, or once per epoch",
    "save_strategy": "checkpoints are written every training.save_steps, or once per epoch",
    "resume_from_checkpoint": "give --resume on the command line",
    "overwrite_output_dir": "give --overwrite on the command line",
    "push_to_hub": "nothing is uploaded",
    **dict.fromkeys(
        ("hf_token", "token", "api_key"), "secrets do not belong in a file that is kept; set HF_TOKEN instead"
    ),
}

_TRUE_IS = {"completion_only_loss": "completion", "assistant_only_loss": "completion"}
_TRUE_IS |= {"train_on_inputs": "all", "train_on_input": "all"}
_VALUES: dict[str, dict[Any, Any]] = {
    **{alias: {True: is_, False: "all" if is_ == "completion" else "completion"} for alias, is_ in _TRUE_IS.items()},
    "lora_target": {"all": "all-linear"},
    "lr_scheduler_type": {"constant_with_warmup": "constant"},
    "excess_length_strategy": {"raise": "error"},
}


@dataclass
class NormalisedConfig:
    """A configuration under the names of `lorary.train.config.config`, and what was said on the way.

    Args:
        tree: section -> key -> value.
        where: place of a key -> where its value was written.
        spelt: place of a key -> the name it was written under.
        flags: the switches for presets that `apply_flags` has yet to obey.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    where: dict[Place, str] = field(default_factory=dict)
    spelt: dict[Place, str] = field(default_factory=dict)
    flags: list[tuple[str, str, bool]] = field(default_factory=list)  # of PRESET_OF: name, where, value
    notes: list[str] = field(default_factory=list)
    problems: list[Diagnostic] = field(default_factory=list)

    def find(self, place: Place) -> str:
        """Where `place`, or the nearest key that holds it, was written."""
        while place and place not in self.where:
            place = place[:-1]
        return self.where.get(place, "")


def canonical(source: ParsedYaml, options: frozenset[str]) -> NormalisedConfig:
    """`source` under lorary's names; `options` are the parameters that presets have, allowed under `method`."""
    return _Translation(source, options).run()


def apply_flags(read: NormalisedConfig) -> None:
    """Let switches such as `use_rslora: true` add their preset to `method.name`, whatever that is by now."""
    for flag, where, value in read.flags:
        preset = PRESET_OF[flag]
        read.notes.append(f"`{flag}: {show(value)}` {'adds' if value else 'does not add'} `{preset}` to `method.name`")
        names = read.tree.setdefault("method", {}).get("name", ["lora"])
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        if value and isinstance(names, list) and preset not in names:
            read.tree["method"]["name"] = [*names, preset]
            place = ("method", "name", len(names))
            read.where[place], read.spelt[place] = where, flag


class _Translation:
    def __init__(self, source: ParsedYaml, options: frozenset[str]) -> None:
        self.source, self.options, self.out = source, options, NormalisedConfig()

    def run(self) -> NormalisedConfig:
        tree = self.source.tree
        if not isinstance(tree, dict):
            what = "it is empty" if tree is None else f"it holds {_kind(tree)}, not keys and values"
            self.out.problems.append(Diagnostic(self.source.where(()), what, "`lorary init` writes one to start from"))
            return self.out
        self.out.where[()] = self.source.where(())
        for key, value in tree.items():
            if key in SECTIONS and isinstance(value, dict | None):  # a section may be empty
                self.out.where[(key,)] = self.source.where((key,))
                self.out.tree.setdefault(key, {})
                for inner, inner_value in (value or {}).items():
                    self._key(key, inner, inner_value, (key, inner))
            elif key in SHORTHAND and not isinstance(value, dict):
                self._set(f"{key}.{SHORTHAND[key]}", value, (key,), key)
            else:
                self._key("", key, value, (key,))
        return self.out

    def _key(self, section: str, key: str, value: Any, place: Place) -> None:
        own = SECTIONS.get(section, {})
        to = (CANONICAL if section else CANONICAL_AT_TOP).get(key)
        if section == "method" and key == "options" and isinstance(value, dict):
            for name, option in value.items():
                self._option(name, option, (*place, name))
        elif key in own:
            self._set(f"{section}.{key}" if section else key, value, place, key)
        elif key in PRESET_OF and section in ("", "method", "model"):
            self._flag(key, place, value)
        elif to is not None and (not section or to.startswith(f"{section}.")):
            self._translate(key, to, value, place)
        elif section == "method" and key in self.options:
            self._option(key, value, place)
        else:
            self._unknown(section, key, place)

    def _translate(self, alias: str, to: str, value: Any, place: Place) -> None:
        values = _VALUES.get(alias, {})
        known = value in values if isinstance(value, str | bool) else False
        if alias in _TRUE_IS and not known:
            self._problem(place, f"`{alias}` must be true or false, not {show(value)}")
            return
        if alias == "warmup_ratio" and isinstance(value, int | float) and value >= 1:
            self._problem(place, f"`warmup_ratio` is a share of the steps and must be below 1, not {show(value)}")
            return
        if self._set(to, values[value] if known else value, place, alias):
            became = f": {values[value]}" if known else ""
            self.out.notes.append(f"`{alias}` is read as `{to}{became}`")

    def _set(self, key: str, value: Any, place: Place, spelt: str) -> bool:
        path = tuple(key.split(".", 2))
        where = self.source.where(place)
        if path in self.out.where:
            what = f"`{spelt}` and `{self.out.spelt[path]}` ({self.out.where[path]}) both set `{key}`"
            self.out.problems.append(Diagnostic(where, what, "keep one of the two"))
            return False
        if len(path) == 1 and path[0] in SECTIONS:
            what = f"`{key}` must hold keys and values, not {show(value)}"
            self.out.problems.append(Diagnostic(where, what))
            return False
        target = self.out.tree
        for part in path[:-1]:
            target = target.setdefault(part, {})
        target[path[-1]] = value
        self.out.where[path], self.out.spelt[path] = where, spelt
        for inner, mark in self.source.marks.items():
            if inner[: len(place)] == place and len(inner) > len(place):
                self.out.where[(*path, *inner[len(place) :])] = mark
        return True

    def _option(self, name: str, value: Any, place: Place) -> None:
        if name in self.options:
            self._set(f"method.options.{name}", value, place, name)
        else:
            what = f"`{name}` is not an option of any method"
            self._problem(place, what, did_you_mean(name, sorted(self.options)) if self.options else "")

    def _flag(self, flag: str, place: Place, value: Any) -> None:
        if isinstance(value, bool):
            self.out.flags.append((flag, self.source.where(place), value))
        else:
            self._problem(place, f"`{flag}` must be true or false, not {show(value)}")

    def _unknown(self, section: str, key: str, place: Place) -> None:
        what = f"unknown key `{key}`" + (f" in `{section}`" if section else "")
        self._problem(place, what, HINTS.get(key) or _home(section, key) or self._nearest(section, key))

    def _nearest(self, section: str, key: str) -> str:
        own = list(SECTIONS.get(section, {}))
        own += [alias for alias, to in CANONICAL.items() if to.startswith(f"{section}.")] if section else []
        if hint := suggestion(key, own):
            return hint
        elsewhere = {inner: name for name, keys in SECTIONS.items() if name for inner in keys} | {
            alias: to.partition(".")[0] for alias, to in CANONICAL.items() if "." in to
        }
        near = nearest(key, elsewhere, most=1)
        return (
            f"did you mean `{near[0]}`, under `{elsewhere[near[0]]}:`?"
            if near
            else did_you_mean(key, list(SECTIONS[section]))
        )

    def _problem(self, place: Place, what: str, fix: str = "") -> None:
        self.out.problems.append(Diagnostic(self.source.where(place), what, fix))


def _home(section: str, key: str) -> str:
    """Where a key that is right elsewhere belongs."""
    homes = [name for name, keys in SECTIONS.items() if key in keys]
    if not homes and key in CANONICAL:
        home, _, name = CANONICAL[key].rpartition(".")
        return f"it belongs under `{home}:`, as `{name}`" if home else f"it belongs at the top level, as `{name}`"
    if not homes:
        return ""
    return " or ".join(f"it belongs under `{name}:`" if name else "it belongs at the top level" for name in homes)


def show(value: Any) -> str:
    """A value as it would be written, kept short."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "nothing"}[value]
    if not isinstance(value, str | int | float):
        return _kind(value)
    text = f"the text {value!r}" if isinstance(value, str) else f"{value}"
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: Any) -> str:
    kinds: dict[type, str] = {dict: "keys and values", list: "a list", tuple: "a list"}
    if value is None or isinstance(value, str | int | float):
        return show(value)
    return kinds.get(type(value), f"a {type(value).__name__}")
