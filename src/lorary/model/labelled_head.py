"""The loss of a causal language model in which tokens without a label never reach the LM head.

    loss = Σ over labelled tokens t of −log softmax(head(h_t))[y_t]  /  number of labelled tokens

A head over 128 k tokens costs more than a transformer block and its fp32 logits more memory than all of them, so
only the hidden states that have a label are selected, some 64 MiB of logits at a time, and every chunk but the
last is computed again in the backward pass instead of being kept. (The backward pass begins with the last one:
recomputing it would save nothing.)

TRL computes its losses from `model(..., labels=…, fused_lm_head=True)`: log-probabilities per token instead of
logits. `LabelledHead` answers that call in place of TRL's own implementation, for two reasons. TRL's reads
`lm_head.weight`, so an adapter on the head would silently be ignored and never train; here the head is
called as a module. And without a GPU TRL's scores every position and drops the unlabelled ones
afterwards: with a quarter of 2,048 tokens labelled its loss step took nine times as long as this one, and
Transformers' own over all logits three times (`benchmarks/loss.py`, one thread, vocabulary 32,000). Where every
token is labelled the price of not keeping the logits shows: 1.6 times Transformers' time for 0.4 of its memory.
The token losses, metrics and reference log-probabilities of every task pass through this one place.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from lorary.kernels.chunked_lm_head import chunk_size as chunk_of
from lorary.kernels.chunked_lm_head import scores, scores_in_chunks
from lorary.model.state import eval_mode

STATISTICS = ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")

_log = logging.getLogger("lorary.train")


@dataclass
class TokenScores(ModelOutput):  # type: ignore[misc]  # Transformers has no types
    """The outputs that TRL's trainers read. Every field per token is `[batch, tokens - 1]` and zero without a label.

    Args:
        loss: −Σ log_probs over `num_items_in_batch` (by default the number of labels).
        log_probs: of the label, given the tokens before it; the only field with a gradient.
        entropy: of the predicted distribution, in nats.
        is_top1: whether the label was the most likely token.
        mean_logits: mean of the logits over the vocabulary.
        log_sum_sq_probs: log Σ p², for the weights of WPO.
        label_mask: True at tokens with a label.
        aux_loss: the model's load-balancing loss of a mixture of experts.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    mean_logits: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


class LabelledHead:
    """Answers `model(..., labels=labels, fused_lm_head=True)` with `TokenScores`; every other call is the model's.

    Some architectures do something to the logits after the head (Gemma caps them, Cohere and Granite scale
    them), and no attribute of a model tells reliably. So the first call compares `head(backbone(ids))` with the
    model's own logits on a few tokens; if they differ, or the model has no plain backbone and head, the model's own
    logits are used from then on, in full and with a line in the log.

    Args:
        model: a causal language model of Transformers, adapted or not.
        statistics: which of `STATISTICS` to compute beside the log-probabilities.
        chunk: tokens per call of the head; None to choose it by the size of the vocabulary.

    Attributes:
        smoothing: label smoothing of the losses in training; what is computed without gradients is not smoothed.
    """

    def __init__(self, model: Any, statistics: tuple[str, ...] = STATISTICS[:2], chunk: int | None = None) -> None:
        self.model = model
        self.smoothing = 0.0
        self.statistics = statistics
        self.chunk = chunk or chunk_of(model.config.get_text_config().vocab_size)
        self.plain: bool | None = None  # whether logits = head(hidden states); None: not yet known
        self.rows: Tensor | None = None  # of the last batch without gradients: [batch, (sum of losses, labels)]
        self.original: Callable[..., Any] = model.forward

    def install(self) -> LabelledHead:
        """Replace `model.forward`; returns itself."""

        # `generate` reads the parameters of `forward` to check what it was given.
        @functools.wraps(type(self.model).forward)
        def forward(*args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
            return self._scores(*args, **inputs) if fused_lm_head else self.original(*args, **inputs)

        self.model.forward = forward
        return self

    def remove(self) -> None:
        """Restore the model's own `forward`."""
        self.model.forward = self.original
        if getattr(self.original, "__func__", None) is type(self.model).forward:
            del self.model.forward  # the class has it

    def _scores(
        self,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> TokenScores:
        inputs["use_cache"] = False
        if labels is None and shift_labels is None:
            raise TypeError("the loss needs `labels`")
        if self.plain is None:
            self.plain = self._is_plain(inputs.get("input_ids"))
        shifted = shift_labels is not None  # as under context parallelism
        targets = shift_labels if shift_labels is not None else labels[:, 1:]  # type: ignore[index]
        aux_loss = None
        # A mixture of experts computes its load-balancing loss in its own forward.
        if self.plain and not self._wants_router(inputs):
            states = self.model.base_model(*args, **inputs)[0]  # [batch, tokens, hidden]
            score = functools.partial(self._through_head, self.model.get_output_embeddings())
        else:
            outputs = self.original(*args, **inputs)
            states, aux_loss = outputs.logits, outputs.get("aux_loss")  # [batch, tokens, vocabulary]
            score = functools.partial(scores, nn.Identity(), statistics=self.statistics, smoothing=self._smoothing())
        states = states if shifted else states[:, :-1]
        targets = targets.to(states.device)
        mask = targets != -100
        found = score(states[mask], targets[mask])
        fields = {k: v.new_zeros(mask.shape).masked_scatter(mask, v) for k, v in found.items()}
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -fields["log_probs"].sum() / count
        if not torch.is_grad_enabled():
            self.rows = torch.stack([-fields["log_probs"].sum(1), mask.sum(1)], 1)
        return TokenScores(loss=loss, label_mask=mask, aux_loss=aux_loss, **fields)

    def _through_head(self, head: nn.Module, states: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Scores `[labelled, hidden]` states in chunks; all but the last are recomputed in the backward pass.

        The head is called once, whatever the number of chunks: where FSDP shards it, its hooks gather the weight
        once, also if this rank has more chunks than another or none. Without labels one empty chunk is scored, so
        that the result stays connected to the model and DDP finds every gradient.
        """
        options: dict[str, Any] = {"statistics": self.statistics, "size": self.chunk, "smoothing": self._smoothing()}
        in_chunks = functools.partial(scores_in_chunks, head.forward, **options)
        device = next(head.parameters()).device
        with _forward(head, in_chunks):
            found: dict[str, Tensor] = head(states.to(device), targets.to(device))
        return found

    def _smoothing(self) -> float:
        return self.smoothing if torch.is_grad_enabled() else 0.0

    def _wants_router(self, inputs: dict[str, Any]) -> bool:
        config = self.model.config.get_text_config()
        return bool(inputs.get("output_router_logits", getattr(config, "output_router_logits", False)))

    @torch.no_grad()
    def _is_plain(self, ids: Tensor | None, tokens: int = 16, size: float = 100.0) -> bool:
        """Whether the model's logits are `head(backbone(ids))`, judged where logits are as large as `size`.

        Random and small models have small logits, which a soft cap hardly moves (x³/2700 at 30): so the backbone's
        output is made larger for both sides of the comparison.
        """
        backbone, head = self.model.base_model, self.model.get_output_embeddings()
        try:
            if ids is None or head is None or backbone is self.model:
                raise ValueError("the model has no separate backbone and LM head")
            ids = ids[:1, :tokens]
            with eval_mode(self.model):
                largest = float(self.original(input_ids=ids, use_cache=False).logits.abs().max())
                with _scaled_output(backbone, size / max(largest, 1e-6)):
                    own = self.original(input_ids=ids, use_cache=False).logits
                    ours = head(backbone(input_ids=ids, use_cache=False)[0])
            tolerance = 1e-4 if own.dtype in (torch.float32, torch.float64) else 1e-2
            difference = float((own.float() - ours.float()).abs().max() / own.float().abs().max())
            reason = f"its logits are not its LM head's output alone (they differ by {difference:.1%})"
            plain = difference <= tolerance
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            plain, reason = False, str(error)
        plain = _all_agree(plain, self.model.device)
        if not plain:
            _log.warning("%s: %s; the loss uses the model's full logits", type(self.model).__name__, reason)
        return plain


@contextmanager
def _scaled_output(backbone: nn.Module, factor: float) -> Iterator[None]:
    def scale(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * factor, *output[1:])
        output["last_hidden_state"] = output["last_hidden_state"] * factor
        return output

    handle = backbone.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Calls of `module` run `forward` instead of its own inside the block; its hooks run as usual."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def _all_agree(answer: bool, device: torch.device) -> bool:
    """Whether every rank says yes: ranks that compute differently would deadlock in a collective."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return answer
    answers = torch.tensor(int(answer), device=device)
    torch.distributed.all_reduce(answers, op=torch.distributed.ReduceOp.MIN)
    return bool(answers)
