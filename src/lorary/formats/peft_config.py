"""PEFT's `adapter_config.json` (LoRA, DoRA, AdaLoRA, VeRA), read field by field; nothing in it is ignored silently.

A field is one of four: a word that this reader understands and checks; one that only matters while training or for
book-keeping, checked for its type; a feature that changes what the adapter computes and is not supported, which may
only have the value that switches it off; or unknown, which is refused. Absent fields take PEFT's defaults, so that
files of 2023 are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorary.errors import Problem, suggestion
from lorary.formats.bounded_regex import Budget, Pattern, TailPattern
from lorary.formats.findings import Findings
from lorary.formats.peft_fields import BOOK_KEEPING, NULLABLE, UNSUPPORTED, TolerableError, spelled, understood
from lorary.formats.strict_json import named, show

NAME = "adapter_config.json"
_DEFAULTS: dict[str, dict[str, Any]] = {  # of the types that are read
    "LORA": {},
    "ADALORA": {"sort": "AdaLoRA", "r": 12},
    "VERA": {"sort": "VeRA", "r": 256},
}


@dataclass(frozen=True)
class PeftConfig:
    """What a PEFT configuration says about an adapter's sites.

    Args:
        sort: `LoRA`, `DoRA`, `AdaLoRA` or `VeRA`.
        r: the rank of sites without one of their own; AdaLoRA's at the start.
        alpha: likewise.
        dropout: probability with which A's input is dropped in training.
        rslora: whether the scale is alpha / sqrt(r) instead of alpha / r.
        targets: the module names (whole tails of paths), one pattern, or None where the file does not say.
        exclude: what is not adapted, written likewise.
        layers: the layer numbers that are adapted; None for all.
        layers_pattern: the names that a layer number follows; empty for any.
        ranks: (pattern over paths, rank), the first match wins.
        alphas: (pattern over paths, alpha), likewise.
        modules_to_save: endings of the paths of modules that are kept whole.
        bias: `none`, `all` or `lora_only`: the base biases that the file holds.
        transposed: PEFT's `fan_in_fan_out`: the layers store their weight as [in, out], GPT-2's Conv1D.
        base: the Hub id or path of the base model; empty where unknown.
        seed: of VeRA's projections.
        start: where VeRA's d started.
        saved: whether the file holds VeRA's projections.
        kept: site -> how many directions AdaLoRA has left there; where it is silent, all.
        target: AdaLoRA's, on average.
        first, final: its optimizer steps before any is dropped, and for which the choice stands.
        every: its steps between two choices.
        beta1, beta2: of its scores.
        orthogonality: the weight of its penalty.
    """

    sort: str = "LoRA"
    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] | Pattern | None = None
    exclude: tuple[str, ...] | Pattern = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    ranks: tuple[tuple[TailPattern, int], ...] = ()
    alphas: tuple[tuple[TailPattern, float], ...] = ()
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    transposed: bool = False
    base: str = ""
    seed: int = 0
    start: float = 0.1
    saved: bool = True
    kept: Mapping[str, int] = field(default_factory=dict)
    target: int = 8
    first: int = 0
    final: int = 0
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    @property
    def phases(self) -> tuple[int, int]:
        """AdaLoRA's optimizer steps before any direction is dropped, and those for which the choice stands."""
        return self.first, self.final

    def targets_module(self, path: str) -> bool:
        """Whether PEFT would adapt the module at this path, were it of a kind that can be.

        Raises:
            ValueError: a pattern takes too much work.
        """
        if _names(self.exclude, path) or _inside(path, self.modules_to_save):
            return False
        if self.targets is None:
            return True
        return _names(self.targets, path) and (self.layers is None or self._layer(path) in self.layers)

    def rank(self, path: str) -> int:
        """The rank of the site at this path."""
        return next((r for pattern, r in self.ranks if pattern.fullmatch(path)), self.r)

    def alpha_at(self, path: str) -> float:
        """The alpha of the site at this path."""
        return next((alpha for pattern, alpha in self.alphas if pattern.fullmatch(path)), self.alpha)

    def keeps(self, path: str) -> bool:
        """Whether the base parameter at this path belongs to a module of `modules_to_save`."""
        components = path.split(".")
        ancestors = [".".join(components[:i]) for i in range(1, len(components))]
        return any(a.endswith(m) for a in ancestors for m in self.modules_to_save)

    def _layer(self, path: str) -> int | None:
        """The number of the layer that a path lies in, by PEFT's rule: the first number in the right place."""
        components = path.split(".")
        for i, component in enumerate(components[:-1]):
            if component.isdecimal() and (
                any(components[i - 1 :: -1][: n.count(".") + 1] == n.split(".")[::-1] for n in self.layers_pattern)
                if self.layers_pattern
                else i >= 2
            ):
                return int(component)
        return None


def read_config(data: object, findings: Findings) -> PeftConfig | None:
    """The configuration that a parsed `adapter_config.json` holds; None where it is of a type that is not read.

    Args:
        data: the parsed JSON.
        findings: where everything wrong goes.
    """
    if not isinstance(data, dict):
        findings.fatal.append(Problem(NAME, "is not a JSON object"))
        return None
    kind = data.get("peft_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        what = "has no `peft_type`" if kind is None else f"is of type {show(kind)}"
        findings.fatal.append(Problem(NAME, what, f"lorary reads PEFT's {', '.join(_DEFAULTS)} adapters"))
        return None
    words: dict[str, Any] = dict(_DEFAULTS[kind])
    fields, unsupported = understood(kind, Budget()), UNSUPPORTED if kind != "VERA" else {}
    for key, value in data.items():
        if key in fields:
            _take(words, key, *fields[key], value, findings)
        elif key in unsupported:
            if value not in (None, False, [], {}, 0):
                findings.fatal.append(Problem(f"{NAME}: {key}", f"is {show(value)}: {unsupported[key]}"))
        elif key in BOOK_KEEPING:
            if value is not None and not isinstance(value, BOOK_KEEPING[key]):
                findings.fatal.append(Problem(f"{NAME}: {key}", f"is {show(value)}, not {spelled(BOOK_KEEPING[key])}"))
        else:
            known = [*fields, *unsupported, *BOOK_KEEPING]
            fix = suggestion(key, known) or "a newer PEFT may have written it; strict=False ignores it"
            findings.tolerable.append(Problem(f"{NAME}: {named(key)}", "is no field that lorary knows", fix))
    _check_together(words, findings)
    if words.pop("dora", False):
        words["sort"] = "DoRA"
    return PeftConfig(**words)


def _take(
    words: dict[str, Any], key: str, name: str, read: Callable[[object], Any], value: object, findings: Findings
) -> None:
    try:
        if not name:
            read(value)
        elif value is not None or key not in NULLABLE:
            words[name] = read(value)
    except TolerableError as error:
        findings.tolerable.append(Problem(f"{NAME}: {key}", str(error)))
        words |= {name: error.value} if name else {}
    except ValueError as error:
        findings.fatal.append(Problem(f"{NAME}: {key}", str(error)))


def _check_together(words: dict[str, Any], findings: Findings) -> None:
    if isinstance(words.get("targets"), Pattern) and words.get("layers") is not None:
        what = "cannot be said together with a pattern in `target_modules`"
        findings.fatal.append(Problem(f"{NAME}: layers_to_transform", what))
    masks, r = words.pop("masks", {}), words.get("r")
    for name, mask in masks.items():
        if len(mask) != r:
            what = f"has {len(mask)} entries for {show(name)}, and there were {r} directions at the start"
            findings.fatal.append(Problem(f"{NAME}: rank_pattern", what))
    words |= {"kept": {name: sum(mask) for name, mask in masks.items()}} if masks else {}
    if words.get("layers_pattern") and words.get("layers") is None:
        findings.fatal.append(Problem(f"{NAME}: layers_pattern", "needs `layers_to_transform`"))


def _names(entries: tuple[str, ...] | Pattern, path: str) -> bool:
    if isinstance(entries, Pattern):
        return entries.fullmatch(path)
    return any(path == entry or path.endswith(f".{entry}") for entry in entries)


def _inside(path: str, modules: tuple[str, ...]) -> bool:
    """Whether a path is that of one of these modules, or below it, by whole components."""
    return any(f".{m}." in f".{path}." for m in modules)
