"""Train the built-in base: a 3 M-parameter Llama on the Python standard library's source.

    python scripts/train_base.py            # under an hour on two cores; a second call goes on where it was killed

It learns a byte-level BPE tokenizer on the training files, then the model, and writes both to
src/lorary/builtin/model, with a card and a report of what was measured. A checkpoint every hundred steps makes a kill
cost little; the data order is a function of the seed and the epoch alone, so a resumed run sees the same batches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import base_export
import base_tokenizer
from lorary.builtin import corpora

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent / "src" / "lorary" / "builtin" / "model"
DOMAINS = {"code": "builtin:python", "c-headers": "builtin:c-headers", "topics": "builtin:topics"}
console = Console()


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, but for the machine and the versions."""

    vocabulary: int = 2048
    hidden: int = 192
    mlp: int = 576
    layers: int = 6
    heads: int = 6
    key_value_heads: int = 3
    context: int = 256  # tokens
    batch: int = 8  # windows of `context` tokens per optimizer step
    steps: int = 2400
    warmup: int = 100  # optimizer steps
    lr: float = 3e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    chat_one_in: int = 4  # this share of the docstring pairs is learnt as conversations: 2 % of all tokens
    seed: int = 0


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    recipe = Recipe(**{k: v for k, v in {"steps": args.steps, "seed": args.seed}.items() if v is not None})
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(args.work, recipe)
    documents, corpus_hash = _documents(tokenizer, recipe)
    held_out = {domain: _held_out(tokenizer, name, recipe) for domain, name in DOMAINS.items()}
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
    parser.add_argument("--compile", action="store_true", help="torch.compile: a quarter faster, wants a C compiler")
    return parser.parse_args()


class Run:
    """The model, its optimizer and how far they are; what a checkpoint holds."""

    def __init__(self, recipe: Recipe, checkpoint: Path, compiled: bool) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.checkpoint = recipe, checkpoint
        self.model = LlamaForCausalLM(_config(recipe))
        self.forward = torch.compile(self.model) if compiled else self.model
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)
        self.step, self.seconds, self.cpu_seconds, self.history = 0, 0.0, 0.0, []
        if checkpoint.exists():
            self._restore()

    def _restore(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise SystemExit(f"{self.checkpoint} is of another recipe: remove it, or choose another --work")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "seconds", "cpu_seconds", "history"):
            setattr(self, name, state[name])
        console.print(f"going on from step {self.step}")

    def save(self) -> None:
        partial = self.checkpoint.with_suffix(".partial")
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
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
        for group in self.optimizer.param_groups:
            group["lr"] = _lr(self.step, self.recipe)
        loss = self.forward(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip, error_if_nonfinite=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        return float(loss.detach())


def _train(run: Run, documents: list[np.ndarray], export: Any, export_every: int) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    recent: list[float] = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=run.recipe.steps, completed=run.step)
        for batch in _batches(documents, run.recipe, start=run.step):
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


def _batches(documents: list[np.ndarray], recipe: Recipe, start: int) -> Any:
    """The batches [windows, context] of the steps from `start` on: every epoch a new order of files and windows."""
    epoch, done = 0, 0
    while done < recipe.steps:
        order = np.random.default_rng([recipe.seed, epoch])
        stream = np.concatenate([documents[i] for i in order.permutation(len(documents))])
        windows = stream[: len(stream) // recipe.context * recipe.context].reshape(-1, recipe.context)
        windows = windows[order.permutation(len(windows))]
        for first in range(0, len(windows) - recipe.batch + 1, recipe.batch):
            if done == recipe.steps:
                return
            if done >= start:
                yield torch.from_numpy(windows[first : first + recipe.batch].astype(np.int64))
            done += 1
        epoch += 1


def _lr(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))


def _config(recipe: Recipe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _tokenizer(work: Path, recipe: Recipe) -> PreTrainedTokenizerFast:
    folder = work / f"tokenizer-{recipe.vocabulary}"
    if not folder.exists():
        texts = [record["text"] for record in corpora.load("builtin:python", "train")]
        base_tokenizer.train(texts, recipe.vocabulary).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _documents(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> tuple[list[np.ndarray], str]:
    """The training files as tokens, with the share of conversations; and the hash of the files' names and texts."""
    texts = [record["text"] for record in corpora.load("builtin:python", "train")]
    digest = hashlib.sha256()
    for path, text in zip(corpora.origins("builtin:python", "train"), texts, strict=True):
        digest.update(f"{path}\0{text}\0".encode())
    chats = corpora.load("builtin:docstrings-chat", "train")[:: recipe.chat_one_in]
    talks = [tokenizer.apply_chat_template(c["messages"], tokenize=False) for c in chats]
    documents = _framed(tokenizer, texts) + tokenizer(talks, add_special_tokens=False)["input_ids"]
    return [np.array(ids, dtype=np.uint16) for ids in documents], digest.hexdigest()


def _framed(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[tokenizer.bos_token_id, *text, tokenizer.eos_token_id] for text in ids]


def _held_out(tokenizer: PreTrainedTokenizerFast, name: str, recipe: Recipe) -> tuple[torch.Tensor, float]:
    """The validation half as windows [n, context], and its tokens per byte."""
    texts = [record["text"] for record in corpora.load(name, "validation", fallback=True)]
    stream = torch.tensor([i for ids in _framed(tokenizer, texts) for i in ids])
    size = sum(len(text.encode()) for text in texts)
    return stream[: len(stream) // recipe.context * recipe.context].view(-1, recipe.context), len(stream) / size


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
