"""Several sources in one list: shapes, weights, limits, documents, compressed files, and what is told of them."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from lorary.errors import DataError
from lorary.train.config.config import DataSection
from lorary.train.config.load import from_dict
from lorary.train.data import load
from lorary.train.data._sources import read_source
from lorary.train.data.lint import lint, text
from lorary.train.data.row_formats import Chat, Pair, Text
from lorary.train.data.tokenize import tokenize
from tests.train.small import PLAIN_CHAT, shown, tokenizer


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def jsonl(name: str, *rows: Any) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def section(train: Any, **more: Any) -> DataSection:
    return DataSection(train=train, **more)


def numbered(name: str, count: int) -> str:
    return jsonl(name, *({"text": f"{name} {i}"} for i in range(count)))


def wheres(data: load.Data) -> Counter[str]:
    """How often each row occurs in an epoch."""
    return Counter({row.where: count for row, count in zip(data.train, data.copies, strict=True)})


TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "two"}]
SHAPES = {
    "chat.jsonl": {"messages": TURNS},
    "pairs.jsonl": {"prompt": "the answer ", "completion": "is"},
    "alpaca.jsonl": {"instruction": "hello", "output": "three"},
    "texts.jsonl": {"text": "hello world"},
}


# --- shapes -----------------------------------------------------------------------------------------------------


def test_sources_of_different_shapes_are_one_data_set() -> None:
    chosen = section([jsonl(name, row) for name, row in SHAPES.items()])
    data = load.load(chosen)
    assert [type(example) for example in data.train] == [Chat, Pair, Chat, Text]
    assert data.format == "messages, prompt-completion, alpaca, text"
    assert data.notes == tuple(
        f"{name}: 1 rows in the format {kind} (detected)"
        for name, kind in zip(SHAPES, ("messages", "prompt-completion", "alpaca", "text"), strict=True)
    )
    using = tokenizer(extra=("<|end|>",), template=PLAIN_CHAT)
    start = "<s><|start|>user\nhello<|end|>\n<|start|>assistant\n"
    made = tokenize(data.train, using, chosen, data.copies, data.sources)
    assert [shown(using, row) for row in made.rows] == [
        f"{start}[[two<|end|>]]\n",
        "<s>the answer [[is</s>]]",
        f"{start}[[three<|end|>]]\n",
        "[[<s>hello world</s>]]",
    ]


def test_each_source_can_declare_its_format_and_columns() -> None:
    jsonl("a.jsonl", {"text": "hello", "label": 1})
    jsonl("b.jsonl", {"question": "hello ", "answer": "two", "text": "x"})
    jsonl("c.jsonl", {"q": "is ", "a": "three"})
    sources = [
        {"path": "a.jsonl", "format": "text", "columns": {}},
        {"path": "b.jsonl", "columns": {"prompt": "question", "completion": "answer"}},
        "c.jsonl",
    ]
    assert load.load(section(sources, columns={"prompt": "q", "completion": "a"})).train == (
        Text("hello", "a.jsonl:1"),
        Pair("hello ", "two", "b.jsonl:1"),
        Pair("is ", "three", "c.jsonl:1"),
    )


def test_text_is_split_and_pairs_are_refused_each_by_its_own_rule() -> None:
    jsonl("texts.jsonl", {"text": "hello " * 30})
    jsonl("pairs.jsonl", {"prompt": "hello ", "completion": "two"})
    chosen = section(["texts.jsonl", "pairs.jsonl"], max_length=16)
    made = tokenize(load.load(chosen).train, tokenizer(), chosen)
    assert (made.split, made.plain) == (1, False)
    assert len(made.rows) > 2
    jsonl("pairs.jsonl", {"prompt": "hello ", "completion": "two " * 20})
    with pytest.raises(DataError, match=r"1 of 1 rows are longer than data\.max_length"):
        tokenize(load.load(chosen).train, tokenizer(), chosen)


def test_the_lint_lists_every_source() -> None:
    names = [jsonl(name, row, row) for name, row in SHAPES.items()]
    chosen = section([{"path": names[1], "weight": 2}, names[3]])
    data = load.load(chosen)
    found = lint(tokenize(data.train, tokenizer(), chosen, data.copies, data.sources), tokenizer(), 300)
    assert found.sources == (("pairs.jsonl", 4, 28), ("texts.jsonl", 2, 8))
    lines = "source    pairs.jsonl: 4 rows, 28 tokens (77.8%)\nsource    texts.jsonl: 2 rows, 8 tokens (22.2%)\n"
    assert lines in text(found)
    assert found.notes == ("2 of 6 rows repeat another",), "the copies of a weight are meant"


def test_sources_of_one_file_name_are_told_apart() -> None:
    chosen = section([numbered("a/rows.jsonl", 2), numbered("b/rows.jsonl", 3)])
    assert Counter(load.load(chosen).sources) == {"a/rows.jsonl": 2, "b/rows.jsonl": 3}


@pytest.mark.parametrize("shape", ["messages", "conversations"])
def test_conversations_in_a_cell_are_json_text(shape: str) -> None:
    turns = TURNS if shape == "messages" else [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "two"}]
    with Path("rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[shape], [json.dumps(turns)], [json.dumps(turns)[:-2]], ["hello"]])
    with pytest.raises(DataError) as refused:
        load.load(section("rows.csv"))
    assert f"rows.csv:3: `{shape}`: not JSON: expecting" in str(refused.value)
    assert f"rows.csv:4: `{shape}` must be a list of" in str(refused.value)
    (example,) = load.load(section([{"path": "rows.csv", "limit": 1}])).train
    assert example.messages == TURNS  # type: ignore[union-attr]


# --- weights and limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "rows"), [(0.5, 5), (1, 10), (2, 20), (2.5, 25), (0.34, 3), (3.14, 31)])
def test_a_weight_is_how_often_a_row_occurs_in_an_epoch(weight: float, rows: int) -> None:
    chosen = section([{"path": numbered("a.jsonl", 10), "weight": weight}, numbered("b.jsonl", 4)])
    data = load.load(chosen)
    times = wheres(data)
    mine = [count for where, count in times.items() if where.startswith("a")]
    assert sum(mine) == rows
    assert set(mine) <= {int(weight), int(weight) + 1}
    assert sum(count for where, count in times.items() if where.startswith("b")) == 4
    if weight != 1:
        assert data.notes[-2] == f"a.jsonl: weight {weight:g}, {rows} rows per epoch ({rows / (rows + 4):.1%})"
    assert len(tokenize(data.train, tokenizer(), chosen, data.copies).rows) == rows + 4


def test_the_rows_that_a_weight_draws_depend_on_the_seed_alone() -> None:
    chosen = section([{"path": numbered("a.jsonl", 40), "weight": 0.5}])
    one, again, other = (load.load(chosen, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert wheres(one) != wheres(other)


def test_held_out_rows_are_never_copies_of_training_rows() -> None:
    chosen = section([{"path": numbered("a.jsonl", 20), "weight": 3}], validation_split=0.25)
    data = load.load(chosen)
    assert (len(data.train), sum(data.copies), len(data.validation)) == (15, 45, 5)
    assert {row.where for row in data.train}.isdisjoint(row.where for row in data.validation)


def test_a_source_that_is_held_out_as_a_whole_is_noted() -> None:
    """A text file is one row, and nothing of it may be left to train on."""
    Path("b.txt").write_text("one text")
    sources = [numbered("a.jsonl", 1), {"path": "b.txt", "weight": 2}]
    data = load.load(section(sources, validation_split=0.5))
    assert f"held out as a whole, so not trained on: {data.validation[0].where.split(':')[0]}" in data.notes


def test_a_weight_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(DataError) as refused:
        load.load(section([{"path": numbered("a.jsonl", 4), "weight": 0.1}, numbered("b.jsonl", 4)]))
    assert str(refused.value) == (
        "cannot weight the sources:\n"
        "  - a.jsonl: the weight 0.1 leaves none of its 4 rows\n      hint: raise the weight"
    )


def test_limits_splits_and_subsets_are_of_a_source() -> None:
    for split in ("train", "test"):
        numbered(f"folder/{split}.jsonl", 5)
    datasets.DatasetDict({"a": datasets.Dataset.from_list([{"text": "x"}, {"text": "y"}])}).save_to_disk("saved")
    chosen = section(
        [
            {"path": numbered("a.jsonl", 10), "limit": 3},
            {"path": "folder", "split": "test", "limit": 2},
            {"path": "folder#train"},
            {"path": "saved", "split": "a", "limit": 1},
            {"path": "builtin:docstrings", "split": "validation", "limit": 4, "format": "prompt-completion"},
        ]
    )
    assert Counter(load.load(chosen).sources) == {
        "a.jsonl": 3, "folder#test": 2, "folder#train": 5, "saved#a": 1, "builtin:docstrings#validation": 4
    }  # fmt: skip


def test_a_limit_reads_no_further() -> None:
    Path("a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\nnot JSON\n')
    assert len(load.load(section([{"path": "a.jsonl", "limit": 2}])).train) == 2


def test_a_configuration_keeps_what_was_written() -> None:
    tree = {"model": "builtin:base", "data": {"train": [{"path": "a.jsonl", "weight": 2, "limit": 7}, "b.jsonl"]}}
    config = from_dict(tree)
    assert config.model_dump(mode="json")["data"]["train"] == [
        {"path": "a.jsonl", "weight": 2.0, "limit": 7},
        "b.jsonl",
    ]
    assert from_dict(yaml.safe_load(config.to_yaml())) == config


# --- documents and compressed files -----------------------------------------------------------------------------


def test_a_document_is_one_text_and_is_split_by_max_length() -> None:
    Path("book.txt").write_bytes(b"\xef\xbb\xbfhello\r\nworld\n\n" + b"the answer " * 40)
    chosen = section("book.txt", max_length=16)
    (document,) = load.load(chosen).train
    assert document == Text("hello\nworld\n\n" + "the answer " * 40, "book.txt")
    assert tokenize([document], tokenizer(), chosen).split == 1


def test_a_folder_of_documents_is_many_texts() -> None:
    for name in ("genesis.txt", "testament.md", "trains.txt", "README.md", "LICENSE.txt", "empty.txt"):
        Path("books").mkdir(exist_ok=True)
        Path("books", name).write_text("" if name == "empty.txt" else name)
    data = load.load(section("books"))
    assert [row.where for row in data.train] == ["genesis.txt", "testament.md", "trains.txt"]
    assert "1 rows of books are empty and left out" in data.notes
    jsonl("books/rows.jsonl", {"text": "rows come before documents"})
    assert [row.where for row in load.load(section("books")).train] == ["rows.jsonl:1"]


def test_documents_can_be_split_by_their_names() -> None:
    for name in ("train-1.txt", "train_2.txt", "valid.txt"):
        Path("books").mkdir(exist_ok=True)
        Path("books", name).write_text(name)
    assert len(load.load(section("books")).train) == 2
    assert [row.where for row in load.load_validation(section("books", validation="books"))] == ["valid.txt"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
@pytest.mark.parametrize("packed", ["gz", "bz2", "zst"])
def test_compressed_files_are_read(kind: str, packed: str) -> None:
    plain = {"jsonl": b'{"text": "x"}\n', "json": b'[{"text": "x"}]', "csv": b"text\nx\n", "txt": b"x"}[kind]
    name = f"rows.{kind}.{packed}"
    if packed == "zst":
        with pyarrow.output_stream(name, compression="zstd") as file:
            file.write(plain)
    else:
        Path(name).write_bytes((gzip if packed == "gz" else bz2).compress(plain))
    assert read_source(name, "train")[0].value == {"text": "x"}


def test_an_array_on_one_line_may_be_longer_than_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorary.train.data._files.MAX_LINE", 100)
    Path("rows.json").write_text(json.dumps([{"text": "x" * 90}] * 5))
    assert len(read_source("rows.json", "train")) == 5


# --- tables -----------------------------------------------------------------------------------------------------

BAD_TEXT = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"ok", b"\xff\xfe"]).buffers())
FAR = pyarrow.array([10**13, 2], pyarrow.timestamp("s"))  # the year 318,857


@pytest.mark.parametrize("column", [BAD_TEXT, FAR], ids=["bytes that are not text", "a far date"])
def test_what_lies_in_unused_columns_does_no_harm(column: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "other": column}), "rows.parquet")
    data = load.load(section("rows.parquet"))
    assert [row.text for row in data.train] == ["a", "b"]  # type: ignore[union-attr]
    assert data.notes[1] == "fields that the format text does not use: other"


def test_wide_tables_are_read_in_linear_time() -> None:
    """Half a minute when every name was counted in the whole header."""
    names = [f"column{i}" for i in range(60_000)]
    Path("rows.csv").write_text(",".join(["text", *names]) + "\n" + ",".join(["x"] * 60_001) + "\n")
    (note,) = load.load(section("rows.csv")).notes[1:]
    assert note.startswith("fields that the format text does not use: column0, column1, ")
    assert note.endswith(" and 59,988 more")
    assert len(note) < 250


def test_a_table_of_other_columns_names_some_of_them() -> None:
    pyarrow.parquet.write_table(pyarrow.table({f"c{i}": [1] for i in range(300)}), "rows.parquet")
    with pytest.raises(DataError) as refused:
        load.load(section("rows.parquet"))
    assert "found the fields `c0`, `c1`, `c10`, " in str(refused.value)
    assert len(str(refused.value)) < 700


def test_a_column_that_is_named_is_read() -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "other": [1]}), "rows.parquet")
    assert load.load(section("rows.parquet", columns={"text": "body"})).train == (Text("a", "rows.parquet: row 1"),)


def test_a_saved_data_set_is_read_for_its_used_columns() -> None:
    datasets.Dataset.from_list([{"text": "a", "other": 1}]).save_to_disk("saved")
    data = load.load(section("saved"))
    assert data.train == (Text("a", "saved: row 1"),)
    assert data.notes[1] == "fields that the format text does not use: other"


def test_links_in_a_circle_are_named() -> None:
    os.symlink("rows.jsonl", "rows.jsonl")
    with pytest.raises(DataError) as refused:
        load.load(section("rows.jsonl"))
    assert str(refused.value) == (
        "cannot read rows.jsonl:\n  - it is a symbolic link that leads to no file, or to itself"
    )
