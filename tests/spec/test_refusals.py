"""What cannot be: every impossible combination, value and shape, each with the whole sentence that refuses it.

The pairs of the composition matrix are all here; `tests/test_combinations.py` holds the table of the pages to them.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorary
from lorary.errors import MethodError, PlanError
from lorary.methods.adalora import SVDDelta
from lorary.methods.adalora_budget import RankBudget
from lorary.methods.delta_lora import DeltaLoRADelta, DeltaLoRAPaperRule
from lorary.methods.dora import MagnitudeDirection
from lorary.methods.ia3 import Rescaling
from lorary.methods.lora import Add, AlphaOverRank, ConstantScale, Gaussian, Kaiming, LowRank
from lorary.methods.melora import BlockDiagonal
from lorary.methods.multilora import MultiLoRAInit, ParallelLowRank
from lorary.methods.o_lora import SequentialLoRA
from lorary.methods.olora import QRInit
from lorary.methods.pissa import SVDInit
from lorary.methods.vera import SharedProjectionDelta, SharedProjectionInit
from tests import tiny

INVALID = "invalid method:"
ONE_OF_THEM = "\n      hint: leave one of the two out"
CHOICE = {
    "delta": "what is trained",
    "init": "the initialisation",
    "scale": "the scale",
    "join": "how the update joins the weight",
    "storage": "how the weight is stored",
    "context": "the context",
}
ONE_OF_TWO = "\n      hint: use one of the two"
NEEDLESS = "\n      hint: leave it out: it would change nothing"


def told(headline: str, *problems: str) -> str:
    return "\n".join([headline, *(f"  - {problem}" for problem in problems)])


# --- pairs of presets -------------------------------------------------------------------------------------------------

RSLORA, BY_VERA = "rslora sets AlphaOverSqrtRank", "vera sets ConstantScale(s=1.0)"
PISSA, OLORA = "pissa sets SVDInit", "olora sets QRInit"
TERMS = "glora sets GLoRADelta"
SPECTRAL, PROPAGATED, TASKS = "adalora sets SVDDelta", "delta-lora sets DeltaLoRADelta", "o-lora sets SequentialLoRA"
PROJECTIONS = "vera sets SharedProjectionInit"
HADAMARD, SHARDS = "hira sets HadamardFactors", "miss sets SharedShards"
BY_GLORA = "{Ad, Au, Bd, Bu, Cd, Cu, D, E}"


def everything_trains(delta: str) -> str:
    return f"full: every base weight trains in full, so {delta} would be redundant{ONE_OF_TWO}"


def at_the_weight(init: str, delta: str) -> str:
    return told(INVALID, f"init: {init} sets B and A to a decomposition of W, which the factors of {delta} cannot hold")


def two(axis: str, one: str, other: str) -> str:
    """`rslora sets X` and `vera sets Y`, as one sentence."""
    (first, a), (second, b) = (re.split(" sets? ", text) for text in (one, other))
    return f"{axis}: {first} and {second} both choose {CHOICE[axis]}: {a} and {b}{ONE_OF_THEM}"


PAIRS: dict[tuple[str, str], str] = {
    # what a paper's own matrix excludes
    ("lora+", "lora-fa"): told(
        INVALID,
        "lr: a learning-rate ratio has no effect: {B} is the only trained tensor\n"
        "      hint: set the learning rate itself, without a multiplier",
    ),
    ("pissa", "melora"): told(
        INVALID, "init: SVDInit sets B and A to a decomposition of W, which the factors of BlockDiagonal cannot hold"
    ),
    ("olora", "melora"): told(
        INVALID, "init: QRInit sets B and A to a decomposition of W, which the factors of BlockDiagonal cannot hold"
    ),
    # VeRA excludes whatever trains, starts or scales A and B
    ("rslora", "vera"): told(INVALID, two("scale", RSLORA, "vera sets ConstantScale")),
    ("lora+", "vera"): told(INVALID, "lr: sets a learning rate for {B}, but only {b, d} trains"),
    ("lora-fa", "vera"): told(INVALID, f"frozen: lora-fa freezes {{A}}, and so does vera{NEEDLESS}"),
    ("pissa", "vera"): told(INVALID, two("init", PISSA, PROJECTIONS)),
    ("olora", "vera"): told(INVALID, two("init", OLORA, PROJECTIONS)),
    ("vera", "melora"): told(INVALID, two("delta", "vera sets SharedProjectionDelta", "melora sets BlockDiagonal")),
    ("vera", "multilora"): told(
        INVALID,
        two("delta", "vera sets SharedProjectionDelta", "multilora sets ParallelLowRank"),
        two("init", PROJECTIONS, "multilora sets MultiLoRAInit"),
    ),
    # two starts, two deltas
    ("pissa", "olora"): told(INVALID, two("init", PISSA, OLORA)),
    ("pissa", "multilora"): told(INVALID, two("init", PISSA, "multilora sets MultiLoRAInit")),
    ("olora", "multilora"): told(INVALID, two("init", OLORA, "multilora sets MultiLoRAInit")),
    ("melora", "multilora"): told(INVALID, two("delta", "melora sets BlockDiagonal", "multilora sets ParallelLowRank")),
    # GLoRA has terms of its own instead of all of this
    ("rslora", "glora"): told(INVALID, two("scale", RSLORA, "glora sets ConstantScale")),
    ("lora+", "glora"): told(INVALID, f"lr: sets a learning rate for {{B}}, but only {BY_GLORA} trains"),
    ("lora-fa", "glora"): told(INVALID, f"frozen: {{A}} cannot be frozen: the tensors are {BY_GLORA}"),
    ("dora", "glora"): told(INVALID, two("join", "dora sets MagnitudeDirection", "glora sets GLoRAJoin")),
    ("glora", "pissa"): told(INVALID, two("init", "glora sets ZeroDownInit", PISSA)),
    ("glora", "olora"): told(INVALID, two("init", "glora sets ZeroDownInit", OLORA)),
    ("glora", "vera"): told(
        INVALID,
        two("delta", TERMS, "vera sets SharedProjectionDelta"),
        two("init", "glora sets ZeroDownInit", PROJECTIONS),
    ),
    ("glora", "melora"): told(INVALID, two("delta", TERMS, "melora sets BlockDiagonal")),
    ("glora", "multilora"): told(
        INVALID,
        two("delta", TERMS, "multilora sets ParallelLowRank"),
        two("init", "glora sets ZeroDownInit", "multilora sets MultiLoRAInit"),
    ),
    ("glora", "bitfit"): told(
        INVALID,
        "full: GLoRADelta trains an update of every adapted layer's bias, and `full` trains the biases themselves"
        + ONE_OF_TWO,
    ),
    # AdaLoRA's directions have a scale, a start and gradients of their own, and leave one by one
    ("rslora", "adalora"): told(INVALID, two("scale", RSLORA, "adalora sets AlphaOverInitialRank")),
    ("lora-fa", "adalora"): told(INVALID, "rules: the scores need the gradients of P, E and Q, and Q is frozen"),
    ("dora", "adalora"): told(
        INVALID,
        "rules: MagnitudeDirection depends on the norm of the joined weight, "
        "which changes whenever a direction is masked",
    ),
    ("glora", "adalora"): told(
        INVALID,
        two("delta", TERMS, SPECTRAL),
        two("init", "glora sets ZeroDownInit", "adalora sets SVDDeltaInit"),
        two("scale", "glora sets ConstantScale", "adalora sets AlphaOverInitialRank"),
    ),
    ("pissa", "adalora"): told(INVALID, two("init", PISSA, "adalora sets SVDDeltaInit")),
    ("olora", "adalora"): told(INVALID, two("init", OLORA, "adalora sets SVDDeltaInit")),
    ("vera", "adalora"): told(
        INVALID,
        two("delta", "vera sets SharedProjectionDelta", SPECTRAL),
        two("init", PROJECTIONS, "adalora sets SVDDeltaInit"),
        two("scale", "vera sets ConstantScale", "adalora sets AlphaOverInitialRank"),
    ),
    ("melora", "adalora"): told(INVALID, two("delta", "melora sets BlockDiagonal", SPECTRAL)),
    ("multilora", "adalora"): told(
        INVALID,
        two("delta", "multilora sets ParallelLowRank", SPECTRAL),
        two("init", "multilora sets MultiLoRAInit", "adalora sets SVDDeltaInit"),
    ),
    # Delta-LoRA follows B A, and O-LoRA adds B A to those of earlier tasks
    ("dora", "delta-lora"): told(
        INVALID,
        "rules: Delta-LoRA takes the gradient of B A for that of W, and they differ under MagnitudeDirection",
    ),
    ("glora", "delta-lora"): told(INVALID, two("delta", TERMS, PROPAGATED)),
    ("pissa", "delta-lora"): at_the_weight("SVDInit", "DeltaLoRADelta"),
    ("olora", "delta-lora"): at_the_weight("QRInit", "DeltaLoRADelta"),
    ("vera", "delta-lora"): told(INVALID, two("delta", "vera sets SharedProjectionDelta", PROPAGATED)),
    ("melora", "delta-lora"): told(INVALID, two("delta", "melora sets BlockDiagonal", PROPAGATED)),
    ("multilora", "delta-lora"): told(INVALID, two("delta", "multilora sets ParallelLowRank", PROPAGATED)),
    ("adalora", "delta-lora"): told(INVALID, two("delta", SPECTRAL, PROPAGATED)),
    ("lora-fa", "o-lora"): told(
        INVALID, "rules: the penalty is on A, which is frozen; hard=True lets A start in the complement instead"
    ),
    ("dora", "o-lora"): told(
        INVALID, "rules: O-LoRA adds up the updates of its tasks, and MagnitudeDirection is not additive"
    ),
    ("glora", "o-lora"): told(INVALID, two("delta", TERMS, TASKS)),
    ("pissa", "o-lora"): at_the_weight("SVDInit", "SequentialLoRA"),
    ("olora", "o-lora"): at_the_weight("QRInit", "SequentialLoRA"),
    ("vera", "o-lora"): told(INVALID, two("delta", "vera sets SharedProjectionDelta", TASKS)),
    ("melora", "o-lora"): told(INVALID, two("delta", "melora sets BlockDiagonal", TASKS)),
    ("multilora", "o-lora"): told(INVALID, two("delta", "multilora sets ParallelLowRank", TASKS)),
    ("adalora", "o-lora"): told(INVALID, two("delta", SPECTRAL, TASKS)),
    ("delta-lora", "o-lora"): told(INVALID, two("delta", PROPAGATED, TASKS)),
    # nothing is left to learn beside a base that trains as a whole
    # a packed weight is frozen, and there is no dense one to take element by element
    ("qlora", "full"): told(
        INVALID,
        "storage: NF4 weights are frozen, and `full` trains every weight",
        everything_trains("LowRank"),
    ),
    ("qlora", "glora"): told(
        INVALID,
        "storage: GLoRADelta multiplies W element by element in every step, and NF4 keeps no dense W\n"
        "      hint: set A to 'vector', 'scalar' or 'none', which act on the output",
    ),
    ("lora", "full"): told(INVALID, everything_trains("LowRank")),
    ("rslora", "full"): told(INVALID, everything_trains("LowRank")),
    ("lora+", "full"): told(INVALID, everything_trains("LowRank")),
    ("lora-fa", "full"): told(INVALID, everything_trains("LowRank")),
    ("dora", "full"): told(INVALID, everything_trains("LowRank")),
    ("glora", "full"): told(INVALID, everything_trains("GLoRADelta")),
    ("pissa", "full"): told(INVALID, everything_trains("LowRank")),
    ("olora", "full"): told(INVALID, everything_trains("LowRank")),
    ("vera", "full"): told(INVALID, everything_trains("SharedProjectionDelta")),
    ("melora", "full"): told(INVALID, everything_trains("BlockDiagonal")),
    ("multilora", "full"): told(INVALID, everything_trains("ParallelLowRank")),
    ("adalora", "full"): told(INVALID, everything_trains("SVDDelta")),
    ("delta-lora", "full"): told(INVALID, everything_trains("DeltaLoRADelta")),
    ("o-lora", "full"): told(INVALID, everything_trains("SequentialLoRA")),
    ("longlora", "full"): told(
        INVALID,
        f"full: longlora trains embeddings, norms, and full trains everything{NEEDLESS}",
    ),
    ("bitfit", "full"): told(INVALID, f"full: bitfit trains bias, and full trains everything{NEEDLESS}"),
}


def alone(name: str, join: str, roles: str) -> dict[tuple[str, str], str]:
    """What refuses a preset whose join trains by itself, without an update that others could start, scale or split."""
    delta, init, scale, joins = (f"{name} sets {what}" for what in ("NoUpdate", "NoInit", "ConstantScale", join))
    others = {
        "melora": "melora sets BlockDiagonal",
        "delta-lora": PROPAGATED,
        "o-lora": TASKS,
    }
    return {
        ("hira", name): told(INVALID, two("delta", HADAMARD, delta), two("join", "hira sets TimesWeight", joins)),
        ("miss", name): told(INVALID, two("delta", SHARDS, delta), two("init", "miss sets ZeroShards", init)),
        ("rslora", name): told(INVALID, two("scale", RSLORA, scale)),
        ("lora+", name): told(INVALID, f"lr: sets a learning rate for {{B}}, but only {roles} trains"),
        ("lora-fa", name): told(INVALID, f"frozen: {{A}} cannot be frozen: the tensors are {roles}"),
        ("dora", name): told(INVALID, two("join", "dora sets MagnitudeDirection", joins)),
        ("glora", name): told(
            INVALID,
            two("delta", TERMS, delta),
            two("init", "glora sets ZeroDownInit", init),
            two("join", "glora sets GLoRAJoin", joins),
        ),
        ("pissa", name): told(INVALID, two("init", PISSA, init)),
        ("olora", name): told(INVALID, two("init", OLORA, init)),
        ("vera", name): told(
            INVALID, two("delta", "vera sets SharedProjectionDelta", delta), two("init", PROJECTIONS, init)
        ),
        ("multilora", name): told(
            INVALID,
            two("delta", "multilora sets ParallelLowRank", delta),
            two("init", "multilora sets MultiLoRAInit", init),
        ),
        ("adalora", name): told(
            INVALID,
            two("delta", SPECTRAL, delta),
            two("init", "adalora sets SVDDeltaInit", init),
            two("scale", "adalora sets AlphaOverInitialRank", scale),
        ),
        **{(other, name): told(INVALID, two("delta", text, delta)) for other, text in others.items()},
    }


STARTS = {
    "pissa": PISSA,
    "olora": OLORA,
    "loftq": "loftq sets QuantizationErrorInit",
    "lora-ga": "lora-ga sets GradientInit",
    "corda": "corda sets ContextInit",
    "eva": "eva sets InputDirectionsInit",
}


def a_start(name: str, source: str) -> dict[tuple[str, str], str]:
    """What refuses a preset that starts B and A in some way, beside presets that do in another or have none."""
    init = STARTS[name]
    others = {"glora": "glora sets ZeroDownInit", "vera": PROJECTIONS, "multilora": "multilora sets MultiLoRAInit"}
    others |= {"adalora": "adalora sets SVDDeltaInit", "miss": "miss sets ZeroShards"}
    others |= {other: STARTS[other] for other in list(STARTS)[: list(STARTS).index(name)]}
    deltas = {
        "melora": "BlockDiagonal",
        "hira": "HadamardFactors",
        "delta-lora": "DeltaLoRADelta",
        "o-lora": "SequentialLoRA",
    }
    sets = f"init: {init.rpartition(' ')[2]} sets B and A to {source}, which the factors of"
    return {
        **{(other, name): told(INVALID, two("init", text, init)) for other, text in others.items()},
        **{(other, name): told(INVALID, f"{sets} {delta} cannot hold") for other, delta in deltas.items()},
        **{
            (name, other): told(INVALID, two("init", init, f"{other} sets NoInit"))
            for other in ("houlsby", "ia3", "prefix-tuning", "prompt-tuning", "rows")
        },
        (name, "full"): told(INVALID, everything_trains("LowRank")),
    }


# HiRA multiplies the weight by B A, and MiSS has one matrix: what adds, starts, scales or splits another A and B
PAIRS |= {
    ("rslora", "hira"): told(INVALID, two("scale", RSLORA, "hira sets ConstantScale")),
    ("rslora", "miss"): told(INVALID, two("scale", RSLORA, "miss sets ConstantScale")),
    ("lora+", "miss"): told(INVALID, "lr: sets a learning rate for {B}, but only {D} trains"),
    ("lora-fa", "miss"): told(INVALID, "frozen: {A} cannot be frozen: the tensors are {D}"),
    ("dora", "hira"): told(INVALID, two("join", "dora sets MagnitudeDirection", "hira sets TimesWeight")),
    ("glora", "hira"): told(
        INVALID, two("delta", TERMS, HADAMARD), two("join", "glora sets GLoRAJoin", "hira sets TimesWeight")
    ),
    ("glora", "miss"): told(
        INVALID, two("delta", TERMS, SHARDS), two("init", "glora sets ZeroDownInit", "miss sets ZeroShards")
    ),
    ("pissa", "hira"): at_the_weight("SVDInit", "HadamardFactors"),
    ("olora", "hira"): at_the_weight("QRInit", "HadamardFactors"),
    ("pissa", "miss"): told(INVALID, two("init", PISSA, "miss sets ZeroShards")),
    ("olora", "miss"): told(INVALID, two("init", OLORA, "miss sets ZeroShards")),
    ("vera", "hira"): told(INVALID, two("delta", "vera sets SharedProjectionDelta", HADAMARD)),
    ("vera", "miss"): told(
        INVALID,
        two("delta", "vera sets SharedProjectionDelta", SHARDS),
        two("init", PROJECTIONS, "miss sets ZeroShards"),
    ),
    ("melora", "hira"): told(INVALID, two("delta", "melora sets BlockDiagonal", HADAMARD)),
    ("melora", "miss"): told(INVALID, two("delta", "melora sets BlockDiagonal", SHARDS)),
    ("multilora", "hira"): told(INVALID, two("delta", "multilora sets ParallelLowRank", HADAMARD)),
    ("multilora", "miss"): told(
        INVALID,
        two("delta", "multilora sets ParallelLowRank", SHARDS),
        two("init", "multilora sets MultiLoRAInit", "miss sets ZeroShards"),
    ),
    ("hira", "miss"): told(INVALID, two("delta", HADAMARD, SHARDS)),
    ("hira", "adalora"): told(
        INVALID,
        two("delta", HADAMARD, SPECTRAL),
        two("scale", "hira sets ConstantScale", "adalora sets AlphaOverInitialRank"),
    ),
    ("miss", "adalora"): told(
        INVALID,
        two("delta", SHARDS, SPECTRAL),
        two("init", "miss sets ZeroShards", "adalora sets SVDDeltaInit"),
        two("scale", "miss sets ConstantScale", "adalora sets AlphaOverInitialRank"),
    ),
    ("hira", "full"): told(INVALID, everything_trains("HadamardFactors")),
    ("miss", "full"): told(INVALID, everything_trains("SharedShards")),
    **{
        (name, other): told(INVALID, two("delta", delta, text))
        for name, delta in (("hira", HADAMARD), ("miss", SHARDS))
        for other, text in (("delta-lora", PROPAGATED), ("o-lora", TASKS))
    },
}
PAIRS |= a_start("loftq", "a decomposition of W")
for preset in ("lora-ga", "corda", "eva"):
    PAIRS |= a_start(preset, "directions of the training data")
PAIRS |= {
    ("loftq", "full"): PAIRS["qlora", "full"],
}
PAIRS |= alone("houlsby", "Bottleneck", "{W1, W2, b1, b2}") | alone("ia3", "Rescaling", "{l, l_ff}")
PAIRS |= alone("prefix-tuning", "Prefix", "{P_k, P_v}") | alone("prompt-tuning", "Prompt", "{P}")
PAIRS |= alone("rows", "TokenRows", "{R}")
JOINS = {"houlsby": "Bottleneck", "ia3": "Rescaling", "prefix-tuning": "Prefix", "prompt-tuning": "Prompt"}
for other, join in JOINS.items():
    PAIRS[("rows", other)] = told(INVALID, two("join", "rows sets TokenRows", f"{other} sets {join}"))
PAIRS[("rows", "full")] = told(INVALID, everything_trains("TokenRows"))
STAND = "prefix-tuning sets Prefix", "prompt-tuning sets Prompt"
for before, context in zip(STAND, ("PrefixContext", "PromptContext"), strict=True):
    preset = before.partition(" ")[0]
    PAIRS |= {
        ("longlora", preset): told(INVALID, two("context", "longlora sets LongContext", f"{preset} sets {context}")),
        ("houlsby", preset): told(INVALID, two("join", "houlsby sets Bottleneck", before)),
        ("ia3", preset): told(INVALID, two("join", "ia3 sets Rescaling", before)),
    }
PAIRS |= {
    ("houlsby", "ia3"): told(INVALID, two("join", "houlsby sets Bottleneck", "ia3 sets Rescaling")),
    ("houlsby", "full"): told(INVALID, f"full: houlsby trains norms, and full trains everything{NEEDLESS}"),
    ("ia3", "full"): told(INVALID, everything_trains("Rescaling")),
    ("prefix-tuning", "full"): told(INVALID, everything_trains("Prefix")),
    ("prompt-tuning", "full"): told(INVALID, everything_trains("Prompt")),
    ("prefix-tuning", "prompt-tuning"): told(
        INVALID,
        two("join", *STAND),
        two("context", "prefix-tuning sets PrefixContext", "prompt-tuning sets PromptContext"),
    ),
}


# aLoRA joins the weight in a way of its own, at a part of the text: what moves the weight itself would act before it
WAITS = "alora sets FromInvocation"
PAIRS |= {
    **{
        (other, "alora"): told(INVALID, two("join", f"{other} sets {join}", WAITS))
        for other, join in (("dora", "MagnitudeDirection"), ("glora", "GLoRAJoin"), ("hira", "TimesWeight"))
    },
    **{
        pair: told(
            INVALID,
            f"init: {init} moves part of W into B A, and FromInvocation adds B A to a part of the text alone\n"
            "      hint: use another start",
        )
        for pair, init in (
            (("pissa", "alora"), "SVDInit"),
            (("olora", "alora"), "QRInit"),
            (("alora", "loftq"), "QuantizationErrorInit"),
            (("alora", "lora-ga"), "GradientInit"),
            (("alora", "corda"), "ContextInit"),
        )
    },
    ("alora", "delta-lora"): told(
        INVALID, "rules: Delta-LoRA takes the gradient of B A for that of W, and they differ under FromInvocation"
    ),
    ("alora", "o-lora"): told(
        INVALID, "rules: O-LoRA adds up the updates of its tasks, and FromInvocation is not additive"
    ),
    ("alora", "longlora"): told(INVALID, two("context", "alora sets InvocationContext", "longlora sets LongContext")),
    **{
        ("alora", other): told(INVALID, two("join", WAITS, f"{other} sets {join}"))
        for other, join in (("rows", "TokenRows"), ("houlsby", "Bottleneck"), ("ia3", "Rescaling"))
    },
    **{
        ("alora", f"{name.lower()}-tuning"): told(
            INVALID,
            two("join", WAITS, f"{name.lower()}-tuning sets {name}"),
            two("context", "alora sets InvocationContext", f"{name.lower()}-tuning sets {name}Context"),
        )
        for name in ("Prefix", "Prompt")
    },
    ("alora", "full"): told(INVALID, everything_trains("LowRank")),
}
PRODUCTS = {"loha": ("LowRankHadamard", "HadamardInit"), "lokr": ("KroneckerProduct", "KroneckerInit")}


def a_product(name: str, roles: str) -> dict[tuple[str, str], str]:
    """What refuses LoHa and LoKr, which have a delta, a start and an alpha of their own."""
    delta, init = (f"{name} sets {component}" for component in PRODUCTS[name])
    scale = f"{name} sets AlphaOverRank"
    others: dict[str, tuple[str, str, str]] = {  # its delta, init and scale, as far as it has them
        "rslora": ("", "", RSLORA),
        "glora": (TERMS, "glora sets ZeroDownInit", "glora sets ConstantScale"),
        "pissa": ("", PISSA, ""),
        "olora": ("", OLORA, ""),
        "vera": ("vera sets SharedProjectionDelta", PROJECTIONS, "vera sets ConstantScale"),
        "melora": ("melora sets BlockDiagonal", "", ""),
        "multilora": ("multilora sets ParallelLowRank", "multilora sets MultiLoRAInit", ""),
        "hira": (HADAMARD, "", "hira sets ConstantScale"),
        "miss": (SHARDS, "miss sets ZeroShards", "miss sets ConstantScale"),
    }
    later: dict[str, tuple[str, str, str]] = {
        "adalora": (SPECTRAL, "adalora sets SVDDeltaInit", "adalora sets AlphaOverInitialRank"),
        "delta-lora": (PROPAGATED, "", ""),
        "o-lora": (TASKS, "", ""),
        **{start: ("", STARTS[start], "") for start in ("loftq", "lora-ga", "corda", "eva")},
        **{n: (f"{n} sets NoUpdate", f"{n} sets NoInit", f"{n} sets ConstantScale") for n in ("rows", *JOINS)},
    }
    found = {}
    for other, components in (others | later).items():
        pairs = zip(("delta", "init", "scale"), components, (delta, init, scale), strict=True)
        both = [two(axis, *((mine, its) if other in later else (its, mine))) for axis, its, mine in pairs if its]
        found[(name, other) if other in later else (other, name)] = told(INVALID, *both)
    return found | {
        ("lora+", name): told(INVALID, f"lr: sets a learning rate for {{B}}, but only {roles} trains"),
        ("lora-fa", name): told(INVALID, f"frozen: {{A}} cannot be frozen: the tensors are {roles}"),
        (name, "full"): told(INVALID, everything_trains(PRODUCTS[name][0])),
    }


PAIRS |= a_product("loha", "{A1, A2, B1, B2, T1, T2}") | a_product("lokr", "{C, Ca, Cb, D, Da, Db, T}")
PAIRS["loha", "lokr"] = told(
    INVALID,
    two("delta", "loha sets LowRankHadamard", "lokr sets KroneckerProduct"),
    two("init", "loha sets HadamardInit", "lokr sets KroneckerInit"),
)


@pytest.mark.parametrize("pair", PAIRS, ids=" + ".join)
def test_pairs_that_do_not_go_together(pair: tuple[str, str]) -> None:
    with pytest.raises(MethodError) as refusal:
        lorary.method(*pair)
    assert str(refusal.value) == PAIRS[pair]
    with pytest.raises(MethodError):  # in the other order too
        lorary.method(*reversed(pair))


def test_a_scale_that_nothing_uses_is_refused() -> None:
    with pytest.raises(MethodError) as refusal:
        lorary.method("hira").replace(scale=AlphaOverRank(2.0))
    assert str(refusal.value) == told(
        INVALID,
        "scale: AlphaOverRank(alpha=2.0) has no effect: TimesWeight uses the tensors of HadamardFactors without "
        "a scale\n      hint: set scale=ConstantScale(1.0)",
    )


def test_no_pair_is_refused_but_these() -> None:
    refused = set()
    for pair in itertools.combinations(lorary.presets(), 2):
        try:
            lorary.method(*pair)
        except MethodError:
            refused.add(frozenset(pair))
    assert refused == {frozenset(pair) for pair in PAIRS}


# --- components and values --------------------------------------------------------------------------------------------

COUNTED, POSITIVE, SEEDED, FLAGGED = (
    "a whole number of at least 1",
    "a positive finite number",
    "a whole number of at least 0",
    "true or false",
)
STEPPED = "a share of the steps below 1, or a whole number of them"
AMOUNT = "a finite number of at least 0"
KNOWN = "alpha, context, delta, dropout, frozen, full, init, join, lora_bias, lr"

SAID: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    # values that a field cannot hold
    (("hira",), {"r": 0}, told(INVALID, f"delta: HadamardFactors has r = 0; it takes {COUNTED}")),
    (("miss",), {"r": 2.0}, told(INVALID, f"delta: SharedShards has r = 2.0; it takes {COUNTED}")),
    (("miss",), {"mini_r": 0}, told(INVALID, f"delta: SharedShards has mini_r = 0; it takes {COUNTED}, or None")),
    (
        ("hira",),
        {"alpha": 16},
        told(INVALID, "alpha: hira sets ConstantScale(s=1.0), which has no alpha\n      hint: leave it out"),
    ),
    (("melora",), {"n": 0}, told(INVALID, f"delta: BlockDiagonal has n = 0; it takes {COUNTED}")),
    (("melora",), {"n": 2.0}, told(INVALID, f"delta: BlockDiagonal has n = 2.0; it takes {COUNTED}")),
    (("multilora",), {"n": -1}, told(INVALID, f"delta: ParallelLowRank has n = -1; it takes {COUNTED}")),
    (("vera",), {"r": 0}, told(INVALID, f"delta: SharedProjectionDelta has r = 0; it takes {COUNTED}")),
    (("pissa",), {"niter": 0}, told(INVALID, f"init: SVDInit has niter = 0; it takes {COUNTED}, or None")),
    (("pissa",), {"niter": "fast"}, told(INVALID, f"init: SVDInit has niter = 'fast'; it takes {COUNTED}, or None")),
    (
        ("pissa",),
        {"rounds": 5},
        told(
            INVALID,
            "init: 5 rounds of SVDInit correct the quantisation error, and Unquantized has none\n"
            "      hint: set rounds=1, or add qlora",
        ),
    ),
    (
        ("qlora", "olora"),
        {"rounds": 5},
        told(
            INVALID,
            "init: QRInit starts at s times a decomposition, which would grow by s in each of 5 rounds\n"
            "      hint: set divide=True",
        ),
    ),
    (
        ("qlora", "delta-lora"),
        {"mode": "paper"},
        told(INVALID, "rules: DeltaLoRAPaperRule updates the base weight, and NF4 weights are frozen"),
    ),
    (
        ("qlora",),
        {"block": 48, "double": 1, "compute": "int8"},
        told(
            INVALID,
            "storage: NF4 has block = 48; it takes a power of two from 32 to 4096",
            "storage: NF4 has double = 1; it takes true or false",
            "storage: NF4 has compute = 'int8'; it takes float32 or bfloat16 or float16, or None",
        ),
    ),
    (("lora",), {"init": SVDInit(4, 0)}, told(INVALID, f"init: SVDInit has oversample = 0; it takes {COUNTED}")),
    (("vera",), {"d": -1}, told(INVALID, f"init: SharedProjectionInit has d = -1; it takes {POSITIVE}")),
    (("vera",), {"d": 0.0}, told(INVALID, f"init: SharedProjectionInit has d = 0.0; it takes {POSITIVE}")),
    (("vera",), {"seed": -1}, told(INVALID, f"init: SharedProjectionInit has seed = -1; it takes {SEEDED}")),
    (("vera",), {"seed": 1.5}, told(INVALID, f"init: SharedProjectionInit has seed = 1.5; it takes {SEEDED}")),
    (
        ("vera",),
        {"save_projections": 1},
        told(INVALID, f"init: SharedProjectionInit has store_shared = 1; it takes {FLAGGED}"),
    ),
    (("dora",), {"exact": "yes"}, told(INVALID, f"join: MagnitudeDirection has exact = 'yes'; it takes {FLAGGED}")),
    (("olora",), {"divide": 1}, told(INVALID, f"init: QRInit has divide = 1; it takes {FLAGGED}")),
    (("dora",), {"lr": {"m": -1}}, told(INVALID, "lr: the multiplier of m is -1, not a positive number")),
    (("adalora",), {"r": 0}, told(INVALID, f"delta: SVDDelta has r = 0; it takes {COUNTED}")),
    (
        ("lora",),
        {"delta": SVDDelta(4, -1)},
        told(INVALID, f"delta: SVDDelta has kept = -1; it takes {SEEDED}, or None"),
    ),
    (("adalora",), {"target": 0}, told(INVALID, f"rules: RankBudget has target = 0; it takes {COUNTED}")),
    (("adalora",), {"every": 0}, told(INVALID, f"rules: RankBudget has every = 0; it takes {COUNTED}")),
    (("adalora",), {"start": 1.5}, told(INVALID, f"rules: RankBudget has start_at = 1.5; it takes {STEPPED}")),
    (("adalora",), {"final": "half"}, told(INVALID, f"rules: RankBudget has final = 'half'; it takes {STEPPED}")),
    (("adalora",), {"alpha": 0}, told(INVALID, f"scale: AlphaOverInitialRank has alpha = 0; it takes {POSITIVE}")),
    (
        ("adalora",),
        {"orthogonality": -0.1},
        told(INVALID, f"rules: OrthogonalityPenalty has weight = -0.1; it takes {AMOUNT}"),
    ),
    (
        ("adalora",),
        {"form": "both"},
        told(INVALID, "rules: OrthogonalityPenalty has form = 'both'; it takes authors or paper"),
    ),
    (
        ("delta-lora",),
        {"ratio": -2},
        told(
            INVALID,
            f"delta: DeltaLoRADelta has ratio = -2; it takes {POSITIVE}",
            f"rules: DeltaLoRARule has ratio = -2; it takes {POSITIVE}",
        ),
    ),
    (("delta-lora",), {"start": 2.5}, told(INVALID, "start: is 2.5; it takes a whole number of at least -1")),
    (("delta-lora",), {"mode": "fast"}, told(INVALID, "mode: is 'fast'; it takes closed or paper")),
    (
        ("lora",),
        {"rules": (DeltaLoRAPaperRule(2.0), DeltaLoRAPaperRule(1.0))},
        told(INVALID, *["rules: the weight can follow the product once only"] * 2),
    ),
    (
        ("adalora",),
        {"rules": (RankBudget(4),)},
        told(INVALID, *["rules: there can be one budget only: two would undo each other's masks"] * 2),
    ),
    (
        ("multilora",),
        {"rules": (DeltaLoRAPaperRule(2.0),)},
        told(INVALID, "rules: the product of A and B is written, and gamma would have a part in it"),
    ),
    (
        ("lora",),
        {"delta": DeltaLoRADelta(4, 2.0, late=False), "rules": (DeltaLoRAPaperRule(2.0),)},
        told(INVALID, "rules: DeltaLoRADelta follows the product already: to write the weight, use LowRank"),
    ),
    (("lora",), {"rules": None}, told(INVALID, "rules: None is not a component of this axis")),
    (("o-lora",), {"weight": -1}, told(INVALID, f"rules: OrthogonalToPast has weight = -1; it takes {AMOUNT}")),
    (("o-lora",), {"mean": 1}, told(INVALID, f"rules: OrthogonalToPast has mean = 1; it takes {FLAGGED}")),
    (("o-lora",), {"hard": "yes"}, told(INVALID, f"rules: OrthogonalToPast has hard = 'yes'; it takes {FLAGGED}")),
    (("o-lora",), {"form": "l1"}, told(INVALID, "rules: OrthogonalToPast has form = 'l1'; it takes authors or paper")),
    (
        ("lora",),
        {"delta": SequentialLoRA(2, past=(0,))},
        told(INVALID, "delta: SequentialLoRA has past = (0,); it takes whole numbers of at least 1"),
    ),
    # rules for other tensors, and rates of what a rule gives
    (("lora",), {"rules": [RankBudget(2)]}, told(INVALID, "rules: RankBudget needs {E, P, Q}; LowRank has {A, B}")),
    (
        ("delta-lora",),
        {"lr": {"lam": 2.0}},
        told(INVALID, "lr: sets a learning rate for {lam}, but only {A, B} trains"),
    ),
    # options of other papers, and of other libraries
    (("vera",), {"alpha": 3}, told(INVALID, f"alpha: {BY_VERA}, which has no alpha\n      hint: leave it out")),
    (
        ("vera",),
        {"saved": True},
        told(INVALID, "saved: is not an option of lora + vera\n      hint: did you mean `seed` or `scale`?"),
    ),
    (
        ("vera",),
        {"projection_prng_key": 3},
        told(
            INVALID,
            "projection_prng_key: is not an option of lora + vera\n"
            "      hint: known: alpha, context, d, delta, dropout, frozen, full, init, join, lora_bias, lr, r, "
            "rules, save_projections, scale, seed, storage",
        ),
    ),
    (
        ("pissa",),
        {"iters": 4},
        told(INVALID, "iters: is not an option of lora + pissa\n      hint: did you mean `niter`?"),
    ),
    (
        ("melora", "rslora"),
        {"blocks": 4},
        told(
            INVALID,
            f"blocks: is not an option of lora + melora + rslora\n"
            f"      hint: known: {KNOWN}, n, r, rules, scale, storage",
        ),
    ),
    (
        ("dora",),
        {"use_dora": True},
        told(
            INVALID,
            'use_dora: is not an option of lora + dora\n      hint: name the preset: lorary.method("dora", ...)',
        ),
    ),
    (
        ("lora",),
        {"rank": 8, "target_modules": ["q_proj"]},
        told(
            INVALID,
            "rank: is not an option of lora\n      hint: use `r`",
            "target_modules: is not an option of lora\n"
            "      hint: it belongs to the plan: lorary.plan(model, method, targets=...)",
        ),
    ),
    (
        ("lora+", "dora"),
        {"ration": 4},
        told(INVALID, "ration: is not an option of lora + lora+ + dora\n      hint: did you mean `ratio`?"),
    ),
    # dropout would drop a part of W that the base has given up
    (
        ("pissa",),
        {"dropout": 0.1},
        told(
            INVALID,
            "dropout: SVDInit moves part of W into B A, and dropout would drop that part of W\n"
            "      hint: set dropout=0",
        ),
    ),
    (
        ("olora", "dora"),
        {"dropout": 0.05},
        told(
            INVALID,
            "dropout: QRInit moves part of W into B A, and dropout would drop that part of W\n"
            "      hint: set dropout=0",
        ),
    ),
    # components of another axis
    (
        ("lora",),
        {"delta": MagnitudeDirection()},
        told(INVALID, "delta: MagnitudeDirection(exact=False) is not a component of this axis"),
    ),
    (("lora",), {"delta": Kaiming()}, told(INVALID, "delta: Kaiming() is not a component of this axis")),
    (
        ("lora",),
        {"join": BlockDiagonal(2, 2)},
        told(INVALID, "join: BlockDiagonal(r=2, n=2) is not a component of this axis"),
    ),
    (
        ("lora",),
        {"join": AlphaOverRank(2.0)},
        told(INVALID, "join: AlphaOverRank(alpha=2.0) is not a component of this axis"),
    ),
    (
        ("lora",),
        {"init": SharedProjectionDelta(3)},
        told(INVALID, "init: SharedProjectionDelta(r=3) is not a component of this axis"),
    ),
    (("lora",), {"init": Add()}, told(INVALID, "init: Add() is not a component of this axis")),
    (
        ("lora",),
        {"scale": SVDInit()},
        told(INVALID, "scale: SVDInit(niter=None, oversample=16, rounds=1) is not a component of this axis"),
    ),
    (("lora",), {"scale": LowRank(2)}, told(INVALID, "scale: LowRank(r=2) is not a component of this axis")),
    (
        ("lora",),
        {"storage": MagnitudeDirection()},
        told(INVALID, "storage: MagnitudeDirection(exact=False) is not a component of this axis"),
    ),
    (
        ("lora",),
        {"rules": (QRInit(),)},
        told(INVALID, "rules: QRInit(divide=False, rounds=1) is not a component of this axis"),
    ),
    (("dora",), {"join": Add()}, told(INVALID, two("join", "dora sets MagnitudeDirection", "you set Add"))),
    (
        ("vera",),
        {"scale": ConstantScale(2.0)},
        told(INVALID, two("scale", BY_VERA, "you set ConstantScale(s=2.0)")),
    ),
    # an init for other tensors
    (
        ("lora",),
        {"init": SharedProjectionInit()},
        told(INVALID, "init: SharedProjectionInit fills {A, B, b, d}; LowRank has {A, B}"),
    ),
    (
        ("lora",),
        {"init": MultiLoRAInit()},
        told(INVALID, "init: MultiLoRAInit fills {A, B, gamma}; LowRank has {A, B}"),
    ),
    (
        ("melora",),
        {"init": SharedProjectionInit()},
        told(INVALID, "init: SharedProjectionInit fills {A, B, b, d}; BlockDiagonal has {A, B}"),
    ),
    (
        ("lora",),
        {"delta": ParallelLowRank(2, 2), "init": Gaussian()},
        told(INVALID, "init: Gaussian fills {A, B}; ParallelLowRank has {A, B, gamma}"),
    ),
    (
        ("lora",),
        {"delta": ParallelLowRank(2, 2), "init": SVDInit()},
        told(
            INVALID,
            "init: SVDInit fills {A, B}; ParallelLowRank has {A, B, gamma}",
            "init: SVDInit sets B and A to a decomposition of W, which the factors of ParallelLowRank cannot hold",
        ),
    ),
    (
        ("lora",),
        {"delta": SharedProjectionDelta(4)},
        told(
            INVALID,
            "init: Kaiming fills {A, B}; SharedProjectionDelta has {A, B, b, d}",
            "frozen: {A, B} of SharedProjectionDelta are shared by all layers and cannot train",
        ),
    ),
    (
        ("lora",),
        {"delta": SharedProjectionDelta(4), "init": SharedProjectionInit()},
        told(INVALID, "frozen: {A, B} of SharedProjectionDelta are shared by all layers and cannot train"),
    ),
    # what trains
    (("vera",), {"frozen": {"b", "d"}}, told(INVALID, "frozen: everything is frozen: nothing would train")),
    (("dora",), {"frozen": {"A", "B", "m"}}, told(INVALID, "frozen: everything is frozen: nothing would train")),
    (("lora",), {"frozen": "m"}, told(INVALID, "frozen: {m} cannot be frozen: the tensors are {A, B}")),
    (("multilora",), {"frozen": "b"}, told(INVALID, "frozen: {b} cannot be frozen: the tensors are {A, B, gamma}")),
    (("vera",), {"lr": {"A": 2}}, told(INVALID, "lr: sets a learning rate for {A}, but only {b, d} trains")),
    (("lora",), {"lr": {"m": 2}}, told(INVALID, "lr: sets a learning rate for {m}, but only {A, B} trains")),
    # more than one reason
    (
        ("dora",),
        {"r": 0, "exact": 3, "dropout": 1.0},
        told(
            INVALID,
            f"delta: LowRank has r = 0; it takes {COUNTED}",
            f"join: MagnitudeDirection has exact = 3; it takes {FLAGGED}",
            "dropout: 1.0 is not a probability in [0, 1)",
        ),
    ),
    (
        ("rslora", "vera", "dora", "pissa", "melora"),
        {},
        told(
            INVALID,
            two("scale", RSLORA, "vera sets ConstantScale"),
            two("init", PROJECTIONS, PISSA),
            two("delta", "vera sets SharedProjectionDelta", "melora sets BlockDiagonal"),
        ),
    ),
    # joins that train by themselves
    (
        ("ia3",),
        {"r": 8, "alpha": 16},
        told(
            INVALID,
            "r: ia3 sets NoUpdate(), which has no rank\n      hint: leave it out",
            "alpha: ia3 sets ConstantScale(s=1.0), which has no alpha\n      hint: leave it out",
        ),
    ),
    (
        ("houlsby", "qlora"),
        {"r": 8},
        told(INVALID, "r: houlsby sets NoUpdate(), which has no rank\n      hint: leave it out"),
    ),
    (
        ("ia3",),
        {"dropout": 0.1},
        told(
            INVALID,
            "dropout: Rescaling adds no update whose input dropout could act on\n      hint: set dropout=0",
        ),
    ),
    (
        ("ia3",),
        {"feed_forward": ("",)},
        told(INVALID, "join: Rescaling has feed_forward = ('',); it takes names of layers, or None"),
    ),
    (
        ("ia3",),
        {"feed_forward": 3},
        told(INVALID, "join: Rescaling has feed_forward = 3; it takes names of layers, or None"),
    ),
    (("houlsby",), {"m": 0}, told(INVALID, f"join: Bottleneck has m = 0; it takes {COUNTED}")),
    (("houlsby",), {"m": 6.5}, told(INVALID, f"join: Bottleneck has m = 6.5; it takes {COUNTED}")),
    (
        ("houlsby",),
        {"activation": "swish", "position": "attention"},
        told(
            INVALID,
            "join: Bottleneck has activation = 'swish'; it takes gelu or relu or silu or tanh",
            "join: Bottleneck has position = 'attention'; it takes both or feed-forward",
        ),
    ),
    (("houlsby",), {"norms": "no"}, told(INVALID, f"norms: is 'no'; it takes {FLAGGED}")),
    (
        ("houlsby",),
        {"frozen": {"W1", "W2", "b1", "b2"}, "norms": False},
        told(INVALID, "frozen: everything is frozen: nothing would train"),
    ),
    (
        ("lora",),
        {"join": Rescaling()},
        told(INVALID, "join: Rescaling adds no update to the weight, so LowRank would have no effect"),
    ),
    (("ia3",), {"lr": {"B": 2}}, told(INVALID, "lr: sets a learning rate for {B}, but only {l, l_ff} trains")),
]


@pytest.mark.parametrize(("names", "options", "message"), SAID)
def test_what_cannot_be_said(names: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError) as refusal:
        lorary.method(*names, **options)
    assert str(refusal.value) == message


# --- layers -----------------------------------------------------------------------------------------------------------

CANNOT = "invalid plan:"
EXCLUDE = "\n      hint: exclude it, or use another init"


def only(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer)


def dead(role: str, kind: str) -> str:
    return f"{{{role}}} starts at zero in a layer of kind {kind} and is frozen: nothing could train{EXCLUDE}"


PLANNED: dict[str, tuple[Any, lorary.Method, Any, dict[str, Any], str]] = {
    # more directions than a matrix has
    "pissa, inputs": (
        lambda: only(nn.Linear(4, 9)),
        lorary.method("pissa", r=5),
        "0",
        {},
        told(CANNOT, "0: its matrix has no more than 4 singular directions, and r is 5"),
    ),
    "pissa, outputs": (
        lambda: only(nn.Linear(9, 4)),
        lorary.method("pissa", r=5, niter=4),
        "0",
        {},
        told(CANNOT, "0: its matrix has no more than 4 singular directions, and r is 5"),
    ),
    "pissa, embedding": (
        lambda: only(nn.Embedding(9, 4)),
        lorary.method("pissa", "rslora", r=6),
        "0",
        {},
        told(CANNOT, "0: its matrix has no more than 4 singular directions, and r is 6"),
    ),
    "pissa, fused": (
        lambda: tiny.model("GPT2LMHeadModel", bos_token_id=0, eos_token_id=0),
        lorary.method("pissa", r=17),
        "c_attn[q,v]",
        {},
        told(
            CANNOT,
            *(
                f"transformer.h.{i}.attn.c_attn: its matrix has no more than 16 singular directions, and r is 17"
                for i in (0, 1)
            ),
        ),
    ),
    "pissa, a rank of its own": (
        tiny.llama,
        lorary.method("pissa", "dora", r=1),
        "all-linear",
        {"ranks": {"layers.1.*.k_proj": 9}},
        told(
            CANNOT,
            "model.layers.1.self_attn.k_proj: its matrix has no more than 8 singular directions, and r is 9",
        ),
    ),
    "olora, linear": (
        lambda: only(nn.Linear(9, 4)),
        lorary.method("olora", r=5),
        "0",
        {},
        told(CANNOT, "0: its matrix has no more than 4 orthonormal columns, and r is 5"),
    ),
    "olora, GPT-2": (
        lambda: only(Conv1D(3, 8)),
        lorary.method("olora", r=4),
        "0",
        {},
        told(CANNOT, "0: its matrix has no more than 3 orthonormal columns, and r is 4"),
    ),
    "olora, convolution": (
        lambda: only(nn.Conv2d(6, 8, 1, groups=2)),
        lorary.method("olora", r=4),
        "0",
        {},
        told(CANNOT, "0: its matrix has no more than 3 orthonormal columns, and r is 4"),
    ),
    # sizes that n does not divide
    "miss, small and odd": (
        lambda: nn.Sequential(nn.Linear(9, 8), nn.Linear(4, 9)),
        lorary.method("miss", r=5, mini_r=2),
        ["0", "1"],
        {},
        told(
            CANNOT,
            "1: it has 4 inputs, fewer than one shard of r = 5",
            "1: mini_r = 2 does not divide its 9 output features",
        ),
    ),
    "miss, vocabulary": (
        lambda: only(nn.Embedding(9, 4)),
        lorary.method("miss", r=2),
        "0",
        {},
        told(CANNOT, "0: MiSS sums the input features of linear layers, and this is of kind embedding"),
    ),
    "miss, window": (
        lambda: only(nn.Conv2d(3, 8, 3)),
        lorary.method("miss", "dora", r=2),
        "0",
        {},
        told(CANNOT, "0: MiSS sums the input features of linear layers, and this is of kind conv2d"),
    ),
    "hira and lora-fa, embedding": (
        lambda: only(nn.Embedding(8, 4)),
        lorary.method("hira", "lora-fa", r=1),
        "0",
        {},
        told(CANNOT, f"0: {dead('A', 'embedding')}"),
    ),
    "melora, in": (
        lambda: only(nn.Linear(9, 4)),
        lorary.method("melora", r=1, n=2),
        "0",
        {},
        told(CANNOT, "0: n = 2 does not divide its 9 input features"),
    ),
    "melora, out": (
        lambda: only(nn.Linear(8, 9)),
        lorary.method("melora", r=1, n=4),
        "0",
        {},
        told(CANNOT, "0: n = 4 does not divide its 9 output features"),
    ),
    "melora, both, several sites": (
        lambda: nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 4)),
        lorary.method("melora", r=1, n=2),
        ["0", "1"],
        {},
        told(
            CANNOT,
            "0: n = 2 does not divide its 9 input features",
            "0: n = 2 does not divide its 9 output features",
            "1: n = 2 does not divide its 9 input features",
        ),
    ),
    "melora, vocabulary": (
        lambda: only(nn.Embedding(9, 4)),
        lorary.method("melora", r=1, n=2),
        "0",
        {},
        told(CANNOT, "0: n = 2 does not divide its 9 input features"),
    ),
    "melora, window": (
        lambda: only(nn.Conv2d(3, 8, 3)),
        lorary.method("melora", "dora", r=1, n=2),
        "0",
        {},
        told(CANNOT, "0: n = 2 does not divide its 27 input features"),
    ),
    "melora, fused": (
        lambda: only(nn.ModuleDict({"c_attn": nn.Linear(6, 18)})),
        lorary.method("melora", r=1, n=4),
        "c_attn[q,v]",
        {},
        told(
            CANNOT,
            "0.c_attn: n = 4 does not divide its 6 input features",
            "0.c_attn: n = 4 does not divide its 6 output features",
        ),
    ),
    # what starts at zero is frozen
    "lora-fa, embedding": (
        tiny.llama,
        lorary.method("lora-fa", r=1),
        "embedding",
        {},
        told(CANNOT, f"model.embed_tokens: {dead('A', 'embedding')}"),
    ),
    "melora and lora-fa, embedding": (
        lambda: only(nn.Embedding(8, 4)),
        lorary.method("melora", "lora-fa", r=1, n=2),
        "0",
        {},
        told(CANNOT, f"0: {dead('A', 'embedding')}"),
    ),
    "b of vera": (
        lambda: only(nn.Linear(8, 4)),
        lorary.method("vera", r=1, frozen="b"),
        "0",
        {},
        told(CANNOT, f"0: {dead('b', 'linear')}"),
    ),
    "gamma of multilora": (
        lambda: only(nn.Conv1d(8, 4, 1)),
        lorary.method("multilora", r=1, frozen="gamma"),
        "0",
        {},
        told(CANNOT, f"0: {dead('gamma', 'conv1d')}"),
    ),
    "B of lora": (
        lambda: only(nn.Linear(8, 4)),
        lorary.method("lora", r=1, frozen="B"),
        "0",
        {},
        told(CANNOT, f"0: {dead('B', 'linear')}"),
    ),
    # ranks and alphas
    "alphas of vera": (
        tiny.llama,
        lorary.method("vera", r=2),
        "q_proj",
        {"alphas": {"q_proj": 2}},
        told(CANNOT, "alphas: ConstantScale(s=1.0) has no alpha\n      hint: leave them out"),
    ),
    "a rank of nothing": (
        tiny.llama,
        lorary.method("vera", r=2),
        "q_proj",
        {"ranks": {"layers.0.*": 0}},
        told(CANNOT, f"model.layers.0.self_attn.q_proj: SharedProjectionDelta has r = 0; it takes {COUNTED}"),
    ),
    "an alpha of nothing": (
        tiny.llama,
        lorary.method("multilora", r=2),
        "q_proj",
        {"alphas": {"layers.0.*": 0}},
        told(CANNOT, f"model.layers.0.self_attn.q_proj: AlphaOverRank has alpha = 0; it takes {POSITIVE}"),
    ),
    # a weight that trains in full as well
    "a tied table": (
        lambda: tiny.llama(tie_word_embeddings=True),
        lorary.method("pissa", r=2, full="embed_tokens"),
        "lm_head",
        {},
        told(
            CANNOT,
            "model.embed_tokens.weight: is adapted and would train in full as well: the adapter would be redundant\n"
            "      hint: exclude the site, or narrow `full`",
        ),
    ),
    "a magnitude is no base parameter": (
        tiny.llama,
        lorary.method("dora", r=2, full="m"),
        "q_proj",
        {},
        told(CANNOT, "full: `m` matches no parameter"),
    ),
}


@pytest.mark.parametrize("name", PLANNED)
def test_where_a_method_cannot_go(name: str) -> None:
    make, method, targets, options, message = PLANNED[name]
    model = make()
    before = tiny.everything(model)
    with pytest.raises(PlanError) as refusal:
        lorary.plan(model, method, targets, **options)
    assert str(refusal.value) == message
    assert tiny.everything(model) == before


def test_just_possible() -> None:
    """The neighbours of what is refused: one direction less, a size that n divides."""
    for layer, x, method in (
        (nn.Linear(4, 9), torch.randn(2, 4), lorary.method("pissa", r=4)),
        (nn.Linear(9, 4), torch.randn(2, 9), lorary.method("olora", r=4)),
        (nn.Embedding(9, 4), torch.tensor([1, 8]), lorary.method("pissa", r=4, niter=1)),
        (nn.Conv2d(6, 8, 1, groups=2), torch.randn(2, 6, 3, 3), lorary.method("olora", r=3)),
        (nn.Linear(8, 6), torch.randn(2, 8), lorary.method("melora", r=1, n=2)),
        (nn.Embedding(9, 4), torch.tensor([1, 8]), lorary.method("pissa", "lora-fa", r=2)),
        (nn.Linear(8, 4), torch.randn(2, 8), lorary.method("vera", r=300, frozen="d")),
        (nn.Linear(8, 4), torch.randn(2, 8), lorary.method("dora", r=2, frozen="m")),
    ):
        model = only(layer)
        expected = model(x)
        lorary.attach(model, lorary.plan(model, method, "0"))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
