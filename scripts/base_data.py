"""What the built-in base learns from and is measured on, as tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

import base_tokenizer
from base_recipe import Recipe
from lorary.builtin import corpora


def tokenizer_for(work: Path, recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer learned from the training files; kept in `work`, so that a resumed run has the same."""
    folder = work / f"tokenizer-{recipe.vocabulary}"
    if not folder.exists():
        texts = [record["text"] for record in corpora.load("builtin:python", "train")]
        base_tokenizer.train(texts, recipe.vocabulary).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def documents_of(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> tuple[list[np.ndarray], str]:
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


def held_out(tokenizer: PreTrainedTokenizerFast, name: str, recipe: Recipe) -> tuple[torch.Tensor, float]:
    """The validation half as windows [n, context], and its tokens per byte."""
    texts = [record["text"] for record in corpora.load(name, "validation", fallback=True)]
    stream = torch.tensor([i for ids in _framed(tokenizer, texts) for i in ids])
    size = sum(len(text.encode()) for text in texts)
    return stream[: len(stream) // recipe.context * recipe.context].view(-1, recipe.context), len(stream) / size


def batches(documents: list[np.ndarray], recipe: Recipe, start: int) -> Iterator[torch.Tensor]:
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
                batch = windows[first : first + recipe.batch].astype(np.int64)
                yield torch.from_numpy(_echoed(batch, done, recipe) if done < recipe.cycle // 3 else batch)
            done += 1
        epoch += 1


def _echoed(batch: np.ndarray, step: int, recipe: Recipe) -> np.ndarray:
    """`batch` with its first windows made of one passage each, again and again.

    These reward copying from far back, which ordinary windows teach late.
    """
    lengths = np.random.default_rng([recipe.seed, step]).integers(
        recipe.context // 16, recipe.context // 2, size=recipe.echoes, endpoint=True
    )
    for window, length in zip(batch, lengths, strict=False):
        window[:] = np.resize(window[:length], recipe.context)
    return batch
