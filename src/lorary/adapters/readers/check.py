"""The verdicts of the programs that read adapters on one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torch import nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.hub import adapter_folder, local_folder
from lorary.adapters.readers.folder import read_folder
from lorary.adapters.readers.llama_cpp import LLAMA_CPP
from lorary.adapters.readers.mlx import MLX
from lorary.adapters.readers.peft import PEFT
from lorary.adapters.readers.reader import Reader, Verdict
from lorary.adapters.readers.sglang import SGLANG
from lorary.adapters.readers.transformers import TRANSFORMERS
from lorary.adapters.readers.vllm import VLLM
from lorary.adapters.save_load import load_adapter, save_adapter
from lorary.errors import ConfigError, Diagnostic, FileError, did_you_mean, not_a
from lorary.files.safe_open import checked_path, existing_folder, is_single_file, subject
from lorary.model.ambient import mode_independent

READERS: dict[str, Reader] = {r.name: r for r in (PEFT, TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX)}


@mode_independent
def check(
    adapter: Adapter | str | os.PathLike[str], *readers: str, model: nn.Module | None = None
) -> tuple[Verdict, ...]:
    """The verdicts of programs that read adapters: they accept one, reject it, or silently compute something else.

    Their reading rules are applied to the folder's configuration and to the names and shapes of its tensors; no program
    is started and no tensor is read. A verdict names the release whose rules it applies.

    Args:
        adapter: an adapter folder of lorary, PEFT or mlx-lm, a run folder, or a Hub id; or an adapter, or another
            tool's file, as `lorary.save_adapter` would write it.
        readers: peft, transformers, vllm, sglang, llama.cpp, mlx; by default all.
        model: the base, if at hand, also on the meta device: only with it are the sites that PEFT and Transformers
            would find compared with the adapter's.

    Returns:
        One verdict for each reader, in their order, each with its reasons and what to export instead.

    Raises:
        ConfigError: a reader that is not known.
        FileError: there is no adapter, or its files are damaged or hostile.

    >>> import lorary
    >>> from lorary import builtin
    >>> model = builtin.load_model()
    >>> _ = lorary.attach(model, lorary.plan(model, lorary.method("rslora", r=4)))
    >>> [str(verdict.outcome) for verdict in lorary.check(lorary.Adapter.of(model), "peft", "vllm", "sglang")]
    ['accepted', 'accepted', 'miscomputed']
    """
    problems = not_a(nn.Module | None, "a torch.nn.Module", model=model)
    problems += [
        Diagnostic(str(name), "is not a reader that lorary knows", did_you_mean(str(name), READERS))
        for name in readers
        if not isinstance(name, str) or name not in READERS
    ]
    if problems:
        raise ConfigError("cannot check for these readers:", problems)
    chosen = [READERS[name] for name in dict.fromkeys(readers or READERS)]
    if not isinstance(adapter, Adapter):
        checked_path(adapter, "cannot check an adapter:")
        adapter = load_adapter(adapter, model=model) if is_single_file(adapter) else adapter
    if not isinstance(adapter, Adapter):
        return _verdicts(_found(adapter), chosen, model)
    with tempfile.TemporaryDirectory() as temporary:
        save_adapter(adapter, Path(temporary) / "adapter", model=model)
        return _verdicts(Path(temporary) / "adapter", chosen, model)


def _found(path: str | os.PathLike[str]) -> Path:
    """The adapter folder at `path`, in the run folder there, or downloaded from the Hub."""
    folder = existing_folder(path if os.path.lexists(path) else local_folder(path))
    return adapter_folder(folder) or folder


def _verdicts(path: Path, readers: list[Reader], model: nn.Module | None) -> tuple[Verdict, ...]:
    folder = read_folder(path, model)
    try:
        return tuple(reader.verdict(folder) for reader in readers)
    except (FileError, ValueError) as error:  # patterns that take too much work
        problems = error.problems if isinstance(error, FileError) else [Diagnostic("", str(error))]
        raise FileError(f"cannot check {subject(path)}", problems) from None
