"""The translation of names that other programs wrote into PEFT's files.

- The paths of modules become the base's (`adapters/module_paths.py`).
- An adapter's name inside a tensor's name, as in the state dict of PEFT's model, is left out: `lora_A.default.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lorary.adapters.module_paths import ModulePaths
from lorary.adapters.peft import keys
from lorary.adapters.wrapper_names import DDP, without_wrappers
from lorary.errors import Diagnostic
from lorary.files.strict_json import named
from lorary.model.base import Base

_SAVED = "modules_to_save"  # PEFT's own module around the copies that it trains, by the adapter's name


@dataclass
class Translation:
    """The names of a file in this model's terms.

    Args:
        names: short name, translated -> the name in the file.
        inner: site -> the name that the file has for it, where another rule than the wrappers' changed it.
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
    found, leaves, paths = Translation(), tuple(leaves), ModulePaths(base, single_experts=True)
    others = (f"{leaf}.weight" for leaf in leaves if canonical(f".{leaf}.weight") == f".{leaf}")
    spelt, adapters = (*leaves, *others), dict[str, None]()
    for name in names:
        short, adapter = without_adapter_name(keys.short(paths.without_wrappers(name)), spelt)
        adapters |= {adapter: None} if adapter else {}
        short = canonical(short)
        site = keys.site_of(short, leaves)
        path = site or short.rpartition(".")[0].removesuffix(".base_layer")
        short = paths.here(path, layer=bool(site)) + short.removeprefix(path)
        if short in found.names:
            why = "with and without an adapter's name" if adapters else _why_twice(name, short, found)
            found.problems.append(Diagnostic(named(name), f"is there twice, {why}"))
        found.names[short] = name
    found.inner, found.ambiguous = paths.written, paths.ambiguous
    found.problems = (_several(adapters) or found.problems) + paths.problems
    found.notes += [*(f"the adapter's name in those of its tensors, `{a}`, was left out" for a in adapters)]
    found.notes += paths.notes()
    return found


def without_adapter_name(name: str, leaves: Sequence[str]) -> tuple[str, str]:
    """A short name without the adapter's name that PEFT's own modules have in it, and this name.

    >>> without_adapter_name("q_proj.lora_A.default.weight", ["lora_A.weight"])
    ('q_proj.lora_A.weight', 'default')
    """
    components = name.split(".")
    for i, component in enumerate(components[1:-2], 1):  # PEFT's copies of tables have no adapter's name there
        if component == _SAVED:
            return ".".join([*components[:i], *components[i + 2 :]]), components[i + 1]
    if name.endswith(tuple(f".{leaf}" for leaf in leaves)):  # a module may itself have the name `lora_A`
        return name, ""
    for leaf in leaves:
        first, *rest = leaf.split(".")
        at = len(components) - 2 - len(rest)
        if at >= 0 and components[at] == first and components[at + 2 :] == rest and components[at + 1] != "weight":
            return ".".join([*components[: at + 1], *rest]), components[at + 1]
    return name, ""


def _several(adapters: Iterable[str]) -> list[Diagnostic]:
    found = sorted(adapters)
    if len(found) < 2:
        return []
    fix = f'save one of them: model.save_pretrained(folder, selected_adapters=["{found[0]}"])'
    return [Diagnostic("", f"the file holds several adapters: {', '.join(map(named, found))}", fix)]


def _why_twice(name: str, short: str, found: Translation) -> str:
    first = found.names[short]
    if any(without_wrappers(n)[1] or DDP in n.split(".") for n in (name, first)):
        return f"with and without a wrapper's name: {named(first)} too"
    return f"with and without its {'prefix' if name in (keys.PREFIX + short, short) else 'ending'}"
