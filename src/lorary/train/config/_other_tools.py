"""Words of PEFT, TRL, Transformers, Axolotl, LLaMA-Factory and Unsloth: those with a meaning here, and hints.

`ALIASES` are other names of a key. `CONVERTED` values need a translation. `HINTS` say what to write instead of a key
that cannot be translated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from lorary.model.patterns import EXPRESSION, expression_error, looks_like_expression

ALIASES = {  # key -> its other names
    "task": "stage",
    "model.id": "model_name_or_path model_name base_model",
    "model.revision": "model_revision",
    "model.dtype": "torch_dtype",
    "method.r": "lora_r lora_rank rank",
    "method.alpha": "lora_alpha",
    "method.dropout": "lora_dropout",
    "method.targets": "target_modules lora_target_modules lora_target",
    "method.exclude": "exclude_modules",
    "method.train_in_full": "modules_to_save lora_modules_to_save additional_target",
    "method.layers": "layers_to_transform peft_layers_to_transform",
    "method.ranks": "rank_pattern",
    "method.alphas": "alpha_pattern",
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
    "training.dpo_beta": "beta pref_beta",
    "training.label_smoothing": "label_smoothing_factor",
    "training.schedule_options": "lr_scheduler_kwargs",
    "training.seed": "random_state",
    "output": "output_dir",
}
CANONICAL = {alias: key for key, aliases in ALIASES.items() for alias in aliases.split()}

# Keys of flat files, as TRL's, that have the same name in a section here.
FLAT = {
    "method": "r",
    "model": "attn_implementation trust_remote_code dtype",
    "data": "max_length packing",
    "training": "max_steps weight_decay max_grad_norm gradient_checkpointing gradient_accumulation_steps seed bf16 "
    "data_seed eval_steps save_steps save_total_limit logging_steps report_to adam_beta1 adam_beta2 adam_epsilon "
    "neftune_noise_alpha torch_compile early_stopping_patience",
}
CANONICAL_AT_TOP = CANONICAL | {key: f"{name}.{key}" for name, keys in FLAT.items() for key in keys.split()}

# Switches for a preset: true adds it to method.name.
PRESET_OF = {
    "use_rslora": "rslora",
    "peft_use_rslora": "rslora",
    "use_dora": "dora",
    "peft_use_dora": "dora",
    "load_in_4bit": "qlora",
    "pissa_init": "pissa",
}
# PEFT's names of starts
_STARTS: dict[Any, str] = {True: "", **{name: name for name in ("pissa", "olora", "loftq", "eva", "corda")}}
_STARTS["lora_ga"] = "lora-ga"
# Keys with a value for which a preset is added, or nothing where it is empty.
PRESET_OF_VALUE: dict[str, dict[Any, str]] = {
    "init_lora_weights": _STARTS,
    "peft_init_lora_weights": _STARTS,
    "adapter": {"lora": "", "qlora": "qlora"},
    "finetuning_type": {"lora": ""},
    "quantization_bit": {4: "qlora"},
    "peft_type": {
        **{name.upper(): name for name in ("adalora", "vera", "ia3", "hira", "miss", "loha", "lokr")},
        **{"LORA": "", "TRAINABLE_TOKENS": "rows"},
    },
    "task_type": {"CAUSAL_LM": ""},
    "bias": {"none": ""},
    **{key: {False: ""} for key in ("fp16", "fan_in_fan_out", "inference_mode", "use_liger_kernel", "group_by_length")},
}

_LOSS = {True: "completion", False: "all"}
_INVERTED = {True: "all", False: "completion"}
VALUES: dict[str, dict[Any, Any]] = {  # alias -> its values that have other names here
    "completion_only_loss": _LOSS,
    "assistant_only_loss": _LOSS,
    "train_on_inputs": _INVERTED,
    "train_on_input": _INVERTED,
    "lora_target": {"all": "all-linear"},
    "lr_scheduler_type": {"constant_with_warmup": "constant"},
    "excess_length_strategy": {"raise": "error"},
    "stage": {"pt": "sft", "rm": "reward"},
}


def _expression(value: Any) -> Any:
    """PEFT's `target_modules` as text is a regular expression for the whole path; a list holds names."""
    return f"{EXPRESSION}{value}" if isinstance(value, str) and looks_like_expression(value) else value


def _patterns(value: Any) -> Any:
    """PEFT's patterns match the end of a path, after a dot or from its start."""
    if not isinstance(value, Mapping):
        return value
    return {_suffix(key) if isinstance(key, str) else key: number for key, number in value.items()}


def _suffix(pattern: str) -> str:
    if re.fullmatch(r"[\w.]+", pattern):
        return pattern  # a name, which matches so by itself
    expression = f"{EXPRESSION}{pattern}"
    return expression if expression_error(expression) else f"{EXPRESSION}(.*\\.)?({pattern})"


CONVERTED: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_target", "exclude_modules"), _expression),
    "rank_pattern": _patterns,
    "alpha_pattern": _patterns,
}

_LAUNCH = "a run is split over processes by its launcher: docs/how-to/several-processes.md"
_NOT_NEEDED = "leave it out: "
HINTS = {  # key that cannot be translated -> what to write
    "bias": "biases stay frozen; the method `bitfit` trains them",
    "task_type": "`task` says what is trained; the kind of model comes from its own configuration",
    "num_labels": "the labels are counted in the data, or listed in data.labels",
    "reward_funcs": "write training.reward: FILE.py:FUNCTION",
    "fp16": "write model.dtype: float16",
    "loraplus_lr_ratio": "write method: {name: lora+, ratio: 16}",
    "eval_strategy": "evaluation runs every training.eval_steps, or once per epoch",
    "save_strategy": "checkpoints are written every training.save_steps, or once per epoch",
    "resume_from_checkpoint": "give --resume on the command line",
    "overwrite_output_dir": "give --overwrite on the command line",
    "push_to_hub": "nothing is uploaded",
    **dict.fromkeys(("hf_token", "token", "api_key"), "keep secrets out of files; set HF_TOKEN instead"),
    **dict.fromkeys(("deepspeed", "deepspeed_config"), f"{_LAUNCH}; DeepSpeed itself is not supported, FSDP2 is"),
    **dict.fromkeys(
        ("fsdp", "fsdp_config", "fsdp_version", "fsdp_final_state_dict_type", "ddp", "ddp_timeout", "num_processes"),
        _LAUNCH,
    ),
    **dict.fromkeys(("datasets", "dataset", "dataset_path"), "write `data.train`: a file, a Hub id, or a list of them"),
    "test_datasets": "write `data.validation`",
    "dataset_dir": "write the whole path in `data.train`",
    "max_samples": "write data.train: {path: FILE, limit: 1000}, for each source its own",
    "dataset_text_field": "write data.columns: {text: YOUR_FIELD}",
    "field_messages": "write data.columns: {messages: YOUR_FIELD}",
    "template": "the tokenizer's own chat template is used; data.chat_template names another one",
    **dict.fromkeys(("load_in_8bit", "quantization"), "method: qlora keeps the base in 4 bits"),
    "double_quantization": "it is always on with qlora",
    "lora_target_linear": "write method.targets: all-linear",
    "lora_query": "write method.targets: [q_proj, v_proj]",
    "layers_pattern": "name the stack in method.layers, as in {model.layers: 0-3}",
    "fan_in_fan_out": f"{_NOT_NEEDED}the layer's kind is read from the model",
    "lora_bias": "write method.options: {lora_bias: true}",
    "target_parameters": "write the parameters' names into method.targets: [experts.gate_up_proj, experts.down_proj]",
    "alora_invocation_tokens": 'write method: alora, with method.options: {invocation: "<answer>"}',
    "ensure_weight_tying": f"{_NOT_NEEDED}tied ends stay tied where both have the same update",
    "loftq_config": "write method: loftq, with method.options: {rounds: 5}",
    "eva_config": "write method: eva, with method.options: {rho: 2.0, whiten: false}",
    "corda_config": "write method: corda, with method.options: {mode: knowledge}",
    "lora_ga_config": "write method: lora-ga, with method.options: {gamma: 16}",
    "token_indices": "write method.options: {tokens: [17]}",
    "trainable_token_indices": "write method.also: [{name: rows, targets: vocabulary, options: {tokens: [17]}}]",
    "layer_replication": "the base keeps its layers",
    **dict.fromkeys(
        ("init_lora_weights", "peft_init_lora_weights"),
        "a start is a method: pissa (with niter: 16 for a fast decomposition), olora, loftq, lora-ga, eva or corda; "
        "the default is LoRA's own",
    ),
    "peft_type": "`lorary methods` lists the methods; write method.name",
    "adapter": "write method.name: lora, qlora or another of `lorary methods`",
    "finetuning_type": "write method.name: lora, full or bitfit",
    "quantization_bit": "method: qlora keeps the base in 4 bits",
    "inference_mode": f"{_NOT_NEEDED}this is a training run",
    **dict.fromkeys(("model_type", "tokenizer_type"), f"{_NOT_NEEDED}the model's own configuration names its classes"),
    "strict": f"{_NOT_NEEDED}a configuration is always read strictly",
    "lora_model_dir": "write model: {id: BASE, adapter: FOLDER}",
    "special_tokens": "a tokenizer is used as it is: save one with your tokens in the model's folder",
    "eval_sample_packing": f"{_NOT_NEEDED}data.packing packs the training rows",
    "save_only_model": f"{_NOT_NEEDED}a checkpoint holds the state of the run, without the base",
    "use_peft": f"{_NOT_NEEDED}an adapter is always trained",
    "pissa_iter": "write method: {name: pissa, niter: 16}",
    "loraplus_lr_embedding": "embeddings train at training.lr times lora+'s ratio",
    "use_liger_kernel": "Liger's fused loss reads the head's weight past an adapter; lorary's own loss keeps the "
    "logits out of memory without it",
    "liger_kernel": "Liger is not supported; see `use_liger_kernel`",
    "group_by_length": "write data.packing: true, which leaves no padding",
    "train_sampling_strategy": "rows are shuffled by training.seed; data.packing leaves no padding",
    **dict.fromkeys(("pure_bf16", "bfloat16"), "write model.dtype: bfloat16, or training.bf16: true"),
    "fp16_full_eval": "write model.dtype: float16",
    "tf32": "set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 in the environment",
    "optim_args": "write training.optimizer_options: {name: value}",
    "torch_compile_backend": "write training.torch_compile: true; the backend is inductor",
    **dict.fromkeys(("flash_attn", "flash_attention"), "write model.attn_implementation: flash_attention_2"),
    "xformers_attention": "write model.attn_implementation: sdpa",
    **dict.fromkeys(("s2_attention", "shift_attn"), "write method: longlora"),
    "use_gradient_checkpointing": "write training.gradient_checkpointing: true",
    "gradient_checkpointing_kwargs": "write training.gradient_checkpointing: true",
    **dict.fromkeys(("evals_per_epoch", "saves_per_epoch"), "write training.eval_steps or training.save_steps"),
    "evaluation_strategy": "evaluation runs every training.eval_steps, or once per epoch",
    "early_stopping_steps": "write training.early_stopping_patience, a number of evaluations",
    "metric_for_best_model": f"{_NOT_NEEDED}it is the evaluation loss",
    "wandb_entity": "set WANDB_ENTITY in the environment",
    "wandb_project": "write training.report_to: wandb, and set WANDB_PROJECT in the environment",
    "logging_dir": f"{_NOT_NEEDED}everything is written below `output`",
    "plot_loss": f"{_NOT_NEEDED}the loss is always plotted",
    **dict.fromkeys(
        ("overwrite_cache", "preprocessing_num_workers", "dataset_num_proc"), f"{_NOT_NEEDED}no cache is kept"
    ),
    "dataset_prepared_path": f"{_NOT_NEEDED}no cache is kept",
    **dict.fromkeys(
        ("do_train", "do_eval"), f"{_NOT_NEEDED}`lorary train` trains, and evaluates if there is held-out data"
    ),
    **dict.fromkeys(("hub_model_id", "hub_strategy"), "nothing is uploaded"),
    "loss_type": "the loss is the task's own",
    **dict.fromkeys(
        ("pad_to_sequence_len", "pad_to_multiple_of"), f"{_NOT_NEEDED}rows are padded to the longest of a batch"
    ),
    "num_workers": f"{_NOT_NEEDED}rows are tokenised before the first step",
}
