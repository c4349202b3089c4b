"""OpenAI's interface, by its official client: what it answers, whole and in streams."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import lorary
from lorary.serve.http.openai_bodies import ChatBody, CompletionBody
from lorary.serve.interface import Engine
from lorary.serve.request import Request, Sampling
from tests.serve.http.live import BASE, Live, base, request, tokenizer

pytestmark = pytest.mark.xdist_group("http")  # one server for all

MESSAGES: list[Any] = [{"role": "user", "content": "write a parser"}]
PROMPT = "def parse("


@pytest.fixture(scope="module")
def client(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def generated(prompt: list[int], adapters: dict[str, Path], tokens: int) -> str:
    """The greedy continuation by the model itself, with adapters switched on by hand."""
    model = base()
    if adapters:
        (folder,) = adapters.values()
        lorary.load(model, folder)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    return str(tokenizer().decode(out[0, len(prompt) :], skip_special_tokens=True))


def test_completions_are_those_of_the_model_with_the_adapter(client: openai.OpenAI, root: Path) -> None:
    prompt = tokenizer()(PROMPT)["input_ids"]
    texts = {}
    for name, adapters in {BASE: {}, "a": {"a": root / "a"}, f"{BASE}:b": {"b": root / "b"}}.items():
        answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0)
        texts[name] = answer.choices[0].text
        assert texts[name] == generated(prompt, adapters, 12)
        assert answer.model == name
        assert answer.usage
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.total_tokens == len(prompt) + answer.usage.completion_tokens
    assert len(set(texts.values())) == 3


def test_a_conversation_goes_through_the_chat_template(client: openai.OpenAI) -> None:
    text = tokenizer().apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer()(text, add_special_tokens=False)["input_ids"]
    answer = client.chat.completions.create(model=BASE, messages=MESSAGES, max_tokens=8, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == generated(prompt, {}, 8)
    parts = [{"role": "user", "content": [{"type": "text", "text": "write "}, {"type": "text", "text": "a parser"}]}]
    again = client.chat.completions.create(model=BASE, messages=parts, max_completion_tokens=8, temperature=0)  # type: ignore[arg-type]
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_an_adapters_own_chat_template_is_used(client: openai.OpenAI, root: Path) -> None:
    file = root / "c" / "chat_template.jinja"  # an adapter that was not asked for before
    file.write_text(
        "{{ messages[-1]['content'] }}{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}"
    )
    try:
        answer = client.chat.completions.create(
            model="c", messages=[{"role": "user", "content": PROMPT}], max_tokens=6, temperature=0
        )
        assert answer.usage
        assert answer.usage.prompt_tokens == len(tokenizer()(PROMPT, add_special_tokens=False)["input_ids"])
        with pytest.raises(openai.BadRequestError, match="the chat template refuses it: too many"):
            client.chat.completions.create(model="c", messages=MESSAGES * 3, max_tokens=6)
    finally:
        file.unlink()


def test_several_adapters_add_up_with_their_weights(client: openai.OpenAI) -> None:
    def text(**extra: Any) -> str:
        answer = client.completions.create(prompt=PROMPT, max_tokens=12, temperature=0, extra_body=extra, model=BASE)
        return answer.choices[0].text

    both = text(adapters={"a": 0.7, "b": 0.3})
    assert both == text(adapters={"b": 0.3, "a": 0.7})
    alone = client.completions.create(prompt=PROMPT, max_tokens=12, temperature=0, model="a").choices[0].text
    assert text(adapters={"a": 1.0}) == text(lora_path="a") == alone != both
    assert text(adapters={}) == text() != both


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="b", messages=MESSAGES, max_tokens=12, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="b",
            messages=MESSAGES,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.model for chunk in chunks} == {"b"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(chunks) - 2) + [whole.choices[0].finish_reason]
    assert chunks[-2].choices[0].delta.content is None
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_the_bytes_of_a_stream(server: Live) -> None:
    body = {"model": BASE, "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True}
    answer = server.post("/v1/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    *events, done, rest = answer.body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    parsed = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [event["object"] for event in parsed] == ["text_completion"] * len(parsed)
    assert all("usage" not in event for event in parsed)
    assert [event["choices"][0]["finish_reason"] for event in parsed][-1] == "length"


def test_several_answers_to_several_prompts(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "class A", "import "]
    answer = client.completions.create(model="a", prompt=prompts, n=2, max_tokens=5, seed=3)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage
    ids = [tokenizer()(prompt)["input_ids"] for prompt in prompts]
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    same = client.completions.create(model="a", prompt=ids, n=2, max_tokens=5, seed=3)
    assert [c.text for c in same.choices] == [c.text for c in answer.choices]
    one = client.completions.create(model="a", prompt=ids[1], n=1, max_tokens=5, seed=3)
    assert one.choices[0].text == answer.choices[2].text
    streamed = ["" for _ in answer.choices]
    for chunk in client.completions.create(model="a", prompt=prompts, n=2, max_tokens=5, seed=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in answer.choices]


def test_a_seed_repeats_the_draw(client: openai.OpenAI) -> None:
    def text(seed: int | None) -> str | None:
        answer = client.chat.completions.create(model=BASE, messages=MESSAGES, max_tokens=12, seed=seed, temperature=2)
        return answer.choices[0].message.content

    assert text(5) == text(5) != text(6)
    answers = client.chat.completions.create(
        model=BASE, messages=MESSAGES, max_tokens=12, seed=5, temperature=2, n=2
    ).choices
    assert answers[0].message.content == text(5)
    assert answers[1].message.content == text(6)  # a seed of its own for each


def test_log_probabilities_in_both_shapes(client: openai.OpenAI) -> None:
    ids = tokenizer()(PROMPT)["input_ids"]
    answer = client.completions.create(model=BASE, prompt=ids, max_tokens=4, temperature=0, logprobs=2)
    found = answer.choices[0].logprobs
    assert found
    assert found.tokens
    assert found.token_logprobs
    assert found.top_logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(4)]
    with torch.no_grad():
        expected = base()(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(2)
    assert found.token_logprobs[0] == pytest.approx(float(expected.values[0]), abs=1e-4)
    assert sorted(found.top_logprobs[0].values()) == pytest.approx(sorted(expected.values.tolist()), abs=1e-4)
    options: Any = {"model": BASE, "messages": MESSAGES, "max_tokens": 4, "temperature": 0}
    chat = client.chat.completions.create(**options, logprobs=True, top_logprobs=3).choices[0]
    assert chat.logprobs
    assert chat.logprobs.content
    assert "".join(token.token for token in chat.logprobs.content) == chat.message.content
    assert [len(token.top_logprobs) for token in chat.logprobs.content] == [3] * 4
    assert all(bytes(token.bytes or []).decode() == token.token for token in chat.logprobs.content)
    assert [t.top_logprobs[0].token for t in chat.logprobs.content] == [t.token for t in chat.logprobs.content]
    chunks = client.chat.completions.create(**options, logprobs=True, stream=True)
    streamed = [t for c in chunks for p in c.choices if p.logprobs for t in p.logprobs.content or []]
    assert [t.token for t in streamed] == [t.token for t in chat.logprobs.content]
    assert client.chat.completions.create(**options).choices[0].logprobs is None


def test_a_stop_string_ends_the_text_and_is_no_part_of_it(client: openai.OpenAI) -> None:
    options: Any = {"model": BASE, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    text = client.completions.create(**options).choices[0].text
    stop = text[3:6]  # across the borders of tokens
    answer = client.completions.create(**options, stop=["never", stop])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(client.completions.create(**options, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_echo_begins_with_the_prompt(client: openai.OpenAI) -> None:
    options: Any = {"model": BASE, "prompt": PROMPT, "max_tokens": 3, "temperature": 0}
    text = client.completions.create(**options).choices[0].text
    assert client.completions.create(**options, echo=True).choices[0].text == PROMPT + text
    chunks = client.completions.create(**options, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + text


def test_a_length_that_nobody_asked_for_is_cut_to_the_context(client: openai.OpenAI, engine: Engine) -> None:
    assert engine.max_context
    prompt = [5] * (engine.max_context - 3)
    answer = client.completions.create(model=BASE, prompt=prompt, temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


def test_models_are_the_base_and_its_adapters(client: openai.OpenAI, server: Live) -> None:
    listed = server.ask("GET", "/v1/models").json
    assert listed["object"] == "list"
    cards = {card["id"]: card for card in listed["data"]}
    assert list(cards) == [BASE, "a", "b", "c"]
    assert (cards[BASE]["root"], cards[BASE]["parent"]) == (BASE, None)
    assert (cards["a"]["root"], cards["a"]["parent"]) == ("a", BASE)
    assert cards["a"]["max_model_len"] == 256
    assert cards["a"]["permission"][0]["object"] == "model_permission"
    assert cards["a"]["lorary"]["rank"] == 4
    assert cards["a"]["lorary"]["state"]
    assert cards["a"]["lorary"]["error"] == ""
    assert client.models.retrieve("a").model_dump(mode="json")["lorary"] == cards["a"]["lorary"]
    assert client.models.retrieve(BASE).id == BASE
    with pytest.raises(openai.NotFoundError, match="no adapter has the name 'z'"):
        client.models.retrieve("z")


def test_a_client_that_goes_away_ends_its_request(server: Live, engine: Engine) -> None:
    cancelled: list[str] = []
    real = engine.cancel
    engine.cancel = lambda id: (cancelled.append(id), real(id))[1]  # type: ignore[method-assign]
    try:
        for stream in (True, False):
            body = {"model": BASE, "prompt": [5] * 9, "max_tokens": 240, "stream": stream, "ignore_eos": True}
            connection = server.raw(request("POST", "/v1/completions", body))
            if stream:
                assert b"200 OK" in connection.recv(100)
            else:
                time.sleep(0.2)
            connection.close()
            for _ in range(200):
                if server.traffic.active == 0:
                    break
                time.sleep(0.02)
            assert server.traffic.active == 0
            assert len(cancelled) == (1 if stream else 2)
    finally:
        engine.cancel = real  # type: ignore[method-assign]
    ends = []
    engine.submit(Request((5,), sampling=Sampling(max_tokens=1)), ends.append)
    for _ in range(500):
        if len(ends) == 2:
            break
        time.sleep(0.02)
    assert len(ends) == 2  # the engine has given up the others


def test_every_field_of_openais_client_is_known() -> None:
    from openai.types import completion_create_params as completion
    from openai.types.chat import completion_create_params as chat

    for kind, params in ((ChatBody, chat), (CompletionBody, completion)):
        fields = {*params.CompletionCreateParamsBase.__annotations__, "stream"}
        assert fields - {*kind.model_fields, *kind.UNSUPPORTED, *kind.IGNORED} == set()
