"""A row of a mixed batch is computed as by the model with its adapter alone; rows without one as by the base."""

from __future__ import annotations

import contextlib
import functools
import gc
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorary
from lorary.errors import LoraryError, StateError
from lorary.serve import mixed
from lorary.serve.batch import Batch, Segment, Weighted
from lorary.serve.form import serving_form
from lorary.serve.layers import ServedLayers
from lorary.serve.ops import cpu
from lorary.serve.serving_form import ServingForm, SiteForm
from lorary.serve.step import RowsError
from lorary.spec.presets import presets

from .. import tiny

Made = tuple[lorary.Adapter, ServingForm]
# rows of each request: few, for compiled code; many, for matrix products
LENGTHS = pytest.mark.parametrize("length", [1, 5, 19], ids=["one row", "short", "long"])


@pytest.fixture(autouse=True, params=["compiled", "without a compiler"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of short segments."""
    if request.param != "compiled":
        monkeypatch.setenv("LORARY_NATIVE", "0")
    elif cpu.native() is None:
        pytest.skip("there is no C compiler")
    return bool(request.param == "compiled")


def adapter_of(model: Any, base: Any, *names: str, targets: Any = "all-linear", seed: int = 3, **options: Any) -> Made:
    """A trained adapter of these presets on a model of its own, and its form on the base."""
    method = lorary.method(*names, **options)
    lorary.attach(model, lorary.plan(model, method, targets))
    adapter = lorary.Adapter.of(tiny.shaken(model, 0.2, seed))
    return adapter, serving_form(adapter, base)


def alone(base: Any, adapter: lorary.Adapter | None, *inputs: Tensor) -> Tensor:
    """The output of the base with one adapter."""
    lorary.switch(base, adapter)
    with torch.no_grad():
        out = base(*inputs)
    lorary.switch(base, None)
    found: Tensor = getattr(out, "logits", out)
    return found


def together(base: nn.Module, adapters: Sequence[Weighted], inputs: Tensor, rows: int, **more: Tensor) -> Tensor:
    """The output of the base for inputs of as many rows each, each with its own adapters."""
    served = ServedLayers(base)
    for weighted in adapters:
        for form, _ in weighted:
            served.cover(form)
    try:
        with served.computing(Batch.of([(weighted, rows, rows) for weighted in adapters])):
            out = base(inputs, **more)
    finally:
        served.remove()
    found: Tensor = getattr(out, "logits", out)
    return found


@contextlib.contextmanager
def noted(note: str) -> Iterator[None]:
    """A block whose errors say which case they are of."""
    try:
        yield
    except AssertionError as error:
        error.add_note(note)
        raise


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


# --- every method -----------------------------------------------------------------------------------------------------

EMBEDDINGS = ["all-linear", "embedding"]
# preset -> what to adapt, and options with which it is odd; the others adapt embeddings too, with r=7
SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (EMBEDDINGS, {"r": 1}),
    "lora-fa": ("all-linear", {"r": 3}),
    "dora": (EMBEDDINGS, {"r": 5}),
    "glora": ("all-linear", {"r": 3}),
    "pissa": ("attention", {"r": 5}),
    "olora": ("attention", {"r": 3}),
    "vera": (EMBEDDINGS, {"r": 24}),
    "melora": (EMBEDDINGS, {"r": 2}),
    "adalora": ("all-linear", {"r": 5, "target": 3}),
    "longlora": (EMBEDDINGS, {"r": 9, "length": 4096}),
    "bitfit": (None, {}),
    "full": (None, {}),
}
# name -> the presets that it refuses: Llama has no biases, GPT-2 no RoPE
MODELS = {"LlamaForCausalLM": {"bitfit"}, "GPT2LMHeadModel": {"longlora"}}


@functools.cache
def of_every_method(name: str) -> dict[str, Made]:
    """preset -> a trained adapter, of all that leave the base as it is."""
    base, made, refused = tiny.seeded(name), {}, set()
    for preset in presets().keys() - {"qlora"}:
        targets, options = SETTINGS.get(preset, (EMBEDDINGS, {"r": 7}))
        try:
            made[preset] = adapter_of(tiny.seeded(name), base, preset, targets=targets, seed=len(preset), **options)
        except LoraryError:
            refused.add(preset)
    assert refused == MODELS[name]
    return made


@LENGTHS
@pytest.mark.parametrize("name", MODELS)
def test_every_method_in_one_batch(name: str, length: int) -> None:
    base, made = tiny.seeded(name), of_every_method(name)
    ids = torch.randint(40, (len(made) + 2, length))
    adapters: list[Weighted] = [(), *[((form, 1.0),) for _, form in made.values()], ()]
    # without positions, GPT-2 asks for the embeddings of one sequence, whose rows are those of no request
    found = together(base, adapters, ids, length, position_ids=torch.arange(length).expand(ids.shape))
    plain = alone(base, None, ids)
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[-1], plain[-1])
    for preset, row, y in zip(made, ids[1:-1], found[1:-1], strict=True):
        with noted(preset):
            close(y, alone(base, made[preset][0], row[None])[0])
