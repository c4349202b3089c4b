"""Peaks that others have published, held to what their libraries would hold for the same model.

The planner simulates lorary's own step. Others keep more: PEFT the input of every adapter in the adapter's precision
and a dropout mask, Transformers' loss all logits in 32 bits and their gradients. So each peak is computed by the
convention of the library that it was published for: bytes for each token, counted from autograd's saved tensors, layer
by layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorary.analysis.memory.gpu_fit import CONTEXT


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder whose block is Llama's.

    Args:
        H: width of the hidden states.
        M: width inside the MLP.
        Q: width of all queries together.
        K: width of all keys together, and of all values.
        n: heads of the queries.
        L: blocks.
        V: vocabulary.
        tied: whether the output head is the embedding.
    """

    H: int
    M: int
    Q: int
    K: int
    n: int
    L: int
    V: int
    tied: bool = False


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
        keeps_inputs: whether a quantised layer with a frozen weight keeps its input (bitsandbytes < 0.44).
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
    linear = a.L * (a.H * (2 * a.Q + 2 * a.K) + 3 * a.H * a.M)
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


# --- what they have published -----------------------------------------------------------------------------------------

GiB = 2**30


@dataclass(frozen=True)
class Published:
    """One measurement of somebody else's.

    Args:
        name: library, model, setting.
        model: its sizes.
        how: that library's convention at that setting.
        tokens: in a micro-batch; two of them for a slope: bytes for each token between them.
        bytes: what was measured.
        driver: whether the driver's count was taken, which has the CUDA context in it.
        why: where the formula cannot be expected to meet it, the reason.
    """

    name: str
    model: Architecture
    how: Convention
    tokens: tuple[int, ...]
    bytes: float
    driver: bool = False
    why: str = ""

    @property
    def predicted(self) -> float:
        """The same by the formulas."""
        sizes = [peak(self.model, self.how, tokens) + (CONTEXT if self.driver else 0) for tokens in self.tokens]
        return sizes[0] if len(sizes) == 1 else (sizes[1] - sizes[0]) / (self.tokens[1] - self.tokens[0])

    @property
    def error(self) -> float:
        """The prediction over the measurement, less one."""
        return self.predicted / self.bytes - 1


def _llama(H: int, M: int, L: int, n: int, kv: int, V: int, tied: bool = False) -> Architecture:
    return Architecture(H, M, H, kv * (H // n), n, L, V, tied)


LLAMA_3_2_1B = _llama(2048, 8192, 16, 32, 8, 128256, True)
LLAMA_3_2_3B = _llama(3072, 8192, 28, 24, 8, 128256, True)
LLAMA_3_1_8B = _llama(4096, 14336, 32, 32, 8, 128256)
LLAMA_2_7B = _llama(4096, 11008, 32, 32, 32, 32000)
LLAMA_2_13B = _llama(5120, 13824, 40, 40, 40, 32000)
QWEN_7B = _llama(4096, 11008, 32, 32, 32, 151936)
QWEN_1_8B = _llama(2048, 5504, 24, 16, 16, 151936)

_TUNE_PLAIN = Convention(r=8, loss=12, adapter=2, checkpointing=True, chunk=512)
_TUNE_NF4 = Convention(r=8, loss=12, adapter=2, checkpointing=True, chunk=512, bits=4.127)


def _lit(r: int, nf4: bool = False) -> Convention:
    packed = {"bits": 4.5, "keeps_inputs": True} if nf4 else {}
    return Convention("attention-qv", r=r, adapter=2, dropout=True, fused_qkv=True, **packed)  # type: ignore[arg-type]


_QWEN = Convention(r=64, loss=12, checkpointing=True, fused_norms=True)
_LOADED = "no formula of a step gives that much; 16 GB of 16-bit weights on the GPU while they are packed would"

CASES = (
    Published(
        "torchtune, Llama-3.2-3B, full, 2 x 4096",
        LLAMA_3_2_3B,
        Convention("full", loss=12, adapter=2),
        (8192,),
        60.0 * GiB,
    ),
    Published(
        "torchtune, the same with checkpoints, chunks, compiled",
        LLAMA_3_2_3B,
        Convention("full", loss=12, adapter=2, checkpointing=True, chunk=1024, compiled=True),
        (8192,),
        24.9 * GiB,
    ),
    Published(
        "torchtune, the same, LoRA r=64",
        LLAMA_3_2_3B,
        Convention(r=64, loss=12, adapter=2, checkpointing=True, chunk=1024, compiled=True),
        (8192,),
        8.5 * GiB,
    ),
    Published("torchtune, Llama-3.1-8B, LoRA r=8, 2 x 2048", LLAMA_3_1_8B, _TUNE_PLAIN, (4096,), 16.2 * GiB),
    Published("torchtune, Llama-3.1-8B, QLoRA r=8, 2 x 2048", LLAMA_3_1_8B, _TUNE_NF4, (4096,), 7.4 * GiB),
    Published("LitGPT, Llama-2-7B, LoRA, 1 x 1304", LLAMA_2_7B, _lit(8), (1304,), 21.30e9),
    Published("LitGPT, Llama-2-7B, LoRA, 2 x 1304", LLAMA_2_7B, _lit(8), (2608,), 29.07e9),
    Published("LitGPT, Llama-2-7B, NF4, 1 x 1304", LLAMA_2_7B, _lit(8, True), (1304,), 13.84e9),
    Published("LitGPT, Llama-2-13B, LoRA, 1 x 1304", LLAMA_2_13B, _lit(8), (1304,), 38.12e9),
    Published("LitGPT, Llama-2-13B, NF4, 1 x 1304", LLAMA_2_13B, _lit(8, True), (1304,), 22.55e9),
    Published("LitGPT, Llama-3-8B, LoRA r=32, 1 x 512", LLAMA_3_1_8B, _lit(32), (512,), 19.73e9),
    Published("LitGPT, Llama-3.2-3B, LoRA r=32, 1 x 512", LLAMA_3_2_3B, _lit(32), (512,), 9.67e9),
    Published("LitGPT, Llama-3.2-1B, LoRA r=32, 1 x 512", LLAMA_3_2_1B, _lit(32), (512,), 4.49e9),
    Published("LitGPT, Llama-3-8B, NF4 r=32, 2 x 512", LLAMA_3_1_8B, _lit(32, True), (1024,), 17.41e9, why=_LOADED),
    Published(
        "PEFT, Llama-3.2-3B, LoRA r=32, 4 x 768",
        LLAMA_3_2_3B,
        Convention("attention-qv", r=32, padding=True),
        (3072,),
        22.29e9,
    ),
    *(
        Published(f"Qwen, 7B, LoRA r=64, 1 x {tokens}", QWEN_7B, _QWEN, (tokens,), size * 1e9, driver=True)
        for tokens, size in ((256, 20.1), (512, 20.4), (1024, 21.5), (2048, 23.8), (4096, 29.7), (8192, 36.6))
    ),
    Published("Qwen, 7B, LoRA, each token beyond 2048", QWEN_7B, _QWEN, (2048, 8192), 2.083e6),
    Published("Qwen, 1.8B, LoRA, each token beyond 2048", QWEN_1_8B, _QWEN, (2048, 8192), 1.758e6),
    Published(
        "Unsloth's table of Transformers, Llama-3.1-8B, each token",
        LLAMA_3_1_8B,
        Convention(loss=18, checkpointing=True),
        (8192, 16384),
        2.653e6,
    ),
)
