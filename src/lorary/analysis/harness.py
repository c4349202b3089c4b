"""lm-evaluation-harness on adapted models (the extra `eval`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorary.errors import ConfigError, Diagnostic, nearest


def harness_model(model: Any, tokenizer: Any, batch_size: int = 8) -> Any:
    """A model with its adapter attached, for `lm_eval.simple_evaluate(model=...)`.

    Args:
        model: a causal language model of Transformers, adapted, merged or plain.
        tokenizer: of the model.
        batch_size: rows at a time.

    Raises:
        ConfigError: lm-evaluation-harness is not installed.

    Example:
        >>> lm_eval.simple_evaluate(model=harness_model(model, tokenizer), tasks=["hellaswag"])
    """
    _require()
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def task_manager(tasks: Sequence[str], folder: Path | None = None) -> Any:
    """The harness's index of tasks, in which all of `tasks` are.

    Args:
        tasks: names.
        folder: with the YAML files of further tasks.

    Raises:
        ConfigError: every unknown task; the harness is not installed; there is no such folder.
    """
    _require()
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise ConfigError("cannot evaluate:", [Diagnostic(f"--task-folder {folder}", "there is no such folder")])
    manager = TaskManager(include_path=str(folder) if folder is not None else None)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        problems = [
            Diagnostic(name, "is not a task of lm-evaluation-harness", _near(name, manager)) for name in unknown
        ]
        raise ConfigError("unknown tasks:", problems)
    return manager


def evaluate_tasks(language_model: Any, tasks: Sequence[str], manager: Any, limit: int | None = None) -> dict[str, Any]:
    """The harness's metrics by task: {"hellaswag": {"acc,none": 0.31, ...}}."""
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=language_model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
    )
    results: dict[str, Any] = found["results"]
    return results


def _near(name: str, manager: Any) -> str:
    near = nearest(name, manager.all_tasks)
    return f"did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else "its own list: lm-eval ls tasks"


def _require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        reason = f"lm-evaluation-harness cannot be imported ({error})"
        raise ConfigError(
            "cannot run benchmarks:", [Diagnostic("--tasks", reason, 'pip install "lorary[eval]"')]
        ) from None
