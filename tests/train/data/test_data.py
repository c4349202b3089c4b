"""Data from files and row formats to tokens and masks."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lorary import builtin
from lorary.errors import DataError
from lorary.train.config.config import DataSection
from lorary.train.data import load
from lorary.train.data._sources import read_source
from lorary.train.data.chat import CHATML
from lorary.train.data.encode import pair
from lorary.train.data.tokenize import tokenize
from tests.train.small import PLAIN_CHAT, shown, tokenizer

TURNS = [
    {"role": "system", "content": "sys"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "the answer"},
    {"role": "user", "content": "is"},
    {"role": "assistant", "content": "two"},
]
PAIRS = [{"prompt": "hello ", "completion": f"the answer {i}"} for i in range(4)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def jsonl(rows: list[Any], name: str = "rows.jsonl") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def tokens(rows: list[Any], using: Any, task: str = "sft", **section: Any) -> Any:
    chosen = DataSection(train=jsonl(rows), **section)  # type: ignore[arg-type]
    return tokenize(load.load(chosen, task).train, using, chosen)


def first(rows: list[Any], using: Any, **section: Any) -> str:
    return shown(using, tokens(rows, using, **section).rows[0])


# --- sources ----------------------------------------------------------------------------------------------------


def write(kind: str) -> str:
    """PAIRS in a file of this kind."""
    path = Path(f"rows.{kind}")
    if kind == "json":
        path.write_text(json.dumps(PAIRS, indent=1))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(PAIRS[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(PAIRS)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)
    else:
        jsonl(PAIRS, str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(kind: str) -> None:
    assert [record.value for record in read_source(write(kind), "train")] == PAIRS


def test_rows_know_their_sources() -> None:
    Path("a.jsonl").write_text('\n{"text": "x"}\n\n{"text": "y"}\n')
    Path("a.csv").write_text('text,n\n"two\nlines",1\nz,2\n')
    assert [record.where for record in read_source("a.jsonl", "train")] == ["a.jsonl:2", "a.jsonl:4"]
    assert [record.where for record in read_source("a.csv", "train")] == ["a.csv:2", "a.csv:4"]
    assert read_source(write("parquet"), "train")[1].where == "rows.parquet: row 2"


def test_fields_of_a_table_stay_text() -> None:
    Path("a [1].csv").write_text('id,text\n007,NA\n1e5," null"\n"",1.0\n')
    rows = [{"id": "007", "text": "NA"}, {"id": "1e5", "text": " null"}, {"id": "", "text": "1.0"}]
    assert [record.value for record in read_source("a [1].csv", "train")] == rows


def test_a_byte_order_mark_crlf_and_a_last_line_without_end_are_accepted() -> None:
    Path("a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "y"}')
    Path("a.csv").write_bytes(b"\xef\xbb\xbftext\r\nx\r\ny")
    assert [r.value["text"] for r in read_source("a.jsonl", "train")] == ["x", "y"]
    assert [r.value["text"] for r in read_source("a.csv", "train")] == ["x", "y"]


def test_json_lines_in_a_json_file_are_read() -> None:
    assert [r.value for r in read_source(jsonl(PAIRS, "a.json"), "train")] == PAIRS


def test_folders_are_split_by_their_file_names() -> None:
    for split, text in (("train", "a"), ("valid", "b"), ("test", "c")):
        jsonl([{"text": text}], f"folder/{split}.jsonl")
    jsonl([{"text": "d"}], "plain/part-0.jsonl")
    jsonl([{"text": "e"}], "plain/part-1.jsonl")

    def read(source: str, split: str) -> list[str]:
        return [r.value["text"] for r in read_source(source, split)]

    assert read("folder", "train") == ["a"]
    assert read("folder", "validation") == ["b"]
    assert read("folder#test", "train") == ["c"]
    assert read("plain", "train") == ["d", "e"]


def test_a_saved_data_set_is_read() -> None:
    datasets.Dataset.from_list(PAIRS).save_to_disk("one")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS[:1])}).save_to_disk("many")
    assert [r.value for r in read_source("one", "train")] == PAIRS
    assert [r.value for r in read_source("many", "train")] == PAIRS[:1]


def test_the_built_in_data_sets_have_splits() -> None:
    train, held_out = read_source("builtin:docstrings", "train"), read_source("builtin:docstrings#validation", "train")
    assert len(train) > len(held_out) > 100
    assert held_out[0].where == "builtin:docstrings: row 1"


def test_several_sources_are_one_data_set() -> None:
    section = DataSection(train=[jsonl(PAIRS[:1], "a.jsonl"), jsonl(PAIRS[1:], "b.jsonl")])  # type: ignore[arg-type]
    loaded = load.load(section)
    assert [e.where for e in loaded.train] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:2", "b.jsonl:3"]


# --- formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "row_format"),
    [
        ({"text": "hello"}, "text"),
        ({"text": "hello", "topic": "x"}, "text"),
        ({"prompt": "hello", "completion": "two"}, "prompt-completion"),
        ({"prompt": TURNS[:2], "completion": TURNS[2:3]}, "prompt-completion"),
        ({"messages": TURNS}, "messages"),
        ({"instruction": "hello", "input": "", "output": "two"}, "alpaca"),
        ({"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "two"}]}, "sharegpt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_the_format_is_detected_and_noted(row: dict[str, Any], row_format: str) -> None:
    loaded = load.load(DataSection(train=jsonl([row, row])))  # type: ignore[arg-type]
    assert loaded.format == row_format
    assert loaded.notes[0] == f"rows.jsonl: 2 rows in the format {row_format} (detected)"


def test_fields_without_a_use_are_named() -> None:
    notes = load.load(DataSection(train=jsonl([{"text": "hello", "topic": "x", "id": 3}]))).notes  # type: ignore[arg-type]
    assert notes[1] == "fields that the format text does not use: id, topic"


def test_columns_give_fields_their_names() -> None:
    rows = [{"question": "hello ", "answer": "two", "prompt": "not this"}]
    section = DataSection(train=jsonl(rows), columns={"prompt": "question", "completion": "answer"})  # type: ignore[arg-type]
    example = load.load(section).train[0]
    assert (example.prompt, example.completion) == ("hello ", "two")  # type: ignore[union-attr]


def test_empty_texts_are_left_out_and_counted() -> None:
    loaded = load.load(DataSection(train=jsonl([{"text": "a"}, {"text": " \n"}, {"text": ""}])))  # type: ignore[arg-type]
    assert len(loaded.train) == 1
    assert loaded.notes[1] == "2 rows of rows.jsonl are empty and left out"


def test_rows_are_held_out_by_the_seed_alone() -> None:
    section = DataSection(train=jsonl([{"text": f"hello {i}"} for i in range(100)]), validation_split=0.1)  # type: ignore[arg-type]
    one, again, other = load.load(section, seed=1), load.load(section, seed=1), load.load(section, seed=2)
    assert (len(one.train), len(one.validation)) == (90, 10)
    assert set(one.train).isdisjoint(one.validation)
    assert one == again
    assert one.validation != other.validation
    own = section.model_copy(update={"seed": 2})
    assert load.load(own, seed=1) == load.load(own, seed=3) == other


def test_content_in_parts_is_joined_and_empty_fields_of_tables_are_dropped() -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "answer"}]
    turns = [{"role": "user", "content": "hello", "tool_calls": None}, {"role": "assistant", "content": parts}]
    example = load.load(DataSection(train=jsonl([{"messages": turns}]))).train[0]  # type: ignore[arg-type]
    assert example.messages == [  # type: ignore[union-attr]
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "the answer"},
    ]


# --- tokens and masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["hello world", "<s>hello world", "hello world</s>", "<s>hello world</s>"])
def test_text_has_one_bos_one_eos_and_is_labelled_whole(text: str) -> None:
    assert first([{"text": text}], tokenizer()) == "[[<s>hello world</s>]]"


def test_a_tokenizer_without_bos_gets_none() -> None:
    assert first([{"text": "hello world"}], tokenizer(bos=False)) == "[[hello world</s>]]"


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("the answer ", "is two", "<s>the answer [[is two</s>]]"),
        ("the answer", " is two", "<s>the answer[[ is two</s>]]"),
        ("", "two", "<s>[[two</s>]]"),
        ("hel", "lo", "<s>hel[[lo</s>]]"),  # one token when written together, two when the prompt stands alone
        ("the answer ", "two</s>", "<s>the answer [[two</s>]]"),
    ],
)
def test_only_the_completion_and_its_end_are_labelled(prompt: str, completion: str, expected: str) -> None:
    assert first([{"prompt": prompt, "completion": completion}], tokenizer()) == expected


def test_the_prompt_has_its_tokens_at_inference() -> None:
    using = tokenizer()
    assert len(using("hello")["input_ids"]) < len(using("hel")["input_ids"]) + len(using("lo")["input_ids"]) - 1
    ids, start, shared = pair(using, "hel", "lo")
    assert ids[:start] == using("hel")["input_ids"]
    assert not shared


def test_a_token_that_prompt_and_answer_share_belongs_to_the_answer_and_is_counted() -> None:
    using = tokenizer(bos=False, prefix_space=True)  # "lo" alone would be "▁lo": a space that nobody wrote
    assert tokens([{"prompt": "hel", "completion": "lo"}], using).joined == 1
    assert first([{"prompt": "the hel", "completion": "lo"}], using).startswith("the")
    assert tokens([{"prompt": "hello", "completion": " two"}], using).joined == 0


def test_loss_all_labels_the_prompt_as_well() -> None:
    assert first([PAIRS[0]], tokenizer(), loss="all") == "[[<s>hello the answer 0</s>]]"


MASKED = (
    "<s><|start|>system\nsys<|end|>\n<|start|>user\nhello<|end|>\n<|start|>assistant\n[[the answer<|end|>]]\n"
    "<|start|>user\nis<|end|>\n<|start|>assistant\n[[two<|end|>]]\n"
)


def test_every_answer_of_a_conversation_is_labelled_through_its_end() -> None:
    using = tokenizer(extra=("<|end|>",), template=PLAIN_CHAT)
    assert first([{"messages": TURNS}], using) == MASKED


def test_marks_of_the_template_give_the_same_mask() -> None:
    answer = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    marked = PLAIN_CHAT.replace("{{ m.content }}", answer + "{% else %}{{ m.content }}{% endif %}")
    using = tokenizer(extra=("<|end|>",), template=marked)
    assert first([{"messages": TURNS}], using) == MASKED


def test_single_answers_can_be_left_out() -> None:
    turns = [turn | ({"train": False} if i == 2 else {}) for i, turn in enumerate(TURNS)]
    expected = MASKED.replace("[[the answer<|end|>]]", "the answer<|end|>")
    for template in (
        PLAIN_CHAT,
        PLAIN_CHAT.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"),
    ):
        assert first([{"messages": turns}], tokenizer(extra=("<|end|>",), template=template)) == expected


def test_prompt_and_completion_as_messages_label_the_completion_only() -> None:
    using = tokenizer(extra=("<|end|>",), template=PLAIN_CHAT)
    expected = MASKED.replace("[[the answer<|end|>]]", "the answer<|end|>")
    assert first([{"prompt": TURNS[:4], "completion": TURNS[4:]}], using) == expected


def test_an_answer_without_an_end_gets_eos() -> None:
    using = tokenizer(template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    row = {"messages": TURNS[1:3]}
    assert first([row], using) == "user: hello\n[[assistant: the answer\n</s>]]"


def test_the_built_in_template_ends_answers_with_eos() -> None:
    expected = (
        "<|im_start|>system\nsys<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n[[the answer</s>]]\n"
        "<|im_start|>user\nis<|im_end|>\n<|im_start|>assistant\n[[two</s>]]\n"
    )
    using = tokenizer()
    assert first([{"messages": TURNS}], using, chat_template="builtin:chatml") == expected
    assert using.chat_template == CHATML


def test_a_template_can_come_from_a_file() -> None:
    Path("own.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    assert first([{"messages": TURNS[1:3]}], tokenizer(), chat_template="own.jinja") == "hello</s>[[the answer</s>]]"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "hello", "input": "is", "output": "two", "system": "sys"},
        {
            "system": "sys",
            "conversations": [{"from": "human", "value": "hello\n\nis"}, {"from": "gpt", "value": "two"}],
        },
    ],
    ids=["alpaca", "sharegpt"],
)
def test_other_conversations_are_rendered_by_the_same_template(row: dict[str, Any]) -> None:
    using = tokenizer(extra=("<|end|>",), template=PLAIN_CHAT)
    expected = "<s><|start|>system\nsys<|end|>\n<|start|>user\nhello\n\nis<|end|>\n<|start|>assistant\n[[two<|end|>]]\n"
    assert first([row], using) == expected


def test_the_built_in_base_reads_the_built_in_conversations() -> None:
    section = DataSection(train="builtin:docstrings-chat#validation")  # type: ignore[arg-type]
    examples = load.load(section).train[:3]
    using = builtin.load_tokenizer()
    for row, example in zip(tokenize(examples, using, section).rows, examples, strict=True):
        asked, answered = example.messages  # type: ignore[union-attr]
        expected = f"<|bos|><|user|>{asked['content']}<|assistant|>[[{answered['content']}<|eos|>]]"
        assert shown(using, row) == expected


# --- preference pairs -------------------------------------------------------------------------------------------


def test_preference_pairs_are_a_prompt_and_two_answers() -> None:
    using = tokenizer()
    row = tokens([{"prompt": "hello ", "chosen": "two", "rejected": "three"}], using, task="dpo").rows[0]
    texts = {key: using.decode(ids) for key, ids in row.items()}
    assert texts == {"prompt_ids": "<s>hello ", "chosen_ids": "two</s>", "rejected_ids": "three</s>"}


@pytest.mark.parametrize("given", [True, False], ids=["with a prompt", "as whole conversations"])
def test_preferred_conversations_end_with_their_turn(given: bool) -> None:
    using = tokenizer(extra=("<|end|>",), template=PLAIN_CHAT)
    shared, better, worse = TURNS[:4], [TURNS[4]], [{"role": "assistant", "content": "three"}]
    row = {"prompt": shared, "chosen": better, "rejected": worse}
    if not given:
        row = {"chosen": shared + better, "rejected": shared + worse}
    made = tokens([row], using, task="dpo").rows[0]
    assert using.decode(made["prompt_ids"]).endswith("is<|end|>\n<|start|>assistant\n")
    assert using.decode(made["chosen_ids"]) == "two<|end|>"
    assert using.decode(made["rejected_ids"]) == "three<|end|>"


# --- lengths ----------------------------------------------------------------------------------------------------

LONG = [{"prompt": "hello ", "completion": "two " * n} for n in (2, 40, 3)] + [
    {"prompt": "two " * 40, "completion": "x"}
]


def test_long_text_is_split_and_loses_nothing() -> None:
    using = tokenizer(bos=False)
    made = tokens([{"text": "hello world, " * 30}, {"text": "two"}], using, max_length=16)
    assert made.split == 1
    assert max(len(row["input_ids"]) for row in made.rows) == 16
    whole = [i for row in made.rows[:-1] for i in row["input_ids"]]
    assert using.decode(whole) == "hello world, " * 30 + "</s>"


def test_overlong_rows_are_dropped_or_cut_as_asked() -> None:
    using = tokenizer(bos=False)
    dropped, cut = (tokens(LONG, using, max_length=16, overlong=policy) for policy in ("drop", "truncate"))
    assert (len(dropped.rows), dropped.dropped, dropped.truncated) == (2, 2, 0)
    # only the prompt of the last row would be left, without a label
    assert (len(cut.rows), cut.dropped, cut.truncated) == (3, 1, 1)
    assert all(len(row["input_ids"]) == len(row["labels"]) <= 16 for row in cut.rows)
    assert len(cut.lengths) == 4
    assert max(cut.lengths) > 40


def test_overlong_preference_pairs_are_cut_at_the_answers() -> None:
    rows = [
        {"prompt": "hello ", "chosen": "two " * 40, "rejected": "three"},
        {"prompt": "two " * 40, "chosen": "x", "rejected": "y"},
    ]
    cut = tokens(rows, tokenizer(bos=False), task="dpo", max_length=16, overlong="truncate")
    assert (len(cut.rows), cut.dropped, cut.truncated) == (1, 1, 1)
    assert len(cut.rows[0]["prompt_ids"]) + len(cut.rows[0]["chosen_ids"]) == 16


def test_a_row_of_exactly_max_length_is_not_overlong() -> None:
    using = tokenizer(bos=False)
    rows = [{"prompt": "hello ", "completion": "two " * 4}]
    length = tokens(rows, using).lengths[0]
    assert tokens(rows, using, max_length=length).rows
    with pytest.raises(DataError, match=r"1 of 1 rows are longer than data\.max_length"):
        tokens(rows, using, max_length=length - 1)
