"""The translation of names that other programs wrote into PEFT's files.

- Wrappers' components, such as `_orig_mod` (torch.compile), are left out of a path. `module` (DistributedDataParallel)
  may be a module of the model itself: it is left out only if the model has the path without it, and not the path as it
  is.
- A path that is a wrapper of the model around one adaptable layer (a clipped linear layer) means that layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lorary.adapters.peft import keys
from lorary.adapters.wrapper_names import DDP, left_out, without_wrappers
from lorary.errors import Diagnostic
from lorary.files.strict_json import named
from lorary.model.base import Base


@dataclass
class Translation:
    """The names of a file in this model's terms.

    Args:
        names: short name, translated -> the name in the file.
        inner: site -> the name that the file has for it, for layers inside a wrapper of the model.
        notes: what was translated.
        problems: names that are there twice.
        ambiguous: paths that may mean two modules.
    """

    names: dict[str, str] = field(default_factory=dict)
    inner: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Diagnostic] = field(default_factory=list)
    ambiguous: dict[str, Diagnostic] = field(default_factory=dict)


def translate(
    names: Iterable[str],
    leaves: Iterable[str],
    canonical: Callable[[str], str],
    base: Base | None,
) -> Translation:
    """The translation of a file's names.

    Args:
        names: the names in the file.
        leaves: the ends of the names of a site's tensors.
        canonical: PEFT's spelling of a short name.
        base: the base, if at hand.
    """
    found, leaves, dropped = Translation(), tuple(leaves), list[str]()
    for name in names:
        plain, components = without_wrappers(name)
        short = canonical(keys.short(plain))
        if base is not None:
            site = keys.site_of(short, leaves)
            path = site or short.rpartition(".")[0].removesuffix(".base_layer")
            real = _without_module(path, base, found)
            components += [DDP] if real != path else []
            layer = _inside(real, base) if site else real
            found.inner |= {layer: real} if layer != real else {}
            short = layer + short.removeprefix(path)
        dropped += components
        if short in found.names:
            found.problems.append(Diagnostic(named(name), f"is there twice, {_why_twice(name, short, found)}"))
        found.names[short] = name
    found.notes += left_out(dropped)
    found.notes += [f"{outer} is a wrapper here: the adapter is on {inner}" for inner, outer in found.inner.items()]
    return found


def _why_twice(name: str, short: str, found: Translation) -> str:
    first = found.names[short]
    if any(without_wrappers(n)[1] or DDP in n.split(".") for n in (name, first)):
        return f"with and without a wrapper's name: {named(first)} too"
    return f"with and without its {'prefix' if name in (keys.PREFIX + short, short) else 'ending'}"


def _without_module(path: str, base: Base, found: Translation) -> str:
    """A path without those components `module` that the model does not have; unchanged if it has it so, or neither."""
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
        found.ambiguous[path] = Diagnostic(named(path), what, "rename its tensors to the paths of the base")
    return fitting[0] if fitting else path


def _inside(path: str, base: Base) -> str:
    """The one adaptable layer inside a module that is none itself; the path unchanged otherwise."""
    if path not in base.modules or path in base.kinds:
        return path
    layers = [name for name in base.kinds if name.startswith(f"{path}.")]
    return layers[0] if len(layers) == 1 else path
