"""The engine: ends of requests, cancels, deadlines, bounds, failures that stay alone, reloads, little memory."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lorary
from lorary import builtin
from lorary.errors import ConfigError, FileError, LoraryError
from lorary.serve.engine.batching import BatchingEngine
from lorary.serve.engine.continuous import PagedRunner
from lorary.serve.interface import BusyError, RequestError, UnknownAdapterError
from lorary.serve.open import engine_of, open_engine
from lorary.serve.request import Request, Sampling
from lorary.serve.scheduler.policy import Policy
from tests import tiny
from tests.laws.cases import made_of
from tests.serve.running import Answer, answers, saved_adapter, submitted, words
from tests.serve.test_parity import SIZES, VOCABULARY

GREEDY = Sampling(max_tokens=6, temperature=0.0)
PROMPT = (5, 9, 33, 2)


def base() -> Any:
    return tiny.seeded("Qwen2ForCausalLM", **SIZES)


def engine(model: Any = None, **options: Any) -> BatchingEngine:
    settings: dict[str, Any] = {"budget": 2**20, "page": 4, "most_tokens_of_batch": 16} | options
    return engine_of(model or base(), words(VOCABULARY), "base", **settings)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("root")
    methods = {"a": made_of("lora"), "b": made_of("rslora", r=5), "c": made_of("dora"), "d": made_of("full")}
    return {name: saved_adapter(base(), method, root / name, size=0.1) for name, method in methods.items()}


@pytest.fixture
def running(adapters: dict[str, str]) -> Iterator[BatchingEngine]:
    made = engine(root=Path(adapters["a"]).parent)
    made.start()
    yield made
    made.stop()
    assert made.why_dead() is None


def slow(model: Any, seconds: float = 0.02) -> Any:
    """The model with slower forward passes."""
    model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return model


# --- how requests end -------------------------------------------------------------------------------------------------


def test_requests_end_by_length_by_a_token_and_by_the_context(adapters: dict[str, str]) -> None:
    first = answers_of(engine(), Request(PROMPT, sampling=GREEDY))
    assert (first.end.reason, len(first.ids), first.end.generated_tokens) == ("length", 6, 6)
    assert (first.end.prompt_tokens, first.end.cached_tokens) == (4, 0)
    model = base()
    model.generation_config.eos_token_id = [first.ids[3], 63]
    second, third = answers_of(
        engine(model),
        Request(PROMPT, sampling=GREEDY),
        Request(PROMPT, sampling=Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)),
    )
    place = first.ids.index(first.ids[3])
    assert (second.ids, second.end.reason, second.end.generated_tokens) == (first.ids[:place], "stop", place + 1)
    assert third.ids == first.ids
    long = answers_of(engine(), Request((1,) * 125, sampling=Sampling(max_tokens=50, temperature=0.0)))
    assert (long.end.reason, len(long.ids)) == ("length", 3)


def answers_of(made: BatchingEngine, *requests: Request) -> Any:
    """The answers of an engine that is started for them: one, or a list."""
    made.start()
    found = answers(made, requests)
    made.stop()
    return found[0] if len(requests) == 1 else found


def test_a_stop_string_ends_a_request_and_is_not_part_of_it() -> None:
    tokenizer, model = builtin.load_tokenizer(), builtin.load_model()
    made = engine_of(model, tokenizer, "base", budget=2**24)
    prompt = tuple(tokenizer("def parse(text):\n    ")["input_ids"])
    made.start()
    sampling = Sampling(max_tokens=30, temperature=0.0)
    whole = answers(made, [Request(prompt, sampling=sampling)])[0].text
    assert len(whole) > 20
    stops = [whole[5:8], whole[11:19], whole[:2]]
    requests = [Request(prompt, sampling=Sampling(max_tokens=30, temperature=0.0, stop=(stop,))) for stop in stops]
    for stop, answer in zip(stops, answers(made, requests), strict=True):
        assert answer.text == whole[: whole.index(stop)]
        assert (answer.end.reason, answer.end.stop) == ("stop", stop)
        assert answer.end.generated_tokens < 30
    assert made.statistics()["running"] == 0
    made.stop()


def test_seeds_reproduce_alone_and_in_a_batch(running: BatchingEngine) -> None:
    def request(seed: int, name: str) -> Request:
        sampling = Sampling(max_tokens=8, temperature=1.0, top_p=0.9, top_k=40, seed=seed)
        return Request(PROMPT, {name: 1.0}, sampling)

    pairs = [(seed, name) for seed in range(5) for name in "abc"]
    together = [answer.ids for answer in answers(running, [request(*pair) for pair in pairs])]
    alone = [answers(running, [request(*pair)])[0].ids for pair in pairs]
    assert together == alone
    assert len({tuple(ids) for ids in alone}) > 10


def test_logprobs_are_the_model_s(running: BatchingEngine, adapters: dict[str, str]) -> None:
    sampling = Sampling(max_tokens=5, temperature=0.7, seed=1, logprobs=3)
    (answer,) = answers(running, [Request(PROMPT, {"c": 1.0}, sampling)])
    model = lorary.switch(base(), lorary.load_adapter(adapters["c"]))
    logits = tiny.logits(model, input_ids=torch.tensor([[*PROMPT, *answer.ids]]))[0, len(PROMPT) - 1 :]
    for token, expected in zip(answer.tokens, logits.log_softmax(-1), strict=False):
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)
        assert [value for _, value in token.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)


# --- cancels, deadlines, bounds ---------------------------------------------------------------------------------------


def test_cancelled_requests_end_running_or_waiting(adapters: dict[str, str]) -> None:
    made = engine(slow(base()), policy=Policy(max_running=1))
    made.start()
    sampling = Sampling(max_tokens=100, temperature=0.0)
    first = submitted(made, Request(PROMPT, sampling=sampling, id="first"))
    wait_for(lambda: first.tokens)
    second = submitted(made, Request(PROMPT, sampling=sampling, id="second"))
    third = submitted(made, Request(PROMPT, sampling=GREEDY))
    for id in ("second", "first", "unknown"):
        made.cancel(id)
    assert (first.end.reason, second.end.reason, third.end.reason) == ("cancelled", "cancelled", "length")
    assert not second.tokens
    assert 0 < len(first.tokens) < 100
    made.stop()
    assert made.statistics()["kv_bytes"] == 0


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.002)


def test_a_request_that_cannot_begin_in_time_is_told_so() -> None:
    made = engine(slow(base()), policy=Policy(max_running=1))
    made.start()
    first = submitted(made, Request(PROMPT, sampling=Sampling(max_tokens=60, temperature=0.0), id="first"))
    wait_for(lambda: first.tokens)
    late = submitted(made, Request(PROMPT, deadline=0.05, sampling=GREEDY))
    assert (late.end.reason, late.end.error) == ("deadline", "it could not begin in time")
    assert first.finished is None
    made.cancel("first")
    made.stop()


def test_the_queue_is_bounded() -> None:
    made = engine(slow(base()), policy=Policy(max_running=1), most_waiting=2)
    made.start()
    first = submitted(made, Request(PROMPT, sampling=Sampling(max_tokens=80, temperature=0.0)))
    wait_for(lambda: first.tokens)
    for _ in range(2):
        submitted(made, Request(PROMPT, sampling=GREEDY))
    with pytest.raises(BusyError) as refusal:
        submitted(made, Request(PROMPT, sampling=GREEDY))
    assert str(refusal.value) == "the queue is full:\n  - 2 requests wait already\n      hint: ask again later"
    assert 1 <= refusal.value.retry_after <= 60
    made.stop()
    with pytest.raises(BusyError, match="the engine stops"):
        submitted(made, Request(PROMPT, sampling=GREEDY))


def test_a_drain_lets_requests_end() -> None:
    made = engine(slow(base(), 0.005))
    made.start()
    found = [submitted(made, Request(PROMPT, sampling=Sampling(max_tokens=20, temperature=0.0))) for _ in range(3)]
    wait_for(lambda: found[0].tokens)
    made.stop(drain=60)
    assert [(answer.end.reason, len(answer.ids)) for answer in found] == [("length", 20)] * 3
    made = engine(slow(base()))
    made.start()
    cut = submitted(made, Request(PROMPT, sampling=Sampling(max_tokens=100, temperature=0.0)))
    wait_for(lambda: cut.tokens)
    made.stop()
    assert cut.end.reason == "cancelled"


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_request_whose_forward_pass_fails_fails_alone(adapters: dict[str, str]) -> None:
    model = base()

    def guard(module: Any, args: Any, kwargs: Any) -> None:
        if (args[0] if args else kwargs["input_ids"]).eq(13).any():
            raise RuntimeError("token 13")

    model.register_forward_pre_hook(guard, with_kwargs=True)
    sampling = Sampling(max_tokens=5, temperature=0.0, logit_bias={13: -100.0})
    prompts = [(1, 2, 3), (4, 13), (5, 6), (7, 8, 9, 10), (13,), (11, 12)]
    names = ["a", "b", "c", "", "", "a"]
    requests = [Request(p, {n: 1.0} if n else {}, sampling) for p, n in zip(prompts, names, strict=True)]
    made = engine(model)
    for name in "abc":
        made.load(name, adapters[name])
    found = answers_of(made, *requests)
    right = engine(base())
    for name in "abc":
        right.load(name, adapters[name])
    fine = [i for i, prompt in enumerate(prompts) if 13 not in prompt]
    expected = answers_of(right, *(Request(requests[i].prompt, requests[i].adapters, sampling) for i in fine))
    assert [found[i].ids for i in fine] == [answer.ids for answer in expected]
    assert [a.end.error for a in found if a.end.reason == "error"] == ["RuntimeError: token 13"] * 2
    assert made.why_dead() is None


def test_an_adapter_that_gives_no_finite_logits_fails_alone(adapters: dict[str, str], tmp_path: Path) -> None:
    huge = saved_adapter(base().half(), made_of("lora"), tmp_path / "huge", ["lm_head"], size=1000.0)
    made = engine(base().half())
    made.load("a", saved_adapter(base().half(), made_of("lora"), tmp_path / "a", ["lm_head"]))
    made.load("huge", huge)
    good, bad = answers_of(made, Request(PROMPT, {"a": 1.0}, GREEDY), Request(PROMPT, {"huge": 1.0}, GREEDY))
    assert (good.end.reason, len(good.ids)) == ("length", 6)
    assert bad.end.error.startswith("the logits are not finite")
    assert bad.ids == []


def test_adapters_without_room_together_are_refused_and_hold_up_nobody(tmp_path: Path) -> None:
    names = [f"m{i}" for i in range(4)]
    for i, name in enumerate(names):
        saved_adapter(base(), made_of("lora", r=24 + i), tmp_path / name, size=0.1)
    made = engine(root=tmp_path, budget=7 * 2**17, policy=Policy(patience=0.05))
    made.start()
    together = [submitted(made, Request(PROMPT, dict.fromkeys(names, 0.5), GREEDY)) for _ in range(3)]
    alone = [submitted(made, Request(PROMPT, {name: 1.0}, GREEDY)) for name in names]
    assert [answer.end.reason for answer in alone] == ["length"] * 4
    assert [answer.end.reason for answer in together] == ["refused"] * 3
    made.stop()


def test_all_requests_end_when_the_engine_dies_of_what_they_need_for_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(id: str) -> None:
        raise RuntimeError("the device is gone")

    made = engine()
    found = [submitted(made, Request(PROMPT, sampling=GREEDY)) for _ in range(3)]
    monkeypatch.setattr(made.runner, "remove", gone)
    made.start()
    assert [answer.end.reason for answer in found] == ["length", "error", "error"]
    wait_for(made.why_dead)
    assert made.why_dead() == "RuntimeError: the device is gone"
    made.stop()


def test_requests_to_an_engine_that_is_never_started_end_with_it() -> None:
    made = engine()
    answer = submitted(made, Request(PROMPT, sampling=GREEDY))
    made.stop()
    assert answer.end.reason == "cancelled"


def test_shifts_of_logits_that_fp32_does_not_hold_are_refused() -> None:
    made = engine()
    for sampling in (Sampling(logit_bias={5: -1e308}), Sampling(presence_penalty=1e308)):
        with pytest.raises(RequestError, match="must be a number from -1,000,000 to 1,000,000"):
            made.submit(Request(PROMPT, sampling=sampling), Answer().deliver)
    made.stop()


def test_an_engine_that_has_died_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine()

    def broken(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("in the scheduler")

    monkeypatch.setattr(made.runner, "step", broken)
    made.start()
    for _ in range(2):
        assert made.why_dead() is None
        (answer,) = answers(made, [Request(PROMPT, sampling=GREEDY)])
        assert (answer.end.reason, answer.end.error) == ("error", "ZeroDivisionError: in the scheduler")
    wait_for(made.why_dead)
    assert made.why_dead() == "ZeroDivisionError: in the scheduler"
    with pytest.raises(BusyError):
        submitted(made, Request(PROMPT, sampling=GREEDY))


def test_a_listener_that_raises_does_not_disturb_others() -> None:
    made = engine()
    made.start()

    def deliver(event: Any) -> None:
        raise ValueError("a listener")

    made.submit(Request(PROMPT, sampling=GREEDY), deliver)
    assert answers(made, [Request(PROMPT, sampling=GREEDY)])[0].end.reason == "length"
    made.stop()


# --- adapters that come, go and change --------------------------------------------------------------------------------


def test_requests_in_flight_keep_their_adapter(adapters: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(adapters["a"], tmp_path / "x")
    made = engine(slow(base(), 0.01), root=tmp_path)
    made.load("x", str(tmp_path / "x"))
    made.start()
    sampling = Sampling(max_tokens=25, temperature=0.0)
    before = answers(made, [Request(PROMPT, {"x": 1.0}, sampling)])[0].ids
    in_flight = submitted(made, Request(PROMPT, {"x": 1.0}, sampling))
    wait_for(lambda: in_flight.tokens)
    shutil.copytree(adapters["b"], tmp_path / "y")
    made.load("x", str(tmp_path / "y"), replace=True)
    after = answers(made, [Request(PROMPT, {"x": 1.0}, sampling)])[0].ids
    assert (in_flight.end.reason, in_flight.ids) == ("length", before)
    assert after != before
    last = submitted(made, Request(PROMPT, {"x": 1.0}, sampling))
    made.unload("x")
    with pytest.raises(UnknownAdapterError):
        submitted(made, Request(PROMPT, {"x": 1.0}, sampling))
    assert last.end.reason == "length"
    assert last.ids == after
    assert [card.name for card in made.adapters()] == ["y"]
    made.stop()


def test_cards_count_requests(adapters: dict[str, str]) -> None:
    made = engine(slow(base()), policy=Policy(max_running=1), root=Path(adapters["a"]).parent)
    made.start()
    long = Sampling(max_tokens=100, temperature=0.0)
    first = submitted(made, Request(PROMPT, {"a": 1.0}, long))
    wait_for(lambda: first.tokens)
    submitted(made, Request(PROMPT, {"b": 1.0}, long))
    cards = {card.name: card for card in made.adapters()}
    assert (cards["a"].running, cards["a"].waiting, cards["a"].state) == (1, 0, "resident")
    assert (cards["b"].running, cards["b"].waiting) == (0, 1)
    assert made.adapter("c").running == 0
    made.stop()


def test_requests_that_outgrow_the_memory_wait_or_are_computed_again(adapters: dict[str, str]) -> None:
    """Keys and values of all at once have no room: some give way, and every answer is right."""
    sampling = Sampling(max_tokens=40, temperature=0.0)
    requests = [Request((i, 2 * i, 3), {name: 1.0}, sampling) for i in range(1, 9) for name in "ab"]
    roomy, small = engine(budget=2**22), engine(budget=150_000)
    for made in (roomy, small):
        for name in "ab":
            made.load(name, adapters[name])
    expected = answers_of(roomy, *requests)
    again: list[str] = []
    assert isinstance(small.runner, PagedRunner)
    scheduler = small.runner._scheduler
    wait = scheduler.add_waiting_request

    def noted(state: Any) -> None:
        again.append(state.request_id)
        wait(state)

    scheduler.add_waiting_request = noted
    copies = [Request(r.prompt, r.adapters, r.sampling) for r in requests]
    found = answers_of(small, *copies)
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]
    assert len(again) > len(requests), "nothing had to give way"


def test_adapters_that_have_no_room_on_the_host_together_take_turns(adapters: dict[str, str]) -> None:
    made = engine(root=Path(adapters["a"]).parent)
    sizes = {card.name: made.load(card.name, card.folder).bytes for card in made.adapters()}
    largest = max(sizes.values())
    assert largest + 1000 < sum(sizes.values())
    made = engine(root=Path(adapters["a"]).parent, host_budget=largest + 1000)
    requests = [Request((i, 3), {name: 1.0}, GREEDY) for i in range(6) for name in "abcd"]
    assert {(answer.end.reason, answer.end.error) for answer in answers_of(made, *requests)} == {("length", "")}


def test_a_request_that_waits_for_room_keeps_the_adapter_that_its_name_stood_for(adapters: dict[str, str]) -> None:
    root, last = Path(adapters["a"]).parent, Request(PROMPT, {"b": 1.0}, GREEDY)
    made = engine(root=root)
    largest = max(made.load(name, adapters[name]).bytes for name in "ab")
    expected = answers_of(made, last)
    made = engine(slow(base()), root=root, host_budget=largest + 1000)
    made.start()
    long = Request(PROMPT, {"a": 1.0}, Sampling(max_tokens=100, temperature=0.0))
    first = submitted(made, long)
    wait_for(lambda: first.tokens)
    second = submitted(made, last)
    wait_for(lambda: last.id in made._arrivals._parked)
    made.unload("b")
    made.cancel(long.id)
    assert second.over.wait(30)
    made.stop()
    assert (second.ids, second.end.error) == (expected.ids, "")


# --- bad input --------------------------------------------------------------------------------------------------------

BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ()}, "cannot serve the request:\n  - prompt: has no token"),
    (
        {"prompt": (1,) * 128},
        "cannot serve the request:\n"
        "  - prompt: has 128 tokens, and the context is 128\n"
        "      hint: give a shorter one, or an adapter with a longer context",
    ),
    (
        {"prompt": (1, 64, -1)},
        "cannot serve the request:\n  - prompt: has tokens that the base does not: 64 and -1; it has 0 to 63",
    ),
    (
        {"sampling": Sampling(max_tokens=0, stop=("x", ""))},
        "cannot serve the request:\n  - max_tokens: is 0, and must be at least 1\n  - stop: holds an empty string",
    ),
    (
        {"sampling": Sampling(temperature=-1.0, top_p=0.0, top_k=-1, logprobs=-1)},
        "cannot serve the request:\n"
        "  - temperature: is -1.0, and must be a number from 0 up\n"
        "  - top_p: is 0.0, and must be above 0 and at most 1\n"
        "  - top_k: is -1, and must be at least 0\n"
        "  - logprobs: is -1, and must be at least 0",
    ),
    (
        {"sampling": Sampling(temperature=float("nan"), frequency_penalty=float("inf"))},
        "cannot serve the request:\n"
        "  - temperature: is nan, and must be a number from 0 up\n"
        "  - frequency_penalty: is inf, and must be a number from -1,000,000 to 1,000,000",
    ),
    (
        {"sampling": Sampling(logit_bias={64: 1.0, 3: float("nan")})},
        "cannot serve the request:\n"
        "  - logit_bias: has tokens that the base does not: 64; it has 0 to 63\n"
        "  - logit_bias: of token 3 is nan, and must be a number from -1,000,000 to 1,000,000",
    ),
    ({"deadline": -1.0}, "cannot serve the request:\n  - deadline: is -1.0, and must be a number above 0"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD_REQUESTS)
def test_a_bad_request_is_refused_with_every_reason(
    running: BatchingEngine, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RequestError) as refusal:
        submitted(running, Request(**({"prompt": PROMPT} | changes)))
    assert str(refusal.value) == sentence
    assert running.statistics()["waiting"] == 0


def test_a_request_that_the_memory_cannot_hold_is_refused() -> None:
    made = engine(budget=40_000)
    with pytest.raises(RequestError, match=r"prompt: has 80 tokens, and the memory for keys and values holds \d+"):
        submitted(made, Request((1,) * 80))
    model = made.runner.model  # type: ignore[attr-defined]
    assert model.config._attn_implementation != "sdpa"
    made.stop()
    assert model.config._attn_implementation == "sdpa", "an engine that was never started leaves the model, too"


def test_adapters_that_cannot_be_added_end_with_the_reason(running: BatchingEngine) -> None:
    (answer,) = answers(running, [Request(PROMPT, {"a": 0.5, "c": 0.5}, GREEDY)])
    assert answer.end.reason == "refused"
    assert answer.end.error.startswith("cannot add these adapters:\n  - c: scales the base's output at")
    with pytest.raises(RequestError) as refusal:  # it is known by now
        submitted(running, Request(PROMPT, {"a": float("nan")}, GREEDY))
    assert str(refusal.value) == "cannot add these adapters:\n  - a: its weight is nan, not a finite number"


def test_an_unknown_adapter_is_never_the_base(running: BatchingEngine) -> None:
    with pytest.raises(UnknownAdapterError, match="no adapter has the name 'e'"):
        submitted(running, Request(PROMPT, {"a": 1.0, "e": 1.0}))
    assert running.adapter("a").waiting == 0


def test_an_engine_is_opened_with_every_bad_adapter_named(adapters: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError) as refusal:
        open_engine("builtin:base", {"a": adapters["a"], "empty": tmp_path / "empty"}, budget=2**24)
    lines = str(refusal.value).splitlines()
    assert lines[0] == "cannot serve these adapters:"
    assert {problem.where.partition(":")[0] for problem in refusal.value.problems} == {"a", "empty"}
    assert len(lines) > 5


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(ConfigError) as refusal:
        engine(budget=100)
    assert str(refusal.value) == (
        "the budget is too small:\n  - budget: it is 100 bytes, and keys and values of 4 tokens take 2,048\n"
        "      hint: give at least 8,192 bytes"
    )
    model = base()
    with pytest.raises(LoraryError, match="is not a folder"):
        engine(model, root="/no/such/folder")
    assert tiny.logits(model).isfinite().all()


def test_an_engine_that_runs_loads_below_its_root_alone(adapters: dict[str, str]) -> None:
    made = engine()
    made.load("a", adapters["a"])
    made.start()
    with pytest.raises(FileError, match="this server loads no adapters while it runs"):
        made.load("b", adapters["b"])
    assert [card.name for card in made.adapters()] == ["a"]
    made.stop()


def test_many_threads_submit_and_cancel(running: BatchingEngine) -> None:
    found: list[Answer] = []

    def client(number: int) -> None:
        for i in range(8):
            request = Request((number + 1, i), {"abcd"[i % 4]: 1.0}, GREEDY)
            answer = submitted(running, request)
            found.append(answer)
            if i % 3 == number % 3:
                running.cancel(request.id)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.end.reason for answer in found} <= {"length", "cancelled"}
    assert running.statistics()["running"] == 0
