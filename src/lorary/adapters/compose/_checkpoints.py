"""Two checkpoints of one architecture, read one parameter at a time, and why they cannot be compared."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from torch import Tensor

from lorary.errors import Diagnostic, FileError, independent
from lorary.files.strict_json import show
from lorary.model.fingerprint import Fingerprint
from lorary.model.loading.base_weights import BaseWeights
from lorary.model.loading.from_pretrained import empty_model, load_config
from lorary.model.loading.model_kind import own_class
from lorary.model.loading.source import ModelSection
from lorary.model.loading.weight_files import WeightFiles, model_folder

_MOST_SETTINGS = 8  # differences shown


class Checkpoints(NamedTuple):
    """A base and what it was tuned to.

    Args:
        base: the weights of the base.
        tuned: those of the tuned model.
    """

    base: BaseWeights
    tuned: BaseWeights

    def pair(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Both tensors of a parameter or buffer, in memory of their own; None where a checkpoint lacks it."""
        _return_freed_memory()
        found = self.base.read(name), self.tuned.read(name)
        for weights in self:
            weights.forget()  # what is returned may be changed
        return found

    def differences(self) -> list[Diagnostic]:
        """Why no adapter of the base can become the tuned model: every reason."""
        one, other = (type(weights.model).__name__ for weights in self)
        if one != other:
            what = f"the base is a {one} and the tuned model a {other}"
            return [Diagnostic("architecture", what, "extract from two checkpoints of one class")]
        return [*self._settings(), *self._shapes(), *self._files()]

    def _settings(self) -> Iterator[Diagnostic]:
        one, other = (Fingerprint.of(weights.model).settings for weights in self)
        differ = [key for key in one if key in other and one[key] != other[key]]
        for key in differ[:_MOST_SETTINGS]:
            what = f"is {show(one[key])} in the base and {show(other[key])} in the tuned model"
            yield Diagnostic(f"config.json: {key}", what)
        if differ:
            more = f"{len(differ) - _MOST_SETTINGS} more differ, and " if len(differ) > _MOST_SETTINGS else ""
            yield Diagnostic("config.json", f"{more}an adapter changes weights alone", "make the settings equal")

    def _shapes(self) -> Iterator[Diagnostic]:
        one, other = (_shapes(weights) for weights in self)
        words = getattr(self.base.model.config.get_text_config(), "vocab_size", None)
        for name in one | other:
            if name not in one or name not in other:
                where = "the base" if name in one else "the tuned model"
                yield Diagnostic(name, f"only {where} has this parameter")
            elif one[name] != other[name]:
                what = f"is {one[name]} in the base and {other[name]} in the tuned model"
                resized = one[name][:1] == (words,) and one[name][1:] == other[name][1:]
                yield Diagnostic(name, what, "resize the base's vocabulary in the same way first" if resized else "")

    def _files(self) -> Iterator[Diagnostic]:
        """The weights that the files of each checkpoint lack, or hold in another shape than its own model."""
        for which, weights in zip(("base", "tuned model"), self, strict=True):
            found = {key for keys in weights.files.files.values() for key in keys}
            known = {key for group in weights.groups.values() for key in group.keys}
            unknown = sorted(found - known)
            fix = f"its files hold {show(unknown[0])}, which the model does not have" if unknown else ""
            for name in weights.missing(()):
                yield Diagnostic(name, f"the {which}'s files hold no weights for it", fix)
            for name, shape in _shapes(weights).items():
                group = weights.groups.get(name)
                if group is None or group.conversion is not None:  # tied, or known once it is read
                    continue
                if (there := weights.files.shape(group.keys[0])) != shape:
                    yield Diagnostic(name, f"is {shape} in the model and {there} in the {which}'s files")


def _return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    It keeps blocks below 32 MB, and matrices of many sizes leave holes between them: 200 MB after 200 layers.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _shapes(weights: BaseWeights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weights.model.get_parameter(name).shape) for name in weights.names}


@contextmanager
def opened(base: str, tuned: str, headline: str) -> Iterator[Checkpoints]:
    """Both checkpoints, open for reading in 32 bits.

    Raises:
        FileError: one cannot be read, or is quantised; if both, the reasons of both.
    """
    with ExitStack() as stack:
        found = independent(lambda: _weights(base, stack, headline), lambda: _weights(tuned, stack, headline))
        yield Checkpoints(*found)


def _weights(source: str, stack: ExitStack, headline: str) -> BaseWeights:
    section = ModelSection.of(source, dtype="float32")
    config = load_config(section)
    if getattr(config, "quantization_config", None) is not None:
        what = "is quantised: the change of a weight is lost in its rounding"
        raise FileError(headline, [Diagnostic(source, what, "give the checkpoint that it was made from")])
    model = empty_model(section, own_class(config))
    return BaseWeights(model, stack.enter_context(WeightFiles(model_folder(section))))
