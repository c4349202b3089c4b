"""Inputs of a dry forward: an example, or empty tensors made from the configuration of a Transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.kernels.torch_internals import tree_map_only

_BATCH, _LENGTH = 2, 8  # batch norm in training mode needs two rows


@dataclass(frozen=True)
class Inputs:
    """The arguments of a forward, on the meta device."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example: Any) -> Inputs:
        """The arguments in an example: a tensor, a tuple or list of positional ones, or a mapping of named ones."""
        named = isinstance(example, Mapping)  # a tokenizer's output is one, and no dict
        values = dict(example) if named else tuple(example) if isinstance(example, tuple | list) else (example,)
        empty: Any = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), values)
        return cls((), empty) if named else cls(empty)


def model_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Inputs to try for a Transformers model or a part of one, simplest first; none for other modules."""
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if not isinstance(name, str) or not hasattr(config, "model_type"):
        return
    known = inspect.signature(model.forward).parameters
    tokens = {key: _ids() for key in ("input_ids", "decoder_input_ids") if key in known}
    if not getattr(config, "is_encoder_decoder", True):
        tokens.pop("decoder_input_ids", None)
    sizes, dtype = _Sizes(config), _dtype(model)
    shapes = {key: list(sizes.shapes(key)) for key in dict.fromkeys((name, *known))}
    values = {key: [torch.empty(shape, device="meta", dtype=dtype) for shape in shapes[key]] for key in shapes}
    if name in tokens:
        yield Inputs(kwargs=tokens)
    decoded = {key: ids for key, ids in tokens.items() if key.startswith("decoder_")}
    for value in values[name]:
        yield Inputs(kwargs={name: value} | decoded)
    for value in values[name]:
        yield Inputs(kwargs=tokens | {name: value})
    yield Inputs(kwargs=tokens | {key: found[0] for key, found in values.items() if found})


def _ids() -> Tensor:
    return torch.empty(_BATCH, _LENGTH, dtype=torch.long, device="meta")


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


class _Sizes:
    """The shapes of a model's inputs other than token ids, from its configuration and the ones inside it."""

    def __init__(self, config: Any) -> None:
        parts = [value for value in vars(config).values() if hasattr(value, "model_type")]
        self._configs = [config, *parts, *(v for p in parts for v in vars(p).values() if hasattr(v, "model_type"))]

    def _of(self, *names: str, default: int) -> Any:
        found = (getattr(config, name, None) for config in self._configs for name in names)
        return next((value for value in found if value is not None), default)

    def shapes(self, name: str) -> Iterator[tuple[int, ...]]:
        """The shapes to try for the input of this name."""
        if name in ("pixel_values", "pixel_values_videos"):
            size = self._of("image_size", "input_size", default=224)
            height, width = (size[-2], size[-1]) if isinstance(size, list | tuple) else (size, size)
            image = (self._of("num_channels", "in_channels", "in_chans", default=3), height, width)
            yield (_BATCH, *image)
            yield (_BATCH, self._of("num_frames", default=4), *image)
        elif name == "input_features":
            bins = self._of("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", default=80)
            frames = 2 * self._of("max_source_positions", default=64)
            yield (_BATCH, bins, frames)
            yield (_BATCH, 64, bins)
        elif name == "input_values":
            bins, frames = self._of("num_mel_bins", default=80), self._of("max_length", default=1024)
            yield from ((_BATCH, 16_000), (_BATCH, 1, 16_000), (_BATCH, frames, bins))
