"""The reward function of GRPO: read from the user's file, called with what it takes, and its answer checked."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorary.errors import ConfigError, Diagnostic, TrainingError, did_you_mean, suggested_path
from lorary.files.home import expanded

_HEADLINE = "cannot use the reward function:"
_KEY = "training.reward"
_LARGEST = 1e18  # the squares of rewards, for their standard deviation, are float32
# What a function may take besides the fields of the rows.
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


class Reward:
    """The reward of answers, by a function of the user's.

    Args:
        function: takes `completions` and any of `prompts`, `completion_ids` and the fields of the rows, each a list
            with one entry for each answer; returns one number for each.
        source: where it comes from, for errors.
        digest: of its file, so that a run resumes with the same function.
    """

    def __init__(self, function: Callable[..., Any], source: str, digest: str = "") -> None:
        self.function, self.source, self.digest = function, source, digest
        self.__name__ = getattr(function, "__name__", "reward")  # the name of its figures in the log
        parameters = inspect.signature(function).parameters.values()
        self.takes = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.needs = {p.name for p in parameters if p.name in self.takes and p.default is p.empty}

    def check(self, fields: set[str]) -> None:
        """Refuse a function that needs more than the rows have.

        Args:
            fields: of the rows.

        Raises:
            ConfigError: each parameter without a field.
        """
        known = sorted({*_GIVEN, *fields})
        missing = sorted(self.needs - set(known))
        problems = [
            Diagnostic(_KEY, f"{self.source} needs `{name}`, which no field of the rows has", did_you_mean(name, known))
            for name in missing
        ]
        if problems:
            raise ConfigError(_HEADLINE, problems)

    def __call__(self, **given: Any) -> list[float]:
        """One reward for each answer.

        Raises:
            TrainingError: the function raised an error, or returned something else.
        """
        answers = len(given["completions"])
        taken = given if self.takes_any else {key: value for key, value in given.items() if key in self.takes}
        try:
            found = self.function(**taken)
        except (Exception, SystemExit, GeneratorExit) as error:  # the user's code may raise anything
            line = traceback.extract_tb(error.__traceback__)[-1]
            what = f"raised {_told(error)} (line {line.lineno} of {Path(line.filename).name})"
            raise TrainingError("the reward function failed:", [Diagnostic(self.source, what)]) from error
        return self._checked(found, answers)

    def _checked(self, found: Any, answers: int) -> list[float]:
        found = found.tolist() if hasattr(found, "tolist") else found
        if isinstance(found, list | tuple):
            found = [_plain(value) for value in found]
        what = ""
        if not isinstance(found, list | tuple):
            what = f"returned a {type(found).__name__}, not a list of {answers} numbers"
        elif len(found) != answers:
            what = f"returned {len(found)} rewards for {answers} answers"
        elif bad := [(value, why) for value in found if (why := _why_not(value))]:
            what = f"returned {_shown(bad[0][0])}, which is {bad[0][1]}"
        if what:
            raise TrainingError("the reward function failed:", [Diagnostic(self.source, what)])
        return [float(value) for value in found]


def load_reward(named: str) -> Reward:
    """The function of `FILE.py:FUNCTION`. It runs the file.

    Raises:
        ConfigError: there is no such file or function, or the file fails.
    """
    file, colon, name = named.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        what = f"`{named}` does not name a function in a file"
        raise ConfigError(_HEADLINE, [Diagnostic(_KEY, what, "write FILE.py:FUNCTION, such as rewards.py:short")])
    path = expanded(file)
    if not path.is_file():
        raise ConfigError(_HEADLINE, [Diagnostic(_KEY, f"there is no file `{file}`", suggested_path(path))])
    spec = importlib.util.spec_from_file_location(f"lorary_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        what = f"{path.name} cannot be run: {_told(error)}"
        raise ConfigError(_HEADLINE, [Diagnostic(_KEY, what)]) from error
    found = getattr(module, name, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        what = f"{path.name} has no function `{name}`"
        raise ConfigError(_HEADLINE, [Diagnostic(_KEY, what, did_you_mean(name, functions) if functions else "")])
    try:
        inspect.signature(found)
    except (TypeError, ValueError):  # some of Python's own functions have none
        what = f"the parameters of `{name}` in {path.name} are not known"
        fix = "write a function of your own: def reward(completions): ..."
        raise ConfigError(_HEADLINE, [Diagnostic(_KEY, what, fix)]) from None
    return Reward(found, named, hashlib.sha256(path.read_bytes()).hexdigest()[:12])


def _told(error: BaseException) -> str:
    """An error of the user's code, in one line."""
    try:
        text = str(error)
    except Exception:  # its own `__str__` may fail, too
        text = "without a text"
    return f"{type(error).__name__}: {text}".encode(errors="replace").decode()


def _shown(value: Any) -> str:
    """A value that is no reward, cut to a few words."""
    try:
        return repr(value)[:60]
    except Exception:  # its own `__repr__`, or the digits of a huge integer
        return f"a {type(value).__name__}"


def _plain(value: Any) -> Any:
    """A reward as Python's number: NumPy and PyTorch have their own."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _why_not(value: Any) -> str:
    """Why a value cannot be a reward; empty if it can."""
    if not isinstance(value, int | float) or value in (math.inf, -math.inf) or value != value:
        return "not a finite number"
    return "" if abs(value) <= _LARGEST else f"not between -{_LARGEST:g} and {_LARGEST:g}"
