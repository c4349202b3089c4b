"""lorary plan: adapted sites, parameters and memory of a method, without reading weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import nn

    from lorary.model.plan import Plan
    from lorary.train.config.config import Config
    from lorary.train.config.load import Flags
    from lorary.train.runner.memory_forecast import Forecast


def plan(
    model: Annotated[str, typer.Argument(help="Hub id, folder, builtin:base, or a configuration (.yaml).")],
    method: Annotated[str | None, typer.Option("--method", "-m", help="Presets, such as lora,rslora.")] = None,
    r: Annotated[str | None, typer.Option("--r", "--rank", help="Rank.")] = None,
    alpha: Annotated[str | None, typer.Option("--alpha", help="Adapters are scaled by alpha/r.")] = None,
    targets: Annotated[
        str | None, typer.Option("--targets", "-t", help="all-linear, attention, mlp, names, globs, re:REGEX.")
    ] = None,
    exclude: Annotated[str | None, typer.Option("--exclude", help="Exceptions from the targets.")] = None,
    layers: Annotated[str | None, typer.Option("--layers", help="Blocks to adapt, such as 0-15 or 0,1,-1.")] = None,
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
    advise: Annotated[
        bool, typer.Option("--advise", help="Choose what is left open as `lorary advise` does; reads the data.")
    ] = False,
    data: Annotated[str | None, typer.Option("--data", help="With --advise: the data of a model.")] = None,
) -> None:
    """Show what would be trained: sites, shapes, parameters, memory, and the GPUs that fit.

    Reads the model's configuration, not its weights: lorary plan Qwen/Qwen3-8B --method lora --r 16
    """
    import gc

    from lorary.cli._notes import print_notes

    options = {"method": method, "r": r, "alpha": alpha, "targets": targets, "exclude": exclude, "layers": layers}
    keys = {"method": "name"}
    flags = {f"--{k}": (f"method.{keys.get(k, k)}", value) for k, value in options.items() if value is not None}
    if advise or data is not None:
        _advised(model, data, sets or [], flags, memory, check, advise=advise)
        return
    gc.disable()  # a tenth faster: imports make many objects and no garbage
    try:
        config = _config(model, sets or [], flags)
    finally:
        gc.enable()
    _show(config, memory, check, alone=not _is_file(model) and "task" not in config.model_fields_set)
    print_notes(config.notes)


def _advised(
    model: str, data: str | None, sets: list[str], flags: Flags, memory: float | None, check: bool, *, advise: bool
) -> None:
    """Show the advice, and the plan of the configuration that follows from it.

    Raises:
        ConfigError: there are data without --advise.
        LoraryError: the model or the data cannot be used.
    """
    from lorary.cli import printable
    from lorary.cli._advice import advice_for, configuration
    from lorary.cli._notes import print_notes
    from lorary.errors import ConfigError, Diagnostic

    if not advise:
        problem = Diagnostic("--data", "only advice reads data here", "use it with --advise")
        raise ConfigError("invalid command line:", [problem])
    found = advice_for(configuration(model, data, sets, flags), memory)
    print(f"{printable(str(found))}\n")
    _show(found.config, memory, check, alone=False)
    print_notes(found.notes)


def _config(model: str, sets: list[str], flags: Flags) -> Config:
    from lorary.train.config.load import from_dict, load

    if _is_file(model):
        return load(model, sets, flags)
    return from_dict({"model": model, "data": "builtin:docstrings"}, sets, flags)


def _is_file(model: str) -> bool:
    return Path(model).suffix in (".yaml", ".yml")


def _show(config: Config, size: float | None, check: bool, *, alone: bool) -> None:
    from lorary.cli._memory_table import show
    from lorary.kernels.torch_internals import without_compiler
    from lorary.model.loading.checkpoint_kind import reader
    from lorary.train.runner.memory_forecast import forecast

    model, planned, loaded = _planned(config, alone)
    with without_compiler():
        found = forecast(config, model, planned)
    reader(config.model.id, model.config, found.plan.method.storage, None)  # refuses unsupported quantised checkpoints
    print(f"model     {loaded}\n")
    print(found.plan)
    show(config, found, size)
    if check:
        print(_checked(config, found))


def _planned(config: Config, alone: bool) -> tuple[nn.Module, Plan | None, str]:
    """The model on the meta device, its plan if it is made already, and which class it is.

    Args:
        config: of the run.
        alone: whether only a model was named, and no task: it has the head that it was saved with. Otherwise the model
            is the one that the task would train.
    """
    from lorary.model.loading.from_pretrained import empty_model, fast_skeleton, load_config, skeleton
    from lorary.model.loading.model_class import CLASSIFIERS, check_task
    from lorary.model.loading.model_kind import own_class

    if config.task in CLASSIFIERS:
        return _planned_classifier(config)
    if config.method.build().context is None:
        model: nn.Module = fast_skeleton(config.model)
    else:  # it changes attention in Transformers' code
        model = empty_model(config.model, own_class(load_config(config.model)))
    if not alone and type(model).__module__.startswith("transformers"):
        check_task(config.model, load_config(config.model), config.task)
        model = skeleton(config.model)
    name = (getattr(model.config, "architectures", None) or [type(model).__name__])[0]
    why = "the class that it was saved with" if alone else f"for task `{config.task}`"
    return model, None, f"{name}, {why}"


def _planned_classifier(config: Config) -> tuple[nn.Module, Plan | None, str]:
    from lorary.model.loading.from_pretrained import load_config, skeleton
    from lorary.model.loading.model_class import check_task
    from lorary.train.runner.task_base import base_of_task, expected_labels, new_modules

    check_task(config.model, load_config(config.model), config.task)
    base = base_of_task(config, expected_labels(config), None)
    model = skeleton(config.model, base)
    count = int(model.config.num_labels)
    labels = f"{count} label{'s' if count > 1 else ''}"
    guessed = " (data.labels lists them)" if config.task == "classification" and not config.data.labels else ""
    planned = config.plan(model, new=new_modules(config, base, model))
    return model, planned, f"{type(model).__name__} with {labels}{guessed}, for task `{config.task}`"


def _checked(config: Config, found: Forecast) -> str:
    """The memory by a step of all blocks of Transformers' own model, and the error of the prediction."""
    from lorary.analysis.memory.predict import predict
    from lorary.model.loading.from_pretrained import empty_model, load_config
    from lorary.model.loading.model_kind import own_class
    from lorary.model.plan import human_bytes
    from lorary.train.runner.memory_forecast import workload

    model: nn.Module = found.model
    if type(model).__module__.startswith("lorary"):  # the quick one
        model = empty_model(config.model, own_class(load_config(config.model)))
    counted = predict(model, found.plan, workload(config, model), config.training.optimizer, whole=True)
    if counted.activations is None:
        return f"\na step without data cannot run: {counted.notes[-1]}"
    off = found.memory.total / counted.total - 1
    return f"\na step of all blocks: {human_bytes(counted.total)}; the prediction is off by {off:+.1%}"
