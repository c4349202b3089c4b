"""The laws that hold for every method of the family. Each raises AssertionError where it is broken."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorary
from lorary.errors import FileError, MethodError, StateError
from lorary.layers.adapted import adapted_layers
from lorary.layers.kinds import KINDS, kind_of
from lorary.layers.wrappers import submodule
from lorary.methods.adalora import SVDDelta
from lorary.serve.forms.form import serving_form

from ..serve.reference import computing
from .cases import Case, numbers, seed


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Equal up to rounding in this dtype, relative to the largest value."""
    steps = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    gap = (a.double() - b.double()).abs().max().item()
    size = max(a.double().abs().max().item(), b.double().abs().max().item())
    assert gap <= steps * size, f"off by {gap:.2e} at a size of {size:.2e}"


def nothing_moves_at_step_0(case: Case) -> None:
    x, model = case.x(), case.attached()
    y, before = model(x), case.kept()(x)
    if case.method.join and not case.method.join.exact_start:
        starts_almost_exactly(case, y, before)
        return
    if not any(p.init.residual_init for p in case.plan.sites):
        assert torch.equal(y, before)
        return
    if case.packed:
        starts_within_storage_error(case, model)
        return
    # the base has given up s B A: equal up to the rounding of the larger of the two that cancel
    with torch.no_grad():
        for layer in (layer for layer in adapted_layers(model).values() if layer.init.residual_init):
            delta = layer.add_delta(torch.zeros_like(layer.base(x)), x).flatten()
            assert bool(delta.any()), "the delta starts at zero: then it should not say that it moves the base"
    close(torch.cat([y.flatten(), delta]), torch.cat([before.flatten(), delta]), case.dtype)


def starts_almost_exactly(case: Case, y: Tensor, before: Tensor) -> None:
    """A start near the base's function: as near as the papers' starts are, and not exactly there."""
    gap = (y.double() - before.double()).abs().max().item()
    assert gap <= 1e-4 * before.double().abs().max().item()
    assert gap > 0 or case.dtype is torch.bfloat16, "it starts exactly: then it should say so"


def refuses_to_merge(case: Case, model: torch.nn.Module) -> None:
    """A join without a merged form says so wherever one is asked for, and nothing has changed."""
    why = case.method.join.why_not_merged
    before, y = copy.deepcopy(model.state_dict()), model(case.x())
    for layer in adapted_layers(model).values():
        with pytest.raises(MethodError, match=re.escape(why)):
            layer.merged()
    for keep in (False, True):
        with pytest.raises(StateError, match=re.escape(why)):
            lorary.merge(model, keep=keep)
    assert adapted_layers(model)
    assert torch.equal(model(case.x()), y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def starts_within_storage_error(case: Case, model: torch.nn.Module) -> None:
    """What is packed is the rest, W - s B0 A0: the layer is off by what packing loses of that, and by nothing else."""
    for name, layer in adapted_layers(model).items():
        plain = submodule(case.base(), name)
        W = KINDS[kind_of(plain)].matrix(plain).float()
        B, A = layer.start_factors()
        rest = W - layer.scale * B @ A
        assert (layer.merged()[0] - W).norm() <= 0.15 * rest.norm()
        assert (layer.merged()[0] - W).norm() > 0, "nothing was packed"


def merged_is_forward(case: Case) -> None:
    x, model = case.x(), case.trained()
    y = model(x)
    assert not torch.equal(y, case.kept()(x)), "training changed nothing: the law would hold of anything"
    if case.method.join and case.method.join.why_not_merged:
        refuses_to_merge(case, model)
        return
    for layer in adapted_layers(model).values():  # the specification, before anything is rounded to the weight's dtype
        W, b = layer.merged()
        exact = KINDS[layer.site.kind].run(layer.base, x.to(W.dtype) if x.is_floating_point() else x, W, None)
        exact = exact if b is None else exact + layer.kind.broadcast_over_rows(b)
        close(exact, layer(x), case.dtype)
    lorary.merge(model)
    assert not adapted_layers(model)
    close(model(x), y, case.dtype)


def only_what_should_train_trains(case: Case) -> None:
    model = case.trained()  # at step 0 some gradients are zero by design; a zero is a gradient all the same
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(case.x()).square().sum().backward()
    for layer in adapted_layers(model).values():
        for role, p in layer.params.items():
            expected = role not in layer.method.frozen and role not in layer.method.delta.fixed_roles
            has = p.grad is not None and bool((p.grad != 0).any())
            assert has == expected, f"{role}: gradient {has}, expected {expected}"
    allowed = {id(p) for layer in adapted_layers(model).values() for p in layer.params.values()}
    full = {f.name for f in case.plan.full if f.trains}
    for name, p in model.named_parameters():
        if id(p) not in allowed:
            assert (p.grad is not None) == (name.replace(".base.", ".") in full), name
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = lorary.param_groups(model, lr=0.1)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in trainable}
    torch.optim.SGD(groups).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    if case.method.delta is not None:
        counts = [numbers(layer.method, case.kind) for layer in adapted_layers(model).values()]
        assert sum(p.numel() for p in adapter_parameters(model)) == sum(counts)


def adapter_parameters(model: torch.nn.Module) -> list[Tensor]:
    return [p for layer in adapted_layers(model).values() for p in layer.params.values() if p.requires_grad]


def factors_are_the_delta(case: Case) -> None:
    x, model = case.x(), case.finished
    for layer in adapted_layers(model).values():
        B, A = layer.factors()
        y = layer.base(x).detach()
        if layer.bias is not None:
            y = y - layer.kind.broadcast_over_rows(layer.bias.detach())
        delta = layer.add_delta(torch.zeros_like(y), x)
        M = (layer.scale * (B.double() @ A.double())).detach()
        exact = layer.kind.run(layer.base, x.double() if x.is_floating_point() else x, M, None)
        close(exact, delta, case.dtype)
        assert torch.linalg.matrix_rank(M).max() <= min(*M.shape[-2:], A.shape[-2])


def saved_and_loaded_is_equal(case: Case, folder: Path) -> None:
    x, model = case.x(), case.finished
    lorary.save(model, folder)
    other = lorary.load(case.base(), folder).eval()
    theirs = dict(other.named_parameters())
    assert set(theirs) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert torch.equal(p, theirs[name]), name
        assert p.dtype == theirs[name].dtype, name
    assert torch.equal(other(x), model(x))
    assert lorary.load_adapter(folder).method == case.method


def detach_gives_the_base_back(case: Case) -> None:
    model = case.base()
    before = dict(model.named_parameters())
    values = copy.deepcopy(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    lorary.attach(model, case.plan)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    model(case.x())
    if case.packed:
        detach_gives_the_packed_base_back(case, model)
        return
    with lorary.disabled(model):
        assert torch.equal(model(case.x()), case.base()(case.x()))
    lorary.detach(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name in before:
        assert after[name] is before[name], name
        assert after[name].requires_grad == flags[name], name
        assert torch.equal(after[name], values[name]), name


def detach_gives_the_packed_base_back(case: Case, model: torch.nn.Module) -> None:
    """Bit for bit, where all that is packed is the weight; else the function that the layer had without its delta."""
    with lorary.disabled(model):
        y = model(case.x())
    moved = case.method.init is not None and case.method.init.residual_init
    expected = case.base() if moved else case.kept()
    lorary.detach(model)
    close(model(case.x()), y, case.dtype)
    if moved:
        found, plain = (submodule(m, case.plan.sites[0].site.name) for m in (model, expected))
        W, was = found.weight.float(), plain.weight
        assert type(found) is type(plain)
        assert (W - was.float()).norm() <= 0.15 * max(was.float().norm(), W.norm()) * case.plan.sites[0].scale
        return
    assert torch.equal(y, expected(case.x()))
    state = model.state_dict()
    assert list(state) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name


def compiles_whole(case: Case) -> None:
    torch._dynamo.reset()
    x, model = case.x(), case.trained()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(x), model(x), case.dtype)
    compiled(x).square().sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        close(compiled(x), model(x), case.dtype)


def rate(case: Case, model: torch.nn.Module) -> float:
    """A learning rate with which a few steps are seen: the less a step of it does, the more is needed."""
    if isinstance(case.method.delta, SVDDelta):  # three small factors, one of them zero
        return 0.015
    vectors = all(p.dim() == 1 for p in adapter_parameters(model))
    fastest = max((rate for _, rate in case.method.lr), default=1.0)
    return (1e-2 if vectors else 1e-3) / fastest**0.5


def learns(case: Case) -> None:
    """A few optimizer steps bring the layer nearer to another one, its rules at work, and all is finite."""
    model, x = case.attached(), case.x()
    target = case.base()(x).detach()
    seed(4)
    target += 0.1 * torch.randn_like(target)
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=rate(case, model)))
    rules = lorary.rules(model, 8, optimizer)
    losses = []
    for _ in range(8):
        loss = (model(x) - target).float().square().mean()
        (loss + rules.penalty()).backward()
        rules.after_backward()
        optimizer.step()
        rules.after_step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0], losses


def low_rank_form_is_forward(case: Case) -> None:
    """On the base as it was, y = gain * (W x + B A x) + b + shift, wherever the method has that form."""
    x, model = case.x(), case.finished
    adapter = lorary.Adapter.of(model)
    base = lorary.detach(copy.deepcopy(model)) if case.packed else case.base()
    if any(name.rpartition(".")[0] == case.kind.layer for name in adapter.full):
        return  # the layer's own bias has moved as well
    try:
        forms = adapter.low_rank(base)
    except MethodError:
        assert without_low_rank_form(case), "every other join has this form"
        return
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            form, plain = forms[name], submodule(base, name)
            kind = KINDS[kind_of(plain)]
            xx = x.float() if x.is_floating_point() else x
            y = kind.run(plain, xx, kind.matrix(plain).float() + form.B @ form.A, None)
            y = y if form.gain is None else y * kind.broadcast_over_rows(form.gain)
            for shift in (getattr(plain, "bias", None), form.shift):
                y = y if shift is None else y + kind.broadcast_over_rows(shift.float())
            close(y, layer(x), case.dtype)


def without_low_rank_form(case: Case) -> bool:
    """Whether a join need not be a low-rank change with a gain: GLoRA's A, HiRA, (IA)³ of the inputs, no merge."""
    join: Any = case.method.join
    return bool(type(join).__name__ == "GLoRAJoin" or another_weight(case) or join.why_not_merged)


def another_weight(case: Case) -> bool:
    """Whether every row of the adapter needs a dense weight of its own: HiRA, (IA)³ of the inputs."""
    scales_weight = type(case.method.join).__name__ == "TimesWeight"
    return scales_weight or any("l_ff" in p.shapes for p in case.plan.sites)


def served_is_forward(case: Case) -> None:
    """All rows computed with the serving form are those of the model with the adapter; the base is untouched."""
    x, model = case.x(), case.finished
    adapter, base = lorary.Adapter.of(model), case.kept().eval()
    if case.packed and any(p.init.residual_init for p in case.plan.sites):
        with pytest.raises(FileError, match="is quantised already"):
            serving_form(adapter, base)
        return
    join = case.method.join
    if join and (join.why_not_merged or (case.packed and another_weight(case))):
        with pytest.raises(MethodError, match=re.escape(join.why_not_merged or "and the base's weight is quantised")):
            serving_form(adapter, base)
        return
    if case.kind.experts > 1:
        with pytest.raises((MethodError, FileError), match=r"cannot use another adapter|rows cannot be computed apart"):
            serving_form(adapter, base)
        return
    before = copy.deepcopy(base.state_dict())
    form = serving_form(adapter, base)
    with torch.no_grad(), computing(base, form):
        close(base(x), model(x), case.dtype)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


LAWS = [
    nothing_moves_at_step_0,
    merged_is_forward,
    only_what_should_train_trains,
    factors_are_the_delta,
    low_rank_form_is_forward,
    served_is_forward,
    detach_gives_the_base_back,
    learns,
]


def hold(case: Case, folder: Path) -> None:
    """Every law of one case, whichever others are broken.

    Raises:
        ExceptionGroup: the errors of the laws that are, each with the name of its law.
    """
    case, broken = dataclasses.replace(case), {}  # a case of its own: what it has made goes when it is done
    for name, law in [(law.__name__, law) for law in LAWS] + [("saved_and_loaded_is_equal", None)]:
        seed(0)
        try:
            with case.kind.around():
                law(case) if law else saved_and_loaded_is_equal(case, folder)
        except Exception as error:
            error.add_note(f"the law: {name}")
            broken[name] = error
    if broken:
        raise ExceptionGroup(f"broken: {', '.join(broken)}", list(broken.values()))
