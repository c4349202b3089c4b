"""Bad requests: the exact status and message of each; and after all of them, the server as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serve.http.live import BASE, Live

pytestmark = pytest.mark.xdist_group("http")  # one server for all

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
USER = [{"role": "user", "content": "hi"}]


def chat(**changes: Any) -> tuple[str, Any]:
    return CHAT, {"model": BASE, "messages": USER, "max_tokens": 2} | changes


def text(**changes: Any) -> tuple[str, Any]:
    return TEXT, {"model": BASE, "prompt": "x", "max_tokens": 2} | changes


def load(**body: Any) -> tuple[str, Any]:
    return LOAD, body


_ROLES = "system, developer, user, assistant, tool, function"
_NAME = "is not made of letters, digits, `.`, `_` and `-`, in at most 3 parts with `/`"
_SHORTEN = "and the context is 256: shorten the prompt or `max_tokens`"
_PROMPT = "must be a text, a list of texts, token ids, or lists of token ids"
_TAKEN = "If you want to load the adapter in place, set 'load_inplace' to True."
# ((path, body), status, message)
CASES: list[tuple[tuple[str, Any], int, str]] = [
    # the body
    ((TEXT, b""), 400, "the body is empty"),
    (
        (TEXT, b"{"),
        400,
        "the body cannot be read: not JSON: expecting property name enclosed in double quotes (column 2)",
    ),
    ((TEXT, b"\xff{}"), 400, "the body cannot be read: not UTF-8: byte 0xff at offset 0"),
    ((TEXT, b"[1]"), 400, "the body must be a JSON object, not list"),
    ((TEXT, b'{"model": 1, "model": 2}'), 400, "the body cannot be read: the key 'model' appears twice"),
    ((TEXT, b'{"temperature": NaN}'), 400, "the body cannot be read: NaN is not a JSON number"),
    ((TEXT, b'{"temperature": 1e999}'), 400, "the body cannot be read: the number '1e999' is too large for a float"),
    ((TEXT, b"[" * 100_000), 400, "the body cannot be read: nested too deeply"),
    ((TEXT, b'{"seed": ' + b"9" * 5000 + b"}"), 400, "the body cannot be read: an integer of 5000 digits"),
    ((TEXT, rb'{"model": "\ud800"}'), 400, "the body holds half of a surrogate pair, which is not Unicode text"),
    ((TEXT, {}), 400, "`model`: is missing; `prompt`: is missing"),
    ((CHAT, {}), 400, "`model`: is missing; `messages`: is missing"),
    # the model and its adapters
    (text(model=""), 400, "`model`: must have at least 1 character, not ''"),
    (text(model=3), 400, "`model`: must be a valid string, not 3"),
    (text(model="nobody"), 404, "unknown adapter: no adapter has the name 'nobody'"),
    (text(model="A"), 404, "unknown adapter: no adapter has the name 'A' (did you mean `a`?)"),
    (text(model=f"{BASE}:nobody"), 404, "unknown adapter: no adapter has the name 'nobody'"),
    (text(model=f"{BASE}:"), 404, "unknown adapter: has 0 characters; a name has 1 to 200"),
    (
        text(model="m" * 600),
        400,
        "`model`: must have at most 512 characters, not '" + "m" * 40 + "… (600 characters)'",
    ),
    (text(model="\x1b[31m"), 404, f"unknown adapter: '\\x1b[31m' {_NAME}"),
    (text(lora_path="nobody"), 404, "unknown adapter: no adapter has the name 'nobody'"),
    (text(lora_path=["a", "b"]), 400, "`lora_path`: must be a valid string"),
    (text(adapters={"a": 1.0, "nobody": 1.0}), 404, "unknown adapter: no adapter has the name 'nobody'"),
    (text(adapters={"a": "1"}), 400, "`adapters.a`: must be a valid number, not '1'"),
    (text(adapters={"a": 1e9}), 400, "`adapters.a`: must be less than or equal to 100, not 1000000000.0"),
    (text(adapters={"": 1.0}), 400, "`adapters`: must have at least 1 character, not ''"),
    (text(adapters=["a"]), 400, "`adapters`: must be a valid dictionary"),
    (
        text(adapters={f"a{i}": 1.0 for i in range(17)}),
        400,
        "`adapters`: 17 adapters, more than the 16 of one request",
    ),
    (
        text(model="a", lora_path="b"),
        400,
        f"`model` and `lora_path` name different adapters: set `model` to the base, '{BASE}'",
    ),
    (
        text(adapters={"a": 0.5}, lora_path="b"),
        400,
        "`adapters` and `lora_path` name different adapters: keep one of them",
    ),
    # the prompt
    (text(prompt=[]), 400, "`prompt`: is empty"),
    (text(prompt=3), 400, f"`prompt`: {_PROMPT}"),
    (text(prompt=["a", 3]), 400, f"`prompt`: {_PROMPT}"),
    (text(prompt=[[]]), 400, "`prompt`: it has no token"),
    (text(prompt=[1, 5000]), 400, "`prompt`: the token 5000 is not one of the vocabulary's 2,048"),
    (text(prompt=[-1]), 400, "`prompt`: the token -1 is not one of the vocabulary's 2,048"),
    (text(prompt=[True]), 400, f"`prompt`: {_PROMPT}"),
    (text(prompt=[5] * 300), 400, f"the prompt has 300 tokens and 2 new ones were asked for, {_SHORTEN}"),
    (
        text(prompt=[5] * 100, max_tokens=200),
        400,
        f"the prompt has 100 tokens and 200 new ones were asked for, {_SHORTEN}",
    ),
    (text(prompt=["x"] * 129), 400, "129 prompts with `n` = 1: more than the 128 answers of one request"),
    (text(prompt=["x"] * 2, n=100), 400, "2 prompts with `n` = 100: more than the 128 answers of one request"),
    (
        text(prompt="x" * 1_000_000),
        400,
        "`prompt`: 1,000,000 bytes of text, more than the 256 tokens of the context can hold",
    ),
    (
        chat(messages=[{"role": "user", "content": "x" * 999_972}]),
        400,
        "`messages`: 1,000,000 bytes of text, more than the 256 tokens of the context can hold",
    ),
    # messages
    (chat(messages=[]), 400, "`messages`: is empty"),
    (chat(messages="hi"), 400, "`messages`: must be a valid list, not 'hi'"),
    (chat(messages=["hi"]), 400, "`messages.0`: must be a valid dictionary, not 'hi'"),
    (chat(messages=[{"content": "hi"}]), 400, "`messages.0.role`: is missing"),
    (
        chat(messages=[{"role": "king", "content": "hi"}]),
        400,
        f"`messages.0.role`: must be one of {_ROLES}, not 'king'",
    ),
    (chat(messages=[{"role": "user"}]), 400, "`messages.0.content`: is missing"),
    (
        chat(messages=[{"role": "user", "content": 3}]),
        400,
        "`messages.0.content`: must be a text or a list of text parts, not int",
    ),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        400,
        "`messages.0.content`: only text is supported, not 'image_url'",
    ),
    (
        chat(messages=[*USER, {"role": "assistant", "content": "", "tool_calls": [{}]}]),
        400,
        "`messages.1`: tool calls are not supported",
    ),
    # sampling
    (text(temperature=-1), 400, "`temperature`: must be greater than or equal to 0, not -1"),
    (text(temperature=3), 400, "`temperature`: must be less than or equal to 2, not 3"),
    (text(temperature="hot"), 400, "`temperature`: must be a valid number, not 'hot'"),
    (text(temperature=True), 400, "`temperature`: must be a valid number, not true"),
    (text(top_p=0), 400, "`top_p`: must be greater than 0, not 0"),
    (text(top_k=-2), 400, "`top_k`: must be greater than or equal to -1, not -2"),
    (text(max_tokens=0), 400, "`max_tokens`: must be greater than or equal to 1, not 0"),
    (text(max_tokens=1.5), 400, "`max_tokens`: must be a valid integer, not 1.5"),
    (text(n=0), 400, "`n`: must be greater than or equal to 1, not 0"),
    (text(n=1000), 400, "`n`: must be less than or equal to 128, not 1000"),
    (text(seed="x"), 400, "`seed`: must be a valid integer, not 'x'"),
    (text(stop=["x"] * 17), 400, "`stop`: 17 texts, more than the 16 that are accepted"),
    (text(stop=""), 400, "`stop`: each text must have 1 to 512 characters"),
    (text(stop=[3]), 400, "`stop`: must be a text or a list of texts"),
    (text(logit_bias={"x": 1}), 400, "`logit_bias`: 'x' is not a token id"),
    (text(logit_bias={"5000": 1}), 400, "`logit_bias`: the token 5000 is not one of the vocabulary's 2,048"),
    (text(logit_bias={"5": 200}), 400, "`logit_bias.5`: must be less than or equal to 100, not 200"),
    (text(presence_penalty=-3), 400, "`presence_penalty`: must be greater than or equal to -2, not -3"),
    (text(logprobs=21), 400, "`logprobs`: must be less than or equal to 20, not 21"),
    (text(logprobs=True), 400, "`logprobs`: must be a valid integer, not true"),
    (chat(top_logprobs=2), 400, "`top_logprobs`: needs `logprobs`: true"),
    (chat(max_completion_tokens=3), 400, "`max_tokens`: is 2, and `max_completion_tokens` is 3: keep one"),
    (text(deadline=0), 400, "`deadline`: must be greater than 0, not 0"),
    (
        text(echo=True, logprobs=1),
        400,
        "`echo`: log-probabilities of the prompt are not supported: leave out `echo` or `logprobs`",
    ),
    # streams
    (text(stream="yes"), 400, "`stream`: must be a valid boolean, not 'yes'"),
    (
        text(stream_options={"include_usage": True}),
        400,
        "`stream_options`: has no effect without `stream`: leave it out, or set `stream`",
    ),
    (
        text(stream=True, stream_options={"include_usagee": True}),
        400,
        "`stream_options.include_usagee`: no such field: did you mean `include_usage`?",
    ),
    # known, and not supported
    (chat(tools=[{"type": "function"}]), 400, "`tools`: tool calls are not supported"),
    (chat(tool_choice="required"), 400, "`tool_choice`: tool calls are not supported"),
    (
        chat(response_format={"type": "json_object"}),
        400,
        "`response_format`: constrained output is not supported: ask for it in the prompt",
    ),
    (chat(modalities=["text", "audio"]), 400, "`modalities`: only text is supported"),
    (chat(audio={"voice": "alloy"}), 400, "`audio`: only text is supported"),
    (
        chat(chat_template="{{ 1 }}"),
        400,
        "`chat_template`: templates of clients are not run: put one beside the adapter",
    ),
    (text(best_of=3), 400, "`best_of`: is not supported: use `n`"),
    (text(suffix="end"), 400, "`suffix`: filling in the middle is not supported"),
    (text(min_p=0.1), 400, "`min_p`: min-p sampling is not supported: use `top_p` or `top_k`"),
    (text(guided_json={}), 400, "`guided_json`: constrained output is not supported"),
    # typing errors
    (text(temprature=1), 400, "`temprature`: no such field: did you mean `temperature`?"),
    (text(maxtokens=1), 400, "`maxtokens`: no such field: did you mean `max_tokens`?"),
    (text(adapter={"a": 1.0}), 400, "`adapter`: no such field: did you mean `adapters`?"),
    (chat(message=[]), 400, "`message`: no such field: did you mean `messages`?"),
    (
        text(temperature=9, top_p=7, n=0),
        400,
        "`temperature`: must be less than or equal to 2, not 9; `top_p`: must be less than or equal to 1, not 7; "
        "`n`: must be greater than or equal to 1, not 0",
    ),
    # loading and unloading
    (load(), 400, "Both 'lora_name' and 'lora_path' must be provided."),
    (load(lora_name="c"), 400, "Both 'lora_name' and 'lora_path' must be provided."),
    (load(lora_name="a", lora_path="a"), 400, f"The lora adapter 'a' has already been loaded. {_TAKEN}"),
    (load(lora_name=BASE, lora_path="c"), 400, f"'{BASE}' is the name of the base"),
    (
        load(lora_name="a b", lora_path="c"),
        400,
        f"`lora_name`: 'a b' {_NAME}",
    ),
    (load(lora_name="z", lora_path="nowhere"), 404, "`lora_path`: there is no folder 'nowhere' below the root"),
    (load(lora_name="z", lora_path="../x"), 403, "`lora_path`: '../x' is not below the root of the adapters"),
    (load(lora_name="z", lora_path="/etc"), 403, "`lora_path`: '/etc' is not below the root of the adapters"),
    (load(lora_name="z", lora_path="."), 403, "`lora_path`: '.' is not below the root of the adapters"),
    (load(lora_name="z", lora_path="x\0y"), 400, "`lora_path`: 'x\\x00y' cannot be followed"),
    (load(lora_name="z", lora_path=3), 400, "`lora_path`: must be a valid string, not 3"),
    (load(lora_name="z", lora_pth="c"), 400, "`lora_pth`: no such field: did you mean `lora_path`?"),
    ((UNLOAD, {}), 400, "'lora_name' needs to be provided to unload a LoRA adapter."),
    ((UNLOAD, {"lora_name": "nobody"}), 404, "The lora adapter 'nobody' cannot be found."),
]


def name(case: tuple[tuple[str, Any], int, str]) -> str:
    (path, body), status, _ = case
    changes = body if isinstance(body, bytes) else json.dumps(body)
    return f"{path.rpartition('/')[2]} {changes[:60]!r} {status}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_bad_request_is_told_what_is_wrong(server: Live, root: Path, case: tuple[tuple[str, Any], int, str]) -> None:
    (path, body), status, message = case
    answer = server.post(path, body)
    assert (answer.status, answer.message) == (status, message)
    assert "Traceback" not in answer.message
    assert str(root.parent) not in answer.message


def test_the_server_is_as_before(server: Live) -> None:
    assert len(CASES) >= 60
    server.alive()
    assert [card["id"] for card in server.ask("GET", "/v1/models").json["data"]] == [BASE, "a", "b", "c"]
