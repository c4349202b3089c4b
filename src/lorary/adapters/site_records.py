"""Sites as JSON and back: what `lorary.json` says about where an adapter sits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, cast

from lorary.adapters import tied_sites
from lorary.errors import Diagnostic, MethodError
from lorary.files.findings import Findings
from lorary.files.safetensors_header import MOST_EXTENT
from lorary.files.strict_json import show
from lorary.layers.kinds import KINDS
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, with_rank
from lorary.spec.site import Part, Site

_MOST_SITES = 20_000
_VARIED = ("kept", "past")  # what a delta may have differently at each site, beside its rank
_EXTRA = {"r", "alpha", *_VARIED, "method", "share"}
_NEEDED = {"name", "kind", "out_features", "in_features", "bias"}


def site_record(p: AdaptedSite, method: Method) -> dict[str, Any]:
    """A site as plain data: its fields that are not at their defaults, and how its method differs from `method`."""
    defaults = {f.name: f.default for f in fields(Site)}
    record = {k: v for k, v in asdict(p.site).items() if k in _NEEDED or v != defaults[k]}
    return record | _own(p, method) | ({"share": p.share} if p.share else {})


def _own(p: AdaptedSite, method: Method) -> dict[str, Any]:
    """How a site's method differs: in its rank, its alpha, what is left there or came before alone; or as a whole."""
    if p.method == method:
        return {}
    if (type(p.delta), type(p.method.scale)) != (type(method.delta), type(method.scale)):
        return {"method": p.method.to_dict()}
    own: dict[str, Any] = {}
    if p.r != getattr(method.delta, "r", None):
        own["r"] = p.r
    if p.alpha is not None and p.alpha != getattr(method.scale, "alpha", None):
        own["alpha"] = p.alpha
    for name in _VARIED:
        if (value := getattr(p.delta, name, None)) != getattr(method.delta, name, None):
            own[name] = value
    return own if _varied(method, own) == p.method else {"method": p.method.to_dict()}


def read_sites(records: list[Any], findings: Findings) -> list[Site]:
    """The sites that `site_record` wrote; every malformed one becomes a finding."""
    if len(records) > _MOST_SITES:
        findings.fatal.append(Diagnostic("lorary.json: sites", f"{len(records):,}, more than {_MOST_SITES:,}"))
        return []
    sites: dict[str, Site] = {}
    for i, record in enumerate(records):
        try:
            found = _site(record)
            if found.name in sites:
                raise ValueError(f"{show(found.name)} is there twice")
            sites[found.name] = found
        except ValueError as error:
            findings.fatal.append(Diagnostic(f"lorary.json: sites[{i}]", str(error)))
    return list(sites.values())


def placed_from(sites: list[Site], records: list[Any], method: Method, findings: Findings) -> tuple[AdaptedSite, ...]:
    """The sites with their methods."""
    placed = []
    for found, record in zip(sites, records, strict=True):
        try:
            if method.delta is None:
                raise ValueError("the method has no delta, so it adapts no site")
            own = record.get("method")
            if own is None and "alpha" in record and not hasattr(method.scale, "alpha"):
                raise ValueError(f"its scale, {type(method.scale).__name__}, has no alpha")
            varied = Method.from_dict(own) if own is not None else _varied(method, record)
            there = AdaptedSite(found, varied, record.get("share", ""))
            findings.fatal += [Diagnostic(f"lorary.json: {found.name}", what) for what in _unfit(there)]
            placed.append(there)
        except MethodError as error:
            findings.fatal += [Diagnostic(f"lorary.json: {found.name}: {p.where}", p.what) for p in error.problems]
        except (ValueError, TypeError) as error:
            findings.fatal.append(Diagnostic(f"lorary.json: {found.name}", str(error)))
    findings.fatal += [Diagnostic(f"lorary.json: {p.where}", p.what) for p in tied_sites.problems(placed)]
    return tuple(placed)


def _unfit(p: AdaptedSite) -> list[str]:
    """Why a method cannot be at a site, as far as its tensors' shapes and its function are concerned."""
    return p.delta.problems(p.site) + p.join.problems(p.site)


def _varied(method: Method, own: Mapping[str, Any]) -> Method:
    varied = with_rank(method, own.get("r"), own.get("alpha"))
    words = {name: own[name] for name in _VARIED if name in own}
    for name, value in words.items():
        if not hasattr(varied.delta, name):
            raise ValueError(f"`{name}` is {show(value)}, and {type(varied.delta).__name__} has no such field")
    words = {name: tuple(value) if isinstance(value, list) else value for name, value in words.items()}
    return varied.replace(delta=replace(cast(Any, varied.delta), **words)) if words else varied


def _site(record: Any) -> Site:
    known = {f.name for f in fields(Site)} | _EXTRA
    if not isinstance(record, dict) or not _NEEDED <= set(record) <= known:
        raise ValueError(f"is {show(record)}; a site has the fields {', '.join(sorted(_NEEDED))}")
    name, kind, bias = record["name"], record["kind"], record["bias"]
    if not isinstance(name, str) or not isinstance(bias, bool):
        raise ValueError("`name` is a text and `bias` true or false")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{show(kind)} is no kind of site; they are {', '.join(KINDS)}")
    if "share" in record:
        tied_sites.named_share(record["share"])
    kernel = record.get("kernel_size", [])
    if not isinstance(kernel, list) or len(kernel) != {"conv1d": 1, "conv2d": 2, "conv3d": 3}.get(kind, 0):
        raise ValueError(f"the kernel size {show(kernel)} is not that of a {kind}")
    rows, columns, groups = (_count(record.get(key, 1), key) for key in ("out_features", "in_features", "groups"))
    kernel_size = tuple(_count(n, "kernel_size") for n in kernel)
    extent = math.prod(kernel_size)
    if columns % extent or rows % groups:
        raise ValueError(f"a kernel of {extent} and {groups} groups do not divide {columns} inputs and {rows} outputs")
    parts = record.get("parts", [])
    if not isinstance(parts, list):
        raise ValueError(f"`parts` is {show(parts)}")
    return Site(name, kind, rows, columns, bias, tuple(_part(part, rows) for part in parts), groups, kernel_size)


def _part(record: Any, out: int) -> Part:
    if not isinstance(record, dict) or set(record) != {f.name for f in fields(Part)}:
        raise ValueError(f"a part is {show(record)}")
    name, start, step = record["name"], record["start"], record["step"]
    size, count = _count(record["size"], "size"), _count(record["count"], "count")
    if not isinstance(name, str) or type(start) is not int or type(step) is not int or start < 0 or step < 0:
        raise ValueError(f"a part is {show(record)}")
    if start + step * (count - 1) + size > out or (count > 1 and step < size):
        raise ValueError(f"the part {show(name)} does not lie within {out} rows")
    return Part(name, start, size, step, count)


def _count(value: Any, key: str) -> int:
    if type(value) is not int or not 1 <= value <= MOST_EXTENT:
        raise ValueError(f"`{key}` is {show(value)}, no whole number of at least 1")
    return value
