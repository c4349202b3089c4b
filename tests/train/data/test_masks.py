"""Masks of conversations and pairs: tools, reasoning templates, ends of turns, padding, rows without labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from lorary.errors import DataError
from lorary.train.config.config import DataSection
from lorary.train.data import load
from lorary.train.data.encode import decode, pair
from lorary.train.data.lint import lint
from lorary.train.data.tokenize import Tokens, tokenize
from tests.train.data.several_tokenizers import ALL
from tests.train.runs import losses, sft
from tests.train.small import shown, tokenizer

# The structure of Qwen 3's template: the reasoning of an answer is kept only after the last question.
QWEN = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% set last = namespace(user=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% if loop.index0 > last.user %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}"
    "{% elif m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Gemma's: no system turn, `model` for the assistant.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def qwen() -> Any:
    made = tokenizer(bos=False, extra=("<|im_start|>", "<|im_end|>"), template=QWEN)
    made.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])  # not special, as in Qwen 3
    return made


def tokens(row: Any, using: Any, **section: Any) -> Tokens:
    rows = row if isinstance(row, list) else [row]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = DataSection(train="rows.jsonl", **section)  # type: ignore[arg-type]
    return tokenize(load.load(chosen).train, using, chosen)


def said(using: Any, row: Any, **section: Any) -> list[str]:
    return [shown(using, row) for row in tokens(row, using, **section).rows]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


def calling(arguments: Any, **more: Any) -> dict[str, Any]:
    return answer("", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": arguments}} | more])


# --- tools ------------------------------------------------------------------------------------------------------

CALLED = (
    '<|im_start|>system\n{"type": "function", "function": {"name": "add", "parameters": {"type": "object", '
    '"properties": {}}}}\n<|im_end|>\n<|im_start|>user\n1 and 2<|im_end|>\n'
    "<|im_start|>assistant\n[[<think>\n\n</think>\n\n<tool_call>\n"
    '{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>]]\n'
    "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n[[<think>\n\n</think>\n\nIt is 3<|im_end|>]]\n"
)
ARGUMENTS = {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "row",
    [
        {"tools": [SCHEMA], "messages": [user("1 and 2"), calling(ARGUMENTS)]},
        {"tools": json.dumps([SCHEMA]), "messages": [user("1 and 2"), calling(json.dumps(ARGUMENTS))]},
        {"tools": [SCHEMA], "messages": [user("1 and 2"), calling(ARGUMENTS | {"city": None}, id=None)]},
        {
            "tools": [SCHEMA],
            "messages": [user("1 and 2"), answer("", tool_calls=[{"name": "add", "arguments": ARGUMENTS}])],
        },
    ],
    ids=["objects", "JSON text", "with a table's empty fields", "without `function`"],
)
def test_calls_are_labelled_and_results_are_not(row: dict[str, Any]) -> None:
    row["messages"] += [{"role": "tool", "content": "3"}, answer("It is 3")]
    assert said(qwen(), row) == [CALLED]


def test_the_built_in_template_renders_tools_and_calls() -> None:
    calls = [{"name": "add", "arguments": {"a": a}} for a in (1, 2)]
    turns = [user("1 and 2"), answer("Wait", tool_calls=calls), {"role": "tool", "content": "3"}, answer("It is 3")]
    using = tokenizer(bos=False, extra=("<|im_start|>", "<|im_end|>"))
    assert said(using, {"tools": [SCHEMA], "messages": turns}, chat_template="builtin:chatml") == [
        '<|im_start|>system\nThe tools:\n<tools>\n{"type": "function", "function": {"name": "add", "parameters": '
        '{"type": "object", "properties": {}}}}\n</tools><|im_end|>\n<|im_start|>user\n1 and 2<|im_end|>\n'
        '<|im_start|>assistant\n[[Wait\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call></s>]]\n'
        "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n[[It is 3</s>]]\n"
    ]


def test_a_template_that_leaves_out_calls_is_refused() -> None:
    """It would train empty answers."""
    row = {"messages": [user("1 and 2"), calling(ARGUMENTS)]}
    with pytest.raises(DataError) as refused:
        said(tokenizer(template=GEMMA), row)
    assert str(refused.value) == (
        "1 of 1 rows of the data cannot be used:\n"
        "  - rows.jsonl:1: the chat template leaves out the tool calls of message 1; use one that renders tools, "
        "such as data.chat_template: builtin:chatml"
    )


def test_a_template_that_refuses_tools_names_one_that_renders_them() -> None:
    row = {"messages": [user("1 and 2"), calling(ARGUMENTS)]}
    with pytest.raises(DataError, match=r"it: no tools; data\.chat_template: builtin:chatml renders tools"):
        said(tokenizer(template="{{ raise_exception('no tools') }}"), row)


def test_calls_in_sharegpt() -> None:
    turns = [("human", "1 and 2"), ("function_call", json.dumps({"name": "add", "arguments": ARGUMENTS}))]
    turns += [("observation", "3"), ("gpt", "It is 3")]
    row = {"tools": json.dumps([SCHEMA]), "conversations": [{"from": who, "value": text} for who, text in turns]}
    assert said(qwen(), row) == [CALLED]


def test_the_end_of_a_turn_is_labelled_after_an_added_token_that_ends_the_answer() -> None:
    using = qwen()
    using.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    row = {"messages": [user("hello"), answer("<tool_call>two</tool_call>"), user("is"), answer("three")]}
    assert said(using, row) == [
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n[[<tool_call>two</tool_call><|im_end|>]]\n"
        "<|im_start|>user\nis<|im_end|>\n<|im_start|>assistant\n[[three<|im_end|>]]\n"
    ]


def test_of_several_templates_the_one_for_tools_renders_conversations_with_tools() -> None:
    using = qwen()
    plain = "{% for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    using.chat_template = {"default": plain, "tool_use": QWEN}
    row = {"messages": [user("1 and 2"), calling(ARGUMENTS), {"role": "tool", "content": "3"}, answer("It is 3")]}
    assert said(using, row | {"tools": [SCHEMA]}) == [CALLED]
    assert said(using, {"messages": [user("a"), answer("b")]}) == ["user a<|im_end|>[[assistant b<|im_end|>]]"]


def test_preferred_calls_are_rendered_with_their_tools() -> None:
    using = qwen()
    row = {"prompt": [user("1 and 2")], "chosen": [calling(json.dumps(ARGUMENTS))], "rejected": [answer("12")]}
    Path("rows.jsonl").write_text(json.dumps(row | {"tools": [SCHEMA]}) + "\n")
    section = DataSection(train="rows.jsonl")  # type: ignore[arg-type]
    (made,) = tokenize(load.load(section, "dpo").train, using, section).rows
    texts = {key: using.decode(ids) for key, ids in made.items()}
    start, _, rest = CALLED.partition("[[")
    assert texts["prompt_ids"] + texts["chosen_ids"] == start + rest.partition("]]")[0]
    assert texts["rejected_ids"].endswith("12<|im_end|>")


# --- templates that rewrite earlier turns -----------------------------------------------------------------------


def test_reasoning_that_the_template_drops_later_is_trained_where_the_model_writes_it() -> None:
    """One row per answer, each exactly what the model sees and should write when it is used."""
    first = answer("two", reasoning_content="one and one")
    using, row = qwen(), {"messages": [user("1+1"), first, user("2+1"), answer("three")]}
    start, head = "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n", "[[<think>\n"
    assert said(using, row) == [
        f"{start}{head}one and one\n</think>\n\ntwo<|im_end|>]]\n",
        f"{start}two<|im_end|>\n<|im_start|>user\n2+1<|im_end|>\n<|im_start|>assistant\n{head}\n</think>\n\n"
        "three<|im_end|>]]\n",
    ]
    made = tokens(row, using)
    assert (
        "1 conversations became 2 rows, one per answer: the chat template renders earlier answers differently, such as "
        "without their reasoning"
    ) in lint(made, using, 310).notes
    assert len(made.lengths) == 2


def test_answers_left_out_make_no_rows() -> None:
    row = {"messages": [user("a"), answer("b", train=False), user("c"), answer("d")]}
    assert len(said(qwen(), row)) == 1


def test_a_conversation_of_one_answer_stays_one_row() -> None:
    assert len(said(qwen(), [{"messages": [user("a"), answer("b", reasoning_content="c")]}])) == 1


def test_gemma_s_end_of_turn_is_labelled() -> None:
    using = tokenizer(extra=("<start_of_turn>", "<end_of_turn>"), template=GEMMA)
    row = {"messages": [user("hello"), answer(" two "), user("is"), answer("three")]}
    assert said(using, row) == [
        "<s><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n[[two<end_of_turn>]]\n"
        "<start_of_turn>user\nis<end_of_turn>\n<start_of_turn>model\n[[three<end_of_turn>]]\n"
    ]


# --- padding, and rows without labels ---------------------------------------------------------------------------


def test_padding_with_eos_has_no_label_and_the_eos_of_an_answer_has_one(tmp_path: Path) -> None:
    using = tokenizer(template="{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    assert using.pad_token_id == using.eos_token_id
    made = tokens(
        [{"messages": [user("hello"), answer("two")]}, {"messages": [user("is"), answer("three " * 9)]}], using
    )
    trainer = sft(tmp_path / "run", train=Dataset.from_list(list(made.rows)), max_steps=1)
    batch = trainer.data_collator(list(made.rows))
    eos, lengths = using.eos_token_id, [len(row["input_ids"]) for row in made.rows]
    assert lengths[0] < lengths[1]
    for i, length in enumerate(lengths):
        assert int(batch["labels"][i, length - 1]) == eos, "the end of the answer"
        assert set(batch["labels"][i, length:].tolist()) <= {-100}, "padding"
        assert int((batch["labels"][i] == eos).sum()) == 1
    assert set(batch["input_ids"][0, lengths[0] :].tolist()) == {eos}
    trainer.train()
    assert all(torch.isfinite(torch.tensor(losses(trainer))))


LONG = {"prompt": "two " * 40, "completion": "three"}
SHORT = {"prompt": "hello ", "completion": "two"}


def test_a_prompt_beyond_max_length_is_dropped_and_counted_and_no_loss_is_nan(tmp_path: Path) -> None:
    made = tokens([SHORT, LONG, SHORT], tokenizer(), max_length=16, overlong="truncate")
    assert (len(made.rows), made.dropped, made.truncated) == (2, 1, 0)
    found = lint(made, tokenizer(), 300)
    found.refuse()
    assert "1 of 3 examples are left out for their length" in found.notes
    trainer = sft(tmp_path / "run", train=Dataset.from_list(list(made.rows)), max_steps=2)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    with pytest.raises(DataError, match=r"1 of 3 rows are longer than data\.max_length"):
        tokens([SHORT, LONG, SHORT], tokenizer(), max_length=16)


def test_a_long_conversation_keeps_the_answers_that_fit() -> None:
    using = qwen()
    using.chat_template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"  # noqa: E501
    row = {"messages": [user("a"), answer("two"), user("three " * 30), answer("is")]}
    assert "[[two<|im_end|>]]" in said(using, row, max_length=40, overlong="truncate")[0]
    row = {"messages": [user("three " * 30), answer("is")]}
    assert tokens([row, row], using, max_length=40, overlong="truncate").dropped == 2


def test_held_out_rows_that_are_all_too_long_are_a_problem() -> None:
    made = tokens(SHORT, tokenizer(), max_length=16)
    others = tokens([LONG, LONG], tokenizer(), max_length=16, overlong="drop")
    with pytest.raises(DataError) as refused:
        lint(made, tokenizer(), 300, others).refuse()
    assert str(refused.value) == (
        "the training data has errors:\n"
        "  - no held-out row is left: 2 of 2 are longer than data.max_length\n"
        "      hint: raise data.max_length"
    )


# --- the boundary between prompt and completion -----------------------------------------------------------------

PARTS = [
    ("hello ", "world"),
    ("hello", " world"),
    ("hel", "lo"),
    ("is it two?", "three"),
    ("two\n", "three"),
    ("", "two"),
]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(("prompt", "completion"), PARTS)
def test_together_and_apart_agree_on_the_text_and_the_mask(kind: str, prompt: str, completion: str) -> None:
    using = ALL[kind]()
    ids, start, joined = pair(using, prompt, completion)
    own = ids[:1] == [using.bos_token_id]
    assert ids[-1] == using.eos_token_id
    together = using(prompt + completion, add_special_tokens=False)["input_ids"]
    assert decode(using, ids[own:-1]) == decode(using, together), "the text of both together"
    learnt = decode(using, ids[start:-1])
    if joined:  # the token at the boundary belongs to the answer
        assert "".join(learnt.split()).endswith("".join(completion.split()))
        assert ids[own:-1] == together
    else:
        assert learnt.removeprefix("##").strip() == completion.strip()  # WordPiece shows a word's continuation
        assert ids[own:start] == using(prompt, add_special_tokens=False)["input_ids"]


def test_prompts_that_run_into_their_completion_are_counted() -> None:
    rows = [{"prompt": "is it two?", "completion": "yes"}, SHORT, {"prompt": "二は", "completion": "二"}]
    assert tokens(rows, tokenizer()).notes == (
        "1 of 3 prompts run into their completion without white space ('is it two?' + 'yes', rows.jsonl:1); "
        'data.separator: "\\n" (or " ") puts one before every completion',
    )


def test_a_separator_begins_the_completion_where_the_model_writes_it() -> None:
    row = {"prompt": "is it two?", "completion": "yes"}
    made = tokens(row, tokenizer(), separator="\n")
    assert shown(tokenizer(), made.rows[0]) == "<s>is it two?[[\nyes</s>]]"
    assert made.notes == ()
