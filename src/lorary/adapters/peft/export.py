"""Export: an adapter of any method as a plain PEFT LoRA or DoRA."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from lorary.adapters import native
from lorary.adapters.adapter import Adapter, without_empty_sites
from lorary.adapters.low_rank_form import LowRankForm, factors_on_base, low_rank_forms
from lorary.adapters.peft import keys, writer
from lorary.adapters.peft.attention import attention_of, with_equal_ranks
from lorary.adapters.peft.config import NAME, config_text
from lorary.adapters.peft.factors import encode_factors
from lorary.adapters.peft.folded import folded_form
from lorary.adapters.peft.joins import is_dora
from lorary.adapters.peft.lora import LORA, lora_fields, with_rows_as_lora
from lorary.adapters.peft.reader import WEIGHTS
from lorary.adapters.peft.replay import misread_sites
from lorary.adapters.peft.virtual_tokens import has_virtual_tokens, virtual_token_files, virtual_token_problems
from lorary.adapters.readers.peft import misread_export
from lorary.adapters.save_load import ADAPTER_FILES
from lorary.adapters.shared_tensors import collect_shared
from lorary.adapters.tensor_checks import unwritable
from lorary.errors import Diagnostic, FileError, caller_stacklevel
from lorary.files.atomic import atomic_directory
from lorary.files.findings import AdapterWarning
from lorary.files.safe_open import checked_path
from lorary.files.strict_json import show
from lorary.files.tensor_file import write_tensors
from lorary.layers.adapted import base_parameters
from lorary.layers.rope import PositionsWarning
from lorary.model.ambient import mode_independent
from lorary.spec.interfaces import all_in_join, has_rank
from lorary.spec.join import not_mergeable
from lorary.spec.placement import replaces_rows
from lorary.spec.site import PROJECTIONS

_ABSORBED = ".kv_b_proj"  # of multi-head latent attention (DeepSeek)
SERVE = "serve.sh"  # beside the files of an export for an engine


class LoraFiles(NamedTuple):
    """PEFT's two files, before they are written.

    Args:
        config: the contents of `adapter_config.json`.
        tensors: those of `adapter_model.safetensors`.
        scales: site -> its scale, for the comparison with what PEFT reads.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    scales: dict[str, float]


@mode_independent
def export_peft(
    adapter: Adapter, folder: str | os.PathLike[str], *, model: nn.Module | None = None, folded: bool = False
) -> None:
    """Write an adapter as a plain PEFT LoRA with the same function, whatever method trained it.

    LoRA and DoRA keep their tensors. Every other method is written as the two factors of its update of the unmodified
    base, with the scale in B, and with DoRA's magnitudes if it has them. A method that adds no B A is written as what
    it is, if PEFT has it too (HiRA, (IA)³, a prefix, a prompt).

    PEFT's files cannot hold RoPE scaling: for an adapter that needs it (LongLoRA), `BASE.md` beside them explains how
    to load the base, and a warning says so.

    Args:
        adapter: the adapter.
        folder: a new folder, or one that holds a PEFT adapter to be replaced.
        model: the base, if at hand, as for `save_adapter`; some methods have no such form without it.
        folded: write one rank and one scale for all sites and a list of targets, for readers that ignore `use_rslora`,
            `rank_pattern` and `alpha_pattern`: the same function, with zeros in the tensors.

    Raises:
        FileError: PEFT has no LoRA with this function, or would read the files otherwise, with every reason; or the
            folder cannot be written.
        MethodError: the method has no low-rank form.

    Warns:
        PositionsWarning: the base needs RoPE scaling.
        AdapterWarning: vLLM ignores some of the adapted layers.
    """
    checked_path(folder, "cannot export an adapter:")
    files = _files_without_factors(adapter, folder, model) or lora_files(adapter, folder, model, folded)
    rope = writer.rope_overrides(adapter)
    write_lora(folder, files, {writer.BASE_README: writer.base_text(adapter)} if rope else {}, model)
    if rope:
        what = f"PEFT's files do not say how positions are divided: load the base with rope_parameters {rope}"
        warnings.warn(f"{what}; {writer.BASE_README} there says how", PositionsWarning, stacklevel=caller_stacklevel())
    absorbed = [a.site.name for a in adapter.sites if a.site.name.endswith(_ABSORBED)]
    if absorbed:
        what = f"vLLM folds kv_b_proj into its attention and ignores adapters of it ({len(absorbed)} sites here)"
        warnings.warn(
            f"{what}: to serve this adapter with vLLM, merge it", AdapterWarning, stacklevel=caller_stacklevel()
        )


def lora_files(adapter: Adapter, folder: str | os.PathLike[str], model: nn.Module | None, folded: bool) -> LoraFiles:
    """The LoRA or DoRA that is equivalent to an adapter; the arguments and errors of `export_peft`."""
    shared = collect_shared(adapter)
    exact = writer.exact_type(adapter, model, shared) is LORA
    exact = exact and not (folded and any(map(replaces_rows, adapter.sites)))  # which its readers do not know
    _refuse(folder, [] if exact else not_mergeable((adapted.site.name, adapted.join) for adapted in adapter.sites))
    written = adapter if exact else with_rows_as_lora(adapter)
    _refuse(folder, [*writer.base_incompatibilities(written, model, LORA), *_would_lose(folder)])
    if exact:
        scales = {attention_of(p.site): p.scale for p in adapter.sites if not replaces_rows(p)}
        files = LoraFiles(*writer.exact_files(adapter, model, shared, LORA), scales)
    else:
        files = _as_lora(adapter, model, folder)
    if folded:
        fix = "merge the adapter, and save the model"
        what = "is of nn.MultiheadAttention, which the readers of this form do not know"
        _refuse(folder, [Diagnostic(a.site.name, what, fix) for a in adapter.sites if a.site.kind in PROJECTIONS])
        files = LoraFiles(*folded_form(written, *files))
        # a name of one component in the list of targets may end other paths
        _refuse(folder, misread_sites(without_empty_sites(written), model, LORA, files.config))
    files = files._replace(tensors=files.tensors | _under_tied_names(written, model))
    _refuse(folder, unwritable(files.tensors, [name for name in files.tensors if ".lora_" not in name]))
    return files


def _under_tied_names(adapter: Adapter, model: nn.Module | None) -> dict[str, Tensor]:
    """The base parameters that train in full, under the other names of their tie.

    Transformers' loader unties a pair of which only one is there.
    """
    parameters = dict(base_parameters(model)) if model is not None and adapter.full else {}
    first = {id(parameters[name]): name for name in adapter.full if name in parameters}
    tied = {name: first[id(p)] for name, p in parameters.items() if id(p) in first and name not in adapter.full}
    sites = {adapted.site.name for adapted in adapter.sites}
    return {keys.full(keys.full_name(name, sites)): adapter.full[other].clone() for name, other in tied.items()}


def _files_without_factors(
    adapter: Adapter, folder: str | os.PathLike[str], model: nn.Module | None
) -> LoraFiles | None:
    """PEFT's own files of a method that adds no B A; None for other methods, and for those that PEFT does not have."""
    if has_virtual_tokens(adapter.sites):
        _refuse(folder, [*virtual_token_problems(adapter), *_would_lose(folder)])
        files = LoraFiles(*virtual_token_files(adapter, model), {})
        _refuse(folder, unwritable(files.tensors))
        return files
    if not adapter.sites or any(has_rank(a.delta) and not all_in_join(a.delta) for a in adapter.sites):
        return None
    shared = collect_shared(adapter)
    exact = writer.exact_type(adapter, model, shared)
    if exact is None:
        return None
    _refuse(folder, _would_lose(folder))
    files = LoraFiles(*writer.exact_files(adapter, model, shared, exact), {})
    _refuse(folder, unwritable(files.tensors, adapter.full))
    return files


def _would_lose(folder: str | os.PathLike[str]) -> list[Diagnostic]:
    """Why nothing is exported to a folder that holds an adapter in lorary's own form."""
    if not (Path(folder) / native.NAME).exists():
        return []
    what = f"it holds {native.NAME}: the adapter there would be lost"
    return [Diagnostic("", what, "export to another folder")]


def write_lora(
    folder: str | os.PathLike[str], files: LoraFiles, texts: Mapping[str, str], model: nn.Module | None
) -> None:
    """Write PEFT's two files, and text files beside them by their names, in one step.

    Raises:
        FileError: PEFT would read them otherwise, with every site; or they cannot be written.
    """
    needed = sum(t.nbytes for t in files.tensors.values())
    with atomic_directory(folder, replace=True, keep=True, drop=(*ADAPTER_FILES, SERVE), needed=needed) as temporary:
        (temporary / NAME).write_text(config_text(files.config), encoding="utf-8")
        write_tensors(temporary / WEIGHTS, files.tensors)
        _refuse(folder, misread_export(temporary, files.scales, model))
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")


def _refuse(folder: str | os.PathLike[str], problems: list[Diagnostic]) -> None:
    if problems:
        raise FileError(f"cannot export an adapter to {show(os.fspath(folder), most=400)} for PEFT", problems)


def _as_lora(adapter: Adapter, model: nn.Module | None, folder: str | os.PathLike[str]) -> LoraFiles:
    """The LoRA or DoRA that is equivalent to an adapter of another method, with its scale in B."""
    adapter = without_empty_sites(adapter)
    if not adapter.sites:
        what = "no layer has a direction left, and PEFT's adapters adapt at least one layer"
        _refuse(folder, [Diagnostic("sites", what)])
    forms = low_rank_forms([a for a in adapter.sites if not is_dora(a)], adapter.tensors, model)
    what = "its output has a gain, which PEFT's LoRA does not have"
    problems = [Diagnostic(name, what) for name, form in forms.items() if form.gain is not None]
    bias = any(form.shift is not None for form in forms.values())  # at all sites or at none
    if forms and len(forms) < len(adapter.sites):
        what = "some have DoRA's magnitudes and some not; PEFT's adapters have all or none"
        problems.append(Diagnostic("sites", what))
    _refuse(folder, problems)
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    own = adapter.tensors
    # DoRA's gain follows from the factors and the magnitudes, which PEFT keeps as they are
    factors = {
        name: factors_on_base(adapted, own[name]) if is_dora(adapted) else forms[name][:2]
        for name, adapted in ((adapted.site.name, adapted) for adapted in adapter.sites)
    }
    factors = with_equal_ranks(factors, adapter.sites)
    for adapted in adapter.sites:
        name = adapted.site.name
        B, A = factors[name]
        tensors |= encode_factors(adapted.site, A, B, own[name].get("m"), _shift(forms[name]) if bias else None)
        sizes[attention_of(adapted.site)] = (A.shape[-2], float(A.shape[-2]))
    fields = lora_fields(adapter, sizes, root=False, dora=not forms, bias=bias)
    config = writer.peft_config(with_rows_as_lora(adapter), model, LORA, fields)
    return LoraFiles(config, writer.with_prefix(tensors, adapter, model), dict.fromkeys(sizes, 1.0))


def _shift(form: LowRankForm) -> Tensor:
    """[out] what a form adds to the output beside B A x."""
    return form.B.new_zeros(form.B.shape[0]) if form.shift is None else form.shift
