"""nn.MultiheadAttention: its in-projections seen as layers, and a forward that calls layers for its products.

PyTorch's forward never calls a layer: it reads `in_proj_weight` [3 width, width], or `q_proj_weight`, `k_proj_weight`
and `v_proj_weight` where keys or values have widths of their own, and the weight of `out_proj`. So while one of them is
adapted, the attention computes with `attention_forward`, which is PyTorch's function with calls for these products, and
its fused path, and that of nn.TransformerEncoderLayer around it, is switched off. Without adapters it is as before.

Biases stay with the attention (`in_proj_bias`), outside of the layers of its in-projections.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorary.kernels.torch_internals import SAME_WIDTHS, children_of, parameters_of
from lorary.layers.parameter_layer import ParameterLayer, place, reorder

FUSED = "in_proj_weight"
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
IN_PROJECTIONS = (FUSED, *SEPARATE)
OUT_PROJECTION = "out_proj"


class InProjection(ParameterLayer):
    """An in-projection of nn.MultiheadAttention, without its bias.

    Args:
        weight: [out, in], the attention's own parameter.
        order: see `ParameterLayer`.
    """

    is_plain = True

    def __init__(self, weight: nn.Parameter, order: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.weight = weight
        self.order = order
        self.requires_grad = True  # nn.TransformerEncoder asks the parameter in whose place it or its adapter may be

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] of x [..., in]."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.weight.shape))


def is_attention(module: object) -> bool:
    """Whether a module computes what nn.MultiheadAttention does, with an adapter or without."""
    if not isinstance(module, nn.MultiheadAttention) or type(module).forward is not nn.MultiheadAttention.forward:
        return False
    return "forward" not in vars(module) or _is_ours(vars(module)["forward"])


def in_projections(module: nn.Module) -> dict[str, InProjection]:
    """name -> layer of the in-projections of an attention; {} for any other module."""
    if not is_attention(module):
        return {}
    own = parameters_of(module)
    return {name: InProjection(p, tuple(own)) for name in IN_PROJECTIONS if (p := own.get(name)) is not None}


def never_reads(reader: nn.Module, path: str) -> bool:
    """Whether PyTorch's own code that reads a projection does not run once an adapter is there.

    Args:
        reader: the module with the code.
        path: of the projection, from there.
    """
    if is_attention(reader):
        return path == OUT_PROJECTION
    if getattr(type(reader), "forward", None) is not nn.TransformerEncoderLayer.forward:
        return False
    attention, _, last = path.rpartition(".")
    return last == OUT_PROJECTION and is_attention(children_of(reader).get(attention))


def place_in_projection(owner: nn.Module, name: str, layer: nn.Module) -> bool:
    """Put a layer in the place of an attention's in-projection, or the parameter of a plain one back.

    Returns:
        False, and nothing has changed, if it is not such a layer.
    """
    if not isinstance(getattr(layer, "base", layer), InProjection):
        return False
    place(owner, name, layer)
    children = children_of(owner)
    reorder(children, (*IN_PROJECTIONS, *(key for key in children if key not in IN_PROJECTIONS)))
    choose_forward(owner)
    return True


def choose_forward(owner: nn.Module) -> None:
    """Let an attention compute with the layers in it, or as before if it has only its own; nothing for other modules.

    Its fused path, and that of nn.TransformerEncoderLayer, reads the weights: it is left for widths that differ.
    """
    if not is_attention(owner):
        return
    children = children_of(owner)
    out: Any = children[OUT_PROJECTION]
    if type(out).forward is not nn.Linear.forward or not children.keys().isdisjoint(IN_PROJECTIONS):
        vars(owner)["forward"] = functools.partial(attention_forward, owner)
        setattr(owner, SAME_WIDTHS, False)
    else:
        vars(owner).pop("forward", None)
        setattr(owner, SAME_WIDTHS, parameters_of(owner).get(FUSED) is not None)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The output of nn.MultiheadAttention, with its arguments, by calls of its projections.

    `is_causal` says that `attn_mask` is the causal one, which is then read only where no kernel knows it.
    """
    if query.is_nested:
        return _nested(module, query, need_weights, average_attn_weights)
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    batched = query.dim() == 3
    is_causal = is_causal and key_padding_mask is None and not need_weights
    q, k, v = _projected(module, query, key, value)
    if not batched:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    elif not module.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    mask = _mask(module, None if is_causal else attn_mask, key_padding_mask, q, k)  # before keys of the module's own
    k, v, mask = _with_own_keys(module, k, v, mask)
    q, k, v = (_heads(x, module.num_heads) for x in (q, k, v))
    y, weights = _attend(module, q, k, v, mask, is_causal, need_weights)
    y = module.out_proj(y.transpose(1, 2).flatten(2))
    y = y.squeeze(0) if not batched else y if module.batch_first else y.transpose(0, 1)
    if weights is not None:
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    return y, weights


def _is_ours(forward: object) -> bool:
    return isinstance(forward, functools.partial) and forward.func is attention_forward


def _projected(module: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """[q, k, v], each [..., width]; a fused projection runs once for each different input."""
    inputs = (query, key, value)
    if getattr(module, FUSED, None) is None:
        found = [_times(module, name, x) for name, x in zip(SEPARATE, inputs, strict=True)]
    else:
        whole: list[tuple[Tensor, tuple[Tensor, ...]]] = []  # input -> its q, k and v
        for x in inputs:
            if not any(x is other for other, _ in whole):
                whole.append((x, _times(module, FUSED, x).chunk(3, dim=-1)))
        found = [next(thirds[i] for other, thirds in whole if other is x) for i, x in enumerate(inputs)]
    if module.in_proj_bias is not None:
        found = [y + b for y, b in zip(found, module.in_proj_bias.chunk(3), strict=True)]
    return found


def _times(module: Any, name: str, x: Tensor) -> Tensor:
    layer: Any = children_of(module).get(name)
    y: Tensor = F.linear(x, getattr(module, name)) if layer is None else layer(x)
    return y


def _heads(x: Tensor, heads: int) -> Tensor:
    """[N, heads, L, width / heads] of x [N, L, width]."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _mask(module: Any, mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The numbers [N or 1, heads or 1, L or 1, S] to add to the scores; None if there is no mask.

    Args:
        module: the attention.
        mask: [L, S] or [N heads, L, S], true or -inf where a key is left out.
        padding: [N, S], or [S] without a batch.
        q, k: [N, L, width] and [N, S, width].
    """
    (N, L, _), S, heads = q.shape, k.shape[1], module.num_heads
    found = None
    if mask is not None:
        if mask.shape not in ((L, S), (N * heads, L, S)):
            what = f"attn_mask has the shape {list(mask.shape)}"
            raise RuntimeError(f"{what}, expected {[L, S]} or {[N * heads, L, S]}")
        found = _numbers(mask, q).reshape(-1 if mask.dim() == 3 else 1, heads if mask.dim() == 3 else 1, L, S)
    if padding is not None:
        if padding.numel() != N * S:
            raise RuntimeError(f"key_padding_mask has the shape {list(padding.shape)}, expected {[N, S]}")
        numbers = _numbers(padding, q).reshape(N, 1, 1, S)
        found = numbers if found is None else found + numbers
    return found


def _numbers(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    zeros = torch.zeros_like(mask, dtype=q.dtype)
    return zeros.masked_fill_(mask, -math.inf)


def _with_own_keys(module: Any, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """k, v [N, S, width] and the mask, with the keys and values that the module adds to every row."""
    own = [(module.bias_k, module.bias_v)] if module.bias_k is not None else []
    if module.add_zero_attn:
        own.append((k.new_zeros(1, 1, k.shape[-1]), v.new_zeros(1, 1, v.shape[-1])))
    for key, value in own:
        k = torch.cat([k, key.expand(len(k), -1, -1)], 1)
        v = torch.cat([v, value.expand(len(v), -1, -1)], 1)
        mask = None if mask is None else F.pad(mask, (0, 1))
    return k, v, mask


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """(output [N, heads, L, .], weights [N, heads, L, S] if they are asked for) of q, k and v by heads."""
    dropout = module.dropout if module.training else 0.0
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal), None
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    return weights @ v, weights


def _nested(module: Any, x: Tensor, need_weights: bool, average: bool) -> tuple[Tensor, Tensor | None]:
    """The output of self-attention over rows of different lengths, as nn.TransformerEncoder passes them."""
    lengths = [len(row) for row in x.unbind()]
    padded = x.to_padded_tensor(0.0)  # [N, L, width]
    ends = torch.tensor(lengths, device=x.device)
    padding = torch.arange(padded.shape[1], device=x.device) >= ends[:, None]
    y, weights = attention_forward(module, padded, padded, padded, padding, need_weights, None, average)
    return torch.nested.as_nested_tensor([row[:n] for row, n in zip(y, lengths, strict=True)]), weights
