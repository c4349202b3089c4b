"""What the laws run over: every registered preset and every legal pair, on every kind of layer, in every dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Llama4TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.pytorch_utils import Conv1D

import lorary
from lorary.errors import MethodError
from lorary.kernels.grouped import Groups
from lorary.layers.adapted import adapted_layers
from lorary.layers.experts import grouped_by
from lorary.methods.compatibility import verdict
from lorary.methods.o_lora import SequentialLoRA
from lorary.spec.calibration import CalibratedInit


class Scale(nn.Module):
    """A factor, in a module of its own, as the weight of a norm is."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Net(nn.Module):
    """One layer under a name of its own, with a factor after it that nothing should touch."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, layer)
        self.scale = Scale()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale(getattr(self, self.name)(x))
        return y


@dataclass(frozen=True)
class Kind:
    """A sort of layer: how to make one, an input for it, what to target, and its sizes as the papers count them."""

    name: str
    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    inp: int  # inputs of an output: channels of a group times the window; a vocabulary
    out: int
    target: str = "layer"
    adapted: tuple[int, ...] = ()  # rows of the parts that are adapted, where it is not all of them
    experts: int = 1  # matrices of this size
    sharing: str = "each"  # whether these have an adapter each, or share one

    @property
    def layer(self) -> str:
        return self.target.partition("[")[0].partition(".")[0]

    def around(self) -> AbstractContextManager[None]:
        """What a law calls a layer in: with experts, the rows of its input are theirs."""
        if self.experts == 1:
            return nullcontext()
        ids = torch.arange(self.experts).repeat_interleave(len(self.x()) // self.experts)
        return grouped_by(Groups(ids, self.experts))

    @property
    def bias(self) -> bool:
        return getattr(self.make(), "bias", None) is not None

    @property
    def parts(self) -> int:
        return max(len(self.adapted), 1)

    @property
    def rows(self) -> int:
        return sum(self.adapted) or self.out


def gpt2(out: int, inp: int) -> nn.Module:
    """A Conv1D whose bias is not zero, as after pretraining: a zero would hide what is done to it."""
    layer = Conv1D(out, inp)
    nn.init.normal_(layer.bias, std=0.1)
    return layer


def experts() -> nn.Module:
    """The experts of a block, whose first matrix takes the rows as they come, in halves that are multiplied."""
    config = Llama4TextConfig(hidden_size=24, intermediate_size=10, num_local_experts=3)
    module = Llama4TextExperts(config)
    for p in module.parameters():
        nn.init.normal_(p, std=0.2)
    return module


KINDS = [
    Kind("linear", lambda: nn.Linear(24, 40), lambda: torch.randn(3, 5, 24), 24, 40),
    Kind("linear without bias", lambda: nn.Linear(24, 8, bias=False), lambda: torch.randn(7, 24), 24, 8),
    Kind("GPT-2 Conv1D", lambda: gpt2(40, 24), lambda: torch.randn(3, 5, 24), 24, 40),
    Kind("fused q, v", lambda: gpt2(48, 16), lambda: torch.randn(2, 5, 16), 16, 48, "c_attn[q,v]", (16, 16)),
    Kind(
        "conv1d, grouped, strided",
        lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1, groups=4),
        lambda: torch.randn(2, 8, 11),
        2 * 3,
        12,
    ),
    Kind(
        "conv2d, dilated, reflecting",
        lambda: nn.Conv2d(6, 10, (3, 2), dilation=2, padding=1, padding_mode="reflect"),
        lambda: torch.randn(2, 6, 9, 8),
        6 * 6,
        10,
    ),
    Kind(
        "conv2d, depthwise, same",
        lambda: nn.Conv2d(6, 6, 3, padding="same", groups=6, padding_mode="circular", bias=False),
        lambda: torch.randn(6, 7, 7),  # without a batch
        9,
        6,
    ),
    Kind("conv3d", lambda: nn.Conv3d(3, 5, 2), lambda: torch.randn(2, 3, 4, 4, 3), 3 * 8, 5),
    Kind(
        "embedding",
        lambda: nn.Embedding(30, 12, padding_idx=3),
        lambda: torch.randint(0, 30, (3, 7)),
        30,
        12,
    ),
    Kind(
        "embedding, scaled",
        lambda: Gemma3TextScaledWordEmbedding(30, 12, 0, embed_scale=3.5),
        lambda: torch.randint(0, 30, (3, 7)),
        30,
        12,
    ),
    Kind("experts", experts, lambda: torch.randn(12, 24), 24, 20, "layer.gate_up_proj", experts=3),
    Kind("experts, sharing", experts, lambda: torch.randn(12, 24), 24, 20, "layer.gate_up_proj", (), 3, "shared"),
    Kind("experts, gate", experts, lambda: torch.randn(12, 24), 24, 20, "layer.gate_up_proj[gate]", (10,), 3),
]


def seed(number: int) -> None:
    """Seed the CPU's generator alone: for every other sort of device `torch.manual_seed` writes down the call stack,
    which takes longer than the arithmetic of a whole law."""
    torch.default_generator.manual_seed(number)


@dataclass(frozen=True)
class Case:
    """One law's subject."""

    method: lorary.Method
    kind: Kind
    dtype: torch.dtype = torch.float32

    def base(self) -> Net:
        """The base, the same at every call."""
        seed(1)
        return Net(self.kind.layer, self.kind.make()).to(self.dtype)

    @property
    def packed(self) -> bool:
        """Whether attaching packs the base."""
        return bool(self.plan.quantized)

    def kept(self) -> Net:
        """The base as the method keeps it: packed, where it packs."""
        return lorary.quantize(self.base(), self.method.storage) if self.packed else self.base()

    def x(self) -> Tensor:
        seed(2)
        x = self.kind.x()
        return x.to(self.dtype) if x.is_floating_point() else x

    @cached_property
    def planned(self) -> lorary.Plan:
        """The layer and its tensors; a start that reads data has seen none."""
        experts = "each" if self.method.delta is None else self.kind.sharing
        return lorary.plan(self.base(), self.method, targets=[self.kind.target], experts=experts)

    @cached_property
    def plan(self) -> lorary.Plan:
        """What every model of this case is attached by."""
        if not isinstance(self.method.init, CalibratedInit):
            return self.planned
        return lorary.calibrate(self.base(), self.planned, [self.x()], loss=lambda y, _: (y.float() ** 2).sum())

    def attached(self) -> Net:
        """The base with the method attached, at step 0."""
        return lorary.attach(self.base(), self.plan)

    def trained(self) -> Net:
        """As after training: everything that trains has moved, and what a rule or a plan gives is there."""
        model = self.attached()
        layers = adapted_layers(model).values()
        given = {id(layer.params[role]) for layer in layers for role in layer.method.delta.fixed_roles}
        seed(3)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad or id(p) in given:
                    p.add_(torch.randn_like(p) * 0.3)
        return model

    @cached_property
    def finished(self) -> Net:
        """One trained model in evaluation mode for all laws that only look at it."""
        return self.trained().eval()


def numbers(method: lorary.Method, kind: Kind) -> int:
    """How many numbers a method trains at a layer, by the papers' formulas; by its plan where there is none here."""
    return _numbers(method, kind) * (1 if kind.sharing == "shared" else kind.experts)


def _numbers(method: lorary.Method, kind: Kind) -> int:
    """Those of one matrix."""
    delta: Any = method.delta
    A, B = kind.parts * kind.inp, kind.rows  # what a rank of one costs
    formulas: dict[str, Callable[[int], dict[str, int]]] = {
        "LowRank": lambda r: {"A": r * A, "B": r * B},
        "DeltaLoRADelta": lambda r: {"A": r * A, "B": r * B},  # the product of step K stays as it is
        "SequentialLoRA": lambda r: {"A": r * A, "B": r * B},  # and so do the earlier tasks
        "SVDDelta": lambda r: {"P": r * B, "E": r, "Q": r * A},
        "BlockDiagonal": lambda r: {"A": r * A, "B": r * B},  # whatever n is
        "HadamardFactors": lambda r: {"A": r * A, "B": r * B},
        "SharedShards": lambda r: {"D": B * r if delta.mini_r is None else kind.parts * delta.mini_r * r},
        "ParallelLowRank": lambda r: {"A": delta.n * r * A, "B": delta.n * r * B, "gamma": delta.n * B},
        # one product for all parts of a fused weight
        "LowRankHadamard": lambda r: {"A1": r * kind.inp, "A2": r * kind.inp, "B1": r * B, "B2": r * B},
        "SharedProjectionDelta": lambda r: {"A": 0, "B": 0, "b": B, "d": kind.parts * r},
        # A (on a packed base a vector), B and C low-rank, D (where there is a bias) and E vectors
        "GLoRADelta": lambda r: (
            {"Bd": r * B, "Bu": r * A, "Cd": r * A, "Cu": r, "E": B}
            | ({"Ad": r * B, "Au": r * A} if delta.A == "lora" else {"Ad": B})
            | ({"D": B} if kind.bias else {})
        ),
    }
    alone: dict[str, Callable[[Any], int]] = {  # joins that train without a delta
        "Rescaling": lambda join: kind.inp if join.feed_forward else B,
        "TokenRows": lambda join: len(join.tokens) * (kind.out if kind.name.startswith("embedding") else kind.inp),
        "Bottleneck": lambda join: 2 * join.m * kind.out + join.m + kind.out,
    }
    if not delta.roles:
        return alone[type(method.join).__name__](method.join)
    name = next((cls.__name__ for cls in type(delta).__mro__ if cls.__name__ in formulas), "LowRank")
    name = "LowRank" if getattr(delta, "tucker", False) else name  # whose cores depend on the window
    if name == "LowRank" and delta.roles != {"A", "B"}:
        plan = lorary.plan(Net(kind.layer, kind.make()), method, targets=[kind.target])
        return sum(placed.trainable for placed in plan.sites) // kind.experts
    each = formulas[name](delta.r)
    magnitudes = (kind.out if "m" in method.roles else 0) + (B if "c" in method.roles else 0)
    return sum(count for role, count in each.items() if role not in method.frozen) + magnitudes


def possible(case: Case) -> bool:
    """Whether the method says that it can work here; its refusals are pinned elsewhere."""
    try:
        return bool(case.planned)
    except lorary.errors.PlanError:
        return False


# What presets need to be told at this size and for so short a run.
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"target": 2, "orthogonality": 0.001},
    "delta-lora": {"start": 1},
    "houlsby": {"m": 3, "norms": False},  # a layer alone has no norms
    "rows": {"tokens": (5, 1, 4)},
}


def methods() -> dict[str, lorary.Method]:
    """Every preset, every pair of presets that is a method, and forms of them that no preset has by default.

    A pair that says what one of the two says alone is left out.
    """
    names = list(lorary.presets())
    made: dict[str, lorary.Method] = {}
    for chosen in [(n,) for n in names] + list(itertools.combinations(names, 2)):
        try:
            method = made_of(*chosen, **(verdict(*chosen).options if len(chosen) > 1 else {}))
        except MethodError:
            continue
        if method not in made.values():
            made["+".join(chosen)] = method
    made["lora with biases"] = made_of("lora", lora_bias=True)
    made["vera with biases"] = made_of("vera", lora_bias=True)
    made["delta-lora at once"] = made_of("delta-lora", start=-1)
    made["delta-lora, written"] = made_of("delta-lora", mode="paper")
    made["miss, mini"] = made_of("miss", mini_r=4)
    made["loha whole, with cores"] = made_of("loha", r=7, tucker=True)
    made["lokr of two products, with cores"] = made_of("lokr", r=1, decompose_both=True, factor=4, tucker=True)
    made["ia3 of inputs"] = made_of("ia3", feed_forward=("layer", "c_attn", "gate_up_proj"))
    for kind, hard in (("", False), (", hard", True)):
        made[f"o-lora{kind}, third task"] = made_of("o-lora", hard=hard).replace(delta=SequentialLoRA(3, past=(2, 1)))
    return made


def made_of(*names: str, **options: Any) -> lorary.Method:
    """The method of these presets, of rank 3, with a rank and alpha if their components have one."""
    if not any(lorary.presets()[n].adapts for n in names):
        return lorary.method(*names, **options)
    options = {"r": 3, "alpha": 6.0} | {k: v for n in names for k, v in OPTIONS.get(n, {}).items()} | options
    try:
        return lorary.method(*names, **options)
    except MethodError as error:
        without = {p.where for p in error.problems if p.fix == "leave it out"} & {"r", "alpha"}
        if without:
            return lorary.method(*names, **{k: v for k, v in options.items() if k not in without})
        raise
