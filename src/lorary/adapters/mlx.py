"""The reader of mlx-lm's adapter folders: LoRA, and DoRA of linear layers.

    adapter_config.json     fine_tune_type, and lora_parameters: rank, scale, dropout
    adapters.safetensors    <site>.lora_a  (in, r)      <site>.lora_b  (r, out)      of DoRA <site>.m  (out,)

y = W x + b + scale (x a) b, so A is the transpose of a, B that of b, and s the scale; an embedding's in is its
vocabulary. mlx-lm adapts the layers that have tensors, so the tensors alone tell the sites.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorary.adapters.adapter import Adapter
from lorary.adapters.intake.layers import PLAIN, TRANSPOSED, Layer, Stored, complete, group, read_layers
from lorary.adapters.peft.config import NAME
from lorary.adapters.peft.fields import ALPHA, PROBABILITY, RANK
from lorary.adapters.peft.reader import MOST_JSON
from lorary.adapters.peft.reader import WEIGHTS as PEFT_WEIGHTS
from lorary.errors import Diagnostic, FileError
from lorary.files.findings import Findings
from lorary.files.safe_open import read_json
from lorary.files.strict_json import show
from lorary.files.tensor_file import TensorFile
from lorary.methods.dora import MagnitudeDirection
from lorary.methods.lora import Add, ConstantScale, Kaiming, LowRank
from lorary.model.base import Base
from lorary.model.fingerprint import base_name
from lorary.spec.method import Method

WEIGHTS = "adapters.safetensors"
_JOINS = {"lora": Add(), "dora": MagnitudeDirection()}
_RULES = {"rank": RANK, "scale": ALPHA, "dropout": PROBABILITY}
_LEAVES = {".lora_a": "A", ".lora_b": "B", ".m": "m"}
_VIEWS = {"A": TRANSPOSED, "B": TRANSPOSED, "m": PLAIN}


def is_mlx(folder: Path) -> bool:
    """Whether a folder with an `adapter_config.json` is mlx-lm's."""
    return os.path.lexists(folder / WEIGHTS) and not os.path.lexists(folder / PEFT_WEIGHTS)


def read_mlx(folder: Path, base: Base | None, findings: Findings) -> Adapter:
    """The adapter that mlx-lm saved in `folder`.

    Args:
        folder: a resolved folder.
        base: the base, if at hand: the tensors do not tell an embedding or GPT-2's Conv1D from a linear layer.
        findings: collects the problems, and raises them.

    Raises:
        FileError: every reason why it cannot be used.
    """
    config = read_json(folder, NAME, MOST_JSON)
    if not isinstance(config, dict):
        raise FileError("", [Diagnostic(NAME, "is not a JSON object")])
    method = _method(config)
    dora = isinstance(method.join, MagnitudeDirection)
    findings.notes.append("read from mlx-lm's files")
    with TensorFile(folder, WEIGHTS) as file:
        layers = []
        for path, roles in complete(group(file.header.tensors, _LEAVES), _LEAVES, findings):
            if dora and base is not None and base.kinds.get(path) == "embedding":
                findings.fatal.append(Diagnostic(path, "mlx-lm's DoRA of an embedding has a magnitude for each token"))
            if dora and "m" not in roles:
                findings.fatal.append(Diagnostic(f"{path}.m", "is missing"))
                continue
            needed = {role: name for role, name in roles.items() if dora or role != "m"}
            layers.append(Layer(path, method, {r: Stored(name, _VIEWS[r]) for r, name in needed.items()}))
        name = config.get("model")
        return read_layers(file, layers, base, findings, base_name=base_name(name) if isinstance(name, str) else "")


def _method(config: Mapping[str, Any]) -> Method:
    kind, parameters = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    problems = []
    if not (isinstance(kind, str) and kind in _JOINS):
        what = f"is {show(kind)}; lorary reads {' and '.join(_JOINS)}"
        problems.append(Diagnostic(f"{NAME}: fine_tune_type", what))
    if not isinstance(parameters, dict):
        raise FileError("", [*problems, Diagnostic(f"{NAME}: lora_parameters", f"is {show(parameters)}")])
    values = {"dropout": 0.0, **parameters}
    problems += [
        Diagnostic(f"{NAME}: lora_parameters: {key}", f"is {show(values.get(key))}; it takes {rule['expects']}")
        for key, rule in _RULES.items()
        if not rule["check"](values.get(key))
    ]
    if "alpha" in values:  # s = scale * alpha / rank in early releases, and scale in later ones, which ignore it
        what = "is there: early releases of mlx-lm multiply the scale by alpha / rank, later ones do not"
        problems.append(Diagnostic(f"{NAME}: lora_parameters: alpha", what, "remove it, with `scale` as it was meant"))
    if problems:
        raise FileError("", problems)
    return Method(
        LowRank(values["rank"]),
        Kaiming(),
        ConstantScale(float(values["scale"])),
        _JOINS[kind],
        dropout=float(values["dropout"]),
    )
