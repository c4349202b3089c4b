"""The model card of an adapter: the Hub's metadata, the method, what it was made from, and code that runs."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import lorary
from lorary import builtin
from lorary.adapters.card import adapter_card, write_card
from lorary.adapters.content_hash import content_hash
from lorary.adapters.label_names import write_label_names
from lorary.adapters.provenance import Parent, Provenance
from tests import tiny

HOSTILE = "a|b`c\n## Injected\x1b[31m"


def saved(folder: Path, *names: str, kind: str = "LlamaForCausalLM", base: str = "", **changed: Any) -> lorary.Adapter:
    """A saved adapter of a tiny model whose base has a name."""
    model = tiny.seeded(kind)
    model.config.name_or_path = base
    options: dict[str, Any] = {} if "bitfit" in names else {"r": 2}
    lorary.attach(model, lorary.plan(model, lorary.method(*names or ("lora",), **options), "attention"))
    value = dataclasses.replace(lorary.Adapter.of(tiny.shaken(model)), **changed)
    lorary.save_adapter(value, folder, model=model)
    return value


def card(folder: Path, value: lorary.Adapter, **options: Any) -> tuple[dict[str, Any], str]:
    """(the metadata, the text) of a card."""
    found = ModelCard(adapter_card(folder, value, **options))
    return found.data.to_dict(), found.text


def test_the_hub_finds_the_base_and_the_method(tmp_path: Path) -> None:
    value = saved(tmp_path / "mine", "dora", "rslora", base="org/base")
    data, text = card(tmp_path / "mine", value)
    assert data == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "model_name": "mine",
        "pipeline_tag": "text-generation",
        "tags": ["dora", "lorary", "rslora"],
    }
    assert text.startswith("\n# mine\n\nAn adapter for `org/base`: ")
    size = sum(t.numel() for roles in value.tensors.values() for t in roles.values())
    assert f": {size:,} trained parameters, 8 adapted layers." in text
    assert "| method | rslora + dora: delta LowRank(r=2); " in text
    assert f"| SHA-256 | `{content_hash(value)}` |" in text
    assert "| `q_proj` | 2 | 16 × 16 | 2 | " in text
    assert "| `k_proj` | 2 | 8 × 16 | 2 | " in text
    assert "PEFT reads the folder as well." in text
    assert "## Made from" not in text


def test_shared_and_full_parameters_count_once(tmp_path: Path) -> None:
    vera = saved(tmp_path / "vera", "vera")
    bias = saved(tmp_path / "bias", "bitfit", kind="GPT2LMHeadModel")
    text = card(tmp_path / "bias", bias)[1]
    assert f": {sum(t.numel() for t in bias.full.values()):,} trained parameters, 0 adapted layers" in text
    assert "| trained in full | `transformer.h.0.attn.c_attn.bias`, " in text
    assert "None has an adapter." in text
    own = sum(t.numel() for roles in vera.tensors.values() for role, t in roles.items() if role in ("b", "d"))
    assert f": {own:,} trained parameters, 8 adapted layers" in card(tmp_path / "vera", vera)[1]


def test_its_parents_and_the_settings_are_on_the_card(tmp_path: Path) -> None:
    parents = (Parent("/data/ann/code", "0" * 64, 0.75), Parent("org/chat", "1" * 64, -0.25), Parent())
    settings = {"l1": 0.05, "errors": {"q": 1.0}, "form": "product", "bounds": [-1.5, 1.5], "loss": 1.23456789}
    value = saved(tmp_path / "mixed", provenance=Provenance("lorahub", parents, settings))
    text = card(tmp_path / "mixed", value)[1]
    assert "By lorahub: l1 0.05, form product, bounds [-1.5, 1.5], loss 1.23457.\n" in text
    assert f"| code | +0.75 | `{'0' * 64}` |" in text
    assert f"| org/chat | -0.25 | `{'1' * 64}` |" in text
    assert "| 3 |  |  |" in text
    assert "/data" not in text


def test_names_from_files_cannot_leave_their_cell(tmp_path: Path) -> None:
    hostile = Provenance(HOSTILE, (Parent(HOSTILE, "", 1.0),), {HOSTILE: HOSTILE})
    text = card(tmp_path / "x", saved(tmp_path / "x", provenance=hostile))[1]
    assert not re.search(r"^## Injected", text, re.MULTILINE)
    assert "\x1b" not in text
    assert "| a&#124;b&#96;c ## Injected [31m | +1 |  |" in text


def test_the_base_s_name_cannot_put_code_or_markup_on_the_card(tmp_path: Path) -> None:
    name = 'x"); import os; os.system("id")#\n```\n<script>alert(1)</script>\n---\nbase_model: org/evil'
    value = saved(tmp_path / "x")
    value = dataclasses.replace(value, base=dataclasses.replace(value.base, name=name))
    data, text = card(tmp_path / "x", value, name="[a](http://evil)\n# <b>")
    assert "base_model" not in data
    assert re.search(r"^# (.*)", text, re.MULTILINE)[1] == "[a]&#40;http://evil) # &#60;b>"  # type: ignore[index]
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert [ast.unparse(call.func) for call in calls] == ["lorary.load", "AutoModelForCausalLM.from_pretrained"]
    assert [a.value for a in calls[1].args if isinstance(a, ast.Constant)] == [name.replace("\n", " ")]
    assert all(line.count("`") == 2 for line in text.splitlines() if "<script>" in line and "pretrained" not in line)


@pytest.mark.parametrize(
    ("base", "linked"),
    [("org/base", "org/base"), ("/data/models/base", None), ("base", None), ("", None), ("builtin:base", None)],
)
def test_only_what_is_on_the_hub_is_linked(base: str, linked: str | None, tmp_path: Path) -> None:
    value = saved(tmp_path / "x")
    value = dataclasses.replace(value, base=dataclasses.replace(value.base, name=base.rpartition("/data/models/")[2]))
    data, _ = card(tmp_path / "x", value)
    assert data.get("base_model") == linked
    assert data.get("base_model_relation") == (linked and "adapter")
    assert card(tmp_path / "x", value, base="org/other")[0]["base_model"] == "org/other"


def test_the_base_of_a_folder_here_is_not_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/base").mkdir(parents=True)
    assert "base_model" not in card(tmp_path / "x", saved(tmp_path / "x", base="org/base"))[0]


def test_classifiers_and_other_models_name_their_class(tmp_path: Path) -> None:
    value = saved(tmp_path / "c", kind="LlamaForSequenceClassification", base="org/base")
    write_label_names(tmp_path / "c", ("bad", "good"), None)
    data, text = card(tmp_path / "c", value)
    assert data["pipeline_tag"] == "text-classification"
    loaded = "AutoModelForSequenceClassification.from_pretrained(\"org/base\", num_labels=2, id2label={0: 'bad', 1: "
    assert loaded in text
    value = saved(tmp_path / "t5", kind="T5ForConditionalGeneration", base="org/t5")
    data, text = card(tmp_path / "t5", value)
    assert "pipeline_tag" not in data
    assert 'T5ForConditionalGeneration.from_pretrained("org/t5")' in text


def test_the_code_on_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = builtin.load_model()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), "attention-qv"))
    lorary.save(tiny.shaken(model, 0.01), tmp_path / "mine")
    text = card(tmp_path / "mine", lorary.load_adapter(tmp_path / "mine"))[1]
    code = text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert lorary.attached(names["model"]) is not None


def test_a_card_is_written_once(tmp_path: Path) -> None:
    value = saved(tmp_path / "x", base="org/base")
    assert write_card(tmp_path / "x", value, name="mine")
    text = (tmp_path / "x" / "README.md").read_text()
    assert "\n# mine\n" in text
    (tmp_path / "x" / "README.md").write_text("# my own\n")
    assert not write_card(tmp_path / "x", value)
    assert (tmp_path / "x" / "README.md").read_text() == "# my own\n"
    lorary.save_adapter(value, tmp_path / "x")
    assert (tmp_path / "x" / "README.md").read_text() == "# my own\n", "saving again keeps it, too"
