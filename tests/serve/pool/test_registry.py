"""The registry: names, contents, requests in flight. Its adapters are small files, read as fast as they are written."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lorary
from lorary.errors import Diagnostic
from lorary.serve.forms.flat import Flat
from lorary.serve.interface import BusyError, UnknownAdapterError
from lorary.serve.pool.adapter_root import AdapterRoot, changed_at, invalid_name
from lorary.serve.pool.arena import PlainArena
from lorary.serve.pool.lease import Lease
from lorary.serve.pool.loader import Limits, Loader, folder_digest
from lorary.serve.pool.pool import Pool
from lorary.serve.pool.registry import Registry
from tests.serve.flats import flat, intact

DETERMINISTIC = settings(derandomize=True, deadline=None, database=None, max_examples=25)


class Numbers(Loader):
    """Adapters whose record is a number, which all of their tensors hold; or a reason to refuse them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nn.Linear(1, 1), **options)
        self.reads = 0
        self.gate = threading.Event()
        self.gate.set()

    def _read(self, folder: Path, name: str, within: Path | None) -> Flat:
        assert self.gate.wait(10)
        self.reads += 1
        text = (folder / "lorary.json").read_text()
        if text == "broken":
            raise lorary.FileError("", [Diagnostic("lorary.json", "is broken")])
        if text == "memory":
            raise MemoryError("no memory")
        return flat(folder_digest(folder), float(text), 6)


def write(folder: Path, text: str) -> None:
    """Replace an adapter's file in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "new").write_text(text)
    (folder / "new").replace(folder / "lorary.json")


@contextmanager
def serving(root: Path, *, host_bytes: int = 10**5, **options: Any) -> Iterator[Registry]:
    loader = Numbers(limits=options.pop("limits", None))
    pool = Pool(PlainArena(8192, 512), host_bytes=host_bytes)
    registry = Registry(pool, loader, root=AdapterRoot(root), **{"recheck": 0.0, **options})
    try:
        yield registry
    finally:
        loader.gate.set()
        registry.loader.close()


def uid(lease: Lease) -> str:
    return lease.future.result(timeout=10)


def reads(registry: Registry) -> int:
    assert isinstance(registry.loader, Numbers)
    return registry.loader.reads


def gate(registry: Registry) -> threading.Event:
    assert isinstance(registry.loader, Numbers)
    return registry.loader.gate


def holds(registry: Registry, lease: Lease, value: float) -> bool:
    """Whether a batch gets the content that a lease stands for."""
    form = registry.pool.bring(uid(lease))
    assert form is not None
    registry.pool.release(uid(lease))
    return intact(form, value)


# --- names ------------------------------------------------------------------------------------------------------------


def test_adapters_below_the_root_are_found_by_their_paths(tmp_path: Path) -> None:
    for name in ("a", "team/b", "team/deep/c", "team/deep/deeper/d"):
        write(tmp_path / name, "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / ".lorary-tmp-1").mkdir()
    with serving(tmp_path) as registry:
        assert [(card.name, card.state) for card in registry.cards()] == [
            *(("a", "on disk"), ("team/b", "on disk"), ("team/deep/c", "on disk"))
        ]
        lease = registry.lease("team/b")
        assert holds(registry, lease, 1)
        assert registry.card("team/b").state == "resident"
        write(tmp_path / "new", "2")
        shutil.rmtree(tmp_path / "a")
        assert [card.name for card in registry.cards()] == ["new", "team/b", "team/deep/c"]


def test_an_adapter_whose_record_comes_long_after_its_folder_is_listed(tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    os.utime(tmp_path, (1, 1))  # settled: a copy that takes minutes
    root = AdapterRoot(tmp_path)
    assert root.names() == []
    (tmp_path / "slow" / "adapter_config.json").write_text("{}")
    assert root.names() == ["slow"]


def test_a_root_that_has_not_changed_is_not_looked_through_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(20):
        write(tmp_path / f"a{i}", "1")
    write(tmp_path / "team" / "b", "1")
    for folder in (tmp_path, tmp_path / "team"):
        os.utime(folder, (1, 1))
    root, looked = AdapterRoot(tmp_path), list[Any]()
    names, original = root.names(), os.scandir

    def scandir(path: Any) -> Any:
        looked.append(path)
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert root.names() == names
    assert len(names) == 21
    assert looked == []
    write(tmp_path / "team" / "c", "1")
    assert root.names() == sorted([*names, "team/c"])
    assert len(looked) == 1


@pytest.mark.parametrize("path", ["", "no such folder", "a\0b", "x" * 5000, "file/below"])
def test_what_is_gone_has_no_time(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert changed_at(tmp_path) > 0
    assert changed_at(f"{tmp_path}/{path}" if path else path) == 0


def test_an_adapters_time_is_its_folders_before_and_after_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a", "1")
    os.utime(tmp_path / "a", (10**9, 10**9))
    with serving(tmp_path) as registry:
        assert [card.created for card in registry.cards()] == [10**9]
        registry.lease("a").future.result(10)
        assert registry.card("a").created == 10**9
        write(tmp_path / "a", "2")  # replaced: the folder's time goes on
        assert registry.card("a").created > 10**9
        shutil.rmtree(tmp_path / "a")
        assert registry.cards() == []


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/..", "../a", "/a", "a//b", "a/", "a\0", "a b", "a:b", "a,b", ".a", "é", "a/b/c/d", "a" * 201],
)
def test_odd_names_are_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path / "a", "1")
    assert invalid_name(name)
    with serving(tmp_path) as registry:
        with pytest.raises(UnknownAdapterError):
            registry.lease(name)
        with pytest.raises(lorary.FileError, match="name: "):
            registry.load(name, "a")
        assert reads(registry) == 0


@pytest.mark.parametrize("name", ["a", "A.b-c_1", "team/french", "a/b/c", "0"])
def test_plain_names_are_accepted(name: str) -> None:
    assert not invalid_name(name)


def test_an_unknown_name_has_the_nearest_as_a_hint(tmp_path: Path) -> None:
    write(tmp_path / "french", "1")
    with serving(tmp_path) as registry:
        uid(registry.lease("french"))
        with pytest.raises(UnknownAdapterError, match=r"no adapter has the name 'frensh'\n      hint: .*`french`"):
            registry.lease("frensh")


def test_a_run_folders_name_has_its_adapter_as_a_hint(tmp_path: Path) -> None:
    write(tmp_path / "run" / "adapter", "1")
    with serving(tmp_path) as registry, pytest.raises(UnknownAdapterError, match="hint: did you mean `run/adapter`"):
        registry.lease("run")


PATHS = ["..", "../a", "a/../../x", "/", "/etc", "a\0b", "x" * 5000, "", ".", "link", "link/inner", "loop"]


@pytest.mark.parametrize("path", PATHS)
def test_paths_outside_of_the_root_are_refused(path: str, tmp_path: Path) -> None:
    write(tmp_path / "outside" / "inner", "1")
    write(tmp_path / "outside", "1")
    root = tmp_path / "root"
    write(root / "a", "1")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root / "loop")
    with serving(root) as registry:
        with pytest.raises(lorary.FileError) as caught:
            registry.load("x", path)
        assert reads(registry) == 0
        assert registry.root is not None
        assert registry.root.find(path) is None
        assert "link" not in [card.name for card in registry.cards()]
        assert str(tmp_path) not in str(caught.value).replace(repr(path), "")


def test_a_server_without_a_root_loads_what_its_owner_names_only(tmp_path: Path) -> None:
    write(tmp_path / "a", "1")
    with serving(tmp_path) as registry:
        registry.root = None
        with pytest.raises(lorary.FileError, match="this server loads no adapters while it runs"):
            registry.load("a", str(tmp_path / "a"))
        assert registry.load("a", str(tmp_path / "a"), trusted=True).state == "ready"
        with pytest.raises(UnknownAdapterError):
            registry.lease("b")
        assert [card.name for card in registry.cards()] == ["a"]


@pytest.mark.parametrize("name", [None, 3, ["a"], {"a": 1}, b"a"])
def test_names_that_are_no_texts_are_unknown(name: Any, tmp_path: Path) -> None:
    write(tmp_path / "a", "1")
    with serving(tmp_path) as registry:
        with pytest.raises(UnknownAdapterError, match="not a text"):
            registry.lease(name)
        with pytest.raises(UnknownAdapterError, match="not a text"):
            registry.unload(name)


def test_names_that_are_taken_are_refused_unless_replaced(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, "1")
    write(tmp_path / "c", "2")
    with serving(tmp_path, reserved=["base"]) as registry:
        with pytest.raises(lorary.FileError, match="name: 'base' is the base's"):
            registry.load("base", "a")
        with pytest.raises(lorary.FileError, match="name: 'b' is that of another folder below the root"):
            registry.load("b", "a")
        registry.load("a", "a")
        with pytest.raises(lorary.FileError, match="name: 'a' is taken\n      hint: unload it first, or replace it"):
            registry.load("a", "b")
        with pytest.raises(lorary.FileError, match=r"name: 'a' is taken[\s\S]*'\.\.' is not below"):
            registry.load("a", "..")
        before = registry.card("a").uid
        assert registry.load("a", "c", replace=True).uid != before
        assert registry.load("again", "c").uid == registry.card("a").uid


# --- contents ---------------------------------------------------------------------------------------------------------


def test_requests_for_one_adapter_wait_for_one_reading(tmp_path: Path) -> None:
    write(tmp_path / "a", "1")
    with serving(tmp_path) as registry:
        gate(registry).clear()
        leases = [registry.lease("a") for _ in range(5)]
        assert not any(lease.future.done() for lease in leases)
        assert registry.card("a").state == "loading"
        leases[0].release()
        gate(registry).set()
        assert len({uid(lease) for lease in leases[1:]}) == 1
        assert leases[0].future.cancelled()
        assert reads(registry) == 1
        assert registry.card("a").state == "ready"
        assert registry.lease("a").future.done()


def test_new_bytes_are_a_new_content_and_equal_bytes_the_same(tmp_path: Path) -> None:
    write(tmp_path / "a", "1")
    with serving(tmp_path) as registry:
        first = registry.lease("a")
        assert holds(registry, first, 1)
        write(tmp_path / "a", "2")
        second = registry.lease("a")
        assert holds(registry, second, 2)
        assert holds(registry, first, 1)
        write(tmp_path / "a", "1")
        write(tmp_path / "b", "1")
        assert uid(registry.lease("a")) == uid(registry.lease("b")) == first.uid != second.uid


def test_files_written_twice_within_a_tick_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "a", "1")
    with serving(tmp_path) as registry:
        for i in range(1, 6):
            (tmp_path / "a" / "lorary.json").write_text(str(i))  # in place: the inode and the size stay
            lease = registry.lease("a")
            assert holds(registry, lease, i)
            lease.release()


def test_unloading_ends_the_name_at_once_and_the_content_with_its_last_request(tmp_path: Path) -> None:
    write(tmp_path / "a", "1")
    with serving(tmp_path) as registry:
        one, two = registry.lease("a"), registry.lease("a")
        content = uid(one)
        uid(two)
        registry.unload("a")
        with pytest.raises(UnknownAdapterError):
            registry.lease("a")
        assert registry.cards() == []
        assert registry.statistics()["draining"] == 1
        assert holds(registry, two, 1)
        one.release()
        one.release()
        assert holds(registry, two, 1)
        two.release()
        assert content not in registry.pool
        assert registry.statistics() == {"names": 0, "reading": 0, "failed": 0, "draining": 0}
        with pytest.raises(UnknownAdapterError):
            registry.unload("a")
        assert registry.load("a", "a").state in ("ready", "resident")


def test_names_that_come_and_go_leave_nothing_behind(tmp_path: Path) -> None:
    write(tmp_path / "kept", "1")
    with serving(tmp_path) as registry:
        for i in range(20):
            registry.load(f"x{i}", "kept")
            registry.unload(f"x{i}")
            write(tmp_path / f"a{i}", str(i))
            uid(registry.lease(f"a{i}"))
            shutil.rmtree(tmp_path / f"a{i}")
        assert [card.name for card in registry.cards()] == ["kept"]
        assert registry.statistics()["names"] == 0
        assert not registry._unloaded
        assert registry.statistics()["draining"] == 20  # requests have them still


def test_unloading_while_it_is_read_leaves_its_requests_their_content(tmp_path: Path) -> None:
    write(tmp_path / "a", "1")
    with serving(tmp_path) as registry:
        gate(registry).clear()
        lease, gone = registry.lease("a"), registry.lease("a")
        registry.unload("a")
        gone.release()
        gate(registry).set()
        assert holds(registry, lease, 1)
        lease.release()
        assert registry.pool.statistics()["host"] == 0
        assert registry.statistics()["draining"] == 0


def test_a_replaced_adapter_serves_its_requests_in_flight(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "2")):
        write(tmp_path / name, text)
    with serving(tmp_path) as registry:
        registry.load("x", "a", pinned=True)
        old = registry.lease("x")
        registry.load("x", "b", replace=True)
        new = registry.lease("x")
        assert holds(registry, old, 1)
        assert holds(registry, new, 2)
        old.release()
        assert old.uid not in registry.pool


def test_a_broken_adapter_fails_its_requests_until_its_files_change(tmp_path: Path) -> None:
    write(tmp_path / "a", "broken")
    write(tmp_path / "b", "2")
    with serving(tmp_path) as registry:
        lease = registry.lease("a")
        with pytest.raises(lorary.FileError, match=r"cannot serve the adapter 'a':\n  - lorary\.json: is broken"):
            uid(lease)
        lease.release()
        with pytest.raises(lorary.FileError, match="is broken"):
            registry.lease("a")
        assert reads(registry) == 1
        assert registry.card("a").state == "failed"
        assert "is broken" in registry.card("a").error
        assert holds(registry, registry.lease("b"), 2)
        write(tmp_path / "a", "3")
        assert holds(registry, registry.lease("a"), 3)
        write(tmp_path / "a", "broken")
        with pytest.raises(lorary.FileError, match="is broken"):  # the old content never answers instead
            uid(registry.lease("a"))


def test_a_failure_of_the_machine_is_tried_again(tmp_path: Path) -> None:
    write(tmp_path / "a", "memory")
    with serving(tmp_path) as registry:
        for _ in range(2):
            with pytest.raises(lorary.FileError, match="cannot serve the adapter 'a':\n  - MemoryError: no memory"):
                uid(registry.lease("a"))
        assert reads(registry) == 2


def test_a_folder_that_goes_is_unknown_and_one_that_was_loaded_says_so(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, "1")
    with serving(tmp_path) as registry:
        registry.load("loaded", "b")
        uid(registry.lease("a"))
        shutil.rmtree(tmp_path / "a")
        shutil.rmtree(tmp_path / "b")
        with pytest.raises(UnknownAdapterError):
            registry.lease("a")
        with pytest.raises(lorary.FileError):
            uid(registry.lease("loaded"))
        write(tmp_path / "b", "5")
        assert holds(registry, registry.lease("loaded"), 5)


def test_a_link_that_is_turned_to_another_adapter_is_followed_and_never_out_of_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root / "v1", "1")
    write(root / "v2", "2")
    write(tmp_path / "outside", "3")
    (root / "latest").symlink_to("v1")
    with serving(root) as registry:
        assert holds(registry, registry.lease("latest"), 1)
        for target, value in (("v2", 2), ("../outside", None)):
            (root / "latest").unlink()
            (root / "latest").symlink_to(target)
            if value is None:
                with pytest.raises(UnknownAdapterError):
                    registry.lease("latest")
            else:
                assert holds(registry, registry.lease("latest"), value)


def test_adapters_that_left_the_host_are_read_again(tmp_path: Path) -> None:
    for i in range(4):
        write(tmp_path / f"a{i}", str(i))
    with serving(tmp_path, host_bytes=1000) as registry:  # two of 448 bytes
        contents = []
        for i in (0, 1, 2, 3, 0):
            lease = registry.lease(f"a{i}")
            assert holds(registry, lease, i)
            contents.append(lease.uid)
            lease.release()
        assert contents[0] == contents[-1]
        assert reads(registry) == 5
        assert registry.card("a1").state in ("on disk", "resident")
        held = [registry.lease("a0"), registry.lease("a1")]
        assert [len(uid(lease)) for lease in held] == [64, 64]
        with pytest.raises(BusyError, match="no room for the adapter now"):
            uid(registry.lease("a2"))
        held[0].release()
        assert holds(registry, registry.lease("a2"), 2)  # it was not the adapter's fault


def test_an_adapter_larger_than_the_memory_is_refused_by_its_name(tmp_path: Path) -> None:
    write(tmp_path / "a", "1")
    sentence = r"cannot serve the adapter 'a':\n  - it needs 464 bytes in memory, and at most 400 are there"
    with serving(tmp_path, host_bytes=400) as registry:
        for _ in range(2):
            with pytest.raises(lorary.FileError, match=sentence):
                uid(registry.lease("a"))
        assert reads(registry) == 1


def test_a_pinned_adapter_stays_in_memory(tmp_path: Path) -> None:
    for i in range(4):
        write(tmp_path / f"a{i}", str(i))
    with serving(tmp_path, host_bytes=1000) as registry:
        registry.load("a0", "a0", pinned=True)
        for i in (1, 2, 3):
            lease = registry.lease(f"a{i}")
            uid(lease)
            lease.release()
        assert registry.card("a0").uid in registry.pool
        registry.unload("a0")
        assert registry.pool.statistics()["host"] == 1


def test_too_many_readings_are_refused(tmp_path: Path) -> None:
    for i in range(4):
        write(tmp_path / f"a{i}", str(i))
    with serving(tmp_path, limits=Limits(waiting=3)) as registry:
        gate(registry).clear()
        leases = [registry.lease(f"a{i}") for i in range(3)]
        with pytest.raises(BusyError, match="3 adapters wait to be read"):
            registry.lease("a3")
        gate(registry).set()
        assert all(uid(lease) for lease in leases)
        assert uid(registry.lease("a3"))


# --- properties -------------------------------------------------------------------------------------------------------

STEPS = st.tuples(
    st.sampled_from(["write", "lease", "lease", "release", "unload", "load", "replace"]),
    st.integers(0, 2),
    st.integers(0, 3),
)


@given(st.lists(STEPS, min_size=5, max_size=25))
@DETERMINISTIC
def test_any_sequence_gives_each_request_the_content_of_its_moment(steps: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), host_bytes=3500) as registry:
        held, contents = list[tuple[Lease, int]](), dict[str, int]()
        texts = dict.fromkeys(range(3), 1)
        for i in texts:
            write(Path(folder, f"a{i}"), "1")
        for what, i, text in steps:
            name = f"a{i}"
            match what:
                case "write":
                    write(Path(folder, name), str(text))
                    texts[i] = text
                case "lease":
                    try:
                        lease = registry.lease(name)
                    except UnknownAdapterError:
                        continue
                    held.append((lease, texts[i]))
                    assert contents.setdefault(uid(lease), texts[i]) == texts[i]
                case "release" if held:
                    held.pop(text % len(held))[0].release()
                case "unload":
                    try:
                        registry.unload(name)
                    except UnknownAdapterError:
                        continue
                    with pytest.raises(UnknownAdapterError):
                        registry.lease(name)
                case "load" | "replace":
                    try:
                        registry.load(name, name, replace=what == "replace", pinned=text == 0)
                    except lorary.FileError:
                        assert what == "load"
            assert all(lease.uid in registry.pool and holds(registry, lease, value) for lease, value in held)
            assert registry.pool.statistics()["held"] == len({lease.uid for lease, _ in held})
        assert len(set(contents.values())) == len(contents)  # equal bytes, equal uid
        for lease, _ in held:
            lease.release()
        for card in registry.cards():
            registry.unload(card.name)
        assert registry.pool.make_room(16)
        figures = registry.pool.statistics()
        assert figures["host"] == figures["host_bytes"] == figures["held"] == figures["resident_bytes"] == 0
        assert registry.statistics() == {"names": 0, "reading": 0, "failed": 0, "draining": 0}


def test_threads_lease_load_and_unload_at_once(tmp_path: Path) -> None:
    for i in range(6):
        write(tmp_path / f"a{i}", str(i))
    failures = list[BaseException]()
    with serving(tmp_path, host_bytes=2500, recheck=0.01) as registry:

        def work(seed: int) -> None:
            draw = random.Random(seed)
            try:
                for _ in range(60):
                    i = draw.randrange(6)
                    match draw.randrange(8):
                        case 0:
                            registry.load(f"a{i}", f"a{i}", replace=True)
                        case 1:
                            registry.unload(f"a{i}")
                        case 2:
                            registry.cards()
                        case 3:
                            registry.lease(f"a{i}").release()
                        case _:
                            lease = registry.lease(f"a{i}")
                            assert uid(lease) == folder_digest(tmp_path / f"a{i}")
                            assert lease.uid in registry.pool
                            lease.release()
            except BaseException as error:  # a thread's failure is the test's
                if not isinstance(error, BusyError | UnknownAdapterError):
                    failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        registry.loader.close()  # all readings have ended
        for card in registry.cards():
            registry.unload(card.name)
        assert registry.pool.statistics()["held"] == registry.pool.statistics()["host"] == 0
        assert registry.statistics()["draining"] == 0
