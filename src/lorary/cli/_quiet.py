"""Other libraries' log lines that say nothing to the users of lorary."""

from __future__ import annotations

import logging

_WHERE, _LINE = "bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community"


def quiet_bitsandbytes() -> None:
    """bitsandbytes without its warning about a kernel for its 4-bit layers on CPUs that have AVX512-BF16.

    It looks for the kernel when it is imported, and Transformers imports it through PEFT wherever it is installed:
    every command warned, whatever the base. The weights of lorary's own NF4 never reach that kernel, and
    bitsandbytes' layers (`storage: BnbNF4`) compute without it. Its other messages are shown.
    """
    logging.getLogger(_WHERE).addFilter(_without_the_line)


def _without_the_line(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_LINE)
