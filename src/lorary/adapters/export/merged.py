"""export_merged: base and adapter as a plain Transformers checkpoint, written file by file.

`lorary.merge` needs the whole model in memory. Here the base's own safetensors files are read tensor by tensor, merged
where the adapter adapts, and written under the same names into files of the same names, so that memory holds one file
of the result and a few copies of one layer.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.export.carried_files import carry_files, copy_file
from lorary.adapters.export.merged_model import MergedModel, merged_model
from lorary.adapters.export.merged_weights import MergedWeights
from lorary.adapters.hub import CHAT_TEMPLATE
from lorary.adapters.resolve import class_of_base
from lorary.adapters.switch import base_mismatches
from lorary.errors import ConfigError, Diagnostic, FileError, StateError, caller_stacklevel, not_a
from lorary.files.atomic import atomic_directory
from lorary.files.findings import AdapterWarning
from lorary.files.safe_open import checked_path
from lorary.files.syscalls import fault_point
from lorary.files.tensor_file import write_tensors
from lorary.kernels.torch_internals import storage_id
from lorary.model.ambient import mode_independent
from lorary.model.base import Base
from lorary.model.fingerprint import Fingerprint
from lorary.model.loading.base_weights import BaseWeights
from lorary.model.loading.from_pretrained import empty_model, load_config, load_tokenizer
from lorary.model.loading.source import ModelClass, ModelSection
from lorary.model.loading.weight_files import SINGLE, WeightFiles, model_folder, write_index
from lorary.model.loading.weight_names import Group, as_saved
from lorary.model.merge import LOSSY
from lorary.model.quantize import holds_weights, quantizable_layers, with_progress
from lorary.model.scan import scan
from lorary.spec.placement import check_mergeable, replaced_tables

ONTO = ("trained", "original")
_HEADLINE = "cannot export the merged model:"


@mode_independent
def export_merged(
    adapter: Adapter,
    base: str | os.PathLike[str] | ModelSection,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    onto: str = "trained",
    force: bool = False,
    model_class: ModelClass | None = None,
    chat_template: str | os.PathLike[str] | None = None,
) -> torch.dtype:
    """Write base and adapter as a plain Transformers checkpoint, one file of the base's after the other.

    Every tensor equals that of `lorary.merge` and `save_pretrained`, bit for bit: the sum is computed in fp32 and
    rounded once. Tokenizer, chat template, generation settings, processors and code of the base are carried along.

    Args:
        adapter: the adapter.
        base: the model that it was trained on, in safetensors files: a folder, a Hub id or builtin:base. The `dtype` of
            a section is the precision of loading; `auto` rounds nothing before the end.
        folder: for the checkpoint; must be empty or not exist.
        dtype: of the merged weights; None for the base's own.
        onto: the weights of a base that the method quantises: `trained`, after quantisation, or `original`.
        force: accept another base than in training, if every tensor fits.
        model_class: the class of the result, with its labels; None for that of the adapter's base.
        chat_template: a Jinja file in place of the base's chat template.

    Returns:
        The dtype of the weights.

    Raises:
        ConfigError: an option is invalid; every one.
        FileError: the base cannot be read, is quantised on disk, or is not the adapter's; the folder cannot be written.
        StateError: the architecture has no checkpoint of the merged model, or weights are not finite; every name.

    Warns:
        AdapterWarning: the base's files hold tensors that are not in the model, and so not in the result.

    Example:
        >>> adapter = lorary.load_adapter("out/adapter")
        >>> export_merged(adapter, "org/model", "merged")
    """
    _check_options(adapter, dtype, onto)
    check_mergeable(adapter.sites)
    checked_path(folder, _HEADLINE)
    section = base if isinstance(base, ModelSection) else ModelSection.of(checked_path(base, _HEADLINE))
    section, saved, target = _precisions(section, dtype)
    model: Any = empty_model(section, model_class or class_of_base(section, adapter))
    known = Base(model)
    _refuse(section, [*base_mismatches(known, adapter), *_other_base(adapter, known.fingerprint, force)])
    with WeightFiles(model_folder(section)) as files:
        weights = BaseWeights(model, files)
        merged = merged_model(adapter, weights)
        quantized = [] if onto == "original" else _layers_to_quantize(model, adapter)
        replaced = {*adapter.full, *replaced_tables(adapter.sites)}
        values = MergedWeights(adapter, model, weights.read, quantized, target)
        with atomic_directory(folder, needed=files.size * target.itemsize // saved.itemsize) as written:
            _write_weights(merged, weights, values, written)
            _refuse(section, _other_base(adapter, weights.fingerprint(replaced), force))  # all has been read now
            _write_config(merged.model, target, written)
            if section.tokens:  # the base's own tokenizer lacks them
                load_tokenizer(section).save_pretrained(written)
            if chat_template is not None:
                (written / CHAT_TEMPLATE).unlink(missing_ok=True)
                template = Path(chat_template)
                copy_file(template.parent.resolve(), template.name, written / CHAT_TEMPLATE)
            carry_files(files.folder, written)
        _warn_of_unused(weights)
    return target


def _check_options(adapter: Any, dtype: Any, onto: Any) -> None:
    problems = not_a(Adapter, "an Adapter", adapter=adapter)
    if dtype is not None and not holds_weights(dtype):
        problems.append(Diagnostic("dtype", f"is {dtype}: {LOSSY}", "use torch.bfloat16 or torch.float32"))
    if onto not in ONTO:
        problems.append(Diagnostic("onto", f"is {onto!r}, expected one of {', '.join(ONTO)}"))
    if problems:
        raise ConfigError(_HEADLINE, problems)


def _precisions(section: ModelSection, dtype: torch.dtype | None) -> tuple[ModelSection, torch.dtype, torch.dtype]:
    """The base in its precision of loading, the dtype of its files, and the one to write.

    Raises:
        FileError: the base is quantised on disk.
    """
    config = load_config(section)
    if getattr(config, "quantization_config", None) is not None:
        what = "is quantised on disk: its files hold no plain weights that could be written again"
        fix = "`lorary merge` loads the whole model and writes it in 16 or 32 bits"
        raise FileError(_HEADLINE, [Diagnostic(section.id, what, fix)])
    saved = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    target = dtype or saved
    if section.dtype == "auto":
        wide = str(torch.promote_types(saved, target)).removeprefix("torch.")
        section = section.model_copy(update={"dtype": wide})
    return section, saved, target


def _other_base(adapter: Adapter, here: Fingerprint, force: bool) -> list[Diagnostic]:
    """The differences from the base that an adapter was trained on, unless they are forced."""
    fix = "name the base that it was trained on, or pass force=True"
    return [] if force else [Diagnostic(p.where, p.what, fix) for p in adapter.base.disagreements(here)]


def _refuse(section: ModelSection, problems: list[Diagnostic]) -> None:
    if problems:
        raise FileError(f"the adapter does not fit {section.id}:", problems)


def _layers_to_quantize(model: nn.Module, adapter: Adapter) -> list[str]:
    """The layers that loading the adapter would quantise."""
    storage = adapter.method.storage
    return [] if storage.writable else quantizable_layers(scan(model), storage, adapter.full)


def _write_weights(merged: MergedModel, base: BaseWeights, values: MergedWeights, folder: Path) -> None:
    """Write a file for each of the base's, and their index.

    Raises:
        StateError: merged weights are not finite; every name.
    """
    places: dict[str, str] = {}
    files, total = list(base.files.files), 0
    for file in with_progress(files, "merging"):
        keys = set(base.files.files[file])
        found = {id(group): group for group in base.groups.values() if group.keys[0] in keys}
        tensors = {key: t for group in found.values() for key, t in _group(group, merged, base, values).items()}
        if file == files[-1]:
            tensors |= as_saved(merged.model, {name: _added(name, merged, base, values) for name in merged.added})
        if values.problems or not tensors:
            continue  # for the names of all others
        write_tensors(folder / file, _apart(tensors))
        fault_point("merged.file")
        places |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
        del tensors
    if values.problems:
        raise StateError(_HEADLINE, values.problems)
    if SINGLE not in files:
        write_index(folder, places, total)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, with a copy of each that shares memory with another one: of untied layers."""
    known: set[Hashable] = set()
    found = {}
    for key, tensor in tensors.items():
        where = storage_id(tensor)
        found[key] = tensor.clone() if where in known else tensor.contiguous()
        known.add(where)
    return found


def _group(group: Group, merged: MergedModel, base: BaseWeights, values: MergedWeights) -> dict[str, Tensor]:
    """The merged model's tensors of a group, by their names in the checkpoint."""
    base.load(group)
    if group.conversion is not None and not any(map(values.changes, group.names)):
        base.forget()
        return {key: values.rounded(group.names[0], base.files.tensor(key)) for key in group.keys}
    # a parameter that stays shared is adapted, or held by the adapter, under its first name
    origin = {name: base.own.get(name, name) for name in group.names}
    origin |= {} if merged.untied else {name: base.names[name] for name in group.names if name in base.names}
    found = {name: values.value(origin[name]) for name in group.names}
    return {group.keys[0]: found[group.names[0]]} if group.conversion is None else as_saved(base.model, found)


def _added(name: str, merged: MergedModel, base: BaseWeights, values: MergedWeights) -> Tensor:
    """The merged model's tensor that the base's checkpoint lacks."""
    if name in merged.zero:
        shape = merged.model.get_parameter(name).shape
        return torch.zeros(shape, dtype=values.dtype)
    return values.value(name)


def _warn_of_unused(base: BaseWeights) -> None:
    if unused := base.unused():
        more = f" and {len(unused) - 3:,} more" if len(unused) > 3 else ""
        what = f"tensors of the base that a {type(base.model).__name__} does not have are left out: "
        warnings.warn(what + ", ".join(unused[:3]) + more, AdapterWarning, stacklevel=caller_stacklevel())


def _write_config(model: Any, dtype: torch.dtype, folder: Path) -> None:
    config = model.config
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
