"""diffusers: `pytorch_lora_weights.safetensors`, for the models of a pipeline, each under its name there.

    <model>.<path>.lora_A.weight     or  <path>.lora.down.weight   or  <path>.processor.to_q_lora.down.weight
    <model>.<path>.lora_B.weight     or  <path>.lora.up.weight     or  <path>.processor.to_q_lora.up.weight
    <model>.<path>.alpha             of DoRA <path>.lora_magnitude_vector

The first column is PEFT's own form, and the others those of older releases. Recent ones have the fields of PEFT's
configuration in the file's metadata; without them, and without an alpha, the scale is 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorary.adapters.adapter import Adapter
from lorary.adapters.intake import lycoris
from lorary.adapters.intake.diffusion import explain, model_of, refuse_other_methods, scaled_layers
from lorary.adapters.intake.layers import Layer, Stored, complete, read_layers
from lorary.adapters.peft.config import NAME, PeftConfig, read_config
from lorary.adapters.peft.lora import LORA
from lorary.errors import Diagnostic, FileError
from lorary.files import strict_json
from lorary.files.findings import Findings
from lorary.files.strict_json import named
from lorary.files.tensor_file import MOST_METADATA, Header, TensorSource
from lorary.model.base import Base

_METADATA = "lora_adapter_metadata"
_WHERE = f"__metadata__: {_METADATA}"
_MODELS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
_LEAVES = {
    **{f".{leaf}": role for leaf, role in LORA.leaves.items() if "embedding" not in leaf},
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    ".lora_magnitude_vector.weight": "m",
    ".lora_magnitude_vector": "m",
    ".alpha": "alpha",
    ".dora_scale": "m",
    **lycoris.LEAVES,
}
_PROCESSOR = re.compile(r"(?:\.processor)?\.to_(q|k|v|out)_lora(?:\.(down|up)\.weight|\.(alpha)|(?=\.))")
_OLD = re.compile(r"_lora\.(?:down|up)\.|\.lora(?:_linear_layer)?\.(?:down|up)\.")
_TEXT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_IMAGE = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


class Diffusers:
    """The files of diffusers' pipelines and models."""

    title = "diffusers"

    def recognises(self, header: Header) -> bool:
        if _METADATA in header.metadata:
            return True
        # PEFT's own names, without the name of a model, say nothing of the scale
        return any(split(name)[1] and (_model(name) or _OLD.search(name)) for name in header.tensors)

    def read(self, file: TensorSource, base: Base | None, config: PeftConfig | None, findings: Findings) -> Adapter:
        refuse_other_methods(file.header.tensors, findings)
        parts: dict[str, dict[str, dict[str, str]]] = {}
        for name in file.header.tensors:
            model = _model(name)
            path, role = split(name.removeprefix(f"{model}.") if model else name)
            if role:
                parts.setdefault(model, {}).setdefault(path, {})[role] = name
        fitting = {m: [p for p in paths if base is None or p in base.modules] for m, paths in parts.items()}
        part = model_of(parts, fitting, base, findings) if parts else ""
        plain, products = lycoris.apart(parts.get(part, {}), findings)
        grouped = dict(complete(plain, _LEAVES, findings))
        said = _config(file.header.metadata, part, findings)
        alphas = {roles["alpha"] for roles in (grouped | products).values() if "alpha" in roles}
        if said is not None and alphas:
            what = "is there, and so are a rank and an alpha for each layer in the metadata: one of them is stale"
            findings.fatal += [Diagnostic(named(name), what) for name in sorted(alphas)]
        findings.raise_refused()
        layers = (
            scaled_layers(grouped, {path: path for path in grouped}, file, findings)
            if said is None
            else [_layer(path, roles, said) for path, roles in grouped.items()]
        )
        layers += lycoris.layers(products, {path: path for path in products}, file, base, findings)
        others = {n for m, paths in parts.items() if m != part for roles in paths.values() for n in roles.values()}
        return read_layers(file, layers, base, findings, explain, known=alphas | others)


def split(name: str) -> tuple[str, str]:
    """The layer and the role in a tensor's name without its model; no role in a name of another sort.

    >>> split("mid_block.attn1.processor.to_out_lora.up.weight")
    ('mid_block.attn1.to_out.0', 'B')
    """
    if match := _PROCESSOR.search(name):
        path, (which, side, alpha) = name[: match.start()], match.groups()
        names = _TEXT if path.endswith("self_attn") else _IMAGE
        layer = f"{path}.{names[which]}"
        if side or alpha:
            return layer, {"down": "A", "up": "B"}.get(side, "alpha")
        name = layer + name[match.end() :]
    leaf = next((leaf for leaf in _LEAVES if name.endswith(leaf)), None)
    return (name, "") if leaf is None else (name.removesuffix(leaf), _LEAVES[leaf])


def _model(name: str) -> str:
    first = name.partition(".")[0]
    return first if first in _MODELS else ""


def _config(metadata: Mapping[str, str], model: str, findings: Findings) -> PeftConfig | None:
    """PEFT's configuration of one model in a file's metadata, if there is one."""
    if _METADATA not in metadata:
        return None
    try:
        said: Any = strict_json.parse(metadata[_METADATA].encode(), MOST_METADATA)
    except ValueError as error:
        raise FileError("", [Diagnostic(_WHERE, str(error))]) from None
    if not isinstance(said, dict):
        raise FileError("", [Diagnostic(_WHERE, "is not a JSON object")])
    prefix = f"{model}." if model else ""
    fields = {key.removeprefix(prefix): value for key, value in said.items() if key.startswith(prefix)}
    if not fields:
        return None
    own = Findings(findings.subject, findings.strict)
    config = read_config({"peft_type": LORA.name} | fields, {LORA.name: LORA.fields}, own)
    for found, kept in ((own.fatal, findings.fatal), (own.tolerable, findings.tolerable)):
        kept += [replace(p, where=p.where.replace(NAME, _WHERE)) for p in found]
    return config


def _layer(path: str, roles: Mapping[str, str], config: PeftConfig) -> Layer:
    method = LORA.to_method(config, path)
    needed = {role: name for role, name in roles.items() if role in ("A", "B", *(("m",) if config["use_dora"] else ()))}
    return Layer(path, method, {role: Stored(name) for role, name in needed.items()})


DIFFUSERS = Diffusers()
