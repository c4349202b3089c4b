"""Base models and tokenizers from a Hub id, a folder or the built-in base. Only this file calls from_pretrained.

Neither code nor pickles of a model are run: weights are read from safetensors, and a model with Python code is refused
without `trust_remote_code`.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from lorary.errors import Diagnostic, FileError, LoraryError
from lorary.files.safe_open import checked_path
from lorary.model.ambient import mode_independent
from lorary.model.loading.dtype import dtype_of, load_dtype
from lorary.model.loading.quiet import quiet_progress_bars, quiet_report
from lorary.model.loading.source import ModelClass, ModelSection, check_folder, location

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lorary.spec.interfaces import Storage
    from lorary.spec.method import Method
    from lorary.spec.placement import AdaptedSite


def load_model(
    section: ModelSection,
    storage: Storage | None = None,
    layers: Collection[str] | None = None,
    kind: Any = None,
    model_class: ModelClass | None = None,
) -> PreTrainedModel:
    """The base model with its weights, in evaluation mode, on the CPU.

    Args:
        section: which model.
        storage: NF4 quantises weights while they are read, so that the plain model is never in memory. Any other
            storage leaves them plain. A checkpoint in bitsandbytes' NF4 stays quantised in every case.
        layers: paths of the layers to quantise; None for every linear one except the output head.
        kind: the Transformers class that loads it; None for AutoModelForCausalLM.
        model_class: the class and the configuration, in place of `kind`; only its fresh parameters may be missing.

    Raises:
        FileError: the model does not exist, contains code or pickles, or lacks weights.
    """
    from transformers import AutoModelForCausalLM

    from lorary.model.loading.checkpoint_kind import reader
    from lorary.model.loading.model_kind import why_not_causal
    from lorary.model.scan import scan
    from lorary.model.vocabulary import resized_for

    config = load_config(section) if model_class is None else model_class.config
    if kind is None and model_class is None and (why := why_not_causal(config)):
        raise FileError(f"cannot load the model {section.id}:", [Diagnostic(section.id, *why)])
    options: dict[str, Any] = {
        "dtype": load_dtype(section, config),
        "use_safetensors": True,
        "output_loading_info": True,
    }
    options["ignore_mismatched_sizes"] = True  # refused below, with every name
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    with quiet_progress_bars():
        cls = model_class.cls if model_class else kind or AutoModelForCausalLM
        load = reader(section.id, config, storage, layers)
        if load is None and model_class is not None:
            options["config"] = config
        load = cls.from_pretrained if load is None else functools.partial(load, cls)
        with quiet_report() if model_class is not None else nullcontext():
            model, info = _load(load, section, "model", **options)
    missing = {key if isinstance(key, str) else key[0] for k in ("missing_keys", "mismatched_keys") for key in info[k]}
    if model_class is not None:
        missing -= set(model_class.fresh)
    elif kind is not None:  # Transformers initialises a new head at random
        heads = tuple(f"{name}." for name in scan(model).heads)
        missing -= {key for key in info["missing_keys"] if key.startswith(heads)}
    if missing:
        more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
        what = f"no weights of the right shape for {', '.join(sorted(missing)[:5])}{more}"
        fix = "the folder is incomplete, or its config.json is another model's"
        raise FileError(f"cannot load the model {section.id}:", [Diagnostic(section.id, what, fix)])
    loaded: PreTrainedModel = resized_for(model.eval(), section.tokens, lambda: load_tokenizer(section))
    return loaded


def load_storage(method: Method, full: Collection[str] = (), sites: Collection[AdaptedSite] = ()) -> Storage | None:
    """The storage in which `load_model` may load the base of a method or adapter; None for plain weights.

    Args:
        method: the method; an init that decomposes the weights needs them plain.
        full: the base parameters that an adapter holds in full; if there are any, attaching quantises the others.
        sites: the adapted sites, which may have other methods.
    """
    inits = [method.init, *(s.init for s in sites)]
    residual = any(init is not None and init.residual_init for init in inits)
    return None if full or residual else method.storage


@mode_independent
def load_quantized(
    source: str | os.PathLike[str],
    storage: Storage | None = None,
    *,
    kind: Any = None,
    layers: Collection[str] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A base model in 4 bits, quantised while its checkpoint is read: the plain model is never in memory.

    The result equals loading in full and `quantize`, bit for bit, and has the plain model's fingerprint, so that
    adapters of either fit. A checkpoint in bitsandbytes' NF4 is used as it is, without bitsandbytes.

    Args:
        source: a folder, a Hub id or builtin:base.
        storage: how weights are quantised; by default NF4 with double quantisation.
        kind: the Transformers class that loads it; None for AutoModelForCausalLM.
        layers: paths of the layers to quantise; None for every linear one except the output head.
        options: `dtype`, `revision`, `attn_implementation` and `trust_remote_code`, as in the model section of a
            configuration.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        FileError: the model does not exist, contains code or pickles, or has weights that are missing or cannot be
            quantised.
        ConfigError: an unknown option or a value out of range.

    Example:
        >>> base = lorary.load_quantized("org/model", dtype="bfloat16")
        >>> lorary.attach(base, lorary.plan(base, lorary.method("qlora")))
    """
    import torch

    from lorary.layers.nf4 import NF4
    from lorary.model.loading.checkpoint_kind import check_options

    source = checked_path(source, "cannot load the base:")
    check_options(source, storage, layers)
    if isinstance(options.get("dtype"), torch.dtype):
        options["dtype"] = str(options["dtype"]).removeprefix("torch.")
    section = ModelSection.of(source, **options)
    return load_model(section, NF4() if storage is None else storage, layers, kind)


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the tokens that the section adds; pads with EOS if it has no padding token.

    Raises:
        FileError: the model has no fast tokenizer.
        PlanError: one of the tokens cannot be added.
    """
    from transformers import AutoTokenizer

    check_folder(section)
    folder, headline = Path(location(section)), f"cannot load the tokenizer of {section.id}:"
    if folder.is_dir() and not any(folder.glob("token*")) and not any(folder.glob("vocab*")):
        raise FileError(headline, [Diagnostic(section.id, "there is no tokenizer.json in it")])
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer.from_pretrained, section, "tokenizer")
    if not tokenizer.is_fast:
        what = "its tokenizer has no `tokenizer.json`, so answers cannot be told from prompts"
        raise FileError(headline, [Diagnostic(section.id, what)])
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if section.tokens:
        from lorary.model.vocabulary import add_to_tokenizer

        add_to_tokenizer(tokenizer, section.tokens)
    return tokenizer


def fast_skeleton(section: ModelSection) -> nn.Module:
    """The model without its weights, of its own class; for known families at once, without importing Transformers.

    Raises:
        FileError: the model does not exist, or contains code.
    """
    from lorary.model.loading import skeleton as fast

    check_folder(section)
    file = Path(location(section)) / "config.json"
    if file.is_file() and not section.tokens:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and "auto_map" not in settings and _is_causal(settings):
            settings["dtype"] = dtype_of(settings)
            settings["attn_implementation"] = section.attn_implementation
            model = fast.skeleton(settings, load_dtype(section, SimpleNamespace(**settings)))
            if model is not None:
                return model
    from lorary.model.loading.model_kind import own_class

    return cast("nn.Module", empty_model(section, own_class(load_config(section))))


def saved_dtype(section: ModelSection) -> torch.dtype:
    """The precision in which the weights are saved; a folder's without importing Transformers.

    Raises:
        FileError: the model does not exist, or contains code.
    """
    check_folder(section)
    file = Path(location(section)) / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else load_config(section).to_dict()
    return dtype_of(settings)


def _is_causal(settings: dict[str, Any]) -> bool:
    """Whether a `config.json` names a causal language model, or no class."""
    return all(str(name).endswith("ForCausalLM") for name in settings.get("architectures") or ())


def skeleton(section: ModelSection, model_class: ModelClass | None = None) -> PreTrainedModel:
    """The model without its weights, on the meta device: enough for a plan, and read from one small file.

    Args:
        section: which model.
        model_class: its class and configuration; None for AutoModelForCausalLM.

    Raises:
        FileError: the model does not exist, or contains code.
    """
    from transformers import AutoModelForCausalLM

    return empty_model(section, model_class or ModelClass(AutoModelForCausalLM, load_config(section)))


def empty_model(section: ModelSection, model_class: ModelClass) -> PreTrainedModel:
    """A model of this class on the meta device.

    Raises:
        FileError: Transformers cannot build it.
    """
    import torch

    from lorary.model.vocabulary import resized_for

    config, cls = copy.deepcopy(model_class.config), model_class.cls  # new tokens change its vocabulary
    dtype, before = load_dtype(section, config), torch.get_default_dtype()
    model: PreTrainedModel
    try:
        with torch.device("meta"):
            if hasattr(cls, "from_config"):  # an Auto class
                model = cls.from_config(config, dtype=dtype, trust_remote_code=section.trust_remote_code)
            else:
                torch.set_default_dtype(dtype)  # as `from_pretrained` does: for buffers too
                model = cls(config)
    except (ValueError, ImportError) as error:
        raise _refused(section, "model", error) from None
    finally:
        torch.set_default_dtype(before)
    return resized_for(model, section.tokens, lambda: load_tokenizer(section))


def load_config(section: ModelSection) -> PretrainedConfig:
    """The model's own configuration.

    Raises:
        FileError: the model does not exist, or contains code.
    """
    from transformers import AutoConfig

    check_folder(section)
    config: PretrainedConfig = _load(AutoConfig.from_pretrained, section, "model")
    return config


# raised by Transformers and its quantisers for unreadable files
_UNREADABLE = (OSError, ValueError, ImportError, LookupError, AttributeError, TypeError, RuntimeError)


def _load(load: Callable[..., Any], section: ModelSection, what: str, **options: Any) -> Any:
    """load(source, **options), with its errors as a FileError.

    Args:
        load: a `from_pretrained`.
        section: which model.
        what: "model" or "tokenizer", for the error.
        options: for `load`.

    Raises:
        FileError: the reason.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    options |= {"revision": section.revision or "main", "trust_remote_code": section.trust_remote_code}
    try:
        return load(location(section), **options)
    except LoraryError:
        raise
    except (*_UNREADABLE, SafetensorError, StrictDataclassError) as error:
        raise _refused(section, what, error) from error


def _refused(section: ModelSection, what: str, error: Exception) -> FileError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    fix = ""
    if not Path(location(section)).exists():
        fix = "no folder has that name either; the Hub needs a network, and HF_TOKEN for gated models"
    return FileError(f"cannot load the {what} {section.id}:", [Diagnostic(section.id, reason, fix)])
