"""The original names of the layers of Stable Diffusion's UNets, SDXL's included, for those of diffusers.

    input_blocks.4.1  down_blocks.1.attentions.0     middle_block.1    mid_block.attentions.0
    input_blocks.3.0  down_blocks.0.downsamplers.0   output_blocks.2.2 up_blocks.0.upsamplers.0

With n resnets in a block of the way down, block i has the original numbers (n + 1) i + 1 to (n + 1) (i + 1), the last
of which is its downsampler; on the way up there are n + 1 resnets, from (n + 1) i on. It is the table in the conversion
scripts of diffusers and sd-scripts (`make_unet_conversion_map`).
"""

from __future__ import annotations

import re
from collections.abc import Collection

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}
_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.(resnets|attentions|(?:down|up)samplers)\.(\d+)\.(.+)")
STARTS = ("input_blocks_", "middle_block_", "output_blocks_")


def original_names(paths: Collection[str]) -> dict[str, str]:
    """Original name -> path, of those layers of a UNet of diffusers that have one."""
    resnets = {path.split(".")[3] for path in paths if path.startswith("down_blocks.0.resnets.")}
    found = {_OUTSIDE[path]: path for path in paths if path in _OUTSIDE}
    for path in paths:
        if (match := _BLOCK.fullmatch(path)) and resnets:
            way, i, mid, kind, j, rest = match.groups()
            rest = _in_resnet(rest) if kind == "resnets" else rest
            if mid:
                where = f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}"
            elif way == "down":
                where = _down(int(i) * (len(resnets) + 1) + 1, kind, int(j), len(resnets))
            else:
                attends = any(other.startswith(f"up_blocks.{i}.attentions.") for other in paths)
                where = _up(int(i) * (len(resnets) + 1), kind, int(j), len(resnets), attends)
            rest = rest.replace("conv", "op", 1) if kind == "downsamplers" else rest
            found[f"{where}.{rest}"] = path
    return found


def _in_resnet(rest: str) -> str:
    first, dot, more = rest.partition(".")
    return _RESNET.get(first, first) + dot + more


def _down(start: int, kind: str, j: int, resnets: int) -> str:
    """The name of a part of a block on the way down, whose original numbers begin at `start`."""
    return f"input_blocks.{start + resnets}.0" if kind == "downsamplers" else f"input_blocks.{start + j}.{_inner(kind)}"


def _up(start: int, kind: str, j: int, resnets: int, attends: bool) -> str:
    """The name of a part of a block on the way up; the upsampler stands behind the last resnet and its attention."""
    if kind == "upsamplers":
        return f"output_blocks.{start + resnets}.{1 + attends}"
    return f"output_blocks.{start + j}.{_inner(kind)}"


def _inner(kind: str) -> int:
    return int(kind == "attentions")
