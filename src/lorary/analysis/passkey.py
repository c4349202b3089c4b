"""Passkey retrieval: a random key of five digits in a long text that says nothing, and then the question for it.

    There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you ...
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. The grass is green. ...
    The pass key is 71432. Remember it. 71432 is the pass key.
    The grass is green. The sky is blue. ...
    What is the pass key? The pass key is

Mohtashami & Jaggi 2023, arXiv:2305.16300; the words are theirs, and those with which LongLoRA's authors evaluate
(Chen et al. 2023, arXiv:2309.12307, figure 4).

Two things are told of a model:

- *found*: the greedy continuation's first digits are the key, all of it and nothing more. It is what the papers
  report, and what only models of some size ever do.
- *gain*: the mean nats per token of the right key after the prompt in which **another** key is hidden, less those
  after the prompt in which it is. The two prompts differ in nothing but the key, and the two keys in every digit. So
  a model that does not look back, or cannot so far, gains exactly or nearly 0, and one that looks back gains more, long
  before it retrieves anything. It is below 0 where a model is led away from what it reads.

Differs from the authors' code: keys have five digits (theirs are 1 to 50,000), filler is cut between tokens (theirs
between characters), so that prompt, answer and one token more, which shows that the key has ended, take exactly as many
tokens as a length says: a model that knows L positions is asked within them.
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
_MOST_DRAWS = 1000  # of another key, until one has as many tokens


class Scores(Protocol):
    """A model's log-probabilities of given tokens."""

    def __call__(self, ids: Tensor, start: int) -> Tensor:
        """Log-probabilities in nats [rows, tokens - start] of the tokens from `start` (1 or more) on.

        Args:
            ids: [rows, tokens], on the CPU; each token is judged by all that stand before it in its row.
            start: the first position that is judged.
        """
        ...


Continued = Callable[[Tensor, int], str]
"""A model's greedy continuation: token ids [tokens] and a number of tokens to the text of so many tokens more."""


@dataclass(frozen=True)
class Trial:
    """One key in one text.

    Args:
        key: its digits.
        prompt: token ids [tokens], with the key in it.
        other: the same with another key, of as many tokens wherever the tokenizer has such.
        answer: the key's own token ids, as they follow the prompt.
    """

    key: str
    prompt: Tensor
    other: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Retrieval:
    """What the trials of one length and depth came to.

    Args:
        length: tokens of prompt and answer.
        depth: share of the filler that stands before the key, 0 to 1; NaN: at all depths together.
        trials: how many keys were hidden.
        found: how many of them were retrieved.
        nats: mean loss per token of the right key after its prompt.
        other: the same after the prompt in which another key is hidden.
    """

    length: int
    depth: float
    trials: int
    found: int
    nats: float
    other: float

    @property
    def gain(self) -> float:
        """Nats per token that the right key is likelier for having been read."""
        return self.other - self.nats


class Haystack:
    """Texts with a key in them, in the tokens of one tokenizer.

    Args:
        tokenizer: of Transformers. Its BOS begins the text where it puts one before every text.
        longest: the longest text that will be asked for, in tokens.

    Attributes:
        least: tokens of the shortest text; a longer key may take one or two more.
    """

    def __init__(self, tokenizer: Any, longest: int) -> None:
        self.tokenizer = tokenizer
        bos = tokenizer.bos_token_id
        starts = bos is not None and list(tokenizer(FILLER)["input_ids"])[:1] == [bos]
        self.head = [bos] * starts + self._ids(TASK)
        once, twice = (len(self._ids(" ".join([FILLER] * n))) for n in (1, 2))
        self.filler = self._ids(" ".join([FILLER] * (longest // (twice - once) + 2)))
        self.least = max(self._fixed(key) for key in ("12345", "98760", "70077", "10000"))

    def trial(self, length: int, depth: float, seed: int) -> Trial | None:
        """A key in a text that has, with the key as its answer and one token more, exactly so many tokens.

        Args:
            length: that number.
            depth: share of the filler that stands before the key, 0 to 1.
            seed: of the key; each length and depth has its own keys.

        Returns:
            The trial; None where a text of that length has no room for task, key and question.
        """
        drawn = random.Random(f"passkey {length} {depth} {seed}")
        key = str(drawn.randrange(10_000, 100_000))
        other = self._another(key, drawn)
        asked, answer = self._asked(key)
        room = length - len(answer) - 1
        prompts = [self._prompt(hidden, asked, room, depth) for hidden in (key, other)]
        if prompts[0] is None or prompts[1] is None:
            return None
        return Trial(key, prompts[0], prompts[1], torch.tensor(answer))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _fixed(self, key: str) -> int:
        asked, answer = self._asked(key)
        return len(self.head) + len(self._ids(KEY.format(key=key))) + len(asked) + len(answer) + 1

    def _asked(self, key: str) -> tuple[list[int], list[int]]:
        """The question's tokens and the answer's: divided where the question alone would have ended."""
        alone, whole = self._ids(QUESTION), self._ids(f"{QUESTION} {key}")
        same = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
        return whole[:same], whole[same:]

    def _another(self, key: str, drawn: random.Random) -> str:
        """A key that has another digit at every place, and as many tokens wherever one is soon found."""
        size, other = len(self._ids(KEY.format(key=key))), key
        for _ in range(_MOST_DRAWS):
            digits = [drawn.choice([d for d in "1234567890"[: 9 + (i > 0)] if d != k]) for i, k in enumerate(key)]
            other = "".join(digits)
            if len(self._ids(KEY.format(key=other))) == size:
                break
        return other

    def _prompt(self, key: str, asked: list[int], tokens: int, depth: float) -> Tensor | None:
        hidden = self._ids(KEY.format(key=key))
        filler = tokens - len(self.head) - len(hidden) - len(asked)
        if filler < 0:
            return None
        before = round(depth * filler)
        ids = [*self.head, *self.filler[:before], *hidden, *self.filler[: filler - before], *asked]
        return torch.tensor(ids)


def retrieval(
    scores: Scores, continued: Continued, haystack: Haystack, length: int, depth: float, trials: int
) -> Retrieval | None:
    """Hide keys at one depth of texts of one length, and ask for them.

    Args:
        scores: the model, asked for log-probabilities.
        continued: the model, asked to go on.
        haystack: the texts.
        length: tokens of text and answer.
        depth: share of the filler that stands before the key, 0 to 1.
        trials: how many keys.

    Returns:
        What came of it; None where there is no room for a key in such a text.
    """
    drawn = [haystack.trial(length, depth, seed) for seed in range(trials)]
    asked = [trial for trial in drawn if trial is not None]
    if not asked or len(asked) < trials:
        return None
    found = sum(first_digits(continued(trial.prompt, len(trial.answer) + 1)) == trial.key for trial in asked)
    nats, other = (
        math.fsum(_nats(scores, getattr(trial, name), trial.answer) for trial in asked) / trials
        for name in ("prompt", "other")
    )
    return Retrieval(length, depth, trials, found, nats, other)


def first_digits(text: str) -> str:
    """The first digits of a text, up to what is none; empty where there are none.

    >>> first_digits(" 71432. Remember 5"), first_digits("the key")
    ('71432', '')
    """
    found = re.search(r"[0-9]+", text)
    return found[0] if found else ""


def _nats(scores: Scores, prompt: Tensor, answer: Tensor) -> float:
    """The mean loss of the answer's tokens after a prompt."""
    return -float(scores(torch.cat([prompt, answer])[None], len(prompt)).double().mean())
