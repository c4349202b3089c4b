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

from torch import Tensor

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import NAME
from lorary.adapters.peft.fields import ALPHA, PROBABILITY, RANK
from lorary.adapters.peft.reader import MOST_JSON
from lorary.adapters.peft.reader import WEIGHTS as PEFT_WEIGHTS
from lorary.adapters.tensor_checks import Layout, alert_if_zero, expected_tensors, read_tensors, site_tensors
from lorary.errors import Diagnostic, FileError, nearest
from lorary.files.findings import Findings
from lorary.files.safe_open import read_json
from lorary.files.strict_json import named, show
from lorary.files.tensor_file import TensorFile
from lorary.methods.dora import MagnitudeDirection
from lorary.methods.lora import Add, ConstantScale, Kaiming, LowRank
from lorary.model.base import Base
from lorary.model.fingerprint import Fingerprint, base_name
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Site

WEIGHTS = "adapters.safetensors"
_JOINS = {"lora": Add(), "dora": MagnitudeDirection()}
_RULES = {"rank": RANK, "scale": ALPHA, "dropout": PROBABILITY}
_LEAVES = {"A": "lora_a", "B": "lora_b", "m": "m"}


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
    with TensorFile(folder, WEIGHTS) as file:
        found = {name: entry.shape for name, entry in file.header.tensors.items()}
        sites = tuple(AdaptedSite(s, method) for s in _sites(found, base, method, findings))
        findings.raise_refused()
        expected, vital = expected_tensors(sites, _layout, {})
        names = {name: name for name in found}
        explain = "is not a tensor of this adapter"
        values = read_tensors(file, names, expected, findings, lambda name: explain, vital | set(expected), ())
    tensors = site_tensors(sites, values, expected, _decode, {}, findings)
    alert_if_zero(sites, tensors, findings)
    name = config.get("model")
    fingerprint = Fingerprint(name=base_name(name) if isinstance(name, str) else "")
    findings.notes.append("read from mlx-lm's files")
    return Adapter(method, sites, tensors, {}, fingerprint, findings.conclude())


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


def _sites(found: Mapping[str, tuple[int, ...]], base: Base | None, method: Method, findings: Findings) -> list[Site]:
    """The sites in the names of the tensors; every other name becomes a finding later."""
    sites = []
    for name in dict.fromkeys(n.rpartition(".")[0] for n in found if n.endswith((".lora_a", ".lora_b"))):
        a, b = (found.get(f"{name}.{_LEAVES[role]}", ()) for role in ("A", "B"))
        if len(a) == 3 or len(b) == 3:
            findings.fatal.append(Diagnostic(name, "adapts fused experts, which is not supported"))
        elif base is None and len(a) == len(b) == 2:
            sites.append(Site(name, "linear", b[1], a[0], bias=False))
        elif base is None:
            findings.fatal.append(Diagnostic(name, f"has factors of the shapes {list(a)} and {list(b)}"))
        elif name not in base.kinds:
            near = nearest(name, base.kinds, most=1)
            fix = f"it has {named(near[0])}" if near else ""
            findings.fatal.append(Diagnostic(name, "adapts a layer that the model does not have", fix))
        elif base.kinds[name] == "embedding" and isinstance(method.join, MagnitudeDirection):
            findings.fatal.append(Diagnostic(name, "mlx-lm's DoRA of an embedding has a magnitude for each token"))
        else:
            sites.append(base.site(name))
    if not sites and not findings.fatal:
        findings.fatal.append(Diagnostic(WEIGHTS, "holds no factors of any layer"))
    return sites


def _layout(adapted: AdaptedSite) -> Layout:
    """role -> (name, shape) of a site's tensors, the factors transposed."""
    return {role: (f"{adapted.site.name}.{_LEAVES[role]}", shape[::-1]) for role, shape in adapted.shapes.items()}


def _decode(adapted: AdaptedSite, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {role: tensors[name].t().contiguous() for role, (name, _) in _layout(adapted).items()}
