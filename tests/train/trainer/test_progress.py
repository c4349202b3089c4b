"""The lines of a running training."""

from __future__ import annotations

import io
from types import SimpleNamespace

from lorary.train.trainer.progress import ProgressLines


def test_an_evaluation_shows_a_classifiers_accuracy() -> None:
    stream, state = io.StringIO(), SimpleNamespace(is_world_process_zero=True, global_step=2, max_steps=4)
    lines = ProgressLines(stream)
    lines.on_log(None, state, None, {"eval_loss": 0.5})
    lines.on_log(None, state, None, {"eval_loss": 0.5, "eval_accuracy": 0.75})
    assert stream.getvalue() == "step 2/4  held-out loss 0.5000\nstep 2/4  held-out loss 0.5000  accuracy 75.0%\n"
