"""Buffers: the numbers of a base that no optimizer trains, such as the running statistics of a batch norm.

A training forward moves them, whether or not anything requires a gradient. Under an adapter, which is a change of the
frozen base, that would be a second change that is in no file and that no detach undoes. So buffers are treated like
parameters: they train in full where `full` covers their module or its weight, and are then saved and restored with it;
all others are frozen. A frozen layer with running statistics evaluates with them, also in `model.train()`: it is what
fine-tuning practice does with a frozen batch norm (Keras does the same for `trainable=False`), and training then sees
the function that evaluation sees.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from lorary.errors import caller_stacklevel
from lorary.kernels.torch_internals import SpectralNormParametrization, buffers_of, not_saved_buffers_of, pre_hooks_of
from lorary.layers.adapted import unwrapped_modules
from lorary.layers.quantized_weight import is_quantized

_STATISTICS = ("running_mean", "running_var")
_LARGEST = 2**24  # numbers: a larger buffer is a cache, not a statistic


class BufferWarning(UserWarning):
    """Buffers of the frozen base have changed while an adapter was attached."""


def persistent_buffers(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """name -> every buffer of numbers that a checkpoint of the model holds, without those of quantised weights.

    Args:
        modules: of the plain model, by path.
    """
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in modules.items()
        if not is_quantized(module)
        for name, buffer in buffers_of(module).items()
        if buffer is not None and name not in not_saved_buffers_of(module) and buffer.dtype != torch.bool
    }


def has_statistics(module: nn.Module) -> bool:
    """Whether a training forward of this layer updates buffers of its own: batch norms and spectral norms."""
    if isinstance(module, SpectralNormParametrization):
        return True
    hooks: Iterable[Any] = pre_hooks_of(module).values()
    running = any(buffers_of(module).get(name) is not None for name in _STATISTICS)
    return running or any(isinstance(hook, SpectralNorm) for hook in hooks)


class EvaluationMode:
    """The `train` method of a layer that stays in evaluation mode, whatever its model does, until `revert`.

    It is in the layer's own attributes, where `model.train()` finds it, and costs nothing in a forward pass. A copy of
    the model has copies of it.
    """

    def __init__(self, module: nn.Module, model_training: bool) -> None:
        self.module, self.replaced = module, vars(module).get("train")
        self.own = None if module.training == model_training else module.training
        object.__setattr__(module, "train", self)
        module.training = False  # not `eval()`, which would reach its children

    def __call__(self, mode: bool = True) -> nn.Module:
        for child in self.module.children():
            child.train(mode)
        self.module.training = False
        return self.module

    def revert(self, model_training: bool) -> None:
        """Let the layer follow its model again, whose mode this is; or give it back a mode of its own."""
        vars(self.module).pop("train", None)
        if self.replaced is not None:
            object.__setattr__(self.module, "train", self.replaced)
        self.module.training = model_training if self.own is None else self.own


def freeze_statistics(model: nn.Module, full: Collection[str]) -> list[EvaluationMode]:
    """Keep the layers whose statistics do not train in evaluation mode.

    Args:
        model: the model.
        full: the names of the base's parameters and buffers that train in full.
    """
    layers = frozen_statistics(unwrapped_modules(model), full).values()
    return [EvaluationMode(layer, model.training) for layer in layers]


def frozen_statistics(modules: Mapping[str, nn.Module], full: Collection[str]) -> dict[str, nn.Module]:
    """path -> every layer with statistics that do not train.

    Args:
        modules: of the plain model, by path.
        full: the names of the base's parameters and buffers that train in full.
    """
    return {
        path: module
        for path, module in modules.items()
        if has_statistics(module) and not any(f"{path}.{name}" in full for name in buffers_of(module))
    }


def frozen_buffers(model: nn.Module, full: Collection[str]) -> dict[str, Tensor]:
    """name -> a copy, on the CPU, of every persistent buffer that does not train."""
    found = persistent_buffers(unwrapped_modules(model))
    return {
        name: buffer.detach().to("meta" if buffer.is_meta else "cpu", copy=True)
        for name, buffer in found.items()
        if name not in full and buffer.numel() <= _LARGEST
    }


@contextmanager
def base_buffers(model: nn.Module, full: Collection[str], frozen: Mapping[str, Tensor]) -> Iterator[None]:
    """The values before of frozen buffers inside the block, in which no layer moves its statistics.

    Args:
        model: with a method attached.
        full: the names of the base's parameters and buffers that train in full; their values are the caller's task.
        frozen: buffers that do not train -> their values before.
    """
    modules = unwrapped_modules(model)
    here = persistent_buffers(modules)
    present = [(here[name], here[name].data, before) for name, before in changed_buffers(model, frozen).items()]
    moving = {path: modules[path] for name in full if name in here and has_statistics(modules[path := _path(name)])}
    modes = [EvaluationMode(layer, model.training) for layer in moving.values()]
    try:
        for buffer, _, before in present:
            buffer.data = before.to(buffer, copy=True)  # a module may still write into its buffers
        yield
    finally:
        for buffer, value, _ in present:
            buffer.data = value
        for mode in modes:
            mode.revert(model.training)


def _path(name: str) -> str:
    """The path of the module that holds a parameter or buffer."""
    return name.rpartition(".")[0]


def changed_buffers(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """name -> its value before, of every frozen buffer that has changed since."""
    here = persistent_buffers(unwrapped_modules(model)) if before else {}
    return {name: value for name, value in before.items() if name in here and _differ(here[name], value)}


def _differ(buffer: Tensor, before: Tensor) -> bool:
    if buffer.shape != before.shape:
        return True
    return not buffer.is_meta and not torch.equal(buffer.detach().cpu(), before.to(buffer.dtype))


def warn_of_changed_buffers(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Warn of frozen buffers that have changed, which an adapter does not hold."""
    if changed := sorted(changed_buffers(model, before)):
        names = ", ".join(changed[:3]) + (f" and {len(changed) - 3:,} more" if len(changed) > 3 else "")
        text = (
            f"{names}: changed since the adapter was attached, and will not be in it. Keep the module in evaluation "
            "mode, or name it in `full`: its buffers then train and are saved"
        )
        warnings.warn(text, BufferWarning, stacklevel=caller_stacklevel())
