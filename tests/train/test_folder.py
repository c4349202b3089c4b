"""A run folder that something has damaged: told in words, or passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorary.errors import ConfigError
from lorary.train.config_file import from_dict
from lorary.train.folder import CONFIG, LOCK, METRICS, RunFolder


@pytest.mark.parametrize("rest", [b"[1]\n", b"3\n", b"{}\n", b'{"step": "x"}\n', b"\xff\xfe\n", b'{"step": 2, "lo'])
def test_the_history_ends_at_a_damaged_line(tmp_path: Path, rest: bytes) -> None:
    (tmp_path / METRICS).write_bytes(b'{"step": 1, "loss": 2.0}\n' + rest)
    folder = RunFolder(tmp_path)
    assert folder.history() == [{"step": 1, "loss": 2.0}]
    folder.go_back_to(1)
    assert (tmp_path / METRICS).read_bytes() == b'{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize("text", ["", "{{{", "- a\n", "[" * 5000, "\x00"])
def test_a_configuration_that_cannot_be_read_is_not_another_run(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG).write_text(text)
    config = from_dict({"model": "builtin:base", "data": "builtin:docstrings", "output": str(tmp_path)})
    with pytest.raises(ConfigError) as refusal, RunFolder(tmp_path).opened(config, resume=True, overwrite=False):
        pass
    assert [str(problem) for problem in refusal.value.problems] == [
        "config.resolved.yaml: is damaged: what was run here cannot be told\n"
        "      hint: restore it, or pass --overwrite to start again"
    ]


@pytest.mark.parametrize("text", ["", "[3]", '"x"', "{", "null"])
def test_a_lock_that_says_nothing_is_free(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    config = from_dict({"model": "builtin:base", "data": "builtin:docstrings", "output": str(tmp_path)})
    with RunFolder(tmp_path).opened(config, resume=False, overwrite=False):
        assert '"pid"' in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()
