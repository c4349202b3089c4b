"""LoRA-FA: A stays where it started, and its layer's input is not kept."""

from __future__ import annotations

import torch
from torch import nn

import lorary
from lorary.analysis.memory.live_bytes import kept_for_backward
from lorary.layers.adapted import adapted_layers


def attached(*names: str, width: int = 24, **options: float) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(width, 12, bias=False))
    return lorary.attach(model, lorary.plan(model, lorary.method(*names, r=4, **options), "0"))


def test_a_never_changes_and_b_does() -> None:
    model = attached("lora-fa")
    layer = adapted_layers(model)["0"]
    before = layer.params["A"].clone()
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=0.1, weight_decay=0.1))
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(6, 24)).square().sum().backward()
        optimizer.step()
    assert not layer.params["A"].requires_grad
    assert torch.equal(layer.params["A"], before)
    assert layer.params["B"].abs().min() > 0


def test_the_gradient_of_b_is_that_of_lora() -> None:
    x = torch.randn(6, 24)
    grads = []
    for names in ((), ("lora-fa",)):
        model = attached(*names)
        model(x).square().sum().backward()
        grads.append(adapted_layers(model)["0"].params["B"].grad)
    assert torch.equal(*grads)


def test_the_update_stays_in_the_row_space_of_a() -> None:
    model = attached("lora-fa")
    layer = adapted_layers(model)["0"]
    with torch.no_grad():
        layer.params["B"].normal_()
    update = layer.merged()[0] - layer.weight
    A = layer.params["A"].detach()
    projected = update @ torch.linalg.pinv(A) @ A
    torch.testing.assert_close(update, projected, rtol=1e-4, atol=1e-5)


def test_what_is_kept_for_backward_is_r_wide() -> None:
    x = torch.randn(100, 512)
    kept = {}
    for names in ((), ("lora-fa",)):
        model = attached(*names, width=512)
        kept[names] = kept_for_backward(lambda model=model: model(x), beyond=[*model.parameters()])
    assert kept[("lora-fa",)] == 100 * 4 * 4  # z = A x: tokens * r * 4 bytes
    assert kept[()] == kept[("lora-fa",)] + 100 * 512 * 4  # and the input
