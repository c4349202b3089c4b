"""The paths of modules in adapter files, in a base's own terms: small rules, each with a note.

- Wrappers' components, such as `_orig_mod` (torch.compile), are left out. `module` (DistributedDataParallel) may be a
  module of the model itself: it is left out only if the model has the path without it, and not the path as it is.
- A path of an older Transformers is the present one, by Transformers' own mapping.
- A path that is a wrapper of the model around one adaptable layer (a clipped linear layer) means that layer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property

from lorary.adapters.transformers_names import OldNames
from lorary.adapters.wrapper_names import DDP, left_out, without_wrappers
from lorary.errors import Diagnostic
from lorary.files.strict_json import named
from lorary.model.base import Base


@dataclass
class ModulePaths:
    """The paths of a file, translated one by one.

    Args:
        base: the base, if at hand.
        single_experts: whether the reader converts the layers of single experts, which then keep their old paths.
        written: path here -> the path in the file, where another rule than the wrappers' changed it.
        ambiguous: path -> why it may mean two modules.
        problems: layers of the file that are only parts of a weight here.
    """

    base: Base | None
    single_experts: bool = False
    written: dict[str, str] = field(default_factory=dict)
    ambiguous: dict[str, Diagnostic] = field(default_factory=dict)
    problems: list[Diagnostic] = field(default_factory=list)
    _dropped: list[str] = field(default_factory=list)
    _renamed: dict[str, str] = field(default_factory=dict)
    _inner: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _old(self) -> OldNames | None:
        return None if self.base is None else OldNames(self.base.model, self.base.modules)

    def without_wrappers(self, name: str) -> str:
        """A name without the components that only wrappers have."""
        plain, components = without_wrappers(name)
        self._dropped += components
        return plain

    def here(self, path: str, *, layer: bool) -> str:
        """The base's path for a path in the file; the path itself without a base, or if the base has none.

        Args:
            path: a module's path without wrappers' components.
            layer: whether it names an adapted layer, and not a module that is saved whole.
        """
        if self.base is None:
            return path
        real = self._without_module(path, self.base)
        self._dropped += [DDP] if real != path else []
        new = self._present(real, self.base)
        found = _inside(new, self.base) if layer else new
        if new != real:
            self._renamed[real] = new
        if found != new:
            self._inner[found] = new
        if layer and found != real:
            self.written[found] = real
        return found

    def notes(self) -> list[str]:
        """What was translated."""
        found = left_out(self._dropped)
        if self._renamed:
            (old, new), count = next(iter(self._renamed.items())), len(self._renamed)
            others = f", and {count - 1} more" if count > 1 else ""
            found.append(f"Transformers has renamed {old} to {new}{others}")
        return found + [f"{outer} is a wrapper here: the adapter is on {inner}" for inner, outer in self._inner.items()]

    def _present(self, path: str, base: Base) -> str:
        """The present path of a module that an older Transformers named."""
        if path in base.modules or self._old is None:
            return path
        new = self._old.new_path(path)
        joined = self._old.joined(path) if new == path else None
        if joined is None or joined.name not in base.tensors:
            return new
        if not (self.single_experts and base.kinds.get(joined.name) == "experts"):
            what = f"is a part of {named(joined.name)} here: adapters of the parts of such a weight are not read"
            self.problems.append(Diagnostic(named(path), what))
        return new

    def _without_module(self, path: str, base: Base) -> str:
        """A path without those components `module` that the model does not have; unchanged if it has it so."""
        parts = path.split(".")
        at = [i for i, part in enumerate(parts) if part == DDP]
        if not at or path in base.modules:
            return path
        removals = (gone for n in range(1, len(at) + 1) for gone in itertools.combinations(at[:4], n))
        shorter = [".".join(part for i, part in enumerate(parts) if i not in gone) for gone in removals]
        fitting = sorted({p for p in shorter if p in base.modules})
        fitting = [p for p in fitting if p in base.kinds] or fitting  # a layer rather than a container
        if len(fitting) > 1:
            what = f"may mean {' or '.join(map(named, fitting))}: `{DDP}` is a wrapper's name, and a module's here"
            self.ambiguous[path] = Diagnostic(named(path), what, "rename its tensors to the paths of the base")
        return fitting[0] if fitting else path


def _inside(path: str, base: Base) -> str:
    """The one adaptable layer inside a module that is none itself; the path unchanged otherwise."""
    if path not in base.modules or path in base.kinds:
        return path
    layers = [name for name in base.kinds if name.startswith(f"{path}.")]
    return layers[0] if len(layers) == 1 else path
