"""A base in 4 bits: loaded straight into NF4, five methods at once, merged into plain layers, with what that cost.

    python examples/qlora.py                               # or: ... path/to/a/model, or a Hub id

Runs offline on the built-in base. The plain model is never in memory: each weight is quantised as it is read.
"""

import sys

import torch
from transformers import AutoTokenizer

import lorary
from lorary import builtin
from lorary.builtin import corpora

STEPS, ROWS, LENGTH = 9, 8, 64  # optimizer steps, rows per step, tokens per row


def stream(tokenizer, split: str) -> torch.Tensor:
    """C headers, as one line of tokens."""
    texts = [row["text"] for row in corpora.load("builtin:c-headers", split, fallback=True)]
    return torch.tensor(tokenizer("\n".join(texts))["input_ids"])


def main() -> None:
    base = sys.argv[1] if len(sys.argv) > 1 else "builtin:base"
    tokenizer = AutoTokenizer.from_pretrained(builtin.path() if base == "builtin:base" else base)
    model = lorary.load_quantized(base)

    plan = lorary.plan(model, lorary.method("qlora", "dora", "rslora", "lora+", "melora", r=4, n=2, alpha=8))
    print(plan)
    lorary.attach(model, plan, seed=0)
    model.activation_checkpointing_enable()  # every block is computed again in the backward pass

    tokens = stream(tokenizer, "train")
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=1e-3))  # any optimizer takes these groups
    model.train()
    for step in range(1, STEPS + 1):
        starts = torch.randint(len(tokens) - LENGTH, (ROWS,), generator=generator)
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 4 == 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    model.eval()

    rows = stream(tokenizer, "validation")[: 8 * LENGTH].view(8, LENGTH)
    live = lorary.MergeCheck.of(model, rows)  # what the adapter says of rows that it has not seen
    print(live.merge(model, dtype=torch.bfloat16))


if __name__ == "__main__":
    main()
