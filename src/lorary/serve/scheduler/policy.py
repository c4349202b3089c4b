"""The values of scheduling: the policy's settings, what it decides on, and what it has decided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorary.errors import ConfigError, Diagnostic
from lorary.serve.scheduler.pending import Pending, Waiting


@dataclass(frozen=True)
class Policy:
    """The settings of the policy.

    Args:
        max_running: requests in the batch at most.
        max_adapters: distinct adapters in the batch at most.
        patience: seconds for which a request may be passed over, and for which an adapter may stay in the batch while
            others wait for its place.
        budget: bytes of the adapters of a batch at most; None for no limit of its own: only `Snapshot.free` counts.
        input_weight, output_weight: what a token of the prompt, and a generated one, adds to a tenant's counter.
    """

    max_running: int = 64
    max_adapters: int = 32
    patience: float = 2.0
    budget: int | None = None
    input_weight: float = 1.0
    output_weight: float = 2.0

    def __post_init__(self) -> None:
        lows: dict[str, tuple[float | None, float]] = {
            "max_running": (self.max_running, 1),
            "max_adapters": (self.max_adapters, 1),
            "patience": (self.patience, 0),
            "budget": (self.budget, 1),
            "input_weight": (self.input_weight, 0),
            "output_weight": (self.output_weight, 0),
        }
        problems = [
            Diagnostic(name, f"is {value}, and must be a number from {low}")
            for name, (value, low) in lows.items()
            if value is not None and not (low <= value < math.inf)
        ]
        if not problems and not self.input_weight + self.output_weight:
            problems = [
                Diagnostic("input_weight, output_weight", "are both 0: every tenant's counter would stay there")
            ]
        if problems:
            raise ConfigError("invalid scheduling policy:", problems)

    def weigh(self, prompt: float, generated: float) -> float:
        """What tokens add to a tenant's counter."""
        return self.input_weight * prompt + self.output_weight * generated


@dataclass(frozen=True)
class Snapshot:
    """The input of the policy.

    Args:
        now: the clock, in seconds.
        waiting: the requests whose adapters are in memory.
        running: the requests in the batch.
        resident: uid -> bytes of the adapters beside the base, in use or not.
        sizes: uid -> bytes of every adapter that is waited for.
        free: bytes that are free for adapters, beside what can be evicted.
        served: tenant -> tokens served so far, weighted.
        since: uid -> when an adapter in the batch joined it; one that is not named may be closed at any time.
        pinned: uids that are never evicted.
    """

    now: float
    waiting: Waiting
    running: Sequence[Pending] = ()
    resident: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    free: int = 0
    served: Mapping[str, float] = field(default_factory=dict)
    since: Mapping[str, float] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Decision:
    """The output of the policy.

    Args:
        admit: the ids to take into the batch, in order.
        expired: the ids whose deadline has passed.
        refused: id -> why it can never be admitted.
        until: when it is worth asking again although no request came or ended and no memory became free.
    """

    admit: tuple[str, ...] = ()
    expired: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    until: float = math.inf


def why_never(request: Pending, policy: Policy, own: int = 0, pinned: int = 0) -> str:
    """Why a request can never be admitted; empty if it can.

    Args:
        own: bytes of its adapters.
        pinned: bytes of other adapters that are never evicted.
    """
    reasons = []
    if len(request.adapters) > policy.max_adapters:
        reasons.append(f"it has {len(request.adapters)} adapters, and a batch takes {policy.max_adapters}")
    if policy.budget is not None and own > policy.budget - pinned:
        beside = f" beside {pinned:,} of pinned adapters" if pinned else ""
        reasons.append(f"its adapters need {own:,} bytes, and the budget is {policy.budget:,}{beside}")
    return "; ".join(reasons)
