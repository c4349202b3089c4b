"""SGLang's interface: the answers of OpenAI's route in its shapes, its routes for adapters, every refusal."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from lorary import builtin
from lorary.serve.http.app import create_app
from lorary.serve.http.settings import Settings
from lorary.serve.interface import Engine
from lorary.serve.request import Event, Finished, Token
from tests.serve.http.live import BASE
from tests.serve.http.scripted import Scripted

PROMPT = "def add(a, b):"
GREEDY = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def client(engine: Engine, root: Path) -> TestClient:
    return TestClient(create_app(engine, Settings(root=root)))


def scripted(*events: Event, **settings: Any) -> tuple[Scripted, TestClient]:
    engine = Scripted(events, builtin.load_tokenizer())
    return engine, TestClient(create_app(engine, Settings(**settings)))


def generate(client: TestClient, **body: Any) -> Any:
    return client.post("/generate", json={"text": PROMPT, "sampling_params": GREEDY} | body)


def openai(client: TestClient, prompt: Any = PROMPT, **fields: Any) -> str:
    body = {"model": BASE, "prompt": prompt, "max_tokens": 12, "temperature": 0} | fields
    text: str = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    return text


def test_a_text_with_an_adapter(client: TestClient) -> None:
    ids = builtin.load_tokenizer()(PROMPT)["input_ids"]
    answer = generate(client, lora_path="a").json()
    meta = answer["meta_info"]
    assert answer["text"] == openai(client, model="a") != openai(client)
    assert builtin.load_tokenizer().decode(answer["output_ids"]) == answer["text"]
    assert meta.pop("e2e_latency") > 0
    assert meta.pop("id")
    assert meta == {
        "finish_reason": {"type": "length", "length": 12},
        "prompt_tokens": len(ids),
        "completion_tokens": 12,
        "cached_tokens": 0,
    }
    assert generate(client, text=None, input_ids=ids, lora_path="a").json()["text"] == answer["text"]


def test_each_prompt_of_a_list_has_its_adapter(client: TestClient) -> None:
    prompts = [PROMPT, "class A:", PROMPT]
    answers = generate(client, text=prompts, lora_path=["a", None, "b"]).json()
    expected = [openai(client, p, model=m) for p, m in zip(prompts, ("a", BASE, "b"), strict=True)]
    assert [answer["text"] for answer in answers] == expected
    same = generate(client, text=prompts, lora_path="b").json()
    assert [answer["text"] for answer in same] == [openai(client, p, model="b") for p in prompts]


def test_several_answers_with_one_seed(client: TestClient) -> None:
    drawn = {"temperature": 2.0, "max_new_tokens": 8, "n": 3, "sampling_seed": 11}
    answers = [answer["text"] for answer in generate(client, sampling_params=drawn).json()]
    assert len(set(answers)) == 3
    assert [answer["text"] for answer in generate(client, sampling_params=drawn).json()] == answers


def test_log_probabilities(client: TestClient) -> None:
    wanted = {"return_logprob": True, "top_logprobs_num": 2, "return_text_in_logprobs": True, "logprob_start_len": -1}
    answer = generate(client, **wanted).json()
    meta = answer["meta_info"]
    assert [row[1] for row in meta["output_token_logprobs"]] == answer["output_ids"]
    assert "".join(row[2] for row in meta["output_token_logprobs"]) == answer["text"]
    assert [top[0] for top in meta["output_top_logprobs"]] == meta["output_token_logprobs"]  # greedy: the likeliest
    assert meta["input_token_logprobs"] == []


def events(answer: Any) -> list[dict[str, Any]]:
    parts = answer.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_a_stream_holds_the_text_so_far(client: TestClient) -> None:
    whole = generate(client, lora_path="b").json()
    found = events(generate(client, lora_path="b", stream=True))
    texts = [event["text"] for event in found]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert found[-1]["text"] == whole["text"]
    assert found[-1]["output_ids"] == whole["output_ids"]
    assert found[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
    assert all(event["meta_info"]["finish_reason"] is None for event in found[:-1])
    assert "index" not in found[0]


def test_a_stream_of_several_numbers_them(client: TestClient) -> None:
    whole = generate(client, text=[PROMPT, "class A:"]).json()
    last = {event["index"]: event["text"] for event in events(generate(client, text=[PROMPT, "class A:"], stream=True))}
    assert last == {i: answer["text"] for i, answer in enumerate(whole)}


def test_the_end_names_what_matched() -> None:
    _, client = scripted(Token(300, "a"), Finished("stop", "", 3, 0, 2, stop="##"))
    assert generate(client).json()["meta_info"]["finish_reason"] == {"type": "stop", "matched": "##"}
    _, client = scripted(Token(300, "a"), Finished("stop", "", 3, 0, 2))
    eos = builtin.load_tokenizer().eos_token_id
    assert generate(client).json()["meta_info"]["finish_reason"] == {"type": "stop", "matched": eos}


def test_a_failure_within_a_stream() -> None:
    _, client = scripted(Token(300, "a"), Finished("error", error="/srv/secret/x is gone"))
    _, error = events(generate(client, stream=True))
    assert error["error"]["message"] == "the engine failed on this request: x is gone"
    assert error["error"]["code"] == 500


REFUSALS: list[tuple[str, dict[str, Any], int, str]] = [
    (
        "no prompt",
        {"text": None},
        400,
        "a prompt is missing: `inputs` as LoRAX and TGI call it, `text` or `input_ids` as SGLang",
    ),
    ("two prompts", {"input_ids": [300]}, 400, "`text`: or `input_ids`: exactly one of them is needed"),
    ("no texts", {"text": []}, 400, "`text`: must be a text or a list of texts, and not empty"),
    ("an unknown adapter", {"lora_path": "nope"}, 404, "no adapter has the name 'nope'"),
    ("one unknown of two", {"text": ["a", "b"], "lora_path": ["a", "nope"]}, 404, "no adapter has the name 'nope'"),
    (
        "no token ids",
        {"text": None, "input_ids": []},
        400,
        "`input_ids`: must be token ids or lists of token ids, and not empty",
    ),
    (
        "other adapters",
        {"lora_path": [1]},
        400,
        "`lora_path`: must be the name of an adapter, or a list of one for each prompt, null for the base",
    ),
    ("too few adapters", {"text": ["a", "b"], "lora_path": ["a"]}, 400, "`lora_path`: 1 adapters for 2 prompts"),
    (
        "a token of no vocabulary",
        {"text": None, "input_ids": [10**9]},
        400,
        "`input_ids`: the token 1000000000 is not one of the vocabulary's 2,048",
    ),
    ("another kind of input", {"image_data": "x.png"}, 400, "`image_data`: only text is supported"),
    (
        "log-probabilities of the prompt",
        {"logprob_start_len": 0},
        400,
        "`logprob_start_len`: log-probabilities of the prompt are not supported",
    ),
    ("clients' code", {"custom_logit_processor": "gASV"}, 400, "`custom_logit_processor`: clients' code is not run"),
    (
        "a negative temperature",
        {"sampling_params": {"temperature": -1}},
        400,
        "`sampling_params.temperature`: must be greater than or equal to 0, not -1",
    ),
    (
        "constrained output",
        {"sampling_params": {"regex": "a*"}},
        400,
        "`sampling_params.regex`: constrained output is not supported",
    ),
    (
        "a misspelt field",
        {"sampling_params": {"max_new_token": 1}},
        400,
        "`sampling_params.max_new_token`: no such field: did you mean `max_new_tokens`?",
    ),
    (
        "parameters for each prompt",
        {"sampling_params": [{}]},
        400,
        "`sampling_params`: must be a JSON object",
    ),
    (
        "more than the context",
        {"sampling_params": {"max_new_tokens": 250}},
        400,
        "the prompt has 7 tokens and 250 new ones were asked for, and the context is 256: shorten the prompt or "
        "`max_new_tokens`",
    ),
    (
        "too many answers",
        {"text": ["a"] * 100, "sampling_params": {"n": 2}},
        400,
        "100 prompts with `n` = 2: more than the 128 answers of one request",
    ),
]


@pytest.mark.parametrize(
    ("body", "status", "message"), [pytest.param(body, status, why, id=name) for name, body, status, why in REFUSALS]
)
def test_refusals(body: dict[str, Any], status: int, message: str) -> None:
    engine, client = scripted(Finished("length"))
    answer = generate(client, **body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (status, message)
    assert not engine.requests


# -- adapters -------------------------------------------------------------------------------------------------------


def test_loading_and_unloading(client: TestClient) -> None:
    loaded = client.post("/load_lora_adapter", json={"lora_name": "new", "lora_path": "c", "pinned": True})
    assert loaded.status_code == 200
    assert (loaded.json()["success"], loaded.json()["error_message"]) == (True, None)
    assert loaded.json()["loaded_adapters"].items() >= {"a": "a", "b": "b", "new": "c"}.items()
    assert generate(client, lora_path="new").json()["text"] == openai(client, model="new")
    again = client.post("/load_lora_adapter", json={"lora_name": "new", "lora_path": "c"})
    assert again.status_code == 400
    assert again.json()["success"] is False
    assert again.json()["error_message"].startswith("The lora adapter 'new' has already been loaded.")
    gone = client.post("/unload_lora_adapter", json={"lora_name": "new"})
    assert gone.json()["success"] is True
    assert gone.json()["loaded_adapters"].keys() >= {"a", "b"}
    assert "new" not in gone.json()["loaded_adapters"]
    assert generate(client, lora_path="new").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("load", {"lora_name": "x"}, 400, "`lora_path`: is missing"),
        (
            "load",
            {"lora_name": "x", "lora_path": "/etc"},
            403,
            "`lora_path`: '/etc' is not below the root of the adapters",
        ),
        ("load", {"lora_name": "x", "lora_path": "no"}, 404, "`lora_path`: there is no folder 'no' below the root"),
        ("load", {"lora_name": BASE, "lora_path": "c"}, 400, "'builtin:base' is the name of the base"),
        ("unload", {}, 400, "`lora_name`: is missing"),
        ("unload", {"lora_name": "nope"}, 404, "The lora adapter 'nope' cannot be found."),
    ],
)
def test_refused_loads(client: TestClient, path: str, body: dict[str, str], status: int, message: str) -> None:
    answer = client.post(f"/{path}_lora_adapter", json=body)
    assert answer.status_code == status
    assert (answer.json()["success"], answer.json()["error_message"]) == (False, message)
    assert answer.json()["loaded_adapters"].keys() >= {"a", "b"}


def test_tensors_in_a_request_are_not_read() -> None:
    engine, client = scripted()
    answer = client.post("/load_lora_adapter_from_tensors", content=b"\x80\x04garbage")
    assert answer.status_code == 400
    assert answer.json()["error_message"] == (
        "serialised tensors are not read from requests: reading them can run code. Put the adapter below the root of "
        "the adapters, as safetensors, and use /load_lora_adapter"
    )
    assert not engine.called


@pytest.mark.parametrize("path", ["/load_lora_adapter", "/unload_lora_adapter", "/load_lora_adapter_from_tensors"])
def test_users_do_not_change_adapters(path: str, tmp_path: Path) -> None:
    engine, client = scripted(keys={"user": "u"}, admin_keys=frozenset({"admin"}), root=tmp_path)
    answer = client.post(path, json={"lora_name": "x", "lora_path": "y"}, headers={"Authorization": "Bearer user"})
    assert (answer.status_code, answer.json()["error_message"]) == (403, "this needs an admin's key")
    assert not engine.called


def test_the_model() -> None:
    _, client = scripted()
    assert client.get("/get_model_info").json()["model_path"] == "base"
