"""Training arguments that cannot be combined with an adapter."""

from __future__ import annotations

from typing import Any

from lorary.errors import Diagnostic, TrainingError

_REFUSED = {  # argument -> (why, what to do)
    "push_to_hub": ("checkpoints stay on this machine", "upload the adapter folder"),
    "auto_find_batch_size": ("would change the order of the data", "set a batch size"),
    "use_liger_kernel": ("its fused loss reads the weight of the head past an adapter", "leave it out"),
    "sync_ref_model": ("the reference is the frozen base itself", "leave it out"),
}


def refuse_arguments(args: Any) -> None:
    """Refuse these arguments.

    Raises:
        TrainingError: every one that is set.
    """
    problems = [Diagnostic(name, *why) for name, why in _REFUSED.items() if getattr(args, name, False)]
    if problems:
        raise TrainingError("these settings cannot be combined with an adapter:", problems)
