"""A plain evaluator of serving forms: all rows of a model's inputs with the same adapters, from dense matrices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from lorary.layers.kinds import KINDS, kind_of
from lorary.serve.forms.serving_form import ServingForm, SiteForm


@contextlib.contextmanager
def computing(model: nn.Module, *adapters: ServingForm | tuple[ServingForm, float]) -> Iterator[None]:
    """A block in which a model computes with these forms, each with its weight, one after the other."""
    with contextlib.ExitStack() as stack:
        for one in adapters:
            form, weight = one if isinstance(one, tuple) else (one, 1.0)
            for path in dict.fromkeys([*form.overrides, *form.sites, *form.rotary]):
                module = model.get_submodule(path)
                had = vars(module).get("forward")
                stack.callback(*((delattr, module, "forward") if had is None else (setattr, module, "forward", had)))
                module.forward = _forward(module, module.forward, form, path, weight)
        yield


def _forward(module: Any, before: Callable[..., Any], form: ServingForm, path: str, weight: float) -> Any:
    own, site = form.overrides.get(path), form.sites.get(path)

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        if path in form.rotary:
            return form.rotary[path](x, *args, **kwargs)
        if own is None:
            y = before(x, *args, **kwargs)
        else:
            with changed(module, own):
                y = before(x, *args, **kwargs)
        return y if site is None else with_terms(module, y, x, site, weight)

    return forward


@contextlib.contextmanager
def changed(module: Any, values: Any) -> Iterator[None]:
    """A block in which a module's parameters and buffers have these values."""
    held = {name: getattr(module, name).data for name in values}
    for name, value in values.items():
        getattr(module, name).data = value
    try:
        yield
    finally:
        for name, value in held.items():
            getattr(module, name).data = value


def with_terms(module: nn.Module, y: Tensor, x: Tensor, form: SiteForm, weight: float) -> Tensor:
    """gain * y + weight * (M x + shift), with the dense M = diag(b) B diag(d) A, in fp32 and rounded once."""
    kind, dtype = KINDS[str(kind_of(module))], y.dtype
    columns = kind.broadcast_over_rows
    y = y.float() if form.gain is None else y.float() * columns(form.gain)
    if form.A is not None and form.B is not None:
        A = form.A.float() if form.d is None else form.d.float()[:, None] * form.A.float()
        B = form.B.float() if form.b is None else form.b.float()[:, None] * form.B.float()
        y = y + weight * kind.run(module, x.float() if x.is_floating_point() else x, B @ A, None)
    y = y if form.shift is None else y + weight * columns(form.shift.float())
    return y.to(dtype)
