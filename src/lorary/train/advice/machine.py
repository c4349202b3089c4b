"""The machine that a run is advised for: its memory, and whether a predicted run fits into it."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from lorary.analysis.memory.gpu_fit import GB, gigabytes
from lorary.train.runner.memory_forecast import Forecast

_FREE = 0.8  # the share of a computer's memory that a run may take; the system and other programs have the rest


@dataclass(frozen=True)
class Machine:
    """One device.

    Args:
        gpu: whether it is a GPU; otherwise the processor with the computer's memory.
        bytes: its memory.
        bf16: whether a GPU has arithmetic in bfloat16, as NVIDIA's have from Ampere (2020) on. Older ones emulate it.
    """

    gpu: bool
    bytes: int
    bf16: bool = True

    @classmethod
    def here(cls, gigabytes: float | None = None) -> Machine:
        """This machine's GPU, or else its processor.

        Args:
            gigabytes: the memory of a GPU to advise for instead, in GB; its arithmetic is taken for a recent one's.
        """
        if gigabytes is not None:
            return cls(True, int(gigabytes * GB))
        if torch.cuda.is_available():
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            return cls(True, int(torch.cuda.get_device_properties(0).total_memory), native)
        return cls(False, int(psutil.virtual_memory().total))

    def need(self, forecast: Forecast) -> int:
        """The bytes that a run takes on this kind of device."""
        return forecast.need.total if self.gpu else int(forecast.memory.total / _FREE)

    def fits(self, forecast: Forecast) -> bool:
        """Whether a run fits, as far as its memory can be predicted."""
        return forecast.memory.activations is None or self.need(forecast) <= self.bytes

    def __str__(self) -> str:
        return f"a {'GPU' if self.gpu else 'processor'} with {gigabytes(self.bytes)}"
