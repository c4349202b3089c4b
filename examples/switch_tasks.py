"""Two tasks on one base: train an adapter for each, then switch between them, add them, and go back to the base.

python examples/switch_tasks.py
"""

import time

import torch

import lorary
from lorary import builtin
from lorary.builtin import corpora

STEPS, ROWS, LENGTH = 25, 8, 96  # optimizer steps, rows per step, tokens per row


def stream(tokenizer, name: str, split: str) -> torch.Tensor:
    """A built-in data set as one line of tokens."""
    texts = [row["text"] for row in corpora.load(name, split, fallback=True)]
    return torch.tensor(tokenizer("\n".join(texts))["input_ids"])


def learn(model, tokens: torch.Tensor, method: lorary.Method) -> lorary.Adapter:
    """An adapter for these tokens; the model is its base again afterwards."""
    lorary.attach(model, lorary.plan(model, method))
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=2e-3))
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - LENGTH, (ROWS,), generator=generator)
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    adapter = lorary.Adapter.of(model)
    lorary.detach(model)
    return adapter


@torch.no_grad()
def loss(model, tokens: torch.Tensor) -> float:
    rows = tokens[: 16 * LENGTH].view(16, LENGTH)
    return model(input_ids=rows, labels=rows).loss.item()


def main() -> None:
    model, tokenizer = builtin.load_model(), builtin.load_tokenizer()
    tasks = {"c": "builtin:c-headers", "prose": "builtin:topics"}
    held_out = {task: stream(tokenizer, name, "validation") for task, name in tasks.items()}
    # Different methods and ranks: whoever switches need not know.
    adapters = {
        "c": learn(model, stream(tokenizer, tasks["c"], "train"), lorary.method("lora", r=8)),
        "prose": learn(model, stream(tokenizer, tasks["prose"], "train"), lorary.method("lora-fa", r=16)),
    }
    chosen = {"base": None, "c": adapters["c"], "prose": adapters["prose"], "both": list(adapters.values())}
    print(f"{'attached':<10}" + "".join(f"{task + ' loss':>12}" for task in tasks) + f"{'switched in':>14}")
    for name, adapter in chosen.items():
        start = time.perf_counter()
        lorary.switch(model, adapter)
        took = time.perf_counter() - start
        print(
            f"{name:<10}" + "".join(f"{loss(model, t):>12.3f}" for t in held_out.values()) + f"{took * 1e3:>11.1f} ms"
        )


if __name__ == "__main__":
    main()
