"""A plain PyTorch model and loop, without Transformers: a small network learns half of a picture's rows, then LoRA
teaches it the other half while the base stays as it is.

    python examples/plain_pytorch.py
"""

import torch
from torch import nn

import lorary


def picture(n: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates [n * n, 2] in [-1, 1] and a smooth brightness [n * n, 1] at each."""
    axis = torch.linspace(-1, 1, n)
    xy = torch.cartesian_prod(axis, axis)
    return xy, torch.sin(4 * xy[:, :1]) * torch.cos(3 * xy[:, 1:]) + 0.5 * xy[:, :1] * xy[:, 1:]


def fit(model: nn.Module, groups: list[dict], x: torch.Tensor, y: torch.Tensor, steps: int) -> None:
    """Any loop will do. The three calls of `tuning` are for methods with rules; for LoRA they do nothing."""
    optimizer = torch.optim.AdamW(groups)
    rules = lorary.rules(model, steps) if lorary.Adapted in map(type, model.modules()) else None
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), y) + (rules.penalty() if rules else 0)
        loss.backward()
        if rules:
            rules.after_backward()
        optimizer.step()
        if rules:
            rules.after_step()
        optimizer.zero_grad()


def error(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return nn.functional.mse_loss(model(x), y).item()


def main() -> None:
    torch.manual_seed(0)
    x, y = picture()
    left = x[:, 0] < 0
    model = nn.Sequential(nn.Linear(2, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 1))
    fit(model, [{"params": model.parameters(), "lr": 5e-3}], x[left], y[left], steps=300)
    print(
        f"base:    error {error(model, x[left], y[left]):.4f} on the left, {error(model, x[~left], y[~left]):.4f} right"
    )

    # The input and output layers have few rows or columns; rank 8 on the hidden layer, less there.
    plan = lorary.plan(model, lorary.method("lora", r=8), targets=["0", "2", "4"], ranks={"0": 2, "4": 1})
    print(plan)
    lorary.attach(model, plan)
    fit(model, lorary.param_groups(model, lr=1e-2), x[~left], y[~left], steps=300)
    print(f"adapted: error {error(model, x[~left], y[~left]):.4f} on the right")

    adapted = model(x)
    with lorary.disabled(model):
        print(f"base again: error {error(model, x[left], y[left]):.4f} on the left")
    lorary.merge(model)
    print(f"merged is adapted, up to {(model(x) - adapted).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
