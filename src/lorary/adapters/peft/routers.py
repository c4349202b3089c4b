"""Updates of routers in PEFT's files: PEFT's `all-linear` adapts the router of Mixtral and other models as a parameter.

A router computes with its weight itself, so no adapter can sit there. Its updated weight W + s B A is kept instead, as
a parameter trained in full: the same function.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lorary.adapters.peft import keys
from lorary.adapters.peft.config import PeftConfig
from lorary.adapters.peft.types import PeftType
from lorary.errors import Diagnostic
from lorary.model.base import Base
from lorary.model.targets import abbreviated
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Site


class Routers:
    """The routers that a configuration names, by their weights' names.

    Args:
        config: of the file.
        peft_type: its type.
        base: the base; None without it.
        names: the short names of the file's tensors: those of Transformers 4 name a router as a module.
    """

    def __init__(self, config: PeftConfig, peft_type: PeftType, base: Base | None, names: Collection[str] = ()) -> None:
        self.base, self.type = base, peft_type
        self.sites: dict[str, AdaptedSite] = {}
        asked = {path for name in names if (path := keys.site_of(name, peft_type.leaves_of(config)))}
        if base is None or not asked:
            return
        for name, W in base.tensors.items():
            path = name.removesuffix(".weight")
            if path == name or W.dim() != 2 or path in base.kinds:
                continue
            if config.targets_parameter(name) or (path in asked and config.targets_module(path)):
                site = Site(path, "linear", W.shape[0], W.shape[1], bias=False)
                self.sites[name] = AdaptedSite(site, peft_type.to_method(config, path))

    @property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Short name -> shape of their factors in the file."""
        return {name: shape for adapted in self.sites.values() for name, shape in self.type.layout(adapted).values()}

    def problems(self) -> list[Diagnostic]:
        """Why their weights cannot be computed."""
        what, fix = "has no values, and a router's update is read onto its weight", "load the base's weights first"
        empty = [name for name in self.sites if self.base is not None and self.base.tensors[name].is_meta]
        return [Diagnostic(name, what, fix) for name in empty[:1]]

    def weights(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> W + s B A in the base's precision, rounded once."""
        found = {}
        for name, adapted in self.sites.items():
            if self.base is None or any(key not in values for key, _ in self.type.layout(adapted).values()):
                continue
            W = self.base.tensors[name].detach().cpu()
            roles = self.type.decode(adapted, values)
            exact = torch.promote_types(W.dtype, torch.float32)
            found[name] = (W.to(exact) + adapted.scale * (roles["B"].to(exact) @ roles["A"].to(exact))).to(W.dtype)
        return found

    def notes(self) -> list[str]:
        """What was translated."""
        names = abbreviated(self.sites)
        return [f"the updates of {names} are kept as whole weights: routers compute without a layer"] if names else []
