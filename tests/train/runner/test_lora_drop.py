"""LoRA-drop from a configuration: the probe, what is left of it, the run with its choice, and going on with it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback
from typer.testing import CliRunner

import lorary
from lorary.analysis.importance import drop_layers
from lorary.cli import app
from lorary.errors import ConfigError, FileError, PlanError, TrainingError
from lorary.methods.lora_drop import Importance
from lorary.train import Run, run
from lorary.train.config.load import from_dict
from lorary.train.data.tokenize import Tokens
from lorary.train.runner import lora_drop
from lorary.train.runner.folder import RunFolder
from lorary.train.runner.lora_drop import sample_rows
from lorary.train.runner.prepare import prepare
from tests.train.runs import llama
from tests.train.small import tokenizer

WORDS = ("hello", "world", "the", "answer", "is", "two", "three")
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model of four layers on disk, with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "small"
    llama(num_hidden_layers=4, bos_token_id=0, eos_token_id=1, pad_token_id=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(base: Path) -> Tree:
    """A configuration: 40 questions, a probe on 20 of them, then 4 steps."""
    training = {"max_steps": 4, "batch_size": 4, "gradient_accumulation_steps": 1, "lr": 1e-2, "save_steps": 2}
    return {
        "model": str(base),
        "method": {"r": 2, "targets": "q_proj, down_proj", "drop": {"threshold": 0.5, "sample": 0.5}},
        "data": {"train": "data.jsonl", "max_length": 64},
        "training": training | {"logging_steps": 1},
        "output": "out",
    }


def _write_rows() -> None:
    rows = [{"prompt": f"{WORDS[i % 7]} " * (1 + i % 3), "completion": f" {WORDS[i % 3]} {i}"} for i in range(40)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def ended(words: Tree, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run that has come to its end, and where it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("ended"))
        _write_rows()
        return run(from_dict(words), quiet=True), Path.cwd() / "out"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write_rows()


@pytest.fixture
def copy(ended: tuple[Run, Path]) -> Path:
    """The same folder again, to do with as one likes."""
    return Path(shutil.copytree(ended[1], "out"))


def _with(words: Tree, section: str, **changes: Any) -> Tree:
    return words | {section: words[section] | changes}


def _tensors(folder: Path) -> dict[str, Any]:
    return {
        f"{site}.{role}": tensor
        for site, roles in lorary.load_adapter(folder).tensors.items()
        for role, tensor in roles.items()
    }


def test_a_run_probes_chooses_and_begins_afresh(words: Tree, ended: tuple[Run, Path]) -> None:
    done, out = ended
    record = json.loads((out / "importance.json").read_text())
    found = Importance.from_dict(record)
    assert len(found.measured) == 8
    assert sum(figures["I"] for figures in record["sites"].values()) == pytest.approx(1)
    assert found.tokens == sum(len(row["input_ids"]) for row in _probe_rows(words))
    kept = {site for site, share in record["shares"].items() if not share}
    assert kept == found.kept(0.5)
    assert 2 <= len(kept) <= 4
    assert {p.name for p in out.iterdir()} == {
        *("README.md", "adapter", "checkpoints", "config.resolved.yaml", "env.json", "events.log"),
        *("importance.json", "metrics.jsonl", "plots", "report.html", "run.json", "sample.txt"),
    }
    assert sorted(p.name for p in (out / "plots").iterdir()) == ["importance.svg", "loss.svg"]
    assert f"{len(kept)} of 8 layers have tensors of their own" in (out / "plots/importance.svg").read_text()
    assert [r["step"] for r in done.history if "loss" in r] == [1, 2, 3, 4], "the probe's steps are not the run's"
    said = (out / "events.log").read_text()
    assert "a probe on 20 of 40 rows chooses the layers that keep tensors of their own" in said
    assert f"LoRA-drop, T = 0.5: {len(kept)} of 8 layers have tensors of their own, the other {8 - len(kept)}" in said


def test_layers_that_share_have_the_same_tensors_in_the_file(ended: tuple[Run, Path]) -> None:
    shares = json.loads((ended[1] / "importance.json").read_text())["shares"]
    tensors = _tensors(ended[1] / "adapter")
    for site, share in shares.items():
        same = [other for other, theirs in shares.items() if theirs == share and share]
        assert all(torch.equal(tensors[f"{site}.B"], tensors[f"{other}.B"]) for other in same)
    own = len([share for share in shares.values() if not share])
    assert len({tensors[f"{site}.B"].numpy().tobytes() for site in shares}) == own + 2


def _probe_rows(words: Tree) -> list[Any]:
    prepared = prepare(from_dict(words))
    return [prepared.train.rows[i] for i in sample_rows(prepared.train, 0.5, prepared.config.training.seed)]


def test_the_run_is_the_one_without_a_probe_but_for_its_plan(
    words: Tree, ended: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh starts: what the probe drew and learnt has left no trace."""
    found = Importance.from_dict(json.loads((ended[1] / "importance.json").read_text()))
    real = lora_drop.build_model

    def chosen_by_hand(prepared: Any, resumed: Any) -> Any:
        return real(lora_drop.with_plan(prepared, drop_layers(prepared.plan, found, 0.5)), resumed)

    monkeypatch.setattr("lorary.train.runner.run.build_model", chosen_by_hand)
    run(from_dict(_with(words, "method", drop=None)), quiet=True)
    _same(ended[1], Path("out"))


class Kill(TrainerCallback):  # type: ignore[misc]
    """Interrupts after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_resumed_run_reads_its_choice_and_never_probes_again(
    words: Tree, ended: tuple[Run, Path], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy / "checkpoints/checkpoint-4")  # as if it had been killed after step 2
    shutil.rmtree(copy / "adapter")

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it has probed again")

    monkeypatch.setattr(lora_drop, "_run_probe", never)
    with pytest.raises(ConfigError, match=r"method\.drop\.threshold: 0.5 in the run, 0.2 here"):
        run(from_dict(words, ["method.drop.threshold=0.2"]), resume=True, quiet=True)
    done = run(from_dict(words), resume=True, quiet=True)
    assert (done.steps, done.interrupted) == (4, 0)
    assert (copy / "importance.json").read_bytes() == (ended[1] / "importance.json").read_bytes()
    _same(ended[1], copy)


def _same(one: Path, other: Path) -> None:
    here, there = _tensors(one / "adapter"), _tensors(other / "adapter")
    assert list(here) == list(there)
    assert all(torch.equal(here[key], there[key]) for key in here)


def test_a_record_that_is_missing_damaged_or_changed_is_told(words: Tree, copy: Path) -> None:
    RunFolder(copy).mark()  # a finished run is not resumed
    path = copy / "importance.json"
    record = path.read_text()
    path.unlink()
    with pytest.raises(FileError, match=r"importance\.json: is missing: it holds the run's choice of layers"):
        run(from_dict(words), resume=True, quiet=True)
    path.write_text(record[:-40])
    with pytest.raises(FileError, match="invalid importance record"):
        run(from_dict(words), resume=True, quiet=True)
    changed = json.loads(record)
    changed["shares"] = dict.fromkeys(changed["shares"], "")
    path.write_text(json.dumps(changed))
    with pytest.raises(FileError, match="`shares` does not follow from the importance in the record"):
        run(from_dict(words), resume=True, quiet=True)
    changed["sites"] = {site.replace("layers.3", "layers.4"): figures for site, figures in changed["sites"].items()}
    path.write_text(json.dumps(changed))
    with pytest.raises(PlanError, match=r"model\.layers\.3\.mlp\.down_proj: is planned, but was not measured"):
        run(from_dict(words), resume=True, quiet=True)


def test_an_interrupted_probe_leaves_nothing_and_begins_anew(words: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lora_drop.build_trainer

    def interrupted(*args: Any, callbacks: list[Any], **rest: Any) -> Any:
        return real(*args, callbacks=[*callbacks, Kill(2)], **rest)

    with monkeypatch.context() as patch:
        patch.setattr(lora_drop, "build_trainer", interrupted)
        stopped = run(from_dict(words), quiet=True)
    assert (stopped.interrupted, stopped.steps, stopped.history) == (signal.SIGTERM, 0, ())
    there = {p.name for p in Path("out").iterdir()}
    assert not there & {"importance.json", "adapter", "checkpoints"}
    assert not [name for name in there if name.startswith(".")]
    assert run(from_dict(words), resume=True, quiet=True).steps == 4


def _models() -> list[LlamaForCausalLM]:
    """Every model that is alive, with its weights."""
    return [o for o in gc.get_objects() if type(o) is LlamaForCausalLM and not o.lm_head.weight.is_meta]


def _probe(words: Tree) -> Importance:
    """What a probe of two steps finds, without the run after it."""
    prepared = prepare(from_dict(words, ["method.drop.steps=2"]))
    others = set(map(id, _models()))  # other tests' may be there still
    new, stopped = lora_drop.choose_layers(prepared, RunFolder("probe"), resumed=False, quiet=True)
    assert stopped == 0
    assert new.memory.total < prepared.memory.total
    assert sorted(p.name for p in Path("probe").rglob("*")) == ["importance.json", "importance.svg", "plots"]
    assert set(map(id, _models())) <= others, "the run would have to do with less memory"
    return Importance.from_dict(json.loads(Path("probe/importance.json").read_text()))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_pairs_of_answers_are_probed_too(words: Tree) -> None:
    rows = [{"prompt": f"the {i}", "chosen": f" is {i}", "rejected": f" is not {i} two"} for i in range(12)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = _with(words, "data", train="pairs.jsonl") | {"task": "dpo"}
    found = _probe(tree)
    prepared = prepare(from_dict(tree))
    picked = [prepared.train.rows[i] for i in sample_rows(prepared.train, 0.5, prepared.config.training.seed)]
    prompts = 2 * sum(len(row["prompt_ids"]) for row in picked)
    assert found.tokens == prompts + sum(len(row[side]) for row in picked for side in ("chosen_ids", "rejected_ids"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_head_is_probed_where_it_is_adapted(words: Tree) -> None:
    found = _probe(_with(words, "method", targets="q_proj, lm_head"))
    assert found.g["lm_head"] > 0
    assert "lm_head" in found.kept(0.1), "the only one of its kind"


# --- the sample -----------------------------------------------------------------------------------------------------


def _tokens(lengths: list[int], sources: list[str] | None = None) -> Tokens:
    rows = tuple({"input_ids": [1] * n, "labels": []} for n in lengths)
    return Tokens(rows, tuple(lengths), sources=tuple(sources or ()))


def test_every_source_and_every_length_has_its_share() -> None:
    lengths = [10 + i % 100 for i in range(1000)]
    sources = ["a"] * 800 + ["b"] * 200
    picked = sample_rows(_tokens(lengths, sources), 0.1, seed=3)
    assert len(picked) == len(set(picked)) == 100
    assert picked == sorted(picked)
    assert Counter(sources[i] for i in picked) == {"a": 80, "b": 20}
    quartiles = Counter((lengths[i] - 10) // 25 for i in picked)
    assert all(abs(count - 25) <= 2 for count in quartiles.values()), quartiles
    assert picked == sample_rows(_tokens(lengths, sources), 0.1, seed=3)
    assert picked != sample_rows(_tokens(lengths, sources), 0.1, seed=4)


@pytest.mark.parametrize(("count", "share", "expected"), [(1, 0.1, 1), (3, 0.1, 1), (7, 0.5, 4), (9, 1.0, 9)])
def test_a_sample_of_few_rows_is_some(count: int, share: float, expected: int) -> None:
    assert len(sample_rows(_tokens(list(range(5, 5 + count))), share, 0)) == expected
    assert len(sample_rows(_tokens([8] * count), share, 0)) == expected


def test_rows_know_their_source(words: Tree) -> None:
    rows = [{"prompt": f"the {i}", "completion": f" is {i}"} for i in range(3)]
    Path("more.json").write_text(json.dumps(rows))
    prepared = prepare(from_dict(_with(words, "data", train=["data.jsonl", "more.json"])))
    assert Counter(prepared.train.sources) == {"data.jsonl": 40, "more.json": 3}


# --- words ----------------------------------------------------------------------------------------------------------


def test_a_plan_says_that_a_probe_will_choose(words: Tree, base: Path) -> None:
    note = (
        "LoRA-drop: a probe on 0.5 of the training rows will choose which layers keep tensors of their own (T = 0.5); "
        "the others of a module kind will share one set"
    )
    prepared = prepare(from_dict(words))
    assert note in prepared.notes
    done = CliRunner().invoke(app(), ["plan", str(base), "--set", "method.drop.threshold=0.5", "--set", "method.r=2"])
    assert done.exit_code == 0, done.output
    assert note.replace("on 0.5", "on 0.1") in done.output
    assert not Path("out").exists()


REFUSED = {
    "dora": "`method.drop`: MagnitudeDirection changes a layer's output by more than s B A x, ",
    "vera": "`method.drop`: all layers share {A, B} of SharedProjectionDelta already",
    "pissa": "`method.drop`: SVDInit starts each layer from its own weight, and layers that share start alike",
    "adalora": "`method.drop`: RankBudget decides for each layer while it trains, from that layer's own tensors",
}


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_cannot_share_contradict_it(words: Tree, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(_with(words, "method", name=name, r=12))
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ({"threshold": 1.0}, "`method.drop.threshold` must be below 1, not 1.0"),
        ({"sample": 0}, "`method.drop.sample` must be above 0, not 0"),
        ({"steps": 1}, "`method.drop.steps` must be at least 2, not 1"),
        ({"treshold": 0.5}, "unknown key `treshold` in `method.drop`\n      hint: did you mean `threshold`?"),
        (0.9, "`drop` must be keys and values, not 0.9"),
        (True, "`drop` must be keys and values, not true"),
    ],
)
def test_what_cannot_be_understood_is_told(words: Tree, drop: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(_with(words, "method", drop=drop))
    assert said in str(caught.value)


def test_one_key_can_be_set_over_a_file(words: Tree) -> None:
    assert from_dict(words, ["method.drop.steps=3"]).method.drop.model_dump() == {  # type: ignore[union-attr]
        "threshold": 0.5,
        "sample": 0.5,
        "steps": 3,
    }
    assert from_dict(words, ["method.drop=null"]).method.drop is None


def test_its_name_among_the_methods_says_where_it_is(words: Tree) -> None:
    with pytest.raises(ConfigError, match=r"write `drop: \{threshold: 0.9\}` under `method:`"):
        from_dict(_with(words, "method", name="lora-drop"))


def test_shards_are_refused() -> None:
    with pytest.raises(TrainingError) as caught:
        lora_drop.refuse_sharding_shared_layers()
    assert "fsdp: shards every layer with its tensors, and those of layers that share (LoRA-drop)" in str(caught.value)
    assert "hint: train with DDP, or without LoRA-drop" in str(caught.value)
