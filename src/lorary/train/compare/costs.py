"""The costs of the arms at their best rates: numbers, bytes, seconds, latency, merging, engines, context."""

from __future__ import annotations

from typing import Any

import torch

from lorary.adapters.readers.check import check
from lorary.adapters.save_load import ADAPTER_FILES
from lorary.analysis.comparison.record import Cost, Merge, Trial
from lorary.analysis.merge_check import MergeCheck
from lorary.errors import LoraryError
from lorary.model.loading.from_pretrained import skeleton
from lorary.train.compare.bench import Bench, on_device
from lorary.train.compare.latency import over_base
from lorary.train.compare.timing import Timing
from lorary.train.runner.folder import ADAPTER

_ROWS = 2  # on which a merged model is compared with the adapted one
# the largest difference of logits that rounding explains, over the largest logit: of weights, in epsilons, and of sums
_WEIGHTS, _SUMS = 4.0, 1e-4


def cost(bench: Bench, trial: Trial, turns: list[Timing]) -> Cost:
    """The cost of an arm.

    Args:
        bench: of this process.
        trial: a judged run of the arm.
        turns: its short runs.
    """
    plan, folder = bench.plan(bench.request.arm(trial.arm)), f"{trial.folder}/{ADAPTER}"
    path = bench.request.folder / folder
    model = on_device(bench.trained(folder))
    rows: list[Any] = [list(row["input_ids"]) for row in bench.held_out.test[:_ROWS]]
    longest = max(rows, key=len)
    forward = _over_base(bench, folder, model, longest)
    merge, note = _merge(model, rows)
    verdicts = check(path, model=skeleton(plan.config.model, plan.base))
    return Cost(
        trained=plan.plan.trainable,
        file_bytes=sum((path / name).stat().st_size for name in ADAPTER_FILES if (path / name).is_file()),
        peak_bytes=max((turn.peak for turn in turns), default=0),
        step_seconds=tuple(seconds for turn in turns for seconds in turn.steps),
        merge=merge,
        merge_note=note,
        engines={v.reader: "; ".join(str(reason) for reason in v.reasons) for v in verdicts},
        context=max((getattr(site.join, "tokens", 0) for site in plan.plan.sites), default=0),
        forward=forward,
        merged_forward=() if merge == "no" else _over_base(bench, folder, model, longest),
    )


def _over_base(bench: Bench, folder: str, model: Any, row: list[int]) -> tuple[float, ...]:
    """The times of forward passes over the base's; none if a GPU's memory has no room for the two together."""
    try:
        return over_base(on_device(bench.base_of(folder)), model, row)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return ()


def _merge(model: Any, rows: list[Any]) -> tuple[Merge, str]:
    """(how an adapter merges into the base, which it does here; why it does not, or how large the error is)."""
    before = MergeCheck.of(model, rows)
    try:
        report = before.merge(model)
    except LoraryError as error:
        return "no", "; ".join(dict.fromkeys(problem.what for problem in error.problems)) or error.headline
    if report.largest == 0:
        return "exactly", ""
    largest = max(float(logits.abs().max()) for logits in before.logits)
    if report.largest <= max(_SUMS, _WEIGHTS * torch.finfo(model.dtype).eps) * largest:
        return "to rounding", ""
    return "with an error", f"logits of up to {largest:.3g} change by up to {report.largest:.2g}"
