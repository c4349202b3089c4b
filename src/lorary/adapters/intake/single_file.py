"""Adapters that are one file: which tool's it is, and its adapter."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lorary.adapters.adapter import Adapter
from lorary.adapters.intake.diffusers import DIFFUSERS
from lorary.adapters.intake.format import Format
from lorary.adapters.intake.gguf import read_gguf
from lorary.adapters.intake.kohya import KOHYA
from lorary.adapters.intake.lycoris import LEAVES
from lorary.adapters.intake.torchtune import TORCHTUNE
from lorary.adapters.peft import keys
from lorary.adapters.peft.config import NAME
from lorary.adapters.peft.lora import LORA
from lorary.errors import Diagnostic, FileError
from lorary.files.findings import Findings
from lorary.files.gguf_file import GGUFFile
from lorary.files.strict_json import named
from lorary.files.tensor_file import Header, TensorFile
from lorary.model.base import Base

FORMATS: tuple[Format, ...] = (KOHYA, TORCHTUNE, DIFFUSERS)
GGUF = ".gguf"


def read_single_file(path: Path, base: Base | None, findings: Findings) -> Adapter:
    """The adapter in a file.

    Args:
        path: the file, its folder resolved.
        base: the base, if at hand.
        findings: collects the problems, and raises them.

    Raises:
        FileError: every reason why it cannot be used.
    """
    if path.suffix.lower() == GGUF:
        findings.notes.append("read from a file of llama.cpp")
        with GGUFFile(path.parent, path.name) as gguf:
            return read_gguf(gguf, base, findings)
    with TensorFile(path.parent, path.name) as file:
        form = next((form for form in FORMATS if form.recognises(file.header)), None)
        if form is None:
            raise FileError("", [_unknown(path.name, file.header)])
        findings.notes.append(f"read from a file of {form.title}")
        return form.read(file, base, None, findings)


def only_the_base_explains(path: Path) -> bool:
    """Whether the names or shapes in a file say nothing without the model."""
    if path.suffix.lower() == GGUF:
        return True
    with suppress(FileError), TensorFile(path.parent.resolve(), path.name) as file:  # its reader explains why not
        products = any(name.endswith(tuple(LEAVES)) for name in file.header.tensors)
        return products or any(form.recognises(file.header) for form in (KOHYA, TORCHTUNE))
    return False


def _unknown(name: str, header: Header) -> Diagnostic:
    """Why a file belongs to no tool."""
    if any(keys.site_of(keys.short(tensor), LORA.leaves) for tensor in header.tensors):
        what = f"has PEFT's names, and no {NAME} is beside it: a scale and a rank for each layer are missing"
        return Diagnostic(name, what, f"put the {NAME} of its training beside it")
    if any(tensor.endswith((".lora_a", ".lora_b")) for tensor in header.tensors):
        what = f"has mlx-lm's names, and no {NAME} is beside it: the scale is missing"
        return Diagnostic(name, what, f"put the {NAME} of its training beside it, and name the folder")
    first = next(iter(header.tensors), None)
    if first is None:
        return Diagnostic(name, "holds no tensors")
    tools = ", ".join(form.title for form in FORMATS)
    return Diagnostic(name, f"is of no known tool ({tools}): its first tensor is {named(first)}")
