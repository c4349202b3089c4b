"""Rows that are read while training: an order without end, the same at every reading, and a run resumed in it."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from lorary.errors import ConfigError, DataError, TrainingError
from lorary.train.config.config import DataSection
from lorary.train.config.load import from_dict
from lorary.train.data import _tables
from lorary.train.data import stream as stream_module
from lorary.train.data.lint import lint
from lorary.train.data.stream import RowStream
from lorary.train.runner.prepare import prepare
from lorary.train.runner.run import run
from tests.train.runs import base_folder, configuration
from tests.train.small import PLAIN_CHAT, tokenizer


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def texts(name: str, count: int) -> str:
    Path(name).write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(count)))
    return name


def made(train: Any, using: Any = None, seed: int = 1, task: str = "sft", **section: Any) -> RowStream:
    chosen = DataSection(train=train, streaming=True, **({"overlong": "split"} | section))
    return RowStream(chosen, using or tokenizer(), task, seed)


def first(stream: RowStream, count: int) -> list[str]:
    rows = islice(iter(stream.dataset()), count)
    return [tokenizer().decode(row["input_ids"], skip_special_tokens=True) for row in rows]


def test_every_pass_has_every_row_once_in_another_order() -> None:
    stream = made(texts("a.jsonl", 10))
    rows = first(stream, 30)
    passes = [rows[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(each) == sorted(f"a.jsonl {i}" for i in range(10)) for each in passes)
    assert len({tuple(each) for each in passes}) == 3
    assert first(stream, 30) == rows, "a second reading"
    assert first(made("a.jsonl", seed=2), 30) != rows


def test_a_buffer_shuffles_what_does_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "BUFFER", 4)
    rows = [int(row.split()[-1]) for row in first(made(texts("a.jsonl", 40)), 40)]
    assert sorted(rows) == list(range(40))
    assert rows != list(range(40))
    assert all(number - at <= 4 for at, number in enumerate(rows)), "no row comes before the buffer holds it"


def test_sources_are_drawn_in_the_ratio_of_their_weights() -> None:
    stream = made([{"path": texts("a.jsonl", 5), "weight": 3}, texts("b.jsonl", 500)])
    drawn = Counter(row[0] for row in first(stream, 400))
    assert 270 < drawn["a"] < 330
    assert {name: rows for name, rows, _ in lint(stream.head, tokenizer(), 300).sources} == Counter(stream.head.sources)


def test_shapes_limits_and_separators_hold_in_a_stream() -> None:
    Path("p.jsonl").write_text("".join(json.dumps({"q": "is it?", "a": f"{i}"}) + "\n" for i in range(9)))
    Path("c.csv").write_text("text\n" + "".join(f"csv {i}\n" for i in range(9)))
    pairs = {"path": "p.jsonl", "columns": {"prompt": "q", "completion": "a"}, "limit": 2}
    stream = made([pairs, "c.csv", texts("t.jsonl", 3)], separator=" ", overlong="truncate")
    rows = set(first(stream, 200))
    assert rows == {"is it? 0", "is it? 1", *(f"csv {i}" for i in range(9)), *(f"t.jsonl {i}" for i in range(3))}
    assert stream.notes == (
        "p.jsonl: a stream of rows in the format prompt-completion (detected)",
        "c.csv: a stream of rows in the format text (detected)",
        "t.jsonl: a stream of rows in the format text (detected)",
        "streaming: the first 1,000 rows are checked before training, the others as they come",
    )


def test_overlong_rows_are_split_dropped_or_cut_as_they_come() -> None:
    Path("a.jsonl").write_text(json.dumps({"text": "hello " * 30}) + "\n")
    lengths = [len(row["input_ids"]) for row in islice(iter(made("a.jsonl", max_length=16).dataset()), 6)]
    assert max(lengths) == 16
    assert min(lengths) > 1
    Path("b.jsonl").write_text("".join(json.dumps({"prompt": "two ", "completion": "x " * n}) + "\n" for n in (2, 99)))
    kept = islice(iter(made("b.jsonl", max_length=32, overlong="drop").dataset()), 4)
    assert len({len(row["input_ids"]) for row in kept}) == 1


def test_a_bad_row_of_a_stream_is_named_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "CHECKED", 5)
    monkeypatch.setattr(stream_module, "BUFFER", 2)
    for bad, message in (
        ("?", "1 row of a.jsonl cannot be used:\n  - a.jsonl:151: not JSON: expecting value (column 1)"),
        ('{"text": 3}', "1 of 1 rows of a.jsonl cannot be used:\n  - a.jsonl:151: `text` must be a text, not a number"),
    ):
        with Path(texts("a.jsonl", 150)).open("a") as file:
            file.write(bad + "\n")
        with pytest.raises(DataError) as refused:
            first(made("a.jsonl"), 200)
        assert str(refused.value) == message


LABELLED = "task `sft` does not train on labelled texts"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl has no rows"),
        ("a.jsonl", '{"text": " "}\n' * 3, "every text of a.jsonl is empty"),
        ("a.jsonl", '{"text": "x", "label": 1}\n', f"cannot train on a.jsonl:\n  - a.jsonl:1: {LABELLED}"),
        ("a.jsonl", '{"words": "x"}\n', "unknown row format in a.jsonl:"),
    ],
)
def test_bad_streams_are_refused_at_their_start(name: str, content: str, message: str) -> None:
    Path(name).write_text(content)
    with pytest.raises(DataError) as refused:
        made(name)
    assert str(refused.value).startswith(message)


def test_conversations_and_preferences_stream_as_well() -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "two"}]
    Path("c.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    using = tokenizer(extra=("<|end|>",), template=PLAIN_CHAT)
    row = next(iter(made("c.jsonl", using, overlong="drop").dataset()))
    assert [i for i in row["labels"] if i != -100][-1] == using.convert_tokens_to_ids("<|end|>")
    Path("d.jsonl").write_text(json.dumps({"prompt": "a ", "chosen": "b", "rejected": "c"}) + "\n")
    row = next(iter(made("d.jsonl", task="dpo", overlong="drop").dataset()))
    assert set(row) == {"prompt_ids", "chosen_ids", "rejected_ids"}


@pytest.mark.parametrize("known", [True, False], ids=["known columns", "unknown columns"])
def test_a_stream_of_the_hub_is_read_for_its_used_columns(known: bool) -> None:
    """What `datasets` returns for it, without the network."""
    rows = datasets.Dataset.from_list([{"text": "a", "other": 1}] * 2).to_iterable_dataset()
    if not known:
        rows = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}] * 2))
    records = list(_tables.dataset_rows(rows, "org/rows[train]", frozenset({"text"})))
    assert [record.where for record in records] == ["org/rows[train]: row 1", "org/rows[train]: row 2"]
    assert records[0].value == {"text": "a"} | ({"other": None} if known else {})


# --- runs -------------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):  # type: ignore[misc]
    """SIGTERM at the third step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_resumed_stream_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    words = configuration(base_folder(tmp_path / "base"), Path("rows.jsonl"))
    Path("held.jsonl").write_text(Path("rows.jsonl").read_text())
    Path("rows.jsonl").write_text("".join(Path("rows.jsonl").read_text().splitlines(keepends=True)[:7]))
    data = {"train": ["rows.jsonl", {"path": texts("t.jsonl", 5), "weight": 0.5}], "validation": "held.jsonl"}
    words |= {"data": data | {"streaming": True, "overlong": "truncate", "max_length": 64}}

    def config(output: str) -> Any:
        return from_dict(words | {"output": output})

    whole = run(config("whole"), quiet=True)
    stopped = run(config("parts"), quiet=True, callbacks=[Stop()])
    assert stopped.interrupted
    assert stopped.steps < whole.steps
    parts = run(config("parts"), quiet=True, resume=True)
    assert (parts.steps, whole.steps) == (6, 6), "24 rows: three passes over the first source"
    one, other = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, parts))
    assert one.keys() == other.keys()
    assert all(bool((one[key] == other[key]).all()) for key in one)
    losses = [[(r["step"], r["loss"]) for r in run.history if "loss" in r] for run in (whole, parts)]
    assert losses[0] == losses[1]
    card = (whole.adapter.parent / "README.md").read_text()
    assert "a stream, its first 1,000, 24 held out" in card
    counts = dict(re.findall(r"(\S+) \(([\d,]+) rows, [\d,]+ tokens\)", card))
    assert counts.keys() == {"rows.jsonl", "t.jsonl"}
    assert sum(map(int, counts.values())) == 1000
    assert "rows      1,000 of a stream checked, 24 held out" in Path("whole/sample.txt").read_text()

    stopped = run(config("other"), quiet=True, callbacks=[Stop()])
    texts("t.jsonl", 4)
    with pytest.raises(TrainingError, match="the training rows are not those of the checkpoint"):
        run(config("other"), quiet=True, resume=True)


def test_the_memory_of_a_stream_is_that_of_rows_of_max_length(tmp_path: Path) -> None:
    words = configuration(base_folder(tmp_path / "base"), Path("rows.jsonl"))
    words["training"].pop("eval_steps")
    data = {"train": "rows.jsonl", "streaming": True, "overlong": "drop"}
    short, long = (prepare(from_dict(words | {"data": data | {"max_length": n}})) for n in (64, 512))
    assert short.memory.total < long.memory.total


def test_what_a_stream_cannot_do_is_refused() -> None:
    Path("a.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError) as refused:
        from_dict(
            {
                "model": "builtin:base",
                "data": {"train": "a.jsonl", "streaming": True, "validation_split": 0.1, "packing": True},
                "method": {"drop": {"threshold": 0.9}},
                "training": {"epochs": 1},
            }
        )
    assert str(refused.value) == (
        "invalid configuration:\n"
        "  - training.epochs: `training.epochs`: a stream has no known length, so it has no epochs\n"
        "      hint: set training.max_steps\n"
        "  - data.validation_split: `data.validation_split`: a share of a stream cannot be held out: its length is not "
        "known\n"
        "      hint: set data.validation\n"
        "  - data.streaming: `data.streaming`: a stream cannot be searched for overlong rows before training, and the "
        "first one would end the run\n"
        "      hint: set data.overlong: drop or truncate, or split for plain text\n"
        "  - data.packing: `data.packing`: the rows of a stream are not packed\n"
        "      hint: set one of the two to false\n"
        "  - method.drop: `method.drop`: the probe draws from all rows, and a stream is never read whole\n"
        "      hint: remove it"
    )
