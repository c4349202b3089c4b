"""Forward passes by Transformers' continuous batching: paged keys and values, chunked prompts, shared prefixes.

The only file that imports it. Its batches are flat: the tokens of all requests, one request after another. This
scheduler sorts them by adapter; the prefix cache, which knows nothing of adapters, gets a salt from them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import cache_allocator
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.model_runner import ModelRunner, infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorary.errors import ConfigError, Diagnostic, changed_release, check_overridden
from lorary.layers.rope import text_config
from lorary.layers.transformers_internals import attention_of, set_attention
from lorary.serve.batch.batch import Batch
from lorary.serve.batch.layers import ServedLayers
from lorary.serve.budget import token_bytes
from lorary.serve.engine.attention import NAME, attention_of_each_request
from lorary.serve.engine.runner import Choose, Row, Shape
from lorary.serve.forms.serving_form import ServingForm
from lorary.serve.pool.arena import Arena, CacheArena

logger = logging.getLogger(__name__)
RELEASES = ((5, 23), (5, 24))
"""The releases of Transformers that this file was written for."""


def check_release(version: str) -> None:
    """Refuse releases of Transformers whose continuous batching is not known.

    Raises:
        LoraryError: it is one.
    """
    if tuple(int(part) for part in version.split(".")[:2]) not in RELEASES:
        known = " and ".join(f"{major}.{minor}" for major, minor in RELEASES)
        raise changed_release("transformers", f"its continuous batching is known in {known} alone")


check_release(transformers.__version__)

ALL_ATTENTION_FUNCTIONS.register(NAME, attention_of_each_request)

# --- the salt of the prefix cache -------------------------------------------------------------------------------------

_current = threading.local()
_plain_hash = cache_allocator.compute_block_hash


def _salted_hash(parent_hash: int | None, tokens: list[int]) -> int:
    """The hash of a block; the chain of a sequence with adapters begins with their salt."""
    return int(_plain_hash(getattr(_current, "salt", None) if parent_hash is None else parent_hash, tokens))


cache_allocator.compute_block_hash = _salted_hash


@contextlib.contextmanager
def _salted(salt: int | None) -> Iterator[None]:
    _current.salt = salt
    try:
        yield
    finally:
        _current.salt = None


# --- the scheduler ----------------------------------------------------------------------------------------------------

OVERRIDDEN: dict[type, dict[str, tuple[str, ...]]] = {
    FIFOScheduler: {"schedule_batch": ("token_budget", "cache_budget"), "_get_waiting_candidates": ()},
    PagedAttentionCache: {
        "search_prefix_match": ("request_id", "prompt_ids"),
        "mark_complete_blocks": ("state", "complete_blocks"),
        "can_store_request_tokens": ("state", "request_len", "dry_run"),
    },
    ContinuousBatchingIOs: {"get_model_kwargs": ("use_padding",)},
    ModelRunner: {"_sample": ("scores", "output_ids")},
}
"""Class of Transformers -> the methods that are replaced here -> their arguments."""

for _cls, _methods in OVERRIDDEN.items():
    check_overridden(_cls, _methods, "transformers")


class SortedScheduler(FIFOScheduler):  # type: ignore[misc]
    """Transformers' scheduler, whose batches are sorted by adapter."""

    rows: dict[str, Row]
    only: str | None = None

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        """As in Transformers; of one request alone if `only` names it."""
        others = {}
        if self.only is not None:
            others = {id: state for id, state in self.active_requests.items() if id != self.only}
            for id in others:
                del self.active_requests[id]
        try:
            scheduled, *rest = super().schedule_batch(token_budget, cache_budget)
        finally:
            self.active_requests.update(others)
        if scheduled:
            scheduled.sort(key=lambda future: self.rows[future.state.request_id].key)
        return scheduled, *rest

    def _get_waiting_candidates(self) -> list[RequestState]:
        found: list[RequestState] = super()._get_waiting_candidates()
        return found if self.only is None else [state for state in found if state.request_id == self.only]


SCHEDULER_MAPPING["lorary"] = SortedScheduler

# --- the runner -------------------------------------------------------------------------------------------------------


class PagedRunner:
    """See `lorary.serve.engine.runner.Runner`.

    Args:
        model: a causal language model in evaluation mode.
        layers: its layers.
        shape: of its batches.

    Raises:
        Exception: continuous batching refuses the model; the reason is Transformers'.
    """

    kind = "continuous batching"

    def __init__(self, model: Any, layers: ServedLayers, shape: Shape) -> None:
        self.model, self.layers = model, layers
        self.current: list[str] = []
        self._rows: dict[str, Row] = {}
        config = ContinuousBatchingConfig(
            page_size=shape.page,
            num_blocks=_pages(model, shape),
            max_batch_tokens=shape.tokens,
            max_requests_per_batch=min(shape.rows, shape.tokens),
            max_blocks_per_request=0,
            use_cuda_graph=False,
            use_async_batching=False,
            scheduler_type="lorary",
            auto_switch_to_flash=model.device.type != "cpu",
        )
        self._before = attention_of(text_config(model))
        if model.device.type == "cpu":
            set_attention(text_config(model), NAME)
        try:
            self._processor = _processor(model, config)
        except BaseException:
            self.close()
            raise
        self._cache, self._scheduler = self._processor.cache, self._processor.scheduler
        self._scheduler.rows = self._rows
        self.arena: Arena = CacheArena(self._cache)
        self.make_room: Callable[[int], bool] = lambda _: False
        self.kept = max(self._cache.num_sectors // 2, 1)
        self.most_tokens: int | None = _most_tokens(self._cache, self.kept)
        self._let_through()
        if self._cache.use_prefix_sharing and not self._salt_takes():
            logger.warning("prefixes are not shared: the salt of the prefix cache has no effect in this release")
            self._cache.use_prefix_sharing = self._cache.allow_block_sharing = False

    def _let_through(self) -> None:
        """Put the salt into the cache, our choice in place of the sampler, one row of the head for each request."""
        cache, ios, runner = self._cache, self._processor.inputs_and_outputs, self._processor.model_runner
        search, mark, inputs = cache.search_prefix_match, cache.mark_complete_blocks, ios.get_model_kwargs
        store = cache.can_store_request_tokens

        def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
            row = self._rows[request_id]
            with _salted(row.salt):
                found = int(search(request_id, prompt_ids))
            row.cached = row.cached or min(found, len(row.prompt))
            return found

        def mark_complete_blocks(state: RequestState, complete_blocks: dict[str, int]) -> None:
            with _salted(self._rows[state.request_id].salt):
                mark(state, complete_blocks)

        def can_store_request_tokens(state: RequestState, request_len: int, dry_run: bool = False) -> bool:
            """Adapters that nothing uses give way, then prefixes that nobody has."""
            if store(state, request_len, dry_run):
                return True
            needed = sum(
                each.needs_new_sectors(state.request_id, state.current_len(), request_len)
                for each in cache.cache_allocators.values()
            )
            self.make_room(needed) or self.arena.reclaim()
            cache.pool.try_to_free_sectors()
            return bool(store(state, request_len, dry_run))

        def get_model_kwargs(use_padding: bool = False) -> Any:
            kwargs = inputs(use_padding)
            # Transformers packs the rows that get a token, so that with as many tokens as rows a layer could not tell
            # one table of segments from the other.
            kwargs["logits_indices"] = kwargs["cu_seq_lens_q"][1:] - 1
            return kwargs

        cache.search_prefix_match, cache.mark_complete_blocks = search_prefix_match, mark_complete_blocks
        cache.can_store_request_tokens, ios.get_model_kwargs = can_store_request_tokens, get_model_kwargs
        runner._sample = self._sample

    def _salt_takes(self) -> bool:
        """Whether a sequence with adapters shares its prefix with those of the same adapters alone."""
        tokens = (0,) * (self._cache.tokens_per_sector + 1)
        form = ServingForm("probe", {})
        rows = [Row("first", tokens, ((form, 1.0),)), Row("base", tokens), Row("same", tokens, ((form, 1.0),))]
        self._rows.update({row.id: row for row in rows})
        state = RequestState("first", list(tokens))
        self._cache.can_store_request_tokens(state, len(tokens))
        complete = self._cache.count_new_complete_blocks(state, len(tokens))
        self._cache.mark_complete_blocks(state, complete)
        found = [self._cache.search_prefix_match(row.id, list(tokens)) for row in rows[1:]]
        self._cache.reset()
        self._rows.clear()
        return not found[0] and bool(found[1])

    def add(self, row: Row) -> None:
        state = RequestState(row.id, list(row.prompt), max_new_tokens=None)
        self._rows[row.id] = row
        self._scheduler.add_waiting_request(state)

    def remove(self, id: str) -> None:
        self._scheduler.set_request_cancellation(id)
        self._scheduler.clear_cancelled_requests()
        self._scheduler.block_new_requests = False
        self._rows.pop(id, None)

    def restart(self, id: str) -> None:
        state = self._scheduler.active_requests.get(id)
        if state is not None:
            self._cache.free_blocks(id, no_cache=True)
            del self._scheduler.active_requests[id]
            self._scheduler.add_waiting_request(state.create_equivalent_initial_request())

    def step(self, choose: Choose, only: str | None = None) -> None:
        self.current = []
        self._choose, self._scheduler.only = choose, only
        processor = self._processor
        if not processor.prepare_next_batch():
            return
        futures = processor.inputs_and_outputs.requests_in_batch
        self.current = [future.state.request_id for future in futures]
        batch = Batch.of([(self._rows[f.state.request_id].adapters, f.query_length, 1) for f in futures])
        with self.layers.computing(batch):
            processor._generation_step(self.model)
        processor.update_batch()

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """In place of Transformers' sampler: scores [1, requests, vocabulary], output_ids [1, tokens]."""
        futures = self._processor.inputs_and_outputs.requests_in_batch
        new = [i for i, future in enumerate(futures) if future.has_new_token]
        if new:
            rows = [self._rows[self.current[i]] for i in new]
            logits = scores[0] if len(new) == len(futures) else scores[0, new]
            tokens = self._choose(rows, logits)
            output_ids[0, : len(new)] = torch.tensor(tokens, dtype=output_ids.dtype, device=output_ids.device)

    def used_bytes(self) -> int:
        total = int(self._cache.num_sectors * self._cache.bytes_per_sector)
        return total - int(self._cache.compute_free_capacity(relative=False)) - self.arena.reclaimable()

    def close(self) -> None:
        set_attention(text_config(self.model), self._before)


def _pages(model: Any, shape: Shape) -> int:
    """The pages of all layers that fit into a budget."""
    size = token_bytes(model) * shape.page
    if not size:
        raise ValueError("its configuration has no attention heads")
    if shape.budget < 4 * size:
        what = f"it is {shape.budget:,} bytes, and keys and values of {shape.page} tokens take {size:,}"
        raise ConfigError("the budget is too small:", [Diagnostic("budget", what, f"give at least {4 * size:,} bytes")])
    return shape.budget // size


def _most_tokens(cache: Any, sectors: int) -> int:
    """The longest request that fits into so many sectors."""
    free = cache.pool.free_sectors
    cache.pool.free_sectors = free[:sectors]
    try:
        return int(infer_max_single_request_tokens(cache))
    finally:
        cache.pool.free_sectors = free


def _processor(model: Any, config: Any) -> Any:
    """Transformers' batch processor, without its thread and its queues."""
    generation = GenerationConfig(eos_token_id=-1, do_sample=False)
    with torch.random.fork_rng():  # it seeds the global generator
        manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=config)
        return manager._create_batch_processor()
