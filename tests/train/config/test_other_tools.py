"""Other tools' words: PEFT's keys with PEFT's meaning, a row for each in the docs, and a hint for every other word."""

# ruff: noqa: E501 (messages stand here as they are printed)

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from typer.testing import CliRunner

from lorary.cli import app
from lorary.errors import ConfigError, Diagnostic, LoraryError, PlanError, folded, independent
from lorary.model.scan import scan
from lorary.train.config._aliases import CANONICAL, HINTS
from lorary.train.config.config import SECTIONS
from lorary.train.config.load import from_dict, load
from lorary.train.config.summary import summary
from lorary.train.runner.prepare import prepare
from tests import tiny

ROOT = Path(__file__).parents[3]
LEAST = {"model": "builtin:base", "data": "builtin:docstrings"}


# --- PEFT ------------------------------------------------------------------------------------------------------------


def test_every_field_of_peft_s_configuration_has_a_row_in_the_docs() -> None:
    page = (ROOT / "docs" / "how-to" / "migrate-from-peft.md").read_text().partition("## Every key of LoraConfig")[2]
    named = set(re.findall(r"`(\w+)`", page))
    assert {field.name for field in dataclasses.fields(LoraConfig)} - named == set()


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": r".*layers\.[02]\..*(q|v)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 2]},
        {"target_modules": ["q_proj", "mlp.up_proj"], "exclude_modules": r".*\.3\..*"},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ],
)
def test_keys_of_peft_name_the_same_layers(keys: dict[str, Any]) -> None:
    model = tiny.llama(num_hidden_layers=4)
    theirs = [path for path in scan(model).layers if _found(keys, path)]
    assert theirs
    for section in ({"method": keys}, keys):
        assert [p.site.name for p in from_dict(LEAST | section).method.plan(model).sites] == theirs


def _found(keys: dict[str, Any], path: str) -> bool:
    found = check_target_module_exists(LoraConfig(**keys), path)
    return bool(found) and type(found).__name__ != "_ExcludedModule"


def test_patterns_of_peft_give_the_same_ranks() -> None:
    model = tiny.llama(num_hidden_layers=4)
    ranks = {
        r"layers\.[01]\.self_attn\.q_proj": 3,
        "up_proj": 5,
        "^model.layers.2.*k_proj": 7,
        r"\d\.self_attn\.v_proj": 9,
    }
    plan = from_dict(LEAST | {"rank_pattern": ranks, "lora_r": 4, "alpha_pattern": {".*down_proj": 2}}).method.plan(
        model
    )
    for p in plan.sites:
        key = get_pattern_key(list(ranks), p.site.name)
        assert p.r == ranks.get(key, 4), p.site.name
        assert p.alpha == (2 if p.site.name.endswith("down_proj") else 32)
    assert {p.r for p in plan.sites} == {3, 4, 5, 7, 9}


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"init_lora_weights": "pissa"}, "method.name", ("lora", "pissa")),
        ({"init_lora_weights": "lora_ga"}, "method.name", ("lora", "lora-ga")),
        ({"init_lora_weights": True}, "method.name", ("lora",)),
        ({"method": {"bias": "none", "task_type": "CAUSAL_LM", "peft_type": "LORA"}}, "method.name", ("lora",)),
        ({"peft_type": "LOHA"}, "method.name", ("lora", "loha")),
        ({"peft_type": "LOKR"}, "method.name", ("lora", "lokr")),
        ({"peft_type": "TRAINABLE_TOKENS", "method": {"options": {"tokens": [17]}}}, "method.name", ("lora", "rows")),
        ({"adapter": "qlora"}, "method.name", ("lora", "qlora")),
        ({"quantization_bit": 4, "stage": "dpo"}, "method.name", ("lora", "qlora")),
        ({"stage": "pt"}, "task", "sft"),
        ({"random_state": 7}, "training.seed", 7),
        ({"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5}, "training.label_smoothing", 0.1),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
            "training.schedule",
            "cosine_with_min_lr",
        ),
        ({"method": {"targets": "re:.*_proj{1,2}"}}, "method.targets", ("re:.*_proj{1,2}",)),
        ({"method": {"layers": [0, "2-3"]}}, "method.layers", "0,2-3"),
    ],
)
def test_familiar_words_are_read(given: dict[str, Any], key: str, value: Any) -> None:
    found: Any = from_dict(LEAST | given)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_no_hint_hides_an_alias() -> None:
    assert HINTS.keys() & CANONICAL.keys() == set()


# --- bad words -------------------------------------------------------------------------------------------------------

# (section and keys, what is said of them)
WORDS: list[tuple[dict[str, Any], str]] = [
    ({"method": {"target": "q_proj"}}, "method.target: `target` is not an option of lora\n      hint: did you mean `targets`? (`target` is an option of adalora)"),
    ({"method": {"rnak": 8}}, "method.rnak: unknown key `rnak` in `method`\n      hint: did you mean `r`?"),
    ({"rnak": 8}, "rnak: unknown key `rnak`\n      hint: did you mean `r`, under `method:`?"),
    ({"training": {"rank": 8}}, "training.rank: unknown key `rank` in `training`\n      hint: it belongs under `method:`, as `r`"),
    ({"method": {"lora_alhpa": 8}}, "method.lora_alhpa: unknown key `lora_alhpa` in `method`\n      hint: did you mean `alpha`?"),
    ({"datasets": [{"path": "a"}]}, "datasets: unknown key `datasets`\n      hint: write `data.train`: a file, a Hub id, or a list of them"),
    ({"deepspeed": "zero3.json"}, "deepspeed: unknown key `deepspeed`\n      hint: a run is split over processes by its launcher: docs/how-to/several-processes.md; DeepSpeed itself is not supported, FSDP2 is"),
    ({"training": {"fsdp": "full_shard"}}, "training.fsdp: unknown key `fsdp` in `training`\n      hint: a run is split over processes by its launcher: docs/how-to/several-processes.md"),
    ({"training": {"use_liger_kernel": True}}, "training.use_liger_kernel: unknown key `use_liger_kernel` in `training`\n      hint: Liger's fused loss reads the head's weight past an adapter; lorary's own loss keeps the logits out of memory without it"),
    ({"training": {"group_by_length": True}}, "training.group_by_length: unknown key `group_by_length` in `training`\n      hint: write data.packing: true, which leaves no padding"),
    ({"load_in_8bit": True}, "load_in_8bit: unknown key `load_in_8bit`\n      hint: method: qlora keeps the base in 4 bits"),
    ({"template": "llama3"}, "template: unknown key `template`\n      hint: the tokenizer's own chat template is used; data.chat_template names another one"),
    ({"target_parameters": ["experts.down_proj"]}, "target_parameters: unknown key `target_parameters`\n      hint: write the parameters' names into method.targets: [experts.gate_up_proj, experts.down_proj]"),
    ({"method": {"alora_invocation_tokens": [5]}}, "method.alora_invocation_tokens: unknown key `alora_invocation_tokens` in `method`\n      hint: write method: alora, with method.options: {invocation: \"<answer>\"}"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying: unknown key `ensure_weight_tying`\n      hint: leave it out: tied ends stay tied where both have the same update"),
    ({"token_indices": [17]}, "token_indices: unknown key `token_indices`\n      hint: write method.options: {tokens: [17]}"),
    ({"loftq_config": {}}, "loftq_config: unknown key `loftq_config`\n      hint: write method: loftq, with method.options: {rounds: 5}"),
    ({"eva_config": {}}, "eva_config: unknown key `eva_config`\n      hint: write method: eva, with method.options: {rho: 2.0, whiten: false}"),
    ({"corda_config": {}}, "corda_config: unknown key `corda_config`\n      hint: write method: corda, with method.options: {mode: knowledge}"),
    ({"lora_ga_config": {}}, "lora_ga_config: unknown key `lora_ga_config`\n      hint: write method: lora-ga, with method.options: {gamma: 16}"),
    ({"lora_target_linear": True}, "lora_target_linear: unknown key `lora_target_linear`\n      hint: write method.targets: all-linear"),
    ({"method": {"layers_pattern": "layers"}}, "method.layers_pattern: unknown key `layers_pattern` in `method`\n      hint: name the stack in method.layers, as in {model.layers: 0-3}"),
    ({"init_lora_weights": "orthogonal"}, "init_lora_weights: unknown key `init_lora_weights`\n      hint: a start is a method: pissa (with niter: 16 for a fast decomposition), olora, loftq, lora-ga, eva or corda; the default is LoRA's own"),
    ({"finetuning_type": "freeze"}, "finetuning_type: unknown key `finetuning_type`\n      hint: write method.name: lora, full or bitfit"),
    ({"flash_attention": True}, "flash_attention: unknown key `flash_attention`\n      hint: write model.attn_implementation: flash_attention_2"),
    ({"training": {"tf32": True}}, "training.tf32: unknown key `tf32` in `training`\n      hint: set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 in the environment"),
    ({"training": {"optim_args": "a=1"}}, "training.optim_args: unknown key `optim_args` in `training`\n      hint: write training.optimizer_options: {name: value}"),
    ({"model_type": "AutoModelForCausalLM"}, "model_type: unknown key `model_type`\n      hint: leave it out: the model's own configuration names its classes"),
    ({"special_tokens": {"pad_token": "<pad>"}}, "special_tokens: unknown key `special_tokens`\n      hint: a tokenizer is used as it is: save one with your tokens in the model's folder"),
    ({"lora_model_dir": "mine"}, "lora_model_dir: unknown key `lora_model_dir`\n      hint: write model: {id: BASE, adapter: FOLDER}"),
    ({"max_samples": 9}, "max_samples: unknown key `max_samples`\n      hint: write data.train: {path: FILE, limit: 1000}, for each source its own"),
    ({"wandb_project": "mine"}, "wandb_project: unknown key `wandb_project`\n      hint: write training.report_to: wandb, and set WANDB_PROJECT in the environment"),
    ({"evals_per_epoch": 4}, "evals_per_epoch: unknown key `evals_per_epoch`\n      hint: write training.eval_steps or training.save_steps"),
    ({"method": {"layers": "first"}}, "method.layers: `layers` holds `first`: write numbers and ranges, such as 0-15 or 0-3,8,-1"),
    ({"method": {"layers": {}}}, "method.layers: `layers` names no stack of layers"),
    ({"method": {"targets": ["q_proj", "re:("]}}, "method.targets.1: `method.targets[1]` is not a regular expression: missing ), unterminated subpattern at position 0"),
    ({"method": {"exclude": "re:(?i)q"}}, "method.exclude: `method.exclude[0]` is a regular expression that is not accepted: flags inside a pattern are not supported"),
    ({"method": {"ranks": {"re:*": 3}}}, "method.ranks.re:*: `method.ranks['re:*']` is not a regular expression: nothing to repeat at position 0"),
    ({"task": "dpo", "training": {"label_smoothing": 0.1}}, "training.label_smoothing: `training.label_smoothing`: has no effect when task is `dpo`, whose loss is not a cross-entropy\n      hint: remove it"),
    ({"training": {"optimizer": "adamw"}}, "training.optimizer: `optimizer` is 'adamw', which is not a name that Transformers knows\n      hint: did you mean `adamw_torch`?"),
    ({"training": {"optimizer": "galore_adamw"}}, "training.optimizer: `optimizer` cannot be galore_adamw: it saves memory on the gradients of whole weight matrices, and an adapter has none"),
    ({"training": {"schedule": "wsd"}}, "training.schedule: `schedule` is 'wsd', which is not a name that Transformers knows\n      hint: known: constant, constant_with_warmup, cosine, cosine_warmup_with_min_lr, cosine_with_min_lr, cosine_with_restarts, inverse_sqrt, linear, polynomial, reduce_lr_on_plateau, warmup_stable_decay"),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "message"), WORDS, ids=lambda value: str(value)[:40])
def test_a_wrong_word_is_answered_with_the_word_of_its_place(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        from_dict(LEAST | tree)
    assert str(refusal.value) == f"invalid configuration:\n  - {message}"


def test_every_kind_of_mistake_is_told_in_one_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}\n")
    Path("train.yaml").write_text("""\
model: builtin:base
task: sft
data: {train: rows.json, packing: maybe}
method: {name: [lora, rslorra], r: 0, layers: x}
training: {lr: 10, dpo_beta: 0.1, optimizer: sgd, adam_beta1: 0.5, sed: 1}
output: /
""")
    with pytest.raises(ConfigError) as refusal:
        load("train.yaml")
    assert (
        str(refusal.value)
        == """\
invalid configuration train.yaml:
  - train.yaml:3:8: `data.train`: there is no file rows.json
      hint: did you mean `rows.jsonl`?
  - train.yaml:3:26: `packing` must be true or false, not the text 'maybe'
  - train.yaml:4:23: `rslorra` is not a method that lorary knows
      hint: did you mean `rslora` or `lora` or `qlora`?
  - train.yaml:4:33: `r` must be at least 1, not 0
  - train.yaml:4:39: `layers` holds `x`: write numbers and ranges, such as 0-15 or 0-3,8,-1
  - train.yaml:5:12: `lr` must be at most 1, not 10
  - train.yaml:5:20: `training.dpo_beta`: has no effect when task is `sft`
      hint: remove it, or set task: dpo
  - train.yaml:5:51: `training.adam_beta1`: has no effect: sgd does not use it
      hint: remove it
  - train.yaml:5:68: unknown key `sed` in `training`
      hint: did you mean `seed`?
  - train.yaml:6:1: `output`: `/` is the root, home or working folder
      hint: name a folder of its own, such as runs/first"""
    )


def test_a_check_that_needs_an_invalid_value_says_nothing() -> None:
    with pytest.raises(ConfigError) as refusal:
        from_dict(
            {
                "model": "builtin:base",
                "data": {"train": "builtin:docstrings", "validation": 3},
                "training": {"keep_best": True},
            }
        )
    assert str(refusal.value) == "invalid configuration:\n  - data.validation: `validation` must be a list, not 3"


@pytest.mark.parametrize("section", ["training", "model", "method", "data"])
def test_an_empty_section_is_not_an_override(section: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        from_dict(LEAST, [f"{section}="])
    first = next(iter(SECTIONS[section]))
    assert str(refusal.value) == (
        f"cannot read the overrides:\n  - --set {section}: `{section}` is a section, and no value is given\n"
        f"      hint: name a key of it, such as --set {section}.{first}=VALUE"
    )


# --- a command's own words -------------------------------------------------------------------------------------------


def answer(*arguments: str) -> str:
    """The error of a command."""
    result = CliRunner().invoke(app(), list(arguments))
    assert isinstance(result.exception, LoraryError), result.output
    return str(result.exception)


def test_a_flag_is_named_where_its_value_is_wrong() -> None:
    said = answer(
        "plan", "builtin:base", "--rank", "0", "--layers", "x", "--method", "lorra", "--set", "training.lr=10"
    )
    assert (
        said
        == """\
invalid configuration:
  - --r: `r` must be at least 1, not 0
  - --layers: `layers` holds `x`: write numbers and ranges, such as 0-15 or 0-3,8,-1
  - --set training.lr: `lr` must be at most 1, not 10
  - --method: `lorra` is not a method that lorary knows
      hint: did you mean `lora` or `qlora` or `olora`?"""
    )


def test_an_error_of_the_plan_names_the_flag_or_the_key(tmp_path: Path) -> None:
    said = answer("plan", "builtin:base", "--targets", "q_porj", "--exclude", "nothing")
    assert "\n  - --targets: `q_porj` matches no layer\n      hint: did you mean `q_proj` or" in said
    assert "\n  - --exclude: `nothing` matches no layer" in said
    file = tmp_path / "my.yaml"
    file.write_text("model: builtin:base\ndata: builtin:docstrings\nmethod:\n  targets: q_porj\n")
    with pytest.raises(PlanError) as refusal:
        prepare(load(file))
    assert "\n  - my.yaml:4:3: `targets`: `q_porj` matches no layer\n" in str(refusal.value)
    file.write_text("model: builtin:base\ndata: builtin:docstrings\nmethod:\n  layers: 0-40\n")
    with pytest.raises(
        PlanError, match=r"my\.yaml:4:3: `layers`: `0-40` is not in `model\.layers`, which has the layers"
    ):
        prepare(load(file))


def test_a_bad_target_and_a_missing_file_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as refusal:
        prepare(
            from_dict({"model": "builtin:base", "method": {"targets": "q_porj"}, "data": str(tmp_path / "no.jsonl")})
        )
    assert str(refusal.value).endswith(f"\n  - cannot read {tmp_path / 'no.jsonl'}: there is no such file or folder")


# --- folded ----------------------------------------------------------------------------------------------------------


def test_many_problems_alike_are_folded() -> None:
    problems = [Diagnostic(f"model.layers.{i}.q_proj", f"rank {i} is odd", "use an even one") for i in range(50)]
    lines = str(PlanError("invalid plan:", [*problems, Diagnostic("ranks", "another")])).splitlines()
    assert len(lines) == 1 + 2 * 6 + 1 + 1
    assert lines[-2:] == ["  - ... and 44 more like it", "  - ranks: another"]
    assert len(folded(problems[:8])) == 8, "a few are all shown"
    assert len(PlanError("invalid plan:", problems).problems) == 50, "none is lost"
    names = [f"layers.{i}.{name}" for i in range(32) for name in ("q_proj", "k_proj", "mlp.up_proj")]
    assert len(folded([Diagnostic(name, "is too small", "") for name in names])) == 7, "whatever their names"
    words = [Diagnostic(f"my.yaml:{i}:3", f"unknown key `{word}`") for i, word in enumerate("abcdefghij")]
    assert len(folded(words)) == 10, "other words are other mistakes"


def test_independent_steps_report_both() -> None:
    def fails(text: str) -> Any:
        raise PlanError(f"{text}:", [Diagnostic("", "no")])

    assert independent(lambda: 1, lambda: "a") == (1, "a")
    with pytest.raises(PlanError, match=r"^one:\n  - no\n  - two: no$"):
        independent(lambda: fails("one"), lambda: fails("two"))
    with pytest.raises(PlanError, match=r"^one:\n  - no$"):
        independent(lambda: fails("one"), lambda: 1)


def test_a_dry_run_shows_what_was_set_and_what_was_chosen() -> None:
    given = from_dict(
        LEAST | {"method": {"r": 8}, "training": {"keep_best": True, "eval_steps": 5}, "val_set_size": 0.1}
    )
    text = summary(given, given.resolve())
    shown = text.splitlines()
    assert "  r: 8" in shown
    assert "  eval_steps: 5" in shown
    assert {"# chosen:", "# training.save_steps: 5", "# training.lr: 0.0002", "# method.targets: all-linear"} <= set(
        shown
    )
    assert not [line for line in shown if "weight_decay" in line or line.startswith("output")]
    assert re.fullmatch(r"# \d+ other keys keep their defaults \(--all\)", shown[-1])
    again = from_dict(yaml.safe_load(text))
    assert again.method.r == 8


def test_the_rank_of_a_flat_file() -> None:
    assert from_dict({**LEAST, "r": 8}).method.r == 8
