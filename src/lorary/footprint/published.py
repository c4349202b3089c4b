"""Peaks that others have published, with what they say about the run: what the formulas are held to."""

from __future__ import annotations

from dataclasses import dataclass

from lorary.footprint.architecture import Architecture
from lorary.footprint.conventions import Convention, peak
from lorary.footprint.room import CONTEXT

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
    return Architecture("llama", H, M, H, kv * (H // n), n, L, V, tied)


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
