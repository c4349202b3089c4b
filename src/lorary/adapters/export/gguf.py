"""GGUF: an adapter for llama.cpp's `--lora`, and for Ollama's `ADAPTER`.

    general.type = adapter    adapter.type = lora    adapter.lora.alpha = R, the largest rank
    <tensor>.weight.lora_a [R, in]    <tensor>.weight.lora_b [out, R]    of an embedding lora_a [vocabulary, R]

llama.cpp computes W x + (alpha / R) B A x with the rank R of each tensor. Here the scale is in B, so alpha / R is 1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.export.gguf_architectures import ARCHITECTURES, Architecture, reorder_rows
from lorary.adapters.export.plain import MERGE, is_head, plain_factors, tied_head
from lorary.adapters.peft.writer import rope_overrides
from lorary.adapters.tensor_checks import unusable_values
from lorary.errors import Diagnostic, FileError, deduplicated, not_a
from lorary.files.atomic import atomic_directory
from lorary.files.safe_open import checked_path
from lorary.files.strict_json import show
from lorary.layers.adapted import unwrapped_modules
from lorary.model.ambient import mode_independent
from lorary.model.checks import layer_mismatches
from lorary.model.fingerprint import Fingerprint
from lorary.spec.site import Site

if TYPE_CHECKING:
    import numpy as np

NAME = "adapter.gguf"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_PROGRAM = "llama.cpp"


@mode_independent
def export_gguf(
    adapter: Adapter,
    folder: str | os.PathLike[str],
    *,
    model: nn.Module,
    dtype: str = "float32",
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter of any method as `adapter.gguf`, for llama.cpp: the two factors of its update, scale in B.

    Args:
        adapter: the adapter.
        folder: a new folder, or one whose `adapter.gguf` is to be replaced.
        model: the base. Its names, sizes and configuration suffice, so that it may be on the meta device, unless the
            method needs its weights.
        dtype: of the factors: `float32`, `float16` or `bfloat16`.
        texts: the text files to write beside it, by name.

    Raises:
        FileError: llama.cpp cannot run this adapter, with every reason; the package `gguf` is missing; or the folder
            cannot be written.
    """
    headline = f"cannot export an adapter to {show(checked_path(folder, 'cannot export an adapter:'), most=400)} as GGUF"
    problems = not_a(nn.Module, "a torch.nn.Module", model=model)
    if dtype not in DTYPES:
        problems.append(Diagnostic("dtype", f"is {show(dtype)}; GGUF's adapters take {', '.join(DTYPES)}"))
    _refuse(headline, problems or _missing_package())
    root = unwrapped_modules(model)[""]
    config: Any = getattr(root, "config", None)
    architecture = ARCHITECTURES.get(getattr(config, "model_type", ""))
    if architecture is None:
        known = f"lorary knows it of {', '.join(ARCHITECTURES)}"
        what = f"llama.cpp's form of {show(getattr(config, 'model_type', type(root).__name__))} is not known; {known}"
        _refuse(headline, [Diagnostic("base", what, f"{MERGE}, and convert that with llama.cpp's convert_hf_to_gguf.py")])
    factors, problems = plain_factors(adapter, model, _PROGRAM)
    problems += adapter.base.disagreements(Fingerprint.of(model)) + _rope_problems(adapter)
    names, unnamed = _tensor_names(adapter, root, architecture)
    _refuse(headline, problems + unnamed)
    sites = {a.site.name: a.site for a in adapter.sites}
    alpha = max(A.shape[0] for _, A in factors.values())
    tensors: dict[str, Tensor] = {}
    for name, (B, A) in factors.items():
        B = reorder_rows(B, sites[name], architecture, config) * (A.shape[0] / alpha)
        tensors[f"{names[name]}.lora_a"] = A.t() if sites[name].kind == "embedding" else A
        tensors[f"{names[name]}.lora_b"] = B
    values = {name: t.to(getattr(torch, dtype)) for name, t in tensors.items()}
    _refuse(headline, unusable_values(tensors) or _lost(values, dtype))
    needed = sum(t.nbytes for t in values.values())
    with atomic_directory(folder, replace=True, keep=True, drop=texts or (), needed=needed) as temporary:
        _write(temporary / NAME, architecture, alpha, values, adapter.base.name)
        for file, text in (texts or {}).items():
            (temporary / file).write_text(text, encoding="utf-8")


def rope_arguments(adapter: Adapter) -> list[str]:
    """The arguments with which llama.cpp has to load the base of an adapter with linear RoPE scaling (LongLoRA)."""
    rope = rope_overrides(adapter)
    return ["--rope-scaling", "linear", "--rope-scale", f"{rope['factor']:g}"] if rope else []


def _refuse(headline: str, problems: list[Diagnostic]) -> None:
    if problems:
        raise FileError(headline, deduplicated(problems))


def _missing_package() -> list[Diagnostic]:
    try:
        import gguf  # noqa: F401
    except ImportError:
        return [Diagnostic("", "the package `gguf` is not installed", "pip install 'lorary[gguf]'")]
    return []


def _rope_problems(adapter: Adapter) -> list[Diagnostic]:
    rope = rope_overrides(adapter)
    if not rope or rope.get("rope_type") == "linear":
        return []
    what = f"it needs RoPE scaling of type {show(rope.get('rope_type'))}; llama.cpp's is known for `linear` alone"
    return [Diagnostic("context", what, MERGE)]


def _tensor_names(
    adapter: Adapter, model: Any, architecture: Architecture
) -> tuple[dict[str, str], list[Diagnostic]]:
    """(site -> its tensor in the base's GGUF, why some have none)."""
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    modules, names, problems = unwrapped_modules(model), {}, []
    for adapted in adapter.sites:
        site = adapted.site
        found = known.get_name(site.name)
        wrong = layer_mismatches(site, modules.get(site.name))
        if not wrong and (found is None or site.kind not in ("linear", "transposed", "embedding")):
            wrong = [Diagnostic(site.name, f"llama.cpp's {architecture.name} has no such weight", MERGE)]
        if not wrong and is_head(site, model) and not architecture.head:
            what = f"llama.cpp's {architecture.name} is not known to adapt its embedding and its LM head rightly"
            wrong = [Diagnostic(site.name, what, MERGE)]
        if not wrong and (what := tied_head(site, model)):
            wrong = [Diagnostic(site.name, what, MERGE)]
        names[site.name] = f"{found}.weight"
        problems += wrong
    return names, problems


def _lost(values: Mapping[str, Tensor], dtype: str) -> list[Diagnostic]:
    what = f"holds numbers beyond the range of {dtype}"
    return [
        Diagnostic(name, what, "export in float32") for name, t in values.items() if not bool(torch.isfinite(t).all())
    ]


def _write(path: Path, architecture: Architecture, alpha: int, tensors: Mapping[str, Tensor], base: str) -> None:
    """Write the file: the keys and tensors that llama.cpp's own `convert_lora_to_gguf.py` writes."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
    for name, tensor in tensors.items():
        form = gguf.GGMLQuantizationType[DTYPES[str(tensor.dtype).removeprefix("torch.")]]
        writer.add_tensor(name, _bytes(tensor), raw_dtype=form)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _bytes(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The numbers; bfloat16, which NumPy lacks, as `gguf` takes it: bytes, twice as many in a row."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor).numpy()
