"""GGUF: an adapter for llama.cpp's `--lora`, and for Ollama's `ADAPTER`.

    general.type = adapter    adapter.type = lora    adapter.lora.alpha = R, the largest rank
    <tensor>.weight.lora_a [R, in]    <tensor>.weight.lora_b [out, R]    of an embedding lora_a [vocabulary, R]

llama.cpp computes W x + (alpha / R) B A x with the rank R of each tensor. Here the scale is in B, so alpha / R is 1.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.export.gguf_architectures import (
    Architecture,
    architecture_of,
    reorder_rows,
    tensor_names,
)
from lorary.adapters.export.plain_factors import MERGE, plain_factors, site_problems
from lorary.adapters.peft.writer import rope_overrides
from lorary.adapters.tensor_checks import unwritable
from lorary.errors import Diagnostic, FileError, deduplicated, not_a
from lorary.files.atomic import atomic_directory
from lorary.files.gguf_file import missing_package
from lorary.files.safe_open import checked_path
from lorary.files.strict_json import show
from lorary.layers.adapted import unwrapped_modules
from lorary.model.ambient import mode_independent
from lorary.spec.site import Site

if TYPE_CHECKING:
    import numpy as np
    from gguf import TensorNameMap

NAME = "adapter.gguf"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


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
    path = checked_path(folder, "cannot export an adapter:")
    headline = f"cannot export an adapter to {show(path, most=400)} as GGUF"
    problems = not_a(nn.Module, "a torch.nn.Module", model=model) + not_a(Adapter, "an Adapter", adapter=adapter)
    if dtype not in DTYPES:
        problems.append(Diagnostic("dtype", f"is {show(dtype)}; GGUF's adapters take {', '.join(DTYPES)}"))
    _refuse(headline, problems or missing_package())
    root = unwrapped_modules(model)[""]
    architecture = architecture_of(root, headline)
    names = tensor_names(root, architecture, headline)
    factors, problems = plain_factors(adapter, model, "llama.cpp")
    problems += site_problems(adapter, model, lambda site, head: _why_not(site, head, architecture, names))
    _refuse(headline, problems + _rope_problems(adapter))
    alpha = max(A.shape[0] for _, A in factors.values())
    tensors: dict[str, Tensor] = {}
    for site in (a.site for a in adapter.sites if a.site.name in factors):
        B, A = factors[site.name]
        B = reorder_rows(B, site, architecture, root.config) * (A.shape[0] / alpha)
        name = f"{names.get_name(site.name)}.weight"
        tensors |= {f"{name}.lora_a": A.t() if site.kind == "embedding" else A, f"{name}.lora_b": B}
    values = {name: t.to(getattr(torch, dtype)) for name, t in tensors.items()}
    _refuse(headline, unwritable(tensors) or _lost(values, dtype))
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


def _rope_problems(adapter: Adapter) -> list[Diagnostic]:
    rope = rope_overrides(adapter)
    if not rope or rope.get("rope_type") == "linear":
        return []
    what = f"it needs RoPE scaling of type {show(rope.get('rope_type'))}; llama.cpp's is known for `linear` alone"
    return [Diagnostic("context", what, MERGE)]


def _why_not(site: Site, head: bool, architecture: Architecture, names: TensorNameMap) -> str:
    if names.get_name(site.name) is None or site.kind not in ("linear", "transposed", "embedding"):
        return f"llama.cpp's {architecture.name} has no such weight"
    if head and not architecture.head:
        return f"llama.cpp's {architecture.name} is not known to adapt its embedding and its LM head correctly"
    return ""


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
    except OSError as error:
        if error.errno is None:  # NumPy's, of a write that came to an end too early
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        writer.close()
    if path.stat().st_size < sum(
        tensor.nbytes for tensor in tensors.values()
    ):  # NumPy does not see it of small tensors
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _bytes(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The numbers; bfloat16, which NumPy lacks, as `gguf` takes it: bytes, twice as many in a row."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor).numpy()
