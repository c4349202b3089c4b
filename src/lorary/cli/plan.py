"""lorary plan: adapted sites, parameters and memory of a method, without reading weights."""

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
    exclude: Annotated[str | None, typer.Option("--exclude", help="Exceptions from the targets.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, as in a configuration; may be repeated.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory", min=0.1, max=1e6, help="Your GPU's memory in GB; proposes changes to fit."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Also simulate a step of all blocks, in Transformers' own code.")
    ] = False,
) -> None:
    """Show what would be trained: sites, shapes, parameters, memory, and the GPUs that fit.

    Reads the model's configuration, not its weights: lorary plan Qwen/Qwen3-8B --method lora --r 16
    """
    import gc

    options = {"name": method, "r": r, "alpha": alpha, "targets": targets, "exclude": exclude}
    overrides = [f"method.{key}={value}" for key, value in options.items() if value is not None] + (sets or [])
    gc.disable()  # a tenth faster: imports make many objects and no garbage
    try:
        config = _config(model, overrides)
    finally:
        gc.enable()
    _show(config, memory, check)
    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)


def _config(model: str, overrides: list[str]) -> Config:
    from lorary.train.config.load import from_dict, load

    if Path(model).suffix in (".yaml", ".yml"):
        return load(model, overrides)
    return from_dict({"model": model, "data": "builtin:docstrings"}, overrides)


def _show(config: Config, size: float | None, check: bool) -> None:
    from lorary.cli._memory_table import show
    from lorary.kernels.torch_internals import without_compiler
    from lorary.model.loading.checkpoint_kind import reader
    from lorary.model.loading.from_pretrained import fast_skeleton, skeleton
    from lorary.train.runner.memory_forecast import forecast

    # a context method changes attention in Transformers' code
    model = fast_skeleton(config.model) if config.method.build().context is None else skeleton(config.model)
    with without_compiler():
        found = forecast(config, model)
    reader(config.model.id, model.config, found.plan.method.storage, None)  # refuses unsupported quantised checkpoints
    print(found.plan)
    show(config, found, size)
    if check:
        print(_checked(config, found))


def _checked(config: Config, found: Forecast) -> str:
    """The memory by a step of all blocks of Transformers' own model, and the error of the prediction."""
    from lorary.analysis.memory.predict import predict
    from lorary.model.loading.from_pretrained import skeleton
    from lorary.model.plan import human_bytes
    from lorary.train.runner.memory_forecast import workload

    model = skeleton(config.model)
    counted = predict(model, found.plan, workload(config, model), config.training.optimizer, whole=True)
    if counted.activations is None:
        return f"\na step without data cannot run: {counted.notes[-1]}"
    off = found.memory.total / counted.total - 1
    return f"\na step of all blocks: {human_bytes(counted.total)}; the prediction is off by {off:+.1%}"
