"""The tensors that a file should hold, against those that it does: from the header alone, before any is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from lorary.errors import Diagnostic, nearest
from lorary.files.findings import Findings
from lorary.files.safetensors_header import Entry
from lorary.files.strict_json import named


def compare_tensors(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Entry],
    findings: Findings,
    explain: Callable[[str], str],
    vital: Collection[str] = (),
) -> list[str]:
    """The names that are both expected and there in the right shape; all else becomes a finding.

    Args:
        expected: name -> shape.
        found: what the file's header announces.
        findings: where it goes: a wrong shape is fatal, a missing or left-over tensor is what PEFT tolerates.
        explain: what a left-over name is, for the message.
        vital: the names that nothing can stand for: where one is missing, that is fatal too.
    """
    left_over = [name for name in found if name not in expected]
    usable = []
    for name, shape in expected.items():
        entry = found.get(name)
        if entry is None:
            near = nearest(name, left_over, most=1)
            fix = f"the file has {named(near[0])}" if near else ""
            missing = findings.fatal if name in vital else findings.tolerable
            missing.append(Diagnostic(named(name), "is missing", fix))
        elif entry.shape != shape:
            what = f"has the shape {list(entry.shape)}, expected {list(shape)}"
            fix = "it is transposed" if entry.shape == shape[::-1] else ""
            findings.fatal.append(Diagnostic(named(name), what, fix))
        else:
            usable.append(name)
    findings.tolerable += [Diagnostic(named(name), explain(name)) for name in left_over]
    return usable


def mixed_dtypes(found: Mapping[str, Entry]) -> list[str]:
    """A note where a file's tensors are not all of one dtype."""
    dtypes = sorted({entry.dtype for entry in found.values()})
    return [f"its tensors are of several dtypes: {', '.join(dtypes)}"] if len(dtypes) > 1 else []
