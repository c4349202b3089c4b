"""The engine for a base: the base is loaded, and the way to compute it is chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any, Literal

import torch

from lorary.adapters.resolve import with_tokens_of
from lorary.errors import ConfigError, Diagnostic, FileError, LoraryError
from lorary.layers.rope import max_context, text_config
from lorary.model.loading.from_pretrained import load_model, load_tokenizer
from lorary.model.loading.source import ModelSection
from lorary.model.out_of_memory import allocator_message, is_out_of_memory
from lorary.model.plan import human_bytes
from lorary.serve.batch.layers import ServedLayers
from lorary.serve.batch.merged import spare_bytes
from lorary.serve.budget import default_budget, most_budget
from lorary.serve.engine.batching import BatchingEngine
from lorary.serve.engine.in_flight import end_tokens
from lorary.serve.engine.padded import PaddedRunner
from lorary.serve.engine.probe import Probe
from lorary.serve.engine.runner import Runner, Shape
from lorary.serve.pool.adapter_root import AdapterRoot
from lorary.serve.pool.loader import Limits, Loader
from lorary.serve.pool.pool import Pool
from lorary.serve.pool.registry import Registry
from lorary.serve.scheduler.policy import Policy
from lorary.spec.interfaces import Storage

logger = logging.getLogger(__name__)

_SHARE_OF_MERGED = 1 / 8  # of the budget, at most, for a copy of the base's weights
_LESS = "{} are reserved at the start; lower it: --budget, or budget=..."


def open_engine(
    base: str = "builtin:base",
    adapters: Mapping[str, str | PathLike[str]] | None = None,
    *,
    name: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    storage: Storage | None = None,
    **options: Any,
) -> BatchingEngine:
    """The engine for a base with adapters; it is not started.

    Args:
        base: builtin:base, a model folder or a Hub id.
        adapters: name -> folder.
        name: of the base in requests; None for the base as given.
        dtype: of the base.
        storage: NF4 quantises the base while it is read.
        options: as of `engine_of`.

    Raises:
        LoraryError: the base cannot be loaded; or every adapter that cannot be served, with every reason.

    Example:
        >>> engine = open_engine("builtin:base", {"summaries": "out/"})
        >>> engine.start()
    """
    section = with_tokens_of(ModelSection.of(base, dtype=dtype), adapters or {})
    model = _loaded(section, storage)
    engine = engine_of(model, load_tokenizer(section), name or base, **options)
    problems = list[Diagnostic]()
    for adapter, folder in (adapters or {}).items():
        try:
            engine.load(adapter, str(folder))
        except LoraryError as error:
            problems += error.problems_of(adapter)
    if problems:
        engine.stop()
        raise FileError("cannot serve these adapters:", problems)
    return engine


def _loaded(section: ModelSection, storage: Storage | None) -> Any:
    """The base, on the GPU if there is one."""
    try:
        model: Any = load_model(section, storage)
        return model.to("cuda") if torch.cuda.is_available() else model
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fix = "serve it quantised (--quantize nf4) or in --dtype bfloat16, or take a smaller one"
        raise LoraryError(
            "the base does not fit into memory:", [Diagnostic(section.id, allocator_message(error), fix)]
        ) from None


def engine_of(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    root: str | PathLike[str] | None = None,
    budget: int | None = None,
    host_budget: int | None = None,
    limits: Limits | None = None,
    policy: Policy | None = None,
    most_waiting: int = 1024,
    most_tokens_of_batch: int | None = None,
    page: int = 32,
) -> BatchingEngine:
    """The engine for a base in memory; it is not started.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        name: as requests call it.
        root: the folder below which adapters are found by name, and to which loading is confined once it has started;
            None: neither.
        budget: bytes of adapters, keys and values beside the base; None for `default_budget`.
            If a second copy of the base's linear weights takes little of it, an adapter that has the batch to itself
            for some passes (`steps_worth_merging`) is merged into one.
        host_budget: bytes of adapters on the host; None for twice the budget, or twice `most_budget`.
        limits: of an adapter.
        policy: of the queue.
        most_waiting: requests that wait, at most.
        most_tokens_of_batch: tokens of a forward pass, at most: longer prompts are computed in parts; None for 512,
            4,096 on a GPU.
        page: tokens whose keys and values lie together: beginnings of prompts are shared in whole pages.

    Raises:
        LoraryError: the root or the budget cannot be used, or no way of computing the model gives its own logits.
    """
    found = AdapterRoot(root) if root is not None else None
    policy, most = policy or Policy(), most_budget(model.device) if budget is None else budget
    if most_tokens_of_batch is None:
        most_tokens_of_batch = 512 if model.device.type == "cpu" else 4096
    spare = spare_bytes(model)
    merged = spare if spare <= most * _SHARE_OF_MERGED else 0
    if budget is None:
        budget = default_budget(model, policy, page=page, merged=merged)
    layers = ServedLayers(model, merged_budget=merged)
    shape = Shape(budget - merged, page, most_tokens_of_batch, policy.max_running)
    runner = choose_runner(model, layers, name, shape)
    pool = Pool(runner.arena, host_bytes=host_budget or 2 * most, keep=runner.kept)
    runner.make_room = pool.make_room
    if policy.budget is None:
        policy = replace(policy, budget=pool.space.capacity)
    loader = Loader(model, limits=limits, pin_memory=model.device.type == "cuda", tokenizer=tokenizer)
    return BatchingEngine(
        tokenizer,
        name,
        runner,
        layers,
        Registry(pool, loader, root=found, reserved=[name]),
        policy,
        ends=end_tokens(model),
        vocabulary=int(text_config(model).vocab_size),
        max_context=max_context(text_config(model)),
        most_waiting=most_waiting,
    )


def choose_runner(model: Any, layers: ServedLayers, name: str, shape: Shape) -> Runner:
    """The fastest runner that computes what the model computes; what is not the fastest one is logged.

    Continuous batching refuses some models and computes others wrongly, those with ALiBi, say: a few logits tell.

    Args:
        model: a causal language model in evaluation mode.
        layers: its layers.
        name: of the base, for the log.
        shape: of its batches.

    Raises:
        LoraryError: none does.
    """

    def paged_runner() -> Runner:
        from lorary.serve.engine.continuous import PagedRunner

        return PagedRunner(model, layers, shape)

    probe, reasons = Probe(model), list[str]()
    ways: dict[str, Callable[[], Runner]] = {
        "continuous batching": paged_runner,
        "padded batches": lambda: PaddedRunner(model, layers, shape),
        "batches of prompts of equal length": lambda: PaddedRunner(model, layers, shape, pads=False),
    }
    for way, make in ways.items():
        try:
            runner = make()
        except ConfigError:
            raise
        except Exception as failure:
            if is_out_of_memory(failure):  # another way would take as much
                problem = Diagnostic("budget", allocator_message(failure), _LESS.format(human_bytes(shape.budget)))
                raise LoraryError("no memory for adapters, keys and values:", [problem]) from None
            reasons.append(f"{way}: {_first_line(failure)}")
            continue
        try:
            error = probe.error(runner)
        except Exception as failure:
            reasons.append(f"{way}: {_first_line(failure)}")
        else:
            if error <= probe.tolerance:
                if reasons:
                    logger.warning("%s is computed in %s, which is slower (%s)", name, way, "; ".join(reasons))
                return runner
            reasons.append(f"{way}: its logits differ by {error:.2g} of the largest")
        runner.close()
    raise LoraryError(f"cannot serve {name}:", [Diagnostic("", reason) for reason in reasons])


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
