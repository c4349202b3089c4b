"""Adapters saved by PEFT load here with equal logits, and ours load in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import lorary
from lorary.adapters import export_peft, load_adapter, save_adapter
from tests.adapters.models import BASES, Base, adapted, by_peft, by_transformers, close, fill, outputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
    # PEFT saves a copy of an adapted embedding's table, and says so
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning"),
    # PEFT warns that it cannot merge where the base has no bias, and takes every bias beside B for an empty shard
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),
]
VARIANTS = (
    *("LoRA", "rsLoRA", "DoRA", "patterns", "patterns of a DoRA", "embedding", "embedding of a DoRA"),
    *("biases beside B", "patterns with biases beside B"),
)


def peft_words(base: Base, variant: str) -> dict[str, Any]:
    words: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": list(base.targets)}
    if variant == "rsLoRA":
        words["use_rslora"] = True
    words |= {"use_dora": "DoRA" in variant, "lora_bias": "biases" in variant}
    if variant.startswith("patterns"):
        words |= {"rank_pattern": {base.special: 2}, "alpha_pattern": {base.targets[0].replace(".", r"\."): 10}}
    if variant.startswith("embedding"):
        words["target_modules"] = [base.embedding, base.targets[0]]
    return words


def saved_by_peft(base: Base, folder: Path, **words: Any) -> torch.Tensor:
    """Saves an adapter with PEFT; returns PEFT's outputs."""
    model = get_peft_model(base.model(), LoraConfig(fan_in_fan_out=base.transposed, **words)).eval()
    fill(p for n, p in model.named_parameters() if "lora_" in n)
    model.save_pretrained(str(folder))
    return outputs(model)


def ours(base: Base, variant: str) -> nn.Module:
    words: dict[str, Any] = {}
    if variant.startswith("patterns"):
        words = {"ranks": {base.special: 2}, "alphas": {base.targets[0]: 10}}
    targets = (base.embedding, base.targets[0]) if variant.startswith("embedding") else None
    name = "rslora" if variant == "rsLoRA" else "dora" if "DoRA" in variant else "lora"
    words |= {"lora_bias": True} if "biases" in variant else {}
    return adapted(base, name, targets=targets, **words)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_saved_by_peft_loads_here(base: Base, variant: str, tmp_path: Path) -> None:
    theirs = saved_by_peft(base, tmp_path, **peft_words(base, variant))
    model = base.model()
    plain = outputs(model)
    close(outputs(lorary.load(model, tmp_path)), theirs)
    assert (theirs - plain).abs().max() > 1e-3, "the adapter must change something"
    lorary.switch(model, None)
    close(outputs(lorary.switch(model, lorary.load_adapter(tmp_path))), theirs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_saved_here_loads_in_peft(base: Base, variant: str, tmp_path: Path) -> None:
    model = ours(base, variant)
    expected = outputs(model)
    lorary.save(model, tmp_path / "a")
    close(by_peft(base, tmp_path / "a"), expected)
    export_peft(lorary.Adapter.of(model), tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    close(by_peft(base, tmp_path / "b"), expected)
    close(outputs(lorary.load(base.model(), tmp_path / "b")), expected)
    assert (outputs(base.model()) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "embedding" not in v] + ["all biases"])
@pytest.mark.parametrize("base", BASES[:3], ids=str)
def test_saved_here_loads_in_transformers(base: Base, variant: str, tmp_path: Path) -> None:
    """Its loader leaves out magnitudes by PEFT's own name, and unties a bias that it has under one of two names."""
    if variant == "all biases":
        model = base.model()
        options = {} if base.name == "Llama" else {"full": "bias"}
        lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2, **options), base.targets))
        fill(p for p in model.parameters() if p.requires_grad)
    else:
        model = ours(base, variant)
    expected = outputs(model.eval())
    export_peft(lorary.Adapter.of(model), tmp_path / "exported", model=base.model())
    close(by_transformers(base, tmp_path / "exported"), expected)
    close(by_peft(base, tmp_path / "exported"), expected)
    close(outputs(lorary.load(base.model(), tmp_path / "exported")), expected)
    if variant != "all biases":
        lorary.save(model, tmp_path / "saved")
        close(by_transformers(base, tmp_path / "saved"), expected)


def test_the_whole_path_of_a_site_matches_nothing_else_in_peft(tmp_path: Path) -> None:
    """A site `proj` beside a module `inner.proj`, and a rank for one layer of several."""
    base = Base("nested", Nested, ("proj",), "proj", "")
    model = adapted(base, exclude="layers.2.proj", ranks={"layers.1.proj": 2}, alphas={"layers.0.proj": 3.5})
    for given in (None, base.model()):
        folder = tmp_path / str(given is None)
        export_peft(lorary.Adapter.of(model), folder, model=given)
        words = json.loads((folder / "adapter_config.json").read_text())
        assert words["rank_pattern"] == {r"^layers\.1\.proj": 2}
        assert words["alpha_pattern"] == {r"^layers\.0\.proj": 3.5}
        theirs = PeftModel.from_pretrained(base.model(), str(folder)).eval()
        adapted_there = {n for n, m in theirs.get_base_model().named_modules() if hasattr(m, "lora_A")}
        assert adapted_there == {"proj", "layers.0.proj", "layers.1.proj"}
        close(outputs(theirs), outputs(model))
        close(outputs(lorary.load(base.model(), folder)), outputs(model))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 6)
        self.proj = nn.Linear(6, 6)
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(6, 6)}) for _ in range(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.proj(self.embed(tokens))
        for layer in self.layers:
            x = torch.tanh(layer["proj"](x))
        return x


@pytest.mark.parametrize("names", [("lora",), ("rslora",), ("dora",)])
def test_projections_of_a_fused_weight(names: tuple[str, ...], tmp_path: Path) -> None:
    base = BASES[1]
    model = adapted(base, *names, targets=["c_attn[q,v]", "c_fc"])
    expected = outputs(model)
    lorary.save(model, tmp_path)
    words = json.loads((tmp_path / "adapter_config.json").read_text())
    assert words["r"] == 8
    assert words["rank_pattern"] == {"c_fc": 4}
    close(by_peft(base, tmp_path), expected)
    close(outputs(lorary.load(base.model(), tmp_path)), expected)
    kept, read = lorary.Adapter.of(model), lorary.load_adapter(tmp_path)
    assert read.sites == kept.sites
    for site, roles in kept.tensors.items():
        assert all(torch.equal(read.tensors[site][role], t) for role, t in roles.items())


def test_projections_that_interleave(tmp_path: Path) -> None:
    """GPT-NeoX keeps q, k and v head by head: the blocks of B are runs of rows."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    def make() -> nn.Module:
        config = GPTNeoXConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, vocab_size=30
        )
        return GPTNeoXForCausalLM(config)

    base = Base("NeoX", make, (), "", "")
    model = adapted(base, targets=["query_key_value[k,v]"])
    lorary.save(model, tmp_path)
    close(by_peft(base, tmp_path), outputs(model))
    close(outputs(lorary.load(base.model(), tmp_path)), outputs(model))


@pytest.mark.parametrize("names", [("lora+", "rslora"), ("lora-fa",), ("dora", "lora-fa", "rslora")])
def test_methods_that_only_train_differently_are_peft_adapters(names: tuple[str, ...], tmp_path: Path) -> None:
    model = adapted(BASES[0], *names, dropout=0.25)
    lorary.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.25
    close(by_peft(BASES[0], tmp_path), outputs(model))
    assert lorary.load_adapter(tmp_path).method == lorary.Adapter.of(model).method


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_peft(bias: str, tmp_path: Path) -> None:
    base = BASES[2]
    words = LoraConfig(r=4, target_modules=["query"], bias=bias, use_dora=bias == "all")
    model = get_peft_model(base.model(), words).eval()
    fill(p for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(str(tmp_path))
    close(outputs(lorary.load(base.model(), tmp_path)), outputs(model))
    adapter = load_adapter(tmp_path, model=base.model())
    assert all(name.endswith("bias") for name in adapter.full)
    assert any("query" in name for name in adapter.full)


def test_our_biases_and_whole_modules_in_peft(tmp_path: Path) -> None:
    base = BASES[2]
    method = lorary.method("lora", r=4, full=("bias", "*.output.LayerNorm.*"))
    model = base.model()
    lorary.attach(model, lorary.plan(model, method, targets=["query"]))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fill(trained.values())
    model.eval()
    adapter = lorary.Adapter.of(model)
    export_peft(adapter, tmp_path / "peft", model=base.model())
    words = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert words["bias"] == "all"
    assert words["modules_to_save"] == [
        f"bert.encoder.layer.{i}.{part}.LayerNorm" for i in (0, 1) for part in ("attention.output", "output")
    ]
    close(by_peft(base, tmp_path / "peft"), outputs(model))
    close(outputs(lorary.load(base.model(), tmp_path / "peft")), outputs(model))
    lorary.save_adapter(adapter, tmp_path / "native")  # without the model nobody knows that the norms are whole
    assert (tmp_path / "native" / "adapter.safetensors").exists()
    close(outputs(lorary.load(base.model(), tmp_path / "native")), outputs(model))
    save_adapter(adapter, tmp_path / "both", model=base.model())
    assert (tmp_path / "both" / "adapter_model.safetensors").exists()
    close(by_peft(base, tmp_path / "both"), outputs(model))
    close(outputs(lorary.load(base.model(), tmp_path / "both")), outputs(model))


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_modules_to_save_of_peft(dora: bool, tmp_path: Path) -> None:
    base = BASES[0]
    words = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"], use_dora=dora)
    model = get_peft_model(base.model(), words).eval()
    fill(p for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(str(tmp_path))
    close(outputs(lorary.load(base.model(), tmp_path)), outputs(model))
    assert sorted(lorary.load_adapter(tmp_path).full) == ["lm_head.weight", "model.norm.weight"]


@pytest.mark.parametrize(
    "words",
    [
        {"target_modules": r".*layers\.\d+\.self_attn\.(q|v)_proj"},
        {"target_modules": r"^(?!.*layers\.0).*(?:q_proj|down_proj)$"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": "all-linear"},
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"^model.layers.0.*": 2, r"layers\.1\.\w+\.q_proj": 3},
        },
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "task_type": "CAUSAL_LM"},
    ],
    ids=lambda words: next(reversed(words)) + "=" + str(next(reversed(words.values()))),
)
def test_ways_to_name_sites_in_peft(words: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved_by_peft(BASES[0], tmp_path, r=4, lora_alpha=6, **words)
    close(outputs(lorary.load(BASES[0].model(), tmp_path)), theirs)


def test_a_file_without_prefix_and_with_few_fields(tmp_path: Path) -> None:
    """As a bare module's adapter, or one of 2023, was written."""
    from safetensors.torch import save_file

    theirs = saved_by_peft(BASES[0], tmp_path, r=8, target_modules=["q_proj"])
    path = tmp_path / "adapter_model.safetensors"
    save_file({k.removeprefix("base_model.model."): t for k, t in load_file(path).items()}, path)
    old = {"peft_type": "LORA", "target_modules": ["q_proj"], "enable_lora": None, "merge_weights": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(old))
    close(outputs(lorary.load(BASES[0].model(), tmp_path)), theirs)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    model = adapted(BASES[0], ranks={"down_proj": 2})
    for name in ("a", "b"):
        lorary.save(model, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_an_update_that_is_a_sum_exports_as_one_lora(tmp_path: Path) -> None:
    base = BASES[0]
    lorary.save(adapted(base), tmp_path / "a")
    lorary.save(adapted(base, "rslora", r=2, targets=["q_proj"]), tmp_path / "b")
    both = [lorary.load_adapter(tmp_path / name) for name in "ab"]
    model = lorary.switch(base.model(), both)
    export_peft(lorary.Adapter.of(model), tmp_path / "sum")
    close(by_peft(base, tmp_path / "sum"), outputs(model))


def test_a_new_head_goes_to_peft_with_the_model_at_hand(tmp_path: Path) -> None:
    """A classifier's head trains in full beside the LoRA; PEFT keeps it as a module to save."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    base = Base("classifier", lambda: BertForSequenceClassification(BertConfig(**sizes, vocab_size=30)), (), "", "")
    model = adapted(base, targets=["query", "value"])
    fill(p for n, p in model.named_parameters() if n.startswith("classifier"))
    save_adapter(lorary.Adapter.of(model), tmp_path, model=model)
    words = json.loads((tmp_path / "adapter_config.json").read_text())
    assert words["modules_to_save"] == ["classifier"]
    assert words["target_modules"] == ["query", "value"]
    close(by_peft(base, tmp_path), outputs(model))
    (tmp_path / "lorary.json").unlink()
    close(outputs(lorary.load(base.model(), tmp_path)), outputs(model))
