"""kohya's sd-scripts: one safetensors file for a diffusion model and its text encoders.

    lora_unet_<path>.lora_down.weight  (r, in) or (r, in, *kernel)     lora_te_<path>, lora_te1_<path>, lora_te2_<path>
    lora_unet_<path>.lora_up.weight    (out, r) or (out, r, 1, 1)
    lora_unet_<path>.alpha             ()                              of DoRA <path>.dora_scale  (out, 1)

y = W x + alpha / r up(down(x)). A path has `_` for every `.`, so that only the model tells where its dots were.
LyCORIS writes the same, with the names of LoHa's and LoKr's tensors (`lycoris.py`) and `lycoris_` before the path.
Files for SDXL have the original names of its UNet, `lora_unet_input_blocks_4_1_…`; diffusers' are read as well.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorary.adapters.adapter import Adapter
from lorary.adapters.intake import lycoris
from lorary.adapters.intake.diffusion import explain, model_of, refuse_other_methods, scaled_layers
from lorary.adapters.intake.layers import complete, group, read_layers
from lorary.adapters.intake.sgm import STARTS, original_names
from lorary.adapters.peft.config import PeftConfig
from lorary.errors import Diagnostic, FileError
from lorary.files.findings import Findings
from lorary.files.strict_json import named
from lorary.files.tensor_file import Header, TensorSource
from lorary.model.base import Base

_LEAVES = {".lora_down.weight": "A", ".lora_up.weight": "B", ".alpha": "alpha", ".dora_scale": "m"}
_LEAVES |= lycoris.LEAVES
# The beginning of a name -> the model. The longer ones first.
_MODELS = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lycoris_": "model",
}


class Kohya:
    """The files of sd-scripts and of tools that write as it does."""

    title = "kohya's sd-scripts"

    def recognises(self, header: Header) -> bool:
        return any(name.startswith(tuple(_MODELS)) for name in header.tensors)

    def read(self, file: TensorSource, base: Base | None, config: PeftConfig | None, findings: Findings) -> Adapter:
        names = file.header.tensors
        refuse_other_methods(names, findings)
        if base is None:
            what = "has `_` for every `.` in the paths of layers, so that only the model tells which they are"
            fix = (
                "read it onto its model: lorary.load_adapter(file, model=...), or lorary convert FILE OUT --base MODEL"
            )
            findings.fatal.append(Diagnostic(file.name, what, fix))
            findings.raise_refused()
        assert base is not None
        written = _written(base)
        plain, products = lycoris.apart(group(names, _LEAVES), findings)
        grouped = dict(complete(plain, _LEAVES, findings)) | products
        parts: dict[str, list[str]] = {}
        for layer in grouped:
            parts.setdefault(_model(layer), []).append(layer)
        here = {part: [x for x in layers if _path(x) in written] for part, layers in parts.items()}
        part = model_of(parts, here, base, findings) if parts else ""
        wanted = {layer: grouped[layer] for layer in parts.get(part, ())}
        findings.fatal += [_unknown(layer) for layer in wanted if _path(layer) not in written]
        findings.raise_refused()
        paths = {layer: written[_path(layer)] for layer in wanted}
        findings.fatal += _twice(paths)
        findings.raise_refused()
        if any(_path(layer).startswith(STARTS) for layer in wanted):
            findings.notes.append("the original names of the UNet's blocks (input_blocks) are those of diffusers here")
        layers = scaled_layers({x: r for x, r in wanted.items() if x not in products}, paths, file, findings)
        layers += lycoris.layers({x: r for x, r in wanted.items() if x in products}, paths, file, base, findings)
        used = {roles["alpha"] for roles in grouped.values() if "alpha" in roles}
        others = {n for layer, roles in grouped.items() if layer not in wanted for n in roles.values()}
        return read_layers(file, layers, base, findings, explain, known=used | others)


def _written(base: Base) -> dict[str, str]:
    """A path as such files write it -> the path.

    Raises:
        FileError: two layers have the same.
    """
    found: dict[str, str] = {}
    names = {path: path for path in base.kinds} | original_names(base.kinds)
    for name, path in names.items():
        first = found.setdefault(name.replace(".", "_"), path)
        if first != path:
            what = f"and {path} have the same name in files of sd-scripts"
            raise FileError("", [Diagnostic(first, what)])
    return found


def _prefix(layer: str) -> str:
    return next((prefix for prefix in _MODELS if layer.startswith(prefix)), "")


def _model(layer: str) -> str:
    return _MODELS.get(_prefix(layer), "another model")


def _path(layer: str) -> str:
    return layer.removeprefix(_prefix(layer))


def _twice(paths: Mapping[str, str]) -> list[Diagnostic]:
    """The layers that a file has under both of their names."""
    first: dict[str, str] = {}
    found = {layer: first.setdefault(path, layer) for layer, path in paths.items()}
    return [
        Diagnostic(named(layer), f"is there twice, as {named(other)} too")
        for layer, other in found.items()
        if layer != other
    ]


def _unknown(layer: str) -> Diagnostic:
    what = "adapts a layer that the model does not have"
    if _path(layer).startswith(STARTS):
        return Diagnostic(named(layer), what, "it is an original name of a Stable Diffusion UNet: is it this model's?")
    return Diagnostic(named(layer), what)


KOHYA = Kohya()
