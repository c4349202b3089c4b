"""The built-in base as a folder: bf16 weights, tokenizer, card and report, each file replaced atomically."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CARD = """---
license: apache-2.0
language: [code]
pipeline_tag: text-generation
tags: [llama, lorary]
---

# The built-in base of lorary

A Llama-architecture language model of {millions:.2f} M parameters with its own byte-level BPE tokenizer of {vocabulary}
tokens, trained by `scripts/train_base.py` on the source of Python {python}'s standard library (tests and tables left
out, one file in nine held out). It is here so that every example, test and benchmark of lorary runs without a network,
on a real model that really gets better when it is adapted. It is no assistant and no code completer.

| held out | nats per token | nats per byte |
|---|---|---|
{losses}

- Training: {tokens:,} tokens in {steps:,} steps of {batch} × {context}; Muon for the matrices, AdamW for the
  rest. It took {minutes:.0f} minutes ({cpu_minutes:.0f} CPU-minutes).
- Context: {context} tokens. Weights: bf16, trained in fp32; the figures above are of the rounded weights.
- `<|bos|>` begins a document or a conversation, `<|eos|>` ends a document and what the assistant says. The tokenizer
  adds neither by itself. Two in a hundred training tokens were conversations (a signature, the first line of its
  docstring).
- Everything that decides the result, the versions and the hash of the corpus: `report.json`.

The text it learned from, the standard library, is © Python Software Foundation and others, under the PSF licence.
"""


def rounded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of `model` in fp32 whose weights are those that bf16 keeps: what the folder will hold."""
    return copy.deepcopy(model).to(torch.bfloat16).float().eval()


def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, report: dict[str, Any], folder: Path) -> None:
    """Write the model into `folder`. A reader finds the old file or the new one, never half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".model-") as made:
        partial = Path(made)
        half = copy.deepcopy(model).to(torch.bfloat16)
        special = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        half.generation_config = GenerationConfig(**special, do_sample=False, max_new_tokens=64)
        half.save_pretrained(partial)
        _tokenizer(tokenizer, partial)
        (partial / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (partial / "README.md").write_text(_card(report))
        for file in sorted(partial.iterdir()):
            file.chmod(0o644)
            os.replace(file, folder / file.name)


def _tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save it under the class name that every release of Transformers knows, without notes on where it was read."""
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {k: v for k, v in config.items() if k not in ("is_local", "local_files_only", "backend")}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(kept, indent=2) + "\n")


def _card(report: dict[str, Any]) -> str:
    rows = [
        f"| {domain} | {loss['nats_per_token']:.3f} | {loss['nats_per_byte']:.3f} |"
        for domain, loss in report["held_out"].items()
    ]
    recipe = report["recipe"]
    return CARD.format(
        millions=report["parameters"] / 1e6,
        vocabulary=recipe["vocabulary"],
        python=report["corpus"]["python"],
        losses="\n".join(rows),
        tokens=report["tokens_seen"],
        steps=report["steps"],
        batch=recipe["batch"],
        context=recipe["context"],
        minutes=report["wall_seconds"] / 60,
        cpu_minutes=report["cpu_seconds"] / 60,
    )
