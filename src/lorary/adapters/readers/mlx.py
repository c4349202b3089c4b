"""mlx-lm: a form of its own, one rank and one scale for all layers.

Read from `mlx_lm/tuner/utils.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from lorary.adapters.peft.config import NAME
from lorary.adapters.readers.folder import AdapterFolder
from lorary.adapters.readers.reader import Finding, Outcome, Reader, first_of
from lorary.files.strict_json import show

_KINDS = ("lora", "dora", "full")
_NEEDED = ("rank", "scale", "dropout")


def _rules(folder: AdapterFolder) -> Iterator[Finding]:
    def refused(where: str, what: str) -> Finding:
        return MLX.finding(Outcome.REJECTED, where, what, merged=True)

    kind, parameters = folder.config.get("fine_tune_type", "lora"), folder.config.get("lora_parameters")
    if kind not in _KINDS:
        yield refused(f"{NAME}: fine_tune_type", f"is {show(kind)}, which mlx-lm does not know")
    if kind == "full":
        return
    if "num_layers" not in folder.config:
        yield refused(f"{NAME}: num_layers", "is missing, and mlx-lm needs it")
    if not isinstance(parameters, dict):
        yield refused(f"{NAME}: lora_parameters", "is missing, and mlx-lm needs it")
        return
    if lacking := [key for key in _NEEDED if key not in parameters]:
        yield refused(f"{NAME}: lora_parameters: {lacking[0]}", "is missing, and mlx-lm needs it")
    rank = parameters.get("rank")
    if other := [n for n, shape in folder.tensors.items() if n.endswith(".lora_a") and shape[-1:] != (rank,)]:
        shown = list(folder.tensors[other[0]])
        yield refused(first_of(other), f"has the shape {shown}, and mlx-lm makes every layer of the rank {show(rank)}")


MLX = Reader("mlx", "mlx-lm", "mlx-lm 0.32.2", export="", rules=_rules, form="mlx")
