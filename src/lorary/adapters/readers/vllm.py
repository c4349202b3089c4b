"""vLLM: LoRA of linear layers and embeddings; it refuses most of what it does not compute.

Read from `vllm/lora/peft_helper.py`, `lora_model.py`, `utils.py` and `model_manager.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from lorary.adapters.peft.config import NAME
from lorary.adapters.readers.folder import AdapterFolder
from lorary.adapters.readers.reader import Finding, Outcome, Reader, first_of, missing_fields, rank_findings
from lorary.errors import Diagnostic

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of `--max-lora-rank`
_MOST_RANK = 16  # of `--max-lora-rank` by default
_HEADS = ("score", "classifier")
_TABLES = (".embed_tokens.base_layer.weight", "lm_head.base_layer.weight")


def _scale(folder: AdapterFolder, site: str, rank: int) -> float:
    """As in PEFT, except that patterns are matched with modules, also for `target_parameters`."""
    if not folder.fields.targets_parameter(f"{site}.weight"):
        return folder.scale(site)
    r, alpha = folder.matched(site)
    return float(alpha / (r**0.5 if folder.fields["use_rslora"] else r))


def _rules(folder: AdapterFolder, most_rank: int) -> Iterator[Finding]:
    yield from missing_fields(VLLM, folder)
    yield from rank_findings(VLLM, folder, Outcome.MISCOMPUTED)  # its scale is the configuration's
    saved = [m for m in folder.fields["modules_to_save"] if m not in _HEADS]
    if saved:
        what = f"vLLM refuses modules trained in full other than {' and '.join(_HEADS)}"
        yield VLLM.finding(Outcome.REJECTED, f"{NAME}: modules_to_save: {saved[0]}", what, merged=True)
    if folder.config.get("bias", "none") != "none":
        yield VLLM.finding(Outcome.REJECTED, f"{NAME}: bias", "vLLM refuses trained biases", merged=True)
    rank = rank_needed(folder)
    if rank > most_rank:
        default = " by default" if most_rank == _MOST_RANK else ""
        what = f"the rank {rank} is above {most_rank}, which vLLM accepts{default}"
        fix = f"start vLLM with --max-lora-rank {serving_rank(rank)}" if default else ""
        yield Finding(Outcome.REJECTED, Diagnostic(NAME, what, fix))
    if unknown := [n for n in VLLM.unexplained(folder) if not n.endswith(_TABLES) and n.split(".")[-2] not in _HEADS]:
        yield VLLM.finding(Outcome.REJECTED, first_of(unknown), "vLLM knows no such tensor", merged=True)


def rank_needed(folder: AdapterFolder) -> int:
    """The highest rank of a folder's configuration."""
    return max([int(folder.fields["r"]), *(int(value) for _, value in folder.fields["rank_pattern"])])


def serving_rank(rank: int) -> int:
    """The smallest value of `--max-lora-rank` for adapters of a rank."""
    return next((size for size in RANKS if size >= rank), rank)


def vllm_reader(most_rank: int) -> Reader:
    """vLLM with a value of `--max-lora-rank`."""
    return Reader(
        "vllm",
        "vLLM",
        "vLLM 0.32.0",
        export="vllm",
        refuses=frozenset(
            {"dora", "residual", "lora_bias", "tokens", "alora", "replication", "qalora", "bdlora", "convolutions"}
        ),
        ignores=frozenset({"absorbed", "arrow", "kasa", "fused_parts", "rope", "unknown"}),
        types=frozenset({"LORA", ""}),
        scale=_scale,
        rules=partial(_rules, most_rank=most_rank),
    )


VLLM = vllm_reader(_MOST_RANK)
