"""Saving an adapter as a folder, and loading lorary's and PEFT's folders and other tools' files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from torch import nn

from lorary.adapters import native
from lorary.adapters.adapter import Adapter
from lorary.adapters.hub import DIFFUSERS, OWN_FILES, RECORDS, local_folder
from lorary.adapters.intake.single_file import read_single_file
from lorary.adapters.intake.torchtune import TORCHTUNE
from lorary.adapters.mlx import is_mlx, read_mlx
from lorary.adapters.peft import writer
from lorary.adapters.peft.config import NAME as PEFT_CONFIG
from lorary.adapters.peft.config import config_text
from lorary.adapters.peft.experts import LAYOUTS
from lorary.adapters.peft.reader import WEIGHTS, read_peft, weights_name
from lorary.adapters.peft.virtual_tokens import is_exact, virtual_token_files
from lorary.adapters.shared_tensors import SharedTensors, collect_shared, inconsistent_copies, rejoined, tie_problems
from lorary.adapters.tensor_checks import unwritable
from lorary.errors import Diagnostic, FileError, caller_stacklevel, not_a
from lorary.files.atomic import atomic_directory
from lorary.files.findings import AdapterWarning, Findings
from lorary.files.safe_open import checked_path, existing_folder, is_single_file, subject
from lorary.files.strict_json import show
from lorary.files.tensor_file import write_tensors
from lorary.model.ambient import mode_independent
from lorary.model.base import Base

CERTIFICATE = "certificate.json"  # of `lorary verify`, about the adapter beside it
# every file that a reader of adapters looks at, or that is about the adapter: a new adapter replaces them all
ADAPTER_FILES = (
    *(native.NAME, native.TENSORS, PEFT_CONFIG, WEIGHTS, "adapter_model.bin", writer.BASE_README),
    CERTIFICATE,
)


@mode_independent
def save_adapter(
    adapter: Adapter, folder: str | os.PathLike[str], *, model: nn.Module | None = None, for_trainer: bool = False
) -> None:
    """Write an adapter folder: `lorary.json`, and the tensors, in PEFT's two files if PEFT can read them.

    An adapter already in the folder is replaced in one step, and other files there (a model card) stay; a killed
    process or a full disk leaves the old adapter or the new one.

    Args:
        adapter: the adapter.
        folder: where to.
        model: the base, if at hand: with it PEFT's files can hold modules trained in full and have short target lists.
        for_trainer: what Transformers' readers need: PEFT's file name for the tensors, also in lorary's own form, and
            the base's whole path, as PEFT records it.

    Raises:
        FileError: `load_adapter` would refuse the files (NaN, values beyond 1e6, other dtypes), with the same reasons;
            or the folder cannot be written.

    Warns:
        AdapterWarning: PEFT has a form for this adapter, and would misread it on this base; it is in lorary's own form.
    """
    headline = f"cannot save an adapter to {show(checked_path(folder, 'cannot save an adapter:'), most=400)}"
    problems = not_a(nn.Module | None, "a torch.nn.Module", model=model)
    if not isinstance(adapter, Adapter):
        what = f"is a {type(adapter).__name__}, not an Adapter"
        problems.append(Diagnostic("adapter", what, "lorary.save(model, path) saves a model's adapter"))
    if problems:
        raise FileError(headline, problems)
    shared = collect_shared(adapter)
    tensors = native.native_tensors(adapter, shared)
    if problems := unwritable(tensors, adapter.full) or _inconsistent(adapter, shared):
        raise FileError(headline, problems)
    # PEFT's files cannot hold RoPE scaling
    peft_type = None if writer.rope_overrides(adapter) else writer.exact_type(adapter, model, shared, copies=False)
    if peft_type is None and (reason := writer.why_misread(adapter, model)):
        warnings.warn(
            f"saved in lorary's own form, not as a PEFT adapter: {reason}",
            AdapterWarning,
            stacklevel=caller_stacklevel(),
        )
    config = None
    if peft_type is not None:
        config, tensors = writer.exact_files(adapter, model, shared, peft_type)
    elif is_exact(adapter):
        config, tensors = virtual_token_files(adapter, model)
    if config is not None and for_trainer and (source := getattr(getattr(model, "config", None), "name_or_path", "")):
        config["base_model_name_or_path"] = source  # from which Transformers loads the base itself
    needed = sum(t.nbytes for t in tensors.values())
    with atomic_directory(folder, replace=True, keep=True, drop=ADAPTER_FILES, needed=needed) as temporary:
        if config is not None:
            (temporary / PEFT_CONFIG).write_text(config_text(config), encoding="utf-8")
        write_tensors(temporary / (WEIGHTS if config or for_trainer else native.TENSORS), tensors)
        native.write_record(temporary, adapter, shared)
        try:
            native.check_written(temporary)
        except FileError as error:
            raise FileError(headline, error.problems) from error.__cause__


@mode_independent
def load_adapter(
    folder: str | os.PathLike[str],
    *,
    model: nn.Module | Base | None = None,
    strict: bool = True,
    expert_layout: str | None = None,
) -> Adapter:
    """Read an adapter: a folder of lorary, PEFT, mlx-lm or torchtune, or a file of kohya, diffusers or llama.cpp.

    Args:
        folder: the folder, or its Hub id: only the adapter's own files are then downloaded; or a single file, such as
            `pytorch_lora_weights.safetensors`.
        model: the base, if at hand: a PEFT folder must then have tensors for the modules that PEFT would adapt in it. A
            `Base` of the model is walked once for all the adapters that are read with it.
        strict: refuse anything missing, unexpected, malformed or not finite. False tolerates what PEFT tolerates, with
            one warning that lists it all: a missing tensor is zero, an unexpected one is dropped and never overwrites a
            weight of the base.
        expert_layout: the order of the columns of `lora_B` of fused experts in a PEFT folder that does not say it:
            `rank_major` as PEFT has them, or `grouped_by_expert`.

    Returns:
        The adapter, with remarks about the files in its `notes`.

    Raises:
        FileError: every reason why it cannot be used, at once.
    """
    checked_path(folder, "cannot load an adapter:")
    if problems := not_a(nn.Module | Base | None, "a torch.nn.Module", model=model):
        raise FileError(f"cannot load {subject(folder)}", problems)
    if expert_layout not in (None, *LAYOUTS):
        what = f"is {show(expert_layout)}; fused experts are {' or '.join(LAYOUTS)}"
        raise FileError(f"cannot load {subject(folder)}", [Diagnostic("expert_layout", what)])
    path = _existing(folder if os.path.lexists(folder) else local_folder(folder))
    findings, base = Findings(subject(folder), strict), None if model is None else Base.of(model)
    try:
        return _read(path, base, findings, expert_layout)
    except FileError as error:
        if error.headline:
            raise
        findings.fatal += error.problems
        raise FileError(f"cannot load {findings.subject}", findings.refused()) from error.__cause__


def _existing(path: str | os.PathLike[str]) -> Path:
    """The adapter folder or file that `path` names, symbolic links of folders resolved.

    The tensor file of an adapter folder names the folder.

    Raises:
        FileError: it does not exist, or is neither.
    """
    if not is_single_file(path):
        return existing_folder(path)
    folder, name = Path(path).parent.resolve(strict=True), Path(path).name
    recorded = name in OWN_FILES and any(os.path.lexists(folder / record) for record in RECORDS)
    return folder if recorded else folder / name


def _read(path: Path, base: Base | None, findings: Findings, expert_layout: str | None) -> Adapter:
    """The adapter in a folder or a file."""
    if expert_layout and not os.path.lexists(path / PEFT_CONFIG):
        raise FileError("", [Diagnostic("expert_layout", "is told, and this is no folder of PEFT", "leave it out")])
    if path.is_file():
        return read_single_file(path, base, findings)
    if os.path.lexists(path / native.NAME):
        return native.read_native(path, findings)
    if os.path.lexists(path / PEFT_CONFIG):
        if is_mlx(path):
            return read_mlx(path, base, findings)
        return read_peft(path, base, findings, [TORCHTUNE], expert_layout)
    if os.path.lexists(path / DIFFUSERS):
        return read_single_file(path / DIFFUSERS, base, findings)
    weights_name(path)  # a lone pickle is the better reason
    raise FileError("", [_no_adapter(path)])


def _inconsistent(adapter: Adapter, shared: SharedTensors) -> list[Diagnostic]:
    """The sites that cannot be tied or share tensors as recorded, or whose copies differ."""
    differing = rejoined(adapter.sites, {name: dict(roles) for name, roles in adapter.tensors.items()})[1]
    return tie_problems(adapter.sites) or inconsistent_copies(adapter, shared.tensors) + differing


def _no_adapter(path: Path) -> Diagnostic:
    """Why a folder is not an adapter, with a guess at the right one."""
    inside = sorted(p.name for p in path.iterdir() if (p / native.NAME).exists() or (p / PEFT_CONFIG).exists())
    fix = f"an adapter is in its folder {inside[0]!r}" if inside else ""
    if (path / "config.json").exists():
        fix = "this looks like a whole model: load it as the base"
    return Diagnostic("", f"it holds neither {native.NAME} nor {PEFT_CONFIG}", fix)
