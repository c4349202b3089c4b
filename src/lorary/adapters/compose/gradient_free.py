"""Gradient-free minimisation of a few numbers within bounds: CMA-ES, by the package `cma`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lorary.errors import Diagnostic, LoraryError

_WORST = 1e30  # replaces NaN and infinity, of which CMA-ES would take the mean
_SPREAD = 6.0  # the first standard deviation is the width of the bounds over this: they are 3 of them from the middle


def require_cma() -> Any:
    """The package `cma`.

    Raises:
        LoraryError: it is not installed.
    """
    try:
        import cma
    except ImportError:
        problem = Diagnostic("cma", "is not installed", 'pip install "lorary[lorahub]"')
        raise LoraryError("cannot search for weights:", [problem]) from None
    return cma


def minimise(
    objective: Callable[[tuple[float, ...]], float], n: int, bounds: tuple[float, float], budget: int, seed: int
) -> None:
    """Evaluate a function at zero, then at the points that CMA-ES asks for; the caller keeps what it has seen.

    Ends early if the search has converged. The global random state is neither used nor changed.

    Args:
        objective: of n numbers; smaller is better, and a value that is not finite is worse than any other.
        n: how many numbers.
        bounds: the least and the greatest of each.
        budget: evaluations at most.
        seed: of the random draws.

    Raises:
        LoraryError: `cma` is not installed.
    """
    import numpy as np

    cma, (low, high) = require_cma(), bounds
    start = min(max(0.0, low), high)
    objective((start,) * n)
    options = {
        "bounds": [low, high],
        "randn": np.random.RandomState(seed).randn,
        "seed": math.nan,  # leaves the global random state alone
        "verbose": -9,
    }
    dimensions = max(n, 2)  # CMA-ES has none of 1: the second number is ignored
    strategy = cma.CMAEvolutionStrategy([start] * dimensions, (high - low) / _SPREAD, options)
    left = budget - 1
    while left > 0 and not strategy.stop():
        points = strategy.ask()[:left]
        values = [objective(tuple(float(min(max(x, low), high)) for x in point[:n])) for point in points]
        left -= len(points)
        if left > 0:  # a generation that the budget cuts short teaches nothing
            strategy.tell(points, [value if math.isfinite(value) else _WORST for value in values])
