"""Sequence packing: several examples in one row, isolated from each other."""

from __future__ import annotations

from typing import Any

import torch

from lorary.errors import Diagnostic, TrainingError
from lorary.layers.transformers_internals import attention_of


@torch.no_grad()
def check_packing(model: Any, collate: Any) -> None:
    """Refuse a model that does not isolate the examples of a packed row.

    Two examples in one row must have the same logits as alone. Whether they do depends on the model's code and its
    attention kernel; a model that mixes them trains without an error, on the contents of other examples.

    Args:
        model: a causal language model.
        collate: the data collator of training.

    Raises:
        TrainingError: the second example attends to the first.
    """
    vocabulary = model.config.get_text_config().vocab_size
    first, second = ([(7 * i + start) % vocabulary for i in range(n)] for start, n in ((3, 9), (11, 12)))
    row = {"input_ids": first + second, "labels": first + second, "seq_lengths": [len(first), len(second)]}
    batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in collate([row]).items() if k != "labels"}
    mode = model.training
    model.eval()
    try:
        together = model(**batch, use_cache=False).logits[0, len(first) :].float()
        alone = model(input_ids=torch.tensor([second], device=model.device), use_cache=False).logits[0].float()
    finally:
        model.train(mode)
    difference = float((together - alone).abs().max() / alone.abs().max())
    exact = model.dtype in (torch.float32, torch.float64)
    if not difference <= (1e-3 if exact else 5e-2):  # also refuses NaN
        kernel = attention_of(model.config)
        what = f"packed examples of {type(model).__name__} attend to each other ({kernel} attention)"
        fix = "set data.packing: false, or model.attn_implementation: flash_attention_2"
        raise TrainingError("this model cannot train on packed rows:", [Diagnostic("data.packing", what, fix)])
