"""The loader of a checkpoint: Transformers alone, quantising while reading, or reading quantised weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from lorary.errors import ConfigError, Diagnostic, FileError
from lorary.layers.nf4 import NF4
from lorary.model.quantize import bad_storage
from lorary.spec.interfaces import Storage


def check_options(source: Any, storage: Any, layers: Any) -> None:
    """Refuse invalid options of `load_quantized`.

    Raises:
        ConfigError: every one.
    """
    problems = [] if storage is None else bad_storage(storage)
    if storage is not None and not problems and not isinstance(storage, NF4):
        what = f"{type(storage).__name__} quantises models in memory, not checkpoints that are being read"
        fix = "pass NF4(), or load the plain model and call lorary.quantize on it"
        problems.append(Diagnostic("storage", what, fix))
    if isinstance(layers, str):
        problems.append(Diagnostic("layers", f"is the string {layers!r}, not a list", f"pass [{layers!r}]"))
    if problems:
        raise ConfigError(f"cannot load {source}:", problems)


def reader(
    name: str, config: Any, storage: Storage | None, layers: Collection[str] | None
) -> Callable[..., Any] | None:
    """A replacement for `kind.from_pretrained(source, **options)`, or None for Transformers' own.

    Args:
        name: of the model, for errors.
        config: of the model.
        storage: the storage of its weights.
        layers: paths of the layers to quantise; None for every linear one except the output head.

    Raises:
        FileError: the weights are to be quantised, and already are in another way.
    """
    saved = getattr(config, "quantization_config", None)
    if saved is None and not isinstance(storage, NF4):
        return None
    from lorary.model.loading import quantized
    from lorary.model.loading.bitsandbytes_checkpoint import unreadable

    problems = [] if saved is None else unreadable(config)
    if problems and isinstance(storage, NF4):
        raise FileError(f"cannot load the model {name}:", problems)
    if problems:
        return None  # for Transformers and the library that quantised it, if that is installed
    nf4 = storage if isinstance(storage, NF4) else NF4()
    return lambda kind, source, **options: quantized.load(kind, source, config, nf4, layers, **options)
