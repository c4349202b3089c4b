"""TensorBoard's event files in the run folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback

_log = logging.getLogger("lorary.train")


class TensorBoardInFolder(TensorBoardCallback):  # type: ignore[misc]  # Transformers has no types
    """Transformers' TensorBoard logger, writing to a given folder. A resumed run continues the curves.

    Args:
        folder: of the event files.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            # what an interrupted session logged after its last checkpoint is logged again
            again = state.global_step + 1 if state.global_step else None
            self.tb_writer = SummaryWriter(str(self.folder), purge_step=again)
            _log.info("watch it: tensorboard --logdir %s", self.folder)
        super().on_train_begin(args, state, control, **kwargs)
