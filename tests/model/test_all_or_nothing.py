"""Every change of a model is all or nothing: raised at any operation and at any line, nothing has changed."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorary
from lorary.model.state import state_of
from lorary.model.undo import Undo
from tests import tiny

PACKAGE = os.path.dirname(lorary.__file__) + os.sep


class RaiseAt(TorchDispatchMode):
    """Counts PyTorch's operations, and raises at one of them."""

    def __init__(self, number: int | None = None, error: BaseException | None = None) -> None:
        super().__init__()
        self.count, self.number, self.error = 0, number, error

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count - 1 == self.number and self.error is not None:
            raise self.error
        return function(*args, **(kwargs or {}))


class InterruptAt:
    """Counts the lines that the package runs, and raises KeyboardInterrupt at one of them, as a signal would."""

    def __init__(self, number: int | None = None) -> None:
        self.count, self.number = 0, number

    def __enter__(self) -> InterruptAt:
        self.before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.count += 1
            if self.count - 1 == self.number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace


def spread(total: int, most: int) -> list[int]:
    """So many of the numbers below `total`, evenly spread, and the last few."""
    return sorted({*range(0, total, max(1, total // most)), *range(max(0, total - 5), total)})


# --- the models, and what is done to them -----------------------------------------------------------------------------


def llama(**changes: Any) -> Any:
    return tiny.seeded("LlamaForCausalLM", num_hidden_layers=1, **changes)


TIED = {"tie_word_embeddings": True}
SHORT = {"max_position_embeddings": 3}
LONG = ("longlora",), {"r": 2, "length": 6}

Names = tuple[tuple[str, ...], dict[str, Any]]


def trained(names: Names, targets: Any = ("q_proj", "down_proj"), **changes: Any) -> Any:
    words, options = names
    return tiny.trained(llama(**changes), lorary.method(*words, **options), targets if "r" in options else None)


def attach(*words: str, targets: Any = ("q_proj", "down_proj"), **options: Any) -> Callable[[Any, Path], Any]:
    method = lorary.method(*words, **options)
    return lambda model, _: lorary.attach(model, lorary.plan(model, method, targets if "r" in options else None))


def merged(model: Any, dtype: torch.dtype | None = None) -> Any:
    lorary.merge(model, keep=True)
    return model if dtype is None else model.to(dtype)


def switch(*others: Names) -> Callable[[Any, Path], Any]:
    adapters = [lorary.Adapter.of(trained(names)) for names in others]
    return lambda model, _: lorary.switch(model, adapters)


def load(model: Any, folder: Path) -> Any:
    return lorary.load(model, folder / "adapter")


LORA: Names = ("lora",), {"r": 2}
PISSA: Names = ("pissa",), {"r": 2}
BITS: Names = ("qlora", "pissa"), {"r": 2}
NORMS: Names = ("lora",), {"r": 2, "full": ("norms",)}
GLORA: Names = ("glora",), {"r": 2}
HEAD = ("lm_head", "q_proj")


def of_bitsandbytes() -> Any:
    """A base that another library quantised: its weights have attributes of their own, the scales."""
    model = llama(hidden_size=64, intermediate_size=64)
    method = lorary.method("qlora", r=2, backend="bitsandbytes")
    return lorary.detach(lorary.attach(model, lorary.plan(model, method)))


def trained_there() -> Any:
    return tiny.trained(of_bitsandbytes(), lorary.method("lora", r=2), ("q_proj", "down_proj"))


Change = tuple[Callable[[], Any], Callable[[Any, Path], Any]]
CHANGES: dict[str, Change] = {
    "attach lora": (llama, attach("lora", r=2, full=("norms",))),
    "attach dora": (llama, attach("dora", r=2)),
    "attach vera": (llama, attach("vera", r=4)),
    "attach pissa": (lambda: llama(**TIED), attach("pissa", r=2, targets=HEAD)),
    "attach qlora": (llama, attach("qlora", r=2)),
    "attach qlora, pissa": (llama, attach("qlora", "pissa", r=2)),
    "attach longlora": (lambda: llama(**SHORT), attach("longlora", r=2, length=6)),
    "detach pissa": (lambda: trained(PISSA, HEAD, **TIED), lambda model, _: lorary.detach(model)),
    "detach qlora, pissa": (lambda: trained(BITS), lambda model, _: lorary.detach(model)),
    "detach longlora": (lambda: trained(LONG, **SHORT), lambda model, _: lorary.detach(model)),
    "merge lora": (lambda: trained(LORA, HEAD, **TIED), lambda model, _: lorary.merge(model)),
    "merge pissa": (lambda: trained(PISSA, HEAD, **TIED), lambda model, _: lorary.merge(model, keep=True)),
    "merge qlora": (lambda: trained(BITS), lambda model, _: lorary.merge(model)),
    "merge glora": (lambda: trained(GLORA), lambda model, _: lorary.merge(model, keep=True)),
    "merge longlora": (lambda: trained(LONG, **SHORT), lambda model, _: lorary.merge(model)),
    "unmerge pissa": (lambda: merged(trained(PISSA, HEAD, **TIED)), lambda model, _: lorary.unmerge(model)),
    "unmerge in bf16": (lambda: merged(trained(BITS), torch.bfloat16), lambda model, _: lorary.unmerge(model)),
    "unmerge lora in bf16": (
        lambda: merged(trained(LORA, HEAD, **TIED), torch.bfloat16),
        lambda model, _: lorary.unmerge(model),
    ),
    "unmerge glora": (lambda: merged(trained(GLORA)), lambda model, _: lorary.unmerge(model)),
    "unmerge longlora": (lambda: merged(trained(LONG, **SHORT)), lambda model, _: lorary.unmerge(model)),
    "switch to pissa": (lambda: trained(NORMS), switch(PISSA)),
    "switch from pissa": (lambda: trained(PISSA), switch(NORMS)),
    "switch to two": (lambda: trained(LORA), switch(LORA, LORA)),
    "switch off": (lambda: trained(LONG, **SHORT), lambda model, _: lorary.switch(model, None)),
    "load": (llama, load),
    "attach, bitsandbytes": (of_bitsandbytes, attach("lora", r=2)),
    "merge, bitsandbytes": (trained_there, lambda model, _: lorary.merge(model)),
    "quantize": (llama, lambda model, _: lorary.quantize(model)),
    "dequantize": (lambda: lorary.quantize(llama()), lambda model, _: lorary.dequantize(model)),
}


# --- what must not change ---------------------------------------------------------------------------------------------


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def configuration(model: Any) -> dict[str, Any]:
    return copy.deepcopy(vars(model.config))


def records(model: Any) -> tuple[Any, ...]:
    """lorary's own record, and all that it holds."""
    state = state_of(model)
    if state is None:
        return ()
    kept = state.merged or {}
    tensors = [t for m in kept.values() for t in (m.weight, m.bias, *m.layer.parameters()) if t is not None]
    tensors += list(state.replaced_weights.values())
    fixed = {name: value for name, value in vars(state).items() if name != "merged"}
    return (
        {name: (id(value), str(value)) for name, value in fixed.items() if name not in ("replaced_weights", "full")},
        [(name, id(m.plain), id(m.layer)) for name, m in kept.items()],
        [(id(t), t.dtype, t.detach().double().sum().item(), t.requires_grad) for t in tensors],
    )


class Picture:
    """A model as it is: the very modules and parameters, their flags and values, its configuration, and its answer."""

    def __init__(self, model: Any) -> None:
        self.structure, self.config, self.records = tiny.everything(model), configuration(model), records(model)
        self.values, self.logits = values(model), tiny.exact_logits(model)

    def is_of(self, model: Any) -> bool:
        same = self.structure == tiny.everything(model) and self.config == configuration(model)
        return (
            same
            and self.records == records(model)
            and tiny.same(self.values, values(model))
            and torch.equal(self.logits, tiny.exact_logits(model))
        )


def outcome(model: Any) -> tuple[Any, ...]:
    """A changed model, comparable with another one that was changed in the same way."""
    kinds = [(name, type(m)) for name, m in model.named_modules()]
    flags = [(name, p.requires_grad, p.dtype) for name, p in model.named_parameters()]
    return kinds, flags, configuration(model).keys(), str(lorary.attached(model)), tiny.exact_logits(model).tolist()


@pytest.fixture(autouse=True)
def _modes_of_other_tests() -> Iterator[None]:
    """An interrupt that falls on the very end of a block leaves its mode on: not for the tests that follow."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lorary.save(trained(((*BITS[0], "dora"), BITS[1])), tmp_path / "adapter")
    return tmp_path


ERRORS = (torch.OutOfMemoryError, MemoryError, KeyboardInterrupt)
quietly = pytest.mark.filterwarnings("ignore::lorary.model.bias_flags.BiasWarning")


def fails_at_operations(name: str, folder: Path, most: int = 20) -> None:
    """One model, at which the change fails at one operation after the other until it succeeds."""
    build, change = CHANGES[name]
    expected, model = build(), build()
    change(build(), folder)  # what a dry forward shows is kept for models of one structure
    with RaiseAt() as counting:
        change(expected, folder)
    before = Picture(model)
    for number in spread(counting.count, most):
        error = ERRORS[number % len(ERRORS)]("planted")
        with pytest.raises(type(error)), RaiseAt(number, error):
            change(model, folder)
        assert before.is_of(model), number
    assert outcome(change(model, folder)) == outcome(expected)


@quietly
@pytest.mark.parametrize("name", CHANGES)
def test_raised_at_any_operation_nothing_has_changed(name: str, folder: Path) -> None:
    fails_at_operations(name, folder)


@pytest.mark.parametrize(
    "name",
    [
        *("attach pissa", "attach qlora, pissa", "attach longlora", "load", "switch to pissa", "switch from pissa"),
        *("detach longlora", "merge pissa", "merge qlora", "unmerge in bf16", "unmerge longlora", "quantize"),
    ],
)
def test_interrupted_at_any_line_all_or_nothing_has_changed(name: str, folder: Path) -> None:
    """At the very last lines the change is complete."""
    build, change = CHANGES[name]
    expected = outcome(change(build(), folder))
    model = build()
    with InterruptAt() as counting:
        change(model, folder)
    model, before, undone = build(), None, 0
    for number in spread(counting.count, 15):
        before = before or Picture(model)
        with pytest.raises(KeyboardInterrupt), InterruptAt(number):
            change(model, folder)
        if before.is_of(model):
            undone += 1
        else:
            assert outcome(model) == expected, number
            model, before = build(), None
    assert undone > 10


@pytest.mark.parametrize("part", ["_objects", "_tensors", "_values"])
def test_a_part_that_is_not_undone_would_be_seen(part: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restore = Undo.restore

    def partly(self: Undo) -> None:
        getattr(self, part).clear()
        restore(self)

    monkeypatch.setattr(Undo, "restore", partly)
    with pytest.raises(AssertionError):
        fails_at_operations("attach pissa", folder)


def test_a_second_interrupt_while_it_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(LORA)
    before, restore, calls = Picture(model), Undo.restore, []

    def interrupted(self: Undo) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise KeyboardInterrupt("the second")
        restore(self)

    monkeypatch.setattr(Undo, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the first"), RaiseAt(30, KeyboardInterrupt("the first")):
        lorary.merge(model)
    assert before.is_of(model)
    assert len(calls) == 2
