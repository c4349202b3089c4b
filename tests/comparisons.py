"""A comparison that looks measured, with planted differences: for tests of what is said about one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lorary.analysis.comparison.record import Arm, Comparison, Cost, Ending, Merge, Scores, Trial

RATES = (1e-4, 3e-4, 1e-3)
EFFECTS = {"lora": 0.0, "dora": -0.002, "pissa": -0.08, "lora+": 0.003, "vera": 0.25, "ia3": 0.4}
TRAINED = {"lora": 81_920, "dora": 87_552, "pissa": 81_920, "lora+": 81_920, "vera": 2_304, "ia3": 2_560}


def scores(generator: np.random.Generator, per_row: np.ndarray, tokens: np.ndarray, right: float) -> Scores:
    """Scores around a mean loss of each row."""
    nats = np.maximum(0.01, per_row + generator.normal(0, 0.02, len(tokens))) * tokens
    hits = generator.binomial(tokens, min(0.99, right))
    return Scores(tuple(map(float, nats)), tuple(map(int, tokens)), tuple(map(int, hits)))


def curve(start: float, end: float, steps: int) -> tuple[tuple[int, float], ...]:
    """A falling validation loss."""
    at = range(0, steps + 1, max(1, steps // 6))
    return tuple((step, end + (start - end) * math.exp(-5 * step / steps)) for step in at)


def comparison(
    effects: Mapping[str, float] = EFFECTS,
    *,
    seeds: int = 2,
    rows: int = 120,
    seed_noise: float = 0.01,
    classifier: bool = False,
    seed: int = 0,
) -> Comparison:
    """A comparison in which each method's loss is 3.4 plus its effect, and the middle one of three rates is best."""
    generator = np.random.default_rng(seed)
    tokens = np.ones(rows, int) if classifier else generator.integers(12, 64, rows)
    level = 0.8 if classifier else 3.4
    test_rows, general_rows = (level + generator.normal(0, 0.3, rows) for _ in range(2))
    trials = []
    for name, effect in effects.items():
        own = generator.normal(0, 0.02, rows)  # what a method does to single rows
        for k, lr in enumerate(RATES):
            ending: Ending = "hopeless" if name == "vera" and k == 0 else "finished"
            steps = 40 if ending == "hopeless" else 120
            validation = curve(5.0, level + effect + (0.2, 0.0, 0.1)[k], 120)[: 3 if steps == 40 else None]
            for run in range(seeds if k == 1 else 1):
                at = level + effect + generator.normal(0, seed_noise)
                test = general = None
                if k == 1:
                    test = scores(generator, test_rows + own + at - level, tokens, 0.9 - effect)
                    general = scores(generator, general_rows + 0.05 + own, tokens, 0.4)
                folder = f"runs/{name}-{lr:g}-{run}"
                trials.append(
                    Trial(name, lr, 1000 + 17 * len(trials), steps, validation, ending, test, general, folder)
                )
    costs = {name: cost(generator, name) for name in effects}
    arms = tuple(Arm(name, {"name": [name.split("-")[0]], "r": 8}, RATES) for name in effects)
    base = None if classifier else scores(generator, test_rows + 1.6, tokens, 0.2)
    task = "classification" if classifier else "sft"
    left_out = {"loha": "its rank of 8 does not fit into the budget of 20 minutes"}
    base_general = None if classifier else scores(generator, general_rows, tokens, 0.4)
    return Comparison(SETTINGS, task, arms, tuple(trials), base, base_general, costs, left_out)


def diverged(record: Comparison, arm: str, seeds: int = 1) -> Comparison:
    """The comparison with this many judged runs of an arm diverged."""
    runs = [run for run in record.trials if run.arm == arm and run.test][:seeds]
    changed = {run.seed: replace(run, ending="diverged", test=None, general=None) for run in runs}
    return replace(record, trials=tuple(changed.get(run.seed, run) for run in record.trials))


def cost(generator: np.random.Generator, name: str) -> Cost:
    """The cost of a method."""
    trained = TRAINED.get(name, 81_920)
    seconds = tuple(map(float, generator.gamma(400, 0.25 / 400, 24)))
    engines = {"vllm": "" if name in ("lora", "lora+") else f"it has no {name}", "llama.cpp": "", "lorary": ""}
    merge: Merge = "to rounding" if name == "dora" else "exactly"
    return Cost(trained, trained * 4 + 2_400, 61_000_000 + trained * 16, seconds, merge, engines)


SETTINGS = {
    "base": "builtin:base",
    "data": "builtin:topics",
    "targets": "all-linear",
    "steps": 120,
    "batch": 8,
    "seeds": 2,
    "budget": "20 min",
    "command": "lorary compare config.yaml --methods lora,dora,pissa,lora+,vera,ia3",
    "versions": {"python": "3.12.3", "torch": "2.13.0", "lorary": "0.6.0"},
    "machine": {"processor": "2 cores", "memory": "8 GiB"},
    "hashes": {"base": "9c1f" * 16, "data": "02ab" * 16},
}
