"""Tables of a base model that reading and checking adapters needs, each computed once."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lorary.layers.adapted import Adapted, adapted_layers, base_parameters, unwrapped_modules
from lorary.layers.kinds import kind_of, site
from lorary.layers.quantized_weight import compute_dtype, is_quantized, stored_tensors
from lorary.layers.wrappers import unwrapped
from lorary.model.buffers import persistent_buffers
from lorary.model.fingerprint import Fingerprint
from lorary.spec.site import Site


class Base:
    """A base model with tables of its layers and tensors, each computed when first used and then kept.

    Make another `Base` when the model changes.

    Args:
        model: the base, plain or adapted; adapted layers appear as the layers inside.
        fingerprint: its fingerprint, if known: taking it reads numbers of every parameter.
    """

    def __init__(self, model: nn.Module, fingerprint: Fingerprint | None = None) -> None:
        self.model = unwrapped(model)
        self._sites: dict[str, Site] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        if fingerprint is not None:
            self.fingerprint = fingerprint

    @staticmethod
    def of(model: nn.Module | Base) -> Base:
        """The base of a model; itself, if it is one."""
        return model if isinstance(model, Base) else Base(model)

    def walk(self) -> Base:
        """Compute all tables now, so that loader threads read them while the model computes.

        Sites and dtypes are still added on demand, and an adapter with trained parameters still reads the model.
        """
        _ = self.modules, self.kinds, self.quantized, self.empty, self.residual
        _ = self.tensors, self.first_names, self.fingerprint, self.vocabulary
        return self

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """path -> module of the plain model."""
        return unwrapped_modules(self.model)

    @cached_property
    def kinds(self) -> dict[str, str]:
        """path -> layer kind of every module with an adaptable weight."""
        return {path: kind for path, module in self.modules.items() if (kind := kind_of(module)) is not None}

    @cached_property
    def quantized(self) -> frozenset[str]:
        """The paths of the quantised layers."""
        return frozenset(path for path, module in self.modules.items() if is_quantized(module))

    @cached_property
    def empty(self) -> frozenset[str]:
        """The paths of the layers without values, on the meta device."""
        return frozenset(path for path in self.kinds if stored_tensors(self.modules[path])[0].is_meta)

    @cached_property
    def residual(self) -> frozenset[str]:
        """The paths of the layers whose weight an attached adapter has reduced by its start."""
        return frozenset(path for path, layer in adapted_layers(self.model).items() if layer.start)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """path -> tokens, of the layers with a row for every token, the input embedding first."""
        paths = {id(module): path for path, module in self.modules.items()}
        layers: list[Any] = [m.base if isinstance(m, Adapted) else m for m in vocabulary_layers(self.model)]
        return {paths[id(layer)]: int(layer.weight.shape[0]) for layer in layers if id(layer) in paths}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """name -> every parameter and persistent buffer; tied ones appear under each of their names."""
        return dict[str, Tensor](base_parameters(self.model)) | persistent_buffers(self.modules)

    @cached_property
    def first_names(self) -> dict[str, str]:
        """name -> the first name of the same tensor."""
        first: dict[int, str] = {}
        return {name: first.setdefault(id(tensor), name) for name, tensor in self.tensors.items()}

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The identity of the base."""
        return Fingerprint.of(self.model)

    def dtype(self, path: str) -> torch.dtype:
        """The precision in which the module at a path computes."""
        if path not in self._dtypes:
            self._dtypes[path] = compute_dtype(self.modules[path], self.model)
        return self._dtypes[path]

    def site(self, path: str) -> Site:
        """The site of the layer at a path of `kinds`: its whole weight."""
        if path not in self._sites:
            self._sites[path] = site(path, self.modules[path])
        return self._sites[path]


def vocabulary_layers(model: Any) -> list[Any]:
    """The layers with a row for every token, the input embedding first; none if the model does not say which."""
    found = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(model, get)()
        except (AttributeError, NotImplementedError):
            layer = None
        if layer is not None and getattr(layer, "weight", None) is not None:
            found.append(layer)
    plain = getattr(found[0], "base", found[0]) if found else None
    return found if isinstance(plain, nn.Embedding) else []
