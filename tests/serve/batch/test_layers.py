"""A row of a mixed batch is computed as by the model with its adapter alone; rows without one as by the base."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorary
from lorary.errors import LoraryError, StateError
from lorary.serve.batch import mixed
from lorary.serve.batch.batch import Batch, Segment, Weighted
from lorary.serve.batch.layers import ServedLayers
from lorary.serve.batch.ops import cpu
from lorary.serve.batch.prepared import RowsError
from lorary.serve.forms.form import serving_form
from lorary.serve.forms.serving_form import ServingForm, SiteForm
from lorary.spec.presets import presets
from tests import tiny

Made = tuple[lorary.Adapter, ServingForm]
# rows of each request: few, for compiled code; many, for matrix products
LENGTHS = pytest.mark.parametrize("length", [1, 5, 19], ids=["one row", "short", "long"])


@pytest.fixture(autouse=True, params=["compiled", "without a compiler"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of short segments; of these narrow layers, all would be short."""
    monkeypatch.setattr(cpu, "SHORT_ROWS", (8, 8))
    if request.param != "compiled":
        monkeypatch.setenv("LORARY_NATIVE", "0")
    elif cpu.native() is None:
        pytest.skip("there is no C compiler")
    return bool(request.param == "compiled")


def seeded(name: str, **changes: Any) -> Any:
    """A tiny base whose biases are not zero, as after pretraining: a zero would hide what is done to it."""
    base = tiny.seeded(name, **changes)
    with torch.no_grad():
        for path, parameter in base.named_parameters():
            if path.endswith("bias"):
                parameter.normal_(std=0.1)
    return base


def adapter_of(model: Any, base: Any, *names: str, targets: Any = "all-linear", seed: int = 3, **options: Any) -> Made:
    """A trained adapter of these presets on a model of its own, and its form on the base.

    It moves little: from activations a thousand times larger, attention makes rounding a difference that is seen.
    """
    method = lorary.method(*names, **options)
    plan = lorary.plan(model, method, targets)
    lorary.attach(model, plan, data=tiny.data_for(plan))
    adapter = lorary.Adapter.of(tiny.shaken(model, 0.05, seed))
    return adapter, serving_form(adapter, base)


def alone(base: Any, adapter: lorary.Adapter | None, *inputs: Tensor) -> Tensor:
    """The output of the base with one adapter."""
    lorary.switch(base, adapter)
    with torch.no_grad():
        out = base(*inputs)
    lorary.switch(base, None)
    found: Tensor = getattr(out, "logits", out)
    return found


def together(base: nn.Module, adapters: Sequence[Weighted], inputs: Tensor, rows: int, **more: Tensor) -> Tensor:
    """The output of the base for inputs of as many rows each, each with its own adapters."""
    served = ServedLayers(base)
    for weighted in adapters:
        for form, _ in weighted:
            served.cover(form)
    try:
        with served.computing(Batch.of([(weighted, rows, rows) for weighted in adapters])):
            out = base(inputs, **more)
    finally:
        served.remove()
    found: Tensor = getattr(out, "logits", out)
    return found


@contextlib.contextmanager
def noted(note: str) -> Iterator[None]:
    """A block whose errors say which case they are of."""
    try:
        yield
    except AssertionError as error:
        error.add_note(note)
        raise


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


# --- every method -----------------------------------------------------------------------------------------------------

EMBEDDINGS = ["all-linear", "embedding"]
# preset -> what to adapt, and options with which it is odd; the others adapt embeddings too, with r=7
SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (EMBEDDINGS, {"r": 1}),
    "lora-fa": ("all-linear", {"r": 3}),
    "dora": (EMBEDDINGS, {"r": 5}),
    "glora": ("all-linear", {"r": 3}),
    "pissa": ("attention", {"r": 5}),
    "olora": ("attention", {"r": 3}),
    "lora-ga": ("attention", {"r": 2}),
    "corda": ("attention", {"r": 3}),
    "eva": ("all-linear", {"r": 3}),
    "vera": (EMBEDDINGS, {"r": 24}),
    "melora": (EMBEDDINGS, {"r": 2}),
    "hira": (EMBEDDINGS, {"r": 3}),
    "miss": ("all-linear", {"r": 5}),
    "adalora": ("all-linear", {"r": 5, "target": 3}),
    "longlora": (EMBEDDINGS, {"r": 9, "length": 4096}),
    "rows": (None, {"tokens": (35, 39, 3)}),
    "ia3": (None, {}),
    "houlsby": (None, {"m": 5}),
    "prefix-tuning": (None, {"tokens": 3}),
    "prompt-tuning": (None, {"tokens": 3}),
    "bitfit": (None, {}),
    "full": (None, {}),
}
NOT_SERVED = {"alora", "houlsby", "prefix-tuning", "prompt-tuning"}
# name -> the presets that it refuses: Llama has no biases, GPT-2 no RoPE
MODELS = {"LlamaForCausalLM": {"bitfit", *NOT_SERVED}, "GPT2LMHeadModel": {"longlora", *NOT_SERVED}}


@functools.cache
def of_every_method(name: str) -> dict[str, Made]:
    """preset -> a trained adapter, of all that leave the base as it is."""
    base, made, refused = seeded(name), {}, set()
    for preset in presets().keys() - {"qlora", "loftq"}:
        targets, options = SETTINGS.get(preset, (EMBEDDINGS, {"r": 7}))
        try:
            made[preset] = adapter_of(seeded(name), base, preset, targets=targets, seed=len(preset), **options)
        except LoraryError:
            refused.add(preset)
    assert refused == MODELS[name]
    return made


@LENGTHS
@pytest.mark.parametrize("name", MODELS)
def test_every_method_in_one_batch(name: str, length: int) -> None:
    base, made = seeded(name), of_every_method(name)
    ids = torch.randint(40, (len(made) + 2, length))
    adapters: list[Weighted] = [(), *[((form, 1.0),) for _, form in made.values()], ()]
    # without positions, GPT-2 asks for the embeddings of one sequence, whose rows are those of no request
    found = together(base, adapters, ids, length, position_ids=torch.arange(length).expand(ids.shape))
    plain = alone(base, None, ids)
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[-1], plain[-1])
    for preset, row, y in zip(made, ids[1:-1], found[1:-1], strict=True):
        with noted(preset):
            close(y, alone(base, made[preset][0], row[None])[0])


def test_every_kind_of_layer() -> None:
    """Convolutions, for which a row is an example; and a module called by keyword."""
    base, made = tiny.ConvNet().eval(), list[Made]()
    for number, preset in enumerate(("lora", "dora", "glora", "vera", "lora")):
        model = copy.deepcopy(base)
        made.append(adapter_of(model, base, preset, targets=["conv", "head"], seed=number, r=number + 3))
    x = torch.randn(12, 3, 9, 9)
    adapters: list[Weighted] = [(), *[((form, 1.0),) for _, form in made]]
    found, plain = together(base, adapters, x, 2), alone(base, None, x)
    assert torch.equal(found[:2], plain[:2])
    for number, (adapter, _) in enumerate(made, 1):
        part = slice(2 * number, 2 * number + 2)
        close(found[part], alone(base, adapter, x[part]))


def test_modules_that_only_other_adapters_change() -> None:
    """A rotary embedding is covered for one adapter, and norms for another, which is alone in the batch."""
    base, made = seeded("LlamaForCausalLM"), of_every_method("LlamaForCausalLM")
    served, ids = ServedLayers(base), torch.randint(40, (1, 5))
    for preset in ("longlora", "full", "lora"):
        served.cover(made[preset][1])
    found = {}
    for preset in ("full", "lora", "longlora"):
        with served.computing(Batch.of([(((made[preset][1], 1.0),), 5, 5)])):
            found[preset] = base(ids).logits
    served.remove()
    for preset, y in found.items():
        with noted(preset):
            close(y, alone(base, made[preset][0], ids))


LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(("kind", "changes"), [("Gemma3ForCausalLM", LAYER_TYPES), ("Phi3ForCausalLM", {})])
def test_longer_contexts(kind: str, changes: dict[str, Any]) -> None:
    """Gemma has rotary angles for each type of its layers."""
    base = seeded(kind, **changes)
    long, plain = (
        adapter_of(seeded(kind, **changes), base, preset, targets=["attention"], r=3, **options)
        for preset, options in (("longlora", {"length": 1_000_000, "shifted": False}), ("lora", {}))
    )
    assert long[1].rotary
    ids = torch.randint(40, (3, 7))
    found = together(base, [((long[1], 1.0),), (), ((plain[1], 1.0),)], ids, 7)
    assert torch.equal(found[1], alone(base, None, ids)[1])
    for row, (adapter, _) in ((0, long), (2, plain)):
        close(found[row], alone(base, adapter, ids[row : row + 1])[0])


@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", "Gemma3ForCausalLM"])
def test_norms_within_attention(kind: str) -> None:
    """One gets tokens before heads, the other heads before tokens; there are as many heads as tokens."""
    base = seeded(kind, tie_word_embeddings=False)
    adapter, form = adapter_of(seeded(kind, tie_word_embeddings=False), base, "full", targets=None)
    assert any("q_norm" in path for path in form.overrides)
    ids = torch.randint(40, (3, 4))
    found = together(base, [(), ((form, 1.0),), ()], ids, 4)
    close(found[1], alone(base, adapter, ids[1:2])[0])
    assert torch.equal(found[[0, 2]], alone(base, None, ids)[[0, 2]])


@LENGTHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype: torch.dtype, length: int) -> None:
    base = seeded("LlamaForCausalLM").to(dtype)
    made = [adapter_of(copy.deepcopy(base), base, preset, r=5) for preset in ("lora", "dora", "vera")]
    ids = torch.randint(40, (4, length))
    found = together(base, [(), *[((form, 1.0),) for _, form in made]], ids, length)
    assert torch.equal(found[0], alone(base, None, ids)[0])
    for row, y, (adapter, _) in zip(ids[1:], found[1:], made, strict=True):
        close(y.float(), alone(base, adapter, row[None])[0].float(), 0.05)


@LENGTHS
def test_quantised_bases(length: int) -> None:
    """The term is added to what the quantised layer computes."""
    base = seeded("LlamaForCausalLM")
    model = copy.deepcopy(base)
    lorary.attach(base, lorary.plan(base, lorary.method("qlora", r=2), "all-linear"))
    lorary.detach(base)  # it stays quantised
    adapters = []
    for number, preset in enumerate(("lora", "dora", "vera")):
        trained = copy.deepcopy(model)
        lorary.attach(trained, lorary.plan(trained, lorary.method("qlora", preset, r=3 + number), "all-linear"))
        adapter = lorary.Adapter.of(tiny.shaken(trained, 0.05))
        adapters.append((adapter, serving_form(adapter, base)))
    ids = torch.randint(40, (4, length))
    found = together(base, [(), *[((form, 1.0),) for _, form in adapters]], ids, length)
    assert torch.equal(found[0], alone(base, None, ids)[0])
    for row, y, (adapter, _) in zip(ids[1:], found[1:], adapters, strict=True):
        close(y, alone(base, adapter, row[None])[0])


@LENGTHS
def test_weighted_sums(length: int) -> None:
    base = seeded("LlamaForCausalLM")
    weights = {"lora": 0.7, "vera": -0.4, "multilora": 0.5}
    made = {preset: adapter_of(copy.deepcopy(base), base, preset, r=5) for preset in (*weights, "rslora")}
    ids = torch.randint(40, (3, length))
    several = tuple((made[preset][1], weight) for preset, weight in weights.items())
    found = together(base, [several, (), ((made["rslora"][1], 0.25),)], ids, length)
    for y, row, of in ((found[0], ids[:1], weights), (found[2], ids[2:], {"rslora": 0.25})):
        adapters = {preset: made[preset][0] for preset in of}
        close(y, alone(base, lorary.mix(adapters, weights=list(of.values())), row)[0])
    assert torch.equal(found[1], alone(base, None, ids)[1])


# --- rows -------------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """A layer for all rows, a head for some of them; GPT-2's layer is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Conv1D(12, 8), nn.Linear(12, 6)

    def forward(self, x: Tensor, kept: Sequence[int]) -> Tensor:
        y: Tensor = self.head(self.body(x=x)[:, kept])
        return y


def random_form(model: nn.Module, *paths: str, rank: int = 3, **vectors: bool) -> ServingForm:
    """A form with random tensors at these layers."""
    sites = {}
    for path in paths:
        weight = model.get_submodule(path).weight
        out, inp = weight.shape if isinstance(model.get_submodule(path), nn.Linear) else weight.T.shape
        sites[path] = SiteForm(torch.randn(rank, inp), torch.randn(out, rank))
    return ServingForm(f"rank {rank}", sites)


def test_the_head_has_rows_of_its_own() -> None:
    """A request in the middle of its prompt has no row there."""
    model = Head().eval()
    a, b = (random_form(model, "body", "head", rank=rank) for rank in (3, 17))
    x, kept = torch.randn(1, 9, 8), [2, 8]
    served = ServedLayers(model)
    for form in (a, b):
        served.cover(form)
    requests: list[tuple[Weighted, int, int]] = [
        (((a, 1.0),), 3, 1),
        (((b, 1.0),), 4, 0),
        ((), 1, 0),
        (((b, 1.0),), 1, 1),
    ]
    with served.computing(Batch.of(requests)):
        found = model(x, kept)
    for row, place, form in ((0, 2, a), (1, 8, b)):
        with served.computing(Batch.of([(((form, 1.0),), 1, 1)])):
            close(found[:, row], model(x[:, place : place + 1], [0])[:, 0])


def test_padded_rows_get_nothing() -> None:
    model = Head().eval()
    form, x = random_form(model, "body", "head"), torch.randn(1, 8, 8)
    served, kept = ServedLayers(model), list(range(8))
    plain = model(x, kept)
    served.cover(form)
    with served.computing(Batch({8: (Segment(0, 3, ((form, 1.0),)),)})):
        found = model(x, kept)
    assert torch.equal(found[:, 3:], plain[:, 3:])
    assert not torch.isclose(found[:, :3], plain[:, :3]).any(-1).all()


def test_nothing_is_done_without_an_adapter() -> None:
    """Nor is the number of rows asked for."""
    model, x = Head().eval(), torch.randn(2, 5, 8)
    plain, served = model(x, [1]), ServedLayers(model)
    served.cover(random_form(model, "body"))
    assert torch.equal(model(x, [1]), plain)
    with served.computing(Batch.of([((), 3, 1)])):
        assert torch.equal(model(x, [1]), plain)


def test_a_step_within_a_step() -> None:
    """The outer one goes on after it, also if it fails."""
    model, x = Head().eval(), torch.randn(1, 1, 8)
    a, b = random_form(model, "body"), random_form(model, "body", rank=2)
    served = ServedLayers(model)
    served.cover(a)
    served.cover(b)
    with served.computing(Batch.of([(((a, 1.0),), 1, 1)])):
        first = model(x, [0])
        with contextlib.suppress(ZeroDivisionError), served.computing(Batch.of([(((b, 1.0),), 1, 1)])):
            assert not torch.equal(model(x, [0]), first)
            raise ZeroDivisionError
        assert torch.equal(model(x, [0]), first)


# --- what stays as it is ----------------------------------------------------------------------------------------------


def test_the_model_stays_as_it_is() -> None:
    """No module, parameter or hook more; and after `remove`, not even a forward."""
    base = seeded("LlamaForCausalLM")
    before, state = tiny.everything(base), tiny.frozen_copy(base)
    keys = [name for name, _ in base.named_modules()]
    served = ServedLayers(base)
    for _, form in of_every_method("LlamaForCausalLM").values():
        served.cover(form)
        served.cover(form)
    assert [name for name, _ in base.named_modules()] == keys
    assert tiny.same(base.state_dict(), state)
    served.remove()
    assert tiny.everything(base) == before


def test_forwards_of_other_libraries_stay() -> None:
    """accelerate replaces a layer's forward in the same way; what it returns may be a tensor that it keeps."""
    model, kept, x = Head().eval(), torch.randn(1, 1, 6), torch.randn(1, 1, 8)
    model.head.forward = lambda _: kept  # type: ignore[assignment]
    before, held = model.head.forward, kept.clone()
    served = ServedLayers(model)
    form = random_form(model, "head")
    served.cover(form)
    with served.computing(Batch.of([(((form, 1.0),), 1, 1)])):
        assert not torch.equal(model(x, [0]), held)
    assert torch.equal(kept, held)
    served.remove()
    assert model.head.forward is before


def test_forms_with_the_same_uid_are_not_taken_for_each_other() -> None:
    """An adapter that was loaded twice: comparing its tensors would be an error."""
    model, x = Head().eval(), torch.randn(1, 2, 8)
    served = ServedLayers(model)
    forms = [random_form(model, "body") for _ in range(2)]
    for form in forms:
        served.cover(form)
    with served.computing(Batch.of([(((form, 1.0),), 1, 1) for form in forms])):
        found = model(x, [0, 1])
    for row, form in enumerate(forms):
        with served.computing(Batch.of([(((form, 1.0),), 1, 1)])):
            close(found[:, row], model(x[:, row : row + 1], [0])[:, 0])


def test_forms_are_forgotten_and_slots_used_again() -> None:
    """The layers keep no adapter alive, and one in another's place is not taken for it."""
    model, x = Head().eval(), torch.randn(1, 1, 8)
    served, seen = ServedLayers(model), set()
    for number in range(40):
        forms = [random_form(model, "body", rank=1 + (number + i) % 9) for i in range(3)]
        for form in forms:
            served.cover(form)
            with served.computing(Batch.of([(((form, 1.0),), 1, 1)])):
                found = model(x, [0])
            A, B = form.sites["body"][:2]
            close(found, model.head(model.body(x) + x @ A.T @ B.T))  # type: ignore[union-attr]
            seen.add(served.table.slot(form))
        del forms, form
    assert len(served.table.tensor) == 8
    assert len(seen) <= 8


def test_more_adapters_than_before() -> None:
    """The table grows, and the adapters that are there keep their slots."""
    model, x = Head().eval(), torch.randn(1, 30, 8)
    forms = [random_form(model, "body", rank=1 + number % 7) for number in range(30)]
    served = ServedLayers(model)
    for form in forms:
        served.cover(form)
    with served.computing(Batch.of([(((form, 1.0),), 1, 1) for form in forms])):
        found = model(x, range(30))
    for number, form in enumerate(forms):
        A, B = form.sites["body"][:2]
        row = x[:, number]
        close(found[:, number], model.head(model.body(row) + row @ A.T @ B.T))  # type: ignore[union-attr]


# --- bad inputs -------------------------------------------------------------------------------------------------------


def _form(**site: Tensor) -> ServingForm:
    return ServingForm("bad", {"body": SiteForm(**site)})  # type: ignore[arg-type]


BAD_FORMS = {
    "a layer that is not there": (
        ServingForm("bad", {"nose": SiteForm(shift=torch.ones(3))}),
        "nose: the base has no such layer",
    ),
    "a module that is no layer": (
        ServingForm("bad", {"": SiteForm(shift=torch.ones(3))}),
        "the base has no such layer",
    ),
    "a matrix of another layer": (
        _form(A=torch.ones(3, 9), B=torch.ones(12, 3)),
        "body: A is [3, 9], and the layer takes [3, 8]",
    ),
    "two ranks": (_form(A=torch.ones(3, 8), B=torch.ones(12, 4)), "B is [12, 4], and the layer takes [12, 3]"),
    "one half": (_form(A=torch.ones(3, 8)), "body: has one of A and B without the other"),
    "a short vector": (_form(gain=torch.ones(11)), "gain is [11], and the layer takes [12]"),
    "another device": (
        _form(A=torch.ones(3, 8, device="meta"), B=torch.ones(12, 3, device="meta")),
        "its tensors are on meta, and the base is on cpu",
    ),
    "a parameter that is not there": (
        ServingForm("bad", {}, {"head": {"scale": torch.ones(6)}}),
        "head.scale: the base has no such parameter",
    ),
    "a parameter of another shape": (
        ServingForm("bad", {}, {"head": {"bias": torch.ones(5)}}),
        "head.bias: is [5], and the base's is [6]",
    ),
    "an override of nothing": (ServingForm("bad", {}, {"ear": {}}), "ear: the base has no such module"),
    "a rotary embedding that is not there": (
        ServingForm("bad", {}, rotary={"rotary_emb": nn.Identity()}),
        "rotary_emb: the base has no such module",
    ),
}


@pytest.mark.parametrize("case", BAD_FORMS)
def test_bad_forms(case: str) -> None:
    """Their tensors would be read past their ends. Nothing is covered."""
    form, message = BAD_FORMS[case]
    model = Head().eval()
    served = ServedLayers(model)
    with pytest.raises(StateError, match=re.escape(message)):
        served.cover(form)
    assert "forward" not in vars(model.body) | vars(model.head)


def test_all_reasons_at_once() -> None:
    form = ServingForm("bad", {"nose": SiteForm(), "body": SiteForm(gain=torch.ones(1), shift=torch.ones(2))})
    with pytest.raises(StateError) as caught:
        ServedLayers(Head()).cover(form)
    assert len(caught.value.problems) == 3


def batches(form: ServingForm, gained: ServingForm, strange: ServingForm) -> dict[str, tuple[Batch, str]]:
    one = ((form, 1.0),)
    return {
        "not covered": (Batch.of([(((strange, 1.0),), 2, 1)]), "the adapter 'strange' is not covered"),
        "a gain in a sum": (Batch.of([(((form, 1.0), (gained, 1.0)), 2, 1)]), "'gained' changes more than it adds"),
        "a gain with a weight": (Batch.of([(((gained, 0.5),), 2, 1)]), "has no weighted sum"),
        "overlapping": (
            Batch({5: (Segment(0, 3, one), Segment(2, 4, one))}),
            "rows 2 to 4 of 5: are no rows after 3",
        ),
        "past the end": (Batch({5: (Segment(3, 6, one),)}), "rows 3 to 6 of 5: are no rows"),
        "backwards": (Batch({5: (Segment(3, 2, one),)}), "rows 3 to 2 of 5: are no rows"),
        "before the start": (Batch({5: (Segment(-1, 2, one),)}), "rows -1 to 2 of 5: are no rows"),
    }


@pytest.mark.parametrize("case", batches(*[ServingForm("", {})] * 3))
def test_bad_batches(case: str) -> None:
    model = Head().eval()
    form, strange = random_form(model, "body"), ServingForm("strange", {})
    gained = ServingForm("gained", {"body": SiteForm(gain=torch.ones(12))})
    served = ServedLayers(model)
    served.cover(form)
    served.cover(gained)
    batch, message = batches(form, gained, strange)[case]
    with pytest.raises(StateError, match=re.escape(message)), served.computing(batch):
        raise AssertionError("nothing is computed")
    assert served.batch is None


def test_rows_that_the_batch_does_not_describe() -> None:
    """The base must not answer instead of the adapter."""
    model = Head().eval()
    form = random_form(model, "body", "head")
    served = ServedLayers(model)
    served.cover(form)
    with served.computing(Batch.of([(((form, 1.0),), 4, 2)])):
        model(torch.randn(1, 4, 8), [0, 1])
        with pytest.raises(RowsError, match="body: the layer got 6 rows, and the batch has 2 or 4: whose they are is"):
            model(torch.randn(2, 3, 8), [0])
        with pytest.raises(RowsError, match="head: the layer got 3 rows"):
            model(torch.randn(1, 4, 8), [0, 1, 2])


def test_a_module_whose_rows_are_not_known() -> None:
    """It gives other shapes than it gets, so that no rows of it can be told apart."""

    class Shrinks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x[..., :3] * self.scale

    model = nn.Sequential(Shrinks())
    form = ServingForm("bad", {}, {"0": {"scale": torch.zeros(3)}})
    served = ServedLayers(model)
    served.cover(form)
    with (
        served.computing(Batch.of([(((form, 1.0),), 4, 4)])),
        pytest.raises(
            RowsError, match=r"0: it computes \[1, 4, 8\] to \[1, 4, 3\]: which of it are the rows is not known"
        ),
    ):
        model(torch.randn(1, 4, 8))


def test_a_model_with_an_adapter() -> None:
    with pytest.raises(StateError, match="has an adapter attached"):
        ServedLayers(tiny.trained(tiny.llama()))


# --- planted faults ---------------------------------------------------------------------------------------------------


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "the override of another row": (mixed, "_override", lambda *_: None),
    "no shared projections": (mixed, "_add_shared", lambda *_: None),
    "no scaled RoPE": (mixed, "_rotary", lambda served, covered, step, y, *_: y),
    "the terms of long segments": (cpu, "add_terms", lambda *_: None),
    "the definition": (mixed, "with_terms", lambda kind, layer, y, *_: y),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, wrong = FAULTS[fault]
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError):
        test_every_method_in_one_batch("LlamaForCausalLM", 19)


def test_the_base_keeps_its_parameters_while_rows_have_others() -> None:
    """Other threads read them meanwhile, to form the next adapter."""
    base, ids = seeded("LlamaForCausalLM"), torch.arange(6)[None]
    before = dict(base.named_parameters(remove_duplicate=False))
    form = ServingForm(
        "trained in full", {}, {"model.norm": {"weight": torch.full_like(before["model.norm.weight"], 2)}}
    )
    served, seen = ServedLayers(base), list[bool]()

    def look(*_: Any) -> None:
        now = dict(base.named_parameters(remove_duplicate=False))
        seen.append(now.keys() == before.keys() and all(now[name] is before[name] for name in before))

    base.model.norm.register_forward_pre_hook(look)
    served.cover(form)
    with torch.no_grad(), served.computing(Batch.of([(((form, 1.0),), 6, 6)])):
        doubled = base(ids).logits
    assert seen == [True, True]  # the base's rows, and those of the adapter
    assert not torch.allclose(doubled, base(ids).logits)
