"""Optimizers and schedules by Transformers' names: which ones an adapter can train with, and their options.

The tables stand here and not in a query to Transformers, whose import takes longer than reading a configuration.
`tests/train/config/test_optimization.py` compares them with the installed version.
"""

from __future__ import annotations

import importlib
import inspect

_BNB = "bitsandbytes.optim:"
# name -> its class; `paged_adamw` is lorary's own name of paged_adamw_32bit
OPTIMIZERS = {
    "adamw_torch": "torch.optim:AdamW",
    "adamw_torch_fused": "torch.optim:AdamW",
    "adafactor": "transformers:Adafactor",
    "sgd": "torch.optim:SGD",
    "adagrad": "torch.optim:Adagrad",
    "rmsprop": "torch.optim:RMSprop",
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw", "paged_adamw_32bit"), f"{_BNB}AdamW"),
    "paged_adamw_8bit": f"{_BNB}AdamW",
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), f"{_BNB}AdEMAMix"),
    **dict.fromkeys(("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"), f"{_BNB}Lion"),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), f"{_BNB}RMSprop"),
}

_OWN_GROUPS = "it makes its own parameter groups, and the method's learning rates would be lost"
_ELSEWHERE = "it is in a package of its own, with which lorary is not tested"
# Transformers' other optimizers -> why an adapter does not train with them
REFUSED_OPTIMIZERS = {
    **dict.fromkeys(
        ("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw"),
        "it saves memory on the gradients of whole weight matrices, and an adapter has none",
    ),
    **dict.fromkeys(
        ("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"), _OWN_GROUPS
    ),
    "apollo_adamw_layerwise": _OWN_GROUPS,
    **dict.fromkeys(("lomo", "adalomo"), "it steps during the backward pass, before gradients are checked and clipped"),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "torchao's state cannot be put into a checkpoint"),
    "adamw_torch_xla": "it is for TPUs",
    "adamw_torch_npu_fused": "it is for NPUs",
    **dict.fromkeys(("adamw_anyprecision", "grokadamw", "stable_adamw"), _ELSEWHERE),
    **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), _ELSEWHERE),
}

# schedule -> its options; `constant` has a warmup here, as `constant_with_warmup`
SCHEDULES: dict[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "linear": (),
    "constant": (),
    "constant_with_warmup": (),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
    "reduce_lr_on_plateau": ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps"),
}
REFUSED_SCHEDULES = {"greedy": "it follows single evaluations up and down; use reduce_lr_on_plateau"}

SET_ELSEWHERE = {  # options of optimizers that are keys of their own here, or that Transformers sets
    "lr": "training.lr",
    "weight_decay": "training.weight_decay",
    "betas": "training.adam_beta1 and training.adam_beta2",
    **dict.fromkeys(("eps", "beta1"), "training.adam_epsilon or the optimizer's name"),
    **dict.fromkeys(("optim_bits", "is_paged", "fused", "relative_step", "warmup_init"), "the optimizer's name"),
    **dict.fromkeys(("params", "foreach", "maximize", "capturable", "differentiable", "args"), ""),
}


def adam_keys(optimizer: str) -> tuple[str, ...]:
    """The keys `adam_beta1`, `adam_beta2` and `adam_epsilon` that an optimizer uses."""
    name = OPTIMIZERS.get(optimizer, "").rpartition(":")[2]
    betas = ("adam_beta1", "adam_beta2")
    return {"AdamW": (*betas, "adam_epsilon"), "AdEMAMix": (*betas, "adam_epsilon"), "Lion": betas}.get(name, ())


def optimizer_options(optimizer: str) -> list[str]:
    """The names that `optimizer_options` may hold: the parameters of the optimizer's class."""
    module, _, name = OPTIMIZERS[optimizer].partition(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    elsewhere = {*SET_ELSEWHERE, "percentile_clipping"}
    if not adam_keys(optimizer):
        elsewhere.remove("eps")  # Adafactor's and RMSprop's eps are options
    return [key for key in parameters if key not in elsewhere]
