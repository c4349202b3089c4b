"""The `sites` of `lorary.json`: adapted sites as JSON, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, cast

from lorary.adapters.shared_tensors import share_name, tie_problems
from lorary.errors import Diagnostic, MethodError
from lorary.files.findings import Findings
from lorary.files.strict_json import show
from lorary.files.tensor_file import MOST_EXTENT
from lorary.layers.kinds import KINDS
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, with_rank
from lorary.spec.site import Part, Site

_MOST_SITES = 20_000
_VARIED = ("kept", "past")  # fields of a delta that may differ between sites, beside the rank
_EXTRA = {"r", "alpha", *_VARIED, "method", "share"}
_NEEDED = {"name", "kind", "out_features", "in_features", "bias"}


def site_record(adapted: AdaptedSite, method: Method) -> dict[str, Any]:
    """A site as plain data: its fields that are not the defaults, and the differences of its method from `method`."""
    defaults = {f.name: f.default for f in fields(Site)}
    record = {k: v for k, v in asdict(adapted.site).items() if k in _NEEDED or v != defaults[k]}
    return record | _differences(adapted, method) | ({"share": adapted.share} if adapted.share else {})


def _differences(adapted: AdaptedSite, method: Method) -> dict[str, Any]:
    """The site's own rank, alpha, kept directions and earlier tasks, or else its whole method."""
    if adapted.method == method:
        return {}
    if (type(adapted.delta), type(adapted.method.scale)) != (type(method.delta), type(method.scale)):
        return {"method": adapted.method.to_dict()}
    own: dict[str, Any] = {}
    if adapted.r != getattr(method.delta, "r", None):
        own["r"] = adapted.r
    if adapted.alpha is not None and adapted.alpha != getattr(method.scale, "alpha", None):
        own["alpha"] = adapted.alpha
    for name in _VARIED:
        if (value := getattr(adapted.delta, name, None)) != getattr(method.delta, name, None):
            own[name] = value
    return own if _with_differences(method, own) == adapted.method else {"method": adapted.method.to_dict()}


def read_sites(records: list[Any], findings: Findings) -> list[Site]:
    """The sites of the records; every malformed record becomes a finding."""
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


def adapted_sites(sites: list[Site], records: list[Any], method: Method, findings: Findings) -> tuple[AdaptedSite, ...]:
    """The sites, each with its own method."""
    found = []
    for site, record in zip(sites, records, strict=True):
        where = f"lorary.json: {site.name}"
        try:
            adapted = AdaptedSite(site, _own_method(method, record), record.get("share", ""))
            what = adapted.delta.problems(site.one) + adapted.join.problems(site.one)
            what += _of_another_model(adapted.method, method)
            findings.fatal += [Diagnostic(where, w) for w in what]
            found.append(adapted)
        except MethodError as error:
            findings.fatal += [Diagnostic(f"{where}: {problem.where}", problem.what) for problem in error.problems]
        except (ValueError, TypeError) as error:
            findings.fatal.append(Diagnostic(where, str(error)))
    findings.fatal += [Diagnostic(f"lorary.json: {p.where}", p.what) for p in tie_problems(found)]
    return tuple(found)


def _of_another_model(own: Method, method: Method) -> list[str]:
    """What a site's method says of the whole model otherwise than the adapter's."""
    return [
        f"its {axis} is {getattr(own, axis)}, and the adapter's {getattr(method, axis)}"
        for axis in ("storage", "context", "full")
        if getattr(own, axis) != getattr(method, axis)
    ]


def _own_method(method: Method, record: Mapping[str, Any]) -> Method:
    if method.delta is None:
        raise ValueError("the method has no delta, so it adapts no site")
    if (own := record.get("method")) is not None:
        found = Method.from_dict(own)
        return found if found.full else found.replace(full=method.full)  # in files of 0.6 only the adapter says it
    if "alpha" in record and not hasattr(method.scale, "alpha"):
        raise ValueError(f"its scale, {type(method.scale).__name__}, has no alpha")
    return _with_differences(method, record)


def _with_differences(method: Method, record: Mapping[str, Any]) -> Method:
    varied = with_rank(method, record.get("r"), record.get("alpha"))
    own = {}
    for name in _VARIED:
        if name in record:
            value = record[name]
            if not hasattr(varied.delta, name):
                raise ValueError(f"`{name}` is {show(value)}, and {type(varied.delta).__name__} has no such field")
            own[name] = tuple(value) if isinstance(value, list) else value
    return varied.replace(delta=replace(cast(Any, varied.delta), **own)) if own else varied


def _site(record: Any) -> Site:
    known = {f.name for f in fields(Site)} | _EXTRA
    if not isinstance(record, dict) or not _NEEDED <= set(record) <= known:
        raise ValueError(f"is {show(record)}; a site has the fields {', '.join(sorted(_NEEDED))}")
    name, kind, bias = record["name"], record["kind"], record["bias"]
    if not isinstance(name, str) or not isinstance(bias, bool):
        raise ValueError("`name` is a text and `bias` true or false")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{show(kind)} is not a kind of site; the kinds are {', '.join(KINDS)}")
    if "share" in record:
        share_name(record["share"])
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
    experts = record.get("experts", 0)
    if type(experts) is not int or (experts < 1) == (kind == "experts") or experts > MOST_EXTENT:
        raise ValueError(f"`experts` is {show(experts)} at a site of kind {kind}")
    if type(swapped := record.get("swapped", False)) is not bool:
        raise ValueError(f"`swapped` is {show(swapped)}")
    if type(one_adapter := record.get("one_adapter", False)) is not bool or (one_adapter and not experts):
        raise ValueError(f"`one_adapter` is {show(one_adapter)} at a site of kind {kind}")
    parts = tuple(_part(part, rows) for part in parts)
    return Site(name, kind, rows, columns, bias, parts, groups, kernel_size, experts, swapped, one_adapter)


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
        raise ValueError(f"`{key}` is {show(value)}, not a whole number of at least 1")
    return value
