"""Which way a checkpoint's weights are read: by Transformers alone, packed on the way, or as they have been packed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from lorary.errors import ConfigError, Diagnostic, FileError
from lorary.layers.nf4 import NF4
from lorary.model.quantize import bad_storage
from lorary.spec.interfaces import Storage


def check(source: Any, storage: Any, layers: Any) -> None:
    """Refuse words that say nothing about how a model is read.

    Raises:
        ConfigError: every one.
    """
    problems = [] if storage is None else bad_storage(storage)
    if storage is not None and not problems and not isinstance(storage, NF4):
        what = f"{type(storage).__name__} packs weights that are there in full, and none that are being read"
        problems.append(
            Diagnostic("storage", what, "pass NF4(), or load the plain model and call lorary.quantize on it")
        )
    if isinstance(layers, str):
        problems.append(Diagnostic("layers", f"is the text {layers!r}", f"say [{layers!r}]"))
    if problems:
        raise ConfigError(f"cannot load {source}:", problems)


def reader(
    name: str, config: Any, storage: Storage | None, layers: Collection[str] | None
) -> Callable[..., Any] | None:
    """What loads the weights of a model, (class, source, words) -> what `from_pretrained` returns; None where that is
    Transformers alone.

    Args:
        name: of the model, for errors.
        config: of the model.
        storage: how its weights are to be kept.
        layers: paths of the layers that are packed; None for every linear one but the output head.

    Raises:
        FileError: they are to be packed, and are already, in another way.
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
        return None  # Transformers and the library that has packed it, if that is there
    word = storage if isinstance(storage, NF4) else NF4()
    return lambda kind, source, **words: quantized.load(kind, source, config, word, layers, **words)
