"""What readers do with adapter folders: a table of verdicts, and PEFT and Transformers run to confirm theirs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorary
from lorary.adapters import export_peft
from lorary.adapters.export.engines import export_for_engine
from lorary.adapters.readers.check import READERS
from lorary.adapters.readers.features import FEATURES
from lorary.adapters.readers.peft import PEFT, TYPES
from lorary.adapters.readers.transformers import TRANSFORMERS
from tests import tiny
from tests.adapters.readers.cases import CASES, Case, logits, theirs
from tests.cli.command import Command

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of PEFT, about the folders that it reads anyway
]

# accepted, miscomputed, rejected: by PEFT, Transformers, vLLM, SGLang, llama.cpp, mlx-lm
TABLE = {
    "lora": "AAAAAR",
    "lora of GPT-2": "AAAMRR",
    "rslora": "AAAMMR",
    "dora": "AARRRR",
    "dora, exported": "AARRRR",
    "peft dora": "AMRRRR",
    "ranks": "AAARAR",
    "alphas": "AAAMMR",
    "pissa, saved": "RRRRRR",
    "pissa, exported": "AAAAAR",
    "melora, exported": "AAAAAR",
    "vera": "ARRRRR",
    "adalora": "AARRRR",
    "adalora, pruned": "ARRRRR",
    "longlora, exported": "MMMMMR",
    "convolutions": "AARRRR",
    "embeddings": "AAAAAR",
    "norms": "AARRMR",
    "mlx-lm": "RRRRRA",
    "peft lora": "AAAAAR",
    "peft, by pattern": "AAARAR",
    "peft, patterns": "AAARMR",
    "peft pissa": "AARMMR",
    "peft bias": "AARMRR",
    "peft lora_bias": "AARMRR",
    "peft lm_head saved": "AARMRR",
    "peft lm_head adapted": "AAAAAR",
    "peft tokens": "AARMRR",
    "peft alora": "AMRMAR",
    "peft layer range": "AAAAAR",
    "peft replication": "AARMRR",
    "peft q only": "AAARAR",
    "peft experts": "AAARRR",
    "peft whisper": "AAAMAR",
    "whisper as seq2seq": "RAAMAR",
    "peft loha": "AARRRR",
    "peft ia3": "AARRRR",
    "peft prompt tuning": "ARRRRR",
    "rank 64": "AARAAR",
    "unknown field": "MMMMMR",
    "wrong rank": "RRMRMR",
    "untargeted": "MMARAR",
    "excluded": "MMAAAR",
    "no alpha": "AARRRR",
    "no type": "RRARAR",
    "v_proj missing": "MMARAR",
    "task of another class": "AAAAAR",
    "deepseek by suffix": "MMMARR",
    "qwen3-next by suffix": "MMAAAR",
    "deepseek": "AAMRRR",
    "mixtral": "AAAAAR",
    "mixtral's experts": "AAARRR",
}
_LETTERS = {"A": "accepted", "M": "miscomputed", "R": "rejected"}


def by_peft(case: Case, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(case.base(), str(folder))


def by_transformers(case: Case, folder: Path) -> Any:
    model: Any = case.base()
    model.load_adapter(str(folder))
    return model


RUN: dict[str, Callable[[Case, Path], Any]] = {"peft": by_peft, "transformers": by_transformers}
RELEASES = {"peft": {"peft": "0.21.2"}, "transformers": {"peft": "0.21.2", "transformers": "5.23.0"}}


def shown_by_running(reader: str, case: Case, folder: Path) -> str:
    """What the installed release does with a folder."""
    try:
        found = logits(RUN[reader](case, folder), case.inputs)
    except Exception:
        return "rejected"
    same = torch.allclose(found, case.logits, rtol=0, atol=1e-5 * float(case.logits.abs().max()))
    return "accepted" if same else "miscomputed"


def test_every_case_has_its_row() -> None:
    assert list(TABLE) == list(CASES)
    assert list(READERS) == ["peft", "transformers", "vllm", "sglang", "llama.cpp", "mlx"]
    assert len(TABLE) * len(READERS) >= 40


@pytest.mark.parametrize("name", CASES)
def test_the_verdicts_are_those_of_the_table_and_of_running(name: str, tmp_path: Path) -> None:
    case = CASES[name](tmp_path / "a")
    verdicts = lorary.check(tmp_path / "a", model=case.base())
    assert {v.reader: str(v.outcome) for v in verdicts} == {
        reader: _LETTERS[letter] for reader, letter in zip(READERS, TABLE[name], strict=True)
    }
    assert all(bool(v.reasons) != v.accepted and v.release.strip() for v in verdicts)
    if name == "unknown field":  # nobody can tell what it would have changed
        return
    for verdict in verdicts[:2]:
        ran = shown_by_running(verdict.reader, case, tmp_path / "a")
        other = {k: v for k, v in RELEASES[verdict.reader].items() if metadata.version(k) != v}
        if ran != verdict.outcome and other:
            pytest.skip(f"the rules are those of {RELEASES[verdict.reader]}; this release does otherwise: {other}")
        assert ran == verdict.outcome, verdict


def test_the_releases_of_the_table_are_those_that_the_readers_state() -> None:
    assert PEFT.release == f"PEFT {RELEASES['peft']['peft']}"
    assert TRANSFORMERS.release == "Transformers {transformers} with PEFT {peft}".format(**RELEASES["transformers"])


def test_the_types_are_those_of_peft() -> None:
    from peft import PeftType

    if metadata.version("peft") == RELEASES["peft"]["peft"]:
        assert {kind.value for kind in PeftType} == TYPES


def test_every_rule_names_a_feature() -> None:
    for reader in READERS.values():
        assert reader.refuses | reader.ignores <= set(FEATURES)
        assert not reader.refuses & reader.ignores


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("rslora", "sglang"),
        ("alphas", "sglang"),
        ("ranks", "sglang"),
        ("pissa, saved", "sglang"),
        ("pissa, saved", "vllm"),
        ("pissa, saved", "peft"),
        ("peft dora", "transformers"),
        ("adalora, pruned", "transformers"),
        ("vera", "transformers"),
    ],
)
def test_what_is_to_be_exported_instead_is_accepted(name: str, reader: str, tmp_path: Path) -> None:
    case = CASES[name](tmp_path / "a")
    (verdict,) = lorary.check(tmp_path / "a", reader, model=case.base())
    (fix,) = {reason.fix for reason in verdict.reasons}
    adapter, to = lorary.load_adapter(tmp_path / "a", model=case.base()), fix.rpartition(" ")[2]
    if to == "peft":
        export_peft(adapter, tmp_path / "b", model=case.base())
    else:
        export_for_engine(adapter, tmp_path / "b", to, model=case.base(), base="org/base")
    assert [v.reasons for v in lorary.check(tmp_path / "b", reader, model=case.base())] == [()]


# --- the engines' rules -----------------------------------------------------------------------------------------------


def folder(path: Path, names: tuple[str, ...] = ("q_proj", "v_proj"), **fields: Any) -> Path:
    """A PEFT folder made by hand: rank 2 at some layers of one block."""
    path.mkdir()
    tensors = {
        f"base_model.model.model.layers.0.self_attn.{name}.lora_{role}.weight": torch.ones(shape)
        for name in names
        for role, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(names)} | fields
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def outcome(path: Path) -> str:
    """By vLLM, SGLang, llama.cpp."""
    found = lorary.check(path, "vllm", "sglang", "llama.cpp")
    return "".join(str(verdict.outcome)[0].upper() for verdict in found)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "AAA"),
        ({"use_qalora": True}, "RMM"),
        ({"use_bdlora": {"nblocks": 2}}, "RMM"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "RMR"),
        ({"alora_invocation_tokens": [1, 2]}, "RMA"),
        ({"init_lora_weights": "olora"}, "RMM"),
        ({"init_lora_weights": "PISSA_niter_4"}, "RMM"),
        ({"init_lora_weights": "gaussian"}, "AAA"),
        ({"init_lora_weights": "lora_ga"}, "AAA"),
        ({"bias": "lora_only"}, "RAA"),
        ({"lora_bias": True}, "RMR"),
        ({"arrow_config": {"k": 1}}, "MMM"),
        ({"kasa_config": {"beta": 1}}, "MMM"),
        ({"target_modules": "all-linear"}, "AAA"),
        ({"target_modules": "q_proj|v_proj"}, "ARA"),
        ({"use_rslora": True}, "AMM"),
        ({"use_rslora": True, "alpha_pattern": {"q_proj": 4}}, "AMM"),
        ({"rank_pattern": {"v_proj": 2}}, "AAA"),
        ({"alpha_pattern": {"v_proj": 8}}, "AMM"),
        ({"alpha_pattern": {"proj": 8}}, "AAA"),  # no end of a path by whole components
        ({"r": 32, "rank_pattern": {"q_proj|v_proj": 2}}, "RRA"),
        ({"target_modules": ["o_proj"]}, "ARA"),
        ({"target_modules": ["self_attn.q_proj", "k_proj"]}, "AAA"),  # one fused layer for SGLang
        ({"target_parameters": ["q_proj.weight"], "alpha_pattern": {r"q_proj\.weight": 8}}, "MMM"),
        ({"new_in_the_year_2030": 0.5}, "MMM"),
        ({"new_in_the_year_2030": None}, "AAA"),
        ({"peft_type": "OFT", "r": 0}, "RRR"),  # fields of other types have other rules
        ({"peft_type": "ADALORA", "rank_pattern": {"q_proj.lora_E": [True, False]}}, "RRR"),
    ],
    ids=str,
)
def test_a_field_is_refused_or_left_out(fields: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert outcome(folder(tmp_path / "a", **fields)) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("q_proj", "k_proj", "v_proj"), "AAA"),
        (("q_proj",), "ARA"),
        (("k_proj", "q_proj"), "ARA"),
        (("v_proj",), "ARA"),
        (("up_proj",), "ARA"),
        (("gate_proj",), "AAA"),
        (("kv_b_proj",), "MAR"),
        (("o_proj",), "AAA"),
    ],
    ids=str,
)
def test_engines_fuse_and_absorb_layers(names: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    assert outcome(folder(tmp_path / "a", names)) == expected


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ("model.embed_tokens.base_layer.weight", "AAA"),  # the base's own table, which PEFT saves too
        ("model.layers.0.input_layernorm.weight", "RAM"),
        ("model.layers.0.self_attn.q_proj.base_layer.bias", "RMR"),
        ("score.weight", "AAR"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", "RMR"),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", "RRR"),
    ],
)
def test_a_tensor_is_refused_or_left_out(tensor: str, expected: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "a") / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.{tensor}": torch.ones(4)}, path)
    assert outcome(tmp_path / "a") == expected


def test_llama_cpp_s_converter_turns_the_factors_of_gpt_2(tmp_path: Path) -> None:
    assert outcome(folder(tmp_path / "a", ("c_proj",), fan_in_fan_out=True)) == "AAM"  # square: it fits all the same
    assert outcome(folder(tmp_path / "b", ("c_proj",), fan_in_fan_out=False)) == "AAA"
    path = folder(tmp_path / "c", ("c_attn",), fan_in_fan_out=True) / "adapter_model.safetensors"
    save_file({name: t if "lora_A" in name else torch.ones(12, 2) for name, t in load_file(path).items()}, path)
    assert outcome(tmp_path / "c") == "AAR"


def test_sglang_has_one_place_for_a_number_and_none_outside_of_layers(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", ("o_proj",)) / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {k.replace("model.layers", "tower.layers"): t.clone() for k, t in tensors.items()}, path)
    assert outcome(tmp_path / "a") == "AMA"
    save_file({k.replace("layers.0", "h.0"): t for k, t in tensors.items()}, path)
    assert outcome(tmp_path / "a") == "AMA"


def test_added_tokens_and_the_scaling_of_positions_are_seen(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    (path / "added_tokens.json").write_text("{}")
    assert outcome(path) == "ARA"
    (path / "BASE.md").write_text("load it so")
    assert outcome(path) == "MRM"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "A"),
        ({"fine_tune_type": "dora"}, "A"),
        ({"fine_tune_type": "loha"}, "R"),
        ({"num_layers": None}, "R"),
        ({"lora_parameters": None}, "R"),
        ({"lora_parameters": {"rank": 2, "alpha": 4.0, "dropout": 0.0}}, "R"),
        ({"lora_parameters": {"rank": 4, "scale": 4.0, "dropout": 0.0}}, "R"),
    ],
    ids=str,
)
def test_mlx_reads_its_own_form(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    save_file({"q_proj.lora_a": torch.ones(4, 2), "q_proj.lora_b": torch.ones(2, 4)}, tmp_path / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (verdict,) = lorary.check(tmp_path, "mlx")
    assert str(verdict.outcome)[0].upper() == expected


# --- sentences and values ---------------------------------------------------------------------------------------------


def test_a_verdict_says_where_what_and_what_to_export(tmp_path: Path) -> None:
    (verdict,) = lorary.check(folder(tmp_path / "a", use_rslora=True), "sglang")
    assert verdict.to_dict() == {
        "reader": "sglang",
        "release": "SGLang 0.5.23",
        "outcome": "miscomputed",
        "reasons": [
            {
                "where": "model.layers.0.self_attn.q_proj and 1 more",
                "what": "SGLang computes with the scale 2, and its own is 2.828",
                "fix": "lorary export ADAPTER OUT --to sglang",
            }
        ],
    }


def test_an_adapter_is_checked_as_it_would_be_saved() -> None:
    model = tiny.trained(tiny.llama(), lorary.method("pissa", r=2))
    found = lorary.check(lorary.Adapter.of(model), "peft", "llama.cpp")
    assert [str(v.outcome) for v in found] == ["rejected", "rejected"]
    assert [(r.where, r.what, r.fix) for v in found for r in v.reasons] == [
        ("lorary.json", "is lorary's own form, which PEFT does not read", "lorary export ADAPTER OUT --to peft"),
        ("lorary.json", "is lorary's own form, which llama.cpp does not read", "lorary export ADAPTER OUT --to gguf"),
    ]


def test_no_export_is_advised_that_cannot_hold_the_adapter() -> None:
    """Houlsby's networks are in no other program; a prefix behind a network becomes one of PEFT's, and no LoRA."""
    model = tiny.trained(tiny.llama(), lorary.method("houlsby", m=2))
    found = lorary.check(lorary.Adapter.of(model))
    why = "transforms the layer's output by a non-linear network, which no weight and bias can"
    fix = f"no export helps: Bottleneck {why}"
    assert [(str(v.outcome), r.fix) for v in found for r in v.reasons] == [("rejected", fix)] * len(found)
    model = tiny.llama()
    lorary.attach(model, lorary.plan(model, lorary.method("prefix-tuning", tokens=2, mlp=4)))
    found = lorary.check(lorary.Adapter.of(model), "peft", "vllm")
    assert [r.fix for v in found for r in v.reasons] == [
        "lorary export ADAPTER OUT --to peft",
        "no export helps: Prefix stands before the text, which no weight and bias can",
    ]


# --- bad input --------------------------------------------------------------------------------------------------------


def damaged(path: Path, file: str, text: str | bytes) -> Path:
    (folder(path) / file).write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def reshaped(path: Path, shape: tuple[int, ...]) -> Path:
    file = folder(path) / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {next(name for name in tensors if "q_proj.lora_A" in name): torch.zeros(shape)}, file)
    return path


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda p: p / "a", "there is no such folder"),
    "a file": (lambda p: folder(p / "a") / "adapter_config.json", "it is a file, and an adapter is a folder"),
    "an empty folder": (lambda p: p, "it holds neither lorary.json nor adapter_config.json"),
    "no path": (lambda p: 3, "folder: is a int, not a path"),
    "a null character": (lambda p: f"{p}\0a", "the path cannot be followed: it holds a null character"),
    "no JSON": (lambda p: damaged(p / "a", "adapter_config.json", "{"), "adapter_config.json: not JSON: "),
    "a list": (
        lambda p: damaged(p / "a", "adapter_config.json", "[1]"),
        "adapter_config.json: is [1], not a JSON object",
    ),
    "a key twice": (
        lambda p: damaged(p / "a", "adapter_config.json", '{"r": 1, "r": 2}'),
        "adapter_config.json: the key 'r' appears twice",
    ),
    "NaN": (
        lambda p: damaged(p / "a", "adapter_config.json", '{"lora_alpha": NaN}'),
        "adapter_config.json: NaN is not a JSON number",
    ),
    "infinity": (
        lambda p: damaged(p / "a", "adapter_config.json", '{"lora_alpha": 1e999}'),
        "adapter_config.json: the number '1e999' is too large for a float",
    ),
    "a rank of text": (
        lambda p: folder(p / "a", r="8"),
        "adapter_config.json: r: is '8'; it takes a whole number from 1 to 65,536",
    ),
    "a negative rank": (
        lambda p: folder(p / "a", rank_pattern={"q_proj": -1}),
        "adapter_config.json: rank_pattern: 'q_proj': is -1; it takes a whole number from 1 to 65,536",
    ),
    "an alpha of text": (
        lambda p: folder(p / "a", lora_alpha=True),
        "adapter_config.json: lora_alpha: is true; it takes a number",
    ),
    "a bad pattern": (
        lambda p: folder(p / "a", alpha_pattern={"(": 1}),
        "adapter_config.json: alpha_pattern: '(': not a regular expression: ",
    ),
    "an endless pattern": (
        lambda p: folder(p / "a", alpha_pattern={r"(?:.|..|...|....)*[!?]": 1}),
        "adapter_config.json: its patterns take too much time to match",
    ),
    "a pickle": (
        lambda p: [(folder(p / "a") / "adapter_model.safetensors").rename(p / "a" / "adapter_model.bin"), p / "a"][1],
        "adapter_model.bin: is a pickle, which can run code when it is read; it was not opened",
    ),
    "half a file": (
        lambda p: damaged(
            p / "a", "adapter_model.safetensors", (folder(p / "b") / "adapter_model.safetensors").read_bytes()[:-9]
        ),
        "adapter_model.safetensors: ",
    ),
    "no tensors": (
        lambda p: [(folder(p / "a") / "adapter_model.safetensors").unlink(), p / "a"][1],
        "adapter_model.safetensors: is missing",
    ),
    "a factor of rank 0": (
        lambda p: reshaped(p / "a", (0, 4)),
        "model.layers.0.self_attn.q_proj.lora_A.weight: [0, 4] is the shape of no factor",
    ),
    "a factor without dimensions": (lambda p: reshaped(p / "a", ()), "lora_A.weight: [] is the shape of no factor"),
    "a link out of it": (
        lambda p: [
            (folder(p / "a") / "adapter_model.safetensors").rename(p / "t"),
            os.symlink(p / "t", p / "a" / "adapter_model.safetensors"),
            p / "a",
        ][2],
        "adapter_model.safetensors: is a link that leaves the folder",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_or_hostile_folder_is_refused(name: str, tmp_path: Path) -> None:
    make, sentence = BAD[name]
    path = make(tmp_path)
    with pytest.raises(lorary.FileError) as caught:
        lorary.check(path)
    assert sentence in str(caught.value)
    assert len(caught.value.problems) == 1


def test_an_unknown_reader_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(lorary.ConfigError) as caught:
        lorary.check(folder(tmp_path / "a"), "vlm", "lorax", model=3)  # type: ignore[arg-type]
    assert [(p.where, p.what, p.fix) for p in caught.value.problems] == [
        ("model", "is a int, not a torch.nn.Module", ""),
        ("vlm", "is not a reader that lorary knows", "did you mean `vllm`?"),
        ("lorax", "is not a reader that lorary knows", "known: llama.cpp, mlx, peft, sglang, transformers, vllm"),
    ]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(monkeypatch, capsys)


def test_the_command_shows_the_verdicts_and_exits_with_one_unless_all_accept(command: Command) -> None:
    folder(Path("a"), alpha_pattern={"v_proj": 8})
    ran = command("check", "a", "--for", "vllm")
    assert ran.code == 0
    assert "vllm" in ran.out
    assert "accepted" in ran.out
    assert ran.err == "note: without --base the sites are not compared with the base's modules\n"
    ran = command("check", "a", "--for", "vllm,sglang", "--json")
    assert ran.code == 1
    assert [entry["outcome"] for entry in json.loads(ran.out)] == ["accepted", "miscomputed"]
    assert command("check", "a", "--for", "word").code == 2
    assert command("check", "b").code == 4


def test_the_command_compares_with_the_base(command: Command) -> None:
    model = tiny.llama()
    model.save_pretrained("base")
    theirs(target_modules=["q_proj"])(Path("a"))
    assert command("check", "a", "--for", "peft", "--base", "base")[::2] == (0, "")
    config = json.loads(Path("a/adapter_config.json").read_text()) | {"target_modules": ["k_proj"]}
    config["base_model_name_or_path"] = "base"
    Path("a/adapter_config.json").write_text(json.dumps(config))
    ran = command("check", "a", "--for", "peft")
    assert ran.code == 1
    assert "model.layers.0.self_attn.q_proj and 1 more: the configuration does not name it" in ran.out
    assert "model.layers.0.self_attn.k_proj and 1 more: the configuration names it, and the folder has no" in ran.out
