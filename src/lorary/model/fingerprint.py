"""Fingerprint: the identity of a base model, small enough for an adapter file and quick to compute."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorary.builtin import FOLDER as BUILTIN_FOLDER
from lorary.builtin import NAME as BUILTIN_NAME
from lorary.errors import Diagnostic, StateError, not_a
from lorary.files.strict_json import show
from lorary.layers.adapted import base_parameters, unwrapped_modules
from lorary.layers.dtensor import full_tensor
from lorary.layers.kinds import KINDS, kind_of, was_transposed
from lorary.layers.quantized_weight import is_foreign
from lorary.layers.wrappers import original_class, unwrapped
from lorary.model.ambient import mode_independent
from lorary.model.buffers import persistent_buffers

STATE = "_lorary"  # the attribute of a model for its AttachedState, which holds its base's fingerprint
_PLAIN = "_lorary_base"  # the attribute of a quantised model for the fingerprint from before
_SAMPLES_BEFORE = "_lorary_samples"  # likewise, for the samples of the plain model
_FOREIGN = "unpacked:"  # prefix of the weights' digest if another library quantised some of them
_SAMPLES = 64  # numbers read from each parameter
_OPTIONAL = {"frozen", "buffers", "settings"}  # fields that a record may lack: unknown, and not compared
_MOST_SETTINGS = 5  # differences shown
# What cannot change an output for given weights: names and file formats; outputs, caches and losses; training and
# initialisation; token ids, which change with the tokenizer; `max_position_embeddings`, a limit for callers (RoPE's own
# settings and the shapes say the rest); `tie_word_embeddings`, since the weights show whether they differ.
_IRRELEVANT = re.compile(
    r"_.*|architectures|auto_map|model_type|name_or_path|transformers_version|(torch_)?dtype|quantization_config"
    r"|lorary_base|output_(attentions|hidden_states|router_logits)|return_dict|use_(return_dict|cache|bfloat16|.*kernels?)"
    r"|torchscript|.*_implementation|cache_.*|chunk_size_feed_forward|gradient_checkpointing|pretraining_tp|.*loss.*|.*_coef|.*_noise"
    r"|.*drop.*|init_.*|.*initiali[sz].*|tie_.*|max_position_embeddings"
    r"|.*_token_ids?|id2label|label2id|num_labels|problem_type|task_specific_params|finetuning_task|tokenizer_class|prefix"
)
_SCALARS = (str, int, float, bool, type(None))


class Sample(NamedTuple):
    """The sample of one parameter for a fingerprint; may be taken while a checkpoint is read, before quantisation.

    Args:
        shape: of the parameter in the plain model.
        values: 64 numbers, evenly spread, in bfloat16; empty if not floating-point, None on the meta device.
    """

    shape: tuple[int, ...]
    values: bytes | None

    @staticmethod
    def of(tensor: Tensor) -> Sample:
        """The sample of a parameter."""
        shape, flat = tuple(tensor.shape), full_tensor(tensor.detach()).reshape(-1)
        if flat.is_meta or not flat.is_floating_point():
            return Sample(shape, None if flat.is_meta else b"")
        at = torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLES, len(flat)), dtype=torch.float64).long()
        values = flat[at.to(flat.device)].to(torch.bfloat16).cpu()
        return Sample(shape, values.view(torch.int16).numpy().tobytes())


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a base model.

    Args:
        architecture: the model's class.
        structure: SHA-256 over the names and shapes of all parameters.
        weights: SHA-256 over 64 numbers of every floating parameter, evenly spread and rounded to bfloat16, so that
            the same checkpoint has the same fingerprint in fp32 and in bf16; empty for a model without values. If
            another library quantised layers, it covers the other parameters, has a prefix, and is compared only with
            those of bases that are quantised by another library too.
        name: the Hub id or last folder name that the model was loaded from; empty if the model does not say.
        frozen: as `weights`, without the parameters that an adapter trains in full, which it replaces: the new head of
            a classifier is drawn again at every load. Empty for an adapter that trains none, and in older files.
        buffers: as `weights`, over the persistent buffers, such as the running statistics of a batch norm; empty for a
            model without them, for an adapter that trains some of them, and in older files.
        settings: the settings of the model's configuration that its function depends on.
    """

    architecture: str = ""
    structure: str = ""
    weights: str = ""
    name: str = ""
    frozen: str = field(default="", compare=False)
    buffers: str = field(default="", compare=False)
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    @mode_independent
    def of(model: nn.Module, known: Mapping[str, Sample] | None = None) -> Fingerprint:
        """The fingerprint of a model's base; attached adapters and quantisation by lorary do not change it.

        Args:
            model: the model.
            known: samples of parameters from before they were quantised, empty for those that another library
                quantised; given these, a remembered fingerprint is not used.

        Raises:
            StateError: `model` is not a module.
        """
        if problems := not_a(nn.Module, "a torch.nn.Module", model=model):
            raise StateError("cannot take a fingerprint:", problems)
        model = unwrapped(model)
        for remembered in (getattr(getattr(model, STATE, None), "fingerprint", None), getattr(model, _PLAIN, None)):
            if isinstance(remembered, Fingerprint) and known is None:
                return remembered
        known = known or {}
        structure, weights = hashlib.sha256(), hashlib.sha256()
        empty = False
        samples, foreign = _plain_samples(model)
        foreign = foreign or any(not sample.values for sample in known.values())
        for name, sample in sorted(samples.items()):
            shape, values = known.get(name) or sample
            structure.update(f"{name} {shape}\n".encode())
            empty = empty or values is None
            weights.update(values or b"")
        config = getattr(model, "config", None)
        return Fingerprint(
            original_class(model).__name__,
            structure.hexdigest(),
            "" if empty else (_FOREIGN if foreign else "") + weights.hexdigest(),
            base_name(str(getattr(config, "name_or_path", "") or "")),
            buffers=_buffers_digest(model),
            settings=_function_settings(model),
        )

    @staticmethod
    def from_record(found: object) -> Fingerprint | None:
        """The fingerprint that a file holds; None if it is not one."""
        known = {f.name for f in fields(Fingerprint)}
        if not isinstance(found, dict) or set(found) | _OPTIONAL != known:
            return None
        texts = all(isinstance(value, str) for name, value in found.items() if name != "settings")
        return Fingerprint(**found) if texts and _are_settings(found.get("settings", {})) else None

    def record(self) -> dict[str, Any]:
        """The fields as files hold them."""
        return {name: value for name, value in asdict(self).items() if name not in _OPTIONAL or value}

    @mode_independent
    def without(self, model: nn.Module, full: Collection[str]) -> Fingerprint:
        """For an adapter that trains these parameters or buffers in full; `model` is the base, not yet changed."""
        if not full:
            return self
        trained = persistent_buffers(unwrapped_modules(model)).keys() & set(full)
        return replace(self, frozen=frozen_weights(model, full), buffers="" if trained else self.buffers)

    def remember(self, model: nn.Module, known: Mapping[str, Sample] | None = None) -> None:
        """Make this the model's fingerprint from now on, however its weights are quantised.

        Args:
            model: the model.
            known: samples of its parameters in the plain model, for `frozen`; None: the model is still plain.
        """
        object.__setattr__(model, _PLAIN, self)
        object.__setattr__(model, _SAMPLES_BEFORE, dict(_plain_samples(model)[0] if known is None else known))

    @staticmethod
    @mode_independent
    def resized(model: nn.Module, tables: Collection[Tensor]) -> None:
        """Bring a remembered fingerprint up to date after these plain parameters of the model have got more rows."""
        known: dict[str, Sample] | None = vars(model).get(_SAMPLES_BEFORE)
        if known is None:
            return
        ids = set(map(id, tables))
        known |= {name: Sample.of(t) for name, t in base_parameters(model) if id(t) in ids}
        Fingerprint.forget(model)
        Fingerprint.of(model, known).remember(model, known)

    @staticmethod
    def forget(model: nn.Module) -> None:
        """Undo `remember`: the model's fingerprint is that of its present weights again."""
        vars(model).pop(_PLAIN, None)
        vars(model).pop(_SAMPLES_BEFORE, None)

    def disagreements(self, other: Fingerprint, there: str = "here") -> list[Diagnostic]:
        """How another base differs from this one; fields that are empty in either are not compared.

        Args:
            other: the fingerprint of the other base.
            there: what the other base is, for the sentences.
        """
        problems = []
        for name, what in (("architecture", "another architecture"), ("structure", "other layers or sizes")):
            mine, its = getattr(self, name), getattr(other, name)
            if mine and its and mine != its:
                problems.append(_difference(what, _short(mine), _short(its), there))
        return problems or [*self._other_values(other, there), *self._other_settings(other, there)]

    def _other_values(self, other: Fingerprint, there: str) -> list[Diagnostic]:
        """Differences of a base of the same structure in its parameters and buffers."""
        problems = []
        was = f" (it was trained on `{self.name}`)" if self.name else ""
        alike = self.weights.startswith(_FOREIGN) == other.weights.startswith(_FOREIGN)
        same = self.frozen and self.frozen == other.frozen  # they differ in what the adapter replaces, if at all
        if self.weights and other.weights and alike and not same and self.weights != other.weights:
            problems.append(_difference("other weights", _short(self.weights), _short(other.weights), f"{there}{was}"))
        if self.buffers and other.buffers and self.buffers != other.buffers:
            what = "other buffers, such as running statistics"
            problems.append(_difference(what, _short(self.buffers), _short(other.buffers), there))
        return problems

    def _other_settings(self, other: Fingerprint, there: str) -> list[Diagnostic]:
        """Differences of the configuration; a setting that only one of them has is of another version."""
        differ = [k for k in self.settings if k in other.settings and self.settings[k] != other.settings[k]]
        problems = [
            _difference(f"another configuration, `{key}`", show(self.settings[key]), show(other.settings[key]), there)
            for key in differ[:_MOST_SETTINGS]
        ]
        if len(differ) > _MOST_SETTINGS:
            problems.append(Diagnostic("base", f"and {len(differ) - _MOST_SETTINGS} more settings"))
        return problems


def _difference(what: str, mine: str, its: str, there: str) -> Diagnostic:
    return Diagnostic("base", f"{what}: {mine} when it was trained, {its} {there}")


def _buffers_digest(model: nn.Module) -> str:
    """`Fingerprint.buffers` of a base; empty if it has none, or no values."""
    found = persistent_buffers(unwrapped_modules(model))
    samples = [(name, Sample.of(t)) for name, t in sorted(found.items()) if t.is_floating_point()]
    if not samples or any(sample.values is None for _, sample in samples):
        return ""
    text = b"".join(f"{name} {sample.shape}\n".encode() + (sample.values or b"") for name, sample in samples)
    return hashlib.sha256(text).hexdigest()


def frozen_weights(model: nn.Module, full: Collection[str]) -> str:
    """`Fingerprint.frozen` of a base for these parameters; empty if it has no values or is quantised."""
    samples, foreign = _plain_samples(model)
    quantized = hasattr(model, _PLAIN)
    known: Mapping[str, Sample] = getattr(model, _SAMPLES_BEFORE, {}) if quantized else {}
    values = [(known.get(name) or sample).values for name, sample in sorted(samples.items()) if name not in full]
    if foreign or (quantized and not known) or None in values:
        return ""
    return hashlib.sha256(b"".join(filter(None, values))).hexdigest()


def _plain_samples(model: nn.Module) -> tuple[dict[str, Sample], bool]:
    """(path in the plain model -> sample, whether another library quantised some: these are shapes only)."""
    foreign = {name: m for name, m in unwrapped_modules(model).items() if is_foreign(m)}
    theirs = {id(t) for m in foreign.values() for t in m.parameters()}
    samples = {name: Sample.of(t) for name, t in base_parameters(model) if id(t) not in theirs}
    for name, layer in foreign.items():
        rows, columns = KINDS[str(kind_of(layer))].size(layer)
        transposed = kind_of(layer) == "embedding" or was_transposed(layer)
        samples[f"{name}.weight"] = Sample((columns, rows) if transposed else (rows, columns), b"")
        if getattr(layer, "bias", None) is not None:  # GPTQ's is a buffer
            samples[f"{name}.bias"] = Sample((rows,), b"")
    return samples, bool(foreign)


def base_name(path: str) -> str:
    """The full Hub id, or the last name of a folder, which tells nothing about the machine.

    The built-in base has its own name, wherever it is installed.

    >>> base_name("org/model"), base_name("/data/models/small/")
    ('org/model', 'small')
    """
    if path == str(BUILTIN_FOLDER):
        return BUILTIN_NAME
    components = path.replace("\\", "/").rstrip("/").split("/")
    hub = len(components) == 2 and re.fullmatch(r"[A-Za-z0-9][\w.-]*", components[0])  # not `.`, `..`, `~` or `C:`
    return path if hub and components[1] else components[-1]


def _short(text: str) -> str:
    text = text.removeprefix(_FOREIGN)
    return text[:12] if len(text) == 64 else text


# --- settings ---------------------------------------------------------------------------------------------------------


def _function_settings(model: object) -> dict[str, Any]:
    """Dotted name -> value of the settings that a Transformers model's function depends on; empty for other models.

    Two models of one class with the same weights may still be different functions. All settings are taken except those
    known to be irrelevant, so one that only a later architecture has needs no change here.
    """
    config = getattr(model, "config", None)
    if not any(cls.__module__.startswith("transformers.") for cls in type(config).__mro__):
        return {}
    return dict(sorted(_flat(config.to_dict(), "").items()))  # type: ignore[union-attr]


def _are_settings(found: object) -> bool:
    """Whether a value from a file is what `_function_settings` returns."""
    return isinstance(found, dict) and all(isinstance(k, str) and _is_plain(v) for k, v in found.items())


def _flat(settings: Mapping[Any, Any], place: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if not isinstance(key, str) or _IRRELEVANT.fullmatch(key):
            continue
        value = _finite(list(value) if isinstance(value, tuple) else value)
        if isinstance(value, Mapping):
            found |= _flat(value, f"{place}{key}.")
        elif _is_plain(value):
            found[f"{place}{key}"] = value
    return found


def _finite(value: Any) -> Any:
    """Infinity (a limit of the Mamba family) and NaN as text: JSON has neither."""
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _is_plain(value: object) -> bool:
    return isinstance(value, _SCALARS) or (isinstance(value, list) and all(isinstance(v, _SCALARS) for v in value))
