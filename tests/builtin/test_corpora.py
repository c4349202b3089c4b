"""The built-in data sets: the same records in every process, split by file, and honest about what is missing."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest

from lorary.builtin import corpora, sources, syntax
from lorary.errors import DataError

NAMES = corpora.names()
KEYS = {
    "builtin:python": {"text"},
    "builtin:c-headers": {"text"},
    "builtin:topics": {"text"},
    "builtin:docstrings": {"prompt", "completion"},
    "builtin:docstrings-chat": {"messages"},
    "builtin:modules": {"text", "label"},
}
# Records in (train, validation), at the least: half of what Python 3.11 gives; the standard library shrinks.
AT_LEAST = {
    "builtin:python": (250, 30),
    "builtin:c-headers": (80, 8),
    "builtin:topics": (35, 4),
    "builtin:docstrings": (2000, 200),
    "builtin:docstrings-chat": (2000, 200),
    "builtin:modules": (1600, 150),
}


def load(name: str, split: str) -> list[dict]:
    """As the library does, or a skip where this Python has no headers."""
    try:
        return corpora.load(name, split)
    except DataError:
        if name != "builtin:c-headers":
            raise
        pytest.skip("CPython's headers are not installed here")


def test_every_corpus_is_named():
    assert set(NAMES) == set(KEYS)


@pytest.mark.parametrize("name", NAMES)
def test_records_have_their_keys_and_there_are_enough(name):
    for split, least in zip(("train", "validation"), AT_LEAST[name], strict=True):
        records = load(name, split)
        assert len(records) >= least
        assert all(set(record) == KEYS[name] for record in records)
        assert len(records) == len(corpora.origins(name, split))


@pytest.mark.parametrize("name", NAMES)
def test_no_file_is_on_both_sides(name):
    load(name, "train")
    train, held_out = set(corpora.origins(name, "train")), set(corpora.origins(name, "validation"))
    assert train
    assert held_out
    assert not train & held_out
    assert not any(map(sources.held_out, train))
    assert all(map(sources.held_out, held_out))


@pytest.mark.parametrize("name", NAMES)
def test_no_record_is_on_both_sides(name):
    def as_text(record: dict) -> str:
        return json.dumps(record, sort_keys=True)

    train, held_out = set(map(as_text, load(name, "train"))), set(map(as_text, load(name, "validation")))
    # Files may be copies of each other (`from x import *` shims); whatever is made from them is unique.
    assert len(train & held_out) <= (1 if name == "builtin:python" else 0)


def test_the_split_is_pinned():
    """Moving a file across the split would let the shipped base be tested on what it learnt from."""
    paths = ["argparse.py", "ast.py", "json/decoder.py", "os.py", "asyncio/base_events.py", "object.h", "for"]
    kept = {path for path in paths if sources.held_out(path)}
    assert kept == {p for p in paths if int(hashlib.sha256(p.encode()).hexdigest()[:16], 16) % 9 == 0}
    shares = [sum(sources.held_out(f"{i}-{j}.py") for j in range(900)) / 900 for i in range(5)]
    assert all(0.08 < share < 0.145 for share in shares)


def test_another_process_with_another_hash_seed_reads_the_same():
    program = (
        "import hashlib, json; from lorary.builtin import corpora\n"
        "both = [corpora.load(n, 'validation', fallback=True) for n in corpora.names()]\n"
        "print(hashlib.sha256(json.dumps(both, sort_keys=True).encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = json.dumps([corpora.load(n, "validation", fallback=True) for n in NAMES], sort_keys=True)
    assert done.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_reading_data_needs_no_torch():
    program = (
        "import sys; from lorary.builtin import corpora\n"
        "corpora.load('builtin:topics', 'train')\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_a_caller_does_to_a_record_stays_with_the_caller():
    first = corpora.load("builtin:docstrings-chat", "validation")
    first[0]["messages"][0]["content"] = "changed"
    del first[1]
    again = corpora.load("builtin:docstrings-chat", "validation")
    assert again[0]["messages"][0]["content"] != "changed"
    assert len(again) == len(first) + 1


def test_texts_are_source_that_people_wrote():
    paths = corpora.origins("builtin:python", "train") + corpora.origins("builtin:python", "validation")
    assert "argparse.py" in paths
    assert "asyncio/base_events.py" in paths
    for unwanted in ("site-packages", "test/", "tests/", "pydoc_data", "_sysconfigdata", "encodings", "idle_test"):
        assert not [path for path in paths if f"/{unwanted}" in f"/{path}"]


def test_pairs_are_signature_and_first_line():
    records = corpora.load("builtin:docstrings", "train") + corpora.load("builtin:docstrings", "validation")
    pairs = {r["prompt"]: r["completion"] for r in records}
    assert pairs["def dedent(text):\n"] == "Remove any common leading whitespace from every line in `text`."
    assert all(p.startswith(("def ", "async def ")) and p.endswith(":\n") for p in pairs)
    assert all(12 <= len(c) <= 120 and c[0].isalpha() and "\n" not in c for c in pairs.values())


def test_the_conversations_say_what_the_pairs_say():
    pairs = corpora.load("builtin:docstrings", "validation")
    chats = corpora.load("builtin:docstrings-chat", "validation")
    for pair, chat in zip(pairs, chats, strict=True):
        assert [m["role"] for m in chat["messages"]] == ["user", "assistant"]
        assert [m["content"] for m in chat["messages"]] == [pair["prompt"].rstrip("\n"), pair["completion"]]


def test_every_kind_of_module_has_examples_on_both_sides():
    for split in ("train", "validation"):
        records = corpora.load("builtin:modules", split)
        assert {r["label"] for r in records} == set(syntax.KINDS)
        assert all(len(r["text"]) <= 800 for r in records)


def test_a_summary_is_read_from_source_without_running_it():
    text = (
        "raise SystemExit('this must not run')\n"
        "class A:\n"
        "    async def go(self, *, far: int = 3) -> None:\n"
        "        '''Go away, far away.\n\n        Slowly.'''\n"
        "def _hidden():\n    '''Nobody should read this.'''\n"
        "def bare(): pass\n"
        "def short():\n    '''Too short'''\n"
        "def odd():\n    '''-> begins with no letter'''\n"
    )
    found = syntax.summaries((("a.py", text), ("b.py", text)))
    pair = syntax.Summary("async def go(self, *, far: int=3):", "Go away, far away.")
    assert found == (("a.py", pair),)
    assert syntax.summaries((("a.py", "def f(:\n"),)) == ()


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(DataError) as raised:
        corpora.load("builtin:topic", "train")
    assert str(raised.value) == (
        "no built-in data set is called 'builtin:topic'\n"
        "  - unknown name\n"
        "      hint: did you mean `builtin:topics` or `builtin:python` or `builtin:docstrings`?"
    )
    with pytest.raises(DataError, match=r"no built-in data set is called 'C'"):
        corpora.load("C", "train")


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError) as raised:
        corpora.load("builtin:topics", "test")
    assert str(raised.value) == (
        "builtin:topics has no split 'test'\n  - split: got 'test'\n      hint: use train or validation"
    )


@pytest.fixture
def bare_python(tmp_path, monkeypatch):
    """A Python installation without headers and without its library's source."""
    caches = (
        sources.headers,
        sources.stdlib,
        *(corpora._CORPORA[name] for name in ("builtin:c-headers", "builtin:python")),
    )
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


def test_missing_headers_say_so_and_fall_back_only_when_asked(bare_python):
    with pytest.raises(DataError) as raised:
        corpora.load("builtin:c-headers", "train")
    assert str(raised.value) == (
        "cannot read builtin:c-headers:\n"
        f"  - {bare_python / 'include'}: no C headers: they are not installed with this Python\n"
        "      hint: install Python's development headers (python3-dev, python3-devel), or use builtin:topics, "
        "which every Python has; load(..., fallback=True) does so by itself"
    )
    assert corpora.load("builtin:c-headers", "train", fallback=True) == corpora.load("builtin:topics", "train")
    with pytest.raises(DataError, match="this Python has no library source"):
        corpora.load("builtin:python", "train", fallback=True)


def test_unreadable_files_are_left_out(bare_python):
    root = bare_python / "stdlib"
    root.mkdir()
    (root / "good.py").write_text("x = 1\n")
    (root / "empty.py").write_text("\n")
    (root / "wrong.py").write_bytes(b"# coding: no-such-coding\nx = 1\n")
    (root / "bytes.py").write_bytes(b"x = '\xff'\n")
    (root / "old.py").write_bytes(b"# coding: latin-1\nx = '\xff'\n")
    assert sources.stdlib() == (("good.py", "x = 1\n"), ("old.py", "# coding: latin-1\nx = 'ÿ'\n"))
