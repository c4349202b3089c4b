"""Train the built-in base: a 3 M-parameter Llama on the Python standard library's source.

    python scripts/train_base.py            # under an hour on two cores; a second call goes on where it was killed

It learns a byte-level BPE tokenizer on the training files, then the model, and writes both to
src/lorary/builtin/model, with a card and a report of what was measured. A checkpoint every hundred steps makes a kill
cost little; the data order is a function of the seed and the epoch alone, so a resumed run sees the same batches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import LlamaForCausalLM

import base_data
import base_export
import muon
from base_data import batches, documents_of, tokenizer_for
from base_recipe import Recipe, config, share_of_lr

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent / "src" / "lorary" / "builtin" / "model"
DOMAINS = {"code": "builtin:python", "c-headers": "builtin:c-headers", "topics": "builtin:topics"}
console = Console()


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    recipe = Recipe(**{k: v for k, v in {"steps": args.steps, "seed": args.seed}.items() if v is not None})
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_for(args.work, recipe)
    documents, corpus_hash = documents_of(tokenizer, recipe)
    held_out = {domain: base_data.held_out(tokenizer, name, recipe) for domain, name in DOMAINS.items()}
    per_epoch = sum(map(len, documents))
    console.print(f"{per_epoch:,} training tokens, {recipe.steps * recipe.batch * recipe.context:,} will be seen")
    run = Run(recipe, args.work / "checkpoint.pt", compiled=args.compile)
    facts = {
        "recipe": asdict(recipe),
        "corpus": {"sha256": corpus_hash, "tokens": per_epoch, "python": platform.python_version()},
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers, np)},
        "parameters": run.model.num_parameters(),
        "compiled": args.compile,
        "threads": args.threads,
    }

    def export(windows: int) -> dict[str, Any]:
        report = {**facts, **run.progress(), "held_out": _losses(base_export.rounded(run.model), held_out, windows)}
        base_export.write(run.model, tokenizer, report, args.out)
        return report

    try:
        _train(run, documents, export, args.export_every)
    except KeyboardInterrupt:
        run.save()
        console.print(f"stopped at step {run.step}; the same command goes on from there")
        return
    report = export(windows=400)
    console.print_json(json.dumps(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the model (default: the package's)")
    parser.add_argument("--work", type=Path, default=HERE.parent / ".cache" / "base", help="checkpoints")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    parser.add_argument("--seed", type=int, help="of the weights and the data order (default 0)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-every", type=int, default=300, help="steps between usable models in --out")
    parser.add_argument("--compile", action="store_true", help="use torch.compile: faster, wants a C compiler")
    return parser.parse_args()


class Run:
    """The model, its optimizer and how far they are; what a checkpoint holds."""

    def __init__(self, recipe: Recipe, checkpoint: Path, compiled: bool) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.checkpoint = recipe, checkpoint
        self.model = LlamaForCausalLM(config(recipe))
        self.forward = torch.compile(self.model) if compiled else self.model
        embedding = self.model.get_input_embeddings().weight  # tied: the output layer's weight too
        matrices = [p for p in self.model.parameters() if p.ndim == 2 and p is not embedding]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        small = [{"params": [embedding], "weight_decay": recipe.weight_decay}, {"params": vectors}]
        self.optimizers = (
            muon.Muon(matrices, recipe.matrix_lr, recipe.momentum, recipe.weight_decay),
            torch.optim.AdamW(small, recipe.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        )
        self.peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.step, self.seconds, self.cpu_seconds, self.history = 0, 0.0, 0.0, []
        if checkpoint.exists():
            self._restore()

    def _restore(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise SystemExit(f"{self.checkpoint} is of another recipe: remove it, or choose another --work")
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        for name in ("step", "seconds", "cpu_seconds", "history"):
            setattr(self, name, state[name])
        console.print(f"going on from step {self.step}")

    def save(self) -> None:
        partial = self.checkpoint.with_suffix(".partial")
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "history": self.history,
        }
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def progress(self) -> dict[str, Any]:
        """How far the training is, for the report."""
        return {
            "steps": self.step,
            "tokens_seen": self.step * self.recipe.batch * self.recipe.context,
            "wall_seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "training_loss": self.history[-1] if self.history else None,
        }

    def update(self, batch: torch.Tensor) -> float:
        """One optimizer step on `batch` [windows, context]; returns its loss in nats per token."""
        wall, cpu = time.perf_counter(), time.process_time()
        share = share_of_lr(self.step, self.recipe)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
        loss = self.forward(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip, error_if_nonfinite=True)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        return float(loss.detach())


def _train(run: Run, documents: list[np.ndarray], export: Any, export_every: int) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    recent: list[float] = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=run.recipe.steps, completed=run.step)
        for batch in batches(documents, run.recipe, start=run.step):
            recent.append(run.update(batch))
            bar.update(task, completed=run.step)
            if run.step % 50 == 0:
                run.history.append(round(sum(recent) / len(recent), 4))
                pace = run.seconds / run.step
                console.print(f"step {run.step:5d}  loss {run.history[-1]:.3f}  {pace:.2f} s per step")
                recent.clear()
            if run.step % 100 == 0:
                run.save()
            if run.step % export_every == 0 and run.step < run.recipe.steps:
                console.print(export(windows=48)["held_out"])


@torch.no_grad()
def _losses(model: LlamaForCausalLM, held_out: dict[str, tuple[torch.Tensor, float]], windows: int) -> dict[str, Any]:
    """Mean loss over at most `windows` evenly spaced windows of each domain, in nats per token and per byte."""
    figures = {}
    for domain, (every, tokens_per_byte) in held_out.items():
        chosen = every[torch.linspace(0, len(every) - 1, min(windows, len(every))).long()]
        loss = sum(float(model(input_ids=b, labels=b).loss) * len(b) for b in chosen.split(16)) / len(chosen)
        figures[domain] = {
            "nats_per_token": round(loss, 4),
            "nats_per_byte": round(loss * tokens_per_byte, 4),
            "windows": len(chosen),
        }
    return figures


if __name__ == "__main__":
    main()
