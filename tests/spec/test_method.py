"""Methods as values: what may be said, what contradicts itself, and what a file may hold."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch

import lorary
from lorary.errors import MethodError, PlanError
from lorary.methods.adalora import SVDDelta
from lorary.methods.lora import AlphaOverRank, ConstantScale, Gaussian, Kaiming, LowRank
from lorary.methods.o_lora import OrthogonalToPast, SequentialLoRA
from lorary.spec import interfaces, presets
from lorary.spec.interfaces import Rule, Unquantized
from lorary.spec.method import Method


def said(*names: Any, **options: Any) -> str:
    """The whole message with which a method is refused, lists of all components and presets left out."""
    with pytest.raises(MethodError) as refusal:
        lorary.method(*names, **options)
    return shortened(refusal.value)


def shortened(error: MethodError) -> str:
    """An error's message with `...` for the lists that grow with every method."""
    text = str(error).replace(", ".join(sorted(interfaces.COMPONENTS)), "...")
    return text.replace(", ".join(sorted(presets.PRESETS)), "...")


# --- contradictions, each with its whole sentence --------------------------------------------------------------------

_INVALID = "invalid method:\n  - "


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (
            ["lroa"],
            {},
            f"{_INVALID}'lroa': is not a method that lorary knows\n"
            "      hint: did you mean `lora` or `loha` or `qlora`?",
        ),
        (
            ["mixture"],
            {},
            f"{_INVALID}'mixture': is not a method that lorary knows\n      hint: known: ...",
        ),
        (
            [None],
            {},
            f"{_INVALID}None: is not a method that lorary knows\n      hint: known: ...",
        ),
        (
            ["lora"],
            {"dropuot": 0.1},
            f"{_INVALID}dropuot: is not an option of lora\n      hint: did you mean `dropout`?",
        ),
        (
            ["rslora"],
            {"ratio": 2},
            f"{_INVALID}ratio: is not an option of lora + rslora\n      hint: known: alpha, context, delta, dropout, "
            "frozen, full, init, join, lora_bias, lr, r, rules, scale, storage",
        ),
        (
            ["rslora"],
            {"scale": AlphaOverRank(3)},
            f"{_INVALID}scale: rslora and you both choose the scale: AlphaOverSqrtRank and AlphaOverRank\n"
            "      hint: leave one of the two out",
        ),
        (["lora+"], {"lr": {"B": 2}}, f"{_INVALID}lr: lora+ and you both set the rate of B"),
        (
            ["lora"],
            {"r": 0},
            f"{_INVALID}delta: LowRank has r = 0; it takes a whole number of at least 1",
        ),
        (["lora"], {"r": 8.0}, f"{_INVALID}delta: LowRank has r = 8.0; it takes a whole number of at least 1"),
        (["lora"], {"r": True}, f"{_INVALID}delta: LowRank has r = True; it takes a whole number of at least 1"),
        (
            ["lora"],
            {"alpha": "32"},
            f"{_INVALID}scale: AlphaOverRank has alpha = '32'; it takes a positive finite number",
        ),
        (
            ["rslora"],
            {"alpha": float("nan")},
            f"{_INVALID}scale: AlphaOverSqrtRank has alpha = nan; it takes a positive finite number",
        ),
        (["lora"], {"dropout": 1}, f"{_INVALID}dropout: 1 is not a probability in [0, 1)"),
        (["lora"], {"dropout": -0.1}, f"{_INVALID}dropout: -0.1 is not a probability in [0, 1)"),
        (["lora"], {"dropout": None}, f"{_INVALID}dropout: None is not a probability in [0, 1)"),
        (["lora+"], {"ratio": 0}, f"{_INVALID}lr: the multiplier of B is 0, not a positive number"),
        (["lora"], {"lr": {"C": 3}}, f"{_INVALID}lr: sets a learning rate for {{C}}, but only {{A, B}} trains"),
        (
            ["lora-fa"],
            {"lr": {"A": 3}},
            f"{_INVALID}lr: sets a learning rate for {{A}}, but only {{B}} trains",
        ),
        (
            ["lora+", "lora-fa"],
            {},
            f"{_INVALID}lr: a learning-rate ratio has no effect: {{B}} is the only trained tensor\n"
            "      hint: set the learning rate itself, without a multiplier",
        ),
        (["lora-fa"], {"frozen": "B"}, f"{_INVALID}frozen: everything is frozen: nothing would train"),
        (["lora"], {"frozen": {"E"}}, f"{_INVALID}frozen: {{E}} cannot be frozen: the tensors are {{A, B}}"),
        (
            ["lora", "full"],
            {},
            f"{_INVALID}full: every base weight trains in full, so LowRank would be redundant\n"
            "      hint: use one of the two",
        ),
        (["lora"], {"full": ("",)}, f"{_INVALID}full: '' is not a pattern over parameter names"),
        (
            ["lora"],
            {"init": AlphaOverRank(3)},
            f"{_INVALID}init: AlphaOverRank(alpha=3) is not a component of this axis",
        ),
        (["lora"], {"scale": Kaiming()}, f"{_INVALID}scale: Kaiming() is not a component of this axis"),
        (["lora"], {"init": Gaussian}, f"{_INVALID}init: {Gaussian!r} is not a component of this axis"),
        (["lora"], {"storage": None}, f"{_INVALID}storage: None is not a component of this axis"),
        (["lora"], {"rules": (Unquantized(),)}, f"{_INVALID}rules: Unquantized() is not a component of this axis"),
        (
            ["bitfit"],
            {"frozen": {"A"}, "dropout": 0.5},
            f"{_INVALID}frozen: has no effect: this method adapts no layer\n"
            "  - dropout: has no effect: this method adapts no layer",
        ),
    ],
)
def test_contradictions(names: list[Any], options: dict[str, Any], message: str) -> None:
    assert said(*names, **options) == message


def test_every_unknown_name_and_option_is_told_at_once() -> None:
    assert said("lroa", "dora2", r=4, rr=3, alhpa=1).count("\n  - ") == 4


def test_every_contradiction_is_told_at_once() -> None:
    message = said("lora", r=-1, alpha=0, dropout=2, lr={"A": -3})
    for axis in ("delta", "scale", "dropout", "lr"):
        assert f"  - {axis}: " in message


def test_nothing_said_at_all() -> None:
    with pytest.raises(MethodError, match="nothing would train: there is no delta, and `full` is empty"):
        Method()


def test_a_delta_needs_the_other_three() -> None:
    with pytest.raises(MethodError) as refusal:
        Method(delta=LowRank(3))
    assert [p.where for p in refusal.value.problems] == ["init", "scale", "join"]


@dataclasses.dataclass(frozen=True)
class Triple(interfaces.Delta):
    """A delta with a third tensor, which no init of the library fills."""

    r: int = 1
    roles = frozenset({"A", "B", "E"})

    def shapes(self, site: Any) -> interfaces.Shapes:
        return {"A": (self.r, site.in_features), "B": (site.out_features, self.r), "E": (self.r,)}

    def factors(self, site: Any, p: interfaces.Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        return p["B"] * p["E"], p["A"]


@dataclasses.dataclass(frozen=True)
class Halved(interfaces.Init):
    """An init that starts away from zero: A is ones and B a half, so the base must give it up."""

    fills = frozenset({"A", "B"})
    residual_init = True

    def __call__(self, p: Any, W: torch.Tensor, site: Any, scale: float, generator: torch.Generator) -> None:
        p["A"].fill_(1.0)
        p["B"].fill_(0.5)


@dataclasses.dataclass(frozen=True)
class Writer(Rule):
    """A rule that writes the base and wants a tensor E."""

    needs = frozenset({"E"})
    writes_base = True

    def start(self, layers: Any, steps: int) -> dict[str, torch.Tensor]:
        return {}

    def penalty(self, layers: Any, state: Any) -> float:
        return 0.0

    def after_backward(self, layers: Any, state: Any, step: int) -> None: ...

    def after_step(self, layers: Any, state: Any, step: int, run: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Sealed(interfaces.Storage):
    """A storage that cannot be written."""

    writable = False


@pytest.fixture
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (Triple, Halved, Writer, Sealed):
        monkeypatch.setitem(interfaces.COMPONENTS, cls.__name__, cls)


@pytest.mark.usefixtures("_known")
def test_contradictions_between_components_of_other_papers() -> None:
    assert said("lora", delta=Triple()) == f"{_INVALID}init: Kaiming fills {{A, B}}; Triple has {{A, B, E}}"
    assert said("lora", rules=[Writer()], storage=Sealed()) == (
        f"{_INVALID}rules: Writer needs {{E}}; LowRank has {{A, B}}\n"
        "  - rules: Writer updates the base weight, and Sealed weights are frozen"
    )
    assert said("lora", init=Halved(), dropout=0.1) == (
        f"{_INVALID}dropout: Halved moves part of W into B A, and dropout would drop that part of W\n"
        "      hint: set dropout=0"
    )


# --- a value ---------------------------------------------------------------------------------------------------------

METHODS = [
    lorary.method("lora"),
    lorary.method("rslora", "lora+", r=3, alpha=1.5, dropout=0.5, ratio=4),
    lorary.method("lora-fa", full=("embed_tokens", "*.norm.*")),
    lorary.method("lora", scale=ConstantScale(2.5), init=Gaussian(), lr={"A": 0.5, "B": 8}),
    lorary.method("bitfit"),
    lorary.method("full"),
    lorary.method("dora", "pissa", "rslora", "lora+", r=3, niter=2, exact=True),
    lorary.method("olora", "lora-fa", divide=True),
    lorary.method("qlora", "dora", "pissa", r=3, double=False, block=128, compute="bfloat16", rounds=5),
    lorary.method("qlora", "vera", r=3, embeddings=True),
    lorary.method("vera", "dora", r=5, seed=7, d=0.5, save_projections=False),
    lorary.method("melora", "lora+", r=3, n=4),
    lorary.method("multilora", "rslora", r=3, n=4),
    lorary.method("adalora", "lora+", r=6, target=3, start=0.25, final=40, every=10, form="paper"),
    lorary.method("adalora", target=2).replace(delta=SVDDelta(12, kept=0)),
    lorary.method("delta-lora", "rslora", r=3, ratio=0.5, start=7),
    lorary.method("delta-lora", mode="paper", start=-1),
    lorary.method("o-lora", "lora-fa", r=3, hard=True),
    lorary.method("o-lora", weight=2, form="paper", mean=False).replace(delta=SequentialLoRA(3, past=(8, 2))),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_written_as_json_and_read_back_it_is_the_same(method: Method) -> None:
    text = json.dumps(method.to_dict())
    assert Method.from_dict(json.loads(text)) == method


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_equal_methods_have_equal_hashes(method: Method) -> None:
    again = Method.from_dict(method.to_dict())
    assert hash(again) == hash(method)
    assert len({again, method}) == 1
    assert pickle.loads(pickle.dumps(method)) == method


def test_methods_differ_in_every_axis() -> None:
    one = lorary.method("lora")
    others = [
        one.replace(delta=LowRank(8)),
        one.replace(init=Gaussian()),
        one.replace(scale=AlphaOverRank(31)),
        one.replace(frozen={"A"}),
        one.replace(lr={"B": 2}),
        one.replace(full="bias"),
        one.replace(dropout=0.1),
        one.replace(rules=[OrthogonalToPast()]),
    ]
    assert len({one, *others}) == 9


def test_a_delta_that_calls_a_and_b_by_other_names_takes_presets_that_speak_of_them() -> None:
    """AdaLoRA's Q is A and its P is B, in rates and in what is frozen; its own names are taken as they are."""
    method = lorary.method("adalora").replace(rules=())
    assert method.replace(lr={"B": 4, "A": 2}) == method.replace(lr={"P": 4, "Q": 2})
    assert method.replace(frozen="A") == method.replace(frozen="Q")
    assert method.replace(frozen="A").trained == {"P", "E"}
    assert Method.from_dict(method.replace(lr={"B": 4}).to_dict()).lr == (("P", 4),)


def test_what_is_given_is_no_inits_to_fill_and_never_trains() -> None:
    method = lorary.method("delta-lora")
    assert method.roles == {"A", "B", "A_K", "B_K", "lam"}
    assert method.trained == {"A", "B"}
    assert method.delta.fixed_roles == {"A_K", "B_K", "lam"}
    assert lorary.method("delta-lora", start=-1).delta.fixed_roles == frozenset()
    later = lorary.method("o-lora").replace(delta=SequentialLoRA(8, past=(8,)))
    assert later.trained == {"A", "B"}
    assert later.delta.fixed_roles == {"A_past", "B_past"}


def test_the_order_of_rates_and_frozen_roles_does_not_matter() -> None:
    a = lorary.method("lora", lr={"A": 2, "B": 3})
    b = lorary.method("lora", lr={"B": 3, "A": 2})
    assert a == b
    assert a.rate("A") == 2
    assert a.rate("B") == 3
    assert lorary.method("lora").rate("B") == 1


def test_a_method_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        lorary.method("lora").dropout = 0.5  # type: ignore[misc]


def test_but_changes_only_what_is_said_and_checks_again() -> None:
    method = lorary.method("rslora", r=4)
    assert method.replace(dropout=0.5) == lorary.method("rslora", r=4, dropout=0.5)
    assert method.replace() == method
    with pytest.raises(MethodError) as refusal:
        method.replace(scael=AlphaOverRank(3))
    assert str(refusal.value) == f"{_INVALID}scael: is not an axis of a method\n      hint: did you mean `scale`?"
    with pytest.raises(MethodError, match="is not a probability"):
        method.replace(dropout=3)


def test_one_name_stands_for_a_set_of_one() -> None:
    assert lorary.method("lora", frozen="A").frozen == {"A"}
    assert lorary.method("lora", full="bias").full == ("bias",)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (
            lorary.method("lora"),
            "Method\n"
            "  delta    LowRank(r=16)\n"
            "  init     Kaiming()\n"
            "  scale    AlphaOverRank(alpha=32.0) -> s = 2\n"
            "  join     Add()\n"
            "  trains   {A, B}",
        ),
        (
            lorary.method("rslora", "lora+", r=4, alpha=8, dropout=0.1, full=("bias", "norm")),
            "Method\n"
            "  delta    LowRank(r=4)\n"
            "  init     Kaiming()\n"
            "  scale    AlphaOverSqrtRank(alpha=8) -> s = 4\n"
            "  join     Add()\n"
            "  lr       B x16\n"
            "  full     bias, norm\n"
            "  dropout  0.1\n"
            "  trains   {A, B} and base parameters bias, norm",
        ),
        (
            lorary.method("lora-fa"),
            "Method\n"
            "  delta    LowRank(r=16)\n"
            "  init     Kaiming()\n"
            "  scale    AlphaOverRank(alpha=32.0) -> s = 2\n"
            "  join     Add()\n"
            "  frozen   {A}\n"
            "  trains   {B}",
        ),
        (lorary.method("bitfit"), "Method\n  full     bias\n  trains   base parameters bias"),
    ],
)
def test_printed(method: Method, text: str) -> None:
    assert str(method) == text


# --- records from files ----------------------------------------------------------------------------------------------

_LORA = lorary.method("lora").to_dict()
_RECORD = "invalid method record:\n  - "
_COMPONENTS = "      hint: known: ..."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "invalid method record:\n  - method: found list"),
        (None, "invalid method record:\n  - method: found NoneType"),
        (_LORA | {"dleta": None}, f"{_RECORD}dleta: is not an axis of a method\n      hint: did you mean `delta`?"),
        (
            _LORA | {"init": {"component": "Kaimign"}},
            f"{_RECORD}init: 'Kaimign' is not a known component\n      hint: did you mean `Kaiming`?",
        ),
        (_LORA | {"delta": 5}, f"{_RECORD}delta: 5 is not a known component\n{_COMPONENTS}"),
        (
            _LORA | {"delta": {"component": ["LowRank"]}},
            f"{_RECORD}delta: ['LowRank'] is not a known component\n      hint: did you mean `LowRank`?",
        ),
        (_LORA | {"delta": {"component": "LowRank"}}, f"{_RECORD}delta: missing 1 required positional argument: 'r'"),
        (
            _LORA | {"delta": {"component": "LowRank", "r": 3, "bias": "all"}},
            f"{_RECORD}delta: LowRank has no field `bias`\n      hint: known: r",
        ),
        (
            _LORA | {"delta": {"component": "LowRank", "r": [3]}},
            f"{_INVALID}delta: LowRank has r = (3,); it takes a whole number of at least 1",
        ),
        (
            _LORA | {"delta": {"component": "SequentialLoRA", "r": 3, "past": 8}},
            f"{_INVALID}delta: SequentialLoRA has past = 8; it takes whole numbers of at least 1",
        ),
        (
            _LORA | {"delta": {"component": "SequentialLoRA", "r": 3, "past": [8, [8]]}},
            f"{_INVALID}delta: SequentialLoRA has past = (8, [8]); it takes whole numbers of at least 1",
        ),
        (
            _LORA | {"rules": [{"component": "OrthogonalToPast", "form": ["paper"]}]},
            f"{_INVALID}rules: OrthogonalToPast has form = ('paper',); it takes authors or paper",
        ),
        (
            _LORA | {"rules": [{"component": "RankBudget", "target": 3, "until": 5}]},
            f"{_RECORD}rules[0]: RankBudget has no field `until`\n"
            "      hint: known: beta1, beta2, every, final, start_at, target",
        ),
        (_LORA | {"delta": {"component": "Kaiming"}}, f"{_INVALID}delta: Kaiming() is not a component of this axis"),
        (_LORA | {"scale": {"component": "Kaiming"}}, f"{_INVALID}scale: Kaiming() is not a component of this axis"),
        (_LORA | {"storage": None}, f"{_RECORD}storage: None is not a known component\n{_COMPONENTS}"),
        (_LORA | {"frozen": "A"}, f"{_RECORD}frozen: expected list, found str"),
        (_LORA | {"frozen": [["A"]]}, f"{_RECORD}frozen: expected names, found [['A']]"),
        (_LORA | {"full": [1]}, f"{_RECORD}full: expected names, found [1]"),
        (_LORA | {"lr": [["B", 2]]}, f"{_RECORD}lr: expected dict, found list"),
        (_LORA | {"lr": {"B": "fast"}}, f"{_INVALID}lr: the multiplier of B is 'fast', not a positive number"),
        (_LORA | {"lr": {"B": float("inf")}}, f"{_INVALID}lr: the multiplier of B is inf, not a positive number"),
        (_LORA | {"rules": {}}, f"{_RECORD}rules: expected list, found dict"),
        (_LORA | {"rules": ["Xylograph"]}, f"{_RECORD}rules[0]: 'Xylograph' is not a known component\n{_COMPONENTS}"),
        (_LORA | {"dropout": "0.1"}, f"{_RECORD}dropout: expected int or float, found str"),
        (_LORA | {"dropout": None}, f"{_RECORD}dropout: expected int or float, found NoneType"),
        (_LORA | {"dropout": float("nan")}, f"{_INVALID}dropout: nan is not a probability in [0, 1)"),
        (
            _LORA | {"delta": None},
            f"{_INVALID}init: has no effect: this method adapts no layer\n"
            "  - scale: has no effect: this method adapts no layer\n"
            "  - join: has no effect: this method adapts no layer\n"
            "  - full: nothing would train: there is no delta, and `full` is empty",
        ),
        ({}, f"{_INVALID}full: nothing would train: there is no delta, and `full` is empty"),
    ],
)
def test_hostile_records(data: Any, message: str) -> None:
    with pytest.raises(MethodError) as refusal:
        Method.from_dict(data)
    assert shortened(refusal.value) == message


def test_every_fault_of_a_record_is_told_at_once() -> None:
    with pytest.raises(MethodError) as refusal:
        Method.from_dict({"delta": {"component": "X"}, "rank": 3, "lr": 4, "frozen": {}})
    assert [p.where for p in refusal.value.problems] == ["delta", "rank", "lr", "frozen"]


def test_a_method_can_be_refused_where_it_is_caught_as_a_value_error() -> None:
    assert issubclass(MethodError, ValueError)
    assert MethodError.exit_code == 2
    assert not issubclass(MethodError, PlanError)


def test_records_of_format_1_are_still_read() -> None:
    """lorary 0.5 and before wrote `word` for `component`, and other class names."""
    old = _LORA | {"delta": {"word": "Tasks", "r": 3, "past": [2]}, "scale": {"word": "ByRank", "alpha": 8.0}}
    method = Method.from_dict(old)
    assert (method.delta, method.scale) == (SequentialLoRA(3, (2,)), AlphaOverRank(8.0))
    with pytest.raises(MethodError, match="'Task' is not a known component"):
        Method.from_dict(_LORA | {"delta": {"word": "Task"}})
