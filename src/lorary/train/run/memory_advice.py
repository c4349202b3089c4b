"""What to change where a run does not fit: each proposal with the peak that it would have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorary.analysis.memory.gpu_fit import Need
from lorary.errors import LoraryError
from lorary.train.config.config import Config
from lorary.train.run.memory_forecast import Forecast, forecast


@dataclass(frozen=True)
class Proposal:
    """One change of a configuration.

    Args:
        what: in words.
        how: the options that say it.
        need: what the run would need then.
    """

    what: str
    how: str
    need: Need


def proposals(config: Config, now: Forecast, size: float) -> list[Proposal]:
    """What would help on a GPU of `size` GB: what is enough by itself first, then by what it saves.

    The last one is all that is needed together, where nothing is enough alone.
    """
    found = []
    for what, changes in _changes(config):
        then = _tried(config, changes, now)
        if then is not None and then.need.total < 0.99 * now.need.total:
            found.append((Proposal(what, _said(changes), then.need), changes))
    found.sort(key=lambda pair: (pair[0].need.room(size) < 0, pair[0].need.total))
    alone = [proposal for proposal, _ in found]
    if not found or alone[0].need.room(size) >= 0:
        return alone
    return alone + _together(config, [changes for _, changes in found], now, size)


def _changes(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    training, method = config.training, config.method
    if not training.gradient_checkpointing:
        yield "gradient checkpointing", {"training.gradient_checkpointing": True}
    if (batch := training.batch_size) > 1:
        steps = training.gradient_accumulation_steps * batch
        words = {"training.batch_size": 1, "training.gradient_accumulation_steps": steps}
        yield "one sequence at a time, the same batch in all", words
    if (length := config.data.max_length) >= 256:
        yield "sequences of half the length", {"data.max_length": length // 2}
    if "qlora" not in method.name and "full" not in method.name:
        yield "the base in 4 bits", {"method.name": ",".join((*method.name, "qlora"))}
    if training.optimizer in ("adamw_torch", "adamw_torch_fused"):
        yield "optimizer states in 8 bits", {"training.optimizer": "adamw_bnb_8bit"}
        yield "optimizer states in the host's memory", {"training.optimizer": "paged_adamw"}
    if method.name == ("lora",):
        yield "A stays as it is drawn (LoRA-FA)", {"method.name": "lora-fa"}
    if (r := _rank(config)) and r >= 8:
        yield "a quarter of the rank", {"method.r": r // 4}
    if "full" in method.name:
        yield "LoRA instead of all weights", {"method.name": "lora"}


def _rank(config: Config) -> int | None:
    if config.method.r is not None:
        return config.method.r
    return getattr(config.method.build().delta, "r", None)


def _tried(config: Config, changes: dict[str, Any], now: Forecast) -> Forecast | None:
    """The forecast of a changed run; None where the change does not go with the rest."""
    same = not any(key.startswith("method.") for key in changes)
    try:
        return forecast(_changed(config, changes), now.model, now.plan if same else None)
    except (LoraryError, ValueError):
        return None


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    data = config.model_dump(mode="json")
    for key, value in changes.items():
        section, _, field = key.partition(".")
        data[section][field] = value
    return Config.model_validate(data)


def _together(config: Config, several: list[dict[str, Any]], now: Forecast, size: float) -> list[Proposal]:
    """Changes one upon the other, as far as each still helps, until it fits."""
    changes: dict[str, Any] = {}
    least = now.need.total
    for more in several:
        if any(key in changes for key in more):
            continue
        then = _tried(config, changes | more, now)
        if then is None or then.need.total > 0.99 * least:
            continue
        changes, least = changes | more, then.need.total
        if then.need.room(size) >= 0:
            break
    then = _tried(config, changes, now)
    if then is None or not changes:
        return []
    enough = "together" if then.need.room(size) >= 0 else f"all together, and still not {size:g} GB"
    return [Proposal(enough, _said(changes), then.need)]


def _said(changes: dict[str, Any]) -> str:
    return " ".join(f"--set {key}={str(value).lower() if value is True else value}" for key, value in changes.items())
