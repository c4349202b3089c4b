"""The parameters that are layers of their own: fused experts, and the in-projections of nn.MultiheadAttention."""

from __future__ import annotations

from torch import nn

from lorary.layers.experts import ExpertMatrix, expert_matrices, place_expert_layer
from lorary.layers.multihead_attention import InProjection, in_projections, place_in_projection


def parameter_layers(module: nn.Module) -> dict[str, ExpertMatrix] | dict[str, InProjection]:
    """name -> layer of each parameter of a module that is a matrix of its own; {} for most modules."""
    return expert_matrices(module) or in_projections(module)


def place_parameter_layer(owner: nn.Module, name: str, layer: nn.Module) -> bool:
    """Put a layer in the place of such a parameter, or the parameter of a plain one back.

    Returns:
        False, and nothing has changed, if it is not such a layer.
    """
    return place_expert_layer(owner, name, layer) or place_in_projection(owner, name, layer)
