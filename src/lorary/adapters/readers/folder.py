"""An adapter folder as other programs see it: `adapter_config.json` as it stands, and the tensors' names and shapes.

No tensor is read, and nothing is refused that some reader accepts: only files that are damaged or hostile.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from lorary.adapters import native
from lorary.adapters.mlx import WEIGHTS as MLX_WEIGHTS
from lorary.adapters.mlx import is_mlx
from lorary.adapters.peft import keys
from lorary.adapters.peft.attention import OUTSIDE, attentions_in
from lorary.adapters.peft.config import NAME, PeftConfig
from lorary.adapters.peft.fields import EXCLUDE, PARAMETERS, RANK, SHARED, Field, TolerableError, by_pattern, field
from lorary.adapters.peft.reader import MOST_JSON, WEIGHTS, weights_name
from lorary.errors import Diagnostic, FileError
from lorary.files.bounded_regex import MOST_SECONDS, Budget
from lorary.files.safe_open import existing_folder, read_json, subject
from lorary.files.strict_json import named, show
from lorary.files.tensor_file import TensorFile
from lorary.layers.adapted import unwrapped_modules
from lorary.model.fingerprint import base_name
from lorary.spec.placement import AdaptedSite

FACTORS = ("lora_A.weight", "lora_embedding_A")  # the ends of A's name
_LEAVES = (*FACTORS, "lora_B.weight", "lora_embedding_B")
_NUMBER = {
    "check": lambda value: isinstance(value, int | float) and math.isfinite(value) and type(value) is not bool,
    "expects": "a number",
}
_ANY = Field(lambda value, budget: value)
_SELECTION = {name: SHARED[name] for name in ("target_modules", "layers_to_transform", "layers_pattern")}
_READ: dict[str, Field] = {
    **_SELECTION,
    "modules_to_save": SHARED["modules_to_save"],
    "exclude_modules": EXCLUDE,
    "target_parameters": Field(lambda value, budget: _parameters(value, budget), (), nullable=True),
    "r": field(RANK, 8),
    "lora_alpha": field(_NUMBER, 8.0),
    "rank_pattern": by_pattern(field(RANK)),
    "alpha_pattern": by_pattern(field(_NUMBER, 8.0)),
    "use_rslora": _ANY,
}


def _all_linear(name: str, value: Any) -> bool:
    """Whether a field is PEFT's shorthand for all linear layers: the tensors alone tell which these were."""
    return name == "target_modules" and isinstance(value, str) and value.lower() == "all-linear"


def _parameters(value: Any, budget: Budget) -> tuple[str, ...]:
    """`target_parameters`, of linear layers or of fused experts."""
    try:
        return tuple(PARAMETERS.read(value, budget))
    except ValueError:
        return tuple(str(name) for name in value) if isinstance(value, list) else ()


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter folder as it lies on the disk.

    Args:
        form: `peft`, `lorary` (only lorary reads it), or `mlx`.
        config: the contents of `adapter_config.json`; empty in lorary's own form.
        tensors: short name -> shape.
        files: the names of all files in it.
        model: the base, on any device, if at hand.
        seconds: the time for all its patterns together.
        own_sites: the sites of an adapter in lorary's own form; empty if its record cannot be read.
    """

    form: str
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    files: frozenset[str] = frozenset()
    model: nn.Module | None = None
    seconds: float = MOST_SECONDS
    own_sites: tuple[AdaptedSite, ...] = ()

    @property
    def peft_type(self) -> str:
        """The name of the PEFT type, in upper case; empty if the configuration names none."""
        return str(self.config.get("peft_type") or "").upper()

    @property
    def is_lora(self) -> bool:
        """Whether it is, or passes for, an adapter of PEFT's type LORA."""
        return self.peft_type in ("LORA", "")

    @cached_property
    def fields(self) -> PeftConfig:
        """The fields that say where a LoRA is and how it is scaled, with PEFT's defaults.

        Raises:
            FileError: a field has a value that no program can read.
        """
        values, problems = {name: entry.default for name, entry in _READ.items()}, []
        budget = Budget(self.seconds)
        for name, entry in _READ.items():
            try:
                value = self.config.get(name)
                if value is not None and not _all_linear(name, value):
                    values[name] = entry.read(value, budget)
            except TolerableError as error:
                values[name] = error.value
            except ValueError as error:
                problems.append(Diagnostic(f"{NAME}: {name}", str(error)))
        if problems:
            raise FileError("", problems)
        return PeftConfig("LORA", values)

    @cached_property
    def sites(self) -> dict[str, tuple[int, ...]]:
        """The path of every module with a LoRA in the tensor file -> the shape of its A; an attention is one module."""
        found = {keys.site_of(name, FACTORS): shape for name, shape in self.tensors.items()}
        inside = {f"{path}{OUTSIDE}" for path in attentions_in(self.tensors)}
        return {name: shape for name, shape in found.items() if name and name not in inside}

    @cached_property
    def others(self) -> list[str]:
        """The names of all tensors that are not LoRA's factors."""
        return [name for name in self.tensors if keys.site_of(name, _LEAVES) is None]

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules of the base by path; empty without the base."""
        return {k: v for k, v in unwrapped_modules(self.model).items() if k} if self.model is not None else {}

    def rank_and_alpha(self, path: str) -> tuple[int, float]:
        """The rank and alpha that PEFT computes with at a path.

        Raises:
            FileError: the patterns take too much work.
        """
        if path not in self._ranks_and_alphas:
            weight = f"{path}.weight"
            name = weight if self.fields.targets_parameter(weight) else path  # as PEFT matches its patterns
            self._ranks_and_alphas[path] = self.matched(name)
        return self._ranks_and_alphas[path]

    @cached_property
    def _ranks_and_alphas(self) -> dict[str, tuple[int, float]]:
        return {}

    def matched(self, name: str) -> tuple[int, float]:
        """The rank and alpha of the first pattern that matches a name, or the configuration's own.

        Raises:
            FileError: the patterns take too much work.
        """
        fields = self.fields
        try:
            r, alpha = (
                next((value for pattern, value in fields[patterns] if pattern.fullmatch(name)), fields[usual])
                for patterns, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
            )
        except ValueError as error:
            raise FileError("", [Diagnostic(NAME, str(error))]) from None
        return r, alpha

    def scale(self, path: str) -> float:
        """The scale that the configuration means for a site."""
        r, alpha = self.rank_and_alpha(path)
        return alpha / (math.sqrt(r) if self.fields["use_rslora"] else r)


def read_folder(
    folder: str | os.PathLike[str], model: nn.Module | None = None, seconds: float = MOST_SECONDS
) -> AdapterFolder:
    """The adapter folder at `folder`.

    Args:
        folder: where it is.
        model: the base, if at hand.
        seconds: the time for all its patterns together.

    Raises:
        FileError: it holds no adapter, or a pickle, or its files are damaged or hostile.
    """
    path = existing_folder(folder)
    try:
        names = frozenset(entry.name for entry in path.iterdir())
        if NAME not in names and native.NAME not in names:
            raise FileError("", [Diagnostic("", f"it holds neither {native.NAME} nor {NAME}")])
        if NAME not in names:
            shapes = _shapes(path, _own_name(path))
            return AdapterFolder("lorary", {}, shapes, names, model, own_sites=_own_sites(path))
        config = read_json(path, NAME, MOST_JSON)
        if not isinstance(config, dict):
            raise FileError("", [Diagnostic(NAME, f"is {show(config)}, not a JSON object")])
        mlx = is_mlx(path)
        found = AdapterFolder(
            "mlx" if mlx else "peft",
            config,
            _shapes(path, MLX_WEIGHTS if mlx else weights_name(path)),
            names,
            model,
            seconds,
        )
        if not mlx:
            if found.is_lora:
                _ = found.fields  # malformed fields are refused here, once
            _refuse_empty(found.tensors)
        return found
    except FileError as error:
        raise FileError(f"cannot check {subject(folder)}", error.problems) from error.__cause__


def _own_name(path: Path) -> str:
    """The file with the tensors of an adapter in lorary's own form."""
    return WEIGHTS if (path / WEIGHTS).exists() else native.TENSORS


def _own_sites(path: Path) -> tuple[AdaptedSite, ...]:
    """The sites of an adapter in lorary's own form; a damaged record changes nothing for other programs."""
    with suppress(FileError):
        return native.recorded_sites(path)
    return ()


def _shapes(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    with TensorFile(path, name) as file:
        return {keys.short(key): entry.shape for key, entry in file.header.tensors.items()}


def _refuse_empty(tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse factors that no reader can make a matrix of.

    Raises:
        FileError: one has fewer than two dimensions, or an empty one; every reason.
    """
    wrong = {n: s for n, s in tensors.items() if keys.site_of(n, _LEAVES) and (len(s) < 2 or 0 in s)}
    if wrong:
        what = "is the shape of no factor"
        raise FileError("", [Diagnostic(named(name), f"{list(shape)} {what}") for name, shape in wrong.items()])


def base_of(folder: Path) -> str:
    """The base that an adapter folder names; empty if it names none, or if its files are not JSON."""
    for name, keys_ in ((native.NAME, ("base", "name")), (NAME, ("base_model_name_or_path",)), (NAME, ("model",))):
        found: object = None
        if (folder / name).is_file():
            with suppress(FileError):
                found = read_json(folder.resolve(), name, MOST_JSON)
        for key in keys_:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, str) and found:
            return base_name(found)
    return ""
