"""Killed at any labelled point, or out of disk: the old bytes or the new ones, and nothing left lying about."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lorary.errors import FileError
from lorary.files.atomic import atomic_directory, atomic_file, recover, remove_stale
from lorary.files.manifest import verify_manifest, write_manifest
from lorary.files.syscalls import fault_point
from tests.files import writer

DIRECTORY_POINTS = (
    "directory.begin",
    "manifest.written",
    "directory.written",
    "directory.before-rename",
    "directory.after-rename",
)


def killed(path: Path, text: str, fault: str, **environment: str) -> int:
    """Writes in a process of its own, which dies at a fault point; returns its exit code."""
    everything = dict(os.environ) | {"LORARY_FAULT": f"{fault}:kill"} | environment
    command = [sys.executable, writer.__file__, str(path), text]
    return subprocess.run(command, env=everything, check=False).returncode


def text_of(path: Path) -> str:
    """What a folder holds: all of it the same, or an error."""
    text = str(verify_manifest(path)["text"])
    assert (path / "inner" / "a").read_text() == text == (path / "b").read_text()
    return text


def litter(parent: Path) -> list[str]:
    return sorted(p.name for p in parent.iterdir() if p.name.startswith(".lorary"))


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("point", [*DIRECTORY_POINTS, "directory.between-renames"])
def test_a_killed_writer_leaves_the_old_folder_or_the_new(
    point: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / "step"
    extra = {} if exchange else {"LORARY_NO_EXCHANGE": "1"}
    writer.write(path, "old")
    code = killed(path, "new", point, **extra)
    passes = point == "directory.between-renames" and exchange
    assert code == (0 if passes else -signal.SIGKILL)
    assert recover(path) == (point == "directory.between-renames" and not exchange)
    assert text_of(path) == ("new" if passes or point == "directory.after-rename" else "old")
    remove_stale(path.parent)
    for name, value in extra.items():
        monkeypatch.setenv(name, value)
    writer.write(path, "newest")
    assert text_of(path) == "newest"
    assert litter(path.parent) == []


@pytest.mark.parametrize("point", DIRECTORY_POINTS)
def test_a_killed_writer_of_a_new_folder_leaves_none_or_all(point: str, tmp_path: Path) -> None:
    path = tmp_path / "step"
    assert killed(path, "new", point) == -signal.SIGKILL
    if point == "directory.after-rename":
        assert text_of(path) == "new"
    else:
        assert not path.exists()
        assert len(litter(tmp_path)) == 1
    assert len(remove_stale(tmp_path)) == len([n for n in litter(tmp_path) if "tmp" in n]) + (not path.exists())
    assert litter(tmp_path) == []


@pytest.mark.parametrize("point", ["file.written", "file.before-rename", "file.after-rename"])
def test_a_killed_writer_leaves_the_old_file_or_the_new(point: str, tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    writer.write(path, "old")
    assert killed(path, "new", point) == -signal.SIGKILL
    assert path.read_text() == ("new" if point == "file.after-rename" else "old")
    remove_stale(tmp_path)
    assert litter(tmp_path) == []


@pytest.mark.parametrize("done", [["inner/a"], ["inner/a", "b"], ["inner/a", "b", "MANIFEST.json"]])
def test_written_in_place_the_same_kill_shows(done: list[str], tmp_path: Path) -> None:
    """The negative control: files written one by one leave a mixture, and `text_of` above sees it."""
    writer.write(tmp_path / "step", "old")
    writer.write(tmp_path / "new", "new")
    for name in done:
        os.replace(tmp_path / "new" / name, tmp_path / "step" / name)
    if len(done) == 3:
        assert text_of(tmp_path / "step") == "new"
    else:
        with pytest.raises(FileError, match="SHA-256 differs"):
            text_of(tmp_path / "step")


@pytest.mark.parametrize("point", ["directory.written", "directory.before-rename"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_what_was_there(
    point: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step"
    if existing:
        writer.write(path, "old")
    monkeypatch.setenv("LORARY_FAULT", f"{point}:enospc")
    with pytest.raises(FileError) as caught, atomic_directory(path, replace=True) as folder:
        (folder / "b").write_text("new")
    monkeypatch.delenv("LORARY_FAULT")
    assert re.sub(r"[\d,]+ bytes", "N bytes", str(caught.value)) == (
        f"cannot write {str(path)!r}; what was there before is unchanged\n"
        "  - no space left on device: N bytes are free\n"
        "      hint: free some space (or raise the quota or file-size limit) or choose another folder"
    )
    assert (text_of(path) == "old") if existing else not path.exists()
    assert litter(tmp_path) == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_the_kernel_cuts_short(tmp_path: Path) -> None:
    path, folder = tmp_path / "note.txt", tmp_path / "step"
    path.write_text("old")
    with largest_file(8192):
        with pytest.raises(FileError, match="file too large"), atomic_file(path) as file:
            file.write(b"x" * 100_000)
        with pytest.raises(FileError, match="file too large"), atomic_directory(folder) as inside:
            (inside / "a").write_bytes(b"x" * 100_000)
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["note.txt"]


def test_an_error_in_the_block_passes_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), atomic_directory(tmp_path / "step") as folder:
        fail_after_writing(folder / "a")
    with pytest.raises(KeyError, match="mine"), atomic_file(tmp_path / "a") as file:
        fail_after_writing(Path(file.name))
    assert list(tmp_path.iterdir()) == []


def fail_after_writing(path: Path) -> None:
    path.write_text("x")
    raise KeyError("mine")


def test_a_full_folder_is_refused_unless_it_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "step"
    writer.write(path, "old")
    with pytest.raises(FileError) as caught, atomic_directory(path):
        pytest.fail("the block must not be entered")
    assert str(caught.value) == (
        f"cannot write {str(path)!r}\n"
        "  - the folder is not empty: it holds 'MANIFEST.json'\n"
        "      hint: choose a new folder"
    )
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty") as folder:
        (folder / "a").write_text("x")
    assert (tmp_path / "empty" / "a").read_text() == "x"


def test_other_files_of_a_replaced_folder_can_stay(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.mkdir()
    for name in ("README.md", "old.bin", "a"):
        (path / name).write_text(f"old {name}")
    with atomic_directory(path, replace=True, keep=True, drop=["old.bin"]) as folder:
        (folder / "a").write_text("new a")
    assert {p.name: p.read_text() for p in path.iterdir()} == {"README.md": "old README.md", "a": "new a"}
    (path / "checkpoints").mkdir()
    with pytest.raises(FileError) as caught, atomic_directory(path, replace=True, keep=True):
        pytest.fail("the block must not be entered")
    assert "holds 'checkpoints', not a plain file" in str(caught.value)
    assert (path / "a").read_text() == "new a"


@pytest.mark.parametrize(
    ("target", "what"),
    [
        (".", "it is the working directory or contains it, and a replaced folder would take it away"),
        ("/", "it is the working directory or contains it, and a replaced folder would take it away"),
        ("file", "a file of this name is in the way"),
        ("file/below", "a part of this path is a file"),
        ("loop/below", "symbolic link|Symlink loop|symlink"),
        ("n" * 300, "file name too long"),
    ],
)
def test_paths_that_cannot_be_written(target: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(FileError, match=what), atomic_directory(target, replace=True):
        pytest.fail("the block must not be entered")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop"]


def test_a_living_writers_temporary_is_no_litter(tmp_path: Path) -> None:
    started, finish = threading.Event(), threading.Event()

    def writer() -> None:
        with atomic_directory(tmp_path / "step") as folder, atomic_file(tmp_path / "note") as file:
            (folder / "a").write_text("x")
            file.write(b"x")
            started.set()
            finish.wait(20)

    thread = threading.Thread(target=writer)
    thread.start()
    assert started.wait(20)
    (tmp_path / ".lorary-tmp-dead").mkdir()
    assert [p.name for p in remove_stale(tmp_path)] == [".lorary-tmp-dead"]
    finish.set()
    thread.join()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["note", "step"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_directory(tmp_path / "link", replace=True) as folder:
        (folder / "a").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "x"


def test_a_fault_point_is_inert_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fault_point("some.point")
    monkeypatch.setenv("LORARY_FAULT", "some.point:2:raise")
    fault_point("some.other")
    fault_point("some.point")
    with pytest.raises(RuntimeError, match="the fault asked for"):
        fault_point("some.point")
    monkeypatch.setenv("LORARY_FAULT", "a:explode")
    with pytest.raises(ValueError, match="kill, enospc or raise"):
        fault_point("a")


def damage(folder: Path, how: str) -> None:
    weights = folder / "inner" / "weights"
    if how == "one bit":
        data = bytearray(weights.read_bytes())
        data[5] ^= 1
        weights.write_bytes(bytes(data))
    elif how == "cut short":
        os.truncate(weights, 3)
    elif how == "removed":
        weights.unlink()
    elif how == "added":
        (folder / "extra").write_text("x")
    elif how == "a link":
        weights.rename(folder.parent / "elsewhere")
        weights.symlink_to(folder.parent / "elsewhere")
    elif how == "a linked folder":
        (folder / "inner").rename(folder.parent / "elsewhere")
        (folder / "inner").symlink_to(folder.parent / "elsewhere")
    elif how == "no manifest":
        (folder / "MANIFEST.json").unlink()
    else:
        (folder / "MANIFEST.json").write_text(how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("one bit", "'inner/weights': its contents are not those that were written (SHA-256 differs)"),
        ("cut short", "'inner/weights': 3 bytes, the manifest says 10"),
        ("removed", "'inner/weights': no such file or directory"),
        ("added", "extra: not in the manifest"),
        ("a link", "'inner/weights': not a plain file of this folder"),
        ("a linked folder", "'inner/weights': not a plain file of this folder"),
        ("no manifest", "MANIFEST.json: no such file or directory"),
        ("[]", "MANIFEST.json: not a manifest: it must have exactly the keys format, facts and files"),
        ('{"format": 1, "format": 1}', "MANIFEST.json: the key 'format' appears twice"),
        ('{"format": 9, "facts": {}, "files": {}}', "MANIFEST.json: manifest format 9; this version reads 1"),
        (
            '{"format": 1, "facts": {}, "files": {"../x": {"size": 1, "sha256": ""}}}',
            "MANIFEST.json: the file name '../x' leaves the folder",
        ),
        (
            '{"format": 1, "facts": {}, "files": {"/etc/passwd": {"size": 1, "sha256": ""}}}',
            "MANIFEST.json: the file name '/etc/passwd' leaves the folder",
        ),
    ],
)
def test_a_manifest_finds_damage(how: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "step"
    with atomic_directory(folder) as inside:
        (inside / "inner").mkdir()
        (inside / "inner" / "weights").write_bytes(b"0123456789")
        write_manifest(inside, {"step": 7})
    assert verify_manifest(folder) == {"step": 7}
    damage(folder, how)
    with pytest.raises(FileError) as caught:
        verify_manifest(folder)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{str(folder)!r} is not what its manifest says"
    assert f"  - {message}" in lines
    if how == "one bit":
        verify_manifest(folder, hashes=False)


# --- what a folder or file has beside its contents --------------------------------------------------------------------


def _attributes(path: Path) -> tuple[int, int, list[str]]:
    status = path.stat()
    names = os.listxattr(path) if hasattr(os, "listxattr") else []
    return status.st_mode, status.st_gid, [n for n in names if n.startswith("user.")]


@pytest.mark.parametrize("keep", [True, False])
def test_a_replacement_has_the_attributes_of_what_it_replaces(tmp_path: Path, keep: bool) -> None:
    target = tmp_path / "shared"
    with atomic_directory(target) as folder:
        (folder / "weights").write_bytes(b"1")
    for path, mode in ((target, 0o2770), (target / "weights", 0o640)):
        os.chmod(path, mode)
        if os.geteuid() == 0:
            os.chown(path, -1, 4321)
            os.chmod(path, mode)
        with contextlib.suppress(OSError, AttributeError):  # a file system without them
            os.setxattr(path, "user.project", b"x")
    before = _attributes(target), _attributes(target / "weights")
    with atomic_directory(target, replace=True, keep=keep) as folder:
        (folder / "weights").write_bytes(b"2")
        (folder / "new").write_bytes(b"3")
    assert (_attributes(target), _attributes(target / "weights")) == before
    assert stat.S_IMODE((target / "new").stat().st_mode) & 0o111 == 0
    with atomic_file(target / "weights") as file:
        file.write(b"4")
    assert _attributes(target / "weights") == before[1]
    assert (target / "weights").read_bytes() == b"4"


def test_the_error_of_a_full_disk_does_not_name_a_folder_in_the_making(tmp_path: Path) -> None:
    with (
        largest_file(8192),
        pytest.raises(FileError) as caught,
        atomic_directory(tmp_path / "out") as outer,
        atomic_directory(outer, replace=True) as inner,
    ):
        (inner / "a").write_bytes(b"x" * 100_000)
    assert caught.value.headline == f"cannot write '{tmp_path}'; what was there before is unchanged"
    assert list(tmp_path.iterdir()) == []
