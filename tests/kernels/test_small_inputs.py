"""Small inputs take plain operations: the same function, gradients and bytes kept as the fused nodes, less Python."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.analysis.memory.live_bytes import kept_for_backward
from lorary.kernels import low_rank
from lorary.kernels.block_diagonal import add_blocks
from lorary.kernels.low_rank import add_low_rank
from lorary.kernels.row_norms import scale_rows
from lorary.kernels.shared_projection import add_shared_projection

OUT, INP, R, N = 12, 8, 4, 2
SHAPES = {"a row": (1, INP), "rows": (5, INP), "a batch": (2, 3, INP), "a vector": (INP,), "nobody": (0, INP)}
DTYPES = {
    "float64": (torch.float64, torch.float64, 1e-12),
    "float32": (torch.float32, torch.float32, 1e-5),
    "bfloat16 and float32": (torch.bfloat16, torch.float32, 3e-2),
}


def tensors(shape: tuple[int, ...], dtype: torch.dtype, masters: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    sizes = {"W": (OUT, INP), "c": (OUT,), "x": shape}
    own = {"A": (R, INP), "B": (OUT, R), "A_i": (N, R, INP // N), "B_i": (N, OUT // N, R), "b": (OUT,), "d": (R,)}
    made = {name: torch.randn(size, dtype=dtype) for name, size in sizes.items()}
    return made | {name: torch.randn(size, dtype=masters) for name, size in own.items()}


def lora(t: dict[str, Tensor], dropout: float) -> Tensor:
    return add_low_rank(F.linear(t["x"], t["W"], t["c"]), t["x"], t["A"], t["B"], 0.7, dropout)


def melora(t: dict[str, Tensor], dropout: float) -> Tensor:
    return add_blocks(F.linear(t["x"], t["W"], t["c"]), t["x"], t["A_i"], t["B_i"], 0.7, dropout)


def vera(t: dict[str, Tensor], dropout: float) -> Tensor:
    y, A, B = F.linear(t["x"], t["W"], t["c"]), t["A"].detach(), t["B"].detach()
    return add_shared_projection(y, t["x"], A, B, t["b"], t["d"], 0.7, dropout)


def dora(t: dict[str, Tensor], dropout: float) -> Tensor:
    return scale_rows(lora(t, dropout), t["b"], t["c"])


def dora_without_bias(t: dict[str, Tensor], dropout: float) -> Tensor:
    return scale_rows(lora(t, dropout), t["b"])


KERNELS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "lora": (lora, "A B"),
    "melora": (melora, "A_i B_i"),
    "vera": (vera, "b d"),
    "dora": (dora, "A B b"),
    "dora without bias": (dora_without_bias, "A B b"),
}
EACH = pytest.mark.parametrize("kernel", KERNELS)


def results(kernel: str, t: dict[str, Tensor], dropout: float = 0.0) -> list[Tensor]:
    """The output, and the gradients of the input and of the trained tensors."""
    run, trained = KERNELS[kernel]
    t = {name: v.clone() for name, v in t.items()}
    wanted = [t[name].requires_grad_() for name in ("x", *trained.split())]
    torch.manual_seed(3)
    y = run(t, dropout)
    return [y, *torch.autograd.grad(y.square().sum(), wanted)]


@EACH
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "masters", "steps"), DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("autocast", [False, True])
def test_plain_operations_and_the_fused_node_agree(
    kernel: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    masters: torch.dtype,
    steps: float,
    dropout: float,
    autocast: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    t = tensors(shape, dtype, masters)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = results(kernel, t, dropout)
        monkeypatch.setattr(low_rank, "FUSED_FROM", 0)
        expected = results(kernel, t, dropout)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        size = b.abs().max().item() if b.numel() else 0.0
        assert (a - b).abs().double().sum() <= max(a.numel(), 1) * (3e-2 if autocast else steps) * size


@EACH
def test_no_python_node_is_recorded(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they are for. The negative control is the fused node."""

    def nodes() -> set[str]:
        (y, *_) = results(kernel, tensors((5, INP), torch.float32, torch.float32))
        seen, queue = set(), [y.grad_fn]
        while queue:
            node = queue.pop()
            if node is not None:
                seen.add(type(node).__name__)
                queue += [following for following, _ in node.next_functions]
        return seen

    assert not {name for name in nodes() if name.startswith("_")}
    monkeypatch.setattr(low_rank, "FUSED_FROM", 0)
    assert {name for name in nodes() if name.startswith("_")}


@pytest.mark.parametrize("kernel", ["lora", "melora", "dora"])
def test_they_keep_no_more_for_backward(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = tensors((64, INP), torch.float32, torch.float32)
    run, trained = KERNELS[kernel]
    for name in ("x", *trained.split()):
        t[name].requires_grad_()
    kept = kept_for_backward(lambda: run(t, 0.0), beyond=t.values())
    monkeypatch.setattr(low_rank, "FUSED_FROM", 0)
    assert kept <= kept_for_backward(lambda: run(t, 0.0), beyond=t.values())


def test_a_second_derivative_is_right_where_operations_are_plain() -> None:
    t = {name: v.requires_grad_() for name, v in tensors((3, INP), torch.float64, torch.float64).items()}
    names = ("x", "A", "B")

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora(t | {"x": x, "A": A, "B": B}, 0.0)

    assert torch.autograd.gradgradcheck(run, [t[name] for name in names])


def test_large_outputs_take_the_fused_node() -> None:
    x = torch.randn(low_rank.FUSED_FROM // OUT + 1, INP)
    assert not low_rank.is_small(x.new_empty(len(x), OUT))
    y = add_low_rank(x.new_zeros(len(x), OUT), x, torch.randn(R, INP), torch.randn(OUT, R, requires_grad=True), 1.0)
    assert type(y.grad_fn).__name__ == "_AddLowRankBackward"
