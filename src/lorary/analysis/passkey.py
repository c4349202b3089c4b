"""Passkey retrieval: a random five-digit key in a long filler text, and the question for it at the end.

    There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you ...
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. The grass is green. ...
    The pass key is 71432. Remember it. 71432 is the pass key.
    The grass is green. The sky is blue. ...
    What is the pass key? The pass key is

Mohtashami & Jaggi 2023, arXiv:2305.16300; the text is theirs, also used by LongLoRA's authors (Chen et al. 2023,
arXiv:2309.12307, figure 4).

Two measures:

- *found*: the first digits of the greedy continuation are exactly the key. This is the measure of the papers; small
  models never succeed.
- *gain*: the mean loss per token of the right key after a prompt with **another** key hidden in it, minus that after
  the prompt with the right key. The two prompts differ only in the key, and the keys in every digit. A model that does
  not look back that far gains about 0; one that does gains more, long before it retrieves anything. The gain is
  negative for a model that is misled by the key.

Differs from the authors' code: keys have five digits (theirs: 1 to 50,000), and filler is cut between tokens (theirs:
between characters), so that prompt, answer and one more token, which shows the end of the key, take exactly the given
length and stay within a model's context.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
_MOST_DRAWS = 1000  # until another key has the same number of tokens


class Scores(Protocol):
    """A model's log-probabilities of given tokens."""

    def __call__(self, ids: Tensor, start: int) -> Tensor:
        """The log-probabilities [rows, tokens - start], in nats, of the tokens from `start` (1 or more) on.

        Args:
            ids: [rows, tokens], on the CPU; each token is conditioned on all before it in its row.
            start: the first scored position.
        """
        ...


Continuation = Callable[[Tensor, int], str]
"""A model's greedy continuation: (token ids [tokens], number of new tokens) -> text of the new tokens."""


@dataclass(frozen=True)
class Trial:
    """A prompt with a hidden key.

    Args:
        key: its digits.
        prompt: token ids [tokens], with the key in it.
        other: the same with another key, if possible of as many tokens.
        answer: the token ids of the key after the prompt.
    """

    key: str
    prompt: Tensor
    other: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Retrieval:
    """The result of the trials of one length and depth.

    Args:
        length: tokens of prompt and answer.
        depth: share of the filler before the key, 0 to 1; NaN: all depths together.
        trials: number of hidden keys.
        found: number of retrieved keys.
        nats: mean loss per token of the right key after its prompt.
        other: the same after the prompt with another key.
    """

    length: int
    depth: float
    trials: int
    found: int
    nats: float
    other: float

    @property
    def gain(self) -> float:
        """The reduction of the right key's loss by reading it, in nats per token."""
        return self.other - self.nats


class Haystack:
    """Prompts with hidden keys, for one tokenizer.

    Args:
        tokenizer: of Transformers. Prompts begin with BOS if it adds one to every text.
        longest: the longest length of a prompt, in tokens.

    Attributes:
        shortest: tokens of the shortest prompt; some keys take one or two more.
    """

    def __init__(self, tokenizer: Any, longest: int) -> None:
        self.tokenizer = tokenizer
        bos = tokenizer.bos_token_id
        starts = bos is not None and list(tokenizer(FILLER)["input_ids"])[:1] == [bos]
        self.head = [bos] * starts + self._ids(TASK)
        once, twice = (len(self._ids(" ".join([FILLER] * n))) for n in (1, 2))
        self.filler = self._ids(" ".join([FILLER] * (longest // (twice - once) + 2)))
        self.shortest = max(self._tokens_without_filler(key) for key in ("12345", "98760", "70077", "10000"))

    def trial(self, length: int, depth: float, seed: int) -> Trial | None:
        """A prompt that takes, with its answer and one more token, exactly `length` tokens.

        Args:
            length: in tokens.
            depth: share of the filler before the key, 0 to 1.
            seed: of the key; each length and depth has its own keys.

        Returns:
            The trial; None if the length has no room for task, key and question.
        """
        rng = random.Random(f"passkey {length} {depth} {seed}")
        key = str(rng.randrange(10_000, 100_000))
        other = self._other_key(key, rng)
        question, answer = self._question_and_answer(key)
        room = length - len(answer) - 1
        prompts = [self._prompt(hidden, question, room, depth) for hidden in (key, other)]
        if prompts[0] is None or prompts[1] is None:
            return None
        return Trial(key, prompts[0], prompts[1], torch.tensor(answer))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokens_without_filler(self, key: str) -> int:
        question, answer = self._question_and_answer(key)
        return len(self.head) + len(self._ids(KEY.format(key=key))) + len(question) + len(answer) + 1

    def _question_and_answer(self, key: str) -> tuple[list[int], list[int]]:
        """The tokens of question and answer, split where the question alone would end."""
        alone, whole = self._ids(QUESTION), self._ids(f"{QUESTION} {key}")
        same = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
        return whole[:same], whole[same:]

    def _other_key(self, key: str, rng: random.Random) -> str:
        """A key with another digit at every place and, if one is found, as many tokens."""
        size, other = len(self._ids(KEY.format(key=key))), key
        for _ in range(_MOST_DRAWS):
            digits = [rng.choice([d for d in "1234567890"[: 9 + (i > 0)] if d != k]) for i, k in enumerate(key)]
            other = "".join(digits)
            if len(self._ids(KEY.format(key=other))) == size:
                break
        return other

    def _prompt(self, key: str, question: list[int], tokens: int, depth: float) -> Tensor | None:
        hidden = self._ids(KEY.format(key=key))
        filler = tokens - len(self.head) - len(hidden) - len(question)
        if filler < 0:
            return None
        before = round(depth * filler)
        ids = [*self.head, *self.filler[:before], *hidden, *self.filler[: filler - before], *question]
        return torch.tensor(ids)


def retrieval(
    scores: Scores, continuation: Continuation, haystack: Haystack, length: int, depth: float, trials: int
) -> Retrieval | None:
    """Passkey retrieval at one length and depth.

    Args:
        scores: log-probabilities of the model.
        continuation: greedy continuations of the model.
        haystack: the prompts.
        length: tokens of prompt and answer.
        depth: share of the filler before the key, 0 to 1.
        trials: number of keys.

    Returns:
        The result; None if the length has no room for a key.
    """
    drawn = [trial for seed in range(trials) if (trial := haystack.trial(length, depth, seed))]
    if not drawn or len(drawn) < trials:
        return None
    found = sum(first_digits(continuation(trial.prompt, len(trial.answer) + 1)) == trial.key for trial in drawn)
    nats = math.fsum(_nats(scores, trial.prompt, trial.answer) for trial in drawn) / trials
    other = math.fsum(_nats(scores, trial.other, trial.answer) for trial in drawn) / trials
    return Retrieval(length, depth, trials, found, nats, other)


def first_digits(text: str) -> str:
    """The first run of digits in a text, or an empty string.

    >>> first_digits(" 71432. Remember 5"), first_digits("the key")
    ('71432', '')
    """
    match = re.search(r"[0-9]+", text)
    return match[0] if match else ""


def _nats(scores: Scores, prompt: Tensor, answer: Tensor) -> float:
    """The mean loss per token of an answer after a prompt."""
    return -float(scores(torch.cat([prompt, answer])[None], len(prompt)).double().mean())
