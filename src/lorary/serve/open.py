"""The engine for a base: the base is loaded, and the way to compute it is chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from lorary.errors import Diagnostic, LoraryError
from lorary.layers.rope import max_context, text_config
from lorary.serve.engine import Engine

if TYPE_CHECKING:
    from lorary.serve.layers import ServedLayers
    from lorary.serve.runner import Runner

logger = logging.getLogger(__name__)


def open_engine(
    base: str = "builtin:base",
    adapters: Mapping[str, str | PathLike[str]] | None = None,
    *,
    dtype: str = "auto",
) -> Engine:
    """The engine for a base with adapters; it is not started.

    Args:
        base: builtin:base, a model folder or a Hub id.
        adapters: name -> folder.
        dtype: of the base.

    Raises:
        LoraryError: the base cannot be loaded, or an adapter cannot be served.

    Example:
        >>> engine = open_engine("builtin:base", {"summaries": "out/"})
        >>> engine.start()
    """
    from lorary.model.loading.from_pretrained import load_model, load_tokenizer
    from lorary.model.loading.source import ModelSection

    section = ModelSection.of(base, dtype=dtype)
    model: Any = load_model(section)
    engine = engine_of(model, load_tokenizer(section), base)
    for name, folder in (adapters or {}).items():
        engine.load(name, str(folder))
    return engine


def engine_of(model: Any, tokenizer: Any, name: str) -> Engine:
    """The engine for a base in memory; it is not started.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        name: as requests call it.

    Raises:
        LoraryError: no way of computing it gives the model's own logits.
    """
    from lorary.serve.batching import BatchingEngine
    from lorary.serve.layers import ServedLayers
    from lorary.serve.policy import Policy
    from lorary.serve.store import AllInMemory

    layers = ServedLayers(model)
    runner = choose_runner(model, layers, name)
    ends = model.generation_config.eos_token_id
    return BatchingEngine(
        tokenizer,
        name,
        runner,
        layers,
        AllInMemory(model),
        Policy(max_running=runner.most_rows),
        ends={ends} if isinstance(ends, int) else set(ends or ()),
        max_context=max_context(text_config(model)),
    )


def choose_runner(model: Any, layers: ServedLayers, name: str, **paged: Any) -> Runner:
    """The fastest runner that computes what the model computes; what is not the fastest one is logged.

    Continuous batching refuses some models and computes others wrongly, those with ALiBi, say: a few logits tell.

    Args:
        model: a causal language model in evaluation mode.
        layers: its layers.
        name: of the base, for the log.
        paged: arguments of `PagedRunner`.

    Raises:
        LoraryError: none does.
    """
    from lorary.serve.padded import PaddedRunner
    from lorary.serve.probe import Probe

    def paged_runner() -> Runner:
        from lorary.serve.continuous import PagedRunner

        return PagedRunner(model, layers, **paged)

    probe, reasons = Probe(model), list[str]()
    ways: dict[str, Callable[[], Runner]] = {
        "continuous batching": paged_runner,
        "padded batches": lambda: PaddedRunner(model, layers),
        "batches of prompts of equal length": lambda: PaddedRunner(model, layers, pads=False),
    }
    for way, make in ways.items():
        try:
            runner = make()
            error = probe.error(runner)
        except Exception as failure:
            reasons.append(f"{way}: {str(failure).splitlines()[0]}" if str(failure) else f"{way}: {failure!r}")
            continue
        if error <= probe.tolerance:
            if reasons:
                logger.warning("%s is computed in %s, which is slower (%s)", name, way, "; ".join(reasons))
            return runner
        reasons.append(f"{way}: its logits differ by {error:.2g} of the largest")
        runner.close()
    raise LoraryError(f"cannot serve {name}:", [Diagnostic("", reason) for reason in reasons])
