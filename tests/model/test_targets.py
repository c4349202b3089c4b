"""Which layers: presets on real architectures, whole-component names, globs, and typing errors answered in full."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorary
from lorary.errors import PlanError
from lorary.model.patterns import matches
from lorary.model.scan import scan
from lorary.model.targets import abbreviate_paths, resolve, tree
from tests import tiny


def found(model: nn.Module, targets: Any, exclude: Any = ()) -> list[str]:
    """What targets name, repeated blocks written as one, parts in brackets."""
    layers, problems = resolve(scan(model), targets, exclude)
    assert problems == []
    parts = {f.name: "".join(f"[{','.join(p.name for p in f.parts)}]" if f.parts else "") for f in layers}
    return [text + parts[names[0]] for text, names in abbreviate_paths(parts)]


def refused(model: nn.Module, targets: Any, exclude: Any = (), **options: Any) -> str:
    """The whole message with which targets are refused."""
    with pytest.raises(PlanError) as refusal:
        lorary.plan(model, lorary.method(r=1), targets, exclude=exclude, **options)
    return str(refusal.value)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "q_proj", True),
        ("q_proj", "model.xq_proj", False),
        ("q_proj", "model.q_proj_2", False),
        ("q_proj", "model.q_proj.0", False),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("attn.q_proj", "model.layers.0.self_attn.q_proj", False),
        ("0.self_attn.q_proj", "layers.10.self_attn.q_proj", False),
        ("0", "blocks.0", True),
        ("0", "blocks.10", False),
        ("*.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("*q_proj", "model.xq_proj", True),
        ("layers.1?.*", "model.layers.11.mlp.up_proj", True),
        ("layers.1?.*", "model.layers.1.mlp.up_proj", False),
        ("layers.1.*", "model.layers.11.mlp.up_proj", False),
        ("*", "anything", True),
        ("", "anything", False),
        ("layers.[01].*", "layers.0.x", False),  # nothing but * and ? is special
        ("layers.[01].*", "layers.[01].x", True),
        ("Q_PROJ", "model.q_proj", False),
        ("model.q.proj", "model.q_proj", False),
    ],
)
def test_matches(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


class Adversarial(nn.Module):
    """Names that a substring search would hit, and containers with numbers for names."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(2, 2)
        self.xq_proj = nn.Linear(2, 2)
        self.q_proj_norm = nn.Linear(2, 2)
        self.inner = nn.ModuleDict({"q_proj": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))})
        self.deep = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(2, 2)}) for _ in range(11)])


def test_names_are_whole_components() -> None:
    model = Adversarial()
    assert found(model, "q_proj") == ["q_proj", "deep.{0-10}.q_proj"]
    assert found(model, "xq_proj") == ["xq_proj"]
    assert found(model, "inner.q_proj.*") == ["inner.q_proj.{0,2}"]
    assert found(model, "q_proj.0") == ["inner.q_proj.0"]
    assert found(model, "1.q_proj") == ["deep.1.q_proj"]  # not 10
    assert found(model, "deep.?.q_proj") == ["deep.{0-9}.q_proj"]
    assert found(model, ["q_proj", "*.q_proj.0"]) == ["q_proj", "inner.q_proj.0", "deep.{0-10}.q_proj"]


def test_layers_come_in_the_models_order_and_once() -> None:
    model = Adversarial()
    once = found(model, ["xq_proj", "q_proj", "*q_proj", "all-linear"])
    assert once == ["q_proj", "xq_proj", "q_proj_norm", "inner.q_proj.{0,2}", "deep.{0-10}.q_proj"]


def test_abbreviate_paths() -> None:
    assert abbreviate_paths([]) == []
    assert abbreviate_paths(["a.0.b", "a.1.b", "a.3.b", "c"]) == [
        ("a.{0,1,3}.b", ["a.0.b", "a.1.b", "a.3.b"]),
        ("c", ["c"]),
    ]
    assert abbreviate_paths(["0.x1", "1.x1"]) == [("{0-1}.x1", ["0.x1", "1.x1"])]
    assert abbreviate_paths(["a.0.b.0", "a.0.b.1"])[0][0] == "a.0.b.{0-1}"
    assert abbreviate_paths(["a.10", "a.2"])[0][0] == "a.{2,10}"


def test_a_shared_layer_can_be_named_by_each_of_its_paths() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = nn.ModuleList([self.a])

    assert found(Shared(), "a") == found(Shared(), "b.0") == found(Shared(), ["a", "b.*"]) == ["a"]


# --- presets on real architectures -----------------------------------------------------------------------------------

_LLAMA = {
    "attention": ["model.layers.{0-1}.self_attn." + p for p in ("q_proj", "k_proj", "v_proj", "o_proj")],
    "attention-qv": ["model.layers.{0-1}.self_attn." + p for p in ("q_proj", "v_proj")],
    "mlp": ["model.layers.{0-1}.mlp." + p for p in ("gate_proj", "up_proj", "down_proj")],
    "embedding": ["model.embed_tokens"],
}


def _bert(name: str) -> dict[str, list[str]]:
    layer = f"{name}.encoder.layer.{{0-1}}"
    qkv = [f"{layer}.attention.self.{p}" for p in ("query", "key", "value")]
    return {
        "attention": [*qkv, f"{layer}.attention.output.dense"],
        "attention-qv": [qkv[0], qkv[2]],
        "mlp": [f"{layer}.intermediate.dense", f"{layer}.output.dense"],
        "embedding": [f"{name}.embeddings.word_embeddings"],
    }


def _blocks(block: str, fused: str, out: str, up: str, down: str, embedding: str) -> dict[str, list[str]]:
    return {
        "attention": [f"{block}.{fused}[q,k,v]", f"{block}.{out}"],
        "attention-qv": [f"{block}.{fused}[q,v]"],
        "mlp": [f"{block}.{up}", f"{block}.{down}"],
        "embedding": [embedding],
    }


_FUSED_ATTENTION = ("self_attention.query_key_value", "self_attention.dense")
_FOUR = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_T5 = [
    *[f"encoder.block.{{0-1}}.layer.0.SelfAttention.{p}" for p in "qkvo"],
    *[f"decoder.block.{{0-1}}.layer.0.SelfAttention.{p}" for p in "qkvo"],
    *[f"decoder.block.{{0-1}}.layer.1.EncDecAttention.{p}" for p in "qkvo"],
]

ARCHITECTURES: dict[str, dict[str, list[str]]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Gemma3ForCausalLM": _LLAMA,
    "MixtralForCausalLM": _LLAMA
    | {"mlp": [f"model.layers.{{0-1}}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]},
    "Phi3ForCausalLM": {
        "attention": ["model.layers.{0-1}.self_attn.o_proj", "model.layers.{0-1}.self_attn.qkv_proj[q,k,v]"],
        "attention-qv": ["model.layers.{0-1}.self_attn.qkv_proj[q,v]"],
        "mlp": ["model.layers.{0-1}.mlp.gate_up_proj", "model.layers.{0-1}.mlp.down_proj"],
        "embedding": ["model.embed_tokens"],
    },
    "GPT2LMHeadModel": _blocks(
        "transformer.h.{0-1}", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "transformer.wte"
    ),
    "GPTNeoXForCausalLM": _blocks(
        "gpt_neox.layers.{0-1}", "attention.query_key_value", "attention.dense", *_FOUR, "gpt_neox.embed_in"
    ),
    "BloomForCausalLM": _blocks("transformer.h.{0-1}", *_FUSED_ATTENTION, *_FOUR, "transformer.word_embeddings"),
    "FalconForCausalLM": _blocks("transformer.h.{0-1}", *_FUSED_ATTENTION, *_FOUR, "transformer.word_embeddings"),
    "MptForCausalLM": _blocks(
        "transformer.blocks.{0-1}", "attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj", "transformer.wte"
    ),
    "ModernBertForMaskedLM": _blocks(
        "model.layers.{0-1}", "attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo", "model.embeddings.tok_embeddings"
    ),
    "BertForMaskedLM": _bert("bert"),
    "RobertaForSequenceClassification": _bert("roberta"),
    "DistilBertForSequenceClassification": {
        "attention": [
            f"distilbert.transformer.layer.{{0-1}}.attention.{p}" for p in ("q_lin", "k_lin", "v_lin", "out_lin")
        ],
        "attention-qv": [f"distilbert.transformer.layer.{{0-1}}.attention.{p}" for p in ("q_lin", "v_lin")],
        "mlp": [f"distilbert.transformer.layer.{{0-1}}.ffn.{p}" for p in ("lin1", "lin2")],
        "embedding": ["distilbert.embeddings.word_embeddings"],
    },
    "T5ForConditionalGeneration": {
        "attention": _T5,
        "attention-qv": [name for name in _T5 if name[-1] in "qv"],
        "mlp": [
            f"{half}.block.{{0-1}}.layer.{i}.DenseReluDense.{p}"
            for half, i in (("encoder", 1), ("decoder", 2))
            for p in ("wi", "wo")
        ],
        "embedding": ["encoder.embed_tokens", "decoder.embed_tokens"],  # `shared` is only what they are tied to
    },
    "ViTForImageClassification": {
        "attention": [f"vit.layers.{{0-1}}.attention.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj")],
        "attention-qv": [f"vit.layers.{{0-1}}.attention.{p}" for p in ("q_proj", "v_proj")],
        "mlp": ["vit.layers.{0-1}.mlp.fc1", "vit.layers.{0-1}.mlp.fc2"],
        "conv": ["vit.embeddings.patch_embeddings.projection"],
    },
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_presets(name: str) -> None:
    model = tiny.model(name, "meta")
    expected = ARCHITECTURES[name]
    for preset in ("attention", "attention-qv", "mlp", "embedding", "conv"):
        if preset in expected:
            assert found(model, preset) == expected[preset]
        else:
            assert f"`{preset}` matches no layer of this model" in refused(model, preset)
    # every linear layer of the body is attention or mlp, and the head is neither
    both = {text.partition("[")[0] for p in ("attention", "mlp") for text in expected.get(p, [])}
    pooler = {"bert.pooler.dense"} if name == "BertForSequenceClassification" else set()
    assert set(found(model, "all-linear")) == both | pooler


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("LlamaForCausalLM", {"lm_head"}),
        ("GPT2LMHeadModel", {"lm_head"}),
        ("T5ForConditionalGeneration", {"lm_head"}),
        ("ViTForImageClassification", {"classifier"}),
        ("DistilBertForSequenceClassification", {"pre_classifier", "classifier", "dropout"}),
    ],
)
def test_heads(name: str, heads: set[str]) -> None:
    assert scan(tiny.model(name, "meta")).heads == heads


def test_a_head_is_adapted_where_it_is_named() -> None:
    assert found(tiny.llama(), ["all-linear", "lm_head"])[-1] == "lm_head"


def test_a_plain_module() -> None:
    model = tiny.ConvNet()
    assert found(model, "conv") == ["stem", "depthwise", "pointwise"]
    assert found(model, "all-linear") == ["head"]
    assert found(model, ["conv", "all-linear"]) == ["stem", "depthwise", "pointwise", "head"]
    assert scan(model).heads == set()


def test_a_convolutional_network_of_transformers() -> None:
    model = tiny.model("MobileNetV2ForImageClassification", "meta")
    assert found(model, "conv")[-1] == "mobilenet_v2.conv_1x1.convolution"
    assert "`all-linear` matches no layer of this model" in refused(model, "all-linear")  # the head is new


def test_all_linear_leaves_out_what_it_cannot_adapt_and_names_refuse_it() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
            self.last = nn.Linear(8, 2)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 2))

    attention = ["body.layers.0.self_attn.in_proj_weight", "body.layers.0.self_attn.out_proj"]
    assert found(Plain(), "all-linear") == [*attention, "last"]
    assert refused(Plain(), ["linear1", "out_proj", "normed"]) == (
        "invalid plan:\n"
        "  - body.layers.0.linear1: nn.TransformerEncoderLayer also reads its weight without calling it: "
        "an adapter would act on some paths only\n"
        "  - normed: its weight is computed from other parameters (weight_norm, spectral_norm or another "
        "parametrization)\n"
        '      hint: exclude=["linear1", "normed"]'
    )


def test_why_the_encoder_layer_of_pytorch_is_refused() -> None:
    """It reads its weights past the modules when it evaluates. Were this to change, it could be adapted."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    called = []
    layer.linear1.forward = lambda x: called.append(x)  # type: ignore[assignment,func-returns-value]
    with torch.no_grad():
        layer(torch.randn(1, 3, 8))
    assert called == []


# --- fused projections ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("c_attn", ["transformer.h.{0-1}.attn.c_attn"]),
        ("c_attn[q,v]", ["transformer.h.{0-1}.attn.c_attn[q,v]"]),
        ("*.c_attn[ k ]", ["transformer.h.{0-1}.attn.c_attn[k]"]),
        (["c_attn[v]", "c_attn[q]", "c_attn[v]"], ["transformer.h.{0-1}.attn.c_attn[v,q]"]),
        (["c_attn[v]", "c_attn"], ["transformer.h.{0-1}.attn.c_attn"]),
        (
            ["all-linear", "c_attn[v]"],
            [
                "transformer.h.{0-1}.attn.c_attn",
                "transformer.h.{0-1}.attn.c_proj",
                "transformer.h.{0-1}.mlp.c_fc",
                "transformer.h.{0-1}.mlp.c_proj",
            ],
        ),
    ],
)
def test_parts_by_name(targets: Any, expected: list[str]) -> None:
    assert found(tiny.model("GPT2LMHeadModel"), targets) == expected


def test_a_layout_that_is_not_known_is_not_guessed() -> None:
    class Odd(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, rows)

    assert found(Odd(24), "attention-qv") == ["qkv[q,v]"]  # three times as many rows as columns
    assert found(Odd(12), "attention") == ["qkv"]
    assert refused(Odd(12), "attention-qv") == (
        "invalid plan:\n"
        "  - qkv: is fused, and the layout of its q, k and v is not known\n"
        "      hint: target the whole layer by its name"
    )
    assert refused(Odd(12), "qkv[q]") == (
        "invalid plan:\n  - qkv: has no projection q\n      hint: it is not known to be fused"
    )


def test_the_cross_attention_of_gpt_2_has_no_queries_in_it() -> None:
    model = tiny.model("GPT2LMHeadModel", add_cross_attention=True, n_embd=24)
    assert "transformer.h.0.crossattention.c_attn: is fused, and the layout" in refused(model, "attention-qv")


# --- excluding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("mlp", _LLAMA["attention"]),
        (["layers.1", "mlp"], [name.replace("{0-1}", "0") for name in _LLAMA["attention"]]),
        (["attention", "down_proj", "gate_proj"], _LLAMA["mlp"][1:2]),
        ("self_attn", _LLAMA["mlp"]),
        ("*.layers.0.*", [n.replace("{0-1}", "1") for n in _LLAMA["attention"] + _LLAMA["mlp"]]),
        ("lm_head", _LLAMA["attention"] + _LLAMA["mlp"]),
        ([], _LLAMA["attention"] + _LLAMA["mlp"]),
    ],
)
def test_exclude(exclude: Any, expected: list[str]) -> None:
    assert found(tiny.model("LlamaForCausalLM", "meta"), "all-linear", exclude) == expected


# --- what is said when nothing matches -------------------------------------------------------------------------------

_TREE = """this model's layers:
        model.embed_tokens  Embedding 40x16
        model.layers.{0-1}.self_attn.q_proj  Linear 16x16  x2
        model.layers.{0-1}.self_attn.k_proj  Linear 8x16  x2
        model.layers.{0-1}.self_attn.v_proj  Linear 8x16  x2
        model.layers.{0-1}.self_attn.o_proj  Linear 16x16  x2
        model.layers.{0-1}.mlp.gate_proj  Linear 24x16  x2
        model.layers.{0-1}.mlp.up_proj  Linear 24x16  x2
        model.layers.{0-1}.mlp.down_proj  Linear 16x24  x2
        lm_head  Linear 40x16"""
_KNOWN = (
    "presets: all-linear, attention, attention-qv, attention-kv, attention-output, mlp, mlp-output, embedding, conv, "
    "vocabulary, language, vision, audio, projector"
)


def test_nothing_said_is_what_the_method_says() -> None:
    model = tiny.model("LlamaForCausalLM", "meta")
    plain, longer = lorary.method(r=1), lorary.method("longlora", length=4096, r=1)
    assert lorary.plan(model, plain).sites == lorary.plan(model, plain, "all-linear").sites
    assert lorary.plan(model, longer).sites == lorary.plan(model, longer, "attention").sites


@pytest.mark.parametrize(
    ("targets", "exclude", "problems"),
    [
        (
            "q_porj",
            [],
            f"targets: `q_porj` matches no layer\n      hint: did you mean `q_proj` or `v_proj` or `o_proj`? {_TREE}",
        ),
        (
            ["q_proj", "attention_qv", "lm_haed"],  # one typo among good entries is enough
            [],
            "targets: `attention_qv` matches no layer\n"
            f"      hint: did you mean `attention-qv` or `attention` or `attention-kv`? {_TREE}\n"
            "  - targets: `lm_haed` matches no layer\n      hint: did you mean `lm_head`?",
        ),
        ("zzz", [], f"targets: `zzz` matches no layer\n      hint: {_TREE}"),
        ("model.layers.2.*", [], f"targets: `model.layers.2.*` matches no layer\n      hint: {_TREE}"),
        (
            ["self_attn", "mlp.*"],
            [],
            "targets: `self_attn` is a LlamaAttention, not a layer with a weight matrix\n"
            "      hint: inside it are k_proj, o_proj, q_proj, v_proj",
        ),
        (
            "norm",
            [],
            f"targets: `norm` is a LlamaRMSNorm, not a layer with a weight matrix\n      hint: {_TREE}",
        ),
        (
            "conv",
            [],
            f"targets: `conv` matches no layer of this model\n      hint: {_TREE}",
        ),
        ([], [], f"targets: no target is given\n      hint: {_KNOWN}"),
        (["q_proj", ""], [], f"targets: '' is not the name of a layer\n      hint: {_KNOWN}"),
        ([3], [], f"targets: 3 is not the name of a layer\n      hint: {_KNOWN}"),
        (
            "q_proj[q]",
            [],
            "model.layers.0.self_attn.q_proj: has no projection q\n      hint: it is not known to be fused\n"
            "  - model.layers.1.self_attn.q_proj: has no projection q\n      hint: it is not known to be fused",
        ),
        ("q_proj", ["q_proj"], "exclude: excludes every layer that the targets name"),
        (
            "q_proj",
            ["k_porj"],
            f"exclude: `k_porj` matches no layer\n      hint: did you mean `k_proj` or `v_proj` or `q_proj`? {_TREE}",
        ),
        (
            "q_proj",
            ["v_proj[v]"],
            "exclude: `v_proj[v]` names projections, but layers are excluded whole\n"
            "      hint: target the other projections instead",
        ),
        (
            "q_porj",
            ["q_porj"],
            f"exclude: `q_porj` matches no layer\n      hint: did you mean `q_proj` or `v_proj` or `o_proj`? {_TREE}\n"
            "  - targets: `q_porj` matches no layer\n      hint: did you mean `q_proj` or `v_proj` or `o_proj`?",
        ),
    ],
)
def test_what_is_said(targets: Any, exclude: Any, problems: str) -> None:
    message = refused(tiny.model("LlamaForCausalLM", "meta"), targets, exclude)
    assert message == f"invalid plan:\n  - {problems}"


def test_which_projections_there_are() -> None:
    assert refused(tiny.model("GPT2LMHeadModel", n_layer=1), "c_attn[q,w,x]") == (
        "invalid plan:\n  - transformer.h.0.attn.c_attn: has no projection w, x\n      hint: it has q, k, v"
    )


def test_a_model_without_layers() -> None:
    assert refused(nn.Sequential(nn.ReLU()), "all-linear") == (
        "invalid plan:\n"
        "  - targets: `all-linear` matches no layer of this model\n"
        "      hint: this model's layers:\n"
        "        none that can be adapted"
    )


def test_a_long_tree_is_cut() -> None:
    model = nn.ModuleDict({f"layer_{chr(97 + i)}{chr(97 + j)}": nn.Linear(2, 2) for i in range(9) for j in range(5)})
    lines = tree(scan(model)).splitlines()
    assert len(lines) == 41
    assert lines[-1] == "... and 5 more"


@pytest.mark.parametrize(
    ("name", "kv", "attention", "mlp"),
    [
        ("LlamaForCausalLM", "k_proj v_proj", "self_attn.o_proj", "mlp.down_proj"),
        ("GPT2LMHeadModel", "c_attn[k,v]", "attn.c_proj", "mlp.c_proj"),
        ("GPTNeoXForCausalLM", "query_key_value[k,v]", "attention.dense", "mlp.dense_4h_to_h"),
        ("PersimmonForCausalLM", "query_key_value[k,v]", "self_attn.dense", "mlp.dense_4h_to_h"),
        ("CodeGenForCausalLM", "qkv_proj[v,k]", "attn.out_proj", "mlp.fc_out"),
        ("Phi3ForCausalLM", "qkv_proj[k,v]", "self_attn.o_proj", "mlp.down_proj"),
        ("PhiForCausalLM", "k_proj v_proj", "self_attn.dense", "mlp.fc2"),
        ("BertForSequenceClassification", "key value", "attention.output.dense", "output.dense"),
        ("DistilBertForSequenceClassification", "k_lin v_lin", "attention.out_lin", "ffn.lin2"),
        ("ModernBertForMaskedLM", "Wqkv[k,v]", "attn.Wo", "mlp.Wo"),
        ("ViTForImageClassification", "k_proj v_proj", "attention.o_proj", "mlp.fc2"),
        ("T5ForConditionalGeneration", "k v", "o", "DenseReluDense.wo"),
    ],
)
def test_keys_and_values_and_what_ends_a_block(name: str, kv: str, attention: str, mlp: str) -> None:
    model = tiny.model(name, "meta")
    blocks = {"attention-kv": kv, "attention-output": attention, "mlp-output": mlp}
    for preset, ends in blocks.items():
        sites = lorary.plan(model, lorary.method("lora", r=1), preset).sites
        ending = [
            f"{p.site.name}[{','.join(part.name for part in p.site.parts)}]" if p.site.parts else p.site.name
            for p in sites
        ]
        assert ending
        for end in ends.split():
            assert any(f".{path}".endswith(f".{end}") for path in ending), end
        assert all(any(f".{path}".endswith(f".{end}") for end in ends.split()) for path in ending), ending
    both = [{p.site.name for p in lorary.plan(model, lorary.method("lora", r=1), t).sites} for t in [*blocks][1:]]
    assert both[0].isdisjoint(both[1])
