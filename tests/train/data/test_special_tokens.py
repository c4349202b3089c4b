"""Special tokens inside the texts of rows: counted, and kept, escaped or refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from lorary.errors import DataError
from lorary.train.config.config import DataSection
from lorary.train.data.lint import lint
from lorary.train.data.row_formats import Chat, Example, Pair, Preference, Text
from lorary.train.data.tokenize import Tokens, tokenize
from tests.train.data.several_tokenizers import ALL, SPECIAL
from tests.train.small import shown

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
MARKED = TEMPLATE.replace(
    "{{ m.content | trim }}<|end|>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content | trim }}<|end|>{% endif %}",
)
TYPED = "is <|end|>two </s><s>three"


def made(kind: str, template: str = TEMPLATE) -> Any:
    using = ALL[kind]()
    using.chat_template = template
    return using


def tokens(example: Example | Sequence[Example], using: Any, policy: str, **section: Any) -> Tokens:
    examples = [example] if isinstance(example, Text | Pair | Chat | Preference) else list(example)
    return tokenize(examples, using, DataSection(train="x", special_tokens=policy, **section))  # type: ignore[arg-type]


def chat(user: str, answer: str, where: str = "a.jsonl:1") -> Chat:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return Chat(turns, (False, True), None, where)


def count(using: Any, row: dict[str, list[int]], token: str = "<|end|>") -> int:
    return row["input_ids"].count(using.convert_tokens_to_ids(token))


# Lossless up to the spaces that the decoder of a WordPiece sets.
def same_text(using: Any, ids: Sequence[int], text: str) -> bool:
    return "".join(using.decode(ids).split()) == "".join(text.split())


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["spans", "marks"])
def test_an_escaped_conversation_has_the_template_s_special_tokens_alone(kind: str, template: str) -> None:
    using = made(kind, template)
    kept, escaped = (tokens(chat(TYPED, TYPED), using, policy).rows[0] for policy in ("keep", "escape"))
    assert count(using, kept) == 4, "typed, they end the turns: the fault"
    assert count(using, escaped) == 2
    assert [count(using, escaped, token) for token in ("<s>", "</s>")] == [1, 0]
    rendered = f"<s>user\n{TYPED}<|end|>\nassistant\n{TYPED}<|end|>\n"
    assert same_text(using, escaped["input_ids"], rendered)
    learnt = [i for i, label in zip(escaped["input_ids"], escaped["labels"], strict=True) if label != -100]
    assert same_text(using, learnt, f"{TYPED}<|end|>")
    assert learnt[-1] == using.convert_tokens_to_ids("<|end|>")


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("text", [*SPECIAL, TYPED, "hello<|end|>", "<s>hello", " </s> "])
def test_escaped_texts_and_pairs_never_hold_a_control_token(kind: str, text: str) -> None:
    using = made(kind)
    own = using("a")["input_ids"][:1] == [using.bos_token_id]
    row = tokens(Text(text, "a.txt"), using, "escape").rows[0]["input_ids"]
    assert row[-1] == using.eos_token_id
    body = row[own:-1]
    assert not set(body) & {using.convert_tokens_to_ids(token) for token in SPECIAL}
    assert same_text(using, body, text)
    row = tokens(Pair(f"hello {text} ", f"is {text}", "a.jsonl:1"), using, "escape").rows[0]
    assert sum(count(using, row, token) for token in SPECIAL) == own + 1
    assert same_text(using, row["input_ids"][own:-1], f"hello {text} is {text}")


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_transformers_own_switch_finds_them_again(kind: str) -> None:
    """The negative control: control tokens are in the vocabularies of these models."""
    ids = made(kind)("hello </s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert made(kind).eos_token_id in ids


@pytest.mark.parametrize("kind", ALL)
def test_rows_without_special_tokens_are_the_same_under_every_policy(kind: str) -> None:
    using = made(kind)
    examples = [chat("hello world?", "the answer"), chat("is it", "two")]
    assert tokens(examples, using, "escape").rows == tokens(examples, using, "keep").rows
    assert tokens(examples, using, "refuse").rows == tokens(examples, using, "keep").rows


def test_where_the_tokenizer_is_lossless_the_escaped_text_has_the_tokens_of_plain_text() -> None:
    using = made("byte-level")
    row = tokens(Text(TYPED, "a.txt"), using, "escape").rows[0]["input_ids"]
    assert row == [*using(TYPED, split_special_tokens=True)["input_ids"], using.eos_token_id]


def test_escaped_preference_pairs() -> None:
    using = made("unigram")
    texts = Preference("hello </s> ", "two<|end|>", "three", "a.jsonl:1")
    row = tokens(texts, using, "escape").rows[0]
    assert row["prompt_ids"].count(using.eos_token_id) == 0
    assert [row[key].count(using.eos_token_id) for key in ("chosen_ids", "rejected_ids")] == [1, 1]
    turns = [[{"role": "assistant", "content": text}] for text in ("two <|end|>", "three")]
    row = tokens(Preference([{"role": "user", "content": "<|end|>"}], *turns, "a.jsonl:1"), using, "escape").rows[0]
    end = using.convert_tokens_to_ids("<|end|>")
    assert [row[key].count(end) for key in ("prompt_ids", "chosen_ids", "rejected_ids")] == [1, 1, 1]


def test_names_and_arguments_of_tools_are_escaped_as_well() -> None:
    using = made("byte-level")
    using.chat_template = "{{ tools | tojson }}" + TEMPLATE.replace(
        "{{ m.content", "{{ m.tool_calls | tojson if m.tool_calls else m.content"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"<|end|>": "</s>"}}}
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    example = Chat(turns, (False, True), [{"name": "f", "description": "writes <|end|>"}], "a.jsonl:1")
    row = tokens(example, using, "escape").rows[0]
    assert (count(using, row), count(using, row, "</s>")) == (2, 0)
    assert '{"<|end|>": "</s>"}' in using.decode(row["input_ids"])
    assert "writes <|end|>" in using.decode(row["input_ids"])


def test_special_tokens_are_counted_with_their_places() -> None:
    using = made("byte-level")
    examples = [chat("hello <|end|>", "two"), chat("is", "two"), chat("<|end|> </s>", "<|end|>", "a.jsonl:3")]
    found = lint(tokens(examples, using, "keep"), using, 300).notes
    assert (
        "2 rows have special tokens in the text, which act as such: '<|end|>' in 2 (first: a.jsonl:1), '</s>' in 1 "
        "(first: a.jsonl:3); set data.special_tokens: escape if they are meant as text, or refuse"
    ) in found
    assert (
        "2 rows have special tokens in the text, escaped: '<|end|>' in 2 (first: a.jsonl:1), '</s>' in 1 (first: "
        "a.jsonl:3)"
    ) in lint(tokens(examples, using, "escape"), using, 300).notes


def test_a_beginning_and_an_end_that_the_tokenizer_writes_itself_are_not_counted() -> None:
    using = made("byte-level")
    assert tokens([Text("<s>hello</s>", "a"), Pair("<s>hello ", "two</s>", "b")], using, "keep").notes == ()


def test_refused_rows_are_named() -> None:
    using = made("byte-level")
    with pytest.raises(DataError) as refused:
        tokens([chat("hello", "two"), chat("is <|end|>?", "two</s>", "a.jsonl:2")], using, "refuse")
    assert str(refused.value) == (
        "1 of 2 rows of the data cannot be used:\n"
        "  - a.jsonl:2: its text contains the special tokens '<|end|>', '</s>'; data.special_tokens: escape reads "
        "them as text"
    )


def test_the_character_that_escaping_needs_is_refused() -> None:
    with pytest.raises(DataError, match="contains U\\+10FFFD, so its special tokens cannot be escaped"):
        tokens(chat("<|end|>\U0010fffd", "two"), made("byte-level"), "escape")
    tokens(chat("\U0010fffd", "two"), made("byte-level"), "escape")


def test_tokenizers_without_a_fast_form_cannot_escape() -> None:
    class Slow:
        added_tokens_decoder: ClassVar[dict[int, Any]] = {}
        all_special_tokens, all_special_ids = ("</s>",), (1,)
        bos_token, eos_token = None, "</s>"

    from lorary.train.data.special_tokens import SpecialTokens

    with pytest.raises(DataError, match="Slow is not a fast tokenizer, and only these can be escaped"):
        SpecialTokens(Slow(), "escape").tokenizer_for(Text("a </s>", "a.txt"))


def test_text_that_looks_like_the_markers_is_text() -> None:
    """Other added tokens, such as `<think>`, belong to answers and are kept."""
    using = made("byte-level")
    using.add_tokens(["<think>"])
    row = tokens(chat("<|end|>", "<think>two"), using, "escape").rows[0]
    assert count(using, row, "<think>") == 1
    assert "[[<think>two<|end|>]]" in shown(using, row)
