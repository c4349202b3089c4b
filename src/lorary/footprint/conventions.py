"""How other libraries keep house: what they would hold for the same model, so that their peaks can be computed.

The formulas of `block` are lorary's own. Others keep more: PEFT the input of every adapter in the adapter's precision
and a dropout mask, Transformers' loss all logits in 32 bits and their gradients. Bytes for each token, H, M, Q, K, n, V
as in `architecture`; counted from autograd's saved tensors, layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorary.footprint.architecture import Architecture


@dataclass(frozen=True)
class Convention:
    """How a library trains.

    Args:
        trains: `full`, `all-linear`, or `attention-qv`.
        r: rank of the adapters.
        loss: bytes for each logit: 12 for Transformers' loss, 14 with 16-bit logits still referred to, 18 where
            mixed precision makes 32-bit copies of all outputs.
        chunk: tokens whose logits are there at once; 0: all.
        adapter: bytes of an adapter's number: 4 or 2.
        dropout: whether the adapter's input is dropped from.
        mask: bytes of a number of a dropout mask: 1 on CUDA, that of the activation on a CPU.
        checkpointing: whether blocks are computed again.
        padding: whether batches are padded: keys and values are then expanded to all heads.
        fused_qkv: whether q, k and v are views of one tensor, which is kept whole.
        compiled: whether blocks and loss are compiled: norms and activations are made again, logits stay in 16 bits.
        state: bytes of optimizer state for each number that trains; None: two of the parameter's own size.
        gradients_first: whether gradients are there when the loss is computed (accumulation), or freed at every step.
        fused_norms: whether a norm is one kernel, which keeps its input as it comes.
        bits: bits for each number of the linear layers but the head: 16, or 4.127 and 4.5 for NF4.
        keeps_inputs: whether a packed layer keeps its input although its weight is frozen (bitsandbytes before 0.44).
    """

    trains: str = "all-linear"
    r: int = 16
    loss: int = 14
    chunk: int = 0
    adapter: int = 4
    dropout: bool = False
    mask: int = 1
    checkpointing: bool = False
    padding: bool = False
    fused_qkv: bool = False
    compiled: bool = False
    state: float | None = None
    gradients_first: bool = False
    fused_norms: bool = False
    bits: float = 16
    keeps_inputs: bool = False


def parameters(a: Architecture) -> tuple[int, int]:
    """(numbers in the linear layers of all blocks, all the others: embedding, head, norms)."""
    linear = a.L * (a.H * (2 * a.Q + 2 * a.K) + (3 if a.gated else 2) * a.H * a.M)
    return linear, a.V * a.H * (1 if a.tied else 2) + (2 * a.L + 1) * a.H


def adapters(a: Architecture, c: Convention) -> int:
    """Numbers of the adapters."""
    pairs = [(a.H, a.Q), (a.H, a.K)]  # q, v
    if c.trains == "all-linear":
        pairs += [(a.H, a.K), (a.Q, a.H), (a.H, a.M), (a.H, a.M), (a.M, a.H)]
    return 0 if c.trains == "full" else a.L * c.r * sum(inp + out for inp, out in pairs)


def per_block(a: Architecture, c: Convention) -> int:
    """Bytes that a block of 16-bit activations keeps for each token."""
    rotated = 4 * a.Q + 4 * a.K + 4 * a.n  # q, what attention gives, k and v; sums of exponentials
    rotated += 4 * (a.Q - a.K) if c.padding else 0
    rotated += 2 * a.Q if c.fused_qkv else 0  # v is a view of all three
    if c.compiled:
        wide = 6 * a.M if c.trains != "attention-qv" else 4 * a.M
        return rotated + 8 * a.H + wide + _adapted(a, c) // 4
    norms = 4 * a.H if c.fused_norms else 8 * a.H  # their inputs, in 32 bits where they are made of single operations
    kept = rotated + norms + 6 * a.M  # gate, its activation, up
    if c.keeps_inputs:  # of q, k and v, of gate and up, of down; that of o is kept anyway
        kept += 4 * a.H + 2 * a.M - (0 if c.dropout else 2 * a.H)
    if c.trains == "full":
        return kept + 8 * a.H + 2 * a.M  # normed inputs, also before the norms' weights; the product
    return kept + _adapted(a, c)


def _adapted(a: Architecture, c: Convention) -> int:
    """The adapters' part: inputs once in 16 bits, or for each adapter its own 32-bit or dropped copy and the mask."""
    q_v = c.trains == "attention-qv"
    if c.trains == "full":
        return 0
    shared = 2 * a.H if q_v else 4 * a.H + 2 * a.M
    widths = 2 * a.H if q_v else 5 * a.H + a.Q + a.M
    middles = (2 if q_v else 7) * c.r * (4 if c.adapter == 4 else 2)
    if c.dropout:
        return (c.adapter + c.mask) * widths + middles
    return shared + middles


def peak(a: Architecture, c: Convention, tokens: int) -> int:
    """Bytes of all tensors at the fullest moment of a step.

    Args:
        a: the model.
        c: how it is trained.
        tokens: in a micro-batch, padding included.
    """
    linear, others = parameters(a)
    weights = int(linear * c.bits / 8) + 2 * others
    trained, size = (linear + others, 2) if c.trains == "full" else (adapters(a, c), c.adapter)
    state = trained * (2 * size if c.state is None else c.state)
    masters = trained * size if c.trains != "full" else 0
    gradients = trained * size
    on_loss = _loss(a, c, tokens)
    block, ends = per_block(a, c), (4 if c.fused_norms else 6) * a.H
    if c.checkpointing:
        stored = 2 * a.H * a.L
        through = tokens * (stored + block + 4 * a.M + 4 * a.H)
        at_loss = tokens * (stored + ends) + on_loss
    else:
        through = tokens * (a.L * block + ends)
        at_loss = through + on_loss
    fixed = weights + masters + state
    if not c.gradients_first and c.trains == "full":  # they grow while activations are given back
        through = max(through, gradients + (through if c.checkpointing else 0))
        return int(fixed + max(through, at_loss))
    return int(fixed + gradients + max(through, at_loss))


def _loss(a: Architecture, c: Convention, tokens: int) -> int:
    rows = min(tokens, c.chunk or tokens)
    return rows * a.V * (6 if c.compiled else c.loss)
