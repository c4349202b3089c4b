"""Base parameters that train in full: those of a method's patterns, a new head, and weights that a rule writes."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lorary.errors import Diagnostic, suggestion
from lorary.layers.wrappers import original_class
from lorary.model.checks import unwritable_weights
from lorary.model.plan import FullParameter
from lorary.model.scan import Scan, ScannedModule
from lorary.model.targets import matches
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, rules_of

_NEW_HEAD = re.compile(r"For((Sequence|Token|Image|Audio|Video)?Classification|QuestionAnswering|MultipleChoice)$")


def full_parameters(
    scan: Scan, method: Method, sites: Sequence[AdaptedSite]
) -> tuple[list[FullParameter], list[Diagnostic]]:
    """The base parameters that train in full or that a rule writes, in the model's order, and every problem."""
    problems: list[Diagnostic] = []
    trained: set[str] = set()
    for pattern, names in parameters_by_pattern(scan, method).items():
        if not names and not _covers_a_module(scan, pattern):
            problems.append(_no_parameter(pattern, list(scan.parameters)))
        trained |= names
    if _NEW_HEAD.search(original_class(scan.model).__name__):
        trained |= {name for name in scan.parameters if name.startswith(tuple(f"{head}." for head in scan.heads))}
    problems += _cannot_train(scan, sites, trained)
    written = {f"{p.site.name}.weight" for p in sites if any(rule.writes_base for rule in p.method.rules)}
    problems += unwritable_weights(scan, rules_of(sites), written)
    moving = _trained_buffers(scan, method, trained)
    full = [
        FullParameter(name, tuple(t.shape), t.numel() * t.element_size(), name in trained)
        for name, t in (dict(scan.parameters) | moving).items()
        if name in trained | written | moving.keys()
    ]
    return full, problems


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
    adapted = {f"{p.site.name}.weight" for p in sites} | {f"{p.site.name}.bias" for p in sites if p.delta.changes_bias}
    for name in sorted({scan.names[name] for name in adapted & scan.names.keys()} & set(trained)):
        what = "is adapted and would train in full as well: the adapter would be redundant"
        problems.append(Diagnostic(name, what, "exclude the site, or narrow `full`"))
    for name in sorted(trained):
        path, _, last = name.rpartition(".")
        if last != "bias" and scan.is_quantised(path):
            problems.append(Diagnostic(name, "is quantised and cannot train in full", "leave it out of `full`"))
        elif not torch.is_floating_point(scan.parameters[name]):
            problems.append(Diagnostic(name, f"is {scan.parameters[name].dtype} and cannot train in full"))
    return problems
