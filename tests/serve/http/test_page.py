"""The page in a headless Chromium, against a real server; and the state that it shows."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from lorary import builtin
from lorary.serve.http.app import create_app
from lorary.serve.http.page import STATIC
from lorary.serve.http.settings import Settings
from lorary.serve.interface import AdapterCard
from lorary.serve.request import Finished, Token
from tests.serve.http.live import BASE, Live, live
from tests.serve.http.scripted import Scripted

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
KEY = {"Authorization": "Bearer secret"}
HOSTILE = "</script><img src=x onerror=document.title='owned'>\"'"


def guarded() -> TestClient:
    return TestClient(create_app(Scripted((), builtin.load_tokenizer()), Settings(keys={"secret": "me"})))


def test_the_page_is_whole_and_allowed_nothing_but_itself() -> None:
    client = TestClient(create_app(Scripted((), builtin.load_tokenizer())))
    answer = client.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert (STATIC / "page.js").read_text() in answer.text  # in the page: a browser could not send a key for a file
    assert not re.findall(r"""(?:src|href)=["'](?!data:,|#)""", answer.text)
    assert "http://" not in answer.text
    assert "https://" not in answer.text
    assert "innerHTML" not in answer.text


def test_the_page_asks_for_the_key_and_holds_nothing_of_the_server() -> None:
    refused, let_in = guarded().get("/"), guarded().get("/", headers=KEY)
    assert (refused.status_code, let_in.status_code) == (401, 200)
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.text == let_in.text  # the same bytes for all
    assert refused.headers["content-security-policy"] == let_in.headers["content-security-policy"]
    for path in ("/ui/status", "/metrics", "/info", "/get_model_info"):
        assert guarded().get(path).status_code == 401
        assert guarded().get(path, headers=KEY).status_code == 200
    assert guarded().post("/").status_code == 401
    assert "error" in guarded().post("/").json()


def test_the_state_of_thousands_of_adapters_is_small() -> None:
    engine = Scripted((), builtin.load_tokenizer(), budget_bytes=1000, adapter_bytes=10, kv_bytes=20)
    engine.cards = [AdapterCard(f"a{i:04}", folder="/srv/secret", bytes=5) for i in range(5000)]
    engine.cards[4000] = AdapterCard("a4000", state="resident", running=2)
    engine.cards[4001] = AdapterCard("a4001", state="failed", error="/srv/secret/weights are gone")
    client = TestClient(create_app(engine))
    first = client.get("/ui/status").json()
    assert first["states"] == {"on disk": 4998, "resident": 1, "failed": 1}
    assert (first["matching"], len(first["adapters"]), len(first["names"])) == (5000, 100, 1000)
    assert first["adapters"][0]["name"] == "a4000"  # the busiest first
    assert first["bytes"] == {"budget": 1000, "adapters": 10, "kv": 20}
    assert first["adapters"][1]["error"] == "weights are gone"
    assert "secret" not in str(first)
    assert "/srv" not in client.get("/v1/models").text
    later = client.get("/ui/status", params={"known": first["version"], "find": "A40"}).json()
    assert later["names"] is None
    assert later["matching"] == 100
    assert len(client.get("/ui/status", params={"known": first["version"]}).content) < 25_000


# -- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium: install one, or name it in $CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    context.close()
    assert wrong == []


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect

    return expect(locator)


def side(page: Any, letter: str) -> Any:
    return page.get_by_label(f"Side {letter}", exact=True)


def send(page: Any, text: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Any) -> list[str]:
    expect(page.locator("#send")).to_be_enabled(timeout=30_000)
    return [side(page, letter).locator(".said.assistant").last.inner_text() for letter in "AB"]


def test_two_adapters_answer_side_by_side_as_the_interface_does(page: Any, server: Live) -> None:
    import httpx2 as httpx

    page.goto(server.url)
    expect(page.locator("#alive")).to_have_text("serving")
    assert page.title() == f"{BASE} · lorary"
    side(page, "A").get_by_label("Adapter", exact=True).fill("a")
    side(page, "B").get_by_role("button", name="Add an adapter").click()
    for i, (name, weight) in enumerate((("a", "-3"), ("b", "4"))):
        side(page, "B").get_by_label("Adapter", exact=True).nth(i).fill(name)
        side(page, "B").get_by_label("Weight").nth(i).fill(weight)
    page.get_by_text("Settings").click()
    page.get_by_label("New tokens").fill("24")
    send(page, "Add two numbers.")
    shown = answers(page)
    body = {"messages": [{"role": "user", "content": "Add two numbers."}], "max_tokens": 24, "temperature": 0}
    wanted = [{"model": "a"}, {"model": BASE, "adapters": {"a": -3.0, "b": 4.0}}]
    url = f"{server.url}/v1/chat/completions"
    right = [httpx.post(url, json=body | which).json()["choices"][0]["message"]["content"] for which in wanted]
    assert [text.strip() for text in shown] == [text.strip() for text in right]
    assert shown[0] != shown[1]
    expect(side(page, "A").locator(".facts")).to_contain_text("first after")
    # the pool, and what it has done
    row = page.locator("#adapters tr").filter(has=page.get_by_role("cell", name="a", exact=True))
    expect(row).to_contain_text("resident")
    expect(row).to_contain_text("low rank")
    expect(page.locator("#budget")).to_be_visible()
    expect(page.locator("#budget-text")).to_contain_text("of 64 MiB")
    expect(page.locator("#first")).to_contain_text("s")
    page.get_by_label("Find adapters").fill("B")
    expect(page.locator("#adapters tr")).to_have_count(1)


def test_a_second_turn_and_plain_text(page: Any, server: Live) -> None:
    import httpx2 as httpx

    page.goto(server.url)
    expect(page.locator("#alive")).to_have_text("serving")
    page.get_by_text("Settings").click()
    page.get_by_label("New tokens").fill("6")
    page.get_by_label("System message").fill("Be brief.")
    turns = [{"role": "system", "content": "Be brief."}]
    for text in ("One.", "Two."):
        send(page, text)
        turns.append({"role": "user", "content": text})
        body = {"model": BASE, "messages": turns, "max_tokens": 6, "temperature": 0}
        right = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert [answer.strip() for answer in answers(page)] == [right.strip()] * 2
        turns.append({"role": "assistant", "content": right})
    page.get_by_label("Prompt as").select_option("text")
    send(page, "def add(a, b):")
    body = {"model": BASE, "prompt": "def add(a, b):", "max_tokens": 6, "temperature": 0}
    right = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"]
    assert answers(page)[0].strip() == right.strip()
    page.get_by_role("button", name="Clear side A").click()
    assert side(page, "A").locator(".said").count() == 0
    assert side(page, "B").locator(".said").count() == 6


def test_errors_are_shown_and_the_base_does_not_answer_instead(page: Any, server: Live) -> None:
    page.goto(server.url)
    expect(page.locator("#alive")).to_have_text("serving")
    side(page, "A").get_by_label("Adapter", exact=True).fill("nope")
    side(page, "B").get_by_role("button", name="Add an adapter").click()
    for i in range(2):
        side(page, "B").get_by_label("Adapter", exact=True).nth(i).fill("a")
    send(page, "Hello")
    expect(side(page, "A").locator(".said.error")).to_contain_text("no adapter has the name 'nope'")
    expect(side(page, "B").locator(".said.error")).to_have_text("a is chosen twice")
    expect(page.locator("#send")).to_be_enabled()
    assert page.locator(".said.assistant").count() == 0


@pytest.mark.parametrize("how", ["button", "escape", "clear"])
def test_a_side_can_be_stopped(page: Any, how: str) -> None:
    """The engine holds its answers back: the sides stream until they are stopped, and it is told."""
    engine = Scripted(None, builtin.load_tokenizer())
    with live(engine) as server:
        page.goto(server.url)
        expect(page.locator("#alive")).to_have_text("serving")
        send(page, "Hello")
        expect(page.locator("#running")).to_have_text("0")
        expect(page.locator("#waiting")).to_have_text("2")
        for deliver in engine.delivers.values():
            deliver(Token(300, "word"))
        expect(side(page, "A").locator(".said.assistant")).to_have_text("word")
        expect(page.locator("#running")).to_have_text("2")
        if how == "escape":
            page.keyboard.press("Escape")
            expect(side(page, "B").locator(".facts")).to_have_text("stopped")
            assert len(cancelled(engine, 2)) == 2
        elif how == "clear":
            for letter in "AB":
                page.get_by_role("button", name=f"Clear side {letter}").click()
            assert len(cancelled(engine, 2)) == 2
            expect(page.locator("#send")).to_be_enabled()
            assert page.locator(".said").count() == 0
            send(page, "Again")
            expect(page.locator("#waiting")).to_have_text("2")
            assert len({request.prompt for request in engine.requests}) == 2  # nothing of the first turn is left
        else:
            page.get_by_role("button", name="Stop side A").click()
            expect(side(page, "A").locator(".facts")).to_have_text("stopped")
            expect(page.get_by_role("button", name="Stop side B")).to_be_enabled()
            (stopped,) = cancelled(engine, 1)
            (other,) = set(engine.delivers) - {stopped}
            engine.delivers[other](Finished("length", " more", 3, 0, 2))
            expect(side(page, "B").locator(".said.assistant")).to_have_text("word more")
        if how != "clear":
            expect(page.locator("#send")).to_be_enabled()
        expect(page.locator("#alive")).to_have_text("serving")


def cancelled(engine: Scripted, number: int) -> set[str]:
    """The ids of the requests that were cancelled, as soon as there are so many."""
    for _ in range(200):
        ids = {call[1] for call in engine.called if call[0] == "cancel"}
        if len(ids) >= number:
            break
        time.sleep(0.05)
    return ids


def test_a_key_is_asked_for_and_kept_for_the_tab(page: Any) -> None:
    engine = Scripted((Token(300, "hello"), Finished("stop", "", 3, 0, 2)), builtin.load_tokenizer())
    with live(engine, Settings(keys={"secret": "me"}, drain=0.0)) as server:
        page.goto(server.url)
        expect(page.get_by_role("dialog")).to_be_visible()
        page.get_by_label("Key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#login-why")).to_have_text("The server does not accept this key.")
        page.get_by_label("Key", exact=True).fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#alive")).to_have_text("serving")
        send(page, "Hello")
        expect(side(page, "B").locator(".said.assistant")).to_have_text("hello")
        page.reload()
        expect(page.locator("#alive")).to_have_text("serving")
        page.get_by_role("button", name="Change key").click()
        expect(page.get_by_role("dialog")).to_be_visible()


def test_hostile_names_and_answers_stay_text(page: Any) -> None:
    engine = Scripted((Token(300, HOSTILE), Finished("stop", "", 3, 0, 2)), builtin.load_tokenizer())
    engine.cards = [AdapterCard(HOSTILE, state="failed", error=HOSTILE, method=HOSTILE, form=HOSTILE)]
    with live(engine) as server:
        page.goto(server.url)
        expect(page.locator("#adapters td").first).to_have_text(HOSTILE)
        send(page, HOSTILE)
        expect(side(page, "A").locator(".said.assistant")).to_have_text(HOSTILE)
        assert page.locator("img").count() == 0
        assert page.title() == "base · lorary"


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(page: Any, server: Live, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(server.url)
    expect(page.locator("#alive")).to_have_text("serving")
    assert page.locator("html").evaluate("e => e.scrollWidth") <= width


def test_every_control_has_a_name_and_can_be_reached_with_the_keyboard(page: Any, server: Live) -> None:
    page.goto(server.url)
    expect(page.locator("#alive")).to_have_text("serving")
    unnamed = page.locator("body").evaluate(
        """body => [...body.querySelectorAll("button, input, select, textarea")]
          .filter(e => e.checkVisibility() && !(e.ariaLabel || e.textContent.trim() || e.labels?.length))
          .map(e => e.outerHTML)"""
    )
    assert unnamed == []
    page.locator("body").evaluate("() => document.activeElement.blur()")
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(
            page.locator("body").evaluate("() => document.activeElement.className || document.activeElement.id")
        )
    assert {"name", "weight", "remove", "prompt", "main", "find"} <= reached


def test_a_server_that_went_away_is_told(page: Any, tmp_path: Path) -> None:
    with live(Scripted((), builtin.load_tokenizer())) as server:
        page.goto(server.url)
        expect(page.locator("#alive")).to_have_text("serving")
    expect(page.locator("#alert")).to_have_text("The server does not answer.", timeout=10_000)
