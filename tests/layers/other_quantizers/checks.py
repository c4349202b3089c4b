"""Checks of an adapter on a base that another library has quantised, whichever library it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorary
from lorary.layers.adapted import adapted_layers
from tests import tiny


def check_adapter(make: Callable[[], Any], method: lorary.Method, folder: Path, slack: float, **seen: Any) -> None:
    """Attach, train a step, save, load, detach and merge.

    Args:
        make: the quantised base, the same at every call.
        method: the method.
        folder: where the adapter is saved.
        slack: how far the merged model may be from the live one, as a share of what the adapter does: what the base
            rounds in its own products.
        seen: further arguments of `tiny.logits`.
    """
    model = make()
    before, base = tiny.exact_logits(model, **seen), values(model)
    lorary.attach(model, lorary.plan(model, method))
    torch.testing.assert_close(tiny.logits(model, **seen), before, rtol=0, atol=1e-6)
    step(model, method)
    with torch.no_grad():
        tiny.shaken(model)
    live = tiny.logits(model, **seen)
    effect = (live - before).abs().max()
    assert effect > 0.1
    lorary.save(model, folder)
    lorary.detach(model)
    assert tiny.same(base, values(model))
    assert torch.equal(tiny.logits(model, **seen), before)

    again = lorary.load(make(), folder)
    assert torch.equal(tiny.logits(again, **seen), live)
    merged: Any = lorary.merge(again)
    layers = [m for m in merged.modules() if isinstance(m, nn.Linear)]
    assert {type(m) for m in layers} == {nn.Linear}
    assert {m.weight.dtype for m in layers} == {merged.get_input_embeddings().weight.dtype}
    assert (tiny.logits(merged, **seen) - live).abs().max() <= slack * effect


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state dict, a tensor of a class of its own as the plain ones that it is made of."""
    found: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else [None]
        found |= {f"{key}.{name}": (tensor if name is None else getattr(tensor, name)).clone() for name in inner}
    return found


def step(model: Any, method: lorary.Method) -> None:
    """One optimizer step: everything that trains has a gradient, and nothing else has."""
    layers = adapted_layers(model)
    with torch.no_grad():  # away from the start, where half of the gradients are zero
        for layer in layers.values():
            for role in layer.method.trained:
                layer.params[role].add_(0.01)
    model.train()
    ids = tiny.ids()
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in layers.values():
        for role, parameter in layer.params.items():
            trained = role in layer.method.trained
            assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == trained, (layer, role)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or parameter.grad is None, name
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    rules = lorary.rules(model, 1000, optimizer)
    optimizer.step()
    rules.after_step()
    model.zero_grad()
    model.eval()
