"""`labels.json`: written and read, also through a relative path; damaged ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorary.adapters.label_names import LabelNames, read_label_names, write_label_names
from lorary.errors import FileError


def test_labels_are_read_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("adapter").mkdir()
    assert read_label_names(Path("adapter")) is None
    write_label_names(Path("adapter"), ("schlecht", "gut ü"), "single_label_classification")
    assert read_label_names(Path("adapter")) == LabelNames(("schlecht", "gut ü"), "single_label_classification")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "labels.json: labels: must be a list of names"),
        ('{"labels": []}', "labels.json: labels: must be a list of names"),
        ('{"labels": ["a", 1]}', "labels.json: labels: must be a list of names"),
        ('{"labels": ["a"], "problem_type": "guess"}', "labels.json: problem_type: is 'guess'; known: single_label"),
        ("{", "labels.json"),
    ],
)
def test_damaged_labels_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(FileError) as error:
        read_label_names(tmp_path)
    assert message in str(error.value)
