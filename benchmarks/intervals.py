"""Whether the intervals of `lorary compare` hold the true difference as often as they say, and how wide they are.

    python benchmarks/intervals.py

Losses of methods without a difference are drawn with noise of rows, of seeds, and of both together, and with equal or
unequal spreads over the seeds. Beside it: Welch's interval, which takes every method's spread from its own seeds alone.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from cases import machine, new_table
from lorary.analysis.comparison._chance import Measured

Floats = NDArray[np.float64]
SEED, ROW, BOTH = 0.01, 0.05, 0.03  # standard deviations: of a seed, of a row of a method, of a row with a seed


def equal(generator: np.random.Generator, arms: int) -> Floats:
    """All methods scatter alike over their seeds."""
    return np.full(arms, SEED)


def unequal(generator: np.random.Generator, arms: int) -> Floats:
    """Spreads that mostly differ by a factor of 2 (the logarithm has a standard deviation of 0.7)."""
    return SEED * np.exp(generator.normal(0, 0.7, arms))


def one_wild(generator: np.random.Generator, arms: int) -> Floats:
    """The first method scatters ten times as much as the others."""
    return SEED * np.where(np.arange(arms) == 0, 10.0, 1.0)


SPREADS: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "equal": equal,
    "unequal": unequal,
    "one wild": one_wild,
}


def drawn(generator: np.random.Generator, spreads: Floats, seeds: int, rows: int, effect: float) -> Measured:
    """A comparison in which the first method is worse by an effect, and the others are equal."""
    tokens = generator.integers(5, 60, rows).astype(np.float64)
    common = generator.normal(3, 1, rows)
    sums = {}
    for i, spread in enumerate(spreads):
        means = common + generator.normal(0, ROW, rows) + (effect if i == 0 else 0.0)
        sums[str(i)] = means + generator.normal(0, spread, (seeds, 1)) + generator.normal(0, BOTH, (seeds, rows))
    return Measured({arm: table * tokens for arm, table in sums.items()}, tokens)


def welch(found: Measured, rows_variance: float) -> float:
    """Half of Welch's interval, with a known variance of the rows."""
    parts = [(found.seeds[arm].var(ddof=1) / len(found.seeds[arm]), len(found.seeds[arm]) - 1) for arm in "01"]
    variance = rows_variance + sum(v for v, _ in parts)
    freedom = variance**2 / sum(v**2 / d for v, d in parts)
    return math.sqrt(variance) * students_t(round(min(freedom, 200.0), 1))


@cache
def students_t(freedom: float) -> float:
    """The two-sided 95 % point."""
    return float(np.quantile(np.abs(np.random.default_rng(0).standard_t(freedom, 200_000)), 0.95))


def simulate(spread: str, seeds: int, arms: int, rows: int, times: int) -> dict[str, Any]:
    """Shares of comparisons whose intervals hold the truth, and the share in which a planted effect is found."""
    generator = np.random.default_rng(1)
    every = [*combinations(map(str, range(arms)), 2)]
    counts = dict.fromkeys(("pair", "all pairs", "welch", "found"), 0)
    widths: dict[str, list[float]] = {"pair": [], "welch": []}
    for _ in range(times):
        found = drawn(generator, SPREADS[spread](generator, arms), seeds, rows, 0.0)
        errors = {pair: abs(found.value(*pair)) for pair in every}
        halves = {pair: found.half_width(*pair) for pair in every}
        factor = found.joint_factor(every)
        counts["pair"] += errors["0", "1"] <= halves["0", "1"]
        counts["all pairs"] += all(errors[pair] <= factor * halves[pair] for pair in every)
        of_welch = welch(found, 2 * ROW**2 / rows)
        counts["welch"] += errors["0", "1"] <= of_welch
        widths["pair"].append(halves["0", "1"])
        widths["welch"].append(of_welch)
        planted = drawn(generator, SPREADS[spread](generator, arms), seeds, rows, 3 * SEED)
        counts["found"] += abs(planted.value("0", "1")) > planted.half_width("0", "1")
    shares = {name: count / times for name, count in counts.items()}
    return {"spread": spread, "seeds": seeds, "arms": arms} | shares | {
        f"half width, {name}": float(np.median(values)) for name, values in widths.items()
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=400)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--arms", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "intervals.json")
    arguments = parser.parse_args()
    columns = ("seeds", "methods", "a pair", "all pairs", "Welch", "±", "± Welch", "3 sd found")
    table, results = new_table("intervals that hold the truth", *columns), []
    for spread in SPREADS:
        for seeds in (2, 3):
            for arms in arguments.arms:
                found = simulate(spread, seeds, arms, arguments.rows, arguments.times)
                results.append(found)
                shares = [f"{found[name]:.3f}" for name in ("pair", "all pairs", "welch")]
                halves = [f"{found[f'half width, {name}']:.3f}" for name in ("pair", "welch")]
                table.add_row(spread, str(seeds), str(arms), *shares, *halves, f"{found['found']:.2f}")
    Console().print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(arguments), "intervals": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
