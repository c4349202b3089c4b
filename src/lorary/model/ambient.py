"""Ambient PyTorch modes: what surrounds a call of a public function does not change its result.

Autocast, inference mode, a default device or dtype and the precision of fp32 products are set around code for its
forward passes, often far from the call. They would round merged weights to bfloat16, put adapters on the meta device or
make them untrainable. The decorator below is on every public function that touches tensors, so that none of the
functions inside has to think of it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import nn

_CALLERS_DEVICE: ContextVar[torch.device | None] = ContextVar("callers_device", default=None)
P = ParamSpec("P")
R = TypeVar("R")


def mode_independent(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a public function: the same bits under every ambient mode.

    Autocast is off inside, tensors are made on the CPU and in float32 unless the function says otherwise, and fp32
    products are exact. Inference mode becomes `no_grad`, because tensors made in it can never be trained; a model that
    consists of inference tensors keeps it, because those can be used nowhere else.

    The body of a context manager (`@contextlib.contextmanager` above this decorator) keeps the caller's modes: it is
    the caller's code.
    """
    if inspect.isgeneratorfunction(function):
        return cast("Callable[P, R]", _around_the_body(function))

    @functools.wraps(function)
    def independent(*args: P.args, **kwargs: P.kwargs) -> R:
        records = torch.is_grad_enabled()
        try:
            with _default_modes((*args, *kwargs.values())):
                return function(*args, **kwargs)
        except BaseException:  # an interrupt may fall between a `no_grad` block and its end
            torch.set_grad_enabled(records)
            raise

    independent.__mode_independent__ = True  # type: ignore[attr-defined]
    return independent


def _around_the_body(function: Callable[..., Iterator[R]]) -> Callable[..., Iterator[R]]:
    """The generator function of a context manager, with default modes while it enters and exits."""
    manager_of = contextlib.contextmanager(function)

    @functools.wraps(function)
    def independent(*args: Any, **kwargs: Any) -> Iterator[R]:
        values = (*args, *kwargs.values())
        manager = manager_of(*args, **kwargs)
        with _default_modes(values):
            entered = manager.__enter__()
        try:
            yield entered
        except BaseException as error:
            with _default_modes(values):
                if not manager.__exit__(type(error), error, error.__traceback__):
                    raise
        else:
            with _default_modes(values):
                manager.__exit__(None, None, None)

    independent.__mode_independent__ = True  # type: ignore[attr-defined]
    return independent


@contextlib.contextmanager
def _default_modes(arguments: Iterable[Any]) -> Iterator[None]:
    """PyTorch's default modes, where others are set."""
    devices = _autocasting()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_PROCESS.at_defaults())
        if devices:
            stack.callback(torch.clear_autocast_cache)  # it holds casts of parameters that may change here
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        if (default := torch.get_default_device()).type != "cpu":
            stack.callback(_CALLERS_DEVICE.reset, _CALLERS_DEVICE.set(default))
            stack.enter_context(torch.device("cpu"))
        if torch.is_inference_mode_enabled() and not _of_inference_tensors(arguments):
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


def callers_device(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A context for calls of the model, or of a function of the caller's, inside of `mode_independent`.

    They may rely on a default device (`torch.set_default_device("cuda")`), and have it back if the model is there.
    """
    device = _CALLERS_DEVICE.get()
    there = device is not None and any(p.device.type == device.type for p in model.parameters())
    return torch.device(cast(torch.device, device)) if there else contextlib.nullcontext()


def _autocasting() -> list[str]:
    """The kinds of devices on which autocast is on."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = ("cpu",) if accelerator is None else ("cpu", accelerator.type)
    return [kind for kind in kinds if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)]


def _of_inference_tensors(arguments: Iterable[Any]) -> bool:
    """Whether one of the arguments is a model that was made in inference mode."""
    return any(p.is_inference() for model in arguments if isinstance(model, nn.Module) for p in model.parameters())


class _Setting(NamedTuple):
    """A process-wide setting: how to read and to write it, and its default."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    default: Any


def _matmul_precision() -> str | tuple[str, str]:
    """The precision of fp32 products: one word, or one per backend if they were set apart."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch refuses one word for settings that disagree
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]


def _set_matmul_precision(precision: str | tuple[str, str]) -> None:
    if isinstance(precision, str):
        torch.set_float32_matmul_precision(precision)
    else:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = precision  # type: ignore[attr-defined]


class _ProcessSettings:
    """Settings that all threads have in common, at their defaults as long as one of them is inside."""

    settings = (
        _Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        _Setting(_matmul_precision, _set_matmul_precision, "highest"),
    )

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._inside = 0
        self._before: dict[_Setting, Any] = {}

    @contextlib.contextmanager
    def at_defaults(self) -> Iterator[None]:
        """The defaults inside the block; the last thread that leaves restores the caller's settings."""
        # nothing to change: then nothing is locked either, which an interrupt at the wrong moment could leave so
        if not self._before and all(setting.read() == setting.default for setting in self.settings):
            yield
            return
        with self._lock:
            self._inside += 1
            for setting in self.settings:
                if (value := setting.read()) != setting.default:
                    self._before.setdefault(setting, value)
                    setting.write(setting.default)
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    for setting, value in self._before.items():
                        setting.write(value)
                    self._before.clear()


_PROCESS = _ProcessSettings()
