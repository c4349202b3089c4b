"""Checkpoints loaded straight into packed layers, one tensor at a time: a quantiser for Transformers' own loader.

The names of tensors, sharded files, devices and precisions are Transformers' work. Its loader hands each weight over
as it is read; it is packed at once, and the layer takes the place of the plain one. So a host has to hold the packed
model and one tensor. A checkpoint that bitsandbytes has packed is taken as it is (`bitsandbytes_files`).
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, modeling_utils
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorary.errors import Diagnostic, FileError
from lorary.layers.nf4 import NF4
from lorary.model.fingerprint import Fingerprint, Sample
from lorary.model.loading.bitsandbytes_checkpoint import KEYS, base_of, compute_of, layer_of
from lorary.model.quantize import quantizable_layers
from lorary.model.scan import scan
from lorary.spec.interfaces import Storage

PACKED = "lorary_packed"  # the name of the quantiser among Transformers'
# Where Transformers keeps how the checkpoint's names became the model's, to save under the names that it read. It has
# no public name for this; without it a model is saved under its own names, which Transformers reads as well.
_CONVERSIONS = "_weight_conversions"
_loading = threading.Lock()


def load(
    kind: Any, source: str, config: PretrainedConfig, storage: NF4, layers: Collection[str] | None, **words: Any
) -> Any:
    """A checkpoint with its weights packed: `kind.from_pretrained`, without the whole of it ever in memory.

    Args:
        kind: a class of Transformers, such as AutoModelForCausalLM.
        source: a folder or a Hub id.
        config: of the model. Where it says that bitsandbytes has packed the checkpoint, it is taken as it is.
        storage: how weights are packed.
        layers: paths of the layers that are packed; None for every linear one but the output head.
        words: for `from_pretrained`.

    Returns:
        What `from_pretrained` returns: the model, or with `output_loading_info` the model and what is said of keys.

    Raises:
        FileError: weights that cannot be packed or unpacked, all of them.
    """
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is None:
        words["quantization_config"] = QuantizationConfig(storage, layers)
    else:
        storage = dataclasses.replace(storage, compute=storage.compute or compute_of(config))
        config.quantization_config = {"quant_method": PACKED, "storage": storage}
    with one_at_a_time():
        return kind.from_pretrained(source, config=config, **words)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Transformers reads a tensor when it is wanted, in this thread, into memory of its own.

    Else worker threads read ahead, and every page of a mapped file that has been read stays with the process until
    the file is closed.
    """
    opened, variable = modeling_utils.safe_open, "HF_DEACTIVATE_ASYNC_LOAD"

    def read(*args: Any, **words: Any) -> Any:
        return opened(*args, **(words | {"backend": "pread"}))

    with _loading:
        before = os.environ.get(variable)
        modeling_utils.safe_open, os.environ[variable] = read, "1"
        try:
            yield
        finally:
            modeling_utils.safe_open = opened
            del os.environ[variable]
            if before is not None:
                os.environ[variable] = before


@register_quantization_config(PACKED)
class QuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What a checkpoint is loaded into: `from_pretrained(..., quantization_config=PackedConfig(NF4()))`.

    Args:
        storage: how weights are packed.
        layers: paths of the layers that are packed; None for every linear one but the output head.
    """

    def __init__(self, storage: Storage | None = None, layers: Collection[str] | None = None, **_: Any) -> None:
        self.quant_method = PACKED
        self.storage = NF4() if storage is None else storage
        self.layers = layers


@register_quantizer(PACKED)
class LoraryQuantizer(HfQuantizer):  # type: ignore[misc]
    """Packs weights as Transformers reads them, or takes them packed, and leaves a plain model behind."""

    serialized_names: ClassVar[dict[str, list[str]]] = {"weight": ["weight", *(f"weight.{key}" for key in KEYS)]}

    def __init__(self, quantization_config: QuantizationConfig, **words: Any) -> None:
        super().__init__(quantization_config, **words)
        self.storage: Any = quantization_config.storage
        self.layers = quantization_config.layers
        self.names: set[str] = set()  # of the parameters that are to be packed
        self.known: dict[str, Sample] = {}  # what they were
        self.packed: list[nn.Module] = []
        self.problems: list[Diagnostic] = []

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if self.pre_quantized:
            return
        tied = model.all_tied_weights_keys
        names = quantizable_layers(scan(model), self.storage) if self.layers is None else self.layers
        modules = dict(model.named_modules())
        wrong = [name for name in names if name not in modules or not self.storage.quantizes(modules[name])]
        if wrong:
            what = f"{self.storage} packs no such layer of a {type(model).__name__}"
            raise FileError("cannot quantise these layers:", [Diagnostic(str(name), what) for name in wrong])
        self.names = {f"{name}.weight" for name in names} - {*tied, *tied.values()}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return param_name in self.names

    @property
    def quantized_element_size(self) -> float:
        return float(self.storage.bytes(2**20, 2)) / 2**20

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": _Take}

    def pack(self, model: PreTrainedModel, name: str, W: Tensor) -> bool:
        """Puts a packed layer in the place of the plain one that is to have this weight; whether it could."""
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        if name not in self.names or W.shape != layer.weight.shape:
            self.names.discard(name)  # so that the loader compares the shapes, and says so
            return False
        empty, layer.weight = layer.weight, nn.Parameter(W, requires_grad=False)
        self._pack(model, name)
        layer.weight = empty
        return True

    def _pack(self, model: PreTrainedModel, name: str) -> None:
        path = name.rpartition(".")[0]
        layer: Any = model.get_submodule(path)
        self.known[name] = Sample.of(layer.weight)
        try:
            self._place(model, path, self.storage.quantize(layer))
        except ValueError as error:
            self.problems.append(Diagnostic(name, str(error), "repair the base, or leave the layer out"))

    def take(self, model: PreTrainedModel, name: str, tensors: dict[str, Tensor]) -> None:
        """Puts a packed layer in the place of the plain one, from the tensors that bitsandbytes keeps of it."""
        path = name.rpartition(".")[0]
        layer: Any = model.get_submodule(path)
        made, problems = layer_of(layer, tensors, self.storage.compute)
        self.problems += [Diagnostic(name, problem) for problem in problems]
        if made is not None:
            self.known[name] = Sample(tuple(layer.weight.shape), b"")
            self._place(model, path, made)

    def _place(self, model: PreTrainedModel, path: str, made: Any) -> None:
        made._is_hf_initialized = made.weight._is_hf_initialized = True  # parents start weights of their children, too
        made._non_persistent_buffers_set.clear()  # for now: the loader makes such buffers anew, without their values
        model.set_submodule(path, made)
        self.packed.append(made)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name in sorted(self.names - self.known.keys()):  # that came out of one tensor together with another
            self._pack(model, name)
        for layer in self.packed:
            layer._non_persistent_buffers_set.update(layer._buffers)
            del layer._is_hf_initialized
        self._plain(model)
        if self.problems:
            raise FileError(f"cannot load the weights of {model.config._name_or_path}:", self.problems)
        (base_of(model.config) or Fingerprint.of(model, self.known)).remember(model)
        return model

    def _plain(self, model: PreTrainedModel) -> None:
        """Leaves no trace of a quantiser on the model, which its packed layers do not need."""
        conversions = getattr(model, _CONVERSIONS, None)
        self.remove_quantization_config(model)
        del model.is_quantized
        if conversions is not None:  # Transformers 5.24 has removed them with the configuration
            setattr(model, _CONVERSIONS, [c for c in conversions if not _takes(c)])
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Pack(ConversionOps):  # type: ignore[misc]
    """A dense weight that has just been read becomes a packed layer; what is left is for the loader to place."""

    def __init__(self, quantizer: LoraryQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *, model: Any, missing_keys: Any, **_: Any) -> dict[str, Tensor]:
        left = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if self.quantizer.pack(model, name, tensor):
                missing_keys.discard(name)
            else:
                left[name] = tensor
        return left


class _Take(ConversionOps):  # type: ignore[misc]
    """The tensors that bitsandbytes keeps of a weight become a packed layer; a weight by itself stays as it is."""

    def __init__(self, quantizer: LoraryQuantizer) -> None:
        self.hf_quantizer = quantizer  # by this name, so that the loader leaves the precision of what it reads

    def __deepcopy__(self, memo: Any) -> _Take:
        return self  # the loader copies it for every weight, and there is one quantiser

    def convert(
        self, input_dict: dict[str, Any], *, model: Any, full_layer_name: str, missing_keys: Any, **_: Any
    ) -> dict[str, Tensor]:
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        alone = tensors.get("weight") if len(tensors) == 1 else None
        if alone is not None and alone.dtype != torch.uint8:
            return {"weight": alone.to(_dtype(model, full_layer_name))}
        self.hf_quantizer.take(model, full_layer_name, tensors)
        missing_keys.discard(full_layer_name)
        return {}


def _dtype(model: Any, name: str) -> torch.dtype:
    """The precision that the loader gives a plain tensor."""
    own: torch.dtype = model.get_parameter_or_buffer(name).dtype
    plan: dict[str, torch.dtype] = model._get_dtype_plan(own)
    return next((dtype for part, dtype in plan.items() if re.search(part.replace("*", ".*"), name)), own)


def _takes(conversion: Any) -> bool:
    return any(isinstance(op, _Take) for op in getattr(conversion, "operations", ()))
