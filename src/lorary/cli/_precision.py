"""The precisions of a merge: its options, in what the base is loaded, and what is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lorary.adapters.adapter import Adapter
    from lorary.model.loading.source import ModelSection

DTYPES, ONTO = ("auto", "float32", "bfloat16", "float16"), ("trained", "original")


def check_precision(headline: str, dtype: str, onto: str) -> None:
    """Check the options; a merge into a few bits is refused with the reason.

    Raises:
        ConfigError: every invalid option.
    """
    from lorary.errors import ConfigError, Diagnostic, did_you_mean
    from lorary.model.merge import LOSSY

    problems = []
    for option, given, known in (("--dtype", dtype, DTYPES), ("--onto", onto, ONTO)):
        if given in known:
            continue
        if re.search(r"(?<!\d)[48](?!\d)|quant|packed", given.lower()):  # nf4, 4bit, int8, fp8, ...
            fix = "merge into bfloat16 or float32, or keep the 4-bit base and the adapter beside it"
            problems.append(Diagnostic(f"{option} {given}", f"would quantise the merged weights: {LOSSY}", fix))
        else:
            problems.append(Diagnostic(f"{option} {given}", "is unknown", did_you_mean(given, known)))
    if problems:
        raise ConfigError(headline, problems)


def merge_precisions(
    path: Path, adapter: Adapter, section: ModelSection, dtype: str, onto: str
) -> tuple[ModelSection, torch.dtype]:
    """The base in its precision for loading, and the dtype to write.

    The base is never narrower than on disk or than the result, so that everything is rounded once; but if the run
    rounded it before quantisation, so does the merge.

    Args:
        path: the adapter or run folder as it was given.
        adapter: the adapter.
        section: the base.
        dtype: the option.
        onto: the option.

    Raises:
        FileError: onto the original weights of a base that is quantised on disk.
    """
    import torch

    from lorary.errors import Diagnostic, FileError
    from lorary.model.loading.from_pretrained import load_config

    config = load_config(section)
    if onto == "original" and getattr(config, "quantization_config", None) is not None:
        fix = "name the model that it was made from with --base, and pass --force"
        what = "is quantised on disk: its original weights are not available"
        raise FileError(f"cannot merge {path} onto the original weights:", [Diagnostic(section.id, what, fix)])
    saved = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    target = saved if dtype == "auto" else getattr(torch, dtype)
    wide = torch.promote_types(saved, target)
    if not adapter.method.storage.writable and onto == "trained":
        trained = getattr(torch, _run_dtype(path), saved)
        wide = wide if torch.promote_types(trained, saved) == trained else trained
    return section.model_copy(update={"dtype": str(wide).removeprefix("torch.")}), target


def _run_dtype(path: Path) -> str:
    """The dtype in which the run loaded the base; `auto` if unknown."""
    from lorary.cli._comparison_rows import run_config
    from lorary.errors import LoraryError

    try:
        run = run_config(path)
    except (LoraryError, OSError):
        return "auto"
    return "auto" if run is None else run.model.dtype
