"""Layers as [out, inp] matrices: every kind, every geometry, and what cannot be adapted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

import lorary
from lorary.layers import kinds
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.layers.kinds import KINDS, kind_of, site, why_not_adaptable
from lorary.spec.site import Part, Site


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(3, 5), Site("x", "linear", 5, 3, True)),
        (nn.Linear(3, 5, bias=False), Site("x", "linear", 5, 3, False)),
        (Conv1D(5, 3), Site("x", "transposed", 5, 3, True)),
        (FalconLinear(3, 5), Site("x", "linear", 5, 3, True)),
        (nn.Embedding(9, 4), Site("x", "embedding", 4, 9, False)),
        (nn.Conv1d(4, 6, 3, groups=2), Site("x", "conv1d", 6, 6, True, (), 2, (3,))),
        (nn.Conv2d(4, 6, (3, 2)), Site("x", "conv2d", 6, 24, True, (), 1, (3, 2))),
        (nn.Conv3d(2, 6, (1, 2, 3), bias=False), Site("x", "conv3d", 6, 12, False, (), 1, (1, 2, 3))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_site_says_what_a_file_must_know(layer: nn.Module, expected: Site) -> None:
    assert site("x", layer) == expected
    assert hash(site("x", layer)) == hash(expected)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_site_needs_shapes_only(device: str) -> None:
    with torch.device(device):
        layers = [nn.Linear(3, 5), Conv1D(5, 3), nn.Conv2d(4, 6, 3), nn.Embedding(9, 4)]
    for layer in layers:
        found = site("x", layer)
        assert KINDS[found.kind].matrix(layer).shape == (found.out_features, found.in_features)


def test_what_is_no_layer() -> None:
    for module in (
        nn.LayerNorm(3),
        nn.ReLU(),
        nn.ConvTranspose2d(3, 3, 3),
        nn.Bilinear(2, 2, 2),
        nn.EmbeddingBag(3, 2),
    ):
        assert kind_of(module) is None
        assert why_not_adaptable(module) == f"a {type(module).__name__} has no weight matrix that lorary knows"
    with pytest.raises(TypeError, match="x: a ReLU has no weight matrix that lorary knows"):
        site("x", nn.ReLU())


class Doubling(nn.Linear):
    """A linear layer that is not one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def weight_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Embedding(4, 3, max_norm=1.0), "its max_norm rewrites the weight in every forward pass"),
        (Doubling(2, 2), "Doubling overrides forward, so it may not compute W x + b"),
        (
            OPTLearnedPositionalEmbedding(4, 3),
            "OPTLearnedPositionalEmbedding overrides forward, so it may not compute W x + b",
        ),
        (
            weight_norm(nn.Linear(2, 2)),
            "its weight is computed from other parameters (weight_norm, spectral_norm or another parametrization)",
        ),
        (
            nn.utils.spectral_norm(nn.Conv1d(2, 2, 1)),
            "its weight is computed from other parameters (weight_norm, spectral_norm or another parametrization)",
        ),
        (nn.LazyLinear(3), "its weight has no shape before the model has seen its first input"),
        (nn.Linear(2, 2), None),
        (Conv1D(2, 2), None),
        (FalconLinear(2, 2), None),
        (BartScaledWordEmbedding(4, 3, 0, embed_scale=1.0), None),
        (Gemma3TextScaledWordEmbedding(4, 3, 0, embed_scale=2.0), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_adapted_all_the_same(layer: nn.Module, reason: str | None) -> None:
    assert why_not_adaptable(layer) == reason


# --- the verbs, against the layers themselves ------------------------------------------------------------------------


def _conv(dims: int, **options: object) -> Callable[[], nn.Module]:
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return lambda: cls(4, 6, **({"kernel_size": 3} | options))  # type: ignore[arg-type]


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(4, 6), lambda: torch.randn(2, 3, 4)),
    "linear, one vector": (lambda: nn.Linear(4, 6), lambda: torch.randn(4)),
    "linear, no rows": (lambda: nn.Linear(4, 6), lambda: torch.randn(0, 4)),
    "Falcon's": (lambda: FalconLinear(4, 6), lambda: torch.randn(2, 4)),
    "GPT-2's": (lambda: Conv1D(6, 4), lambda: torch.randn(2, 3, 4)),
    "embedding": (lambda: nn.Embedding(9, 6), lambda: torch.tensor([[1, 8, 8], [0, 3, 1]])),
    "embedding, one id": (lambda: nn.Embedding(9, 6), lambda: torch.tensor(3)),
    "embedding, int32": (lambda: nn.Embedding(9, 6), lambda: torch.tensor([3, 3], dtype=torch.int32)),
    "embedding, padded": (lambda: nn.Embedding(9, 6, padding_idx=8), lambda: torch.tensor([8, 3, 8])),
    "embedding, scaled": (
        lambda: Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=2.5),
        lambda: torch.tensor([1, 0, 5]),
    ),
    "embedding, scaled by a number": (
        lambda: BartScaledWordEmbedding(9, 6, 0, embed_scale=2.5),
        lambda: torch.tensor([1, 0, 5]),
    ),
    "conv1d": (_conv(1), lambda: torch.randn(2, 4, 9)),
    "conv1d, unbatched": (_conv(1, stride=2, groups=2), lambda: torch.randn(4, 9)),
    "conv1d, causal": (_conv(1, padding=2, dilation=2), lambda: torch.randn(1, 4, 9)),
    "conv2d, groups and dilation": (_conv(2, groups=2, dilation=(2, 1)), lambda: torch.randn(2, 4, 8, 7)),
    "conv2d, depthwise, unbatched": (
        lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1, padding_mode="replicate"),
        lambda: torch.randn(6, 5, 5),
    ),
    "conv2d, multiplied depthwise": (lambda: nn.Conv2d(4, 12, 3, groups=4), lambda: torch.randn(2, 4, 5, 5)),
    "conv2d, same": (_conv(2, padding="same", kernel_size=(3, 5)), lambda: torch.randn(2, 4, 6, 6)),
    "conv2d, valid": (_conv(2, padding="valid", stride=(2, 1)), lambda: torch.randn(2, 4, 6, 6)),
    "conv2d, same, circular": (
        _conv(2, padding="same", padding_mode="circular", dilation=2),
        lambda: torch.randn(2, 4, 7, 7),
    ),
    "conv2d, reflect": (_conv(2, padding=(1, 2), padding_mode="reflect", stride=2), lambda: torch.randn(2, 4, 6, 6)),
    "conv2d, channels last": (
        _conv(2, padding=1),
        lambda: torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last),
    ),
    "conv3d": (_conv(3, kernel_size=2, groups=2, padding=1), lambda: torch.randn(2, 4, 3, 4, 3)),
}
EACH = pytest.mark.parametrize(("make", "x"), LAYERS.values(), ids=LAYERS)


def shaken(layer: nn.Module, **options: object) -> Adapted:
    model = nn.Sequential(layer)
    lorary.attach(model, lorary.plan(model, lorary.method(r=2, **options), "0"), dtype=layer.weight.dtype)
    with torch.no_grad():
        for p in adapted_layers(model)["0"].params.values():
            p.normal_()
    return adapted_layers(model)["0"]


@EACH
def test_run_is_the_layer(make: Callable[[], nn.Module], x: Callable[[], Tensor]) -> None:
    layer, inputs = make(), x()
    kind = KINDS[kind_of(layer) or ""]
    b = getattr(layer, "bias", None)
    torch.testing.assert_close(kind.run(layer, inputs, kind.matrix(layer), b), layer(inputs))


@EACH
def test_a_matrix_goes_back_into_the_layers_own_layout(make: Callable[[], nn.Module], x: Callable[[], Tensor]) -> None:
    layer = make()
    kind = KINDS[kind_of(layer) or ""]
    again = kind.weight(layer, kind.matrix(layer).clone())
    assert torch.equal(again, layer.weight)
    assert again.is_contiguous()


@EACH
def test_add_is_run_with_the_product(make: Callable[[], nn.Module], x: Callable[[], Tensor]) -> None:
    layer, inputs = shaken(make().double()), x()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    W, b = layer.merged()
    expected = layer.kind.run(layer.base, inputs, W, b)
    got = layer(inputs)
    assert got.dtype == torch.float64
    assert got.shape == layer.base(inputs).shape
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@EACH
def test_the_merged_layer_is_the_adapted_one(make: Callable[[], nn.Module], x: Callable[[], Tensor]) -> None:
    model = nn.Sequential(make().double())
    lorary.attach(model, lorary.plan(model, lorary.method(r=2), "0"), dtype=torch.float64)
    with torch.no_grad():
        for p in adapted_layers(model)["0"].params.values():
            p.normal_()
    inputs = x()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    before = model(inputs)
    lorary.merge(model)
    assert not adapted_layers(model)
    torch.testing.assert_close(model(inputs), before, rtol=1e-11, atol=1e-11)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_keep_the_precision_of_the_base(
    make: Callable[[], nn.Module], x: Callable[[], Tensor], dtype: torch.dtype
) -> None:
    layer = make().to(dtype)
    inputs = x().to(dtype) if x().is_floating_point() else x()
    expected = layer(inputs)
    model = nn.Sequential(layer)
    lorary.attach(model, lorary.plan(model, lorary.method(r=2), "0"))
    assert all(p.dtype == torch.float32 for p in adapted_layers(model)["0"].params.values())
    got = model(inputs)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


@EACH
def test_a_vector_along_the_output(make: Callable[[], nn.Module], x: Callable[[], Tensor]) -> None:
    layer, inputs = make(), x()
    kind = KINDS[kind_of(layer) or ""]
    gain = torch.linspace(1, 2, site("x", layer).out_features)
    y = layer(inputs)
    out_dim = -1 if kind.broadcast_over_rows(gain).dim() == 1 else y.dim() - kind.broadcast_over_rows(gain).dim()
    rows = (y * kind.broadcast_over_rows(gain)).movedim(out_dim, -1)
    torch.testing.assert_close(rows, y.movedim(out_dim, -1) * gain)


def test_dropout_does_not_touch_token_ids() -> None:
    layer = shaken(nn.Embedding(9, 6), dropout=0.9).train()
    x = torch.tensor([1, 2, 3])
    assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize("make", [LAYERS["linear"][0], LAYERS["conv1d"][0]])
def test_dropout_touches_the_adapters_input_only(make: Callable[[], nn.Module]) -> None:
    layer = shaken(make(), dropout=0.5).train()
    x = torch.randn(2, 4) if isinstance(layer.base, nn.Linear) else torch.randn(2, 4, 5)
    y = layer(x)
    assert not torch.equal(y, layer(x))
    with torch.no_grad():
        layer.params["B"].zero_()
    assert torch.equal(layer(x), layer.base(x))


# --- parts of a fused weight -----------------------------------------------------------------------------------------


def test_rows_of_a_part() -> None:
    assert Part("q", 2, 3).rows().tolist() == [2, 3, 4]
    assert Part("k", 1, 2, 6, 3).rows().tolist() == [1, 2, 7, 8, 13, 14]


def test_place_puts_each_block_on_its_rows_and_zeros_elsewhere() -> None:
    parts = (Part("q", 0, 1, 3, 2), Part("v", 2, 1, 3, 2))
    here = Site("x", "linear", 6, 5, False, parts)
    B = torch.arange(1.0, 9.0).reshape(4, 2)  # two rows each
    assert here.place(B).tolist() == [
        [1, 2, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 5, 6],
        [3, 4, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 7, 8],
    ]


def test_place_lets_gradients_through() -> None:
    here = Site("x", "linear", 6, 5, False, (Part("v", 4, 2),))
    B = torch.randn(2, 3, requires_grad=True)
    here.place(B).sum().backward()
    assert torch.equal(B.grad, torch.ones(2, 3))


def test_conv1d_of_gpt_2_is_known_without_importing_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(kinds.sys.modules, "transformers.pytorch_utils")
    assert kind_of(Conv1D(3, 2)) is None  # nobody who could have made one is there
    assert kind_of(nn.Linear(3, 2)) == "linear"
