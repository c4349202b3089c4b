"""The rules of methods on fused experts: what they do to the matrix of an expert, they do to a layer of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

import lorary
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.methods.o_lora import SequentialLoRA

E, HIDDEN, WIDE, STEPS = 3, 24, 10, 10


class Fused(nn.Module):
    """The experts of a block, whose first matrix is adapted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Llama4TextConfig(hidden_size=HIDDEN, intermediate_size=WIDE, num_local_experts=E)
        self.experts = Llama4TextExperts(config)
        for p in self.experts.parameters():
            nn.init.normal_(p, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts(x)
        return y


class Apart(nn.Module):
    """The same function, with a linear layer for the first matrix of every expert."""

    def __init__(self, fused: Fused) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(HIDDEN, 2 * WIDE, bias=False) for _ in range(E))
        self.register_buffer("down", fused.experts.down_proj.detach().clone())
        self.act = fused.experts.act_fn
        with torch.no_grad():
            for layer, W in zip(self.first, fused.experts.gate_up_proj, strict=True):
                layer.weight.copy_(W.T)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for layer, rows, W in zip(self.first, x.chunk(E), self.down, strict=True):
            gate, up = layer(rows).chunk(2, -1)
            outputs.append(up * self.act(gate) @ W)
        return torch.cat(outputs)


METHODS: dict[str, Any] = {
    "AdaLoRA": lambda: lorary.method("adalora", r=4, target=2, start=2, final=3),
    "AdaLoRA, the paper's penalty": lambda: lorary.method("adalora", r=4, target=1, start=1, final=2, form="paper"),
    "Delta-LoRA": lambda: lorary.method("delta-lora", r=2, start=3),
    "Delta-LoRA at once": lambda: lorary.method("delta-lora", r=2, start=-1),
    **{
        f"O-LoRA {options}": lambda options=options: lorary.method("o-lora", r=2, **options).replace(
            delta=SequentialLoRA(2, past=(2, 1))
        )
        for options in ({}, {"hard": True}, {"form": "paper", "mean": False}, {"norms": 0.1})
    },
}


def expert(tensors: Any, e: int) -> dict[str, Tensor]:
    return {role: t.detach()[e].clone() for role, t in tensors.items()}


def trained(model: nn.Module, x: Tensor, target: Tensor) -> list[Adapted]:
    """Ten steps with the rules at work."""
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=2e-2, weight_decay=0.05))
    rules = lorary.rules(model, STEPS, optimizer)
    for _ in range(STEPS):
        ((model(x) - target).square().mean() + rules.penalty()).backward()
        rules.after_backward()
        optimizer.step()
        rules.after_step()
        optimizer.zero_grad()
    return list(adapted_layers(model).values())


@pytest.mark.parametrize("name", METHODS)
def test_a_rule_does_the_same_to_an_expert_as_to_a_layer_of_its_own(name: str) -> None:
    method, fused = METHODS[name](), Fused()
    apart = Apart(fused)
    lorary.attach(fused, lorary.plan(fused, method, "experts.gate_up_proj"))
    lorary.attach(apart, lorary.plan(apart, method, "all-linear"))
    (together,) = adapted_layers(fused).values()
    torch.manual_seed(3)
    with torch.no_grad():
        for role, p in together.params.items():
            if role.endswith("_past"):
                p.normal_(std=0.3)
                if role == "A_past":
                    p[1, 2] = p[1, 0]  # an expert whose earlier tasks have fewer directions
    for e, layer in enumerate(adapted_layers(apart).values()):
        layer.load(expert(together.params, e))
    x, target = torch.randn(12, HIDDEN), torch.randn(12, HIDDEN)
    before = [factor.detach().clone() for factor in together.factors()]
    (one,), several = trained(fused, x, target), trained(apart, x, target)
    B, A = one.factors()
    assert not torch.equal(B @ A, before[0] @ before[1])
    for e, layer in enumerate(several):
        Be, Ae = layer.factors()
        torch.testing.assert_close(B[e] @ A[e], Be @ Ae, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused(x), apart(x), rtol=1e-4, atol=1e-4)


def test_directions_that_no_expert_uses_are_removed() -> None:
    model = Fused()
    lorary.attach(model, lorary.plan(model, lorary.method("adalora", r=4, target=2), "experts.gate_up_proj"))
    (layer,) = adapted_layers(model).values()
    with torch.no_grad():
        layer.params["E"].fill_(1.0)
        layer.params["E"][:, 1] = 0
        layer.params["E"][0, 3] = 0
    adapter = lorary.Adapter.of(model)
    small = adapter.compact()
    assert small.tensors["experts.gate_up_proj"]["P"].shape == (E, 2 * WIDE, 3)
    assert small.tensors["experts.gate_up_proj"]["Q"].shape == (E, 3, HIDDEN)
    for before, after in zip(adapter.low_rank().values(), small.low_rank().values(), strict=True):
        torch.testing.assert_close(after.B @ after.A, before.B @ before.A)


def test_the_next_task_follows_one_on_experts() -> None:
    """`plan(after=...)`: the factors of the first task are kept for every expert."""
    model = Fused()
    lorary.attach(model, lorary.plan(model, lorary.method("o-lora", r=2), "experts.gate_up_proj"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    first, x = lorary.Adapter.of(model), torch.randn(12, HIDDEN)
    live = model(x)
    lorary.detach(model)
    plan = lorary.plan(model, lorary.method("o-lora", r=2, hard=True), "experts.gate_up_proj", after=[first])
    lorary.attach(model, plan)
    torch.testing.assert_close(model(x), live)
    (layer,) = adapted_layers(model).values()
    assert layer.params["A_past"].shape == (E, 2, HIDDEN)
    trained(model, x, torch.randn(12, HIDDEN))
    products = layer.params["A"] @ layer.params["A_past"].mT
    assert products.abs().max() < 1e-5 * layer.params["A"].abs().max()
