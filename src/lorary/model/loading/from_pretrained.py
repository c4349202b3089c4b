"""Base models and tokenizers by name: a Hub id, a folder or the built-in base. Only this file calls from_pretrained.

Code and pickles that come with a model are not run: weights are read from safetensors, and a model that brings
Python of its own is refused unless `trust_remote_code` says otherwise.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lorary.errors import Diagnostic, FileError, LoraryError
from lorary.model.loading.locations import BUILTIN, check_folder, location
from lorary.model.loading.source import ModelSection

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lorary.spec.interfaces import Storage
    from lorary.spec.method import Method


def load_model(
    section: ModelSection,
    storage: Storage | None = None,
    layers: Collection[str] | None = None,
    kind: Any = None,
) -> PreTrainedModel:
    """The base model with its weights, in evaluation mode, on the CPU.

    Args:
        section: which model.
        storage: NF4 packs weights as they are read, so that the plain model is never there as a whole. Any other word
            leaves them as they are. A checkpoint in bitsandbytes' NF4 is taken as it is in every case.
        layers: paths of the layers that are packed; None for every linear one but the output head.
        kind: the class of Transformers that loads it; None for AutoModelForCausalLM.

    Raises:
        FileError: there is no such model, it brings code or pickles, or its weights are not all there.
    """
    from transformers import AutoModelForCausalLM

    from lorary.model.fingerprint import Fingerprint
    from lorary.model.loading.checkpoint_kind import reader
    from lorary.model.scan import scan

    config = load_config(section)
    words: dict[str, Any] = {"dtype": dtype(section, config), "use_safetensors": True, "output_loading_info": True}
    words["ignore_mismatched_sizes"] = True  # refused below, with every name
    if section.attn_implementation is not None:
        words["attn_implementation"] = section.attn_implementation
    with quiet():
        loader = reader(section.id, config, storage, layers)
        model, info = _from_pretrained(kind or AutoModelForCausalLM, section, loader, **words)
    lost = {key if isinstance(key, str) else key[0] for k in ("missing_keys", "mismatched_keys") for key in info[k]}
    if kind is not None:  # a new head may start at random, as Transformers would have it
        heads = tuple(f"{name}." for name in scan(model).heads)
        lost -= {key for key in info["missing_keys"] if key.startswith(heads)}
    if lost:
        more = f" and {len(lost) - 5:,} more" if len(lost) > 5 else ""
        what = f"no weights of the right shape for {', '.join(sorted(lost)[:5])}{more}"
        fix = "the folder is incomplete, or not of a model that generates text"
        raise FileError(f"cannot load the model {section.id}:", [Diagnostic(section.id, what, fix)])
    loaded: PreTrainedModel = model.eval()
    if section.id in BUILTIN:
        Fingerprint.rename(loaded, section.id)  # what an adapter says about its base; the folder differs by machine
    return loaded


def load_storage(method: Method, full: Collection[str] = ()) -> Storage | None:
    """The storage into which `load_model` may read the base of a method, or of an adapter of it.

    Args:
        method: it may need the plain weights, to take a part of them first: then None.
        full: base parameters that an adapter holds in full: where there are any, attaching it packs the others.
    """
    moves = method.init is not None and method.init.residual_init
    return None if full or moves else method.storage


def load_quantized(
    source: str | os.PathLike[str],
    storage: Storage | None = None,
    *,
    kind: Any = None,
    layers: Collection[str] | None = None,
    **words: Any,
) -> PreTrainedModel:
    """A base model in 4 bits, packed as its checkpoint is read: the plain model is never there as a whole.

    It is the same as if the model had been loaded in full and quantised with `quantize`, bit for bit, and has the plain
    model's fingerprint: adapters of either fit. A checkpoint in bitsandbytes' NF4 is taken as it is, without
    bitsandbytes.

    Args:
        source: a folder, a Hub id or builtin:base.
        storage: how weights are packed; NF4 with double quantisation where nothing is said.
        kind: the class of Transformers that loads it; None for AutoModelForCausalLM.
        layers: paths of the layers that are packed; None for every linear one but the output head.
        words: `dtype`, `revision`, `attn_implementation` and `trust_remote_code`, as in the model section of a
            configuration.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        FileError: there is no such model, it brings code or pickles, its weights are not all there or cannot be packed.
        ConfigError: another word.

    Example:
        >>> base = lorary.load_quantized("org/model", dtype="bfloat16")
        >>> lorary.attach(base, lorary.plan(base, lorary.method("qlora")))
    """
    import torch

    from lorary.layers.nf4 import NF4
    from lorary.model.loading.checkpoint_kind import check

    check(source, storage, layers)
    if isinstance(words.get("dtype"), torch.dtype):
        words["dtype"] = str(words["dtype"]).removeprefix("torch.")
    section = ModelSection.of(os.fspath(source), **words)
    return load_model(section, NF4() if storage is None else storage, layers, kind)


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The model's tokenizer; EOS pads where it has no padding token.

    Raises:
        FileError: the model has none, or none that is fast.
    """
    from transformers import AutoTokenizer

    check_folder(section)
    folder = Path(location(section))
    if folder.is_dir() and not any(folder.glob("token*")) and not any(folder.glob("vocab*")):
        what = "there is no tokenizer.json in it"
        raise FileError(f"cannot load the tokenizer of {section.id}:", [Diagnostic(section.id, what)])
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, section)
    if not tokenizer.is_fast:
        what = "its tokenizer has no `tokenizer.json`, so answers cannot be told from prompts"
        raise FileError(f"cannot load the tokenizer of {section.id}:", [Diagnostic(section.id, what)])
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fast_skeleton(section: ModelSection) -> nn.Module:
    """The model's layers without its weights: of known families without Transformers, at once, else `skeleton`.

    Raises:
        FileError: there is no such model, or it brings code.
    """
    from lorary.model.loading import skeleton as fast

    check_folder(section)
    file = Path(location(section)) / "config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and "auto_map" not in settings:
            settings["dtype"] = _saved(settings)
            settings["_attn_implementation"] = section.attn_implementation
            made = fast.skeleton(settings, dtype(section, SimpleNamespace(**settings)))
            if made is not None:
                return made
    whole: nn.Module = skeleton(section)
    return whole


def _saved(settings: dict[str, Any]) -> torch.dtype:
    """The precision that a `config.json` says its weights have."""
    import torch

    name = settings.get("dtype") or settings.get("torch_dtype")
    found = getattr(torch, str(name).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def skeleton(section: ModelSection) -> PreTrainedModel:
    """The model without its weights, on the meta device: enough to plan with, and read from one small file.

    Raises:
        FileError: there is no such model, or it brings code.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(section)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype(section, config), trust_remote_code=section.trust_remote_code
            )
    except (ValueError, ImportError) as error:
        raise _refused(section, "model", error) from None
    return model


def load_config(section: ModelSection) -> PretrainedConfig:
    """The model's own configuration.

    Raises:
        FileError: there is no such model, or it brings code.
    """
    from transformers import AutoConfig

    check_folder(section)
    config: PretrainedConfig = _from_pretrained(AutoConfig, section)
    return config


def dtype(section: ModelSection, config: PretrainedConfig | SimpleNamespace) -> torch.dtype:
    """What the frozen weights are kept in. `auto` is what they were saved in, but float32 on a CPU without 16-bit
    arithmetic, where a 16-bit product takes several times as long."""
    import torch

    if section.dtype != "auto":
        chosen: torch.dtype = getattr(torch, section.dtype)
        return chosen
    saved = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available() or _cpu_is_quick(saved)
    return saved if accelerated else torch.float32


def _cpu_is_quick(dtype: torch.dtype) -> bool:
    flags = Path("/proc/cpuinfo")
    wanted = {"torch.bfloat16": ("avx512_bf16", "amx_bf16"), "torch.float16": ("avx512_fp16", "amx_fp16")}.get(
        str(dtype), ()
    )
    try:
        return any(flag in flags.read_text() for flag in wanted)
    except OSError:
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar where nobody watches it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# what Transformers and its quantisers raise at files that they cannot make sense of
_UNREADABLE = (OSError, ValueError, ImportError, LookupError, AttributeError, TypeError, RuntimeError)


def _from_pretrained(kind: Any, section: ModelSection, loader: Callable[..., Any] | None = None, **words: Any) -> Any:
    from safetensors import SafetensorError

    words |= {"revision": section.revision or "main", "trust_remote_code": section.trust_remote_code}
    try:
        if loader is not None:
            return loader(kind, location(section), **words)
        return kind.from_pretrained(location(section), **words)
    except LoraryError:
        raise
    except (*_UNREADABLE, SafetensorError) as error:
        what = "tokenizer" if getattr(kind, "__name__", "") == "AutoTokenizer" else "model"
        raise _refused(section, what, error) from error


def _refused(section: ModelSection, what: str, error: Exception) -> FileError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    fix = ""
    if not Path(location(section)).exists():
        fix = "no folder has that name either; the Hub needs a network, and HF_TOKEN for gated models"
    return FileError(f"cannot load the {what} {section.id}:", [Diagnostic(section.id, reason, fix)])
