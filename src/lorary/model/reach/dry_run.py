"""Dry forwards of a model without values: which layers run, and whose weight is read while the layer does not run."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.kernels.torch_internals import parameters_of, schema_of, storage_id
from lorary.layers.rope import text_config
from lorary.layers.transformers_internals import cache_of
from lorary.model.reach.inputs import Inputs, model_inputs
from lorary.model.reach.source import Line
from lorary.model.reach.twin import MetaAnswers, random_numbers_kept, twin_of

_SHAPES_ONLY = ("_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")


@dataclass
class Observed:
    """The findings of dry forwards.

    Args:
        ran: the paths of the layers that ran.
        read: the paths of the layers whose weight was read while they did not run.
        complete: whether a forward of the whole model reached its end.
        error: why none did.
    """

    ran: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    complete: bool = False
    error: str = ""


def dry_run(model: nn.Module, layers: Collection[str], lines: Mapping[str, Collection[Line]], example: Any) -> Observed:
    """The findings of dry forwards of a copy of the model, which itself does not change.

    Args:
        model: the model.
        layers: the paths of the layers to watch.
        lines: path -> the lines of code that may read the layer's weight without calling the layer.
        example: the inputs of a forward (a tensor, a tuple, a mapping); None for inputs made from its configuration.
    """
    observed = Observed()
    try:
        twin = twin_of(model)
        watch = Watch(twin, layers, lines, observed)
        with random_numbers_kept(), warnings.catch_warnings(), _eagerly(), torch.no_grad(), watch:
            warnings.simplefilter("ignore")
            _run(twin, watch, example)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the model's code, which was not made to run without values
        observed.error = observed.error or _short(error)
    return observed


def _run(twin: Any, watch: Watch, example: Any) -> None:
    """Forwards in both modes, of the parts that have not run, and of a decoding step, until nothing is open."""
    observed = watch.observed
    for training in (True, False):
        if watch.open():
            twin.train(training)
            inputs = [Inputs.of(example)] if example is not None else model_inputs(twin)
            with _cache(twin, enabled=not training):
                observed.complete |= _runs(twin, inputs, observed)
    if example is not None:
        return
    for path, part in twin.named_modules():
        if path and watch.not_run(path) and isinstance(getattr(part, "main_input_name", None), str):
            _runs(part, model_inputs(part), Observed())
    if watch.undecided():
        _decode(twin.eval())


def _runs(module: Any, tries: Iterable[Inputs], observed: Observed) -> bool:
    """Whether the forward reaches its end with one of these inputs; the first error is kept."""
    for inputs in tries:
        for device in (contextlib.nullcontext, lambda: torch.device("meta")):  # for tensors made without a device
            try:
                with device():
                    module(*inputs.args, **inputs.kwargs)
                return True
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                observed.error = observed.error or _short(error)
    return False


@contextlib.contextmanager
def _cache(model: Any, enabled: bool) -> Iterator[None]:
    """Whether the model keeps keys, values and states: a training step does not."""
    config: Any = text_config(model)
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = before and enabled
    yield
    if before is not None:
        config.use_cache = before


def _decode(model: Any) -> None:
    """A decoding step after a prompt, for code that reads weights only there."""
    with contextlib.suppress(Exception):
        inputs = next(iter(model_inputs(model)))
        outputs = model(**inputs.kwargs, use_cache=True)
        step = {key: value[:, -1:] for key, value in inputs.kwargs.items()}
        model(**step, **cache_of(outputs), use_cache=True)


def _short(error: Exception) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:200]


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Compiled functions run as they were written."""
    compiled = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        yield


class Watch(MetaAnswers):
    """Records the layers that run in a twin, and the reads of their weights by other code.

    Args:
        twin: a copy of the model without values.
        layers: the paths to watch.
        lines: path -> lines of code that may read the weight.
        observed: is filled.
    """

    def __init__(
        self, twin: nn.Module, layers: Collection[str], lines: Mapping[str, Collection[Line]], observed: Observed
    ) -> None:
        super().__init__(answer=1)
        self.observed = observed
        self._layers = dict.fromkeys(layers)
        self._lines = lines
        self._running: Counter[nn.Module] = Counter()
        self._paths: dict[int, list[str]] = {}  # storage of a weight -> the layers
        self._holders: dict[int, set[nn.Module]] = {}  # storage -> every module that holds it
        watched = {twin.get_submodule(path): path for path in layers}
        for module, path in watched.items():
            if (weight := parameters_of(module).get("weight")) is None:
                continue
            self._paths.setdefault(storage_id(weight), []).append(path)
            if lines.get(path):
                self._watch_attribute(module, path, frozenset(lines[path]))
        for module in twin.modules():
            held = [
                key for p in parameters_of(module).values() if p is not None and (key := storage_id(p)) in self._paths
            ]
            for key in held:
                self._holders.setdefault(key, set()).add(module)
            if held or module in watched:
                self._follow(module, watched.get(module))

    def _follow(self, module: Any, path: str | None) -> None:
        """Note when a module runs, also if its forward is called directly."""
        forward, running, ran = module.forward, self._running, self.observed.ran

        @functools.wraps(forward)
        def followed(*args: Any, **kwargs: Any) -> Any:
            if path is not None:
                ran.add(path)
            running[module] += 1
            try:
                return forward(*args, **kwargs)
            finally:
                running[module] -= 1

        module.forward = followed

    def _watch_attribute(self, module: nn.Module, path: str, lines: frozenset[Line]) -> None:
        """Record where the attribute `weight` is read, also by kernels that PyTorch does not see."""
        read = self.observed.read

        def weight(self: nn.Module) -> Any:
            caller = sys._getframe(1)
            if (caller.f_code.co_filename, caller.f_lineno) in lines:
                read.add(path)
            return parameters_of(self)["weight"]

        cls = type(module)
        module.__class__ = type(cls.__name__, (cls,), {"weight": property(weight), "__module__": cls.__module__})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._paths:
            for value in (*args, *kwargs.values()) if kwargs else args:
                for tensor in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(tensor, Tensor):
                        self._see(func, storage_id(tensor))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _see(self, func: Any, storage: int) -> None:
        if storage not in self._paths or any(self._running[module] for module in self._holders[storage]):
            return
        returns_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema_of(func).returns)
        if not returns_view and not schema_of(func).name.endswith(_SHAPES_ONLY):
            self.observed.read.update(self._paths[storage])

    def not_run(self, path: str) -> bool:
        """Whether no watched layer of this part has run."""
        inside = [name for name in self._layers if name.startswith(f"{path}.")]
        return bool(inside) and self.observed.ran.isdisjoint(inside)

    def undecided(self) -> bool:
        """Whether a layer ran whose weight code may read on another path."""
        return any(path not in self.observed.read for path in self._lines if path in self.observed.ran)

    def open(self) -> bool:
        """Whether a layer has neither run nor been bypassed yet, or is undecided."""
        seen = self.observed.ran | self.observed.read
        tied = {path for paths in self._paths.values() if not seen.isdisjoint(paths) for path in paths}
        return self.undecided() or not self.observed.complete or not (seen | tied).issuperset(self._layers)
