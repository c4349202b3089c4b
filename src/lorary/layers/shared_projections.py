"""SharedProjections: frozen tensors for all adapted layers, each of which uses a leading slice (VeRA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorary.kernels.shared_projection import LastProductCache
from lorary.kernels.torch_internals import buffers_of
from lorary.spec.placement import AdaptedSite, shared_shapes


class SharedProjections(nn.Module):
    """One set of frozen tensors for the whole model, a submodule of every adapted layer.

    They are buffers: no optimizer trains them, they move with the model once, and a copied model has one copy.

    Args:
        sites: all sites; each tensor is as large as the largest site needs.
        dtype: of the tensors.
        device: of the tensors.
    """

    def __init__(self, sites: Sequence[AdaptedSite], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        for role, size in shared_shapes(sites).items():
            self.register_buffer(role, torch.zeros(size, dtype=dtype, device=device), persistent=False)
        self.last_product = LastProductCache()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """role -> full tensor."""
        return dict(buffers_of(self))  # type: ignore[arg-type]  # none of them is None

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into the leading slice of each tensor."""
        with torch.no_grad():
            for role, tensor in tensors.items():
                leading_slice(self.tensors[role], tuple(tensor.shape)).copy_(tensor)


def leading_slice(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The leading slice of a tensor with this shape, a view."""
    for dim, n in enumerate(shape):
        if tensor.shape[dim] != n:
            tensor = tensor.narrow(dim, 0, n)
    return tensor
