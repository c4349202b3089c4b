"""Valid configurations: reading, translation, defaults and writing; the template and the schema."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from lorary.errors import ConfigError
from lorary.train.config._aliases import CANONICAL, CANONICAL_AT_TOP, PRESET_OF
from lorary.train.config.config import SECTIONS, Config, default_lr
from lorary.train.config.load import from_dict, load
from lorary.train.config.template import json_schema, template
from lorary.train.config.yaml_source import dump, parse

LEAST = {"model": "builtin:base", "data": "builtin:docstrings"}


def read(text: str, *sets: str, folder: Path) -> Config:
    (folder / "train.yaml").write_text(text)
    return load(folder / "train.yaml", sets)


def field(config: Config, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_the_defaults_are_those_of_the_evidence() -> None:
    config = from_dict(LEAST).resolve()
    method = {"name": ("lora",), "r": 16, "alpha": 32.0, "dropout": 0.0, "targets": ("all-linear",)}
    training = {
        "lr": 2e-4,
        "schedule": "cosine",
        "warmup": 0.03,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "epochs": 3.0,
    }
    assert {key: getattr(config.method, key) for key in method} == method
    assert {key: getattr(config.training, key) for key in training} == training
    assert config.training.batch_size * config.training.gradient_accumulation_steps == 16
    assert config.notes == ("training.lr: 0.0002, the default of sft with lora",)


def test_dpo_starts_lower_and_has_a_beta() -> None:
    training = from_dict(LEAST | {"task": "dpo"}).resolve().training
    assert (training.lr, training.dpo_beta) == (5e-6, 0.1)
    assert from_dict(LEAST).resolve().training.dpo_beta is None


@pytest.mark.parametrize(
    ("task", "methods", "lr"),
    [
        ("sft", ("lora",), 2e-4),
        ("sft", ("lora", "rslora"), 2e-4),
        ("sft", ("lora+",), 1e-4),
        ("sft", ("loraplus", "rslora"), 1e-4),
        ("sft", ("lora-fa",), 4e-4),
        ("sft", ("full",), 2e-5),
        ("sft", ("bitfit",), 1e-3),
        ("sft", ("lora", "bitfit"), 2e-4),
        ("dpo", ("full",), 5e-7),
        ("dpo", ("lora-fa",), 1e-5),
    ],
)
def test_a_method_brings_its_learning_rate(task: str, methods: tuple[str, ...], lr: float) -> None:
    assert default_lr(task, methods) == pytest.approx(lr, rel=1e-12)
    assert from_dict(LEAST | {"task": task, "method": list(methods)}).resolve().training.lr == default_lr(task, methods)


def test_a_method_without_adapters_has_no_rank() -> None:
    method = from_dict(LEAST | {"method": "bitfit"}).resolve().method
    assert (method.r, method.alpha, method.dropout) == (None, None, None)
    assert method.build().delta is None


def test_the_method_section_builds_the_method() -> None:
    section = from_dict(LEAST | {"method": {"name": "lora,lora+", "r": 8, "alpha": 4, "ratio": 4}}).method
    built = section.build()
    assert (built.delta.r, built.scale(8), dict(built.lr)) == (8, 0.5, {"B": 4})  # type: ignore[union-attr, misc]
    assert section.options == {"ratio": 4}


def test_numbers_are_read_in_every_usual_notation(tmp_path: Path) -> None:
    text = dump(LEAST) + "training: {lr: 2e-4, warmup: .1, epochs: 2, gradient_checkpointing: yes}\n"
    training = read(text, folder=tmp_path).training
    assert (training.lr, training.warmup, training.epochs, training.gradient_checkpointing) == (2e-4, 0.1, 2.0, True)
    assert from_dict(LEAST | {"training": {"lr": "2e-4"}}).training.lr == 2e-4


def test_names_may_be_separated_by_commas() -> None:
    config = from_dict(LEAST | {"method": "lora, rslora", "target_modules": "c_attn[q,v], mlp"})
    assert config.method.name == ("lora", "rslora")
    assert config.method.targets == ("c_attn[q,v]", "mlp")


def test_every_familiar_name_is_understood_and_noted() -> None:
    values = {
        "model.id": "builtin:base", "model.revision": "main", "model.dtype": "float32", "method.r": 3,
        "method.alpha": 5.0, "method.dropout": 0.25, "method.targets": ("q_proj",), "method.exclude": ("lm_head",),
        "method.train_in_full": ("embed_tokens",),
        "data.train": ("a.jsonl",),
        "data.validation": ("b.jsonl",), "data.validation_split": 0.5, "data.subset": "main", "data.max_length": 64,
        "data.packing": True, "data.overlong": "drop", "data.chat_template": "builtin:chatml", "training.epochs": 2.0,
        "training.batch_size": 7, "training.eval_batch_size": 9, "training.gradient_accumulation_steps": 3,
        "training.lr": 0.125, "training.schedule": "linear", "training.warmup": 0.5, "training.optimizer": "sgd",
        "training.max_grad_norm": 0.75, "output": "elsewhere", "task": "dpo", "method.layers": "0-3",
        "method.ranks": {"q_proj": 3}, "method.alphas": {"q_proj": 3.0}, "training.label_smoothing": 0.5,
        "training.schedule_options": {"num_cycles": 1}, "training.seed": 8,
    }  # fmt: skip
    for alias, key in CANONICAL.items():
        if key in ("data.loss", "training.dpo_beta", "training.keep_best"):
            continue
        value = values[key]
        flat = {"model": LEAST["model"], "data": LEAST["data"]} | {
            alias: list(value) if isinstance(value, tuple) else value
        }
        if key in ("model.id", "data.train"):
            del flat[key.partition(".")[0]]
        config = from_dict(flat)
        assert field(config, key) == value, alias
        assert config.notes == (f"`{alias}` is read as `{key}`",)


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"completion_only_loss": False}, "data.loss", "all"),
        ({"assistant_only_loss": True}, "data.loss", "completion"),
        ({"train_on_inputs": False}, "data.loss", "completion"),
        ({"train_on_input": True}, "data.loss", "all"),
        ({"lora_target": "all"}, "method.targets", ("all-linear",)),
        ({"lr_scheduler_type": "constant_with_warmup"}, "training.schedule", "constant"),
        ({"excess_length_strategy": "raise"}, "data.overlong", "error"),
        ({"warmup_steps": 20}, "training.warmup", 20.0),
        ({"seed": 7}, "training.seed", 7),
        ({"use_rslora": True}, "method.name", ("lora", "rslora")),
        ({"use_rslora": False}, "method.name", ("lora",)),
        ({"method": "lora+", "use_rslora": True}, "method.name", ("lora+", "rslora")),
        ({"bf16": True}, "training.bf16", True),
        ({"load_best_model_at_end": True, "val_set_size": 0.2}, "training.keep_best", True),
        ({"beta": 0.5, "task": "dpo"}, "training.dpo_beta", 0.5),
    ],
)
def test_familiar_values_are_translated(given: dict[str, object], key: str, value: object) -> None:
    assert field(from_dict(LEAST | given), key) == value


def test_an_unknown_preset_of_a_switch_is_reported_at_the_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESET_OF, "use_qdora", "qdora")
    with pytest.raises(ConfigError, match=r"train\.yaml:3:1: `qdora` is not a method that lorary knows"):
        read(dump(LEAST) + "use_qdora: true\n", folder=tmp_path)


def test_overrides_win_in_their_order(tmp_path: Path) -> None:
    text = dump(LEAST) + "learning_rate: 1e-3\nmethod: {name: lora+, ratio: 4, ranks: {'*.q_proj': 4}}\n"
    sets = (
        "training.lr=1e-4",
        "training.lr=3e-4",
        "method.ranks={'*.k_proj': 2}",
        "use_rslora=true",
        "data.train=[a.jsonl]",
    )
    config = read(text, *sets, folder=tmp_path)
    assert config.training.lr == 3e-4
    assert config.method.ranks == {"*.k_proj": 2}  # a mapping is replaced whole
    assert config.method.name == ("lora+", "rslora")  # on top of the file's own
    assert config.method.options == {"ratio": 4}
    assert config.data.train == ("a.jsonl",)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("method.exclude=*.1.*", "method.exclude", ("*.1.*",)),
        ("method.exclude=['*.1.*', lm_head]", "method.exclude", ("*.1.*", "lm_head")),
        ("data.train=my data: a #1.jsonl", "data.train", ("my data: a #1.jsonl",)),
        ("output='5'", "output", "5"),
        ("training.lr=", "training.lr", None),
        ("method.ranks={}", "method.ranks", {}),
        ("training.lr = 3e-4", "training.lr", 3e-4),
    ],
)
def test_an_overrides_value_needs_no_quotes(text: str, key: str, value: object) -> None:
    assert field(from_dict(LEAST, [text]), key) == value


def test_a_mistake_in_the_file_can_be_overridden_away(tmp_path: Path) -> None:
    assert read(dump(LEAST) + "method: {r: 0}\n", "method.r=4", folder=tmp_path).method.r == 4


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"method": {"name": ["lora+", "rslora"], "ratio": 4.0, "ranks": {"*.q_proj": 4}, "alphas": {"*.q_proj": 0.5}}},
        {"method": "full", "training": {"max_steps": 7, "lr": 1e-8, "report_to": "tensorboard,wandb"}},
        {"task": "dpo", "output": "1e5"},
        {"model": {"id": "a/b", "revision": "010"}, "output": "no"},
        {"data": {"train": ["a.jsonl", "b#test"], "columns": {"prompt": "Frage?"}, "subset": "~"}},
    ],
    ids=str,
)
def test_a_resolved_configuration_reads_back_equal(extra: dict[str, object], tmp_path: Path) -> None:
    config = from_dict(LEAST | extra).resolve()
    again = read(config.to_yaml(), folder=tmp_path)
    assert again == config
    assert again.resolve() == config
    assert yaml.safe_load(config.to_yaml()) == json.loads(config.model_dump_json())  # any YAML reader agrees


def test_what_was_translated_is_written_above_the_resolved_configuration() -> None:
    text = from_dict(LEAST | {"lora_r": 8}).resolve().to_yaml()
    assert text.splitlines()[:2] == [
        "# `lora_r` is read as `method.r`",
        "# training.lr: 0.0002, the default of sft with lora",
    ]


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert from_dict(LEAST | {"output": "~/runs"}).resolve().output == "/home/someone/runs"


def test_the_package_offers_the_configuration_and_its_readers() -> None:
    from lorary.train import config

    assert (config.Config, config.load, config.from_dict) == (Config, load, from_dict)


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError):
        from_dict(LEAST).training.lr = 1.0  # type: ignore[misc]


# --- YAML -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("on", "on"), ("true", True), ("NULL", None), ("~", None), ("", None), ("08", "08"), ("-3", -3),
        ("1_000", "1_000"), ("12:30", "12:30"), ("1e3", 1000.0), ("+.5", 0.5), ("5.", 5.0), ("-.inf", -math.inf),
        ("'1'", "1"), ("0x10", "0x10"), ("1e", "1e"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert parse(f"a: {text}", "t").tree == {"a": value}


def test_every_key_knows_its_line_and_column() -> None:
    source = parse("a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\n", "t.yaml")
    marks = {".".join(map(str, place)): where for place, where in source.marks.items()}
    assert marks == {
        "": "t.yaml:1:1", "a": "t.yaml:1:1", "a.b": "t.yaml:2:3", "a.c": "t.yaml:3:3", "a.c.0": "t.yaml:4:7",
        "a.c.1": "t.yaml:5:7", "a.c.1.d": "t.yaml:5:8",
    }  # fmt: skip
    assert source.where(("a", "nothing", "there")) == "t.yaml:1:1"


def test_anchors_that_only_repeat_are_followed() -> None:
    assert parse("a: &x [1, 2]\nb: *x\n", "t").tree == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("value", ["010", "2e-4", "no", "null", "~", "1e5", "a: b", "# x", "ü", "", " x ", "-"])
def test_text_stays_text(value: str) -> None:
    assert parse(dump({"a": value}), "t").tree == {"a": value}


# --- the template and the schema --------------------------------------------------------------------------------


def test_the_template_is_a_configuration(tmp_path: Path) -> None:
    start = {"train": LEAST["data"], "validation": LEAST["data"]}
    assert read(template(), folder=tmp_path) == from_dict({"model": LEAST["model"], "data": start})


def test_the_template_holds_every_key_with_its_default(tmp_path: Path) -> None:
    keys = {key for section in SECTIONS.values() for key in section}
    lines = [
        line.replace("# ", "", 1) if line.strip(" #").partition(":")[0] in keys else line
        for line in template().split("\n")
    ]
    config = read("\n".join(line for line in lines if not line.strip().startswith("#")), folder=tmp_path)
    written = {line.strip(" #").partition(":")[0] for line in template().split("\n")}
    assert keys <= written
    assert (
        config.resolve()
        == from_dict({"model": LEAST["model"], "data": {"train": LEAST["data"], "validation": LEAST["data"]}}).resolve()
    )


def test_every_field_is_explained() -> None:
    for section, fields in SECTIONS.items():
        for key, info in fields.items():
            assert key in SECTIONS or (info.description and len(info.description) <= 100), (section, key)


def test_the_schema_knows_every_key_and_every_familiar_name() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert set(SECTIONS[""]) <= set(schema["properties"])
    assert set(CANONICAL_AT_TOP) <= set(schema["properties"])
    for name, keys in SECTIONS.items():
        if name:
            properties = schema["$defs"][f"{name.capitalize()}Section"]["properties"]
            own = {alias for alias, key in CANONICAL.items() if key.startswith(f"{name}.")}
            assert set(keys) | own <= set(properties)
    assert schema["additionalProperties"] is False
    rank = schema["$defs"]["MethodSection"]["properties"]["r"]["anyOf"][0]
    assert (rank["minimum"], rank["maximum"]) == (1, 65536)
    rate = schema["$defs"]["TrainingSection"]["properties"]["lr"]["anyOf"][0]
    assert (rate["exclusiveMinimum"], rate["maximum"]) == (0, 1)
    assert "ratio" in schema["$defs"]["MethodSection"]["properties"]


@pytest.mark.parametrize("name", ["vera", "glora"])
def test_a_scale_without_alpha_gets_no_default(name: str) -> None:
    config = from_dict(LEAST | {"method": {"name": name}}).resolve()
    assert config.method.alpha is None
    assert config.method.r == config.method.build().delta.r
