"""The reader of other tools' factors: one for every format that has a LoRA or a DoRA for each layer.

A format says which layers its file adapts, with which method, and where and how the file stores the tensor of each
role; the sites, the shapes, the values and the names that remain are checked here. Messages have the file's own names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lorary.adapters.adapter import Adapter
from lorary.adapters.module_paths import ModulePaths
from lorary.adapters.peft.reader import site_of_shapes
from lorary.adapters.peft.types import PEFT_TYPES, PeftType
from lorary.adapters.tensor_checks import Layout, alert_if_zero, expected_tensors, read_tensors, site_tensors
from lorary.errors import Diagnostic, FileError, nearest
from lorary.files.findings import Findings
from lorary.files.strict_json import named
from lorary.files.tensor_file import Entry, TensorSource
from lorary.methods.dora import MagnitudeDirection
from lorary.methods.lora import Add, AlphaOverRank, Kaiming, LowRank
from lorary.model.base import Base
from lorary.model.fingerprint import Fingerprint
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Site

Shape = tuple[int, ...]
_EXPERTS = "adapts fused experts, which only PEFT's files are read for"


class View(NamedTuple):
    """How a file stores a tensor.

    Args:
        shape: the shape in the file of a shape here, which is its own inverse.
        read: the tensor here of the one in the file.
    """

    shape: Callable[[Shape], Shape]
    read: Callable[[Tensor], Tensor]


PLAIN = View(lambda shape: shape, lambda t: t)
TRANSPOSED = View(lambda shape: shape[::-1], lambda t: t.t().contiguous())


def rows_in_order(order: Tensor) -> View:
    """The rows of a tensor, of which a file has row `i` at `order[i]`."""
    return View(lambda shape: shape, lambda t: t[order])


@dataclass(frozen=True)
class Stored:
    """Where a file has a tensor, and how."""

    name: str
    view: View = PLAIN


@dataclass(frozen=True)
class Layer:
    """A layer that a file adapts.

    Args:
        path: its path in the file, or already the base's.
        method: its method, with the layer's own rank and scale.
        stored: role -> where the file has it.
        embedding: whether it is an embedding, which only the names say where there is no base.
    """

    path: str
    method: Method
    stored: Mapping[str, Stored]
    embedding: bool = False


def plain_method(rank: int, alpha: float, *, dora: bool = False) -> Method:
    """LoRA, or DoRA, of a rank and a scale alpha / rank."""
    return Method(LowRank(rank), Kaiming(), AlphaOverRank(alpha), MagnitudeDirection() if dora else Add())


def group(names: Iterable[str], leaves: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """layer -> role -> name, of the names that end in a leaf."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        for leaf, role in leaves.items():
            if name.endswith(leaf):
                found.setdefault(name.removesuffix(leaf), {})[role] = name
                break
    return found


def complete(
    grouped: Mapping[str, Mapping[str, str]], leaves: Mapping[str, str], findings: Findings
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The layers of `group` that have both factors; of the others, what is missing."""
    for path, roles in grouped.items():
        if {"A", "B"} <= roles.keys():
            yield path, roles
            continue
        for role in ("A", "B"):
            if role not in roles and roles.keys() & {"A", "B"}:
                leaf = next(leaf for leaf, r in leaves.items() if r == role)
                what = "is missing, and its partner is useless alone"
                findings.fatal.append(Diagnostic(named(path + leaf), what))


def read_layers(
    file: TensorSource,
    layers: Sequence[Layer],
    base: Base | None,
    findings: Findings,
    explain: Callable[[str], str] = lambda name: "is not a tensor of this adapter",
    *,
    known: Iterable[str] = (),
    base_name: str = "",
) -> Adapter:
    """The adapter of these layers.

    Args:
        file: the open file.
        layers: the layers.
        base: the base, if at hand.
        findings: collects the problems.
        explain: describes a tensor that belongs to no layer.
        known: the names of tensors that the format has used already, such as alphas.
        base_name: the name of the base, if the file has it.

    Raises:
        FileError: every reason why it cannot be used.
    """
    placed = _placed(layers, base, file, findings)
    if not placed.layers and not findings.fatal:
        findings.fatal.append(Diagnostic(file.name, "holds no factors of any layer"))
    if findings.fatal:
        findings.raise_refused()
    sites, used = placed.sites, set(known)
    expected, vital = expected_tensors(sites, placed.layout, {})
    names = {name: name for name in file.header.tensors if name not in used}
    values = read_tensors(file, names, expected, findings, explain, vital | set(expected), ())
    tensors = site_tensors(sites, values, expected, placed.decode, {}, findings)
    alert_if_zero(sites, tensors, findings)
    method = Counter(a.method for a in sites).most_common(1)[0][0]
    return Adapter(method, sites, tensors, {}, Fingerprint(name=base_name), findings.conclude())


@dataclass(frozen=True)
class _Placed:
    """The layers of a file at the sites of a base.

    Args:
        layers: site -> the site and its layer.
        entries: the tensors of the file.
    """

    layers: Mapping[str, tuple[Site, Layer]]
    entries: Mapping[str, Entry]

    @property
    def sites(self) -> tuple[AdaptedSite, ...]:
        return tuple(AdaptedSite(site, layer.method) for site, layer in self.layers.values())

    def layout(self, adapted: AdaptedSite) -> Layout:
        """The names and shapes of a site's tensors in the file."""
        stored, found = self.layers[adapted.site.name][1].stored, {}
        for role, (_, shape) in _peft_layout(adapted).items():
            there = stored[role]
            shape = (adapted.site.out_features,) if role == "m" else shape
            expected, written = there.view.shape(shape), self.entries[there.name].shape
            alike = there.view is PLAIN and _without_ones(written) == _without_ones(expected)
            found[role] = there.name, written if alike else expected
        return found

    def decode(self, adapted: AdaptedSite, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """role -> tensor of a site."""
        stored, layout = self.layers[adapted.site.name][1].stored, _peft_layout(adapted)
        here = {role: at.view.read(tensors[at.name]) for role, at in stored.items() if role in layout}
        own = {name: here[role].reshape(shape) for role, (name, shape) in layout.items()}
        magnitudes = {"m": here["m"].reshape(adapted.shapes["m"])} if "m" in here else {}
        return peft_type_of_delta(adapted.method).decode(adapted, own) | magnitudes


def peft_type_of_delta(method: Method) -> PeftType:
    """The PEFT type with the tensors of a method's delta, whatever its join."""
    return next(t for t in PEFT_TYPES.values() if any(delta is type(method.delta) for delta, _ in t.methods))


def _peft_layout(adapted: AdaptedSite) -> Layout:
    """role -> (name, shape) of a site's tensors as PEFT writes them, magnitudes included."""
    found = peft_type_of_delta(adapted.method).layout(adapted)
    return {"m": (f"{adapted.site.name}.m", adapted.shapes["m"])} | found if "m" in adapted.shapes else found


def _placed(layers: Sequence[Layer], base: Base | None, file: TensorSource, findings: Findings) -> _Placed:
    """The layers at their sites; those without one become findings."""
    paths, placed = ModulePaths(base), dict[str, tuple[Site, Layer]]()
    for layer in layers:
        with findings.gathering():
            path = paths.here(paths.without_wrappers(layer.path), layer=True)
            site = _site(path, layer, base, file)
            if path in placed:
                what = f"is for {path}, and so is {placed[path][1].stored['A'].name}"
                raise FileError("", [Diagnostic(named(layer.stored["A"].name), what)])
            placed[path] = site, layer
    findings.fatal += [*paths.problems, *paths.ambiguous.values()]
    findings.notes += paths.notes()
    return _Placed(placed, file.header.tensors)


def _site(path: str, layer: Layer, base: Base | None, file: TensorSource) -> Site:
    """The site of a layer: the base's, or what the shapes of its factors say.

    Raises:
        FileError: there is none.
    """
    if isinstance(layer.method.join, MagnitudeDirection) and "m" not in layer.stored:
        raise FileError("", [Diagnostic(named(layer.path), "has no magnitudes, which DoRA needs")])
    pair = [layer.stored[role] for role in ("A", "B") if role in layer.stored]
    shapes = [at.view.shape(file.header.tensors[at.name].shape) for at in pair]
    if any(len(shape) == 3 for shape in shapes):
        raise FileError("", [Diagnostic(named(path), _EXPERTS)])
    if base is None:
        if len(shapes[0]) != len(shapes[1]) or len(shapes[0]) not in (2, 4, 5):
            a, b = (list(file.header.tensors[layer.stored[role].name].shape) for role in ("A", "B"))
            raise FileError("", [Diagnostic(named(path), f"has factors of the shapes {a} and {b}")])
        return site_of_shapes(path, shapes[0], shapes[1], layer.embedding, False)
    if path not in base.kinds:
        near = nearest(path, base.kinds, most=1)
        fix = f"it has {named(near[0])}" if near else ""
        raise FileError("", [Diagnostic(named(path), "adapts a layer that the model does not have", fix)])
    site = base.site(path)
    peft_type = peft_type_of_delta(layer.method)
    if what := _EXPERTS if site.experts else peft_type.why_not_adaptable(site, base.modules[path]):
        raise FileError("", [Diagnostic(named(path), what)])
    return site


def _without_ones(shape: Shape) -> Shape:
    """A shape without the ones at its end: some tools write a linear layer's factors as a 1 x 1 convolution's."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
