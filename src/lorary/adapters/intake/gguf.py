"""llama.cpp: an adapter as one GGUF file, as its `convert_lora_to_gguf.py` and `lorary export --to gguf` write it.

    general.type = adapter    adapter.type = lora    adapter.lora.alpha    general.architecture, of the base
    <tensor>.weight.lora_a [r, in]    <tensor>.weight.lora_b [out, r]    of an embedding lora_a [vocabulary, r]

llama.cpp computes W x + alpha / r B A x with the rank r of each tensor. Its names and the order of the rows of q and k
are those of the base's conversion, so that only the base tells the layers.
"""

from __future__ import annotations

from typing import Any

from lorary.adapters.adapter import Adapter
from lorary.adapters.export.gguf_architectures import (
    Architecture,
    architecture_of,
    order_of_rows,
    tensor_names,
)
from lorary.adapters.intake.layers import (
    TRANSPOSED,
    Layer,
    Stored,
    complete,
    group,
    plain_method,
    read_layers,
    rows_in_order,
)
from lorary.adapters.peft.fields import ALPHA
from lorary.errors import Diagnostic
from lorary.files.findings import Findings
from lorary.files.gguf_file import GGUFFile
from lorary.files.strict_json import named, show
from lorary.model.base import Base

_LEAVES = {".weight.lora_a": "A", ".weight.lora_b": "B"}
_ALPHA, _TOKENS = "adapter.lora.alpha", "adapter.alora.invocation_tokens"
_EXPECTED = {"general.type": "adapter", "adapter.type": "lora"}


def read_gguf(file: GGUFFile, base: Base | None, findings: Findings) -> Adapter:
    """The adapter in a GGUF file.

    Args:
        file: the open file.
        base: the base; its names and configuration suffice.
        findings: collects the problems, and raises them.

    Raises:
        FileError: every reason why it cannot be used.
    """
    findings.fatal += _value_problems(file)
    if base is None:
        what = "has llama.cpp's names: only the model tells which layers they are, and the order of their rows"
        fix = "read it onto its base: lorary.load(model, file), or lorary convert FILE OUT --base MODEL"
        findings.fatal.append(Diagnostic(file.name, what, fix))
    findings.raise_refused()
    assert base is not None
    architecture = architecture_of(base.model, "")
    if (said := file.values.get("general.architecture")) != architecture.name:
        what = f"is for llama.cpp's {show(said)}; the model is of {show(architecture.name)} there"
        findings.fatal.append(Diagnostic("general.architecture", what))
    here = _paths(base, architecture)
    layers = []
    for path, roles in complete(group(file.header.tensors, _LEAVES), _LEAVES, findings):
        if path not in here:
            findings.fatal.append(Diagnostic(named(path), "adapts a tensor that the model does not have in llama.cpp"))
        elif file.header.tensors[roles["B"]].shape[1:]:
            layers.append(_layer(here[path], roles, file, base, architecture))
        else:
            findings.fatal.append(Diagnostic(named(roles["B"]), "is not a matrix"))
    reduced = sorted({e.dtype for e in file.header.tensors.values()} - {"F32", "F16", "BF16"})
    if reduced:
        findings.notes.append(f"its tensors are quantised as {', '.join(reduced)}, and read as llama.cpp computes")
    name = file.values.get("general.base_model.0.name")
    return read_layers(file, layers, base, findings, base_name=name if isinstance(name, str) else "")


def _paths(base: Base, architecture: Architecture) -> dict[str, str]:
    """llama.cpp's name of a tensor, without `.weight` -> the layer."""
    names = tensor_names(base.model, architecture, "")
    return {name: path for path in base.kinds if path and (name := names.get_name(path)) is not None}


def _layer(path: str, roles: Any, file: GGUFFile, base: Base, architecture: Architecture) -> Layer:
    site, rank = base.site(path), file.header.tensors[roles["B"]].shape[1]
    order = order_of_rows(site, architecture, base.model.config)
    stored = {
        "A": Stored(roles["A"], TRANSPOSED) if site.kind == "embedding" else Stored(roles["A"]),
        "B": Stored(roles["B"]) if order is None else Stored(roles["B"], rows_in_order(order)),
    }
    rank = max(rank, 1)  # one of 0 is refused by its shape
    alpha = float(file.values[_ALPHA]) or float(rank)  # llama.cpp takes 0 as no scale
    return Layer(path, plain_method(rank, alpha), stored)


def _value_problems(file: GGUFFile) -> list[Diagnostic]:
    """Why the metadata do not describe a LoRA that can be computed."""
    found = [
        Diagnostic(key, f"is {show(file.values.get(key))}, expected {show(expected)}")
        for key, expected in _EXPECTED.items()
        if file.values.get(key) != expected
    ]
    if found:  # a whole model
        return found
    alpha = file.values.get(_ALPHA)
    if alpha != 0 and not ALPHA["check"](alpha):
        found.append(Diagnostic(_ALPHA, f"is {show(alpha)}; it takes {ALPHA['expects']}"))
    if file.values.get(_TOKENS):
        found.append(Diagnostic(_TOKENS, "is there: adapters that start at a token (aLoRA) are not read from GGUF"))
    return found
