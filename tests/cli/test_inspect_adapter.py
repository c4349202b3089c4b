"""lorary inspect adapter, intrinsic and gradients, on real models and files."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorary
from lorary.train.runner.folder import CONFIG
from tests import tiny
from tests.cli.command import Command
from tests.train.small import tokenizer


@pytest.fixture
def base(command: Command) -> str:
    """A tiny Llama with its tokenizer, an adapter trained on it, and 12 rows of text."""
    words = tokenizer()
    tiny.seeded("LlamaForCausalLM", vocab_size=len(words), max_position_embeddings=64).save_pretrained("model")
    words.save_pretrained("model")
    lorary.save(tiny.trained(loaded()), "adapter")
    rows = [{"text": f"hello world, the answer is {i} two three"} for i in range(12)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "model"


def loaded() -> Any:
    return AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)


def test_an_adapter_without_its_base(command: Command, base: str) -> None:
    ran = command("inspect", "adapter", "adapter")
    assert ran.code == 0
    assert ran.out.startswith("adapter: lora, 14 weights, the largest changes first\n")
    head = re.split(r"  +", ran.out.splitlines()[1])
    assert head == ["site", "shape", "stable rank", "entropy rank", "rank for 90 %"]
    assert "adapter: median stable rank 1." in ran.out
    assert ran.err == (
        "note: left out, because they need the base: the size beside the weights, intruder dimensions, and magnitude "
        "and direction\n"
    )


def test_an_adapter_beside_a_tuned_model_as_a_page_and_numbers(command: Command, base: str) -> None:
    tiny.shaken(loaded(), 0.02).save_pretrained("tuned")  # type: ignore[operator]
    options = ("--base", base, "--tuned", "tuned", "--top", "4", "--out", "seen")
    ran = command("inspect", "adapter", "adapter", *options)
    assert (ran.code, ran.err) == (0, "wrote seen/inspect.html and inspect.json\n")
    found = json.loads(Path("seen/inspect.json").read_text())
    expected = lorary.inspect_adapter(
        lorary.load_adapter("adapter"), loaded(), tuned=AutoModelForCausalLM.from_pretrained("tuned"), top=4
    )
    assert found["sites"] == json.loads(json.dumps(expected.to_dict()))["sites"]
    assert (found["base"], found["tuned_model"], found["top"]) == (base, "tuned", 4)
    page = Path("seen/inspect.html").read_text()
    assert page.count("<svg") == 2 + 1 + 2 + 1 + 2 + 1  # sizes, spectra, ranks, bound, intruders, rows
    assert not re.search(r'(?:src|href)="https?:', page), "nothing is fetched"
    assert "mathdefault" not in page
    for s in expected.sites:
        assert f"<td>{s.site}</td>" in page
    again = command("inspect", "adapter", "adapter", "--out", "seen", "--json")
    assert again.code == 0
    assert json.loads(again.out) == json.loads(Path("seen/inspect.json").read_text()), "what stood there was replaced"


def test_every_invalid_option_at_once_and_nothing_is_written(command: Command, base: str) -> None:
    Path("taken").write_text("mine")
    ran = command("inspect", "adapter", "adapter", "--epsilon", "nan", "--tuned", "model", "--out", "taken")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "error: cannot inspect this adapter:\n"
        "  - --out taken: is a file\n"
        "      hint: name a folder\n"
        "  - --epsilon nan: is not a cosine above 0 and at most 1\n"
        "  - --tuned model: cannot be compared without the base that it was tuned from\n"
        "      hint: give --base MODEL\n"
    )
    assert Path("taken").read_text() == "mine"
    assert command("inspect", "adapter", "adapter", "--top", "-1").code == 2


def test_folders_that_cannot_be_inspected(command: Command, base: str) -> None:
    def bad(*arguments: str, code: int = 4) -> str:
        ran = command("inspect", "adapter", *arguments, "--out", "seen")
        assert (ran.code, ran.out, Path("seen").exists()) == (code, "", False), ran.err
        return ran.err

    assert "model: there is no adapter in it" in bad("model")
    assert "there is no such folder" in bad("adapter", "--base", "./nowhere")
    assert "there is no such folder" in bad("adapter", "--base", base, "--tuned", "./nowhere")
    assert "it is an adapter, not a model" in bad("adapter", "--base", "adapter")
    torch.manual_seed(1)
    tiny.model("LlamaForCausalLM", vocab_size=300).save_pretrained("other")
    assert "hint: load the base that it was trained on" in bad("adapter", "--base", "other")
    tiny.model("LlamaForCausalLM", vocab_size=300, intermediate_size=40).save_pretrained("wide")
    told = bad("adapter", "--base", base, "--tuned", "wide", code=2)
    assert "the tuned model's model.layers.0.mlp.gate_proj and 3 more: has 40 output features, expected 24" in told
    weights = Path("adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-40])
    assert "the tensors need 3,712 bytes, the file has 3,672: it is cut short" in bad("adapter")
    lorary.save(tiny.trained(loaded(), lorary.method("dora", r=2)), "dora")
    assert "changes its weight by an amount that depends on the weight" in bad("dora", code=2)


def test_a_folder_with_other_files_is_left_alone(command: Command, base: str) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    for arguments in (("adapter", "adapter"), ("gradients", base), ("intrinsic", base)):
        ran = command("inspect", *arguments, "--out", "mine")
        assert ran.code == 2
        assert "--out mine: holds files that are not from this command: thesis.txt" in ran.err
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]


def test_the_gradients_of_a_first_step(command: Command, base: str) -> None:
    ran = command("inspect", "gradients", base, "--data", "data.jsonl", "--set", "method.r=2", "--out", "seen")
    assert (ran.code, ran.err) == (0, "wrote seen/inspect.html and inspect.json\n")
    assert ran.out.startswith("lora on model: norms in the first step, 14 sites\n")
    assert "only B has a gradient in the first step: that of A is zero, because B is still zero" in ran.out
    assert "largest change of a weight: " in ran.out
    found = json.loads(Path("seen/inspect.json").read_text())
    assert found["moving"] == ["B"]
    assert found["roles"]["A"]["step"] == 0
    assert all(site["effect"] > 0 for site in found["sites"])
    page = Path("seen/inspect.html").read_text()
    assert page.count("<svg") == 2
    assert "model.layers.1.mlp.down_proj" in page
    pissa = command(
        "inspect", "gradients", base, "--data", "data.jsonl", "--set", "method={name: pissa, r: 2}", "--json"
    )
    assert json.loads(pissa.out)["moving"] == ["A", "B"]
    Path("run").mkdir()
    config = {"model": base, "data": "data.jsonl", "method": {"name": "vera", "r": 4}}
    Path("run", CONFIG).write_text(json.dumps(config))  # JSON is YAML
    assert json.loads(command("inspect", "gradients", "run", "--json").out)["moving"] == ["b"]


def test_adalora_is_planned_for_its_whole_run(command: Command, base: str) -> None:
    sets = ("--set", "method.name=adalora", "--set", "method.options={target: 2}", "--set", "method.r=4")
    ran = command("inspect", "gradients", base, "--data", "data.jsonl", *sets, "--set", "training.max_steps=40")
    assert ran.code == 0, ran.err
    assert "note: the gradients include the penalties of OrthogonalityPenalty" in ran.err


def test_the_intrinsic_dimension(command: Command, base: str) -> None:
    asked = ("--data", "data.jsonl", "--steps", "8", "--lr", "0.01,0.02", "--full-lr", "0.01", "--dims", "40,10")
    ran = command("inspect", "intrinsic", base, *asked, "--out", "seen")
    assert (ran.code, ran.err) == (0, "wrote seen/inspect.html and inspect.json\n")
    assert ran.out.startswith("model on data.jsonl, 8 steps in subspaces of dimension d (DID)\n")
    found = json.loads(Path("seen/inspect.json").read_text())
    assert [run["d"] for run in found["runs"]] == [10, 40]
    assert found["full_loss"] < found["base_loss"]
    assert found["size"] == sum(p.numel() for p in loaded().parameters())
    assert {run["lr"] for run in found["runs"]} <= {0.01, 0.02}
    page = Path("seen/inspect.html").read_text()
    assert page.count("<svg") == 1
    assert "d90" in page
    said = command("inspect", "intrinsic", base, *asked, "--said", "--json")
    assert json.loads(said.out)["structure_aware"]


def test_what_no_intrinsic_dimension_is_measured_of(command: Command, base: str) -> None:
    def bad(*arguments: str, code: int = 2) -> str:
        ran = command("inspect", "intrinsic", *arguments, "--out", "seen")
        assert (ran.code, ran.out, Path("seen").exists()) == (code, "", False), ran.err
        return ran.err

    told = bad(base, "--dims", "0,many,8", "--lr", "nan", "--full-lr", "inf")
    assert told == (
        "error: cannot measure the intrinsic dimension:\n"
        "  - --dims 0: is not a whole number above 0\n"
        "      hint: separate several by commas\n"
        "  - --dims many: is not a whole number above 0\n"
        "      hint: separate several by commas\n"
        "  - --lr nan: is not a number above 0\n"
        "      hint: separate several by commas\n"
        "  - --full-lr inf: is not a finite number above 0\n"
    )
    data = ("--data", "data.jsonl")
    size = sum(p.numel() for p in loaded().parameters())
    assert f"dimensions: 10000000 is not a whole number from 1 to {size:,}" in bad(base, *data, "--dims", "10000000")
    told = bad(base, *data, "--dims", "4,40", "--said")
    assert "dimensions: 4 leaves nothing beside the 5 scales of the layers that SAID trains" in told
    Path("run.yaml").write_text("model: model\ndata: data.jsonl\n")
    assert "data.validation: no rows are held out" in bad("run.yaml")
    Path("on.yaml").write_text(
        "model: {id: model, adapter: adapter}\ndata: {train: data.jsonl, validation: data.jsonl}\n"
    )
    assert "model.adapter: the subspace begins at the base" in bad("on.yaml")
    assert "no such file" in bad("nowhere.yaml").lower()
    assert "did you mean" in bad(base, *data, "--set", "training.batch_sise=3")
    assert "there is no such folder" in bad("./nowhere", *data, code=4)


def test_an_interrupt_ends_the_command_and_writes_nothing(command: Command, base: str) -> None:
    from transformers import TrainerCallback

    from lorary.cli._inspect import runs
    from lorary.train.config.load import from_dict
    from lorary.train.runner.build import build_model
    from lorary.train.runner.prepare import prepare

    class Interrupt(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    prepared = prepare(from_dict({"model": base, "data": "data.jsonl", "training": {"max_steps": 3}}))
    trainer = runs.trainer_of(prepared, build_model(prepared), Path("scratch"), [Interrupt()])
    with pytest.raises(SystemExit) as ended:
        runs.train(trainer)
    trainer.head.remove()
    assert ended.value.code == 130
    assert trainer.state.global_step == 1
