"""LoRAX's and TGI's interface: the same answers as OpenAI's route gives, in their shapes; every refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from lorary import builtin
from lorary.errors import Diagnostic
from lorary.serve.http.app import create_app
from lorary.serve.interface import BusyError, Engine
from lorary.serve.request import Event, Finished, Token
from tests.serve.http.live import BASE, Live
from tests.serve.http.scripted import Scripted

PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def client(engine: Engine) -> TestClient:
    return TestClient(create_app(engine))


def scripted(*events: Event) -> tuple[Scripted, TestClient]:
    engine = Scripted(events, builtin.load_tokenizer())
    return engine, TestClient(create_app(engine), raise_server_exceptions=False)


def post(client: TestClient, path: str, parameters: Any = None, inputs: Any = PROMPT, **fields: Any) -> Any:
    return client.post(path, json={"inputs": inputs, "parameters": parameters or {}} | fields)


def openai(client: TestClient, n: int = 6, **fields: Any) -> str:
    body = {"model": BASE, "prompt": PROMPT, "max_tokens": n, "temperature": 0} | fields
    text: str = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    return text


def events(answer: Any) -> list[dict[str, Any]]:
    """The events of a stream, each of one line and a blank one."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_an_adapter_answers_as_by_openai_s_route(client: TestClient) -> None:
    answers = set()
    for name in ("", "a", "b"):
        answer = post(client, "/generate", {"max_new_tokens": 6, "adapter_id": name})
        assert answer.json() == {"generated_text": openai(client, model=name or BASE)}
        answers.add(answer.text)
    assert len(answers) == 3


def test_merged_adapters_are_the_weighted_sum(client: TestClient) -> None:
    merged = {"ids": ["a", "b"], "weights": [0.7, -0.4], "merge_strategy": "linear", "density": 0}
    answer = post(client, "/generate", {"max_new_tokens": 6, "merged_adapters": merged})
    assert answer.json()["generated_text"] == openai(client, adapters={"a": 0.7, "b": -0.4})


def test_the_details(client: TestClient) -> None:
    wanted = {"max_new_tokens": 4, "details": True, "return_k_alternatives": 2, "return_full_text": True}
    answer = post(client, "/generate", wanted).json()
    details = answer["details"]
    tokens = details.pop("tokens")
    prompt = builtin.load_tokenizer()(PROMPT)["input_ids"]
    assert details == {
        "finish_reason": "length",
        "prompt_tokens": len(prompt),
        "generated_tokens": 4,
        "skipped_tokens": 0,
        "seed": None,
        "prefill": [],
    }
    assert answer["generated_text"] == PROMPT + "".join(token["text"] for token in tokens)
    for token in tokens:
        best, second = token["alternative_tokens"]
        assert (best["id"], best["logprob"]) == (token["id"], token["logprob"])
        assert second["logprob"] < best["logprob"] < 0
        assert token["special"] is False


def test_a_draw_reports_its_seed_and_can_be_repeated(client: TestClient) -> None:
    wanted = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "details": True}
    first = post(client, "/generate", wanted).json()
    again = post(client, "/generate", wanted | {"seed": first["details"]["seed"]}).json()
    assert again == first
    other = post(client, "/generate", wanted | {"seed": first["details"]["seed"] ^ 1}).json()
    assert other["generated_text"] != first["generated_text"]


def test_a_stream_has_an_event_for_each_token_and_the_text_in_the_last(client: TestClient) -> None:
    wanted = {"max_new_tokens": 5, "adapter_id": "a", "details": True}
    found = events(post(client, "/generate_stream", wanted))
    whole = post(client, "/generate", wanted).json()
    assert [event["token"] for event in found] == whole["details"]["tokens"]
    assert [event["generated_text"] for event in found] == [None] * 4 + [whole["generated_text"]]
    assert [event["details"] for event in found[:-1]] == [None] * 4
    assert found[-1]["details"].items() <= whole["details"].items()


def test_the_route_of_the_official_client(client: TestClient) -> None:
    """Its `generate` posts every parameter to `/`, most of them null, and reads a list; with `stream` a stream."""
    nulls = dict.fromkeys(("adapter_source", "merged_adapters", "api_token", "seed", "temperature", "best_of", "top_k"))
    wanted = {"max_new_tokens": 3, "stop": [], "watermark": False, "decoder_input_details": False} | nulls
    whole = post(client, "/", wanted, stream=False).json()
    assert whole == [post(client, "/generate", wanted).json()]
    assert events(post(client, "/", wanted, stream=True))[-1]["generated_text"] == whole[0]["generated_text"]


def test_hugging_face_s_client(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """`InferenceClient`, which reads every shape strictly; it asks nobody but the server at this address."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    ask = huggingface_hub.InferenceClient(server.url).text_generation
    text = ask(PROMPT, adapter_id="b", max_new_tokens=6)
    body = {"model": "b", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    assert text == server.post("/v1/completions", body).json["choices"][0]["text"]
    assert "".join(ask(PROMPT, adapter_id="b", max_new_tokens=6, stream=True)) == text
    *_, last = ask(PROMPT, adapter_id="b", max_new_tokens=6, stream=True, details=True)
    assert (last.generated_text, last.details.generated_tokens) == (text, 6)
    drawn = ask(PROMPT, do_sample=True, max_new_tokens=6, details=True)
    again = ask(PROMPT, do_sample=True, max_new_tokens=6, details=True, seed=drawn.details.seed)
    assert again == drawn
    refusal = huggingface_hub.errors.ValidationError
    with pytest.raises(refusal, match="no adapter has the name 'nope'"):
        ask(PROMPT, adapter_id="nope")
    with pytest.raises(refusal, match="only one answer is generated"):
        list(ask(PROMPT, best_of=2, stream=True))


def test_a_chat_template_and_truncation(client: TestClient) -> None:
    chat = post(client, "/generate", {"max_new_tokens": 4, "apply_chat_template": True}).json()["generated_text"]
    body = {"model": BASE, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4, "temperature": 0}
    assert chat == client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    cut = post(client, "/generate", {"max_new_tokens": 1, "truncate": 2, "details": True}).json()
    assert cut["details"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([Token(300, "a"), Finished("stop", "", 3, 0, 2)], [("a", False), ("<|eos|>", True)]),
        ([Token(300, "a"), Finished("stop", "b", 3, 0, 2)], [("a", False), ("b", False)]),
        (
            [Token(300, "a"), Token(301, ""), Finished("stop", "", 3, 0, 2, stop="##")],
            [("a", False), ("", False), ("##", False)],
        ),
        (
            [Token(300, "a"), Token(301, ""), Token(302, ""), Finished("length", "#", 3, 0, 3)],
            [("a", False), ("", False), ("#", False)],
        ),
        ([Finished("stop", "", 3, 0, 1)], [("<|eos|>", True)]),
    ],
    ids=["eos", "eos with held text", "stop string", "length with held text", "eos at once"],
)
def test_the_text_of_a_stream_is_that_of_the_answer(sent: list[Event], expected: list[tuple[str, bool]]) -> None:
    _, client = scripted(*sent)
    found = events(post(client, "/generate_stream", {"max_new_tokens": 3, "details": True}))
    assert [(event["token"]["text"], event["token"]["special"]) for event in found] == expected
    text = "".join(text for text, special in expected if not special)
    whole = post(client, "/generate", {"max_new_tokens": 3}).json()["generated_text"]
    assert whole == found[-1]["generated_text"] == text
    reason = {"length": "length", "stop": "eos_token"}[sent[-1].reason]  # type: ignore[union-attr]
    assert found[-1]["details"]["finish_reason"] == ("stop_sequence" if "##" in text else reason)


@pytest.mark.parametrize(
    ("parameters", "drawn"),
    [
        ({}, (0.0, 1.0, 0)),
        ({"temperature": 1.0}, (0.0, 1.0, 0)),
        ({"do_sample": True}, (1.0, 1.0, 0)),
        ({"temperature": 0.5}, (0.5, 1.0, 0)),
        ({"top_p": 0.9}, (1.0, 0.9, 0)),
        ({"top_k": 5}, (1.0, 1.0, 5)),
        ({"temperature": 0, "do_sample": True}, (0.0, 1.0, 0)),
    ],
)
def test_when_tokens_are_drawn(parameters: dict[str, Any], drawn: tuple[float, float, int]) -> None:
    engine, client = scripted(Finished("length"))
    post(client, "/generate", parameters)
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == drawn
    assert (sampling.seed is not None) == (sampling.temperature > 0)


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    (
        "several answers",
        {"best_of": 3},
        "`parameters.best_of`: only one answer is generated: send the request several times",
    ),
    (
        "another way to merge",
        {"merged_adapters": {"ids": ["a"], "weights": [1], "merge_strategy": "ties"}},
        "`parameters.merged_adapters.merge_strategy`: only `linear` is served; merge with `lorary mix` beforehand for "
        "another",
    ),
    (
        "weights that do not fit",
        {"merged_adapters": {"ids": ["a", "b"], "weights": [1]}},
        "`parameters.merged_adapters.weights`: 1 for 2 adapters",
    ),
    (
        "an adapter twice",
        {"merged_adapters": {"ids": ["a", "a"], "weights": [1, 1]}},
        "`parameters.merged_adapters.ids`: an adapter is named twice",
    ),
    (
        "both ways to name adapters",
        {"adapter_id": "a", "merged_adapters": {"ids": ["b"], "weights": [1]}},
        "`parameters.merged_adapters`: and `adapter_id`: keep one of them",
    ),
    (
        "no adapters to merge",
        {"merged_adapters": {"ids": [], "weights": []}},
        "`parameters.merged_adapters.ids`: must have at least 1 item, not 0",
    ),
    (
        "log-probabilities of the prompt",
        {"decoder_input_details": True},
        "`parameters.decoder_input_details`: log-probabilities of the prompt are not supported",
    ),
    (
        "a download",
        {"adapter_source": "hub", "api_token": "secret"},
        "`parameters.adapter_source`: adapters come from this server only: load them first; `parameters.api_token`: "
        "the server downloads nothing for its clients",
    ),
    (
        "a negative temperature and a misspelt field",
        {"temperature": -1, "max_new_token": 3},
        "`parameters.max_new_token`: no such field: did you mean `max_new_tokens`?; `parameters.temperature`: must be "
        "greater than or equal to 0, not -1",
    ),
    (
        "no new tokens",
        {"max_new_tokens": 0},
        "`parameters.max_new_tokens`: must be greater than or equal to 1, not 0",
    ),
    (
        "more than the context",
        {"max_new_tokens": 250},
        "the prompt has 7 tokens and 250 new ones were asked for, and the context is 256: shorten the prompt or "
        "`max_new_tokens`",
    ),
    (
        "constrained output",
        {"response_format": {}},
        "`parameters.response_format`: constrained output is not supported",
    ),
]


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
@pytest.mark.parametrize(
    ("parameters", "message"), [pytest.param(parameters, message, id=name) for name, parameters, message in REFUSALS]
)
def test_refusals(path: str, parameters: dict[str, Any], message: str) -> None:
    engine, client = scripted(Finished("length"))
    answer = post(client, path, parameters)
    assert (answer.status_code, answer.json()) == (422, {"error": message, "error_type": "validation"})
    assert not engine.requests


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
def test_an_unknown_adapter_is_not_the_base(path: str) -> None:
    engine, client = scripted(Finished("length"))
    answer = post(client, path, {"adapter_id": "nope"})
    assert (answer.status_code, answer.json()["error_type"]) == (404, "validation")
    assert not engine.requests


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("", "`inputs`: must have at least 1 character, not ''"),
        (5, "`inputs`: must be a valid string, not 5"),
        (["a", "b"], "`inputs`: must be a valid string"),
    ],
)
def test_prompts_that_are_refused(inputs: Any, message: str) -> None:
    _, client = scripted(Finished("length"))
    answer = post(client, "/generate", inputs=inputs)
    assert (answer.status_code, answer.json()) == (422, {"error": message, "error_type": "validation"})


def test_failures_have_their_statuses() -> None:
    engine, client = scripted(Finished("error", error="/srv/secret/x is gone"))
    answer = post(client, "/generate")
    assert answer.status_code == 424
    assert answer.json() == {"error": "the engine failed on this request: x is gone", "error_type": "generation"}
    found = events(post(client, "/generate_stream"))
    assert found == [{"error": "the engine failed on this request: x is gone", "error_type": "generation"}]
    engine.refuse = BusyError("", [Diagnostic("", "the queue is full")])
    busy = post(client, "/generate")
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
    assert busy.json() == {"error": "the queue is full", "error_type": "overloaded"}


def test_a_bug_is_answered_in_the_same_shape_and_says_nothing() -> None:
    engine, client = scripted()
    engine.refuse = ZeroDivisionError("/srv/secret")  # type: ignore[assignment]
    answer = post(client, "/generate_stream")
    assert answer.status_code == 424
    assert answer.json() == {"error": "the server failed on this request; its log says why", "error_type": "generation"}


def test_info() -> None:
    _, client = scripted()
    info = client.get("/info").json()
    assert (info["model_id"], info["max_total_tokens"], info["max_input_length"]) == ("base", 256, 255)
