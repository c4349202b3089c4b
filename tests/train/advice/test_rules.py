"""The rules of advice, one at a time, on made-up facts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lorary.errors import ConfigError
from lorary.train.advice.draft import Draft, changed
from lorary.train.advice.facts import Facts
from lorary.train.advice.rates import batch_factor, lora_rate
from lorary.train.advice.rules import data_rules, method_rules, training_rules
from lorary.train.config.load import from_dict

EIGHT_BILLION = Facts(
    task="sft",
    family="llama",
    hidden=4096,
    parameters=8_030_261_248,
    context=131_072,
    scalable=True,
    dtype="bfloat16",
    computes="bfloat16",
    per_rank=1_310_720,
    weights=6_979_321_856,
    rows=20_000,
    unique=20_000,
    lengths=(400,) * 20_000,
    answers=6_000_000,
    plain=False,
)


def rows(count: int, length: int = 400, **changes: Any) -> Facts:
    """The facts with other rows, all different."""
    found = {"rows": count, "unique": count, "lengths": (length,) * count, "answers": 300 * count}
    return dataclasses.replace(EIGHT_BILLION, **(found | changes))


def draft(facts: Facts, **tree: Any) -> Draft:
    """All decisions that need no model."""
    config = from_dict({"model": "org/model", "data": "rows.jsonl"} | tree)
    made = Draft(config, changed(config, {"task": facts.task}))
    data_rules(made, facts)
    method_rules(made, facts)
    training_rules(made, facts)
    return made


def values(made: Draft) -> dict[str, Any]:
    return {one.key: one.chosen for one in made.recommendations}


def test_the_advice_for_an_ordinary_run() -> None:
    made = draft(EIGHT_BILLION)
    assert values(made) == {
        "data.max_length": 400,
        "data.validation_split": 0.05,
        "data.packing": False,
        "method.name": ("lora",),
        "method.targets": ("all-linear",),
        "method.r": 32,
        "method.alpha": 32.0,
        "training.epochs": 1.0,
        "training.batch_size": 8,
        "training.gradient_accumulation_steps": 2,
        "training.lr": 0.00029,
        "training.warmup": 0.03,
    }
    assert made.warnings == []
    assert all(one.reason and one.source for one in made.recommendations)


@pytest.mark.parametrize(
    ("family", "hidden", "rate"),
    [
        ("llama", 2048, 4.9e-4),
        ("llama", 8192, 1.66e-4),
        ("llama4_text", 4096, 2.86e-4),
        ("qwen3", 4096, 4.73e-4),
        ("qwen2", 896, 5.32e-4),
        ("gemma3_text", 2560, 3e-4),
        ("mistral", 4096, 3e-4),
        ("gpt2", 768, 3.69e-4),
        ("llama", 192, 3.11e-3),
    ],
)
def test_the_rate_of_a_family_and_size(family: str, hidden: int, rate: float) -> None:
    found = lora_rate(family, hidden, 8192, 1000)
    assert found.value == pytest.approx(rate, rel=5e-3)
    assert found.extrapolated == (hidden < 1000)


def test_the_rate_follows_the_tokens_of_a_step_and_short_runs() -> None:
    assert [batch_factor(n) for n in (64, 256, 65_536, 262_144)] == [0.5, 1.0, 1.0, 2.0]
    long, short = (lora_rate("llama", 4096, 128, steps) for steps in (100, 99))
    assert short.value == pytest.approx(1.5 * long.value)
    assert short.reason.endswith("x sqrt(128/256) for 128 tokens in the loss of a step; x 1.5 for fewer than 100 steps")


def test_rows_that_repeat_get_no_higher_rate_for_few_steps() -> None:
    long, short = (lora_rate("llama", 4096, 128, steps, repeats=True) for steps in (100, 99))
    assert short.value == long.value


def test_short_answers_are_a_small_batch() -> None:
    """16 answers of 4 tokens are a noisier gradient than 16 answers of 300."""
    long, short = (values(draft(rows(20_000, answers=20_000 * n)))["training.lr"] for n in (300, 4))
    assert short == pytest.approx(long / 2, rel=0.1)


@pytest.mark.parametrize(
    ("task", "method", "rate"),
    [
        ("sft", "lora", 2.9e-4),
        ("sft", "dora", 1.4e-4),
        ("sft", "full", 2.9e-5),
        ("dpo", "lora", 7.2e-6),
        ("classification", "lora", 2.9e-4),
    ],
)
def test_the_rate_of_another_task_and_method(task: str, method: str, rate: float) -> None:
    facts = rows(20_000, task=task, answers=0 if task == "classification" else 6_000_000)
    assert values(draft(facts, method=method, task=task))["training.lr"] == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize("name", ["ia3", "houlsby", "prefix-tuning", "prompt-tuning", "bitfit", "full"])
def test_a_method_with_places_of_its_own_gets_no_targets(name: str) -> None:
    assert "method.targets" not in values(draft(EIGHT_BILLION, method=name))
    assert "method.targets" in values(draft(EIGHT_BILLION, method="dora"))


def test_no_rate_is_above_that_of_a_configuration() -> None:
    """Prompt tuning's rate is 1,500 times LoRA's, and that of a small model is high."""
    made = draft(dataclasses.replace(EIGHT_BILLION, hidden=192), method="prompt-tuning")
    [rate] = [one for one in made.recommendations if one.key == "training.lr"]
    assert rate.value == 1.0
    assert rate.reason.endswith("; x 1.5e+03 for prompt-tuning; 1 is the highest rate of a configuration")


@pytest.mark.parametrize(("answers", "r"), [(1000, 32), (41_000_000, 32), (42_000_000, 64), (100_000_000, 128)])
def test_the_rank_grows_with_the_tokens_to_learn(answers: int, r: int) -> None:
    assert values(draft(rows(200_000, answers=answers)))["method.r"] == r


def test_fewer_numbers_than_tokens_are_a_warning() -> None:
    made = draft(rows(2_000_000, answers=400_000_000))
    assert values(made)["method.r"] == 128
    assert made.warnings == [
        "the adapter has 167,772,160 numbers for 400,000,000 tokens in the loss: "
        "it may learn less than full fine-tuning"
    ]
    assert (
        draft(rows(20_000), method={"r": 2}).warnings[0].startswith("the adapter has 2,621,440 numbers for 6,000,000")
    )


def test_the_rank_of_a_tiny_model_stays_low() -> None:
    found = draft(rows(500, hidden=32, per_rank=464, weights=7680)).recommendations
    (rank,) = (one for one in found if one.key == "method.r")
    assert (rank.value, rank.source) == (8, "the model")


@pytest.mark.parametrize(
    ("count", "epochs", "batch", "steps"),
    [(200_000, 1.0, 32, 5938), (20_000, 1.0, 16, 1188), (5_000, 2.0, 16, 594), (300, 3.0, 8, 102), (60, 3.0, 4, 42)],
)
def test_epochs_and_batch_by_the_rows(count: int, epochs: float, batch: int, steps: int) -> None:
    made = draft(rows(count), data={"train": "rows.jsonl", "validation": "held-out.jsonl"})
    found = values(made)
    assert found["training.epochs"] == epochs
    assert found["training.batch_size"] * found["training.gradient_accumulation_steps"] == batch
    few = [w for w in made.warnings if w == f"{steps} steps are few: fewer than 100 seldom reach the end of learning"]
    assert bool(few) == (steps < 100)


def test_repeated_rows_are_counted() -> None:
    made = draft(rows(1000, unique=250))
    assert "750 of 1,000 rows repeat another" in made.warnings
    assert any(w.startswith("every different row is seen 12.") for w in made.warnings)
    assert not any("is seen" in w for w in draft(rows(1000)).warnings)
    many = draft(rows(1000), training={"epochs": 6})
    assert any(w.startswith("every different row is seen 6.") for w in many.warnings)


def test_the_best_evaluation_is_kept_where_rows_are_seen_again() -> None:
    found = values(draft(rows(300)))
    assert (found["training.keep_best"], found["training.eval_steps"]) == (True, 9)  # 34 steps an epoch
    assert "training.keep_best" not in values(draft(rows(20_000)))
    assert "training.keep_best" not in values(draft(rows(1)))  # nothing is held out
    assert "training.keep_best" not in values(draft(rows(20_000), training={"max_steps": 50}))
    own = {"data": {"train": "rows.jsonl", "validation_split": 0.1}}
    assert "training.keep_best" not in values(draft(rows(300), training={"early_stopping_patience": 2}, **own))
    saved = values(draft(rows(300), training={"save_steps": 20}))
    assert saved["training.keep_best"] is True
    assert "training.eval_steps" not in saved
    unkept = draft(rows(300), training={"keep_best": False})
    assert "training.eval_steps" not in values(unkept)
    assert unkept.config.training.keep_best is False


def test_a_few_long_rows_do_not_decide_the_length() -> None:
    facts = dataclasses.replace(rows(1000), lengths=(400,) * 995 + (9000,) * 5)
    found = values(draft(facts))
    assert (found["data.max_length"], found["data.overlong"]) == (400, "drop")
    labelled = dataclasses.replace(facts, task="classification", answers=0)
    assert values(draft(labelled))["data.overlong"] == "truncate"


def test_plain_text_is_split() -> None:
    found = values(draft(rows(1000, 50_000, plain=True)))
    assert found["data.max_length"] == 2048
    assert "data.overlong" not in found
    assert values(draft(rows(1000, 50_000, plain=True, context=256)))["data.max_length"] == 256


def test_rows_beyond_the_context_want_longlora() -> None:
    made = draft(rows(1000, 3000, context=2048))
    found = values(made)
    assert (found["method.name"], found["method.options"]) == (("longlora",), {"length": 4096})
    assert found["data.max_length"] == 3000
    assert "method.targets" not in found
    half = dataclasses.replace(rows(1000, context=2048), lengths=(400, 3000) * 500)
    kept = values(draft(half, method="dora"))
    assert (kept["data.max_length"], kept["method.name"], kept["data.overlong"]) == (2048, ("dora",), "drop")
    few = dataclasses.replace(rows(1000, context=2048), lengths=(400,) * 992 + (3000,) * 8)
    assert values(draft(few))["method.name"] == ("lora",)


def test_longlora_is_not_advised_beyond_what_was_shown() -> None:
    mixed = dataclasses.replace(rows(1000, context=2048), lengths=(400,) * 900 + (60_000,) * 100)
    made = draft(mixed)
    found = values(made)
    assert (found["method.name"], found["data.max_length"], found["data.overlong"]) == (("lora",), 2048, "drop")
    (length,) = (one for one in made.recommendations if one.key == "data.max_length")
    assert length.reason.endswith("the model reads 2,048; LongLoRA has been shown up to 25 times as many")
    with pytest.raises(ConfigError, match="all 1,000 rows are longer than 2,048 tokens, and none is left to train on"):
        draft(rows(1000, 60_000, context=2048))
    kept = draft(rows(1000, 60_000, context=2048), data={"train": "rows.jsonl", "overlong": "truncate"})
    assert values(kept)["data.overlong"] == "truncate"


def test_packing_where_most_of_a_batch_would_be_padding() -> None:
    lengths = ((2000,) + (50,) * 7) * 3000
    facts = dataclasses.replace(rows(len(lengths)), lengths=lengths)
    made = draft(facts)
    assert values(made)["data.packing"] is True
    few = dataclasses.replace(rows(80), lengths=lengths[:80])
    assert values(draft(few))["data.packing"] is False


def test_what_is_set_is_kept_and_the_rest_follows() -> None:
    made = draft(rows(20_000), training={"batch_size": 2, "gradient_accumulation_steps": 2, "lr": 1e-5})
    given = {one.key: one for one in made.recommendations}
    assert given["training.lr"].given == 1e-5
    assert given["training.lr"].value == 2.9e-4  # 4 answers of 300 tokens are batch enough
    assert given["training.lr"].sentence.startswith("Yours; 0.00029 is advised. Llama, hidden size 4,096: 10 x 5e-5")
    assert made.config.training.lr == 1e-5
    micro = values(draft(rows(20_000), training={"batch_size": 2}))
    assert micro["training.gradient_accumulation_steps"] == 8
    limited = values(draft(rows(20_000), training={"max_steps": 50}))
    assert "training.epochs" not in limited
    assert limited["training.lr"] == pytest.approx(4.3e-4, rel=0.02)


def test_few_held_out_rows_are_a_warning() -> None:
    assert "only 5 rows can be held out: their loss is noisy" in draft(rows(50)).warnings
    assert "only 7 rows are held out: their loss is noisy" in draft(rows(50, held_out_lengths=(400,) * 7)).warnings
    assert "there is a single row: nothing can be held out" in draft(rows(1)).warnings
    few = draft(rows(70, 20_000, plain=True, held_out_lengths=(400,) * 7))
    assert "only 7 rows are held out: their loss is noisy" in few.warnings
    for texts in (rows(70, 20_000, plain=True, held_out_lengths=(20_000,) * 9), rows(20, 50_000, plain=True)):
        assert not any("held out" in w for w in draft(texts).warnings), "a text is split into many rows"
