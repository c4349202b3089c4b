"""Data that cannot be used: the full message for each mistake, and nothing written."""

# ruff: noqa: E501 (messages stand here as they are printed)

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lorary.errors import DataError
from lorary.train.config.config import DataSection
from lorary.train.data import _files, load
from lorary.train.data.lint import lint
from lorary.train.data.tokenize import tokenize
from tests.train.small import PLAIN_CHAT, tokenizer

TABLE: dict[str, tuple[dict[str, bytes], str, dict[str, Any]]] = {}


def bad(name: str, files: dict[str, bytes], message: str, **options: Any) -> None:
    """options: task, template, bos, and fields of the data section."""
    TABLE[name] = (files, message, options)


def rows(*values: Any) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def parquet(table: Any) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table if isinstance(table, pyarrow.Table) else pyarrow.table(table), sink)
    return sink.getvalue()


BAD_TEXT = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"ok", b"\xff\xfe"]).buffers())
GOOD = {"prompt": "hello ", "completion": "two"}

# fmt: off
bad("an empty file", {"rows.jsonl": b""}, 'rows.jsonl has no rows')
bad("blank lines", {"rows.jsonl": b"\n\n  \n"}, 'rows.jsonl has no rows')
bad("UTF-16", {"rows.jsonl": '{"text": "x"}\n'.encode("utf-16")}, """\
cannot read rows.jsonl:
  - rows.jsonl: is UTF-16
      hint: save it as UTF-8""")
bad("bytes that are not text", {"rows.jsonl": b'{"text": "x"}\n{"text": "\xff"}\n'}, """\
1 of 2 rows of rows.jsonl cannot be used:
  - rows.jsonl:2: byte 0xff is not UTF-8
      hint: save it as UTF-8""")
bad("NUL bytes", {"rows.jsonl": b'{"text": "x"}\n{"text": "\0"}\n'}, """\
1 of 2 rows of rows.jsonl cannot be used:
  - rows.jsonl:2: contains a NUL byte""")
bad("a NUL in a text", {"rows.jsonl": rows({"text":"a\0b"})}, """\
1 of 1 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: `text` contains a NUL character; remove it""")
bad("half a character", {"rows.jsonl": b'{"text": "\\ud800"}\n'}, """\
1 of 1 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: `text` contains half of a surrogate pair (\\ud800), which is not Unicode text; remove it, or write the whole pair""")
bad("not JSON", {"rows.jsonl": b'{"text": "x"}\n{"text": \n{text: 1}\n'}, """\
2 of 3 rows of rows.jsonl cannot be used:
  - rows.jsonl:2: not JSON: expecting value (column 10)
  - rows.jsonl:3: not JSON: expecting property name enclosed in double quotes (column 2)""")
bad("more bad rows than are shown", {"rows.jsonl": b'{"text": "x"}\n' + b"?\n"*42}, """\
42 of 43 rows of rows.jsonl cannot be used:
  - rows.jsonl:2: not JSON: expecting value (column 1)
  - rows.jsonl:3: not JSON: expecting value (column 1)
  - rows.jsonl:4: not JSON: expecting value (column 1)
  - rows.jsonl:5: not JSON: expecting value (column 1)
  - rows.jsonl:6: not JSON: expecting value (column 1)
  - and 37 more""")
bad("a key twice", {"rows.jsonl": b'{"text": "x", "text": "y"}\n'}, """\
1 of 1 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: the key 'text' appears twice""")
bad("NaN", {"rows.jsonl": b'{"text": NaN}\n'}, """\
1 of 1 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: NaN is not a JSON number""")
bad("deep nesting", {"rows.jsonl": b'{"text": ' + b"["*200000 + b'\n'}, """\
1 of 1 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: nested too deeply""")
bad("a number beyond floats", {"rows.jsonl": b'{"text": "x", "weight": 1e999}\n'}, """\
1 of 1 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: the number '1e999' is too large for a float""")
bad("a number of 5,000 digits", {"rows.jsonl": b'{"text": ' + b"1"*5000 + b'}\n'}, """\
1 of 1 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: an integer of 5000 digits""")
bad("rows that are not objects", {"rows.jsonl": b'["x"]\n"y"\n'}, """\
unknown row format in rows.jsonl:
  - rows.jsonl:1: the rows are not objects with fields
      hint: name the fields with data.columns, such as {prompt: question}; the formats are: preference (chosen, rejected); messages (messages); sharegpt (conversations); prompt-completion (prompt, completion); alpaca (instruction, output); text (text)""")
bad("a broken array", {"rows.json": b'[{"text": "x"},\n {"text": }]'}, """\
cannot read rows.json:
  - rows.json: not JSON: expecting value (line 2, column 11)""", train="rows.json")
bad("fields that mean nothing", {"rows.jsonl": rows({"promt":"a","answer":"b"})}, """\
unknown row format in rows.jsonl:
  - rows.jsonl:1: found the fields `answer`, `promt`
      hint: name the fields with data.columns, such as {prompt: promt}; the formats are: preference (chosen, rejected); messages (messages); sharegpt (conversations); prompt-completion (prompt, completion); alpaca (instruction, output); text (text)""")
bad("a missing field", {"rows.jsonl": rows(GOOD, {"prompt":"hello"}, GOOD)}, """\
1 of 3 rows of rows.jsonl cannot be used:
  - rows.jsonl:2: has no `completion`""")
bad("mixed formats", {"rows.jsonl": rows(GOOD, GOOD, {"text":"x"}, {"messages":[user("a"),answer("b")]})}, """\
2 of 4 rows of rows.jsonl cannot be used:
  - rows.jsonl:3: has no `prompt` or `completion`; it looks like text, the others like prompt-completion
  - rows.jsonl:4: has no `prompt` or `completion`; it looks like messages, the others like prompt-completion""")
bad("the wrong type", {"rows.jsonl": rows(GOOD, {"prompt":"a","completion":3}, {"prompt":"a","completion":["x"]})}, """\
2 of 3 rows of rows.jsonl cannot be used:
  - rows.jsonl:2: `completion` must be a text, not a number
  - rows.jsonl:3: `completion` must be a text, not a list""")
bad("empty answers", {"rows.jsonl": rows({"prompt":"a","completion":""},{"prompt":"b","completion":" \n"})}, """\
2 of 2 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: `completion` is empty
  - rows.jsonl:2: `completion` is empty""")
bad("empty texts", {"rows.jsonl": rows({"text":""},{"text":" "})}, 'every text of rows.jsonl is empty')
bad("a ragged table", {"rows.csv": b"prompt,completion\na,b\nc\nd,e,f\n"}, """\
2 of 3 rows of rows.csv cannot be used:
  - rows.csv:3: 1 field, but the header has 2
  - rows.csv:4: 3 fields, but the header has 2""", train="rows.csv")
bad("two columns of one name", {"rows.csv": b"text,text\na,b\n"}, """\
cannot read rows.csv:
  - rows.csv:1: two columns are named `text`""", train="rows.csv")
bad("a header alone", {"rows.csv": b"text\n"}, 'rows.csv has no rows', train="rows.csv")
bad("an open quote", {"rows.csv": b'text\nx\n"y\n'}, """\
1 of 2 rows of rows.csv cannot be used:
  - rows.csv:3: not CSV: unexpected end of data""", train="rows.csv")
bad("not parquet", {"rows.parquet": b"PAR1 not really"}, """\
cannot read rows.parquet:
  - rows.parquet: not a parquet file, or a damaged one""", train="rows.parquet")
bad("an unknown kind of file", {"rows.xlsx": b"x"}, """\
cannot read rows.xlsx:
  - unknown file type `.xlsx`
      hint: known: .csv, .json, .jsonl, .md, .parquet, .tsv, .txt, and these as .gz, .bz2, .zst""", train="rows.xlsx")
bad("a mistyped file", {"rows.jsonl": rows(GOOD)}, """\
cannot read row.jsonl:
  - there is no such file or folder
      hint: did you mean `rows.jsonl`?""", train="row.jsonl")
bad("a split of a file", {"rows.jsonl": rows(GOOD)}, """\
cannot read rows.jsonl#test:
  - rows.jsonl is one file and has no split `test`""", train="rows.jsonl#test")
bad("a folder without the split", {"set/train.jsonl": rows(GOOD), "set/notes.md": b"x"}, """\
cannot read the folder set:
  - no file of the split `validation` (validation*, valid*, val*, dev*, eval*; .csv, .json, .jsonl, .md, .parquet, .tsv, .txt)
      hint: it contains notes.md, train.jsonl""", train="set#validation")
bad("a mistyped built-in data set", {}, """\
no built-in data set is called 'builtin:docstring'
  - unknown name
      hint: did you mean `builtin:docstrings` or `builtin:docstrings-chat` or `builtin:topics`?""", train="builtin:docstring")
bad("a mistyped split", {}, """\
builtin:topics has no split 'tset'
  - split: got 'tset'
      hint: use train or validation""", train="builtin:topics#tset")
bad("an unknown role", {"rows.jsonl": rows({"messages":[{"role":"bot","content":"a"},answer("b")]})}, """\
1 of 1 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: `messages[0]` has the role 'bot'; known: system, developer, user, assistant, tool""")
bad("no answer", {"rows.jsonl": rows({"messages":[user("a")]}, {"messages":[]}, {"messages":[user("a"),answer("")]}, {"messages":[{"content":"x"}]})}, """\
4 of 4 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: has no assistant message to train on
  - rows.jsonl:2: `messages` is empty
  - rows.jsonl:3: `messages[1]` is an empty answer
  - rows.jsonl:4: `messages[0]` must have `role` and `content`""")
bad("pictures", {"rows.jsonl": rows({"messages":[{"role":"user","content":[{"type":"image"}]},answer("b")]})}, """\
1 of 1 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: `messages[0]` has image; only text is supported""")
bad("an unknown speaker", {"rows.jsonl": rows({"conversations":[{"from":"alien","value":"a"}]},{"conversations":[{"value":"a"}]})}, """\
2 of 2 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: `conversations[0]` is from 'alien'; known: assistant, chatgpt, function_call, gpt, human, observation, system, tool, user
  - rows.jsonl:2: `conversations[0]` must have `from` and `value`""")
bad("preferences without a difference", {"rows.jsonl": rows({"prompt":"a","chosen":"b","rejected":"b"},{"chosen":"b","rejected":"c"},{"chosen":[user("a"),answer("b")],"rejected":[user("x"),answer("c")]})}, """\
3 of 3 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: `chosen` and `rejected` are the same
  - rows.jsonl:2: all three must be texts, or all three lists of messages: `prompt` is nothing, `chosen` is a text, `rejected` is a text
  - rows.jsonl:3: `chosen` and `rejected` must begin with the same prompt, and continue after it""", task="dpo")
bad("preferences for SFT", {"rows.jsonl": rows({"prompt":"a","chosen":"b","rejected":"c"})}, """\
cannot train on rows.jsonl:
  - rows.jsonl:1: task `sft` does not train on preference pairs
      hint: set task: dpo or reward, or map the answer with data.columns""")
bad("pairs for DPO", {"rows.jsonl": rows(GOOD)}, """\
cannot train on rows.jsonl:
  - rows.jsonl:1: task `dpo` trains on preference pairs, not `prompt-completion`
      hint: use `preference` or task: sft""", task="dpo")
bad("labelled texts for SFT", {"rows.jsonl": rows({"text":"a","label":"b"})}, """\
cannot train on rows.jsonl:
  - rows.jsonl:1: task `sft` does not train on labelled texts
      hint: set task: classification, or data.format: text to leave the labels out""")
bad("judged answers for SFT", {"rows.jsonl": rows({"prompt":"a","completion":"b","label":True})}, """\
cannot train on rows.jsonl:
  - rows.jsonl:1: task `sft` does not train on answers with a label
      hint: set task: kto, or data.format: prompt-completion to leave the labels out""")
bad("answers without a label for KTO", {"rows.jsonl": rows(GOOD)}, """\
cannot train on rows.jsonl:
  - rows.jsonl:1: task `kto` trains on answers with a label, not `prompt-completion`
      hint: use `prompt-completion-label` or task: sft""", task="kto")
bad("a text for GRPO", {"rows.jsonl": rows({"text":"a"})}, """\
cannot train on rows.jsonl:
  - rows.jsonl:1: task `grpo` trains on prompts, not `text`
      hint: use `prompt` or task: sft""", task="grpo")
bad("no label to classify", {"rows.jsonl": rows({"text":"a"})}, """\
cannot train on rows.jsonl:
  - rows.jsonl:1: task `classification` trains on labelled texts, not `text`
      hint: use `classification` or task: sft""", task="classification")
bad("judgements that are none", {"rows.jsonl": rows(GOOD | {"label":"yes"}, GOOD | {"label":2}, {"prompt":"a","completion":[answer("b")],"label":True})}, """\
3 of 3 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: `label` must be true or false, not 'yes'
  - rows.jsonl:2: `label` must be true or false, not 2
  - rows.jsonl:3: `prompt` and `completion` must both be texts, or both lists of messages""", task="kto")
bad("labels that are none", {"rows.jsonl": rows({"text":"a","label":" "}, {"text":"a","label":{"x":1}}, {"text":"a","label":[0.5]}, {"text":" ","label":1}, {"text":"a","text_pair":3,"label":1})}, """\
5 of 5 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: `label` is empty
  - rows.jsonl:2: `label` must be a name, a number or a list of names, not an object
  - rows.jsonl:3: `label` is a list, which must hold names or whole numbers
  - rows.jsonl:4: `text` is empty
  - rows.jsonl:5: `text_pair` must be a text, not a number""", task="classification")
bad("a column that is not there", {"rows.jsonl": rows({"q":"a","completion":"b"})}, """\
cannot rename the fields of a row:
  - rows.jsonl:1: has no field `question`, which data.columns names; it has `q`, `completion`""", columns={"prompt":"question"})
bad("one row to divide", {"rows.jsonl": rows(GOOD)}, """\
cannot hold out rows:
  - data.validation_split: there is only one row""", validation_split=0.5)
bad("no chat template", {"rows.jsonl": rows({"messages":[user("a"),answer("b")]})}, """\
cannot render the conversations:
  - rows.jsonl:1: the rows are conversations, and the tokenizer has no chat template to render them with
      hint: set data.chat_template: builtin:chatml, or to a Jinja file""")
bad("a template that refuses", {"rows.jsonl": rows({"messages":[user("a"),answer("b")]})}, """\
1 of 1 rows of the data cannot be used:
  - rows.jsonl:1: the chat template refuses it: only users speak""", template="{{ raise_exception('only users speak') }}")
bad("a template that is not Jinja", {"rows.jsonl": rows({"messages":[user("a"),answer("b")]})}, """\
1 of 1 rows of the data cannot be used:
  - rows.jsonl:1: the chat template refuses it: Expected an expression, got 'end of statement block'""", template="{% for %}")
bad("a template that rewrites the past", {"rows.jsonl": rows({"messages":[user("a"),answer("b"),user("c"),answer("d")]})}, """\
1 of 1 rows of the data cannot be used:
  - rows.jsonl:1: the chat template renders what precedes message 1 differently when the answer follows, so the answer cannot be separated from the rest; use a template with {% generation %} marks, such as data.chat_template: builtin:chatml""", template="{% for m in messages %}{{ m.content if loop.last else '?' }}{% endfor %}")
bad("a mistyped template", {"rows.jsonl": rows({"messages":[user("a"),answer("b")]})}, """\
unknown chat template:
  - data.chat_template: cannot read `builtin:chatlm`: No such file or directory
      hint: did you mean `builtin:chatml`?""", chat_template="builtin:chatlm")
bad("overlong rows", {"rows.jsonl": rows(GOOD, *({"prompt":"a ","completion":"two "*n} for n in range(20,28)))}, """\
8 of 9 rows are longer than data.max_length (16 tokens):
  - rows.jsonl:2: 26 tokens
  - rows.jsonl:3: 27 tokens
  - rows.jsonl:4: 28 tokens
  - rows.jsonl:5: 29 tokens
  - rows.jsonl:6: 30 tokens
  - and 3 more
  - the longest has 33 tokens
      hint: raise data.max_length to 33, or set data.overlong to drop or truncate""", max_length=16)
bad("pairs that cannot be divided", {"rows.jsonl": rows(GOOD)}, """\
cannot shorten the data:
  - data.overlong: `split` makes several rows of one, which only plain text allows
      hint: use drop or truncate""", overlong="split")
bad("answers in plain text", {"rows.jsonl": rows({"text":"x"})}, """\
cannot mask the data:
  - data.loss: `completion` trains on answers only, and plain text has none
      hint: use `all`, or rows with a prompt""", loss="completion")
bad("nothing short enough", {"rows.jsonl": rows({"prompt":"a ","completion":"two "*20})}, """\
the training data has errors:
  - no row is left: 1 of 1 are longer than data.max_length
      hint: raise data.max_length""", max_length=16, overlong="drop")
bad("two beginnings", {"rows.jsonl": rows({"messages":[user("a"),answer("b")]})}, """\
the training data has errors:
  - 1 of 1 rows have more than one BOS ('<s>')
      hint: the text or the chat template writes one that the tokenizer adds as well""", template="<s>"+PLAIN_CHAT)
bad("every token is labelled", {"rows.jsonl": rows({"prompt":"","completion":"x"})}, """\
the training data has errors:
  - every token has a label (100 % labelled), prompts included
      hint: look at the sample; set data.loss: all if that is what you want""", bos=False)
bad("bytes that are not text in a used column", {"rows.parquet": parquet({"text": BAD_TEXT})}, """\
1 of 2 rows of rows.parquet cannot be used:
  - rows.parquet: row 2: `text`: byte 0xff is not UTF-8""", train="rows.parquet")
bad("a far date in a used column", {"rows.parquet": parquet({"text": pyarrow.array([10**13], pyarrow.timestamp("s"))})}, """\
1 of 1 rows of rows.parquet cannot be used:
  - rows.parquet: row 1: `text` holds a timestamp[ms] that Python cannot represent""", train="rows.parquet")
bad("numbers in a column of texts", {"rows.parquet": parquet({"text": [1, 2]})}, """\
2 of 2 rows of rows.parquet cannot be used:
  - rows.parquet: row 1: `text` must be a text, not a number
  - rows.parquet: row 2: `text` must be a text, not a number""", train="rows.parquet")
bad("nothing in a column of texts", {"rows.parquet": parquet({"text": ["a", None]})}, """\
1 of 2 rows of rows.parquet cannot be used:
  - rows.parquet: row 2: has no `text`""", train="rows.parquet")
bad("half a parquet file", {"rows.parquet": parquet({"text": ["a"] * 99})[:300]}, """\
cannot read rows.parquet:
  - rows.parquet: not a parquet file, or a damaged one""", train="rows.parquet")
bad("two columns of one name in parquet", {"rows.parquet": parquet(pyarrow.table([["a"], ["b"]], names=["text", "text"]))}, """\
cannot read rows.parquet:
  - rows.parquet: two columns are named `text`""", train="rows.parquet")
bad("not gzip", {"rows.jsonl.gz": b"hello"}, """\
cannot read rows.jsonl.gz:
  - rows.jsonl.gz: not a gz file, or a damaged one (zlib inflate failed: incorrect header check)""", train="rows.jsonl.gz")
bad("half a gzip file", {"rows.jsonl.gz": gzip.compress(rows(*({"text": str(i)} for i in range(99))), mtime=0)[:60]}, """\
cannot read rows.jsonl.gz:
  - rows.jsonl.gz: not a gz file, or a damaged one (Truncated compressed stream)""", train="rows.jsonl.gz")
bad("a compressed file of an unknown kind", {"rows.xml.gz": b"x"}, """\
cannot read rows.xml.gz:
  - unknown file type `.xml.gz`
      hint: known: .csv, .json, .jsonl, .md, .parquet, .tsv, .txt, and these as .gz, .bz2, .zst""", train="rows.xml.gz")
bad("a file without a type", {"rows": b"x"}, """\
cannot read rows:
  - its name does not end in a file type
      hint: known: .csv, .json, .jsonl, .md, .parquet, .tsv, .txt, and these as .gz, .bz2, .zst""", train="rows")
bad("line ends of old Macs", {"rows.csv": b"text\rone\rtwo\r"}, """\
1 of 1 rows of rows.csv cannot be used:
  - rows.csv:1: a carriage return ends a line
      hint: save it with \\n line ends""", train="rows.csv")
bad("a document in Latin-1", {"rows.txt": "a\nb\xe9".encode("latin-1")}, """\
cannot read rows.txt:
  - rows.txt:2: byte 0xe9 is not UTF-8
      hint: save it as UTF-8""", train="rows.txt")
bad("a document with a NUL byte", {"rows.md": b"a\nb\n\0"}, """\
cannot read rows.md:
  - rows.md:3: contains a NUL byte""", train="rows.md")
bad("an array with a NUL byte", {"rows.json": b'[{"text":\n"\0"}]'}, """\
cannot read rows.json:
  - rows.json:2: contains a NUL byte""", train="rows.json")
bad("an empty document", {"rows.txt": b" \n"}, 'every text of rows.txt is empty', train="rows.txt")
bad("a folder with the name of a file", {"rows.jsonl/notes.doc": b"x"}, """\
cannot read the folder rows.jsonl:
  - no file of the split `train` (train*; .csv, .json, .jsonl, .md, .parquet, .tsv, .txt)
      hint: it contains notes.doc""")
bad("half a character in a name", {"rows.jsonl": b'{"\\ud800": 1}\n'}, """\
unknown row format in rows.jsonl:
  - rows.jsonl:1: found the fields `'\\ud800'`
      hint: name the fields with data.columns, such as {prompt: question}; the formats are: preference (chosen, rejected); messages (messages); sharegpt (conversations); prompt-completion (prompt, completion); alpaca (instruction, output); text (text)""")
bad("half a character in a role", {"rows.jsonl": b'{"messages": [{"role": "\\udc00", "content": "x"}]}\n'}, """\
1 of 1 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: `messages` contains half of a surrogate pair (\\udc00), which is not Unicode text; remove it, or write the whole pair""")
bad("half a character in the JSON text of tools", {"rows.jsonl": rows({"tools": '[{"name": "\\ud800"}]', "messages": [user("a"), answer("b")]})}, """\
1 of 1 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: `tools` contains half of a surrogate pair (\\ud800), which is not Unicode text; remove it, or write the whole pair""")
bad("tools that are not JSON", {"rows.jsonl": rows({"tools": "[{", "messages": [user("a"), answer("b")]}, {"tools": {"name": "f"}, "messages": [user("a"), answer("b")]})}, """\
2 of 2 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: `tools`: not JSON: expecting property name enclosed in double quotes (column 3)
  - rows.jsonl:2: `tools` must be a list of objects, each the JSON schema of a function""")
bad("calls that are not calls", {"rows.jsonl": rows(*({"messages": [user("a"), {"role": "assistant", "tool_calls": calls}]} for calls in ("f", [{"function": "f"}], [{"name": "f", "arguments": "x"}], [{"name": "f", "arguments": [1]}])))}, """\
4 of 4 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: `messages[1]`.tool_calls must be a list of calls
  - rows.jsonl:2: `messages[1]`.tool_calls[0] must have a `function` with `name` and `arguments`
  - rows.jsonl:3: the arguments of `messages[1]`.tool_calls[0]: not JSON: expecting value (column 1)
  - rows.jsonl:4: the arguments of `messages[1]`.tool_calls[0] must be an object, or the JSON text of one""")
bad("nothing to separate", {"rows.jsonl": rows({"text": "x"})}, """\
cannot separate the data:
  - data.separator: no row has a prompt and a completion that are texts, so there is nothing to separate
      hint: remove it""", separator="\n")
bad("special tokens that are refused", {"rows.jsonl": rows(GOOD, {"prompt": "a <|end|>", "completion": "b"})}, """\
1 of 2 rows of the data cannot be used:
  - rows.jsonl:2: its text contains the special token '<|end|>'; data.special_tokens: escape reads them as text""", special_tokens="refuse")
bad("a kind of content that is a list", {"rows.jsonl": rows({"messages": [
    {"role": "user", "content": [{"type": ["text"], "text": "a"}]}, answer("b")]})}, """\
1 of 1 rows of rows.jsonl cannot be used:
  - rows.jsonl:1: `messages[0]` has a list; only text is supported""")
bad("the home of nobody", {}, """\
cannot read ~nobody-of-this-name/rows.jsonl:
  - there is no such file or folder""", train="~nobody-of-this-name/rows.jsonl")
bad("one bad source of two", {"a.jsonl": rows(GOOD), "b.jsonl": b"?\n"}, """\
1 of 1 rows of b.jsonl cannot be used:
  - b.jsonl:1: not JSON: expecting value (column 1)""", train=["a.jsonl", {"path": "b.jsonl", "weight": 2}])
bad("a row of a megabyte that is too long", {"rows.jsonl": rows({"prompt": "x", "completion": "two " * 300000})}, """\
1 of 1 rows are longer than data.max_length (1,024 tokens):
  - rows.jsonl:1: 300,005 tokens
  - the longest has 300,005 tokens
      hint: raise data.max_length to 300005, or set data.overlong to drop or truncate""")
# fmt: on


@pytest.mark.parametrize("name", TABLE)
def test_every_bad_row_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents, message, options = TABLE[name]
    options = dict(options)
    monkeypatch.chdir(tmp_path)
    for file, content in contents.items():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    using = tokenizer(extra=("<|end|>",), template=options.pop("template", None), bos=options.pop("bos", True))
    task = options.pop("task", "sft")
    section = DataSection(**({"train": "rows.jsonl"} | options))
    with pytest.raises(DataError) as refused:
        lint(tokenize(load.load(section, task).train, using, section), using, 300).refuse()
    assert str(refused.value) == message
    assert refused.value.exit_code == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_a_line_longer_than_any_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "MAX_LINE", 100)
    (tmp_path / "rows.jsonl").write_bytes(rows({"text": "x"}, {"text": "x" * 100}))
    with pytest.raises(DataError) as refused:
        load.load(DataSection(train=str(tmp_path / "rows.jsonl")))
    assert str(refused.value) == (
        "1 of 2 rows of rows.jsonl cannot be used:\n"
        "  - rows.jsonl:2: a line of more than 100 bytes\n"
        "      hint: write one row per line"
    )


def test_without_a_network_the_hub_is_named_as_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as refused:
        load.load(DataSection(train="no-one/no-data"))
    assert str(refused.value).startswith("cannot load `no-one/no-data` from the Hub:\n  - ")
    assert "no file or folder has that name either; the Hub needs a network" in str(refused.value)
