"""From a supernet run to the adapter that a search finds in it, on the rows that the run held out."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

import lorary
from lorary.analysis.supernet_search import EvolutionConfig
from lorary.errors import ConfigError, FileError, StateError
from lorary.layers.adapted import adapted_layers
from lorary.methods.glora import RandomStructures
from lorary.methods.glora_terms import GLoRADelta
from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.runner.supernet_search import search_run
from tests import fresh
from tests.cli.command import Command
from tests.train.runs import adapted as attached
from tests.train.runs import configuration, llama, rows, sft, trained
from tests.train.small import tokenizer


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


FEW = EvolutionConfig(population=6, keep=2, crossovers=2, mutations=2, generations=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model on disk, with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "small"
    llama(bos_token_id=0, eos_token_id=1, pad_token_id=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _configuration(base: Path) -> dict[str, Any]:
    """A supernet: 24 questions, written here, some held out, 6 steps."""
    return configuration(base, Path("data.jsonl")) | {
        "model": str(base),
        "method": {"name": "glora", "r": 2, "options": {"supernet": True, "seed": 3}},
        "data": {"train": "data.jsonl", "validation_split": 0.2, "max_length": 64},
        "training": {"max_steps": 6, "batch_size": 4, "gradient_accumulation_steps": 1, "lr": 1e-2, "save_steps": 3},
    }


@pytest.fixture
def words(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return _configuration(base)


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, which no test changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        return run(from_dict(_configuration(base)), quiet=True).folder.absolute()


@pytest.fixture
def out(words: dict[str, Any], finished: Path) -> Path:
    """A copy of that folder, beside its data, as if it had run here."""
    copy = Path(shutil.copytree(finished, "out"))
    config = copy / "config.resolved.yaml"
    config.write_text(config.read_text().replace(str(finished.parent), str(copy.parent.absolute())))
    return copy


def test_a_search_leaves_an_adapter_beside_the_supernet(out: Path, base: Path) -> None:
    told: list[Any] = []
    folder, found = search_run(out, FEW, progress=lambda *figures: told.append(figures))
    assert folder == out / "searched"
    assert len(told) == found.judged == 12
    # what it says about itself is so: the loss of the adapter on the held-out rows
    record = json.loads((folder / "search.json").read_text())
    assert record["loss"] == -found.fitness == min(record["best_loss_by_generation"])
    assert record["numbers"] == found.size
    assert set(record["structures"]) == set(found.structures)
    adapter = lorary.load_adapter(folder)
    assert adapter.method.rules == ()
    assert all(isinstance(p.delta, GLoRADelta) for p in adapter.sites)
    assert found.size == sum(t.numel() for roles in adapter.tensors.values() for t in roles.values())
    # merged, it is a plain model, biases and all
    model = lorary.load(AutoModelForCausalLM.from_pretrained(base), folder)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        y = model(input_ids=ids).logits
        lorary.merge(model)
        model.save_pretrained("merged")
        z = AutoModelForCausalLM.from_pretrained("merged")(input_ids=ids).logits
    torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-5)


def test_the_loss_is_that_of_the_held_out_rows(words: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """The rows that the run was trained on are gone, and other files say what they like: only validation is read."""
    lines = Path("data.jsonl").read_text().splitlines(keepends=True)
    Path("train.jsonl").write_text("".join(lines[:16]))
    Path("validation.jsonl").write_text("".join(lines[16:]))
    Path("test.jsonl").write_text("this is no JSON: whoever reads it fails\n")
    words["data"] = {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": 64}
    done = run(from_dict(words), quiet=True)
    folder, found = search_run(done.folder, FEW)
    own = lorary.load(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    loss = count = 0.0
    read = tokenizer()
    for line in lines[16:]:
        row = json.loads(line)
        prompt = read(row["prompt"])["input_ids"]
        ids = [*read(row["prompt"] + row["completion"])["input_ids"], read.eos_token_id]
        with torch.no_grad():
            logp = own(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for i in range(len(prompt), len(ids)):
            loss, count = loss - float(logp[i - 1, ids[i]]), count + 1
    assert loss / count == pytest.approx(-found.fitness, rel=1e-3)


def test_a_search_needs_held_out_rows(words: dict[str, Any]) -> None:
    words["data"] = {"train": "data.jsonl", "max_length": 64}
    done = run(from_dict(words), quiet=True)
    with pytest.raises(ConfigError) as refused:
        search_run(done.folder, FEW)
    assert str(refused.value) == (
        "cannot search in 'out':\n"
        "  - data.validation: the run held no rows out, and a loss on its training rows cannot rank candidates\n"
        "      hint: train with data.validation or data.validation_split"
    )
    assert not (done.folder / "searched").exists()


def test_a_search_needs_the_rows_of_the_run(out: Path) -> None:
    data = Path("data.jsonl").read_text()
    Path("data.jsonl").write_text("\n".join(reversed(data.splitlines())) + "\n")  # others are held out now
    with pytest.raises(ConfigError) as refused:
        search_run(out, FEW)
    assert str(refused.value) == (
        "cannot search in 'out':\n"
        "  - data.train: the training rows are not those of the run, so the held-out rows may be among its training "
        "rows\n"
        "      hint: restore the run's original data"
    )
    assert not (out / "searched").exists()
    Path("data.jsonl").write_text(data)
    search_run(out, FEW)


def test_what_is_no_finished_supernet_run(words: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        FileError, match=r"is not the folder of a finished run: config.resolved.yaml and adapter missing"
    ):
        search_run(tmp_path, FEW)
    words["method"] = {"name": "lora", "r": 2}
    done = run(from_dict(words), quiet=True)
    with pytest.raises(StateError, match="no supernet is attached"):
        search_run(done.folder, FEW)
    (done.folder / "searched").mkdir()
    with pytest.raises(ConfigError, match="pass --overwrite to replace it"):
        search_run(done.folder, FEW)


@pytest.mark.usefixtures("out")
def test_on_the_command_line(words: dict[str, Any], base: Path, command: Command) -> None:
    arguments = ["search", "out", "--population", "4", "--generations", "2", "--ceiling", "500"]
    ran = command(*arguments)
    assert (ran.code, ran.out) == (0, "out/searched\n")
    assert "8 candidates: held-out loss" in ran.err
    record = json.loads(Path("out/searched/search.json").read_text())
    assert record["numbers"] <= record["evolution"]["ceiling"] == 500
    assert command(*arguments).code == 2
    again = command(*arguments, "--overwrite")
    assert (again.code, json.loads(Path("out/searched/search.json").read_text())) == (0, record)
    # what was found is no obstacle to what a run folder is for
    assert command("generate", "out/searched", "hello", "--max-new-tokens", "3", "--base", str(base)).code == 0
    assert command("merge", "out/searched", "merged", "--base", str(base)).code == 0
    assert run(from_dict(words), quiet=True, overwrite=True).steps == 6
    assert not Path("out/searched").exists()


# --- the first stage --------------------------------------------------------------------------------------------------


def drawn(model: Any) -> dict[str, GLoRADelta]:
    return {name: layer.active_structure for name, layer in adapted_layers(model).items()}


def test_every_step_trains_another_structure_of_every_layer(tmp_path: Path) -> None:
    model = attached("glora", supernet=True, r=2)
    trainer = sft(tmp_path, model)
    rule = RandomStructures(0)
    trainer.train()
    layers = adapted_layers(model)
    assert drawn(model) == {n: rule.drawn(layer.method.delta, layer.site, 13) for n, layer in layers.items()}
    assert len(set(drawn(model).values())) > 4


def test_a_supernet_that_resumes_is_bit_for_bit_the_one_that_went_on(tmp_path: Path) -> None:
    whole = attached("glora", supernet=True, r=2)
    sft(tmp_path / "whole", whole).train()
    settings = {"save_strategy": "steps", "save_steps": 5}
    half = attached("glora", supernet=True, r=2)
    sft(tmp_path / "half", half, **settings).train()
    resumed = attached("glora", supernet=True, r=2)
    sft(tmp_path / "half", resumed, **settings).train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-5"))
    assert trained(resumed) == trained(whole)
    assert drawn(resumed) == drawn(whole)


def test_evaluation_is_of_the_whole_supernet(tmp_path: Path) -> None:
    model = attached("glora", supernet=True, r=2)
    trainer = sft(tmp_path, model, held_out=rows(4))
    trainer.train()
    one = trainer.evaluate()["eval_loss"]
    for layer in adapted_layers(model).values():
        layer.active_structure = GLoRADelta(2, *["none"] * 5)
    assert trainer.evaluate()["eval_loss"] == one


# --- several processes ------------------------------------------------------------------------------------------------


def stepped(model: nn.Module, forward: Any, x: torch.Tensor) -> None:
    """Three steps of the first stage."""
    optimizer, rules = torch.optim.AdamW(lorary.param_groups(model, 1e-2)), lorary.rules(model, 10)
    for _ in range(3):
        forward(x).square().mean().backward()
        optimizer.step()
        rules.after_step()
        optimizer.zero_grad()


def supernet() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6, bias=False))
    return lorary.attach(model, lorary.plan(model, lorary.method("glora", supernet=True)))


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        model, alone, x = supernet(), supernet(), torch.randn(8, 6)
        dist.broadcast(x, 0)
        stepped(model, nn.parallel.DistributedDataParallel(model), x[4 * rank : 4 * rank + 4])
        stepped(alone, alone, x)
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
        Path(folder, str(rank)).touch()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.xdist_group(fresh.GROUP)
def test_two_processes_train_the_structures_that_one_would(tmp_path: Path) -> None:
    """DDP waits for every gradient: tensors that a step has no use for must have one, too."""
    fresh.together(work, fresh.free_port(), str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
