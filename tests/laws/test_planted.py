"""A law that cannot fail is no law: each one catches a method that was made wrong on purpose."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorary
from lorary.kernels.shared_projection import add_shared_projection
from lorary.layers import kinds
from lorary.methods.adalora import SVDDelta
from lorary.methods.delta_lora import DeltaLoRADelta
from lorary.methods.dora import MagnitudeDirection
from lorary.methods.hira import TimesWeight
from lorary.methods.houlsby import Bottleneck
from lorary.methods.ia3 import Rescaling
from lorary.methods.lora import Add, ConstantScale, Kaiming, LowRank
from lorary.methods.melora import BlockDiagonal
from lorary.methods.miss import SharedShards
from lorary.methods.o_lora import SequentialLoRA
from lorary.methods.pissa import SVDInit
from lorary.methods.vera import SharedProjectionDelta
from lorary.serve.forms import form
from lorary.spec import interfaces
from lorary.spec.fields import COUNT
from lorary.spec.interfaces import Delta

from . import laws
from .cases import KINDS, Case, made_of


def kind(name: str) -> Any:
    return next(k for k in KINDS if k.name == name)


@contextlib.contextmanager
def known(*classes: type) -> Iterator[None]:
    """Register planted components for the duration of a test."""
    for cls in classes:
        interfaces.component(cls)
    try:
        yield
    finally:
        for cls in classes:
            del interfaces.COMPONENTS[cls.__name__]


def case(kind_name: str = "linear", **said: Any) -> Case:
    return Case(dataclasses.replace(lorary.method("lora", r=3, alpha=6.0), **said), kind(kind_name))


def caught(law: Callable[..., None], *arguments: Any) -> None:
    with pytest.raises((AssertionError, torch._dynamo.exc.TorchDynamoException)):
        law(*arguments)


@dataclass(frozen=True)
class StartsMoving(Kaiming):
    """B is not zero at the start, and the base is not told."""

    def __call__(self, p: Any, W: Tensor, site: Any, scale: float, generator: torch.Generator) -> None:
        super().__call__(p, W, site, scale, generator)
        p["B"].add_(0.1)


def test_a_start_that_moves_is_caught() -> None:
    with known(StartsMoving):
        caught(laws.nothing_moves_at_step_0, case(init=StartsMoving()))


@dataclass(frozen=True)
class ScalesTheBias(Add):
    """torchtune's DoRA: the gain of the weight reaches the bias in forward, not in the merge."""

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        return layer.add_delta(1.5 * layer.base(x), x)

    def merged(self, p: Any, W: Tensor, b: Tensor | None, BA: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        return 1.5 * W + BA[0] @ BA[1], b


def test_a_bias_scaled_on_one_side_only_is_caught() -> None:
    with known(ScalesTheBias):
        caught(laws.merged_is_forward, case(join=ScalesTheBias()))


@dataclass(frozen=True)
class ForgetsTheScale(Add):
    """The merge leaves out s."""

    def merged(self, p: Any, W: Tensor, b: Tensor | None, BA: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        return W + 0.5 * BA[0] @ BA[1], b


def test_a_merge_without_the_scale_is_caught() -> None:
    with known(ForgetsTheScale):
        caught(laws.merged_is_forward, case(join=ForgetsTheScale()))


@dataclass(frozen=True)
class CutsTheGradient(Delta):
    """A is read as a constant, so that it never learns, though nobody froze it."""

    r: int = field(metadata=COUNT)
    roles = frozenset({"A", "B"})

    def shapes(self, site: Any) -> dict[str, tuple[int, ...]]:
        return LowRank(self.r).shapes(site)

    def factors(self, site: Any, p: Any) -> tuple[Tensor, Tensor]:
        return p["B"], p["A"].detach()


def test_a_factor_that_never_learns_is_caught() -> None:
    with known(CutsTheGradient):
        caught(laws.only_what_should_train_trains, case(delta=CutsTheGradient(3)))


@dataclass(frozen=True)
class TrainsTooMuch(Delta):
    """adapter-hub's VeRA: a diagonal kept as a full matrix, all of it trained."""

    r: int = field(metadata=COUNT)
    roles = frozenset({"A", "B"})

    def shapes(self, site: Any) -> dict[str, tuple[int, ...]]:
        return {"A": (self.r, site.in_features), "B": (site.out_features, site.out_features)}

    def factors(self, site: Any, p: Any) -> tuple[Tensor, Tensor]:
        return p["B"][:, : self.r] + 0 * p["B"].sum(), p["A"]


def test_a_count_beyond_the_papers_is_caught() -> None:
    with known(TrainsTooMuch):
        caught(laws.only_what_should_train_trains, case(delta=TrainsTooMuch(3)))


@dataclass(frozen=True)
class ForgetsDilation(kinds.Convolution):
    """PEFT's convolution: A slides without the base's dilation where padding makes the shapes fit."""

    def add(self, layer: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, dropout: float) -> Tensor:
        undilated = torch.nn.Conv2d(6, 10, layer.kernel_size, dilation=1, padding=0)
        padded = torch.nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode="reflect")
        z = torch.nn.functional.conv2d(padded, A.reshape(-1, *undilated.weight.shape[1:]))
        z = z[..., : y.shape[-2], : y.shape[-1]]
        return y + s * torch.nn.functional.conv2d(z, B[:, :, None, None])


def test_a_convolution_with_another_geometry_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.KINDS, "conv2d", ForgetsDilation(2))
    subject = case("conv2d, dilated, reflecting")
    caught(laws.factors_are_the_delta, subject)
    caught(laws.merged_is_forward, subject)


@dataclass(frozen=True)
class RedrawsItsProjection(Delta):
    """Part of A is random and belongs to this object alone: files do not hold it."""

    r: int = field(metadata=COUNT)
    roles = frozenset({"A", "B"})

    def shapes(self, site: Any) -> dict[str, tuple[int, ...]]:
        return LowRank(self.r).shapes(site)

    def factors(self, site: Any, p: Any) -> tuple[Tensor, Tensor]:
        own = torch.randn(p["A"].shape, generator=torch.Generator().manual_seed(id(self)))
        return p["B"], p["A"] + own


def test_what_files_do_not_hold_is_caught(tmp_path: Path) -> None:
    with known(RedrawsItsProjection):
        caught(laws.saved_and_loaded_is_equal, case(delta=RedrawsItsProjection(3)), tmp_path / "adapter")


@dataclass(frozen=True)
class WritesTheBase(Add):
    """A join that changes the base when it runs, and tells nobody."""

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        layer.base.weight.data.mul_(1.001)
        return super().forward(layer, x)


def test_a_base_that_was_written_is_caught() -> None:
    with known(WritesTheBase):
        caught(laws.detach_gives_the_base_back, case(join=WritesTheBase()))
        caught(laws.nothing_moves_at_step_0, case(join=WritesTheBase()))


@dataclass(frozen=True)
class BreaksTheGraph(Add):
    """A forward pass that asks a tensor for a number."""

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        y = super().forward(layer, x)
        return y * 1.0 if y.sum().item() != 0.5 else y


def test_a_graph_break_is_caught() -> None:
    with known(BreaksTheGraph):
        caught(laws.compiles_whole, case(join=BreaksTheGraph()))


@dataclass(frozen=True)
class CountsItsCalls(Add):
    """A forward pass that depends on how often it has been called."""

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        layer.calls = getattr(layer, "calls", 0) + 1
        return super().forward(layer, x) * (1.0 if layer.calls < 10**6 else 2.0)


def test_a_recompilation_is_caught() -> None:
    with known(CountsItsCalls):
        caught(laws.compiles_whole, case(join=CountsItsCalls()))


@dataclass(frozen=True)
class LearnsUphill(Add):
    """The gradient of the delta is turned round."""

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        y = layer.base(x).detach()
        delta = super().forward(layer, x) - y
        return y + 2 * delta.detach() - delta


def test_learning_uphill_is_caught() -> None:
    with known(LearnsUphill):
        caught(laws.learns, case(join=LearnsUphill()))


@dataclass(frozen=True)
class StartsElsewhereUnsaid(SVDInit):
    """B A starts at a part of W, and the base is not told to give it up."""

    residual_init = False


def test_a_start_that_the_base_does_not_give_up_is_caught() -> None:
    with known(StartsElsewhereUnsaid):
        caught(laws.nothing_moves_at_step_0, case(init=StartsElsewhereUnsaid()))


@dataclass(frozen=True)
class MovesTheBaseForNothing(Kaiming):
    """Says that the base must move, and starts at zero."""

    residual_init = True


def test_a_base_that_moves_for_nothing_is_caught() -> None:
    with known(MovesTheBaseForNothing):
        caught(laws.nothing_moves_at_step_0, case(init=MovesTheBaseForNothing()))


@dataclass(frozen=True)
class NormOfColumns(MagnitudeDirection):
    """Merges with a norm for every input, as the paper's transposed layout invites to."""

    def merged(self, p: Any, W: Tensor, b: Any, BA: Any) -> Any:
        V = W + BA[0] @ BA[1]
        return p["m"][:, None] * V / V.norm(dim=0), b


@dataclass(frozen=True)
class ForgetsTheGain(MagnitudeDirection):
    """Exports its factors alone."""

    def on_output(self, p: Any, W: Any, b: Any, BA: Any) -> Any:
        return BA, None, None


@dataclass(frozen=True)
class NormOfTheStart(MagnitudeDirection):
    """Never takes the norm again."""

    def _norms(self, layer: Any) -> Tensor:
        return vars(layer).setdefault("first norms", super()._norms(layer).detach())


def test_wrong_magnitudes_are_caught() -> None:
    with known(NormOfColumns, ForgetsTheGain, NormOfTheStart):
        caught(laws.merged_is_forward, case(join=NormOfColumns()))
        caught(laws.low_rank_form_is_forward, case(join=ForgetsTheGain()))
        caught(laws.served_is_forward, case(join=ForgetsTheGain()))
        caught(laws.merged_is_forward, StartedAndTrained(case(join=NormOfTheStart())))


class StartedAndTrained:
    """A case whose model has run once before it was trained."""

    def __init__(self, case: Case) -> None:
        self._case = case

    def __getattr__(self, name: str) -> Any:
        return getattr(self._case, name)

    def trained(self) -> Any:
        model = self._case.attached()
        model(self._case.x())
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.3)
        return model


@dataclass(frozen=True)
class MixesTheBlocks(BlockDiagonal):
    """A fast path whose blocks meet the wrong slices of the input."""

    def add(self, layer: Any, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        return super().add(layer, y, x.roll(x.shape[-1] // self.n, -1), dropout)


@dataclass(frozen=True)
class KeepsABankOfItsOwn(SharedProjectionDelta):
    """Takes the rows of what is shared in another order than its factors do."""

    def add(self, layer: Any, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        p = layer.tensors
        return add_shared_projection(y, x, p["A"].flip(0), p["B"], p["b"], p["d"], layer.scale, dropout)


def test_fast_paths_of_their_own_are_caught() -> None:
    with known(MixesTheBlocks, KeepsABankOfItsOwn):
        caught(laws.factors_are_the_delta, case(delta=MixesTheBlocks(3, 2)))
        vera = lorary.method("vera", r=3).replace(delta=KeepsABankOfItsOwn(3))
        caught(laws.factors_are_the_delta, Case(vera, kind("linear")))
        laws.factors_are_the_delta(Case(lorary.method("vera", r=3), kind("linear")))


@dataclass(frozen=True)
class FollowsUnsaid(DeltaLoRADelta):
    """Delta-LoRA whose snapshot trains."""

    fixed_roles = frozenset()
    roles = frozenset({"A", "B", "A_K", "B_K", "lam"})


@dataclass(frozen=True)
class FillsAll(Kaiming):
    """Starts the snapshot as well, at zero."""

    fills = FollowsUnsaid.roles


def test_what_is_given_and_trains_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Case(made_of("delta-lora"), kind("linear"))
    laws.only_what_should_train_trains(honest)
    with known(FollowsUnsaid, FillsAll):
        unsaid = honest.method.replace(delta=FollowsUnsaid(3, 2.0), init=FillsAll(), rules=())
        caught(laws.only_what_should_train_trains, Case(unsaid, kind("linear")))
    monkeypatch.setattr(lorary.Method, "trained", property(lambda self: self.roles - self.frozen))
    caught(laws.only_what_should_train_trains, Case(made_of("delta-lora"), kind("linear")))


@dataclass(frozen=True)
class ForgetsThePast(SequentialLoRA):
    """The earlier tasks are missing where the input is dropped from, or never is."""

    def add(self, layer: Any, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        p = layer.tensors
        return layer.kind.add(layer.base, y, x, p["A"], layer.site.place(p["B"]), layer.scale, dropout)


@dataclass(frozen=True)
class ForgetsTheFactor(DeltaLoRADelta):
    """Forward adds B A as LoRA does; what is exported has followed the product."""

    def add(self, layer: Any, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        p = layer.tensors
        return layer.kind.add(layer.base, y, x, p["A"], p["B"], layer.scale, dropout)


def test_a_past_that_is_missing_in_forward_is_caught() -> None:
    with known(ForgetsThePast, ForgetsTheFactor):
        third = made_of("o-lora").replace(delta=ForgetsThePast(3, past=(2, 1)))
        followed = made_of("delta-lora").replace(delta=ForgetsTheFactor(3, 2.0), rules=())
        for method in (third, followed):
            for law in (laws.factors_are_the_delta, laws.merged_is_forward, laws.low_rank_form_is_forward):
                caught(law, Case(method, kind("linear")))


@dataclass(frozen=True)
class KeepsTheWrongRole(SVDDelta):
    """Counts a number for each output among what trains, as if E stood in a square."""

    def shapes(self, site: Any) -> dict[str, tuple[int, ...]]:
        return super().shapes(site) | {"E": (self.R, self.R)}

    def factors(self, site: Any, p: Any) -> tuple[Tensor, Tensor]:
        return p["P"] @ p["E"], p["Q"]


def test_a_full_matrix_of_singular_values_is_caught() -> None:
    with known(KeepsTheWrongRole):
        subject = Case(made_of("adalora").replace(delta=KeepsTheWrongRole(3), rules=()), kind("linear"))
        laws.factors_are_the_delta(subject)
        caught(laws.only_what_should_train_trains, subject)


@dataclass(frozen=True)
class KeepsTheBias(Rescaling):
    """Scales the bias in forward, as PEFT does, and merges the weight alone."""

    def merged(self, p: Any, W: Tensor, b: Tensor | None, BA: Any) -> Any:
        return super().merged(p, W, b, BA)[0], b


@dataclass(frozen=True)
class MergesAllTheSame(Bottleneck):
    """Says that it cannot be merged, and hands out the base's weight as if it could."""

    def merged(self, p: Any, W: Tensor, b: Tensor | None, BA: Any) -> Any:
        return W, b


@dataclass(frozen=True)
class StartsFar(Bottleneck):
    """Fills its tensors with numbers of a trained adapter's size."""

    def setup(self, layer: Any, generator: torch.Generator) -> None:
        for p in layer.params.values():
            p.normal_(generator=generator)


@dataclass(frozen=True)
class StartsExactlyUnsaid(Bottleneck):
    """Has nothing in W2, and says that it starts only near the base."""

    def setup(self, layer: Any, generator: torch.Generator) -> None:
        layer.params["W1"].normal_(generator=generator)


@dataclass(frozen=True)
class StartsNearUnsaid(Bottleneck):
    """Says that it starts exactly at the base."""

    exact_start = True


def test_joins_that_are_wrong_alone_are_caught() -> None:
    ia3, houlsby = made_of("ia3"), made_of("houlsby")
    with known(KeepsTheBias, MergesAllTheSame, StartsFar, StartsExactlyUnsaid, StartsNearUnsaid):
        caught(laws.merged_is_forward, Case(ia3.replace(join=KeepsTheBias()), kind("linear")))
        caught(laws.merged_is_forward, Case(ia3.replace(join=KeepsTheBias()), kind("fused q, v")))
        with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
            laws.merged_is_forward(Case(houlsby.replace(join=MergesAllTheSame(3)), kind("linear")))
        for join in (StartsFar(3), StartsExactlyUnsaid(3), StartsNearUnsaid(3)):
            caught(laws.nothing_moves_at_step_0, Case(houlsby.replace(join=join), kind("linear")))


@dataclass(frozen=True)
class AddsTheProduct(TimesWeight):
    """Adds B A to the weight, as LoRA does."""

    def merged(self, params: Any, W: Tensor, b: Tensor | None, BA: Any) -> tuple[Tensor, Tensor | None]:
        return W + params["B"] @ params["A"], b


@dataclass(frozen=True)
class ShardsSideBySide(SharedShards):
    """Sums r blocks of neighbouring inputs, as the paper's text says, where its equations sum shards of r."""

    def factors(self, site: Any, params: Any) -> Any:
        B, A = super().factors(site, params)
        return B, A.sort(1, descending=True)[0].flip(0)

    def add(self, layer: Any, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        return y + x.unflatten(-1, (self.r, -1)).sum(-1) @ layer.params["D"].T


def test_hadamard_products_and_shards_that_are_wrong_are_caught() -> None:
    with known(AddsTheProduct, ShardsSideBySide):
        caught(laws.merged_is_forward, Case(made_of("hira").replace(join=AddsTheProduct()), kind("linear")))
        caught(laws.factors_are_the_delta, Case(made_of("miss").replace(delta=ShardsSideBySide(3)), kind("linear")))


def test_wrong_serving_forms_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias under the gain, which the shift must take back; the scale twice."""
    honest = form._folded
    wrong: dict[str, Any] = {
        "_bias_change": lambda layer, gain: None,
        "_folded": lambda found, bias, dtype: honest(found._replace(B=2 * found.B), bias, dtype),
    }
    subject = case(join=MagnitudeDirection())
    for name, fault in wrong.items():
        with monkeypatch.context() as patched:
            patched.setattr(form, name, fault)
            caught(laws.served_is_forward, subject)
    laws.served_is_forward(subject)


def test_the_laws_that_are_broken_are_told_by_name(tmp_path: Path) -> None:
    """And only those; the others have been looked at all the same."""
    with known(ForgetsTheScale), pytest.raises(ExceptionGroup) as told:
        laws.hold(case(join=ForgetsTheScale()), tmp_path / "adapter")
    assert told.value.message == "broken: merged_is_forward"
    (error,) = told.value.exceptions
    assert error.__notes__ == ["the law: merged_is_forward"]
    with known(WritesTheBase), pytest.raises(ExceptionGroup) as told:
        laws.hold(case(join=WritesTheBase()), tmp_path / "other")
    assert {"nothing_moves_at_step_0", "detach_gives_the_base_back"} <= set(told.value.message[8:].split(", "))
    laws.hold(case(), tmp_path / "honest")


def test_the_honest_method_passes_what_the_planted_ones_fail(tmp_path: Path) -> None:
    honest = case(scale=ConstantScale(2.0))
    for law in laws.LAWS:
        law(honest)
    laws.saved_and_loaded_is_equal(honest, tmp_path / "adapter")
    laws.compiles_whole(honest)
    laws.factors_are_the_delta(case("conv2d, dilated, reflecting"))
