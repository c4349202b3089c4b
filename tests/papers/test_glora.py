"""GLoRA: every structure against its plain formula, on every kind of layer; counts, starts, gradients, merges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import lorary
from lorary.analysis.memory.live_bytes import kept_for_backward
from lorary.cli import main
from lorary.errors import MethodError, PlanError, StateError
from lorary.layers import kinds
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.methods.glora import RandomStructures
from lorary.methods.glora_terms import DOWN, FORMS, ROLES, GLoRADelta, structures
from lorary.model.bias_flags import BiasWarning
from tests import tiny

from .layers import exactly, loss_of, matrix

ALL = structures(GLoRADelta(3))
# Every form of every term, each term with its largest and without the others
SOME = [GLoRADelta(3)] + [
    GLoRADelta(3, **{t: form if t == term else "none" for t in FORMS})
    for term, forms in FORMS.items()
    for form in forms[:-1]
]
MIXED = [
    GLoRADelta(3, "vector", "scalar", "vector", "scalar", "vector"),
    GLoRADelta(3, "scalar", "vector", "lora", "vector", "scalar"),
]

Make = Callable[[], nn.Module]
KINDS: dict[str, tuple[Make, Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(5, 4), lambda: torch.randn(2, 3, 5).double()),
    "linear, one row": (lambda: nn.Linear(5, 4), lambda: torch.randn(1, 1, 5).double()),
    "linear, no bias": (lambda: nn.Linear(5, 4, bias=False), lambda: torch.randn(6, 5).double()),
    "linear, one output": (lambda: nn.Linear(5, 1), lambda: torch.randn(6, 5).double()),
    "transposed": (lambda: biased(Conv1D(4, 5)), lambda: torch.randn(2, 3, 5).double()),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), lambda: torch.randn(2, 4, 7).double()),
    "conv2d": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=2, dilation=2, padding=1, padding_mode="reflect"),
        lambda: torch.randn(2, 4, 9, 7).double(),
    ),
    "conv2d, no bias": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), lambda: torch.randn(4, 5, 5).double()),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), lambda: torch.randn(2, 2, 4, 3, 3).double()),
    "embedding": (lambda: nn.Embedding(9, 4), lambda: torch.tensor([[1, 5, 5], [0, 8, 1]])),
}


def biased(layer: Any) -> Any:
    nn.init.normal_(layer.bias)
    return layer


def method(terms: GLoRADelta, **options: Any) -> lorary.Method:
    return lorary.method("glora", r=terms.r, **{term: terms.form(term) for term in FORMS}, **options)


def attached(layer: nn.Module, terms: GLoRADelta, dtype: torch.dtype = torch.float64, **options: Any) -> Adapted:
    """One layer with a structure of GLoRA at step 0."""
    model = nn.Sequential(layer.to(dtype))
    lorary.attach(model, lorary.plan(model, method(terms, **options), "0"), dtype=dtype)
    return adapted_layers(model)["0"]


def shaken(layer: Adapted) -> Adapted:
    with torch.no_grad():
        for p in layer.params.values():
            p.add_(torch.randn_like(p), alpha=0.5)
    return layer


def dense(layer: Adapted, terms: GLoRADelta, p: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """W_u = W + W * A + B and b_u = b + b * D + E + W C, with every term as the full matrix or vector that it is."""
    W, b = matrix(layer), layer.bias
    out, inp = W.shape

    def full(term: str, rows: int, columns: int) -> Tensor:
        match terms.form(term):
            case "none":
                return W.new_zeros(rows, columns)
            case "lora":
                return p[DOWN[term]] @ p[f"{term}u"]
            case "vector":
                return p[DOWN[term]][:, None] * W.new_ones(1, columns)
        return p[DOWN[term]] * W.new_ones(rows, columns)

    W_u = W + W * full("A", out, inp) + full("B", out, inp)
    change = (W @ full("C", inp, 1))[:, 0] + full("E", out, 1)[:, 0]
    if b is not None:
        return W_u, b + b * full("D", out, 1)[:, 0] + change
    return W_u, change if (terms.C, terms.E) != ("none", "none") else None


def possible(kind: str) -> list[GLoRADelta]:
    some = (
        [*SOME, *MIXED]
        if kind != "embedding"
        else [t for t in (*SOME, GLoRADelta(3, "vector", "lora")) if not t.changes_bias]
    )
    some += [GLoRADelta(3, a, b, "none", "none", "none") for a, b in (("lora", "lora"), ("scalar", "vector"))]
    bias = getattr(KINDS[kind][0](), "bias", None) is not None
    return [terms for terms in some if bias or any(terms.form(t) != "none" for t in "ABCE")]


EACH = pytest.mark.parametrize(
    ("kind", "terms"), [(k, t) for k in KINDS for t in possible(k)], ids=lambda v: v if isinstance(v, str) else forms(v)
)


def forms(terms: GLoRADelta) -> str:
    return "".join(f"{t}:{terms.form(t)[0]}" for t in FORMS)


def test_there_are_432_structures() -> None:
    assert len(ALL) == len(set(ALL)) == 432 == math.prod(map(len, FORMS.values()))
    assert structures(GLoRADelta(3, *["none"] * 5)) == (ALL[-1],)
    assert len(structures(GLoRADelta(3, "vector", "none", "vector", "scalar", "none"))) == 3 * 1 * 2 * 2 * 1
    assert len(structures(GLoRADelta(3), bias=False)) == 432 / 3


@EACH
def test_each_structure_is_its_formula(kind: str, terms: GLoRADelta) -> None:
    make, x = KINDS[kind]
    layer, given = shaken(attached(make(), terms)), x()
    W, b = dense(layer, terms, layer.tensors)
    exactly(layer(given), layer.kind.run(layer.base, given, W, b))
    with torch.no_grad():
        for _ in range(2):
            exactly(layer(given), layer.kind.run(layer.base, given, W, b))


@EACH
def test_merged_it_is_the_same_with_a_bias_where_there_was_none(kind: str, terms: GLoRADelta) -> None:
    make, x = KINDS[kind]
    layer, given = shaken(attached(make(), terms)), x()
    W, b = layer.merged()
    expected_W, expected_b = dense(layer, terms, layer.tensors)
    exactly(W, expected_W.detach())
    assert (b is None) == (expected_b is None)
    if b is not None and expected_b is not None:
        exactly(b, expected_b.detach())
        assert b.shape == (W.shape[0],)
    exactly(layer.kind.run(layer.base, given, W, b), layer(given).detach())


@pytest.mark.parametrize("terms", ALL[:-1], ids=forms)
def test_all_431_that_learn_anything(terms: GLoRADelta) -> None:
    """At the start nothing moves and up parts have no gradient; later the gradients are those of the dense formula."""
    torch.manual_seed(0)
    base, x = nn.Linear(5, 4).double(), torch.randn(6, 5).double()
    y = base(x)
    layer = attached(base, terms)
    assert torch.equal(layer(x), y)
    loss_of(layer(x)).backward()
    for role, p in layer.params.items():
        assert p.grad is not None
        assert bool(p.grad.any()) != role.endswith("u"), role
    # what it takes
    form = terms.form
    rank = {t: 3 * (5 + (1 if t == "C" else 4)) for t in "ABC"}
    vector = {"C": 5} | dict.fromkeys("ABDE", 4)
    expected = sum({"lora": rank.get(t, 0), "vector": vector[t], "scalar": 1, "none": 0}[form(t)] for t in FORMS)
    assert sum(p.numel() for p in layer.params.values()) == expected
    # on the way
    shaken(layer).zero_grad()
    given = {role: t.detach().clone().requires_grad_() for role, t in layer.params.items()}
    W, b = dense(layer, terms, given)
    loss_of(layer.kind.run(layer.base, x, W, b)).backward()
    loss_of(layer(x)).backward()
    for role, p in layer.params.items():
        exactly(p.grad, given[role].grad)


@EACH
def test_gradients_of_inputs_and_tensors_are_the_formulas(kind: str, terms: GLoRADelta) -> None:
    make, x = KINDS[kind]
    layer, given = shaken(attached(make(), terms)), x()
    grads = []
    for plain in (False, True):
        leaf = given.clone().requires_grad_() if given.is_floating_point() else given
        p = (
            {role: t.detach().clone().requires_grad_() for role, t in layer.params.items()}
            if plain
            else dict(layer.params)
        )
        W, b = dense(layer, terms, p) if plain else (None, None)
        loss_of(layer.kind.run(layer.base, leaf, W, b) if W is not None else layer(leaf)).backward()
        grads.append([leaf.grad, *(t.grad for t in p.values())])
    exactly(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_moves_at_the_start(kind: str, dtype: torch.dtype) -> None:
    make, x = KINDS[kind]
    given = x().to(dtype) if x().is_floating_point() else x()
    base = make().to(dtype)
    y = base(given)
    for terms in possible(kind):
        layer = attached(base, terms, dtype)
        layer.params.float()
        assert torch.equal(layer(given), y), terms


def test_the_start_is_zero_down_and_xavier_up() -> None:
    layer = attached(nn.Linear(300, 200), GLoRADelta(8))
    for role, p in layer.params.items():
        if not role.endswith("u"):
            assert not p.any(), role
            continue
        bound = math.sqrt(6 / sum(p.shape))
        assert 0.5 * bound < p.abs().max() <= bound
        if p.numel() > 1000:
            assert abs(p.std().item() - bound / math.sqrt(3)) < 0.05 * bound


def test_the_papers_count() -> None:
    layer = nn.Sequential(nn.Linear(4096, 4096, device="meta"))
    assert lorary.plan(layer, lorary.method("glora"), "0").trainable == 90_116
    without = nn.Sequential(nn.Linear(4096, 4096, bias=False, device="meta"))
    assert lorary.plan(without, lorary.method("glora"), "0").trainable == 90_116 - 4096  # no D: there is no b


@pytest.mark.parametrize(("size", "all_lost"), [(2**-14, True), (2**-8, False)])
def test_a_bf16_weight_would_round_away_more(size: float, all_lost: bool) -> None:
    """Why a layer in 16 bits takes two products: W + W * A in one, rounded, would forget what is small beside W."""
    base, x = nn.Linear(512, 512).bfloat16(), torch.randn(64, 512).bfloat16()
    layer = attached(base, GLoRADelta(4, "lora", "none", "none", "none", "none"), torch.bfloat16)
    layer.params.float()
    with torch.no_grad():
        layer.params["Ad"].normal_()
        layer.params["Au"].uniform_(-size, size)
        W, y = layer.merged()[0], base(x)
        exact = x.double() @ (W - base.weight).double().T
        errors = []
        for out in (layer(x), layer.kind.run(base, x, W.bfloat16(), base.bias)):
            errors.append(float(((out - y).double() - exact).norm() / exact.norm()))
        assert torch.equal(W.bfloat16(), base.weight) == all_lost
    assert errors[0] < (0.999 if all_lost else 0.7) * errors[1], errors


# --- cost -------------------------------------------------------------------------------------------------------------


class Unreadable(kinds.Linear):
    """A linear layer of which nobody may read the weight."""

    def matrix(self, layer: Any) -> Tensor:
        raise AssertionError("the weight was read")


@pytest.mark.parametrize("terms", [t for t in ALL[:-1] if t.A != "lora"][::7], ids=forms)
def test_what_acts_on_the_output_does_not_read_the_weight(terms: GLoRADelta, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = shaken(attached(nn.Linear(5, 4), terms)), torch.randn(6, 5).double()
    W, b = dense(layer, terms, layer.tensors)
    y = layer.kind.run(layer.base, x, W, b)
    monkeypatch.setitem(kinds.KINDS, "linear", Unreadable())
    exactly(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.Linear(256, 256), (8, 256)), (lambda: nn.Conv2d(64, 64, 3), (2, 64, 5, 5))],
    ids=["linear", "conv2d"],
)
def test_no_matrix_of_the_weights_size_is_kept(make: Make, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base = make().to(dtype)
    layer = attached(base, GLoRADelta(4), dtype)
    x = torch.randn(shape, dtype=dtype)
    kept = kept_for_backward(lambda: layer(x), beyond=[x, *layer.parameters()])
    outputs = base(x).nbytes
    assert kept < base.weight.nbytes / 4
    assert kept <= 4 * outputs + 8 * 1024


@pytest.mark.parametrize("terms", [GLoRADelta(2), *MIXED], ids=forms)
def test_it_compiles_whole(terms: GLoRADelta) -> None:
    torch._dynamo.reset()
    layer, x = shaken(attached(nn.Linear(5, 4), terms)), torch.randn(6, 5).double()
    exactly(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


# --- as everything downstream sees it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [t for t in ALL[:-1] if t.A != "lora"][::5], ids=forms)
def test_the_low_rank_form_is_exact(terms: GLoRADelta) -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    x = torch.randn(6, 5)
    lorary.attach(model, lorary.plan(model, method(terms), "0"))
    shaken(adapted_layers(model)["0"])
    y = model(x).detach()
    form = lorary.Adapter.of(model).low_rank(model)["0"]
    base = lorary.detach(model)[0]
    assert (form.gain is None, form.shift is None) == (terms.A == "none", not terms.changes_bias)
    assert form.A.shape[0] == {"lora": 3, "vector": 1, "scalar": 1, "none": 0}[terms.B]
    mine = base.weight @ x.T + form.B @ (form.A @ x.T)
    mine = mine if form.gain is None else form.gain[:, None] * mine
    mine = mine.T + base.bias
    mine = mine if form.shift is None else mine + form.shift
    torch.testing.assert_close(mine, y, rtol=1e-5, atol=1e-5)


def test_what_has_no_low_rank_form_says_why() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4))
    lorary.attach(model, lorary.plan(model, lorary.method("glora")))
    with pytest.raises(MethodError) as refused:
        lorary.Adapter.of(model).low_rank(model)
    what = "A is low-rank: W * A has full rank, so this is not a low-rank change of W with a gain for every output"
    assert str(refused.value) == (
        f"this adapter has no low-rank form:\n  - 0 and 1 more: {what}\n      hint: merge it into the base"
    )
    lorary.detach(model)
    lorary.attach(model, lorary.plan(model, lorary.method("glora", A="vector"), "0"))
    with torch.no_grad():
        adapted_layers(model)["0"].params["Ad"][1] = -1
    with pytest.raises(MethodError, match="A is -1 at 1 of 4 outputs, where nothing of W is left to add B to"):
        lorary.Adapter.of(model).low_rank(model)


# --- the supernet -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", ALL[::13], ids=forms)
def test_a_drawn_structure_is_the_one_of_its_slices(terms: GLoRADelta) -> None:
    layer, x = shaken(attached(nn.Linear(5, 4), GLoRADelta(3), supernet=True)), torch.randn(6, 5).double()
    slices = terms.slices(layer.tensors)
    W, b = dense(layer, terms, slices)
    whole = layer(x)
    layer.active_structure = terms
    exactly(layer(x), layer.kind.run(layer.base, x, W, b))
    assert torch.equal(layer.eval()(x), whole), "outside training it is the whole"
    layer.train()
    for role, part in slices.items():
        assert part.untyped_storage()._cdata == layer.params[role].untyped_storage()._cdata, role
    loss_of(layer(x)).backward()
    for role, p in layer.params.items():
        assert p.grad is not None, "every rank reduces every gradient, whatever was drawn"
        outside = torch.ones_like(p)
        if role in slices:
            view = terms.slices({r: outside if r == role else t for r, t in layer.tensors.items()})[role]
            view.zero_()
        assert not p.grad[outside.bool()].any(), f"{role} learns beyond its slice"
        assert role not in slices or bool(p.grad.any()), role


def test_draws_depend_on_seed_step_and_name_alone() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    plan = lorary.plan(model, lorary.method("glora", supernet=True, seed=5))
    rule = RandomStructures(5)
    lorary.attach(model, plan)
    rules = lorary.rules(model, 10)
    seen = []
    for step in range(1, 8):
        now = [layer.active_structure for layer in adapted_layers(model).values()]
        assert now == [rule.drawn(p.delta, p.site, step) for p in plan.sites]
        seen.append(tuple(now))
        rules.after_step()
    assert len(set(seen)) == 7
    assert len({terms for step in seen for terms in step}) > 20
    # another rank, or a run that resumes at the eighth step
    lorary.detach(model)
    lorary.attach(model, lorary.plan(model, plan.method))
    other = lorary.rules(model, 10)
    assert tuple(layer.active_structure for layer in adapted_layers(model).values()) == seen[0]
    other.load_state_dict(rules.state_dict())
    assert [layer.active_structure for layer in adapted_layers(model).values()] == [
        rule.drawn(p.delta, p.site, 8) for p in plan.sites
    ]
    assert RandomStructures(6).drawn(GLoRADelta(3), plan.sites[0].site, 1) != seen[0][0]


def test_every_structure_is_drawn_and_none_much_more_often() -> None:
    site = kinds.site("x", nn.Linear(4, 4))
    drawn = [RandomStructures(0).drawn(GLoRADelta(3), site, step) for step in range(432 * 12)]
    counts = [drawn.count(terms) for terms in ALL]
    assert min(counts) > 0
    assert max(counts) < 36  # 12 on average: Poisson's tail beyond three times that is under 1e-8


def test_a_layer_without_a_bias_is_drawn_no_d() -> None:
    site = kinds.site("x", nn.Linear(4, 4, bias=False))
    assert {RandomStructures(0).drawn(GLoRADelta(3), site, step).D for step in range(200)} == {"none"}


def test_slices_of_several_steps_train_one_tensor() -> None:
    layer, x = attached(nn.Linear(5, 4), GLoRADelta(3), supernet=True), torch.randn(6, 5).double()
    optimizer = torch.optim.SGD(layer.params.values(), lr=0.1)
    for a in ("scalar", "vector", "lora"):
        layer.active_structure = GLoRADelta(3, a, "none", "none", "none", "none")
        before = layer.params["Ad"].detach().clone()
        loss_of(layer(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = (layer.params["Ad"] != before).nonzero().tolist()
        everything = list(map(list, itertools.product(range(4), range(3))))
        assert moved == {"scalar": [[0, 0]], "vector": [[i, 0] for i in range(4)], "lora": everything}[a]


# --- where it can be --------------------------------------------------------------------------------------------------


def refusal(error: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(error) as refused:
        call()
    return str(refused.value)


def test_where_it_cannot_be() -> None:
    gpt2 = tiny.model("GPT2LMHeadModel")
    said = refusal(PlanError, lambda: lorary.plan(gpt2, lorary.method("glora"), ["wte", "h.0.attn.c_attn[q,v]"]))
    assert said.splitlines()[1:] == [
        "  - transformer.wte: C, D and E change the bias, and an embedding has none: "
        "set C='none', D='none', E='none' for it",
        "  - transformer.h.0.attn.c_attn: GLoRA's terms are over all rows, not over single "
        "projections: adapt the fused weight as a whole",
    ]
    nothing = dict.fromkeys("ABCE", "none")
    said = refusal(
        PlanError, lambda: lorary.plan(tiny.llama(), lorary.method("glora", **nothing), "layers.0.mlp.up_proj")
    )
    assert "every term that applies to this layer is none: nothing could train" in said
    some = lorary.method("glora", full=("layers.0.attn.c_attn.bias",))
    said = refusal(PlanError, lambda: lorary.plan(gpt2, lorary.method("glora", full=("*.c_attn.bias",)), "c_attn"))
    assert "c_attn.bias: is adapted and would train in full as well" in said
    assert some.trained == ROLES


@pytest.mark.parametrize(
    "other", ["rslora", "lora+", "lora-fa", "dora", "pissa", "olora", "vera", "melora", "multilora"]
)
def test_what_it_does_not_go_with(other: str) -> None:
    """Spec: it scales W itself, which leaves none of these anything of what they change."""
    for names in (("glora", other), (other, "glora")):
        with pytest.raises(MethodError, match=r"glora|Ad"):
            lorary.method(*names)


def test_a_bias_is_not_trained_twice_and_nothing_is_dropped() -> None:
    assert refusal(MethodError, lambda: lorary.method("glora", "bitfit")) == (
        "invalid method:\n"
        "  - full: GLoRADelta trains an update of every adapted layer's bias, and `full` trains the biases themselves\n"
        "      hint: use one of the two"
    )
    assert refusal(MethodError, lambda: lorary.method("glora", dropout=0.1)) == (
        "invalid method:\n"
        "  - dropout: GLoRAJoin scales W x together with the update, so dropout cannot act on the update alone\n"
        "      hint: set dropout=0"
    )
    assert refusal(MethodError, lambda: lorary.method("glora", C="scalar", D="lora")) == (
        "invalid method:\n"
        "  - delta: GLoRADelta has C = 'scalar'; it takes lora or vector or none\n"
        "  - delta: GLoRADelta has D = 'lora'; it takes vector or scalar or none"
    )


# --- merged models and their files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "flags"),
    [
        ("all-linear", ["attention_bias", "mlp_bias"]),
        ("attention-qv", ["attention_bias"]),
        (["down_proj"], ["mlp_bias"]),
        (["*.layers.1.self_attn.k_proj"], ["attention_bias"]),
    ],
    ids=str,
)
def test_a_merged_llama_is_read_back_with_its_biases(targets: Any, flags: list[str], tmp_path: Path) -> None:
    model = tiny.seeded("LlamaForCausalLM")
    before = tiny.frozen_copy(model)
    tiny.trained(model, lorary.method("glora", r=2), targets)
    live = tiny.logits(model)
    lorary.merge(model, keep=True)
    merged = tiny.logits(model)
    torch.testing.assert_close(merged, live, rtol=1e-4, atol=1e-6)
    assert [name for name in ("attention_bias", "mlp_bias") if getattr(model.config, name)] == flags
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), merged)
    lorary.unmerge(model)
    assert torch.equal(tiny.logits(model), live)
    lorary.detach(model)
    assert tiny.same(tiny.frozen_copy(model), before)
    assert not model.config.attention_bias
    assert not model.config.mlp_bias


def test_without_terms_of_the_bias_none_is_created(tmp_path: Path) -> None:
    model = tiny.trained(tiny.llama(), lorary.method("glora", r=2, C="none", E="none"))
    names = set(lorary.detach(tiny.trained(tiny.llama())).state_dict())
    lorary.merge(model)
    assert set(model.state_dict()) == names
    assert not model.config.attention_bias


def test_an_architecture_without_room_for_the_biases_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.seeded("Qwen2ForCausalLM")
    model.save_pretrained(tmp_path / "base")
    lorary.attach(model, lorary.plan(model, lorary.method("glora", r=2), ["q_proj", "o_proj"]))
    tiny.shaken(model)
    lorary.save(model, tmp_path / "adapter")
    y = tiny.logits(model)
    with pytest.warns(BiasWarning, match=r"o_proj.bias and 1 more: Qwen2ForCausalLM has no bias there"):
        lorary.merge(model)
    torch.testing.assert_close(tiny.logits(model), y, rtol=1e-4, atol=1e-6)  # in memory it is whole
    arguments = ["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base", str(tmp_path / "base")]
    monkeypatch.setattr("sys.argv", ["lorary", *arguments])
    with pytest.raises(SystemExit):
        main()
    what = "Qwen2ForCausalLM has no bias there: a checkpoint of the merged model would lose it"
    fix = "keep the adapter beside its base; or train it with C, D and E 'none'"
    _, _, said = capsys.readouterr().err.partition("error: ")  # Transformers' own bars come first
    assert said == "cannot save the merged model:\n" + "".join(
        f"  - model.layers.{i}.self_attn.o_proj.bias: {what}\n      hint: {fix}\n" for i in range(2)
    )
    assert not (tmp_path / "merged").exists()


def test_a_model_of_ones_own_gets_its_biases() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    x = torch.randn(3, 4)
    lorary.attach(model, lorary.plan(model, lorary.method("glora"), "0"))
    tiny.shaken(model)
    y = model(x)
    lorary.merge(model, keep=True)
    torch.testing.assert_close(model(x), y)
    assert model[0].bias.shape == (4,)
    lorary.unmerge(model)
    assert torch.equal(model(x), y)
    lorary.detach(model)
    assert model[0].bias is None


def test_weight_decay_reaches_vectors_and_scalars_as_in_the_authors_code() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    lorary.attach(model, lorary.plan(model, lorary.method("glora", A="scalar", B="vector"), "0"))
    decayed = {g["name"]: g["weight_decay"] for g in lorary.param_groups(model, 1e-3, weight_decay=0.1)}
    assert decayed == {"Ad Bd D E decayed": 0.1, "Cd Cu decayed": 0.1}


def test_merging_twice_is_refused() -> None:
    model = tiny.trained(tiny.llama(), lorary.method("glora", r=2))
    lorary.merge(model, keep=True)
    with pytest.raises(StateError, match="the adapter is merged"):
        lorary.merge(model)


def test_the_shift_is_cached_for_the_precision_that_it_was_computed_in() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    lorary.attach(model, lorary.plan(model, lorary.method("glora", A="none", B="none", D="none", E="none"), "0"))
    tiny.shaken(model)
    x = torch.randn(2, 16)
    with torch.no_grad(), lorary.cached(model):
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(model(x).float(), exact)
        assert torch.equal(model(x), exact)
