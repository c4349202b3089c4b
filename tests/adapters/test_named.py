"""Adapters by name on one model: what is held, what is active, and what a switch costs."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorary
from lorary import Adapter
from lorary.adapters._held import held_by
from lorary.adapters.compose.mix import mix
from lorary.layers.adapted import adapted_layers
from lorary.model.state import state_of
from tests import tiny
from tests.adapters.test_adapter import LLAMAS, made
from tests.model.test_all_or_nothing import InterruptAt, spread


def of(*words: str, targets: Any = ("q_proj", "down_proj"), seed: int = 0, **options: Any) -> Adapter:
    """A trained adapter of a tiny Llama."""
    method = lorary.method(*words, **options)
    model = tiny.trained(tiny.seeded("LlamaForCausalLM"), method, targets if "r" in options else None)
    return Adapter.of(tiny.shaken(model, seed=seed))


def holding(**adapters: Adapter) -> tuple[Any, lorary.NamedAdapters]:
    model = tiny.seeded("LlamaForCausalLM")
    held = lorary.named_adapters(model)
    held.update(adapters)
    return model, held


def answer(adapters: Any, **options: Any) -> Tensor:
    return tiny.logits(lorary.switch(tiny.seeded("LlamaForCausalLM"), adapters, **options))


def equal(one: Adapter, other: Adapter) -> bool:
    sites = {p.site.name: {role: one.tensors[p.site.name][role] for role in p.stored} for p in one.sites}
    values = [torch.equal(t, other.tensors[site][role]) for site, roles in sites.items() for role, t in roles.items()]
    full = one.full.keys() == other.full.keys() and all(torch.equal(t, other.full[k]) for k, t in one.full.items())
    return full and all(values) and one.sites == other.sites and one.method == other.method


MORE: dict[str, Callable[[], Adapter]] = {
    "norms and lora": lambda: of("lora", r=2, full=("norms",)),
    "adalora": lambda: of("adalora", r=3, target=1),
    "glora": lambda: of("glora", r=2),
    "longlora": lambda: of("longlora", r=2, length=6),
    "the same sites, another rank": lambda: of("lora", r=5, targets="all-linear", seed=8),
}


def test_by_name_from_any_to_any_other() -> None:
    """Of every sort of method: the outputs of the same switch by value, and the base's bit for bit."""
    values = {name: make() for name, make in (LLAMAS | MORE).items()}
    expected = {name: answer(value) for name, value in values.items()}
    model, held = holding(**values)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    plain = tiny.logits(model)
    order = list(values)
    for start in range(0, len(order), 5):
        for name in (order[start], *order, order[start]):
            assert lorary.switch(model, name) is model
            assert held.active == {name: 1.0}
            assert torch.equal(tiny.logits(model), expected[name]), name
        lorary.switch(model, None)
        assert held.active == {}
        assert torch.equal(tiny.logits(model), plain)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    for name, value in values.items():
        assert equal(held[name], value), name


def test_on_a_quantised_base() -> None:
    """A base that the first adapter quantises stays so, and an adapter whose base is the residual goes first."""
    for words in (("qlora",), ("qlora", "dora")):
        adapters = {f"a{i}": of(*words, r=2, seed=i) for i in range(2)}
        model, _ = holding(**adapters)
        for name in ("a0", "a1", "a0"):
            assert torch.equal(tiny.logits(lorary.switch(model, name)), answer(adapters[name]))
    pissa = of("qlora", "pissa", r=2)
    model, held = holding(pissa=pissa, qlora=of("qlora", r=2))
    for name in ("pissa", "qlora"):
        lorary.switch(model, name)
    by_value = lorary.switch(lorary.switch(tiny.seeded("LlamaForCausalLM"), pissa), held["qlora"])
    assert torch.equal(tiny.logits(model), tiny.logits(by_value))


def test_a_base_that_was_kept_plain_is_quantised_as_by_value(tmp_path: Any) -> None:
    """`lorary.load(quantize=False)` leaves a plain base under an adapter of QLoRA; the next switch does not."""
    first, second = of("qlora", r=2, seed=1), of("qlora", r=2, seed=2)
    lorary.save_adapter(first, tmp_path)
    models = [lorary.load(tiny.seeded("LlamaForCausalLM"), tmp_path, quantize=False) for _ in range(2)]
    lorary.named_adapters(models[0])["second"] = second
    one, other = (tiny.logits(lorary.switch(*pair)) for pair in zip(models, ["second", second], strict=True))
    assert torch.equal(one, other)
    assert torch.equal(one, answer(second))


def test_parts_of_fused_and_transposed_layers() -> None:
    """Adapters at the same layers of a GPT-2, one of them at parts of each, and the embedding."""
    values = {
        "parts": made("GPT2LMHeadModel", targets="attention-qv", seed=1),
        "whole": made("GPT2LMHeadModel", "rslora", targets=["c_attn"], seed=2),
        "embedding": made("GPT2LMHeadModel", targets=["embedding", "c_attn"], seed=3),
    }
    model = tiny.seeded("GPT2LMHeadModel")
    lorary.named_adapters(model).update(values)
    for name in ("parts", "whole", "parts", "embedding", "whole"):
        expected = tiny.logits(lorary.switch(tiny.seeded("GPT2LMHeadModel"), values[name]))
        assert torch.equal(tiny.logits(lorary.switch(model, name)), expected), name
    total = lorary.switch(tiny.seeded("GPT2LMHeadModel"), mix(list(values.values()), [1.0, -0.5, 2.0]))
    lorary.switch(model, {"parts": 1.0, "whole": -0.5, "embedding": 2.0})
    assert torch.equal(tiny.logits(model), tiny.logits(total))
    lorary.named_adapters(model).rank = 64
    lorary.switch(model, {"parts": 1.0, "whole": -0.5, "embedding": 2.0})
    torch.testing.assert_close(tiny.logits(model), tiny.logits(total), rtol=1e-5, atol=1e-5)


def test_a_layer_under_two_paths_and_a_tied_one() -> None:
    def base() -> tiny.Twice:
        torch.manual_seed(0)
        return tiny.Twice()

    adapters = [Adapter.of(tiny.shaken(tiny.trained(base()), seed=i)) for i in (1, 2)]
    model = base()
    held = lorary.named_adapters(model)
    held["a"], held["b"] = adapters
    x = torch.randn(3, 4)
    for name, value in [("a", adapters[0]), ("b", adapters[1]), ("a", adapters[0])]:
        assert torch.equal(lorary.switch(model, name)(x), lorary.switch(base(), value)(x))
    assert set(adapted_layers(model)) == {p.site.name for p in adapters[0].sites}


# --- weighted sums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"a": 1, "b": -2.5}, {"c": 0.5}, {"a": 1, "b": 1, "c": 1}])
def test_a_weighted_sum_is_the_mix_by_value(weights: dict[str, float]) -> None:
    adapters = {"a": of("lora", r=2, seed=1), "b": of("pissa", r=3, seed=2), "c": of("vera", r=8, seed=4)}
    model, held = holding(**adapters)
    lorary.switch(model, "a")
    lorary.switch(model, weights)
    assert held.active == weights
    total = mix([adapters[name] for name in weights], list(weights.values()))
    assert torch.equal(tiny.logits(model), answer(total))
    for name, value in adapters.items():
        assert equal(held[name], value), name


def test_the_sum_of_names_is_that_of_adapters() -> None:
    adapters = {"a": of("lora", r=2, seed=1), "b": of("lora", r=2, seed=2, targets="v_proj")}
    model, held = holding(**adapters)
    assert torch.equal(tiny.logits(lorary.switch(model, ["a", "b"])), answer(list(adapters.values())))
    assert held.active == {"a": 1.0, "b": 1.0}


def test_what_has_no_sum_says_why() -> None:
    model, held = holding(plain=of("lora", r=2), dora=of("dora", r=2))
    lorary.switch(model, "plain")
    with pytest.raises(lorary.MethodError, match=r"dora gives its output a gain or a shift of its own \(MagnitudeDir"):
        lorary.switch(model, {"plain": 0.5, "dora": 0.5})
    assert held.active == {"plain": 1.0}
    lorary.switch(model, {"dora": 1.0})  # itself, and no sum


# --- what a switch costs ----------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("words", [("lora",), ("dora",), ("vera",), ("melora",), ("adalora",), ("multilora",)])
def test_between_the_same_sites_nothing_is_copied(words: tuple[str, ...]) -> None:
    """No tensor operation at all but the views by which parameters are read, however large the model is."""
    options = {"vera": {"r": 8}, "melora": {"r": 2, "n": 2}, "adalora": {"r": 3, "target": 1}}.get(words[0], {"r": 2})
    model, _ = holding(a=of(*words, seed=1, **options), b=of(*words, seed=2, **options))
    for name in "aba":
        lorary.switch(model, name)
    before = {name: id(p) for name, p in model.named_parameters() if "params" in name}
    with Operations() as done:
        lorary.switch(model, "b")
    assert {name for name in done.names if "detach" not in name and "alias" not in name} == set()
    lorary.switch(model, "a")
    assert {name: id(p) for name, p in model.named_parameters() if "params" in name} == before


def compiled(model: nn.Module) -> tuple[Any, list[int]]:
    """The model, compiled to nothing, and a list with an entry for every compilation."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True), graphs


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).relu())
        return y


def small(*words: str, seed: int = 0, targets: Any = "all-linear", **options: Any) -> Adapter:
    return Adapter.of(tiny.shaken(tiny.trained(Small(), lorary.method(*words, **options), targets), seed=seed))


@torch.no_grad()
def test_a_compiled_model_is_not_compiled_again() -> None:
    """Equal ranks and scales: never. The base, another rank and another scale: once each."""
    model, graphs = compiled(Small())
    held = lorary.named_adapters(model)
    adapters = {f"a{i}": small("lora", r=2, seed=i) for i in range(3)} | {"large": small("lora", r=3, alpha=9)}
    held.update(adapters)
    x = torch.randn(5, 8)
    lorary.switch(model, "a0")
    model(x)
    for name in ("a1", "a2", "a0"):
        torch.testing.assert_close(lorary.switch(model, name)(x), lorary.switch(Small(), adapters[name])(x))
    assert len(graphs) == 1
    for choice in (None, "large"):
        lorary.switch(model, choice)
        model(x)
    first = len(graphs)
    assert first == 3
    for choice in ("a1", None, "large", "a0"):
        lorary.switch(model, choice)
        model(x)
    assert len(graphs) == first


@torch.no_grad()
def test_padded_sums_of_any_rank_are_compiled_once() -> None:
    model, graphs = compiled(Small())
    held = lorary.named_adapters(model)
    held.update(
        a=small("lora", r=2, seed=1),
        b=small("rslora", r=3, alpha=5, seed=2),
        c=small("pissa", r=2, seed=3, targets="a"),
        d=small("vera", r=4, seed=4),
    )
    assert held.rank is None
    held.rank = 9
    x = torch.randn(5, 8)
    choices: list[Any] = ["a", "b", "c", "d", {"a": 0.7, "b": -0.3}, {"a": 0.1, "b": 0.2, "c": 3.0}, "a"]
    for choice in choices:
        weights = {choice: 1.0} if isinstance(choice, str) else choice
        total = mix([held[name] for name in weights], list(weights.values()))
        found = lorary.switch(model, choice)(x)
        torch.testing.assert_close(found, lorary.switch(Small(), total)(x), rtol=1e-5, atol=1e-5)
        assert held.active == weights
    assert len(graphs) == 1
    held["e"] = small("dora", r=2)  # no LoRA, and a sum of rank 11: as they are
    for choice in ("e", {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}):
        lorary.switch(model, choice)
        model(x)
    assert len(graphs) == 3


# --- training ---------------------------------------------------------------------------------------------------------

TRAINED: dict[str, Callable[[], Adapter]] = {
    "lora": lambda: of("lora", "lora+", r=2),
    "dora": lambda: of("dora", r=2),
    "vera": lambda: of("vera", r=8),
    "pissa": lambda: of("pissa", r=2),
    "norms": lambda: of("lora", r=2, full=("norms",)),
    "qlora": lambda: of("qlora", r=2),
    "adalora": lambda: of("adalora", r=3, target=1, start=1, final=1, every=1),
    "glora's supernet": lambda: of("glora", r=2, supernet=True),
    "adalora and norms": lambda: of("adalora", r=3, target=1, start=1, final=1, every=1, full=("norms",)),
}
STEPS = 6


def run(model: Any, between: Callable[[int], None]) -> list[float]:
    """A training run by hand, interrupted between its steps."""
    optimizer = lorary.optimizer(model.train(), lr=0.01)
    rules = lorary.rules(model, STEPS, optimizer)
    losses = []
    for step in range(STEPS):
        loss = model(input_ids=tiny.ids(), labels=tiny.ids()).loss + rules.penalty()
        loss.backward()
        rules.after_backward()
        optimizer.step()
        rules.after_step()
        optimizer.zero_grad()
        losses.append(loss.item())
        between(step)
    return losses


@pytest.mark.parametrize("name", TRAINED)
def test_training_goes_on_after_others_were_active(name: str) -> None:
    """With the same optimizer and rules, as if nobody had looked at another adapter meanwhile."""
    start, other = TRAINED[name](), of("lora", r=2, seed=5)
    alone = lorary.switch(tiny.seeded("LlamaForCausalLM"), start, trainable=True)
    expected = run(alone, lambda _: None)
    model, held = holding(mine=start, other=other)
    lorary.switch(model, "mine", trainable=True)

    def look_elsewhere(step: int) -> None:
        if step % 2:
            others: list[Any] = ["other", None, {"other": 0.5}]
            before = held["mine"]
            lorary.switch(model, others[step // 2])
            assert equal(held["mine"], before)
            lorary.switch(model, "mine", trainable=True)

    assert run(model, look_elsewhere) == expected
    assert equal(held["mine"], Adapter.of(alone))
    assert equal(held["mine"], Adapter.of(model))
    assert not equal(held["mine"], start)
    assert (held["mine"].sites != start.sites) == name.startswith("adalora")  # its pruned ranks
    assert equal(held["other"], other)


def test_only_what_the_method_trains_requires_gradients() -> None:
    model, _ = holding(fa=of("lora-fa", r=2), other=of("lora", r=2))
    lorary.switch(model, "other")
    assert not any(p.requires_grad for p in model.parameters())
    lorary.switch(model, "fa", trainable=True)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"B"}
    lorary.switch(model, "fa")
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("end", ["detach", "merge", "by value", "kept merge"])
@pytest.mark.parametrize("name", ["lora", "pissa", "norms"])
def test_what_was_trained_is_kept_whatever_takes_it_off(name: str, end: str) -> None:
    model, held = holding(mine=TRAINED[name]())
    tiny.shaken(lorary.switch(model, "mine", trainable=True), seed=9)
    now = Adapter.of(model)
    if end == "detach":
        lorary.detach(model)
    elif end == "merge":
        lorary.merge(model)
    elif end == "kept merge":
        lorary.merge(model, keep=True)
        lorary.unmerge(model)
    else:
        lorary.switch(model, of("lora", r=2, seed=5))
        assert held.active == {}
    assert equal(held["mine"], now)
    if end == "merge":  # the base is another one now
        with pytest.raises(lorary.FileError, match="other weights"):
            lorary.switch(model, "mine")
    else:
        assert torch.equal(tiny.logits(lorary.switch(model, "mine")), answer(now))


def test_a_trained_mix_has_no_parents_any_more() -> None:
    total = mix([of("lora", r=2, seed=1), of("lora", r=2, seed=2)], [0.5, 0.5])
    model, held = holding(mix=total, other=of("lora", r=2))
    for name in ("mix", "other"):
        lorary.switch(model, name)
    assert held["mix"].provenance == total.provenance
    lorary.switch(model, "mix", trainable=True)
    run(model, lambda _: None)
    assert held["mix"].provenance is None


def test_a_value_follows_nothing() -> None:
    """What goes in and what comes out are copies."""
    value = of("lora", r=2)
    model, held = holding(a=value)
    out = held["a"]
    tiny.shaken(lorary.switch(model, "a", trainable=True))
    assert equal(out, value)
    assert not equal(held["a"], value)


# --- names ------------------------------------------------------------------------------------------------------------


def test_it_is_a_mapping_of_the_model() -> None:
    a, b = of("lora", r=2, seed=1), of("lora", r=2, seed=2)
    model, held = holding(a=a, b=b)
    assert list(held) == ["a", "b"]
    assert len(held) == 2
    assert "a" in held
    assert "c" not in held
    assert held.get("c") is None
    assert held == lorary.named_adapters(torch.compile(model, backend="eager"))
    assert held != lorary.named_adapters(tiny.seeded("LlamaForCausalLM"))
    assert repr(held) == "NamedAdapters(['a', 'b'], active={})"
    held["c"] = held.pop("a")
    assert list(held) == ["b", "c"]
    assert equal(held["c"], a)
    lorary.switch(model, "b")
    lorary.attached(model)
    held.rename("b", "me/b-2")
    assert list(held) == ["me/b-2", "c"]
    assert held.active == {"me/b-2": 1.0}
    held.rename("me/b-2", "me/b-2")
    del held["c"]
    assert list(lorary.named_adapters(model)) == ["me/b-2"]
    assert not any("held" in name for name in model.state_dict())


def test_setting_an_active_name_replaces_it_at_once() -> None:
    a, b, c = (of("lora", r=2, seed=i) for i in range(3))
    model, held = holding(x=a, y=b)
    lorary.switch(model, "x")
    held["x"] = c
    assert torch.equal(tiny.logits(model), answer(c))
    lorary.switch(model, {"x": 0.5, "y": 2.0})
    held["y"] = of("pissa", r=2)
    assert held.active == {"x": 0.5, "y": 2.0}
    assert torch.equal(tiny.logits(model), answer(mix([held["x"], held["y"]], [0.5, 2.0])))
    assert list(held) == ["x", "y"]


def test_a_replacement_that_fails_leaves_the_one_before() -> None:
    model, held = holding(x=of("lora", r=2, seed=1), y=of("lora", r=2, seed=2))
    lorary.switch(model, {"x": 0.5, "y": 2.0})
    before, value = outline(model, held), held["x"]
    with pytest.raises(lorary.MethodError, match=r"x gives its output a gain or a shift of its own \(MagnitudeDir"):
        held["x"] = of("dora", r=2)
    assert outline(model, held) == before
    assert equal(held["x"], value)


def test_another_base_with_force() -> None:
    other = tiny.trained(tiny.seeded("LlamaForCausalLM", seed=1), lorary.method("lora", r=2))
    model = tiny.seeded("LlamaForCausalLM")
    held = lorary.named_adapters(model, force=True)
    held["other"] = Adapter.of(other)
    held["own"] = of("lora", r=2)
    for name in ("other", "own", "other"):
        lorary.switch(model, name)
    assert held.active == {"other": 1.0}


def outline(model: nn.Module, held: lorary.NamedAdapters) -> tuple[Any, ...]:
    """What a failed call must leave as it was."""
    state = state_of(model)
    return (
        list(held),
        held.active,
        {name: id(p) for name, p in model.named_parameters()},
        state and (state.method, state.sites, id(state.holder)),
        tiny.logits(model).tolist(),
    )


BAD: dict[str, tuple[type[Exception], str, Callable[[Any, Any], Any]]] = {
    "an unknown name": (
        lorary.FileError,
        "under this name.*\n.*did you mean `french`",
        lambda m, h: lorary.switch(m, "frnch"),
    ),
    "a path": (
        lorary.FileError,
        "a str is not an adapter\n.*load_adapter",
        lambda m, h: lorary.switch(m, "../runs/fr"),
    ),
    "a name that is no text": (lorary.FileError, "a int is not an adapter", lambda m, h: lorary.switch(m, {3: 1.0})),
    "nothing": (lorary.FileError, "no name is given\n.*None is the base", lambda m, h: lorary.switch(m, {})),
    "NaN": (lorary.FileError, "weight is nan, not a finite", lambda m, h: lorary.switch(m, {"french": math.nan})),
    "infinity": (lorary.FileError, "is -inf, not a finite", lambda m, h: lorary.switch(m, {"french": -math.inf})),
    "400 digits": (lorary.FileError, "0, not a finite", lambda m, h: lorary.switch(m, {"french": 10**400})),
    "beyond 32 bits": (
        lorary.MethodError,
        "too large for 32-bit numbers",
        lambda m, h: lorary.switch(m, {"french": 1e39, "legal": 1.0}),
    ),
    "a weight that is text": (lorary.FileError, "is '1', not a finite", lambda m, h: lorary.switch(m, {"french": "1"})),
    "a weight that is a flag": (lorary.FileError, "is True, not a", lambda m, h: lorary.switch(m, {"french": True})),
    "all at once": (
        lorary.FileError,
        "(?s)'x': the model.*'french': its weight is nan",
        lambda m, h: lorary.switch(m, {"x": 1, "french": math.nan}),
    ),
    "weights of 0": (lorary.MethodError, "are all 0", lambda m, h: lorary.switch(m, {"french": 0.0, "legal": 0.0})),
    "twice": (lorary.FileError, "'french': is named twice", lambda m, h: lorary.switch(m, ["french", "french"])),
    "names and adapters": (
        lorary.FileError,
        "'french': is not an adapter",
        lambda m, h: lorary.switch(m, ["french", 3]),
    ),
    "a sum that trains": (
        lorary.StateError,
        "a weighted sum cannot train",
        lambda m, h: lorary.switch(m, {"french": 0.5, "legal": 0.5}, trainable=True),
    ),
    "half of one that trains": (
        lorary.StateError,
        "a weighted sum cannot train",
        lambda m, h: lorary.switch(m, {"french": 0.5}, trainable=True),
    ),
    "reading an unknown one": (KeyError, "^no such adapter:\n.*'x': the model holds no adapter", lambda m, h: h["x"]),
    "dropping an unknown one": (lorary.StateError, "did you mean `legal`", lambda m, h: h.pop("legl")),
    "dropping the active one": (lorary.StateError, "'french': is active", lambda m, h: h.pop("french")),
    "replacing one that trains": (
        lorary.StateError,
        "is being trained: an optimizer may hold",
        lambda m, h: (lorary.switch(m, "french", trainable=True), h.update(french=h["legal"])),
    ),
    "renaming an unknown one": (lorary.StateError, "holds no adapter", lambda m, h: h.rename("x", "y")),
    "a name that is taken": (lorary.FileError, "is the name of another", lambda m, h: h.rename("french", "legal")),
    "renaming to a path": (lorary.FileError, "would lead out of", lambda m, h: h.rename("french", "../x")),
    "a folder's name": (
        lorary.FileError,
        "a str is not an adapter\n.*load_adapter",
        lambda m, h: h.update(x="runs/fr"),
    ),
    "a model": (lorary.FileError, "a LlamaForCausalLM is not an adapter", lambda m, h: h.update(x=m)),
    "a rank that is no number": (lorary.MethodError, "rank: is 0", lambda m, h: setattr(h, "rank", 0)),
    "another base": (
        lorary.FileError,
        "(?s)the adapter 'x' does not fit.*other weights.*force=True",
        lambda m, h: h.update(x=Adapter.of(tiny.trained(tiny.seeded("LlamaForCausalLM", seed=1)))),
    ),
    "another architecture": (
        lorary.FileError,
        "(?s)does not fit.*the model has no such module",
        lambda m, h: h.update(x=made("GPT2LMHeadModel")),
    ),
    "other shapes, in place of the active one": (
        lorary.FileError,
        "(?s)does not fit.*has 16 input features, expected 32",
        lambda m, h: h.update(
            french=Adapter.of(tiny.trained(tiny.seeded("LlamaForCausalLM", hidden_size=32), targets="q_proj"))
        ),
    ),
    "an unknown name of Transformers'": (
        lorary.StateError,
        "x is not supported: one adapter.*\n.*lorary.named_adapters",
        lambda m, h: m.set_adapter("x"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_call_changes_nothing(case: str) -> None:
    error, sentence, call = BAD[case]
    model, held = holding(french=of("lora", r=2, seed=1), legal=of("lora", r=2, seed=2))
    lorary.switch(model, "french")
    before = outline(model, held)
    with pytest.raises(error, match=sentence) as refusal:
        call(model, held)
    assert isinstance(refusal.value, lorary.LoraryError)
    assert outline(model, held) == before


@pytest.mark.parametrize(
    "name", ["", " fr", "a\nb", "a\x1b[31m", "..", "a/../b", "/etc/passwd", "a//b", "c:\\x", "x" * 201, 3, None]
)
def test_what_is_not_a_name(name: Any) -> None:
    _, held = holding()
    with pytest.raises(lorary.FileError, match="not a name") as refusal:
        held[name] = of("lora", r=2)
    assert "\x1b" not in str(refusal.value)
    assert len(held) == 0


@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_a_model_in_another_state(state: str) -> None:
    model, held = holding(a=of("lora", r=2, full=("norms",)), b=of("lora", r=2, seed=2))
    lorary.switch(model, "a")
    if state == "merged":
        lorary.merge(model, keep=True)
        with pytest.raises(lorary.StateError, match=r"is merged\n.*unmerge it first"):
            lorary.switch(model, "b")
        lorary.unmerge(model)
    else:
        with lorary.disabled(model):
            with pytest.raises(lorary.StateError, match="leave the `disabled` block first"):
                lorary.switch(model, "b")
            with pytest.raises(lorary.StateError, match="leave the `disabled` block first"):
                held["a"]
    lorary.switch(model, "b")


def test_what_cannot_hold_adapters() -> None:
    for what, sentence in ((3, "not a torch.nn.Module"), (None, "not a torch.nn.Module")):
        with pytest.raises(lorary.StateError, match=sentence):
            lorary.named_adapters(what)  # type: ignore[arg-type]
    model = tiny.model("LlamaForCausalLM", "meta")
    with pytest.raises(lorary.FileError, match="is on the meta device"):
        lorary.named_adapters(model)["a"] = of("lora", r=2)


# --- all or nothing ---------------------------------------------------------------------------------------------------

SWITCHES: dict[str, tuple[dict[str, Callable[[], Adapter]], Any, Any]] = {
    "the same sites": ({"a": lambda: of("lora", r=2), "b": lambda: of("dora", r=2)}, "a", "b"),
    "another method": ({"a": lambda: of("lora", r=2, full=("norms",)), "b": lambda: of("pissa", r=2)}, "a", "b"),
    "a sum": ({"a": lambda: of("lora", r=2), "b": lambda: of("lora", r=2, seed=5)}, "a", {"a": 0.5, "b": 0.5}),
}


@pytest.mark.parametrize("case", SWITCHES)
def test_an_interrupt_anywhere_leaves_one_or_the_other(case: str) -> None:
    adapters, start, end = SWITCHES[case]
    values = {name: make() for name, make in adapters.items()}

    def fresh() -> tuple[Any, lorary.NamedAdapters]:
        torch.manual_seed(0)
        model = tiny.seeded("LlamaForCausalLM", num_hidden_layers=1)
        held = lorary.named_adapters(model, force=True)
        held.update({name: one_layer(value) for name, value in values.items()})
        return lorary.switch(model, start), held

    def one_layer(value: Adapter) -> Adapter:
        import dataclasses

        sites = tuple(p for p in value.sites if ".layers.0." in p.site.name)
        full = {name: t for name, t in value.full.items() if ".layers.1." not in name}
        tensors = {p.site.name: value.tensors[p.site.name] for p in sites}
        return dataclasses.replace(value, sites=sites, tensors=tensors, full=full)

    model, held = fresh()
    before, known = tiny.logits(model), held.active
    with InterruptAt() as lines:
        lorary.switch(model, end)
    after, new = tiny.logits(model), held.active
    for number in spread(lines.count, 25):
        model, held = fresh()
        with pytest.raises(KeyboardInterrupt), InterruptAt(number):
            lorary.switch(model, end)
        found = tiny.logits(model)
        assert (torch.equal(found, before) and held.active == known) or (
            torch.equal(found, after) and held.active == new
        ), number
        for name, value in values.items():
            assert equal(held[name], one_layer(value))
        assert torch.equal(tiny.logits(lorary.switch(model, end)), after)


def test_equal_projections_are_held_once() -> None:
    """Those of VeRA come from a seed, and are most of its tensors."""

    def projected(seed: int, shake: int) -> Adapter:
        model = tiny.trained(tiny.seeded("LlamaForCausalLM"), lorary.method("vera", r=8, seed=seed), "q_proj")
        return Adapter.of(tiny.shaken(model, seed=shake))

    values = {"a": projected(0, 1), "b": projected(0, 2), "c": projected(1, 3)}
    model, held = holding(**values)
    for choice in ("a", "b", "c", None, "b", "a"):
        lorary.switch(model, choice)
        assert choice is None or torch.equal(tiny.logits(model), answer(values[choice]))
    assert all(equal(held[name], value) for name, value in values.items())
    mine = held_by(model)
    assert mine["a"].shared is mine["b"].shared
    assert mine["a"].shared is not mine["c"].shared
    assert {id(layer.shared) for layer in adapted_layers(model).values()} == {id(mine["a"].shared)}


# --- copies, wrappers, moves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["lora", "pissa"])
def test_a_copy_of_the_model_holds_copies(name: str, way: str) -> None:
    model, held = holding(mine=TRAINED[name](), other=of("lora", r=2, seed=5))
    lorary.switch(model, "mine", trainable=True)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    its = lorary.named_adapters(twin)
    assert list(its) == ["mine", "other"]
    assert its.active == {"mine": 1.0}
    before = held["mine"]
    tiny.shaken(twin)
    now = Adapter.of(twin)
    for choice in ("other", "mine"):
        lorary.switch(twin, choice)
    assert equal(its["mine"], now)
    assert not equal(now, before)
    assert equal(held["mine"], before)
    assert equal(Adapter.of(model), before)


def test_a_model_that_moves_takes_its_adapters_along() -> None:
    """Inactive ones follow when they are used; adapters are in 32 bits, as by value."""
    a, b = of("lora", r=2, seed=1), of("vera", r=8, seed=2)
    model, _ = holding(a=a, b=b, c=of("lora", r=2, seed=3))
    lorary.switch(model, "a")
    model.to(torch.float64)
    for name, value in (("b", b), ("a", a), ("b", b)):
        lorary.switch(model, name)
        assert {p.dtype for layer in adapted_layers(model).values() for p in layer.params.values()} == {torch.float32}
        other = lorary.switch(tiny.seeded("LlamaForCausalLM").to(torch.float64), value)
        assert torch.equal(tiny.logits(model), tiny.logits(other))


def test_in_a_cached_block() -> None:
    a, b = of("dora", r=2, seed=1), of("dora", r=2, seed=2)
    model, _ = holding(a=a, b=b)
    lorary.switch(model, "a")
    with lorary.cached(model):
        for name, value in (("a", a), ("b", b), ("a", a)):
            assert torch.equal(tiny.logits(lorary.switch(model, name)), answer(value))


def test_data_parallel_and_compiled_wrappers() -> None:
    a, b = of("lora", r=2, seed=1), of("lora", r=2, seed=2)
    model, held = holding(a=a, b=b)
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    assert lorary.switch(wrapped, "b") is wrapped
    assert torch.equal(tiny.logits(model), answer(b))
    assert lorary.named_adapters(wrapped).active == held.active == {"b": 1.0}


# --- in Transformers' words -------------------------------------------------------------------------------------------


def test_transformers_methods_know_the_names(tmp_path: Any) -> None:
    a, b = of("lora", r=2, seed=1), of("lora", r=2, seed=2)
    model, held = holding(a=a, b=b)
    lorary.switch(model, "a")
    model.set_adapter("b")
    assert held.active == {"b": 1.0}
    assert any(p.requires_grad for p in model.parameters())
    model.set_adapter(["a", "b"])
    assert torch.equal(tiny.logits(model), answer([a, b]))
    model.set_adapter("b", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    lorary.save_adapter(b, tmp_path / "b")
    model.load_adapter(tmp_path / "b", "a")
    assert equal(held["a"], lorary.load_adapter(tmp_path / "b"))
    model.delete_adapter("a")
    assert list(held) == ["b"]
    with pytest.raises(lorary.StateError, match="'b': is active"):
        model.delete_adapter(["b"])
    lorary.save_adapter(a, tmp_path / "a")
    model.load_adapter(tmp_path / "a")  # as a trainer reads the best checkpoint back, in place
    assert equal(held["b"], a)
    assert model.active_adapters == ["default"]  # the attached one, whatever its name: what trainers ask for
