"""The page of the figures that are quoted most often, computed on models of full size without their weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

import lorary
from lorary.analysis.memory.gpu_fit import gigabytes
from lorary.analysis.memory.memory import Memory
from lorary.analysis.memory.predict import predict
from lorary.analysis.memory.workload import Workload
from lorary.errors import PlanError
from lorary.layers.block_names import TARGETS as AT
from lorary.model.plan import Plan

HEAD = """# Memory and parameter counts

The figures that texts about LoRA usually quote, computed by lorary for full-size models: a plan needs shapes, not
weights. `lorary plan MODEL` computes them for your model, and [the page on memory](memory.md) explains how, and how
accurate they are. 1 GB is 10⁹ bytes.

"""

Row = Sequence[str]


def numbers_page() -> str:
    """The page of memory and parameter counts."""
    return HEAD + "\n".join([_memory(), _quoted_memory(), _layers(), _baselines()])


# --- memory -----------------------------------------------------------------------------------------------------------

TOKENS = 2048

# how everything is kept in full fine-tuning: weights, gradients, both moments, master copy; bytes a number
KEPT = {
    "all in bfloat16 (`dtype: bfloat16`)": (2, 2, 4, 0),
    "bfloat16 weights and gradients, moments in float32": (2, 2, 8, 0),
    "the same with a float32 master copy of the weights": (2, 2, 8, 4),
    "all in float32, products in bfloat16 (`bf16: true`)": (4, 4, 8, 0),
}

# name -> presets, targets, options, whether the weights are in float32
RUNS: dict[str, tuple[str, str | None, dict[str, Any], bool]] = {
    "full fine-tuning, `bf16: true`": ("full", None, {}, True),
    "full fine-tuning, all in bfloat16": ("full", None, {}, False),
    "LoRA, q and v, r = 8": ("lora", "attention-qv", {"r": 8}, False),
    "LoRA, all linear layers, r = 16": ("lora", "all-linear", {"r": 16}, False),
    "LoRA, all linear layers, r = 64": ("lora", "all-linear", {"r": 64}, False),
    "QLoRA, all linear layers, r = 16": ("qlora", "all-linear", {"r": 16}, False),
    "QLoRA, all linear layers, r = 64": ("qlora", "all-linear", {"r": 64}, False),
}


def _memory() -> str:
    numbers = sum(p.numel() for p in llama("Llama-2-7B").parameters())
    kept = [
        [name, *(str(size) if size else "" for size in sizes), str(sum(sizes)), gigabytes(numbers * sum(sizes))]
        for name, sizes in KEPT.items()
    ]
    runs = [_run(name) for name in RUNS]
    return f"""## Memory of a 7B model

Llama-2-7B has {numbers:,} parameters. Full fine-tuning with AdamW keeps, before any activation:

{table(["bytes for each parameter", "weights", "gradients", "moments", "master", "together", "Llama-2-7B"], kept)}

lorary trains in the first way or in the last. The next table is for a training step of one sequence of {TOKENS:,}
tokens, with adapters in float32, and weights in bfloat16 unless the row says otherwise:

{table(["", "numbers trained", "weights", "adapters", "gradients", "optimizer", "step", "total", "checkpointed"], runs)}

"Step" is the memory that a step takes and frees again: activations and the loss. "Checkpointed" is the total if the
blocks are recomputed in the backward pass. Both grow with the number of tokens. The CUDA context takes another 1.4 GB.
"""


def _run(name: str) -> Row:
    plan, plain = _predicted(name, False)
    _, checkpointed = _predicted(name, True)
    parts = [plain.weights, plain.adapters, plain.gradients, plain.optimizer, plain.moving, plain.total]
    return [name, f"{plan.trainable:,}", *(gigabytes(n) if n else "" for n in parts), gigabytes(checkpointed.total)]


@cache
def _predicted(name: str, checkpointing: bool) -> tuple[Plan, Memory]:
    presets, targets, options, wide = RUNS[name]
    model = llama("Llama-2-7B")
    plan = lorary.plan(model, lorary.method(presets, **options), targets)
    dtype = torch.float32 if wide else torch.bfloat16
    work = Workload(1, TOKENS, dtype, autocast=wide, checkpointing=checkpointing)
    return plan, predict(model, plan, work)


def _quoted_memory() -> str:
    numbers = sum(p.numel() for p in llama("Llama-2-7B").parameters())
    full, lora, qlora = (
        _predicted(name, True)[1]
        for name in ("full fine-tuning, `bf16: true`", "LoRA, q and v, r = 8", "QLoRA, all linear layers, r = 64")
    )
    plain = _predicted("LoRA, q and v, r = 8", False)[1]
    rows = [
        [
            "Full fine-tuning of 7B takes 84 GB, in full precision",
            f"84 = 12 x 7: 16-bit weights and gradients and 32-bit moments, without a master copy. "
            f"In full precision it is 16 bytes a parameter, {gigabytes(16 * numbers)}. Both are without activations",
        ],
        [
            "LoRA takes 14 GB",
            f"The 16-bit weights are {gigabytes(plain.weights)}, and nothing else is in that figure. A step of "
            f"{TOKENS:,} tokens takes {gigabytes(plain.total)}, or {gigabytes(lora.total)} with checkpointing",
        ],
        [
            "LoRA takes a sixth of the memory",
            f"84 over 14 compares without activations. With them and checkpointing: {gigabytes(full.total)} over "
            f"{gigabytes(lora.total)}, {full.total / lora.total:.1f} times; longer batches bring the two together",
        ],
        [
            "QLoRA takes 3.5 GB, half a byte a parameter",
            f"{gigabytes(qlora.weights)}: NF4 takes 4.127 bits with its scales, and embeddings and head stay in 16 "
            f"bits. A step takes {gigabytes(qlora.total)} with checkpointing at r = 64",
        ],
        [
            "GPT-3's optimizer takes 1.2 TB",
            "1.2 TB is the paper's total for training. 12 to 16 bytes for each of 175 billion parameters are "
            "2.1 to 2.8 TB",
        ],
    ]
    return f"What is often said about it:\n\n{table(['said', 'computed'], rows)}\n"


# --- counts -----------------------------------------------------------------------------------------------------------

TARGETS = {
    "q and v": "attention-qv",
    "attention (q, k, v, o)": "attention",
    "MLP (gate, up, down)": "mlp",
    "all linear layers": "all-linear",
}
RANKS = (4, 8, 16, 32, 64)


def _layers() -> str:
    rows = []
    for name in SIZES:
        plan = lorary.plan(llama(name), lorary.method("lora", r=1))
        for words, targets in TARGETS.items():
            one = sum(site.trainable for site in plan.sites if AT[targets](site.site.name))
            rows.append([name, words, *(f"{one * r:,}" for r in RANKS), f"{1600 * one / plan.total:.2f} %"])
    return f"""## Parameters by layers and rank

LoRA trains r (in + out) numbers for each linear layer, so the count is proportional to the rank:

{table(["", "layers", *(f"r = {r}" for r in RANKS), "share, r = 16"], rows)}

Llama 3 has fewer heads for keys and values than for queries, so that k and v are narrow: q and v of the 8B model have
fewer numbers than those of Llama-2-7B. {_quoted_counts()}
"""


def _quoted_counts() -> str:
    model = llama("Llama-2-7B")
    eight = lorary.plan(model, lorary.method("lora", r=8), "attention-qv").trainable
    total = sum(p.numel() for p in model.parameters())
    gpt_3 = 96 * 2 * 2 * 12288  # q and v of 96 layers of width 12,288, r = 1
    return (
        f'"10,000 times fewer" is GPT-3 at r = 4 on q and v: {175e9 / (4 * gpt_3):,.0f} times. Llama-2-7B at r = 8 '
        f"on q and v trains {eight:,}, {total / eight:,.0f} times fewer; the 4.7 million that are quoted for it are "
        f"GPT-3's at r = 1, {gpt_3:,}."
    )


# --- LoRA and what came before it -------------------------------------------------------------------------------------

METHODS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "full fine-tuning": ("full", None, {}),
    "BitFit": ("bitfit", None, {}),
    "bottleneck adapters, m = 64": ("houlsby", None, {"m": 64}),
    "prefix tuning, 10 tokens": ("prefix-tuning", None, {"tokens": 10}),
    "prompt tuning, 20 tokens": ("prompt-tuning", None, {"tokens": 20}),
    "(IA)³": ("ia3", None, {}),
    "LoRA, q and v, r = 8": ("lora", "attention-qv", {"r": 8}),
    "LoRA, all linear layers, r = 16": ("lora", "all-linear", {"r": 16}),
}


def _baselines() -> str:
    models = {"GPT-2 medium": gpt_2_medium(), "Llama-2-7B": llama("Llama-2-7B")}
    rows, reasons = [], []
    for name, (preset, targets, options) in METHODS.items():
        plans = {}
        for of, model in models.items():
            try:
                plans[of] = lorary.plan(model, lorary.method(preset, **options), targets)
            except PlanError as error:
                reasons.append(f"{name} on {of}: {error.problems[0].what}.")
        rows.append([name, *_counts(plans, models), *_afterwards(preset, plans, models)])
    head = ["", *(f"{name}: trained, share" for name in models), "extra multiplications", "merges", "context taken"]
    refused = " ".join(reasons)
    return f"""## LoRA and what came before it

{table([*head, "starts at"], rows)}

"Extra multiplications" are those for one token, before merging, as a share of those in the linear layers of Llama-2-7B.
Merged methods need none. They do not measure time: in every block, the two products of a bottleneck wait for the layer
before and delay the one after; its page [has the latency](methods/houlsby.md). Refused:
{refused}

Some tables say that prefix tuning adds no latency. It does: every token attends to the prefix, and the prefix takes up
positions of the context.
"""


def _counts(plans: dict[str, Plan], models: dict[str, Any]) -> list[str]:
    return [f"{plans[of].trainable:,}, {_share(plans[of].share)}" if of in plans else "refused" for of in models]


def _share(share: float) -> str:
    return f"{100 * share:.3g} %" if share == 1 else f"{100 * share:.2g} %"


def _afterwards(preset: str, plans: dict[str, Plan], models: dict[str, Any]) -> list[str]:
    """What stays of a method after training, and where it starts."""
    of, plan = [*plans.items()][-1]
    if not plan.sites:
        return ["none", "is in the weights", "", "the base"]
    config = models[of].config
    linear = sum(m.in_features * m.out_features for m in models[of].modules() if isinstance(m, nn.Linear))
    tokens = plan.method.context.taken if plan.method.context else 0
    attended = 2 * tokens * config.hidden_size * config.num_hidden_layers
    more = attended or plan.adapter_bytes // 4  # every number of an adapter is multiplied once
    join = plan.method.join
    near = "near the base" if preset == "houlsby" else "elsewhere"
    return [
        f"{100 * more / linear:.2g} %",
        "no" if join.why_not_merged else "yes",
        f"{tokens} tokens" if tokens else "",
        "the base" if join.exact_start else near,
    ]


# --- models -----------------------------------------------------------------------------------------------------------

# width, MLP's width, blocks, heads, heads of keys and values, vocabulary, whether the head is the embedding
SIZES = {
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256, True),
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000, False),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256, False),
    "Llama-2-13B": (5120, 13824, 40, 40, 40, 32000, False),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128256, False),
}


@cache
def llama(name: str) -> Any:
    """A Llama's shapes, on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = dict(zip((*keys, "vocab_size", "tie_word_embeddings"), SIZES[name], strict=True))
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=4096))


@cache
def gpt_2_medium() -> Any:
    """GPT-2 medium's shapes, on the meta device."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))


def table(head: Row, rows: Sequence[Row]) -> str:
    """A Markdown table.

    >>> table(["a", "b"], [["1", "2"]])
    '| a | b |\\n|---|---|\\n| 1 | 2 |'
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell != "---" else cell for cell in line) + "|" for line in lines)
