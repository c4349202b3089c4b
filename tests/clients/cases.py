"""Random bases, adapters of several methods on them, and what Transformers and lorary compute: what a client must do.

Written in lorary's environment, read in the client's, which has no lorary.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROMPT = [7, 3, 11, 2, 19, 5]
STEPS = 12
LIST = "cases.json"

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}


def base(model_type: str, folder: Path, **changes: Any) -> Any:
    """A random model of a type, saved in `folder`, with numbers far enough from zero that every layer matters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.float().eval().save_pretrained(folder)
    return model


def prepared(base: Path, methods: tuple[str, ...], folder: Path, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The model in `base`, an adapter of it, which is saved in `folder`, and what a client must compute with both."""
    import torch
    from transformers import AutoModelForCausalLM

    import lorary

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted(model, methods, folder, **options)
    want = expected(model)
    adapter = lorary.Adapter.of(model)
    return lorary.detach(model), adapter, want


def adapted(model: Any, methods: tuple[str, ...], folder: Path, **options: Any) -> None:
    """Attach an adapter of a method to a model, with numbers in every trained tensor, and save it in `folder`."""
    import torch

    import lorary

    where = {key: options.pop(key) for key in ("targets", "ranks") if key in options}
    method = lorary.method(*methods, **options)
    if "longlora" in methods:  # which trains embeddings and norms in full, as no adapter elsewhere can
        method = method.replace(full=())
    lorary.attach(model, lorary.plan(model, method, **where))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    lorary.save(model, folder)


def expected(model: Any) -> dict[str, Any]:
    """The greedy tokens after the prompt, and the logits of the first of them."""
    import torch

    model.eval()
    tokens, first = list(PROMPT), None
    with torch.no_grad():
        for _ in range(STEPS):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
            first = logits if first is None else first
            tokens.append(int(logits.argmax()))
    return {"tokens": tokens[len(PROMPT) :], "logits": first.tolist()}


def write(folder: Path, cases: list[dict[str, Any]]) -> None:
    """Write the list of cases, whose paths are relative to `folder`."""
    (folder / LIST).write_text(json.dumps(cases), encoding="utf-8")
    print(f"{len(cases)} cases in {folder}")


def read(folder: Path) -> list[dict[str, Any]]:
    """The list of cases."""
    found: list[dict[str, Any]] = json.loads((folder / LIST).read_text(encoding="utf-8"))
    return found


def report(case: Mapping[str, Any], tokens: list[int], error: float, moved: float) -> bool:
    """Print one row, and say whether it is right: the same tokens, with an error far below what the adapter changes.

    Args:
        case: of the list.
        tokens: the client's greedy tokens.
        error: of its logits, relative to the largest one.
        moved: the same difference of the base alone, which a client that ignores the adapter would show.
    """
    right = tokens == case["tokens"] and error < (1e-3 if "base" in case else moved / 100)
    row = f"{'ok' if right else 'WRONG':6}{case['case']:40} error {error:7.1e}  adapter moves {moved:7.1e}"
    print(row + ("" if right else f"  {tokens} for {case['tokens']}"), flush=True)
    return right


def finish(rights: list[bool]) -> None:
    """End the script: with an error if any case is wrong."""
    print(f"{sum(rights)} of {len(rights)} right")
    sys.exit(0 if rights and all(rights) else 1)
