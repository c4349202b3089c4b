"""A run folder that something has damaged: told in words, or passed over."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lorary.errors import ConfigError, StateError
from lorary.train.config.load import from_dict
from lorary.train.runner.folder import CONFIG, LOCK, METRICS, RunFolder


@pytest.mark.parametrize("rest", [b"[1]\n", b"3\n", b"{}\n", b'{"step": "x"}\n', b"\xff\xfe\n", b'{"step": 2, "lo'])
def test_the_history_ends_at_a_damaged_line(tmp_path: Path, rest: bytes) -> None:
    (tmp_path / METRICS).write_bytes(b'{"step": 1, "loss": 2.0}\n' + rest)
    folder = RunFolder(tmp_path)
    assert folder.history() == [{"step": 1, "loss": 2.0}]
    folder.truncate_history(1)
    assert (tmp_path / METRICS).read_bytes() == b'{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize("text", ["", "{{{", "- a\n", "[" * 5000, "\x00"])
def test_a_configuration_that_cannot_be_read_is_not_another_run(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG).write_text(text)
    config = from_dict({"model": "builtin:base", "data": "builtin:docstrings", "output": str(tmp_path)})
    with pytest.raises(ConfigError) as refusal, RunFolder(tmp_path).opened(config, resume=True, overwrite=False):
        pass
    assert [str(problem) for problem in refusal.value.problems] == [
        "config.resolved.yaml: is damaged: it cannot be compared\n"
        "      hint: restore it, or pass --overwrite to start again"
    ]


@pytest.mark.parametrize("text", ["", "[3]", '"x"', "{", "null"])
def test_a_lock_that_says_nothing_is_free(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    config = from_dict({"model": "builtin:base", "data": "builtin:docstrings", "output": str(tmp_path)})
    with RunFolder(tmp_path).opened(config, resume=False, overwrite=False):
        assert '"pid"' in (tmp_path / LOCK).read_text()
    assert list(tmp_path.iterdir()) == []


HOLDER = """
import sys
from lorary.train.runner.folder import RunFolder
with RunFolder(sys.argv[1]).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StateError, match=f"process {process.pid} on {socket.gethostname()} trains here"):
            RunFolder(tmp_path).locked().__enter__()
        process.kill()
    assert (tmp_path / LOCK).exists(), "nobody could remove it"
    with RunFolder(tmp_path).locked():
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_lets_go(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path).locked():
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_machine_stays(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"pid": 4, "host": "another-machine"}')
    for _ in range(2):
        with pytest.raises(StateError, match="process 4 on another-machine trains here"):
            RunFolder(tmp_path).locked().__enter__()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
