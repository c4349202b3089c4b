"""Proposals for a run that does not fit into memory, each with its predicted peak."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorary.analysis.memory.gpu_fit import GpuRequirement
from lorary.errors import LoraryError
from lorary.train.config.config import Config
from lorary.train.runner.memory_forecast import Forecast, forecast


@dataclass(frozen=True)
class Proposal:
    """One change of a configuration.

    Args:
        what: its description.
        how: its command-line options.
        need: of the changed run.
    """

    what: str
    how: str
    need: GpuRequirement


def proposals(config: Config, now: Forecast, size: float) -> list[Proposal]:
    """The changes that save memory on a GPU of `size` GB: sufficient ones first, then by the peak that they leave.

    If none is sufficient alone, the last proposal combines several.
    """
    helpful = []
    for what, changes in _changes(config):
        need = _need_after(config, changes, now)
        if need is not None and need.total < 0.99 * now.need.total:
            helpful.append((Proposal(what, _as_options(changes), need), changes))
    helpful.sort(key=lambda pair: (pair[0].need.free_bytes(size) < 0, pair[0].need.total))
    alone = [proposal for proposal, _ in helpful]
    if not helpful or alone[0].need.free_bytes(size) >= 0:
        return alone
    return [*alone, _combined(config, [changes for _, changes in helpful], now, size)]


def _changes(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    training, method = config.training, config.method
    if not training.gradient_checkpointing:
        yield "gradient checkpointing", {"training.gradient_checkpointing": True}
    if (batch := training.batch_size) > 1:
        steps = training.gradient_accumulation_steps * batch
        changes = {"training.batch_size": 1, "training.gradient_accumulation_steps": steps}
        yield "one sequence at a time, the same batch in all", changes
    if (length := config.data.max_length) >= 256:
        yield "sequences of half the length", {"data.max_length": length // 2}
    if "qlora" not in method.name and "full" not in method.name:
        yield "the base in 4 bits", {"method.name": ",".join((*method.name, "qlora"))}
    if training.optimizer in ("adamw_torch", "adamw_torch_fused"):
        yield "optimizer states in 8 bits", {"training.optimizer": "adamw_bnb_8bit"}
        yield "optimizer states in the host's memory", {"training.optimizer": "paged_adamw"}
    if method.name == ("lora",):
        yield "a frozen A (LoRA-FA)", {"method.name": "lora-fa"}
    if (r := _rank(config)) and r >= 8:
        yield "a quarter of the rank", {"method.r": r // 4}
    if "full" in method.name:
        yield "LoRA instead of all weights", {"method.name": "lora"}


def _rank(config: Config) -> int | None:
    if config.method.r is not None:
        return config.method.r
    return getattr(config.method.build().delta, "r", None)


def _need_after(config: Config, changes: dict[str, Any], now: Forecast) -> GpuRequirement | None:
    """The GPU memory of the changed run; None if the changes contradict the rest of its configuration."""
    data = config.record()
    for key, value in changes.items():
        section, _, field = key.partition(".")
        data[section][field] = value
    same_plan = not any(key.startswith("method.") for key in changes)
    try:
        return forecast(Config.model_validate(data), now.model, now.plan if same_plan else None).need
    except (LoraryError, ValueError):
        return None


def _combined(config: Config, candidates: list[dict[str, Any]], now: Forecast, size: float) -> Proposal:
    """Changes added one by one, as far as each still helps, until the run fits."""
    changes: dict[str, Any] = {}
    best = now.need
    for more in candidates:
        need = None if changes.keys() & more.keys() else _need_after(config, changes | more, now)
        if need is not None and need.total <= 0.99 * best.total:
            changes, best = changes | more, need
        if best.free_bytes(size) >= 0:
            break
    enough = "together" if best.free_bytes(size) >= 0 else f"all together, and still not {size:g} GB"
    return Proposal(enough, _as_options(changes), best)


def _as_options(changes: dict[str, Any]) -> str:
    return " ".join(f"--set {key}={str(value).lower() if value is True else value}" for key, value in changes.items())
