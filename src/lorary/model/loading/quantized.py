"""Quantisation while a checkpoint is read: a quantiser for Transformers' own loader.

Transformers resolves the names of tensors, sharded files, devices and precisions. Its loader passes each weight on as
it is read; the quantised layer replaces the plain one at once, so that memory holds the quantised model and one tensor.
A checkpoint that bitsandbytes has quantised is used as it is (`bitsandbytes_checkpoint`).
"""

from __future__ import annotations

import copy
import dataclasses
import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorary.errors import Diagnostic, FileError, check_overridden
from lorary.kernels.torch_internals import buffers_of, not_saved_buffers_of
from lorary.layers.nf4 import NF4
from lorary.layers.transformers_internals import (
    OVERRIDDEN,
    ConversionOps,
    checkpoints_opened_with,
    forget_quantizer,
    loaded_dtype,
    mark_initialized,
    set_weight_conversions,
    unmark_initialized,
    weight_conversions,
)
from lorary.layers.wrappers import set_submodule, submodule
from lorary.model.fingerprint import Fingerprint, Sample
from lorary.model.loading.bitsandbytes_checkpoint import KEYS, base_of, compute_of, quantized_layer
from lorary.model.quantize import quantizable_layers
from lorary.model.scan import scan
from lorary.spec.interfaces import Storage
from lorary.spec.site import PARAMETERS

QUANT_METHOD = "lorary"  # the quantiser's name in Transformers
_NO_READ_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"  # an environment variable of Transformers
_loading = threading.Lock()


def load(
    kind: Any, source: str, config: PretrainedConfig, storage: NF4, layers: Collection[str] | None, **options: Any
) -> Any:
    """`kind.from_pretrained` with quantised weights, never holding the plain model.

    Args:
        kind: a Transformers class, such as AutoModelForCausalLM.
        source: a folder or a Hub id.
        config: of the model; a checkpoint that bitsandbytes has quantised is used as it is.
        storage: how weights are quantised.
        layers: paths of the layers to quantise; None for every linear one except the output head.
        options: for `from_pretrained`.

    Returns:
        The result of `from_pretrained`: the model, or with `output_loading_info` the model and a report about keys.

    Raises:
        FileError: every weight that cannot be quantised or read.
    """
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is None:
        options["quantization_config"] = QuantizationConfig(storage, layers)
    else:
        storage = dataclasses.replace(storage, compute=storage.compute or compute_of(config))
        config.quantization_config = {"quant_method": QUANT_METHOD, "storage": storage}
    with _one_tensor_at_a_time():
        return kind.from_pretrained(source, config=config, **options)


@contextmanager
def _one_tensor_at_a_time() -> Iterator[None]:
    """Tensors are read on demand, in this thread, into their own memory.

    Otherwise Transformers' worker threads read ahead, and every page of a mapped file that has been read stays in the
    process until the file is closed.
    """
    with _loading, checkpoints_opened_with(backend="pread"):
        before = os.environ.get(_NO_READ_AHEAD)
        os.environ[_NO_READ_AHEAD] = "1"
        try:
            yield
        finally:
            del os.environ[_NO_READ_AHEAD]
            if before is not None:
                os.environ[_NO_READ_AHEAD] = before


@register_quantization_config(QUANT_METHOD)
class QuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` that makes `from_pretrained` quantise with lorary.

    Args:
        storage: how weights are quantised.
        layers: paths of the layers to quantise; None for every linear one except the output head.
    """

    def __init__(self, storage: Storage | None = None, layers: Collection[str] | None = None, **_: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.storage = NF4() if storage is None else storage
        self.layers = layers


check_overridden(HfQuantizer, OVERRIDDEN, "transformers")


@register_quantizer(QUANT_METHOD)
class LoraryQuantizer(HfQuantizer):  # type: ignore[misc]
    """A Transformers quantiser that replaces layers while their weights are read, and then removes itself."""

    serialized_names: ClassVar[dict[str, list[str]]] = {"weight": ["weight", *(f"weight.{key}" for key in KEYS)]}

    def __init__(self, quantization_config: QuantizationConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.storage: Any = quantization_config.storage
        self.layers = quantization_config.layers
        self.paths: dict[str, str] = {}  # parameter to quantise -> path of its layer
        self.samples: dict[str, Sample] = {}  # of the plain parameters, for the fingerprint
        self.replaced: list[nn.Module] = []
        self.problems: list[Diagnostic] = []

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if self.pre_quantized:
            return
        tied = model.all_tied_weights_keys
        scanned = scan(model)
        names = quantizable_layers(scanned, self.storage) if self.layers is None else self.layers
        found = {path: m for m in scanned.modules.values() for path in m.paths}
        wrong = [name for name in names if name not in found or not self.storage.quantizes(found[name].module)]
        if wrong:
            what = f"{self.storage} cannot quantise this layer of a {type(model).__name__}, or there is none"
            raise FileError("cannot quantise these layers:", [Diagnostic(str(name), what) for name in wrong])
        weights = {name if found[name].kind in PARAMETERS else f"{name}.weight": name for name in names}
        self.paths = {weight: path for weight, path in weights.items() if weight not in {*tied, *tied.values()}}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return param_name in self.paths

    @property
    def quantized_element_size(self) -> float:
        return float(self.storage.bytes(2**20, 2)) / 2**20

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOp(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": _DeserializeOp}

    def quantize(self, model: PreTrainedModel, name: str, W: Tensor) -> bool:
        """Replace the plain layer of a weight that has just been read; False if its shape is wrong."""
        layer: Any = submodule(model, self.paths[name]) if name in self.paths else None
        if layer is None or W.shape != layer.weight.shape:
            self.paths.pop(name, None)  # the loader then compares the shapes and reports it
            return False
        empty, layer.weight = layer.weight, nn.Parameter(W, requires_grad=False)
        self._quantize(model, name, layer)
        layer.weight = empty
        return True

    def _quantize(self, model: PreTrainedModel, name: str, layer: Any) -> None:
        self.samples[name] = Sample.of(layer.weight)
        try:
            self._replace(model, self.paths[name], self.storage.quantize(layer))
        except ValueError as error:
            self.problems.append(Diagnostic(name, str(error), "repair the base, or leave the layer out"))

    def deserialize(self, model: PreTrainedModel, name: str, tensors: dict[str, Tensor]) -> None:
        """Replace the plain layer by a quantised one, made from bitsandbytes' tensors."""
        path = name.rpartition(".")[0]
        layer: Any = model.get_submodule(path)
        quantized, problems = quantized_layer(layer, tensors, self.storage.compute)
        self.problems += [Diagnostic(name, problem) for problem in problems]
        if quantized is not None:
            self.samples[name] = Sample(tuple(layer.weight.shape), b"")
            self._replace(model, path, quantized)

    def _replace(self, model: PreTrainedModel, path: str, layer: Any) -> None:
        mark_initialized(layer)
        not_saved_buffers_of(layer).clear()  # for now: the loader replaces such buffers by empty ones
        set_submodule(model, path, layer)
        self.replaced.append(layer)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name in sorted(self.paths.keys() - self.samples.keys()):  # split from a fused tensor
            self._quantize(model, name, submodule(model, self.paths[name]))
        for layer in self.replaced:
            not_saved_buffers_of(layer).update(buffers_of(layer))
            unmark_initialized(layer)
        self._remove_traces(model)
        if self.problems:
            raise FileError(f"cannot load the weights of {model.config.name_or_path}:", self.problems)
        base = base_of(model.config)
        (base or Fingerprint.of(model, self.samples)).remember(model, {} if base else self.samples)
        return model

    def _remove_traces(self, model: PreTrainedModel) -> None:
        """Remove the quantiser from the model, whose quantised layers do not need it."""
        conversions = weight_conversions(model)
        self.remove_quantization_config(model)
        del model.is_quantized
        if conversions is not None:  # Transformers 5.24 has removed them with the configuration
            set_weight_conversions(model, [kept for kept in conversions if not _deserializes(kept)])
        for module in model.modules():
            if isinstance(config := vars(module).get("config"), PretrainedConfig):  # experts modules have copies
                vars(config).pop("quantization_config", None)
                forget_quantizer(config)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _QuantizeOp(ConversionOps):  # type: ignore[misc]
    """Quantises the layer of a dense weight that has just been read; returns the tensors that stay plain."""

    def __init__(self, quantizer: LoraryQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *, model: Any, missing_keys: Any, **_: Any) -> dict[str, Tensor]:
        plain = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if self.quantizer.quantize(model, name, tensor):
                missing_keys.discard(name)
            else:
                plain[name] = tensor
        return plain


class _DeserializeOp(ConversionOps):  # type: ignore[misc]
    """Makes a quantised layer from bitsandbytes' tensors of a weight; a plain weight stays as it is."""

    def __init__(self, quantizer: LoraryQuantizer) -> None:
        self.hf_quantizer = quantizer  # the loader looks for this name before it converts dtypes

    def __deepcopy__(self, memo: Any) -> _DeserializeOp:
        return self  # the loader copies it for every weight, but there is one quantiser

    def convert(
        self, input_dict: dict[str, Any], *, model: Any, full_layer_name: str, missing_keys: Any, **_: Any
    ) -> dict[str, Tensor]:
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        alone = tensors.get("weight") if len(tensors) == 1 else None
        if alone is not None and alone.dtype != torch.uint8:
            return {"weight": alone.to(loaded_dtype(model, full_layer_name))}
        self.hf_quantizer.deserialize(model, full_layer_name, tensors)
        missing_keys.discard(full_layer_name)
        return {}


def _deserializes(conversion: Any) -> bool:
    return any(isinstance(op, _DeserializeOp) for op in getattr(conversion, "operations", ()))
