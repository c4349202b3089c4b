"""The law that nothing is stale: whichever way a tensor is written, the next forward pass follows."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorary.layers.adapted import Adapted, adapted_layers
from lorary.spec.placement import AdaptedSite

from .cases import Case, seed
from .laws import close

# A route writes values into the tensor under a name of a module. It is asked for before the first forward pass, so that
# it may take an alias then, and carried out after it.
Write = Callable[[Tensor], object]
Route = Callable[[nn.Module, str], Write]


def _tensor(holder: nn.Module, name: str) -> Any:
    return holder._parameters[name] if name in holder._parameters else holder._buffers[name]


def copied(holder: nn.Module, name: str) -> Write:
    def write(values: Tensor) -> None:
        with torch.no_grad():
            _tensor(holder, name).copy_(values)

    return write


def in_inference_mode(holder: nn.Module, name: str) -> Write:
    def write(values: Tensor) -> None:
        with torch.inference_mode():
            _tensor(holder, name).copy_(values)

    return write


def copied_into_data(holder: nn.Module, name: str) -> Write:
    return lambda values: _tensor(holder, name).data.copy_(values)


def data_replaced(holder: nn.Module, name: str) -> Write:
    return lambda values: setattr(_tensor(holder, name), "data", values.clone())


def data_averaged(holder: nn.Module, name: str) -> Write:
    """An exponential moving average, as diffusers and federated learning write it."""

    def write(values: Tensor) -> None:
        data = _tensor(holder, name).data
        data.mul_(0).add_(values)

    return write


def through_a_view(holder: nn.Module, name: str) -> Write:
    return lambda values: _tensor(holder, name).detach().flatten().data.copy_(values.flatten())


def through_numpy(holder: nn.Module, name: str) -> Write:
    t = _tensor(holder, name).detach()
    alias = (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy()

    def write(values: Tensor) -> None:
        alias[...] = (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()

    return write


def through_dlpack(holder: nn.Module, name: str) -> Write:
    alias = torch.from_dlpack(_tensor(holder, name).detach())
    return lambda values: alias.copy_(values)


def in_a_thread(holder: nn.Module, name: str) -> Write:
    def write(values: Tensor) -> None:
        thread = threading.Thread(target=lambda: _tensor(holder, name).data.copy_(values))
        thread.start()
        thread.join()

    return write


def foreach(holder: nn.Module, name: str) -> Write:
    def write(values: Tensor) -> None:
        with torch.no_grad():
            torch._foreach_copy_([_tensor(holder, name)], [values])

    return write


def new_parameter(holder: nn.Module, name: str) -> Write:
    def write(values: Tensor) -> None:
        t = _tensor(holder, name)
        setattr(holder, name, nn.Parameter(values, t.requires_grad) if isinstance(t, nn.Parameter) else values)

    return write


def swapped(holder: nn.Module, name: str) -> Write:
    def write(values: Tensor) -> None:
        t = _tensor(holder, name)
        other = nn.Parameter(values, t.requires_grad) if isinstance(t, nn.Parameter) else values
        torch.utils.swap_tensors(t, other)

    return write


def loaded(holder: nn.Module, name: str) -> Write:
    return lambda values: holder.load_state_dict({name: values}, strict=False)


def loaded_and_assigned(holder: nn.Module, name: str) -> Write:
    return lambda values: holder.load_state_dict({name: values}, strict=False, assign=True)


def moved(holder: nn.Module, name: str) -> Write:
    """Written in another precision, which is where it stays until it is moved back."""

    def write(values: Tensor) -> None:
        dtype = values.dtype
        holder.to(torch.float64)
        with torch.no_grad():
            _tensor(holder, name).copy_(values)
        holder.to(dtype)

    return write


class _WritesData(torch.optim.Optimizer):
    """An optimizer that autograd's version counters do not see, as fused kernels and old code."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad.data)


def by_an_optimizer(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Route:
    def route(holder: nn.Module, name: str) -> Write:
        def write(values: Tensor) -> None:
            t = _tensor(holder, name)
            trained, (t.requires_grad, t.grad) = t.requires_grad, (True, t.detach() - values)
            make([t]).step()
            t.requires_grad, t.grad = trained, None

        return write

    return route


ROUTES: dict[str, Route] = {
    route.__name__: route
    for route in (
        copied,
        in_inference_mode,
        copied_into_data,
        data_replaced,
        data_averaged,
        through_a_view,
        through_numpy,
        through_dlpack,
        in_a_thread,
        foreach,
        loaded,
        loaded_and_assigned,
        moved,
        swapped,
        new_parameter,
    )
} | {
    "SGD": by_an_optimizer(lambda p: torch.optim.SGD(p, lr=1.0)),
    "SGD, foreach": by_an_optimizer(lambda p: torch.optim.SGD(p, lr=1.0, foreach=True)),
    "SGD, fused": by_an_optimizer(lambda p: torch.optim.SGD(p, lr=1.0, fused=True)),
    "an optimizer that writes .data": by_an_optimizer(lambda p: _WritesData(p, {})),
}


def written(layer: Adapted) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every tensor that a layer is computed from, with its holder and its name there."""
    holders = [layer.params, layer.base, *([layer.shared] if layer.shared is not None else [])]
    for holder in holders:
        named = [*holder._parameters.items(), *holder._buffers.items()]
        yield from ((holder, name, t) for name, t in named if t is not None and t.is_floating_point() and t.numel())


def possible(route: str, holder: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether a route goes there: a tensor that a file does not hold is not loaded from one, and a quantised weight's
    scales keep their precision."""
    if route.startswith("loaded"):
        return name in holder.state_dict()
    return not (route == "moved" and not isinstance(tensor, nn.Parameter))


def nothing_is_stale(case: Case, routes: dict[str, Route] | None = None) -> None:
    """After every route to every tensor, with and without gradients, forward equals the merged layer.

    Without a merged form, it equals a new layer with the same tensors, which has never run.
    """
    x, found = case.x(), []
    for layer in adapted_layers(case.trained().eval()).values():
        for place in [(layer.params, role) for role in layer.params] + [(h, n) for h, n, _ in written(layer)]:
            holder, name = place
            for route, make in (ROUTES if routes is None else routes).items():
                tensor = _tensor(holder, name)
                if not possible(route, holder, name, tensor):
                    continue
                write = make(holder, name)
                for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                    with mode():
                        layer(x)
                seed(len(found) + 5)
                write((tensor.detach() * 1.25 + 0.1 * torch.randn(tensor.shape)).to(tensor.dtype))
                for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                    with mode():
                        y = layer(x).clone()
                    try:
                        _equals_merged(case, layer, x, y)
                    except AssertionError as error:
                        found.append(f"{name} by `{route}` under {mode.__name__}: {error}")
    assert not found, "stale:\n" + "\n".join(found)


@torch.no_grad()
def _rebuilt(layer: Adapted) -> Adapted:
    """A layer with the same tensors that knows nothing else of this one."""
    tensors = {role: p.detach().clone() for role, p in layer.params.items()}
    new = Adapted(copy.deepcopy(layer.base), AdaptedSite(layer.site, layer.method), next(iter(tensors.values())).dtype)
    new.load(tensors)
    return new.eval()


def _equals_merged(case: Case, layer: Adapted, x: Tensor, y: Tensor) -> None:
    if layer.join.why_not_merged:
        close(_rebuilt(layer)(x), y, case.dtype)
        return
    W, b = layer.merged()
    expected = layer.kind.run(layer.base, x.to(W.dtype) if x.is_floating_point() else x, W, None)
    close(expected if b is None else expected + layer.kind.broadcast_over_rows(b), y, case.dtype)
