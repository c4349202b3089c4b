"""Base parameters that train in full: those of a method's patterns, a new head, and weights that a rule writes."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lorary.errors import Diagnostic, MethodError, PlanError, did_you_mean, suggestion
from lorary.layers.wrappers import original_class
from lorary.model._presets import PRESETS
from lorary.model.checks import unwritable_weights
from lorary.model.patterns import matches
from lorary.model.plan import FullParameter
from lorary.model.scan import Scan, ScannedModule
from lorary.model.targets import TargetMatch, as_list, resolve
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, rules_of

_NEW_HEAD = re.compile(r"For((Sequence|Token|Image|Audio|Video)?Classification|QuestionAnswering|MultipleChoice)$")


HEADS = ("full", "frozen", "lora")


def full_parameters(
    scan: Scan, method: Method, sites: Sequence[AdaptedSite], head: str | None = None
) -> tuple[list[FullParameter], list[Diagnostic]]:
    """The base parameters that train in full or that an adapter holds, in the model's order, and every problem.

    Args:
        scan: of the model.
        method: the method.
        sites: the adapted sites.
        head: one of `HEADS`; None: a new head trains in full, except for the layers of it that are adapted.
    """
    problems: list[Diagnostic] = []
    trained: set[str] = set()
    for pattern, names in parameters_by_pattern(scan, method).items():
        if not names and not _covers_a_module(scan, pattern):
            problems.append(_no_parameter(pattern, list(scan.parameters)))
        trained |= names
    adapted = {scan.names[name] for name in _adapted_parameters(sites) & scan.names.keys()}
    drawn = head_parameters(scan) if has_new_head(scan) else set()
    if head == "full":
        trained |= head_parameters(scan)
    elif head != "frozen":
        trained |= drawn - adapted
    elif both := sorted(trained & head_parameters(scan)):
        problems.append(Diagnostic("head", f"is to be frozen, and `full` trains {', '.join(both)}", "choose one"))
    problems += [*_cannot_train(scan, sites, trained), *_cannot_hold(sites, drawn & adapted)]
    # The random weights under an adapter in a new head are part of the result: no checkpoint has them.
    written = {p.site.weight_name for p in sites if any(rule.writes_base for rule in p.method.rules)}
    written |= drawn & adapted
    problems += unwritable_weights(scan, rules_of(sites), written)
    moving = _trained_buffers(scan, method, trained)
    full = [
        FullParameter(name, tuple(t.shape), t.numel() * t.element_size(), name in trained)
        for name, t in (dict(scan.parameters) | moving).items()
        if name in trained | written | moving.keys()
    ]
    return full, problems


def method_with_full(method: Method, full: Sequence[Any]) -> Method:
    """The method that trains these as well.

    Raises:
        PlanError: they are not patterns, or leave nothing for the adapters to learn.
    """
    try:
        return method.replace(full=tuple(dict.fromkeys((*method.full, *full)))) if full else method
    except (MethodError, TypeError) as error:
        problems = error.problems if isinstance(error, MethodError) else [Diagnostic("full", str(error))]
        raise PlanError("invalid plan:", problems) from None


def without_full_layers(
    scanned: Scan, found: list[TargetMatch], targets: str | Sequence[str], method: Method
) -> list[TargetMatch]:
    """The matches without layers that train in full, unless a target names them: that is refused later."""
    trained = set().union(*parameters_by_pattern(scanned, method).values())
    inside = [f for f in found if scanned.names.get(f.name, scanned.names.get(f"{f.name}.weight")) in trained]
    if not inside:
        return found
    named = [entry for entry in as_list(targets) if entry not in PRESETS]
    kept = {f.name for f in resolve(scanned, named)[0]} if named else set()
    return [f for f in found if f not in inside or f.name in kept]


def has_new_head(scan: Scan) -> bool:
    """Whether the model's class has a head that Transformers draws at random unless a checkpoint holds it."""
    return _NEW_HEAD.search(original_class(scan.model).__name__) is not None


def head_parameters(scan: Scan) -> set[str]:
    """The parameters of the output head."""
    inside = tuple(f"{head}." for head in scan.heads)
    return {first for name, first in scan.names.items() if name.startswith(inside)}


def head_layers(scan: Scan) -> list[str]:
    """The paths of the head's linear layers that can be adapted."""
    return [path for path in scan.layers if path in scan.heads and scan.modules[path].kind in ("linear", "transposed")]


def head_problems(scan: Scan, method: Method, head: Any) -> list[Diagnostic]:
    """Why a model's head cannot train as it is said."""
    if head is None:
        return []
    if head not in HEADS:
        hint = did_you_mean(head, HEADS) if isinstance(head, str) else f"known: {', '.join(HEADS)}"
        return [Diagnostic("head", f"{head!r} is not a way to train a head", hint)]
    name = original_class(scan.model).__name__
    if not scan.heads:
        return [Diagnostic("head", f"a {name} has no output head", "leave it out")]
    if head == "lora" and method.delta is None:
        return [Diagnostic("head", "`lora` adapts the head, and this method adapts no layer", "use full or frozen")]
    if head == "lora" and not head_layers(scan):
        known = ", ".join(sorted(scan.heads))
        return [Diagnostic("head", f"the head of {name} ({known}) has no linear layer to adapt", "use head: full")]
    return _tied_head(scan, name) if head == "full" else []


def _tied_head(scan: Scan, name: str) -> list[Diagnostic]:
    """A head that is another layer's weight: training it alone is impossible."""
    own = {scan.names[f"{path}.weight"] for path in scan.heads if f"{path}.weight" in scan.names}
    others = sorted({parameter.rpartition(".")[0] for parameter in own} - scan.heads)
    what = f"the head of {name} is the weight of {', '.join(others)}: both would train"
    return [Diagnostic("head", what, f'say so with full=["{others[0]}"], or use head: lora')] if others else []


def _adapted_parameters(sites: Sequence[AdaptedSite]) -> set[str]:
    return {p.site.weight_name for p in sites} | {f"{p.site.name}.bias" for p in sites if p.changes_bias}


def _cannot_hold(sites: Sequence[AdaptedSite], held: Collection[str]) -> list[Diagnostic]:
    """Why an init cannot start inside a new head: it moves the weight that the adapter has to hold."""
    what = "is a layer of a new head, whose random weight the adapter holds, and this init changes that weight"
    return [
        Diagnostic(p.site.name, what, "leave it out of `targets`: the head then trains in full")
        for p in sites
        if p.init.residual_init and p.site.weight_name in held
    ]


def _trained_buffers(scan: Scan, method: Method, trained: Collection[str]) -> dict[str, Tensor]:
    """The buffers that train: of modules that a pattern covers, and beside a weight that trains."""
    patterns = [pattern for pattern in method.full if pattern not in ("norms", "embeddings")]

    def trains(name: str) -> bool:
        path = name.rpartition(".")[0]
        module = scan.modules[path]
        weights = (own for own, _ in module.module.named_parameters(path, recurse=False) if not own.endswith(".bias"))
        return (
            any(own in trained for own in weights)
            or any(_covers(pattern, path) for pattern in patterns)
            or ("norms" in method.full and _is_norm(module))
        )

    return {name: buffer for name, buffer in scan.buffers.items() if trains(name)}


def parameters_by_pattern(scan: Scan, method: Method) -> dict[str, set[str]]:
    """Pattern of `full` -> the parameters that it matches, tied ones by their first name."""
    kinds = _names_by_kind(scan) if method.full else {}
    return {
        pattern: kinds.get(pattern, set()) | {first for name, first in scan.names.items() if _covers(pattern, name)}
        for pattern in method.full
    }


def _names_by_kind(scan: Scan) -> dict[str, set[str]]:
    """The parameters of `embeddings` and `norms`, two patterns for the type of a layer instead of its name."""
    found: dict[str, set[str]] = {"embeddings": set(), "norms": set()}
    for path, m in scan.modules.items():
        own = dict(m.module.named_parameters(path, recurse=False))
        if m.kind == "embedding":
            found["embeddings"] |= {scan.names[name] for name in own}
        elif _is_norm(m) and all(t.dim() <= 1 for t in own.values()):
            found["norms"] |= {scan.names[name] for name in own}
    return found


def _is_norm(m: ScannedModule) -> bool:
    return "norm" in type(m.module).__name__.lower()


def _covers(pattern: str, name: str) -> bool:
    """Whether a pattern matches this parameter, or a module that holds it."""
    components = name.split(".")
    return any(matches(pattern, ".".join(components[: i + 1])) for i in range(len(components)))


def _covers_a_module(scan: Scan, pattern: str) -> bool:
    """Whether a pattern without parameters covers a module that may have none: a norm, or one with buffers alone."""
    if pattern == "norms":
        return any(map(_is_norm, scan.modules.values()))
    return any(_covers(pattern, name.rpartition(".")[0]) for name in scan.buffers)


def _no_parameter(pattern: str, names: list[str]) -> Diagnostic:
    if pattern == "bias":
        what = "this model has no biases to train (Llama-like models have none)"
        return Diagnostic("full", what, "use another method")
    known = names + list({".".join(name.split(".")[-2:]) for name in names})
    return Diagnostic("full", f"`{pattern}` matches no parameter", suggestion(pattern, known))


def _cannot_train(scan: Scan, sites: Sequence[AdaptedSite], trained: Collection[str]) -> list[Diagnostic]:
    """Why some of these parameters cannot train in full: adapted, quantised or not floating-point."""
    problems = []
    adapted = _adapted_parameters(sites)
    for name in sorted({scan.names[name] for name in adapted & scan.names.keys()} & set(trained)):
        what = "is adapted and would train in full as well: the adapter would be redundant"
        new = has_new_head(scan) and name in head_parameters(scan)
        fix = "leave it out of `targets`" if new else "exclude the site, or narrow `full`"
        problems.append(Diagnostic(name, what, fix))
    for name in sorted(trained):
        path, _, last = name.rpartition(".")
        if last != "bias" and scan.is_quantised(path):
            problems.append(Diagnostic(name, "is quantised and cannot train in full", "leave it out of `full`"))
        elif not torch.is_floating_point(scan.parameters[name]):
            problems.append(Diagnostic(name, f"is {scan.parameters[name].dtype} and cannot train in full"))
    return problems
