"""The built-in language model and data sets, so that everything runs without a network.

The base is an ordinary model folder (`path()`), read by Transformers' own `from_pretrained`; the data sets are in
`lorary.builtin.corpora`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorary.errors import Diagnostic, FileError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["NAME", "load_model", "load_tokenizer", "path"]

NAME = "builtin:base"  # in configurations, commands and adapters
_MODEL = Path(__file__).parent / "model"


def path() -> Path:
    """The folder of the built-in base: a 3 M-parameter Llama in bf16 with its tokenizer, card and report.

    Raises:
        FileError: the package was installed without it.
    """
    if not (_MODEL / "model.safetensors").is_file():
        raise FileError(
            "the built-in base is missing:",
            [Diagnostic(str(_MODEL), "no model.safetensors", "reinstall lorary, or run scripts/train_base.py")],
        )
    return _MODEL


def load_model(dtype: torch.dtype | str = "float32") -> PreTrainedModel:
    """The built-in base as a Transformers model in evaluation mode, its weights cast from bf16 to `dtype`.

    Raises:
        FileError: the package was installed without it.

    >>> load_model().num_parameters()
    3049920
    """
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path(), dtype=dtype)
    model.config.name_or_path = NAME  # recorded by adapters; the folder differs by machine
    return model


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The built-in base's tokenizer: byte-level, so it has tokens for every string. It adds no BOS or EOS by itself.

    Raises:
        FileError: the package was installed without it.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path())
    return tokenizer
