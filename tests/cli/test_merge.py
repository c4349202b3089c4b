"""lorary merge: 4-bit bases, what the merge is held against, the report, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lorary
from lorary import builtin
from lorary.cli._comparison_rows import comparison_rows
from lorary.layers.nf4 import NF4Linear
from lorary.model.loading.bitsandbytes_checkpoint import save_quantized
from lorary.train.config.yaml_source import dump
from tests.cli.command import Command
from tests.train import runs
from tests.train.small import tokenizer

IDS = torch.arange(24)[None] * 11 + 3


@torch.no_grad()
def answers(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits.float()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A QLoRA adapter of the built-in base after eight steps on one row."""
    folder = tmp_path_factory.mktemp("trained")
    model = builtin.load_model()
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", r=4), "attention"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(8):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    lorary.save(model, folder / "adapter")
    torch.save(answers(model), folder / "live.pt")
    return folder


@pytest.fixture
def run(command: Command, trained: Path) -> Path:
    """The adapter, in the folder where commands run; with it, what it says of `IDS` while it is live."""
    shutil.copytree(trained, "run")
    return Path("run")


def test_a_qlora_adapter_becomes_a_plain_model(command: Command, run: Path) -> None:
    live = torch.load(run / "live.pt")
    ran = command("merge", "run", "merged", "--dtype", "float32", "--rows", "2")
    assert (ran.code, ran.out) == (0, "merged\n")
    config = json.loads(Path("merged/config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert not [m for m in merged.modules() if isinstance(m, NF4Linear)]
    torch.testing.assert_close(answers(merged), live, rtol=0, atol=1e-5 * float(live.abs().max()))
    plain = answers(builtin.load_model())
    assert (plain - live).abs().max() > 100 * (answers(merged) - live).abs().max()
    report = json.loads(Path("merged/fidelity.json").read_text())
    assert report["dtype"] == "float32"
    assert (report["onto"], report["original"], report["advice"]) == ("trained", False, [])
    assert report["error"] < 1e-5
    assert report["kl"] < 1e-8
    assert report["top1"] == 1
    assert len(report["sites"]) == 24


def test_it_keeps_the_dtype_of_the_base_on_disk(command: Command, run: Path) -> None:
    ran = command("merge", "run", "merged", "--rows", "1")
    assert ran.err.startswith("wrote the merged model to merged (bfloat16)\nsite ")
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    live = torch.load(run / "live.pt")
    assert (answers(merged.float()) - live).abs().max() < 0.02 * live.abs().max()
    report = json.loads(Path("merged/fidelity.json").read_text())
    assert 0.001 < report["error"] < 0.05
    # the layers without an adapter were packed in the live model as well
    held = lorary.dequantize(lorary.quantize(builtin.load_model(torch.bfloat16)))
    for name in ("model.layers.0.mlp.up_proj", "model.layers.5.mlp.down_proj"):
        assert torch.equal(merged.get_submodule(name).weight, held.get_submodule(name).weight.float())


def test_the_original_weights_on_request(command: Command, run: Path) -> None:
    ran = command("merge", "run", "merged", "--onto", "original", "--dtype", "float32", "--rows", "2")
    assert ran.code == 0
    assert "advice: the adapter was trained on quantised weights: undoing the quantisation error" in ran.err
    report = json.loads(Path("merged/fidelity.json").read_text())
    assert (report["onto"], report["original"]) == ("original", True)
    assert report["error"] > 0.1
    assert report["kl"] > 1e-5
    model = lorary.load(builtin.load_model(), run / "adapter", quantize=False)
    expected = answers(lorary.merge(model))
    torch.testing.assert_close(answers(AutoModelForCausalLM.from_pretrained("merged")), expected, rtol=0, atol=1e-4)


def test_a_residual_that_was_packed(command: Command) -> None:
    model = builtin.load_model(torch.bfloat16).float()
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", "pissa", "dora", "rslora", r=4), "q_proj"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)), alpha=0.01)
    lorary.save(model, "adapter")
    assert command("merge", "adapter", "merged", "--dtype", "float32", "--rows", "1").code == 0
    live = answers(model)
    torch.testing.assert_close(
        answers(AutoModelForCausalLM.from_pretrained("merged")), live, rtol=0, atol=1e-5 * float(live.abs().max())
    )


def test_a_terminal_gets_a_table(command: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    ran = command("merge", "run", "merged", "--rows", "1", "--onto", "original")
    assert ran.code == 0
    for text in (
        "compared with the adapted model",
        "||dW|| / ||W||",
        "│",
        "together",
        "and 14 more",
        "\x1b[33madvice: ",
    ):
        assert text in ran.err


# --- rows -----------------------------------------------------------------------------------------------------------


def rows_of(report: str = "merged/fidelity.json") -> tuple[str, int]:
    found = json.loads(Path(report).read_text())
    return found["rows"], found["tokens"]


def a_run(data: dict[str, Any] | None = None) -> None:
    """The folder of a run on a tiny base in bf16: `model`, and `run` with a configuration and an adapter."""
    words = runs.configuration(runs.base_folder(Path("model")), Path("data.jsonl"))
    words |= {"data": words["data"] | (data or {})}
    model = runs.adapted("qlora", model=AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.05)
    lorary.save(model, "run/adapter")
    Path("run/config.resolved.yaml").write_text(dump(words))


def test_the_rows_that_the_run_held_out(command: Command) -> None:
    a_run()
    assert command("merge", "run", "one", "--base", "model").code == 0
    assert command("merge", "run/adapter", "two", "--base", "model", "--rows", "2").code == 0
    (first, all_), (second, two) = rows_of("one/fidelity.json"), rows_of("two/fidelity.json")
    assert first == second == "rows that its run held out"
    texts = [json.loads(line) for line in Path("data.jsonl").read_text().splitlines()]
    config = AutoModelForCausalLM.from_pretrained("model").config
    lengths = {len(tokenizer()(t["prompt"] + t["completion"])["input_ids"]) + 1 for t in texts}
    held = comparison_rows(Path("run"), tokenizer(), config, 8).ids
    assert len(held) == 5  # a fifth of 24
    assert {len(ids) for ids in held} <= lengths
    assert all_ == sum(map(len, held))
    assert two < all_


def test_rows_that_cannot_be_read_are_told_and_replaced(command: Command) -> None:
    a_run()
    Path("data.jsonl").unlink()
    ran = command("merge", "run", "merged", "--base", "model", "--rows", "1")
    assert ran.code == 0
    assert ran.err.startswith(
        "note: the run's own rows cannot be read: cannot read data.jsonl:\nwrote the merged model to merged ("
    )
    assert rows_of() == ("rows of builtin:topics", 128)


def test_rows_of_ones_own(command: Command, run: Path) -> None:
    Path("mine.jsonl").write_text('{"text": "def f(x): return x"}\n{"text": "import os"}\n')
    ran = command("merge", "run", "merged", "--data", "mine.jsonl", "--dtype", "float32")
    assert "compared on 2 rows of mine.jsonl\n" in ran.err
    ids = builtin.load_tokenizer()(["def f(x): return x", "import os"])["input_ids"]
    assert rows_of() == ("rows of mine.jsonl", sum(len(row) + 1 for row in ids))  # each with its end
    ran = command("merge", "run", "again", "--data", "none.jsonl")
    assert (ran.code, ran.out) == (3, "")
    assert "none.jsonl: \n  - there is no such file" in ran.err.replace(":\n", ": \n")
    assert not Path("again").exists()


def test_random_tokens_where_the_base_has_no_tokenizer(command: Command) -> None:
    a_run()
    for file in Path("model").glob("token*"):
        file.unlink()
    ran = command("merge", "run", "merged", "--base", "model", "--rows", "2")
    assert ran.code == 0
    assert ran.err.startswith("note: model: there is no tokenizer.json in it\n")
    assert rows_of() == ("rows of random tokens", 256)
    assert not list(Path("merged").glob("token*"))
    ran = command("merge", "run", "again", "--base", "model", "--data", "data.jsonl")
    assert ran.code == 3
    assert "the base has no tokenizer" in ran.err


# --- what the base was, and what is refused -------------------------------------------------------------------------


def test_a_base_that_the_run_rounded_is_rounded_before_it_is_packed(command: Command) -> None:
    a_run()
    AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32).save_pretrained("wide")
    model = AutoModelForCausalLM.from_pretrained("wide")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 2**-12)  # lies between two numbers of bf16
    model.save_pretrained("wide")
    tokenizer().save_pretrained("wide")
    text = Path("run/config.resolved.yaml").read_text()
    Path("run/config.resolved.yaml").write_text(text.replace("model: model\n", "model: {id: wide, dtype: bfloat16}\n"))
    assert command("merge", "run", "narrow", "--base", "wide", "--force", "--rows", "1", "--dtype", "float32").code == 0
    shutil.rmtree("model")
    Path("run/config.resolved.yaml").unlink()
    assert command("merge", "run", "full", "--base", "wide", "--force", "--rows", "1", "--dtype", "float32").code == 0
    for folder, dtype in (("narrow", torch.bfloat16), ("full", torch.float32)):
        merged = AutoModelForCausalLM.from_pretrained(folder)
        assert merged.dtype == torch.float32
        expected = lorary.load(AutoModelForCausalLM.from_pretrained("wide", dtype=dtype), "run/adapter", force=True)
        lorary.merge(expected, dtype=torch.float32)
        name = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(merged.get_parameter(name), expected.get_parameter(name)), folder


@pytest.mark.parametrize(
    "options", [["--dtype", "nf4"], ["--dtype", "int8"], ["--onto", "4bit"], ["--onto", "quantised"]], ids="=".join
)
def test_nothing_is_merged_back_into_a_few_bits(command: Command, options: list[str]) -> None:
    ran = command("merge", "run", "merged", *options)
    assert ran == (
        2,
        "",
        f"error: cannot merge run:\n  - {' '.join(options)}: would quantise the merged weights: the steps between "
        "4-bit or 8-bit numbers are coarser than what an adapter changes, and rounding would undo it\n"
        "      hint: merge into bfloat16 or float32, or keep the 4-bit base and the adapter beside it\n",
    )


def test_every_option_that_is_wrong_is_named(command: Command) -> None:
    ran = command("merge", "run", "merged", "--dtype", "float64", "--onto", "orignal")
    assert ran == (
        2,
        "",
        "error: cannot merge run:\n  - --dtype float64: is unknown\n"
        "      hint: did you mean `float16` or `bfloat16` or `float32`?\n"
        "  - --onto orignal: is unknown\n      hint: did you mean `original`?\n",
    )


def test_a_base_that_is_quantised_itself_has_no_original(command: Command) -> None:
    a_run()
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    ran = command("merge", "run", "merged", "--base", "model", "--onto", "original")
    assert ran == (
        4,
        "",
        "error: cannot merge run onto the original weights:\n"
        "  - model: is quantised on disk: its original weights are not available\n"
        "      hint: name the model that it was made from with --base, and pass --force\n",
    )


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_checkpoint_in_4_bits_becomes_a_plain_one(command: Command, name: str) -> None:
    """Whether the method has a word for it or not."""
    runs.base_folder(Path("model"))
    save_quantized(lorary.quantize(AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)), Path("packed"))
    tokenizer().save_pretrained("packed")
    model = runs.adapted(name, model=lorary.load_quantized("packed"))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.05)
    lorary.save(model, "adapter")
    ids = IDS % 300
    with torch.no_grad():
        live = model(input_ids=ids).logits
    assert command("merge", "adapter", "merged", "--base", "packed", "--rows", "2").code == 0
    assert "quantization_config" not in json.loads(Path("merged/config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, live, rtol=1e-4, atol=1e-5)
