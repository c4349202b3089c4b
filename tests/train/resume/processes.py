"""Training in a forked child, which may be killed: everything is imported once, and every child begins alike."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorary.train.trainer import checkpoint


def forked(work: Callable[[], Any]) -> tuple[int, Any]:
    """Does something in a process of its own: its exit status, and its result if it came to one."""
    read, write = os.pipe()
    pid = child(lambda: _tell(write, work()))
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    return status, json.loads(text) if text else None


def child(work: Callable[[], Any]) -> int:
    """Begins something in a process of its own, which exits with 1 where it fails; its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        gc.freeze()  # what the parent has made need not be looked through again
        # PyTorch makes its pool anew in a child at first use, and several threads at once (those in which Transformers
        # reads weights) may meet it half made
        torch.set_num_threads(torch.get_num_threads())
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def _tell(descriptor: int, result: Any) -> None:
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(result))


def contents(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint: adapter, optimizer, rules and random numbers byte by byte, the log without times."""
    found: dict[str, Any] = {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in (checkpoint.TRAINER_STATE, "MANIFEST.json")
    }
    record = json.loads((path / checkpoint.TRAINER_STATE).read_text())
    lines = [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in record.pop("log_history")]
    return found | {"log": lines, "record": {k: v for k, v in record.items() if "best_model" not in k}}


TIMES = ("runtime", "per_second")
