"""Fingerprint: which base an adapter was trained on, small enough for a file and quick enough to ask every time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic
from lorary.layers.adapted import base_parameters, unwrapped_modules
from lorary.layers.kinds import KINDS, kind_of, was_transposed
from lorary.layers.quantized_weight import is_foreign

STATE = "_lorary"  # where a model remembers what is attached to it, and the fingerprint that its base had then
_PLAIN = "_lorary_base"  # where a packed model remembers the fingerprint that it had before
_OTHERS = "unpacked:"  # before what is known of the weights of a base that has been packed by others
_SAMPLES = 64  # numbers read from each parameter


class Sample(NamedTuple):
    """What a fingerprint reads of one parameter: taken while a checkpoint streams by, of a weight that is never there
    in full once the model is.

    Args:
        shape: of the parameter in the plain model.
        values: 64 numbers, evenly spread, in bfloat16; None of a parameter without values.
    """

    shape: tuple[int, ...]
    values: bytes | None

    @staticmethod
    def of(tensor: Tensor) -> Sample:
        """The sample of a parameter; whole numbers and truth values have none."""
        value = tensor.detach()
        if value.is_meta:
            return Sample(tuple(value.shape), None)
        return Sample(tuple(value.shape), _sample(value) if value.is_floating_point() else b"")


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a base model.

    Args:
        architecture: the model's class.
        structure: SHA-256 over the names and shapes of all parameters.
        weights: SHA-256 over 64 numbers of every floating parameter, evenly spread and rounded to bfloat16, so that
            the same checkpoint has the same fingerprint in fp32 and in bf16; empty for a model without values. Where
            another library has packed layers it is that of the other parameters, and says so: it is compared with
            those of bases that are packed as well, in whichever way.
        name: the Hub id or folder's last name that the model was loaded from; empty where it does not say.
    """

    architecture: str = ""
    structure: str = ""
    weights: str = ""
    name: str = ""

    @staticmethod
    def of(model: nn.Module, known: Mapping[str, Sample] | None = None) -> Fingerprint:
        """The fingerprint of a model's base: neither adapters that are attached nor packing change it.

        Args:
            model: the model.
            known: samples of parameters as they were, where the model has them in another form, without values of
                those that another library has packed; what the model remembers is not asked then.
        """
        for remembered in (getattr(getattr(model, STATE, None), "fingerprint", None), getattr(model, _PLAIN, None)):
            if isinstance(remembered, Fingerprint) and known is None:
                return remembered
        structure, weights = hashlib.sha256(), hashlib.sha256()
        empty = False
        parameters, packed = _plain_parameters(model)
        packed = packed or any(not sample.values for sample in (known or {}).values())
        for name, tensor in sorted(parameters.items()):
            shape, values = (known or {}).get(name) or tensor
            structure.update(f"{name} {shape}\n".encode())
            empty = empty or values is None
            weights.update(values or b"")
        config = getattr(model, "config", None)
        return Fingerprint(
            type(model).__name__,
            structure.hexdigest(),
            "" if empty else (_OTHERS if packed else "") + weights.hexdigest(),
            base_name(str(getattr(config, "_name_or_path", "") or "")),
        )

    def remember(self, model: nn.Module) -> None:
        """Let this be the model's fingerprint from now on, whatever its weights are packed into."""
        object.__setattr__(model, _PLAIN, self)

    @staticmethod
    def rename(model: nn.Module, name: str) -> None:
        """Let a model of Transformers say another name than that of the folder from which it was read."""
        model.config._name_or_path = name  # type: ignore[union-attr]
        if isinstance(remembered := getattr(model, _PLAIN, None), Fingerprint):
            replace(remembered, name=base_name(name)).remember(model)

    @staticmethod
    def forget(model: nn.Module) -> None:
        """Undo `remember`: the model's fingerprint is that of the weights that it has."""
        vars(model).pop(_PLAIN, None)

    def disagreements(self, other: Fingerprint) -> list[Diagnostic]:
        """How another base differs from this one; what either does not know is not compared."""
        problems = []
        for field, what in (("architecture", "another architecture"), ("structure", "other layers or sizes")):
            mine, its = getattr(self, field), getattr(other, field)
            if mine and its and mine != its:
                text = f"{what}: {_short(mine)} when it was trained, {_short(its)} here"
                problems.append(Diagnostic("base", text))
        alike = self.weights.startswith(_OTHERS) == other.weights.startswith(_OTHERS)
        if not problems and self.weights and other.weights and alike and self.weights != other.weights:
            was = f" (it was trained on `{self.name}`)" if self.name else ""
            what = f"other weights: {_short(self.weights)} when it was trained, {_short(other.weights)} here{was}"
            problems.append(Diagnostic("base", what))
        return problems


def _plain_parameters(model: nn.Module) -> tuple[dict[str, Sample], bool]:
    """(path in the plain model -> sample, whether another library has packed some: these are shapes alone)."""
    foreign = {name: m for name, m in unwrapped_modules(model).items() if is_foreign(m)}
    theirs = {id(t) for m in foreign.values() for t in m.parameters()}
    found = {name: Sample.of(t) for name, t in base_parameters(model) if id(t) not in theirs}
    for name, layer in foreign.items():
        out, inp = KINDS[str(kind_of(layer))].size(layer)
        turned = kind_of(layer) == "embedding" or was_transposed(layer)
        found[f"{name}.weight"] = Sample((inp, out) if turned else (out, inp), b"")
        if getattr(layer, "bias", None) is not None:  # GPTQ's is a buffer
            found[f"{name}.bias"] = Sample((out,), b"")
    return found, bool(foreign)


def base_name(path: str) -> str:
    """A Hub id whole; of a folder only its last name, which says nothing about the machine.

    >>> base_name("org/model"), base_name("/data/models/small/")
    ('org/model', 'small')
    """
    components = path.replace("\\", "/").rstrip("/").split("/")
    hub = len(components) == 2 and re.fullmatch(r"[A-Za-z0-9][\w.-]*", components[0])  # not `.`, `..`, `~` or `C:`
    return path if hub and components[1] else components[-1]


def _short(text: str) -> str:
    text = text.removeprefix(_OTHERS)
    return text[:12] if len(text) == 64 else text


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1)
    at = torch.linspace(0, max(flat.numel() - 1, 0), min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
    values = flat[at.to(flat.device)].to(torch.bfloat16).cpu()
    return values.view(torch.int16).numpy().tobytes()
