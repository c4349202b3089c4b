"""lorary diff: the table, JSON, and what is no adapter."""

from __future__ import annotations

import json

import lorary
from tests.adapters.test_change_rank import trained
from tests.cli.command import Command


def test_two_adapters_are_compared(command: Command) -> None:
    a, b = trained("lora", targets=["plain", "conv"])[0], trained("pissa", targets=["plain", "embed"])[0]
    lorary.save_adapter(a, "a")
    lorary.save_adapter(b, "b")
    ran = command("diff", "a", "b")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[:2] == ["A: a", "B: b"]
    assert "1 of 1 common sites differ" in lines[2]
    assert lines[-2].split()[:3] == ["site", "rank", "||dW_A||"]
    assert lines[-1].split()[:2] == ["plain", "4"]
    record = json.loads(command("diff", "a", "b", "--json").out)
    assert record["only_a"] == ["conv"]
    assert record["sites"][0]["relative"] == lorary.diff(a, b).relative
    ran = command("diff", "a", "a")
    assert ran.out.splitlines()[2:] == ["identical bit for bit: method, sites and tensors"]


def test_what_is_no_adapter(command: Command) -> None:
    ran = command("diff", "nothing", "nowhere")
    assert (ran.code, ran.out) == (4, "")
    assert "cannot compare nothing" in ran.err
