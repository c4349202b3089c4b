"""lorary plan: what a method would adapt in a model, and what that takes, before any weight is read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorary.train.config import Config


def plan(
    model: Annotated[str, typer.Argument(help="Hub id, folder, builtin:base, or a configuration (.yaml).")],
    method: Annotated[str | None, typer.Option("--method", "-m", help="Presets, such as lora,rslora.")] = None,
    r: Annotated[str | None, typer.Option("--r", help="Rank.")] = None,
    alpha: Annotated[str | None, typer.Option("--alpha", help="Adapters are scaled by alpha/r.")] = None,
    targets: Annotated[
        str | None, typer.Option("--targets", "-t", help="all-linear, attention, mlp, component names, globs.")
    ] = None,
    exclude: Annotated[
        str | None, typer.Option("--exclude", help="What stays frozen although targets names it.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, as in a configuration; may be repeated.")
    ] = None,
) -> None:
    """Show what would be trained: sites, shapes, parameters, memory.

    Reads the model's configuration, not its weights: lorary plan Qwen/Qwen3-8B --method lora --r 16
    """
    from lorary.train.config_file import from_dict, load

    words = {"name": method, "r": r, "alpha": alpha, "targets": targets, "exclude": exclude}
    given = [f"method.{key}={value}" for key, value in words.items() if value is not None] + (sets or [])
    if Path(model).suffix in (".yaml", ".yml"):
        config = load(model, given)
    else:
        config = from_dict({"model": model, "data": "builtin:docstrings"}, given)
    _show(config)
    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)


def _show(config: Config) -> None:
    from lorary.train.memory import estimate
    from lorary.train.models import dtype, skeleton

    training, bare = config.training, skeleton(config.model)
    planned = config.method.plan(bare)
    memory = estimate(
        bare,
        planned,
        batch=training.batch_size * (2 if config.task == "dpo" else 1),
        length=config.data.max_length,
        dtype=dtype(config.model, bare.config),
        gradient_checkpointing=training.gradient_checkpointing,
        padding=not config.data.packing and training.batch_size > 1,
    )
    print(f"{planned}\n\nin training, at the fullest moment\n{memory}")
