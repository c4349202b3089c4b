"""lorary plan: what a method would adapt in a model, and what that takes, before any weight is read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorary.train.config.config import Config
    from lorary.train.runner.memory_forecast import Forecast


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
    memory: Annotated[
        float | None,
        typer.Option("--memory", min=0.1, max=1e6, help="Your GPU's memory in GB: what to change to fit into it."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Simulate a step of all blocks as well, in Transformers' own code.")
    ] = False,
) -> None:
    """Show what would be trained: sites, shapes, parameters, memory, and which GPUs it fits on.

    Reads the model's configuration, not its weights: lorary plan Qwen/Qwen3-8B --method lora --r 16
    """
    import gc

    words = {"name": method, "r": r, "alpha": alpha, "targets": targets, "exclude": exclude}
    given = [f"method.{key}={value}" for key, value in words.items() if value is not None] + (sets or [])
    gc.disable()  # imports make many objects and no garbage: a tenth of the time less
    try:
        config = _config(model, given)
    finally:
        gc.enable()
    _show(config, memory, check)
    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)


def _config(model: str, given: list[str]) -> Config:
    from lorary.train.config.load import from_dict, load

    if Path(model).suffix in (".yaml", ".yml"):
        return load(model, given)
    return from_dict({"model": model, "data": "builtin:docstrings"}, given)


def _show(config: Config, size: float | None, check: bool) -> None:
    from lorary.cli._memory_table import show
    from lorary.model.loading.checkpoint_kind import reader
    from lorary.model.loading.from_pretrained import fast_skeleton, skeleton
    from lorary.train.runner.memory_forecast import forecast

    # a method that changes how the model attends does so in Transformers' code
    bare = fast_skeleton(config.model) if config.method.build().context is None else skeleton(config.model)
    found = forecast(config, bare)
    reader(config.model.id, bare.config, found.plan.method.storage, None)  # refuses what is packed in another way
    print(found.plan)
    show(config, found, size)
    if check:
        print(_checked(config, found))


def _checked(config: Config, found: Forecast) -> str:
    """The same by all blocks of Transformers' own model, and how far the prediction is off."""
    from lorary.analysis.memory.predict import predict
    from lorary.model.loading.from_pretrained import skeleton
    from lorary.model.plan import human_bytes
    from lorary.train.runner.memory_forecast import workload

    model = skeleton(config.model)
    counted = predict(model, found.plan, workload(config, model), config.training.optimizer, whole=True)
    if counted.activations is None:
        return f"\na step without data cannot be run: {counted.notes[-1]}"
    off = found.memory.total / counted.total - 1
    return f"\na step of all blocks: {human_bytes(counted.total)}; the prediction is off by {off:+.1%}"
