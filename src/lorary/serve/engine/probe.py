"""A check that a runner computes what the model computes: a few logits, before anything is served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorary.serve.engine.runner import Row, Runner

_LENGTHS = (12, 5, 9)
_MORE = 2  # tokens after the prompt
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest logit; others are coarser
_COARSE = 0.05


class Probe:
    """Prompts, the tokens after them, and the model's logits, computed plainly and without a cache.

    Args:
        model: a causal language model in evaluation mode, as it is before a runner prepares it.
    """

    def __init__(self, model: Any) -> None:
        vocabulary = int(model.config.get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(0)
        low, high = vocabulary // 4, max(vocabulary // 2, vocabulary // 4 + 1)  # special tokens are at the ends
        self._tokens = [
            torch.randint(low, high, (length + _MORE,), generator=generator).tolist() for length in _LENGTHS
        ]
        self._expected = {
            f"probe-{i}": _logits(model, tokens, length)
            for i, (tokens, length) in enumerate(zip(self._tokens, _LENGTHS, strict=True))
        }
        self.tolerance = _TOLERANCE.get(model.dtype, _COARSE)

    @torch.no_grad()
    def error(self, runner: Runner) -> float:
        """The largest difference from the model's logits, relative to the largest of those; inf if one is missing."""
        found: dict[str, list[Tensor]] = {id: [] for id in self._expected}
        tokens = dict(zip(self._expected, self._tokens, strict=True))

        def choose(rows: Sequence[Row], logits: Tensor) -> list[int]:
            chosen = []
            for row, own in zip(rows, logits, strict=True):
                found[row.id].append(own.clone())
                chosen.append(tokens[row.id][len(row.prompt) + len(found[row.id]) - 1 - (len(found[row.id]) > _MORE)])
            return chosen

        for id, length in zip(self._expected, _LENGTHS, strict=True):
            runner.add(Row(id, tuple(tokens[id][:length])))
        for _ in range(4 * len(_LENGTHS)):
            for id in [id for id, rows in found.items() if len(rows) > _MORE]:
                runner.remove(id)
            if all(len(rows) > _MORE for rows in found.values()):
                break
            runner.step(choose)
        for id in found:
            runner.remove(id)
        return max(_difference(found[id], expected) for id, expected in self._expected.items())


@torch.no_grad()
def _logits(model: Any, tokens: list[int], prompt: int) -> Tensor:
    """[1 + more, vocabulary] the logits after the prompt and after each further token."""
    logits: Tensor = model(torch.tensor([tokens], device=model.device), use_cache=False).logits
    return logits[0, prompt - 1 :].float()


def _difference(found: list[Tensor], expected: Tensor) -> float:
    if len(found) != len(expected):
        return float("inf")
    error = (torch.stack(found) - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    return float("inf") if error.isnan() else float(error)
