"""A request on its way through replicas, of which some die: nothing is delivered twice, or left out, or made up."""

from __future__ import annotations

import concurrent.futures
import pickle

import pytest

from lorary.errors import Diagnostic, FileError, LoraryError
from lorary.serve.interface import AdapterCard, BusyError, RequestError, UnknownAdapterError
from lorary.serve.ray.remote_engine import Journey, merged_cards, merged_figures
from lorary.serve.ray.replica import affinity
from lorary.serve.request import Event, Finished, Request, Sampling, Token

HELLO = [Token(1, "hel"), Token(2, "lo"), Token(3, " world")]
END = Finished("length", "", 4, 0, 3)


def journey(request: Request | None = None) -> tuple[Journey, list[Event], concurrent.futures.Future[None]]:
    got, accepted = list[Event](), concurrent.futures.Future[None]()
    return Journey(request or Request((5, 6)), got.append, accepted), got, accepted


def test_an_answer_is_passed_on_as_it_comes() -> None:
    on, got, accepted = journey()
    on.begin()
    assert not on.take(())
    assert accepted.done()
    assert not on.take((HELLO[0],))
    assert got == HELLO[:1]
    assert on.take((HELLO[1], HELLO[2], END))
    assert got == [*HELLO, END]


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_second_replica_goes_on_where_the_first_died(before: int) -> None:
    on, got, _ = journey()
    first = on.begin()
    on.take(())
    on.take(tuple(HELLO[:before]))
    second = on.begin()
    assert first.id != second.id
    assert (first.prompt, first.sampling) == (second.prompt, second.sampling)
    assert on.take((*HELLO, END))
    assert got == [*HELLO, END]


def test_another_answer_is_never_joined_to_the_first() -> None:
    on, got, _ = journey()
    on.begin()
    on.take(tuple(HELLO[:2]))
    on.begin()
    with pytest.raises(RequestError, match=r"^the replica .* died, and another one differs from it at token 2$"):
        on.take((HELLO[0], Token(9, "p")))
    assert got == HELLO[:2]


def test_one_that_ends_before_what_was_delivered_is_another_answer() -> None:
    on, got, _ = journey()
    on.begin()
    on.take(tuple(HELLO[:2]))
    on.begin()
    with pytest.raises(RequestError, match="differs from it at token 2"):
        on.take((HELLO[0], Finished("stop")))
    assert got == HELLO[:2]


def test_a_replica_that_stops_does_not_end_the_answer() -> None:
    on, got, _ = journey()
    on.begin()
    assert not on.take((HELLO[0], Finished("cancelled")))
    on.begin()
    assert on.take((*HELLO, END))
    assert got == [*HELLO, END]


def test_a_sampled_request_gets_a_seed_and_keeps_its_own() -> None:
    drawn = journey(Request((1,), sampling=Sampling(temperature=0.7)))[0]
    assert drawn.begin().sampling.seed == drawn.begin().sampling.seed is not None
    assert journey(Request((1,), sampling=Sampling(temperature=0.7, seed=5)))[0].begin().sampling.seed == 5
    assert journey(Request((1,), sampling=Sampling(temperature=0.0)))[0].begin().sampling.seed is None


@pytest.mark.parametrize("error", [UnknownAdapterError("x"), FileError("y"), BusyError("z")], ids=lambda e: str(e))
def test_a_refusal_reaches_the_caller_as_it_is(error: LoraryError) -> None:
    on, got, accepted = journey()
    on.begin()
    assert on.take(error)
    assert accepted.exception() is error
    assert got == []


def test_a_refusal_after_the_first_token_ends_the_answer() -> None:
    on, got, _ = journey()
    on.begin()
    on.take((HELLO[0],))
    on.begin()
    assert on.take(UnknownAdapterError("", [Diagnostic("", "no adapter has the name 'a'")]))
    assert got == [HELLO[0], Finished("error", error="\n  - no adapter has the name 'a'")]


def test_no_replica_is_a_refusal_and_after_acceptance_an_end() -> None:
    on, got, accepted = journey()
    on.end(Finished("error", error="no replica"))
    assert isinstance(accepted.exception(), BusyError)
    assert got == []
    on, got, accepted = journey()
    on.end(Finished("cancelled"))
    assert (accepted.exception(), got) == (None, [Finished("cancelled")])


def test_errors_keep_their_problems_between_processes() -> None:
    error = BusyError("busy:", [Diagnostic("a", "b", "c")])
    error.retry_after = 7.0
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.headline) == (BusyError, str(error), "busy:")
    assert (again.problems, again.retry_after) == (error.problems, 7.0)


def test_cards_and_figures_of_all_replicas() -> None:
    one = AdapterCard("a", state="on disk", waiting=2, created=5.0)
    two = AdapterCard("a", uid="1", state="resident", running=3, created=6.0)
    (card,) = merged_cards([[one], [two]])
    assert (card.state, card.uid, card.running, card.waiting, card.created) == ("resident", "1", 3, 2, 5.0)
    assert [card.name for card in merged_cards([[AdapterCard("b")], [AdapterCard("a")]])] == ["a", "b"]
    figures = [{"running": 1, "kv_usage": 0.5}, {"running": 2, "kv_usage": 0.1, "loads": 4}]
    assert merged_figures(figures) == {"running": 3, "kv_usage": 0.3, "loads": 4}


def test_the_heaviest_adapter_decides_where_a_request_goes() -> None:
    assert affinity(Request((1,))) == ""
    assert affinity(Request((1,), {"a": 0.3, "b": -0.7})) == "b"
