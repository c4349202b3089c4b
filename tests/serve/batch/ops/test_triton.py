"""The Triton kernels compute what the reference does: interpreted on the CPU, in earnest where there is a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from lorary.serve.batch import prepared
from lorary.serve.batch.batch import Batch
from lorary.serve.batch.layers import ServedLayers
from lorary.serve.batch.ops import triton
from lorary.serve.batch.ops.table import AdapterTable
from lorary.serve.batch.ops.triton import Items, expand, shrink
from lorary.serve.forms.serving_form import ServingForm, SiteForm
from tests.kernels.for_gpu import compiled

from .cases import PIECES, adapters, close, expected, slots, table_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU tests/conftest.py asks for the interpreter
CAPACITY = 10  # more than there are items: the rest are padding


def add_rows(table: AdapterTable, items: Items, x: Tensor, y: Tensor) -> None:
    """The terms of the second layer, computed beside those of the first, which no adapter adapts."""
    h = shrink(table.tensor, torch.tensor([0, 1], dtype=torch.int32, device=DEVICE), items, x)
    h[0].nan_to_num_()  # nothing was written to it
    expand(table.tensor, 0, items, h[0], y)
    expand(table.tensor, 1, items, h[1], y)


# the interpreter takes a tenth of a second for an item
FEW = {name: PIECES[name] for name in ("sorted", "sums", "none")} | {"one row each": PIECES["one row each"][:7]}
CASES = [
    (torch.float32, (45, 131), False),
    (torch.float32, (7, 5), True),
    (torch.bfloat16, (45, 131), True),
    (torch.float16, (64, 33), False),
]


@pytest.mark.parametrize(("dtype", "size", "transposed"), CASES, ids=str)
def test_kernels_are_the_reference(size: tuple[int, int], dtype: torch.dtype, transposed: bool) -> None:
    """Real ranks, base rows, weighted sums; one set of buffers for all steps, as a captured graph has."""
    inp, out = size
    items = Items(CAPACITY, torch.device(DEVICE))
    forms = adapters(inp, out, dtype, DEVICE, transposed=transposed)
    table = table_of(forms, dtype, DEVICE)
    x, y0 = (torch.randn(40, width, device=DEVICE).to(dtype) for width in size)
    for pieces in FEW.values():
        y = y0.clone()
        items.fill(list(slots(table, forms, pieces)))
        add_rows(table, items, x, y)
        close(y, expected(forms, pieces, x, y0))
        idle = sorted(set(range(40)) - {row for _, start, stop, _ in pieces for row in range(start, stop)})
        assert torch.equal(y[idle], y0[idle])


def test_rows_of_a_wider_tensor() -> None:
    """Strides of x and y are their own."""
    forms = adapters(45, 31, torch.float32, DEVICE, transposed=False)
    table, items = table_of(forms, torch.float32, DEVICE), Items(CAPACITY, torch.device(DEVICE))
    x, y = torch.randn(40, 60, device=DEVICE)[:, 9:54], torch.randn(40, 50, device=DEVICE)[:, 3:34]
    pieces = PIECES["sorted"]
    wanted = expected(forms, pieces, x, y)
    items.fill(list(slots(table, forms, pieces)))
    add_rows(table, items, x, y)
    close(y, wanted)


def test_more_items_than_there_is_room_for() -> None:
    """A graph that was captured with fewer would leave rows out."""
    items = Items(2, torch.device(DEVICE))
    items.fill([(0, 0, 32, 1.0)])
    with pytest.raises(ValueError, match="3 items, and the capacity is 2"):
        items.fill([(0, 0, 33, 1.0)])


@pytest.mark.parametrize("buffer", ["starts", "lengths", "slots", "counts", "weights"])
def test_every_buffer_is_read(buffer: str) -> None:
    forms = adapters(45, 31, torch.float32, DEVICE, transposed=False)
    table, items = table_of(forms, torch.float32, DEVICE), Items(CAPACITY, torch.device(DEVICE))
    x, y = torch.randn(40, 45, device=DEVICE), torch.randn(40, 31, device=DEVICE)
    wanted = expected(forms, PIECES["sums"], x, y)
    items.fill(list(slots(table, forms, PIECES["sums"])))
    getattr(items, buffer).zero_()
    add_rows(table, items, x, y)
    with pytest.raises(AssertionError):
        close(y, wanted)


def test_layers_with_the_same_input_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on; not if the input has changed in between, or another step has begun."""
    forms = adapters(45, 31, torch.float32, DEVICE, transposed=False)
    table = AdapterTable(dict.fromkeys(["layer", "other"], torch.float32), torch.device(DEVICE))
    forms = [ServingForm(f.uid, f.sites | {"other": g.sites["layer"]}) for f, g in zip(forms, forms[::-1], strict=True)]
    for form in forms:
        table.add(form)
    launches = list[int]()

    def counted(table: Tensor, layers: Tensor, items: Items, x: Tensor) -> Tensor:
        launches.append(len(layers))
        return shrink(table, layers, items, x)

    monkeypatch.setattr(triton, "shrink", counted)
    launcher, pieces = triton.Launcher(), PIECES["sorted"]
    x, y0 = torch.randn(40, 45, device=DEVICE), torch.randn(40, 31, device=DEVICE)
    for step, expected_launches in enumerate(([1, 1], [2], [2, 1])):
        launches.clear()
        items = launcher.prepare(list(slots(table, forms, pieces)), 40, x.device)
        for index, name in enumerate(("layer", "other")):
            if step == 2 and name == "other":
                x.mul_(2)
            y = y0.clone()
            launcher.add_rows(table.tensor, index, items, x, y)
            named = [ServingForm("", {"layer": form.sites[name]}) for form in forms]
            close(y, expected(named, pieces, x, y0))
        assert launches == expected_launches


def test_a_model_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short segments by the kernels, in the layers of a model."""
    launcher = triton.Launcher(capacity=6)
    monkeypatch.setattr(prepared, "kernels_for", lambda _: launcher)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8)).to(DEVICE)
    served, forms = ServedLayers(model), list[ServingForm]()
    for rank in (1, 5, 17):
        sizes = {"0": (40, 24), "2": (8, 40)}
        sites = {
            path: SiteForm(torch.randn(rank, inp, device=DEVICE), torch.randn(out, rank, device=DEVICE))
            for path, (out, inp) in sizes.items()
        }
        forms.append(ServingForm(str(rank), sites))
        served.cover(forms[-1])
    x = torch.randn(1, 9, 24, device=DEVICE)
    adapters = [(), *[((form, 1.0),) for form in forms], ((forms[0], 0.5), (forms[2], -1.0))]
    lengths = [2, 3, 1, 2, 1]
    batch = Batch.of([(weighted, rows, rows) for weighted, rows in zip(adapters, lengths, strict=True)])
    with served.computing(batch):
        found = model(x)
    monkeypatch.setattr(prepared, "kernels_for", lambda _: None)
    with served.computing(batch):
        close(found, model(x))
    served.remove()
    assert torch.equal(found[:, :2], model(x)[:, :2])


ARGUMENTS = dict.fromkeys(("table",), "*i64") | dict.fromkeys(("weights", "h"), "*fp32")
ARGUMENTS |= dict.fromkeys(("chosen", "starts", "lengths", "slots", "counts"), "*i32")
ARGUMENTS |= dict.fromkeys(("layers", "layer", "inp", "out", "x_row", "y_row", "capacity"), "i32")
CONSTANTS = {"FIELDS": 10, "MOST": 256, "ROWS": 16, "RANKS": 16, "TILE": 128, "PARTS": 4, "INTERPRETED": False}


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """To machine code, without a GPU: tensor cores are used, and no atomics."""
    types = ARGUMENTS | {"x": "*bf16", "y": "*bf16"}
    found = compiled(tmp_path, "lorary.serve.batch.ops.triton", types, {"_shrink": CONSTANTS, "_expand": CONSTANTS})
    for name, (made, _, _, mma, atomics) in found.items():
        assert (name, made, atomics) == (name, "True", "0")
        assert int(mma) > 0
