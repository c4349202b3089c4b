"""A Transformers model: plan, attach, train a little, save, load, generate. Runs offline on the built-in base.

python examples/transformers_model.py                  # or: ... path/to/a/model
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorary
from lorary import builtin
from lorary.builtin import corpora

STEPS, ROWS, LENGTH = 30, 8, 96  # optimizer steps, rows per step, tokens per row


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else str(builtin.path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    plan = lorary.plan(model, lorary.method("rslora", "lora+", r=8, alpha=8), targets=["attention", "mlp"])
    print(plan)
    lorary.attach(model, plan, seed=0)

    texts = [row["text"] for row in corpora.load("builtin:topics", "train")]
    tokens = torch.tensor(tokenizer("\n".join(texts))["input_ids"])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=3e-4))
    rules = lorary.rules(model, steps=STEPS)
    model.train()
    for step in range(1, STEPS + 1):
        starts = torch.randint(len(tokens) - LENGTH, (ROWS,), generator=generator)
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss + rules.penalty()
        loss.backward()
        rules.after_backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        rules.after_step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    model.eval()

    with tempfile.TemporaryDirectory() as out:
        lorary.save(model, out)
        again = lorary.load(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), out)
    prompt = tokenizer("The", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(**prompt).logits, model(**prompt).logits)
        text = again.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    print(tokenizer.decode(text, skip_special_tokens=True))


if __name__ == "__main__":
    main()
