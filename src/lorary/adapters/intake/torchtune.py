"""torchtune: its own names of layers, in which it saves adapters of models for which it has no PEFT form.

    adapter_config.json                     r, lora_alpha; for DoRA also use_dora
    layers.0.attn.q_proj.lora_a.weight      (r, in)
    layers.0.attn.q_proj.lora_b.weight      (out, r)          of DoRA layers.0.attn.q_proj.magnitude  (out,)

torchtune rotates neighbouring rows of q and k where Transformers rotates the halves of a head, except in the models
that it rotates as Transformers does (Qwen). So the rows of B, and of the magnitudes, are in another order there. The
PEFT form that torchtune writes for most models has been reordered already: that is read as any PEFT folder.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from lorary.adapters.adapter import Adapter
from lorary.adapters.intake.layers import Layer, Stored, complete, group, read_layers, rows_in_order
from lorary.adapters.peft.config import NAME, PeftConfig
from lorary.adapters.peft.lora import LORA
from lorary.errors import Diagnostic, FileError
from lorary.files.findings import Findings
from lorary.files.strict_json import show
from lorary.files.tensor_file import Header, TensorSource
from lorary.model.base import Base

_LEAVES = {".lora_a.weight": "A", ".lora_b.weight": "B", ".magnitude": "m"}
_LAYER = re.compile(r"layers\.(\d+)\.(?:attn\.(?:[qkv]|output)_proj|mlp\.w[123])")
_HEAD = "output"
_LEAF_HERE = {
    **{f"attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkv"},
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_REORDERED = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False, "qwen3": False}


class Torchtune:
    """The files with torchtune's own names."""

    title = "torchtune"

    def recognises(self, header: Header) -> bool:
        ends = tuple(leaf for leaf in _LEAVES if leaf != ".magnitude")
        return any(name.endswith(ends) and _LAYER.match(name) for name in header.tensors)

    def read(self, file: TensorSource, base: Base | None, config: PeftConfig | None, findings: Findings) -> Adapter:
        if config is None:
            what = f"has torchtune's names, and no {NAME} is beside it: the file does not say alpha"
            said = '{"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": []}'
            fix = f"write {said} into {NAME} beside it"
            findings.fatal.append(Diagnostic(file.name, what, fix))
        model = getattr(getattr(base and base.model, "config", None), "model_type", None)
        if base is None:
            what = "has torchtune's names: only the model tells its heads, whose rows have another order there"
            findings.fatal.append(Diagnostic(file.name, what, "read it onto its base: lorary.load(model, folder)"))
        elif model not in _REORDERED:
            known = ", ".join(_REORDERED)
            what = f"has torchtune's names, which lorary knows of {known}; the model is of {show(model)}"
            findings.fatal.append(Diagnostic(file.name, what))
        findings.raise_refused()
        assert base is not None
        assert config is not None
        layers = []
        for path, roles in complete(group(file.header.tensors, _LEAVES), _LEAVES, findings):
            with findings.gathering():
                layers.append(_layer(path, roles, base, config))
        name = config["base_model_name_or_path"]
        return read_layers(file, layers, base, findings, base_name=name)


def _layer(path: str, roles: Any, base: Base, config: PeftConfig) -> Layer:
    here = path_here(path)
    stored = {role: Stored(name) for role, name in roles.items() if role != "m" or config["use_dora"]}
    heads = _heads(here, base.model.config)
    if heads and here in base.kinds:
        rows = base.site(here).out_features
        if rows % (2 * heads):
            what = f"has {rows:,} rows, and the model's configuration says {heads} heads of an even width"
            raise FileError("", [Diagnostic(here, what)])
        view = rows_in_order(halves_of_pairs(rows, heads))
        stored |= {role: Stored(one.name, view) for role, one in stored.items() if role != "A"}
    return Layer(here, LORA.to_method(config, here), stored)


def path_here(path: str) -> str:
    """Transformers' path of a layer of torchtune; the path itself if it is of another sort.

    >>> path_here("layers.3.attn.output_proj")
    'model.layers.3.self_attn.o_proj'
    """
    if path == _HEAD:
        return "lm_head"
    match = _LAYER.fullmatch(path)
    return path if match is None else f"model.layers.{match[1]}.{_LEAF_HERE[path.split('.', 2)[2]]}"


def _heads(path: str, config: Any) -> int:
    """The number of heads whose rows torchtune reorders at a layer; 0 elsewhere."""
    leaf = path.rpartition(".")[2]
    if not _REORDERED[config.model_type] or leaf not in ("q_proj", "k_proj"):
        return 0
    every: int = config.num_attention_heads
    return (getattr(config, "num_key_value_heads", None) or every) if leaf == "k_proj" else every


def halves_of_pairs(rows: int, heads: int) -> Tensor:
    """For each row as Transformers has it, its place where the two rows that are rotated together are neighbours."""
    return torch.arange(rows).reshape(heads, -1, 2).transpose(1, 2).flatten()


TORCHTUNE = Torchtune()
