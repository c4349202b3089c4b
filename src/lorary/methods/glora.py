"""GLoRA: y = (W + W * A + B) x + b + b * D + E + W C, where * multiplies element by element.

Five terms change the weight and the bias. Each takes one of a few forms: a low-rank matrix (a down part times an up
part), a vector, a scalar, or none: 4 * 4 * 3 * 3 * 3 = 432 structures of a layer. The terms learn their own scale;
there is no alpha.

Chavan et al. 2023, arXiv:2306.07967, equation 3. The element-wise product with A, the forms and the start are those of
the authors' code.

In a supernet one set of tensors serves all structures of a layer (`glora_terms`). Every optimizer step trains a random
structure of every layer (`RandomStructures`); `lorary.search_supernet` then looks for the best ones.

Terms that act on the outputs only (every form but a low-rank A) read the weight through the layer's own forward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorary.errors import Diagnostic, MethodError
from lorary.kernels.elementwise import add_scaled_linear, recomputed, scaled_linear
from lorary.kernels.low_rank import autocasting, without_autocast
from lorary.layers.quantized_weight import is_quantized
from lorary.methods.glora_terms import DOWN, JOIN_ROLES, ROLES, GLoRADelta, pair, structures
from lorary.methods.lora import ConstantScale
from lorary.spec.fields import FLAG, SEED
from lorary.spec.interfaces import Factors, Init, Join, Layer, Rule, Tensors, component
from lorary.spec.presets import Restriction, preset
from lorary.spec.site import Site


@component
class ZeroDownInit(Init):
    """Down parts, vectors and scalars 0; up parts [r, columns] ~ U(-v, v) with v = sqrt(6 / (r + columns)) (Xavier)."""

    fills = ROLES

    def zeros(self, site: Site) -> frozenset[str]:
        return frozenset(DOWN.values())

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        for role, tensor in params.items():
            if role.endswith("u"):
                nn.init.xavier_uniform_(tensor, generator=generator)
            else:
                nn.init.zeros_(tensor)


@component
class GLoRAJoin(Join):
    """W' = W + W * A + s B, b' = b + b * D + E + W C. The weight of a convolution is its kernel as [out, in]."""

    uses = JOIN_ROLES
    supports_dropout = False

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        params, idle = layer.tensors, []
        if layer.training and layer.active_structure is not None:
            whole, params = params, layer.active_structure.slices(params)
            idle = [t for role, t in whole.items() if role not in params]
        y = self._scaled(layer, x, params, _shift(layer, x, params, idle))
        if "Bd" not in params:
            return y
        B, A = pair(layer.site, params)
        return layer.kind.add(layer.base, y, x, A, B, layer.scale, 0.0)

    def _scaled(self, layer: Layer, x: Tensor, params: Tensors, shift: Tensor | None) -> Tensor:
        """(W + W * A) x + b + shift."""
        along, b, a = layer.kind.broadcast_over_rows, layer.bias, params.get("Ad")
        if a is not None and a.dim() == 2:
            return low_rank_scaled(layer, x, a, params["Au"], shift)
        y = layer.run_base(x)
        if a is None:
            return y if shift is None else y + along(shift.to(y.dtype))
        # (1 + a) W x + b + shift = (1 + a) (W x + b) + (shift - a b)
        gain = along(1 + a)
        if b is not None:
            shift = (0 if shift is None else shift) - a * b
        return (y * gain if shift is None else torch.addcmul(along(shift), y, gain)).to(y.dtype)

    def merged(self, params: Tensors, W: Tensor, b: Tensor | None, BA: Factors) -> tuple[Tensor, Tensor | None]:
        params = {role: t.to(W.dtype) for role, t in params.items()}
        merged, a = torch.addmm(W, *BA), params.get("Ad")
        if a is not None:
            merged = torch.addcmul(merged, W, a @ params["Au"] if a.dim() == 2 else a[:, None])
        shift = _change(params, b, lambda c: W @ c)
        if shift is None:
            return merged, b
        return merged, W.new_zeros(W.shape[0]) + shift if b is None else b + shift

    def on_output(
        self, params: Tensors, W: Callable[[], Tensor], b: Callable[[], Tensor | None], BA: Factors
    ) -> tuple[Factors, Tensor | None, Tensor | None]:
        (B, A), params = BA, {role: t.to(BA[0].dtype) for role, t in params.items()}
        gain, out = None, B.shape[0]
        if "Ad" in params:
            gain = _gain(params["Ad"], out)
            B = B / gain[:, None]
        shift = _change(params, b() if "D" in params else None, lambda c: W() @ c)
        return (B, A), gain, None if shift is None else shift.expand(out)


def _gain(a: Tensor, out: int) -> Tensor:
    """The gain 1 + a of every output, which the caller divides by.

    Raises:
        MethodError: A is low-rank, or a gain is 0.
    """
    if a.dim() == 2:
        what = "A is low-rank: W * A has full rank, so this is not a low-rank change of W with a gain for every output"
        raise MethodError("", [Diagnostic("A", what, "merge it into the base")])
    gain = (1 + a).expand(out)
    dead = int((gain == 0).sum())
    if dead:
        what = f"A is -1 at {dead} of {out} outputs, where nothing of W is left to add B to"
        raise MethodError("", [Diagnostic("A", what, "merge it into the base")])
    return gain


def _column(params: Tensors) -> Tensor | None:
    """C [in]: a product of its factors, or a vector."""
    Cd = params.get("Cd")
    return Cd if Cd is None or Cd.dim() == 1 else (Cd @ params["Cu"])[:, 0]


def _change(params: Tensors, b: Tensor | None, Wc: Callable[[Tensor], Tensor]) -> Tensor | None:
    """b * D + E + W C, [out] or [1]; None without these terms."""
    terms = [b * params["D"]] if "D" in params and b is not None else []
    terms += [params["E"]] if "E" in params else []
    c = _column(params)
    terms += [Wc(c)] if c is not None else []
    return sum(terms[1:], start=terms[0]) if terms else None


def _shift(layer: Layer, x: Tensor, params: Tensors, idle: Sequence[Tensor]) -> Tensor | None:
    """The change of the bias, computed once per batch; without gradients, once per `lorary.cached` block.

    The supernet's tensors that the structure of this step does not use enter with an empty slice, so that every tensor
    has a gradient on every rank, whichever structures were drawn.
    """

    def through(c: Tensor) -> Tensor:
        if not layer.kind.rowwise:
            return layer.weight_times(c[None])[:, 0]
        row: Tensor = layer.base(c.to(x.dtype)[None])[0].to(c.dtype)
        return row if layer.bias is None else row - layer.bias

    b = layer.bias
    if not idle and not any(role in params for role in ("Cd", "D", "E")):
        return None
    if not idle and not torch.is_grad_enabled():
        precision = f"{x.dtype}, autocast {torch.is_autocast_enabled(x.device.type)}"  # W c is taken in it
        return layer.once(f"shift {precision}", lambda: cast(Tensor, _change(params, b, through)))
    change = _change(params, b, through)
    if not idle:
        return change
    nothing = torch.stack([t.flatten()[:0].sum() for t in idle]).sum()
    return nothing[None] if change is None else change + nothing


def low_rank_scaled(
    layer: Layer, x: Tensor, Ad: Tensor, Au: Tensor, shift: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """(W + W * (Ad Au)) x + b + shift, without keeping a matrix of W's size for backward.

    Dropout acts on the input of W * (Ad Au) alone, and not on token ids.
    """
    kind, base, b = layer.kind, layer.base, layer.bias
    if layer.site.kind == "embedding":  # one column of W per token: scale the ones that are looked up
        y: Tensor = base(x)
        y = torch.addcmul(y, y, F.linear(F.embedding(x, Au.T), Ad).to(y.dtype))
    elif dropout or _apart(layer, x):
        y = _added(layer, base(x), F.dropout(x, dropout), Ad, Au)
    else:
        W = kind.matrix(base)
        bias, shift = (b, shift) if b is None or shift is None else ((b + shift).to(W.dtype), None)
        if kind.rowwise:
            y = scaled_linear(x, W, Ad, Au, bias)
        else:
            y = recomputed(
                lambda x, Ad, Au: kind.run(base, x, torch.addcmul(W, W, (Ad @ Au).to(W.dtype)), bias), x, Ad, Au
            )
    return y if shift is None else y + kind.broadcast_over_rows(shift.to(y.dtype))


def _apart(layer: Layer, x: Tensor) -> bool:
    """Whether W + W * (Ad Au) as one matrix would be rounded, or has no dense W to be computed from."""
    if is_quantized(layer.base):
        return True
    W = layer.matrix
    return W.dtype.itemsize < 4 or W.dtype != x.dtype or autocasting(x.device)


def _added(layer: Layer, y: Tensor, x: Tensor, Ad: Tensor, Au: Tensor) -> Tensor:
    """y + (W * (Ad Au)) x, the two terms in products of their own."""
    kind, base = layer.kind, layer.base
    if kind.rowwise and not is_quantized(base):
        return add_scaled_linear(y, x, kind.matrix(base), Ad, Au)

    def update(x: Tensor, Ad: Tensor, Au: Tensor) -> Tensor:
        W = kind.matrix(base)  # dequantised again in backward
        if not is_quantized(base):
            return kind.run(base, x, W * (Ad @ Au).to(W.dtype), None)
        with without_autocast(x.device):
            return F.linear(x.to(y.dtype), W.to(y.dtype) * (Ad.to(y.dtype) @ Au.to(y.dtype)))

    return y + recomputed(update, x, Ad, Au)


@component
class RandomStructures(Rule):
    """Supernet training: every optimizer step trains a random structure of every layer.

    The draw depends only on the seed, the step and the layer's name, so all ranks agree and a resumed run repeats it.
    Outside training a layer uses its most general structure.

    Args:
        seed: the seed of the draws.
    """

    seed: int = field(default=0, metadata=SEED)

    needs = ROLES

    def before_step(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int) -> None:
        for layer in layers:
            terms = layer.method.delta
            if isinstance(terms, GLoRADelta):
                layer.active_structure = self.drawn(terms, layer.site, step)

    def drawn(self, terms: GLoRADelta, site: Site, step: int) -> GLoRADelta:
        """The structure of a site at an optimizer step (from 1)."""
        every = structures(terms, site.bias)
        digest = hashlib.sha256(f"{self.seed}/{step}/{site.name}".encode()).digest()
        return every[int.from_bytes(digest, "little") % len(every)]


@preset(
    "glora",
    citation="Chavan et al. 2023, arXiv:2306.07967",
    lr=1e-4,
    when="When layers differ in what they need: a search finds the terms of each layer.",
    answers={"layers=search": {"supernet": True}},
    restrictions={
        "qlora": Restriction(
            "only with A as a vector, a scalar or none, which act on the outputs: there is no dense weight",
            options={"A": "vector"},
        )
    },
)
def glora(
    r: int = 4,
    A: str = "lora",
    B: str = "lora",
    C: str = "lora",
    D: str = "vector",
    E: str = "vector",
    supernet: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """y = (W + W * A + B) x + b + b * D + E + W C, * element by element

    Args:
        r: the rank of the low-rank terms.
        A: the term that scales W element by element: lora, vector (over the outputs), scalar or none.
        B: the term added to W, likewise.
        C: the input whose product with W is added to the bias: lora, vector (over the inputs) or none.
        D: the term that scales the bias: vector, scalar or none.
        E: the term added to the bias, likewise.
        supernet: train a random structure of every layer in every step, for `lorary search`.
        seed: of the random structures.
    """
    if type(supernet) is not bool:  # any text would count as true, "no" included
        problem = Diagnostic("supernet", f"is {supernet!r}; it takes {FLAG['expects']}")
        raise MethodError("invalid method:", [problem])
    components = {
        "delta": GLoRADelta(r, A, B, C, D, E),
        "init": ZeroDownInit(),
        "scale": ConstantScale(1.0),
        "join": GLoRAJoin(),
    }
    return components | ({"rules": (RandomStructures(seed),)} if supernet else {})
