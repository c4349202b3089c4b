"""An adapter's GGUF, read back: every site, the same update, rows in llama.cpp's order; or why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

import lorary
from lorary.adapters.export.gguf import DTYPES, export_gguf, rope_arguments
from lorary.adapters.export.gguf_architectures import ARCHITECTURES, Architecture, reorder_rows
from lorary.spec.site import Site
from tests import tiny
from tests.adapters import models
from tests.adapters.export.made import longer, of
from tests.adapters.models import BASES
from tests.clients.cases import SIZES
from tests.clients.llama_cpp import BASES as RUN

LLAMA, GPT2, BERT, CONV = BASES
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "LoRA": (("lora",), {"alpha": 12}),
    "rsLoRA": (("rslora",), {"alpha": 6}),
    "PiSSA": (("pissa",), {}),
    "MELoRA": (("melora",), {}),
    "VeRA": (("vera",), {}),
    "unequal ranks": (("lora",), {"ranks": {"k_proj": 3, "down_proj": 1}, "alpha": 12}),
    "AdaLoRA": (("adalora",), {"target": 2}),
}


def read(folder: Path) -> tuple[GGUFReader, dict[str, Tensor]]:
    """The file, and its tensors as fp32, in NumPy's order of dimensions."""
    reader = GGUFReader(folder / "adapter.gguf")
    tensors = {}
    for t in reader.tensors:
        shape = tuple(int(n) for n in reversed(t.shape))
        number = gguf.quants.dequantize(t.data, t.tensor_type)
        tensors[t.name] = torch.from_numpy(number.copy()).float().reshape(shape)
    return reader, tensors


def value(reader: GGUFReader, key: str) -> Any:
    return reader.get_field(key).contents()


def updates(reader: GGUFReader, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensor of the base -> (alpha / R) B A, as llama.cpp computes it."""
    alpha, found = value(reader, "adapter.lora.alpha"), {}
    for name, A in tensors.items():
        if name.endswith(".lora_a"):
            B = tensors[name.replace(".lora_a", ".lora_b")]
            A = A.t() if "token_embd" in name else A
            found[name.removesuffix(".weight.lora_a")] = alpha / B.shape[1] * B @ A
    return found


def interleaved(W: Tensor, heads: int) -> Tensor:
    """The rows of q or k in llama.cpp's order, in words: row i of a head, then the row half a head further."""
    size = W.shape[0] // heads
    order = [h * size + i + side * size // 2 for h in range(heads) for i in range(size // 2) for side in (0, 1)]
    return W[order]


@pytest.mark.parametrize(("names", "options"), METHODS.values(), ids=METHODS)
def test_every_site_has_its_update(names: tuple[str, ...], options: dict[str, Any], tmp_path: Path) -> None:
    made = (
        models.vera(LLAMA, targets=TARGETS)
        if "vera" in names
        else models.adapted(LLAMA, *names, targets=TARGETS, **options)
    )
    if "adalora" in names:
        with torch.no_grad():
            for i, module in enumerate(m for m in made.modules() if hasattr(m, "params")):
                module.params["E"][i % 3 :] = 0  # some sites have no direction left
    adapter = lorary.Adapter.of(made)
    export_gguf(adapter, tmp_path / "out", model=LLAMA.model())
    reader, tensors = read(tmp_path / "out")
    assert [value(reader, f"general.{key}") for key in ("type", "architecture")] == ["adapter", "llama"]
    assert value(reader, "adapter.type") == "lora"
    leaves = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    leaves |= {"gate_proj": "ffn_gate", "down_proj": "ffn_down"}
    heads = {"q_proj": 4, "k_proj": 2}
    expected = {}
    for site, form in adapter.compact().low_rank().items():
        layer, leaf = site.split(".")[2], site.rpartition(".")[2]
        W = form.B @ form.A
        if form.A.numel():
            expected[f"blk.{layer}.{leaves[leaf]}"] = interleaved(W, heads[leaf]) if leaf in heads else W
    found = updates(reader, tensors)
    assert found.keys() == expected.keys()
    assert 4 <= len(found) <= 12
    for name, W in expected.items():
        torch.testing.assert_close(found[name], W, rtol=1e-5, atol=1e-6)


def test_the_scale_of_the_largest_rank_is_one(tmp_path: Path) -> None:
    """So that `--lora-scaled FILE 0.5` means half the adapter, whatever the method."""
    adapter = lorary.Adapter.of(models.adapted(LLAMA, "rslora", ranks={"down_proj": 2}))
    export_gguf(adapter, tmp_path, model=LLAMA.model())
    reader, tensors = read(tmp_path)
    assert value(reader, "adapter.lora.alpha") == 4.0
    assert tensors["blk.0.attn_v.weight.lora_b"].shape == (8, 4)
    assert tensors["blk.0.ffn_down.weight.lora_b"].shape == (16, 2)
    form = adapter.low_rank()["model.layers.0.self_attn.v_proj"]
    assert torch.equal(tensors["blk.0.attn_v.weight.lora_b"], form.B)
    assert torch.equal(tensors["blk.0.attn_v.weight.lora_a"], form.A)


def test_reordered_rows_rotate_alike() -> None:
    """Rotating halves of a head and then reordering is reordering and then rotating neighbours."""
    torch.manual_seed(0)
    heads, size = 3, 8
    q = torch.randn(heads * size, 1)
    cos, sin = torch.randn(size // 2, 1), torch.randn(size // 2, 1)
    x, y = q.reshape(heads, 2, size // 2, 1).unbind(1)
    halves = torch.stack([x * cos - y * sin, y * cos + x * sin], 1).reshape(q.shape)
    site = Site("model.layers.0.self_attn.q_proj", "linear", heads * size, 1, bias=False)
    config = type("Config", (), {"num_attention_heads": heads, "num_key_value_heads": 1})()

    def reordered(B: Tensor) -> Tensor:
        return reorder_rows(B, site, Architecture("llama", ("q_proj",)), config)

    even, odd = reordered(q).reshape(heads, size // 2, 2, 1).unbind(2)
    neighbours = torch.stack([even * cos - odd * sin, odd * cos + even * sin], 2).reshape(q.shape)
    assert torch.equal(reordered(halves), neighbours)
    assert not torch.equal(reordered(q), q)


def test_every_architecture_is_one_that_has_been_run_in_llama_cpp() -> None:
    assert set(ARCHITECTURES) == set(RUN)
    assert {a.name for a in ARCHITECTURES.values()} <= set(gguf.MODEL_ARCH_NAMES.values())
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "export.md").read_text(encoding="utf-8")
    assert [name for name in ARCHITECTURES if f"`{name}`" not in page] == []


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_all_linear_layers_of_an_architecture_have_a_name(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**SIZES, **RUN[model_type]})
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    planned = lorary.plan(base, lorary.method("lora", r=2))
    sites = tuple(p for p in planned.sites if not p.site.experts)  # its fused experts are refused by name
    tensors = {p.site.name: {"A": torch.ones(p.shapes["A"]), "B": torch.ones(p.shapes["B"])} for p in sites}
    adapter = lorary.Adapter(planned.method, sites, tensors)
    export_gguf(adapter, tmp_path, model=base)
    reader, found = read(tmp_path)
    assert len(found) == 2 * len(sites) > 0
    assert value(reader, "general.architecture") == ARCHITECTURES[model_type].name


def test_parts_of_a_fused_transposed_weight(tmp_path: Path) -> None:
    adapter = lorary.Adapter.of(models.adapted(GPT2, targets=["c_attn[q,v]", "c_fc"]))
    export_gguf(adapter, tmp_path, model=GPT2.model())
    found = updates(*read(tmp_path))
    form = adapter.low_rank()["transformer.h.1.attn.c_attn"]
    torch.testing.assert_close(found["blk.1.attn_qkv"], form.B @ form.A)
    assert found["blk.1.attn_qkv"][16:32].abs().max() == 0  # k


def test_the_embedding_is_transposed_and_the_head_is_not(tmp_path: Path) -> None:
    adapter = lorary.Adapter.of(models.adapted(LLAMA, targets=["embed_tokens", "lm_head"]))
    export_gguf(adapter, tmp_path, model=LLAMA.model())
    reader, tensors = read(tmp_path)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "token_embd.weight.lora_a": (30, 4),
        "token_embd.weight.lora_b": (16, 4),
        "output.weight.lora_a": (4, 16),
        "output.weight.lora_b": (30, 4),
    }
    form = adapter.low_rank()["model.embed_tokens"]
    torch.testing.assert_close(updates(reader, tensors)["token_embd"], form.B @ form.A)


def test_rows_of_tokens_that_the_base_has(tmp_path: Path) -> None:
    adapter = of(LLAMA.model(), lorary.method("rows", tokens=(3, 7)), "vocabulary")
    export_gguf(adapter, tmp_path, model=LLAMA.model())
    found = updates(*read(tmp_path))
    for site, name in (("model.embed_tokens", "token_embd"), ("lm_head", "output")):
        form = adapter.low_rank(LLAMA.model())[site]
        torch.testing.assert_close(found[name], form.B @ form.A)
        rows = (form.B @ form.A).abs().sum(0 if name == "token_embd" else 1).nonzero().flatten()
        assert rows.tolist() == [3, 7]


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_rounded_once(dtype: str, tmp_path: Path) -> None:
    adapter = lorary.Adapter.of(models.adapted(LLAMA, alpha=4))
    export_gguf(adapter, tmp_path, model=LLAMA.model(), dtype=dtype)
    reader, tensors = read(tmp_path)
    assert {t.tensor_type.name for t in reader.tensors} == {DTYPES[dtype]}
    form = adapter.low_rank()["model.layers.1.mlp.down_proj"]
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_a"], form.A.to(getattr(torch, dtype)).float())


def test_linear_rope_scaling_is_an_argument_of_llama_cpp(tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = longer(base, "linear")
    export_gguf(adapter, tmp_path, model=base)
    assert rope_arguments(adapter) == ["--rope-scaling", "linear", "--rope-scale", "4"]
    assert rope_arguments(lorary.Adapter.of(models.adapted(LLAMA))) == []
