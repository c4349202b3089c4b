"""Which optimizer a name of a configuration stands for, where Transformers does not know it, or cannot have it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from lorary.errors import Problem, TrainingError
from lorary.paged import PagedAdamW

FOREIGN = ("adamw_bnb_8bit", "paged_adamw_32bit")  # bitsandbytes' own
_MANY = "paged_adamw"  # bitsandbytes' where it is at home, ours elsewhere
_OWN = "paged_adamw_torch"


def known_as(name: str) -> str:
    """The name that Transformers' arguments take; where `own` gives another optimizer, that of the same formula.

    Raises:
        TrainingError: the name is that of one in bitsandbytes, which is not installed.
    """
    if name in FOREIGN and not _installed():
        fix = f"install bitsandbytes, or set training.optimizer: {_OWN if name.startswith('paged') else 'adamw_torch'}"
        problem = Problem("training.optimizer", f"{name} is in bitsandbytes, which is not installed", fix)
        raise TrainingError("there is no such optimizer here:", [problem])
    if name == _MANY and torch.cuda.is_available() and _installed():
        return "paged_adamw_32bit"
    return "adamw_torch" if name in (_MANY, _OWN) else name


def own(name: str, args: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """lorary's optimizer of that name, as a trainer's `optimizer_cls_and_kwargs`; None where it is another's.

    Args:
        name: of the configuration.
        args: the trainer's arguments.
    """
    if name not in (_MANY, _OWN) or known_as(name) != "adamw_torch":
        return None
    betas = (args.adam_beta1, args.adam_beta2)
    return PagedAdamW, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}


def _installed() -> bool:
    return find_spec("bitsandbytes") is not None
