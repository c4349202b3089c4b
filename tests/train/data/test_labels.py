"""The labels of a classification: their names and order."""

from __future__ import annotations

import pytest

from lorary.train.data.labels import find_labels
from lorary.train.data.task_rows import read_labelled


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["²", "x"], ("x", "²")),  # digits for `str.isdigit` alone
        (["٣", "2"], ("2", "٣")),
        (["--5", "5"], ("5", "--5")),
        (["9" * 5000, "1"], ("1", "9" * 5000)),  # more digits than Python converts
        ([1, 0.5], ()),  # numbers
    ],
)
def test_order(given: list[str | float], names: tuple[str, ...]) -> None:
    rows = [read_labelled({"text": "a", "label": label}, "row") for label in given]
    found = find_labels(rows, [], None, None)
    assert found.names == names
    encoded = [found.encode(row.label) for row in rows]
    assert encoded == ([found.names.index(str(label)) for label in given] if names else given)
