"""The comparisons that the documentation shows, run by `lorary compare`'s own code on the built-in base.

    python benchmarks/compared.py --only layers    # ten to twenty minutes each on two cores
    python benchmarks/compared.py --small          # to check the script

Interrupted, a comparison goes on where it was. The records go to `results/comparisons`, from which `docs/generate.py`
makes `docs/compared.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from lorary.analysis.comparison import store
from lorary.analysis.comparison.record import Arm
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
    """

    arms: dict[str, dict[str, Any]]
    data: str = HEADERS
    steps: int = 40


def lora(r: int, targets: str = "all-linear") -> dict[str, Any]:
    """LoRA with alpha = 2 r."""
    return {"name": "lora", "r": r, "alpha": 2.0 * r, "targets": targets}


BASELINES = {
    "LoRA, r = 8": lora(8),
    "LoRA, q and v, r = 8": lora(8, "attention-qv"),
    "full fine-tuning": {"name": "full"},
    "bottleneck, m = 16": {"name": "houlsby", "options": {"m": 16}},
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
    "baselines": Asked(BASELINES),
    "baselines-prose": Asked(BASELINES, TOPICS),
    "claims": Asked(CLAIMS),
}
LR = 2e-3  # LoRA's best by the page of claims; the centres of all other methods move by the same factor


def tree(asked: Asked) -> dict[str, Any]:
    """The configuration of all runs of a comparison."""
    return {
        "model": "builtin:base",
        "data": {"train": asked.data, "validation": asked.data, "max_length": 128},
        "training": {"max_steps": asked.steps, "batch_size": 4, "gradient_accumulation_steps": 1, "lr": LR},
    }


def run(name: str, asked: Asked, folder: Path, small: bool, command: str = "") -> None:
    """Run a comparison, or go on with it, and store its record with the command that repeats it."""
    asked = dataclasses.replace(asked, steps=2) if small else asked
    arms = [
        Arm(arm, {key: value for key, value in method.items() if key != "rates"}, method.get("rates", ()))
        for arm, method in asked.arms.items()
    ]
    few = {"rates": 1, "outward": 0, "seeds": 1, "validation_rows": 2, "test_rows": 4, "general_rows": 2}
    settings = Settings(**few) if small else Settings(validation_rows=32, test_rows=96, general_rows=48)
    with Progress() as progress:
        task = progress.add_task(name)
        config = from_dict(tree(asked) | {"output": str(folder / name)})
        found = compare(
            config, arms, settings, folder / name, progress=lambda **change: progress.update(task, **change)
        )
    if small or found.left_out:
        print(f"{name}: {found.left_out or 'runs'}")
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    command = command or f"python benchmarks/compared.py --only {name}"
    kept = {key: value for key, value in found.settings.items() if key != "request"}
    kept["config"] = re.sub(r"^output: .*\n", "", kept["config"], flags=re.MULTILINE)  # a folder of this machine
    trials = tuple(dataclasses.replace(trial, folder="") for trial in found.trials)
    store.write(
        dataclasses.replace(found, settings=kept | {"command": command}, trials=trials), RESULTS / f"{name}.json"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=list(COMPARISONS), help="a comparison; may be said again")
    parser.add_argument("--small", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--folder", type=Path, help="for the runs; by default a new temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="compared-"))
    for name in arguments.only or COMPARISONS:
        run(name, COMPARISONS[name], folder, arguments.small)


if __name__ == "__main__":
    main()
