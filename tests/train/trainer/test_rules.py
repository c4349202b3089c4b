"""Rules in the trainer: what they see and when, whatever else is asked of the run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback

import lorary
from lorary.analysis.heatmap import ranks_svg
from lorary.layers.adapted import adapted_layers as layers_of
from lorary.methods.adalora_budget import RankBudget
from lorary.spec.interfaces import COMPONENTS, Rule
from lorary.train import run
from lorary.train.config.load import from_dict
from tests.train.resume.processes import forked
from tests.train.runs import TIMES, adapted, base_folder, changed, configuration, dpo, log, losses, rows, sft

TRL_ASKS_BY_AN_OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
MIXED = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
MANY = pytest.mark.parametrize("many", [1, 3])

SEEN: list[tuple[Any, ...]] = []


@dataclass(frozen=True)
class Diary(Rule):
    """A rule that adds a multiple of 1 + |B|² to the loss, and writes down what it sees."""

    weight: float = 0.0

    needs = frozenset({"B"})

    def start(self, layers: Sequence[Any], steps: int) -> dict[str, Tensor]:
        SEEN.append(("start", len(layers), steps))
        return {"calls": torch.zeros(())}

    def penalty(self, layers: Sequence[Any], state: dict[str, Tensor]) -> Tensor | float:
        SEEN.append(("penalty",))
        total: Tensor = sum(layer.params["B"].square().sum() for layer in layers)
        return self.weight * (1 + total)

    def after_backward(self, layers: Sequence[Any], state: dict[str, Tensor], step: int) -> None:
        SEEN.append(("after_backward", step, _norm(layers), _sizes(layers)))

    def after_step(self, layers: Sequence[Any], state: dict[str, Tensor], step: int, run: Any) -> None:
        state["calls"] = state["calls"] + 1
        SEEN.append(("after_step", step, _norm(layers), _sizes(layers)))


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The rule as a word for the time of a test, and what it sees."""
    monkeypatch.setitem(COMPONENTS, "Diary", Diary)
    SEEN.clear()
    return SEEN


def _norm(layers: Sequence[Any]) -> float:
    return float(torch.stack([p.grad.norm() for layer in layers for p in layer.params.values()]).norm())


def _sizes(layers: Sequence[Any]) -> float:
    return float(sum(layer.params["B"].detach().square().sum() for layer in layers))


def _with_rule(weight: float = 0.0) -> Any:
    return adapted(rules=(Diary(weight),))


@MIXED
@MANY
def test_rules_are_called_around_the_clipping_and_the_step(
    tmp_path: Path, diary: list[tuple[Any, ...]], many: int, bf16: bool
) -> None:
    """Once per optimizer step, however many micro-batches it has: 4 of them in an epoch of 12 with three each."""
    words = {"gradient_accumulation_steps": many, "bf16": bf16, "activation_checkpointing": bf16}
    t = sft(tmp_path, _with_rule(), max_grad_norm=1e-3, max_steps=5, warmup_steps=0, **words)
    t.train()
    start, *others = diary
    assert start == ("start", 14, 5)
    assert [e[0] for e in others] == ["penalty", "after_backward", "after_step"] * 5
    for i, (_, before, after) in enumerate(zip(*[iter(others)] * 3, strict=True), start=1):
        assert before[1] == after[1] == i
        assert before[2] == pytest.approx(log(t)[i - 1]["grad_norm"], rel=1e-5)  # of the whole step, not clipped
        assert before[2] > 1e-2
        assert after[2] == pytest.approx(1e-3, rel=1e-2)  # clipped, and still there
        assert after[3] != before[3]  # the parameters have moved
    assert float(t.rules.states[0]["calls"]) == 5


@pytest.mark.usefixtures("diary")
def test_a_penalty_is_computed_in_32_bits_whatever_the_model_computes_in(tmp_path: Path) -> None:
    found = []
    for bf16 in (False, True):
        model = _with_rule(3.0)
        with torch.no_grad():
            for layer in layers_of(model).values():
                layer.params["B"].normal_(generator=torch.Generator().manual_seed(1))
        t = sft(tmp_path, model, bf16=bf16, max_steps=1)
        t.train()
        found.append([r["penalty"] for r in log(t) if "penalty" in r])
    assert found[0] == found[1]


@pytest.mark.parametrize("many", [1, 2, 4])
@pytest.mark.usefixtures("diary")
def test_a_penalty_stands_beside_the_loss_once_per_step(tmp_path: Path, many: int) -> None:
    """Which stays that of the task, to the last bit."""
    curves = []
    for weight in (0.0, 5.0):
        t = sft(tmp_path, _with_rule(weight), gradient_accumulation_steps=many, max_steps=1)
        t.train()
        curves.append([(r.get("loss"), r.get("train_loss")) for r in log(t)])
    assert curves[0] == curves[1]
    assert [r["penalty"] for r in log(t) if "penalty" in r] == [5.0]


@pytest.mark.usefixtures("diary")
def test_a_penalty_has_its_whole_gradient(tmp_path: Path) -> None:
    """B is pulled to zero by the gradient 2 · weight · B, however many micro-batches there are."""
    norms = []
    for many in (1, 2):
        model = _with_rule(1e4)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("params.B"):
                    p.fill_(1.0)
        t = sft(tmp_path, model, gradient_accumulation_steps=many, per_device_train_batch_size=4 // many, max_steps=1)
        t.train()
        norms.append(log(t)[0]["grad_norm"])
    size = sum(p.numel() for n, p in model.named_parameters() if n.endswith("params.B"))
    assert norms == pytest.approx([2e4 * size**0.5] * 2, rel=1e-3)


@pytest.mark.usefixtures("diary")
def test_evaluation_knows_no_penalty(tmp_path: Path) -> None:
    found = []
    for weight in (0.0, 5.0):
        t = sft(tmp_path, _with_rule(weight), held_out=rows(5), max_steps=1, eval_on_start=True, warmup_steps=5)
        t.train()
        found.append([r["eval_loss"] for r in log(t) if "eval_loss" in r])
    assert found[0] == found[1]
    assert len(found[0]) == 1


@pytest.mark.filterwarnings(TRL_ASKS_BY_AN_OLD_NAME)
@pytest.mark.usefixtures("diary")
def test_dpo_has_penalties_too(tmp_path: Path) -> None:
    curves = []
    for weight in (0.0, 5.0):
        t = dpo(tmp_path, _with_rule(weight), gradient_accumulation_steps=3, max_steps=1)
        t.train()
        curves.append(losses(t))
    assert curves[0] == curves[1]
    assert [r["penalty"] for r in log(t) if "penalty" in r] == [5.0]


# --- AdaLoRA, whose mask shows whatever goes wrong ------------------------------------------------------------------


class Ranks(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """What AdaLoRA's rule reports after each step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.seen: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(self.trainer.rule_report())


def _adalora(folder: Path, **words: Any) -> tuple[Any, list[dict[str, Any]]]:
    """20 steps; the budget falls after the second and stands after the twelfth."""
    model = adapted("adalora", target=2, start=2, final=8, targets=["all-linear", "lm_head"])
    callbacks = words.pop("callbacks", [])
    t = sft(folder, model, **({"max_steps": 20, "gradient_accumulation_steps": 1, "warmup_steps": 0} | words))
    ranks = Ranks()
    ranks.trainer = t
    for callback in (ranks, *callbacks):
        t.add_callback(callback)
    t.train()
    return t, ranks.seen


@MIXED
@MANY
def test_the_budget_falls_by_optimizer_steps(tmp_path: Path, many: int, bf16: bool) -> None:
    t, seen = _adalora(tmp_path, gradient_accumulation_steps=many, bf16=bf16, activation_checkpointing=bf16)
    rule = t.rules.rules[0]
    assert isinstance(rule, RankBudget)
    assert [s["rank_budget"] for s in seen] == [rule.budget(i, 20, [4] * 15) for i in range(1, 21)]
    assert seen[-1]["rank_budget"] == 2 * 15
    assert {s: layer.params["E"].shape[0] for s, layer in layers_of(t.model).items()} == seen[-1]["ranks"]
    assert [r["rank_budget"] for r in log(t) if "loss" in r] == [s["rank_budget"] for s in seen]


def test_activations_that_are_computed_again_change_no_rank(tmp_path: Path) -> None:
    (plain, one), (again, two) = (_adalora(tmp_path, activation_checkpointing=c) for c in (False, True))
    assert one == two
    assert losses(again) == pytest.approx(losses(plain), rel=1e-6)


def test_evaluations_between_the_steps_change_no_rank(tmp_path: Path) -> None:
    words = {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}
    (plain, one), (evaluated, two) = _adalora(tmp_path), _adalora(tmp_path, held_out=rows(5), **words)
    assert one == two
    assert losses(evaluated) == losses(plain)
    assert len([r for r in log(evaluated) if "eval_loss" in r]) == 8


@pytest.mark.parametrize("best_at", [4, 16])
def test_the_best_adapter_has_the_ranks_of_its_own_step(
    tmp_path: Path, best_at: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the tensors have shrunk, and after: the model holds what it held then."""

    class Worse(TrainerCallback):  # type: ignore[misc]
        """Ruins the adapter after the step that shall have been the best."""

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step >= best_at and state.global_step % 4 == 0:
                for layer in layers_of(model).values():
                    layer.params["E"].data.mul_(10.0)

    words = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    stop = EarlyStoppingCallback(early_stopping_patience=3)
    t, seen = _adalora(
        tmp_path, held_out=rows(5), learning_rate=2e-2, callbacks=[Worse(), stop], save_total_limit=1, **words, **best
    )
    found = {r["step"]: r["eval_loss"] for r in t.state.log_history if "eval_loss" in r}
    assert t.state.best_global_step == best_at == min(found, key=lambda step: found[step])
    assert t.state.global_step == min(best_at + 12, 20)
    ranks = {site: int((layer.params["E"] != 0).sum()) for site, layer in layers_of(t.model).items()}
    assert ranks == seen[best_at - 1]["ranks"]
    here, there = sum(seen[-1]["ranks"].values()), sum(ranks.values())
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("the best checkpoint")]
    text = f"the best checkpoint is that of step {best_at}, when there were {there} directions"
    assert told == ([f"{text}; the run has ended with {here}"] if there > here else [])
    assert bool(told) == (best_at == 4)  # later the choice stands
    assert t.evaluate()["eval_loss"] == pytest.approx(found[best_at], abs=1e-6)
    t.save_model(str(tmp_path / "result"))

    saved = lorary.load_adapter(tmp_path / "result")
    assert {p.site.name: p.delta.R for p in saved.sites} == ranks


# --- from a configuration -------------------------------------------------------------------------------------------


class Kill(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_tells_its_ranks_and_goes_on_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bf16, checkpointed activations, accumulation and the best adapter kept; killed after the last mask."""
    monkeypatch.chdir(tmp_path)
    words = configuration(base_folder(Path("small").absolute()), Path("data.jsonl"))
    words |= {"method": {"name": "adalora", "r": 4, "options": {"target": 2, "start": 1, "final": 3}}}
    training = {"max_steps": 8, "gradient_accumulation_steps": 3, "logging_steps": 1, "eval_steps": 3, "save_steps": 3}
    words = changed(words, "training", bf16=True, gradient_checkpointing=True, keep_best=True, **training)
    done = run(from_dict(words | {"output": "whole"}), quiet=True)
    lines = [record for record in done.history if "loss" in record]
    rule = RankBudget(2, 1, 3)
    assert [r["rank_budget"] for r in lines] == [rule.budget(step, 8, [4] * 14) for step in range(1, 9)]
    assert all(sum(r["ranks"].values()) == r["rank_budget"] for r in lines)
    saved = {p.site.name: p.delta.R for p in lorary.load_adapter(done.adapter).sites}
    best = json.loads(next(Path("whole/checkpoints").glob("*-8/trainer_state.json")).read_text())["best_global_step"]
    assert saved == lines[best - 1]["ranks"]
    picture = (done.folder / "plots" / "ranks.svg").read_text()
    assert picture == ranks_svg(saved, 4)
    status, _ = forked(lambda: bool(run(from_dict(words), quiet=True, callbacks=[Kill()])))
    assert os.WTERMSIG(status) == signal.SIGKILL
    again = run(from_dict(words), resume=True, quiet=True)

    def plain(history: Any) -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if not k.endswith(TIMES)} for record in history]

    assert plain(again.history) == plain(done.history)
    for name in ("plots/ranks.svg", "adapter/lorary.json"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()
