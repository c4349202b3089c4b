"""Presets: papers' names for components, and `method`, which unites them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lorary.errors import Diagnostic, MethodError, did_you_mean
from lorary.spec._checks import braces
from lorary.spec._registry import FUNCTIONS as FUNCTIONS
from lorary.spec._registry import PRESETS as PRESETS
from lorary.spec._registry import PlanFunction as PlanFunction
from lorary.spec._registry import Preset as Preset
from lorary.spec._registry import Restriction as Restriction
from lorary.spec._registry import add_preset
from lorary.spec._registry import resolve as resolve
from lorary.spec.interfaces import COMPONENTS, has_rank
from lorary.spec.method import AXES, Method

# PEFT's words for what `method` takes under another name or in another place
_PEFT_WORDS = {
    "lora_alpha": "use `alpha`",
    "lora_dropout": "use `dropout`",
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), "use `r`"),
    **{
        word: f"it belongs to the plan: lorary.plan(model, method, {argument}=...)"
        for argument, words in {
            "targets": ("targets", "target", "target_modules"),
            "exclude": ("exclude", "exclude_modules"),
            "layers": ("layers", "layers_to_transform"),
            "ranks": ("ranks", "rank_pattern"),
            "alphas": ("alphas", "alpha_pattern"),
            "experts": ("experts",),
        }.items()
        for word in words
    },
    "learning_rate": "it belongs to the optimizer: lorary.param_groups(model, lr=...)",
    "modules_to_save": 'use the axis `full`: full=("lm_head.weight",)',
    "bias": 'name the preset: lorary.method("lora", "bitfit")',
    "init_lora_weights": 'name the preset: lorary.method("pissa", ...)',
    "use_dora": 'name the preset: lorary.method("dora", ...)',
    "use_rslora": 'name the preset: lorary.method("rslora", ...)',
}

# axis on which a method has one component -> what that component decides
_CHOICE = {
    "delta": "what is trained",
    "init": "the initialisation",
    "scale": "the scale",
    "join": "how the update joins the weight",
    "storage": "how the weight is stored",
    "context": "the context",
    "dropout": "the dropout",
}

ComponentsT = TypeVar("ComponentsT", bound=Callable[..., dict[str, Any]])

# axis -> how two presets that both set it unite; on every other axis only one may
_UNITES: dict[str, Callable[[Any, Any], Any]] = {
    "frozen": lambda a, b: frozenset(a) | frozenset(b),
    "rules": lambda a, b: (*a, *b),
    "full": lambda a, b: tuple(sorted({*a, *b})),
}


def preset(
    name: str,
    *,
    citation: str,
    aliases: Sequence[str] = (),
    adapts: bool = True,
    lr: float = 2e-4,
    when: str = "",
    restrictions: Mapping[str, Restriction | str] | None = None,
    answers: Mapping[str, Mapping[str, Any]] | None = None,
    example: Mapping[str, Any] | None = None,
) -> Callable[[ComponentsT], ComponentsT]:
    """Register components under a paper's name, for `lorary.method`, the command line, files, docs and the laws.

    The arguments are those of `Preset`; a restriction without options may be its sentence alone.
    """
    restricted = {k: Restriction(v) if isinstance(v, str) else v for k, v in (restrictions or {}).items()}

    def register(components: ComponentsT) -> ComponentsT:
        found = Preset(name, components, citation, adapts, lr, when, restricted, answers or {}, example or {})
        add_preset(found, aliases)
        return components

    return register


def register_plan_function(function: PlanFunction) -> None:
    """Register a paper's method that is a function, for the command line, docs and `method`'s errors."""
    FUNCTIONS[function.name] = function


def presets() -> dict[str, Preset]:
    """All presets by name, in the order of the methods' files."""
    return dict(PRESETS)


def method(*names: str, **options: Any) -> Method:
    """The method that unites presets and components.

    >>> print(method("lora", "rslora", r=16, alpha=32).scale)
    AlphaOverSqrtRank(alpha=32)

    Args:
        names: presets, such as "lora", "rslora", "lora+". LoRA's components are the defaults.
        options: the presets' parameters (`r`, `alpha`, `dropout`, `ratio`, ...) and components by axis
            (`init=Gaussian()`).

    Raises:
        MethodError: unknown names or options (with the nearest known one), two presets that set the same axis, and
            every contradiction between the components.
    """
    problems: list[Diagnostic] = []
    chosen = resolve(names, problems)
    known = {option for p in chosen for option in p.parameters}
    for option in sorted(set(options) - known - set(AXES)):
        hint = _PEFT_WORDS.get(option) or did_you_mean(option, sorted(known | set(AXES)))
        problems.append(Diagnostic(option, f"is not an option of {' + '.join(p.name for p in chosen)}", hint))
    if problems:
        raise MethodError("invalid method:", problems)
    union = _PresetUnion()
    for p in chosen:
        union.add(p.name, p.components(**{k: v for k, v in options.items() if k in p.parameters}))
    union.add("you", {k: v for k, v in options.items() if k in AXES and k not in known})
    for option, axis, name in (("r", "delta", "rank"), ("alpha", "scale", "alpha")):
        component = union.components.get(axis)
        if option in options and not (has_rank(component) if option == "r" else hasattr(component, "alpha")):
            what = f"{_sets(union.sources.get(axis, ''), component)}, which has no {name}"
            union.problems.append(Diagnostic(option, what, "leave it out"))
    join = union.components.get("join")
    if options.get("lora_bias") and not getattr(join, "changes_bias", False):
        what = f"{_sets(union.sources.get('join', ''), join)}, which has no bias beside B"
        union.problems.append(Diagnostic("lora_bias", what, "leave it out"))
    if union.problems:
        raise MethodError("invalid method:", union.problems)
    return Method(**union.components)


def resolve_presets(names: Sequence[str]) -> tuple[Preset, ...]:
    """The presets that `method(*names)` unites, in order: LoRA first, unless none of them adapts.

    Raises:
        MethodError: unknown names.
    """
    problems: list[Diagnostic] = []
    chosen = resolve(names, problems)
    if problems:
        raise MethodError("invalid method:", problems)
    return tuple(chosen)


def presets_of(method: Method) -> tuple[str, ...]:
    """The presets whose components a method has, as far as their types tell; `lora` if there are none.

    >>> presets_of(method("dora", "rslora"))
    ('dora', 'rslora')
    """
    found = [p.name for p in PRESETS.values() if p.name != "lora" and _has(method, p.components())]
    return tuple(found) or ("lora",)


def _has(method: Method, components: Mapping[str, Any]) -> bool:
    """Whether a method has components of these types, on all of their axes."""

    def has(axis: str, value: Any) -> bool:
        mine = getattr(method, axis)
        if axis in ("frozen", "full"):
            return frozenset(value) <= frozenset(mine)
        if axis == "lr":
            return dict(value).keys() <= dict(mine).keys()
        if axis == "rules":
            return {type(rule) for rule in value} <= {type(rule) for rule in mine}
        return type(mine) is type(value) if axis != "dropout" else True

    return all(has(axis, value) for axis, value in components.items())


class _PresetUnion:
    """The union of components from several sources: presets by their names, and "you" for explicit arguments."""

    def __init__(self) -> None:
        self.components: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.problems: list[Diagnostic] = []

    def add(self, source: str, components: Mapping[str, Any]) -> None:
        """Add a source's components. They replace LoRA's, which are the defaults."""
        for axis, value in components.items():
            old, before = self.components.get(axis), self.sources.get(axis, "lora")
            if axis == "lr" and old is not None:
                twice = sorted(set(dict(old)) & set(dict(value)))
                self.problems += [Diagnostic("lr", f"{before} and {source} both set the rate of {r}") for r in twice]
                value = dict(old) | dict(value)
            elif axis in ("frozen", "full") and old and (redundant := _redundant(axis, before, old, source, value)):
                self.problems.append(redundant)
            elif old is not None and axis in _UNITES:
                value = _UNITES[axis](old, value)
            elif before != "lora":
                if old == value:
                    continue
                both = f"{_brief(old, value)} and {_brief(value, old)}"
                what = f"{before} and {source} both choose {_CHOICE[axis]}: {both}"
                self.problems.append(Diagnostic(axis, what, "leave one of the two out"))
                continue
            self.components[axis] = value
            self.sources[axis] = source if before == "lora" else f"{before} + {source}"


def _sets(source: str, component: Any) -> str:
    """`lora sets Kaiming`, `you set Kaiming`."""
    return f"{source} {'set' if source == 'you' else 'sets'} {component}"


def _brief(component: Any, other: Any) -> Any:
    """A component's name, if that distinguishes it from the other one."""
    distinct = type(component) is not type(other) and COMPONENTS.get(type(component).__name__) is type(component)
    return type(component).__name__ if distinct else component


def _redundant(axis: str, before: str, old: Any, source: str, value: Any) -> Diagnostic | None:
    """The error of a source that adds nothing to the other one, in either order."""
    for less, some, more, everything in ((source, value, before, old), (before, old, source, value)):
        if axis == "frozen" and frozenset(some) <= frozenset(everything):
            what = f"{less} freezes {braces(some)}, and so does {more}"
        elif axis == "full" and "*" in everything:
            what = f"{less} trains {', '.join(some)}, and {more} trains everything"
        else:
            continue
        return Diagnostic(axis, what, "leave it out: it would change nothing")
    return None
