"""Which way a checkpoint's weights are read: by Transformers alone, packed on the way, or as they have been packed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from lorary.errors import FileError
from lorary.storage.nf4 import NF4
from lorary.words import Storage


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
    from lorary.bases import loading
    from lorary.bases.bitsandbytes_files import unreadable

    problems = [] if saved is None else unreadable(config)
    if problems and isinstance(storage, NF4):
        raise FileError(f"cannot load the model {name}:", problems)
    if problems:
        return None  # Transformers and the library that has packed it, if that is there
    word = storage if isinstance(storage, NF4) else NF4()
    return lambda kind, source, **words: loading.load(kind, source, config, word, layers, **words)
