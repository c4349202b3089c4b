"""The self-tests of `lorary doctor`: they pass here, and a fault in a feature is found by using it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.cli import _self_tests
from lorary.errors import Diagnostic, FileError
from tests.cli.command import Command

ALWAYS = ["load", "lora", "qlora", "save", "train"]


def test_every_feature_does_one_step(command: Command) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    ran = command("doctor", "--json")
    found = {finding["what"]: finding for finding in json.loads(ran.out)}
    assert ran.code == 0, ran.out
    for test in _self_tests.SELF_TESTS:
        there = not test.needs or (torch.cuda.is_available() if test.needs == "cuda" else bool(find_spec(test.needs)))
        assert (test.what in found) == there
        assert not there or found[test.what]["level"] == "ok"
    assert [test.what for test in _self_tests.SELF_TESTS if not test.needs] == ALWAYS
    assert torch.equal(torch.rand(2), expected)  # random numbers are as they were


PLANTED = {
    "trl.py": "raise ImportError('cannot import name `Planted` from `trl`', name='trl')",
    "peft.py": """
PeftMixedModel = object
class PeftModel:
    def from_pretrained(*_):
        raise TypeError('got a planted fault')
""",
    "bitsandbytes.py": "raise SystemExit('the planted library cannot be loaded')",
}


def test_broken_packages_are_found_by_using_them(tmp_path: Path) -> None:
    """Their versions are what they were: only the modules that come first on the path are broken."""
    for name, code in PLANTED.items():
        (tmp_path / name).write_text(code)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path[1:]]), "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, "-m", "lorary", "doctor"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    said = {line[6:18].strip(): (line.split()[0], line[19:]) for line in done.stdout.splitlines()}
    assert done.returncode == 1
    failed = {what: detail for what, (level, detail) in said.items() if level == "fail"}
    assert failed.keys() == {"train", "to peft", "bnb 4 bits"}, done.stdout
    assert failed["train"].startswith("ImportError: cannot import name `Planted` from `trl`; it comes from trl 1.")
    assert failed["train"].endswith(": pip install --upgrade lorary trl, or report it")
    assert failed["to peft"].startswith("TypeError: got a planted fault; it comes from peft ")
    assert failed["bnb 4 bits"].startswith("SystemExit: the planted library cannot be loaded; it comes from bitsandb")
    assert [said[what][0] for what in ("load", "lora", "qlora", "save")] == ["ok"] * 4
    assert done.stderr.endswith(f"3 of {len(said)} checks failed\n")


def fails(error: BaseException) -> Any:
    def run(folder: Path) -> str:
        print("noise")
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (
            FileError("cannot load the model x:", [Diagnostic("model.safetensors", "is empty", "fetch it again")]),
            "cannot load the model x: model.safetensors: is empty; fetch it again",
        ),
        (ModuleNotFoundError("No module named 'trl'", name="trl"), "ModuleNotFoundError: No module named 'trl'; it co"),
        (ValueError(), "ValueError; please report it with the output of `lorary doctor --json`"),
    ],
)
def test_a_failure_says_what_to_do(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, detail: str
) -> None:
    tests = (_self_tests.SelfTest("planted", fails(error)), _self_tests.SelfTest("next", lambda _: "done"))
    monkeypatch.setattr(_self_tests, "SELF_TESTS", tests)
    ran = command("doctor")
    *_, planted, following = ran.out.splitlines()
    assert planted.startswith(f"fail  planted      {detail}")
    assert following == "ok    next         done"
    assert (ran.code, "noise" in ran.out) == (1, False)


@pytest.mark.parametrize(("name", "broken"), [("lora", "lower the loss"), ("save", "other logits")])
def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, broken: str) -> None:
    """Nothing raises: the step goes uphill, or the adapter that is loaded is another."""
    test = next(test for test in _self_tests.SELF_TESTS if test.what == name)
    if name == "lora":
        step = torch.optim.AdamW.step
        flip: Any = lambda self: ([p.grad.neg_() for g in self.param_groups for p in g["params"]], step(self))  # noqa: E731
        monkeypatch.setattr(torch.optim.AdamW, "step", flip)
    else:
        monkeypatch.setattr(_self_tests, "_adapter", lambda model, folder: _other(folder))
    with pytest.raises(Exception, match=broken):
        test.run(tmp_path)


def _other(folder: Path) -> Path:
    import lorary

    torch.manual_seed(5)
    lorary.save(_self_tests._trained(_self_tests._base(), "lora", "rslora"), folder / "adapter")
    return folder / "adapter"
