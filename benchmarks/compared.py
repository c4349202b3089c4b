"""The comparisons that the documentation shows, run by `lorary compare`'s own code on the built-in base.

BitFit trains biases, and the built-in base has none. So the comparisons with it run on the built-in base with a
bias of zeros in every linear layer: the same function of the same weights.

    python benchmarks/compared.py --only layers    # ten to twenty minutes each on two cores
    python benchmarks/compared.py --timings        # the times alone, into the stored records: minutes
    python benchmarks/compared.py --small          # to check the script

Interrupted, a comparison goes on where it was. The records go to `results/comparisons`, from which `docs/generate.py`
makes `docs/compared.md`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from lorary import builtin
from lorary.analysis.comparison import store
from lorary.analysis.comparison.record import Arm, Comparison
from lorary.analysis.comparison.statistics import findings
from lorary.train.compare.compare import compare
from lorary.train.compare.settings import Settings
from lorary.train.config.load import from_dict

RESULTS = Path(__file__).parent / "results" / "comparisons"
HEADERS, TOPICS = "builtin:c-headers", "builtin:topics"


@dataclass(frozen=True)
class Asked:
    """One comparison.

    Args:
        arms: name -> its section of the configuration; `rates` are its learning rates.
        data: that is learned.
        steps: optimizer steps of a run.
        biases: whether the base has biases.
    """

    arms: dict[str, dict[str, Any]]
    data: str = HEADERS
    steps: int = 40
    biases: bool = False


def lora(r: int, targets: str = "all-linear") -> dict[str, Any]:
    """LoRA with alpha = 2 r."""
    return {"name": "lora", "r": r, "alpha": 2.0 * r, "targets": targets}


BASELINES = {
    "LoRA, r = 8": lora(8),
    "full fine-tuning": {"name": "full"},
    "bottleneck, m = 16": {"name": "houlsby", "options": {"m": 16}},
    "BitFit": {"name": "bitfit"},
    "(IA)³": {"name": "ia3"},
    "prefix, 10 tokens": {"name": "prefix-tuning", "options": {"tokens": 10}, "rates": (0.01, 0.03, 0.1)},
    "prompt, 20 tokens": {"name": "prompt-tuning", "options": {"tokens": 20}, "rates": (0.03, 0.1, 0.3)},
}
CLAIMS = {"LoRA": lora(8)} | {
    name: {"name": name.lower(), "r": 8, "alpha": 16.0} for name in ("LoRA+", "DoRA", "PiSSA", "OLoRA", "LoRA-FA")
}
CLAIMS |= {"AdaLoRA": {"name": "adalora", "r": 12, "options": {"target": 8}}, "full fine-tuning": {"name": "full"}}
COMPARISONS = {
    "layers": Asked(
        {
            "all linear layers, r = 8": lora(8),
            "MLP, r = 13": lora(13, "mlp"),
            "attention, r = 22": lora(22, "attention"),
            "q and v, r = 44": lora(44, "attention-qv"),
        }
    ),
    "ranks": Asked({f"r = {r}": lora(r) for r in (1, 2, 8, 32, 64)}),
    "baselines": Asked(BASELINES, biases=True),
    "baselines-prose": Asked(BASELINES, TOPICS, biases=True),
    "claims": Asked(CLAIMS),
}
BIASED = "builtin:base with biases of zero"
TIMES = ("step_seconds", "forward", "merged_forward")
LR = 2e-3  # LoRA's best by the page of claims; the centres of all other methods move by the same factor


def with_biases(folder: Path) -> Path:
    """A folder with the built-in base in which every linear layer but the head has a bias of zeros."""
    base, path = builtin.load_model(torch.bfloat16), folder / "base-with-biases"
    config = copy.deepcopy(base.config)
    config.attention_bias = config.mlp_bias = True
    model = type(base)(config).to(torch.bfloat16)
    missing = model.load_state_dict(base.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        for key in missing:
            model.get_parameter(key).zero_()
    model.save_pretrained(path)
    builtin.load_tokenizer().save_pretrained(path)
    return path


def tree(asked: Asked, model: str = "builtin:base") -> dict[str, Any]:
    """The configuration of all runs of a comparison."""
    return {
        "model": model,
        "data": {"train": asked.data, "validation": asked.data, "max_length": 128},
        "training": {"max_steps": asked.steps, "batch_size": 4, "gradient_accumulation_steps": 1, "lr": LR},
    }


def compared(
    name: str, asked: Asked, folder: Path, small: bool, rates: Mapping[str, tuple[float, ...]] | None = None
) -> Comparison:
    """Run a comparison, or go on with it.

    Args:
        name, asked: of it.
        folder: in which those of all comparisons are.
        small: a few steps and rows.
        rates: arm -> its learning rates, if not those of `asked`.
    """
    asked = dataclasses.replace(asked, steps=2) if small else asked
    arms = [
        Arm(arm, {k: v for k, v in method.items() if k != "rates"}, (rates or {}).get(arm, method.get("rates", ())))
        for arm, method in asked.arms.items()
    ]
    few = {"rates": 1, "outward": 0, "seeds": 1, "validation_rows": 2, "test_rows": 4, "general_rows": 2}
    settings = Settings(**few) if small else Settings(seeds=3, validation_rows=32, test_rows=96, general_rows=48)
    model = str(with_biases(folder)) if asked.biases else "builtin:base"
    config = from_dict(tree(asked, model) | {"output": str(folder / name)})
    with Progress() as progress:
        task = progress.add_task(name)
        return compare(config, arms, settings, folder / name, progress=lambda **change: progress.update(task, **change))


def run(name: str, asked: Asked, folder: Path, small: bool, command: str = "") -> None:
    """Run a comparison, or go on with it, and store its record with the command that repeats it."""
    found = compared(name, asked, folder, small)
    if small or found.left_out:
        print(f"{name}: {found.left_out or 'runs'}")
        return
    keep(name, asked, found, command or f"python benchmarks/compared.py --only {name}")


def keep(name: str, asked: Asked, found: Comparison, command: str) -> None:
    """Store a record, with the command that repeats it and without the folders of this machine."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in found.settings.items() if key != "request"}
    kept["config"] = re.sub(r"^output: .*\n", "", kept["config"], flags=re.MULTILINE)
    if asked.biases:
        kept["config"] = kept["config"].replace(kept["model"], BIASED)
        kept["model"] = BIASED
    trials = tuple(dataclasses.replace(trial, folder="") for trial in found.trials)
    store.write(
        dataclasses.replace(found, settings=kept | {"command": command}, trials=trials), RESULTS / f"{name}.json"
    )


def time_again(name: str, asked: Asked, folder: Path) -> None:
    """Measure the times in a record again, for a comparison that ran beside other work."""
    file = RESULTS / f"{name}.json"
    record = store.read(file)
    rates = {standing.arm: (standing.lr,) for standing in findings(record).standings if standing.lr}
    timed = compared(name, asked, folder, True, rates).costs
    if missing := record.costs.keys() - timed.keys():
        raise SystemExit(f"{name}: not timed: {', '.join(sorted(missing))}")
    costs = {
        arm: dataclasses.replace(cost, **{key: getattr(timed[arm], key) for key in TIMES})
        for arm, cost in record.costs.items()
    }
    store.write(dataclasses.replace(record, costs=costs, settings=record.settings | {"timed_again": True}), file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=list(COMPARISONS), help="a comparison; may be said again")
    parser.add_argument("--small", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--timings", action="store_true", help="only the times again, into the stored records")
    parser.add_argument("--folder", type=Path, help="for the runs; by default a new temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="compared-"))
    if arguments.timings:
        for name in arguments.only or [name for name in COMPARISONS if (RESULTS / f"{name}.json").exists()]:
            time_again(name, COMPARISONS[name], folder)
        return
    for name in arguments.only or COMPARISONS:
        run(name, COMPARISONS[name], folder, arguments.small)


if __name__ == "__main__":
    main()
