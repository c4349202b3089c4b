"""The adapter and the base that a command's arguments name."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from lorary.adapters.hub import DIFFUSERS, download, is_hub_id
from lorary.adapters.hub import adapter_folder as adapter_folder
from lorary.errors import Diagnostic, FileError, suggested_path
from lorary.files.safe_open import why_no_folder
from lorary.model.loading.source import ModelClass, ModelSection

RUN_RECORD = "run.json"  # the mark of a run folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorary.adapters.adapter import Adapter
    from lorary.adapters.label_names import LabelNames
    from lorary.files.tensor_file import Header


def adapter_at(name: str) -> Path | None:
    """The adapter folder at or in the folder `name`, or downloaded from the Hub; None for a whole model.

    Raises:
        FileError: a Hub id of a repository that does not exist or cannot be downloaded.
    """
    downloaded = download(name) if is_hub_id(name) else None
    return adapter_folder(downloaded or Path(name))


def find_adapter(name: str, action: str) -> Path:
    """The adapter folder at or in the folder `name`, or downloaded from the Hub.

    Args:
        name: an adapter or run folder, or a Hub id.
        action: of the command, for the error: "merge".

    Raises:
        FileError: there is no adapter.
    """
    folder = adapter_at(name)
    if folder is None:
        raise FileError(f"cannot {action} {name}:", [_no_adapter(Path(name))])
    return folder


def _no_adapter(path: Path) -> Diagnostic:
    if not path.exists():
        return Diagnostic(str(path), "there is no such folder", suggested_path(path, folders=True))
    if not path.is_dir():
        return replace(why_no_folder(path), where=str(path))
    if (path / RUN_RECORD).is_file():
        return Diagnostic(str(path), "this run has no adapter yet", "finish it: lorary train CONFIG --resume")
    if (path / "config.json").is_file():
        return Diagnostic(str(path), "there is no adapter in it: it is a whole model")
    if (path / "adapter.gguf").is_file():
        what = "there is no adapter folder in it, and a file of llama.cpp, `adapter.gguf`"
        return Diagnostic(str(path), what, f"name the file: {path / 'adapter.gguf'} (with --base)")
    if (path / "adapter_model.safetensors").is_file():
        what, fix = "holds PEFT's tensors, and no adapter_config.json", "put the one of its training beside them"
        return Diagnostic(str(path), what, fix)
    return Diagnostic(str(path), "there is no adapter in it")


def find_base(adapter: Path, base: str | None, dtype: str = "auto") -> ModelSection:
    """The model to put an adapter on: `base`, or else the one that it was trained on.

    Raises:
        FileError: neither names a model that can be found.
    """
    from lorary.adapters.readers.folder import base_of
    from lorary.adapters.save_load import load_adapter

    by_names = needs_base(adapter) or _says_more_on_base(adapter)  # then no tokens were added for it
    value = None if by_names else load_adapter(adapter)
    name = base or (value.base.name if value else base_of(adapter))
    if not name or (base is None and "/" not in name and not name.startswith("builtin:") and not Path(name).is_dir()):
        what = f"it was trained on `{name}`, which is not a Hub id" if name else "it does not name its base"
        raise FileError(f"cannot find the base of {adapter}:", [Diagnostic("", what, "give --base MODEL")])
    section = ModelSection.of(name, dtype=dtype)
    return with_tokens(section, value) if value else section


def with_tokens(section: ModelSection, adapter: Adapter) -> ModelSection:
    """The base with the tokens that were added to it for an adapter.

    Raises:
        PlanError: its tokenizer gives them other ids, or has one of them already.
    """
    from lorary.model.loading.from_pretrained import load_tokenizer
    from lorary.model.vocabulary import added_tokens, check_tokens

    added = tuple(added_tokens(adapter.sites))
    if not added:
        return section
    section = section.model_copy(update={"tokens": added})
    check_tokens(load_tokenizer(section), adapter.sites)
    return section


def with_tokens_of(section: ModelSection, adapters: Mapping[str, str | PathLike[str]]) -> ModelSection:
    """The base with the tokens that were added to it for these adapters, which are served together.

    Args:
        section: the base.
        adapters: name -> folder; one that cannot be read is left to its loading.

    Raises:
        FileError: two of them have trained the row of one token for different texts.
    """
    from lorary.adapters.save_load import load_adapter
    from lorary.errors import LoraryError
    from lorary.model.vocabulary import added_tokens, other_meanings

    sites = {}
    for name, folder in adapters.items():
        with suppress(LoraryError):
            found = adapter_folder(Path(folder)) or Path(folder)
            if _adds_tokens(found):
                sites[name] = load_adapter(found).sites
    if problems := other_meanings(sites, "serve them on two bases, or merge one of them"):
        raise FileError("these adapters cannot be served together:", problems)
    texts = {i: text for own in sites.values() for text, i in added_tokens(own).items()}
    return section.model_copy(update={"tokens": tuple(texts[i] for i in sorted(texts))}) if texts else section


def _adds_tokens(folder: Path) -> bool:
    """Whether a folder's record tells of added tokens; most do not, and reading their tensors takes time."""
    from lorary.adapters.native import NAME

    record = folder / NAME
    return record.is_file() and '"added"' in record.read_text(encoding="utf-8", errors="replace")


def read_adapter(folder: Path, base: str | None = None) -> Adapter:
    """The adapter in a folder or a file; if it cannot be read without its base, with that on the meta device.

    Args:
        folder: of the adapter.
        base: the model to put it on; None: the one that it was trained on.

    Raises:
        FileError: every reason why it cannot be used, or its base is needed and cannot be found.
    """
    from lorary.adapters.save_load import load_adapter
    from lorary.model.loading.from_pretrained import skeleton

    on_base = needs_base(folder) or (base is not None and _says_more_on_base(folder))
    return load_adapter(folder, model=skeleton(find_base(folder, base)) if on_base else None)


def needs_base(folder: Path) -> bool:
    """Whether only a base says which layers an adapter adapts: (IA)³, VeRA, fused experts, llama.cpp and the like."""
    from lorary.adapters.intake.single_file import only_the_base_explains
    from lorary.adapters.intake.torchtune import TORCHTUNE
    from lorary.adapters.native import NAME
    from lorary.adapters.peft.config import NAME as PEFT_CONFIG
    from lorary.adapters.peft.reader import MOST_JSON
    from lorary.adapters.peft.types import PEFT_TYPES
    from lorary.adapters.peft.virtual_tokens import FIELDS
    from lorary.files.safe_open import read_json

    if folder.is_file():
        return only_the_base_explains(folder)
    if (folder / NAME).exists():
        return False
    if not (folder / PEFT_CONFIG).exists():
        return (folder / DIFFUSERS).is_file() and only_the_base_explains(folder / DIFFUSERS)
    config: object = None
    with suppress(FileError):  # which its reader explains
        config = read_json(folder.resolve(), PEFT_CONFIG, MOST_JSON)
    if not isinstance(config, dict):
        return False
    kind, parameters = str(config.get("peft_type")).upper(), config.get("target_parameters")
    if any(not str(name).endswith(".weight") for name in (parameters if isinstance(parameters, list) else ())):
        return True  # of fused experts
    header = _header(folder)
    own_names = header is not None and TORCHTUNE.recognises(header)
    return own_names or kind in FIELDS or (kind in PEFT_TYPES and not PEFT_TYPES[kind].factors)


def _says_more_on_base(folder: Path) -> bool:
    """Whether the base tells more of a folder than its tensors: single experts, which it fuses; mlx-lm's embeddings."""
    from lorary.adapters.mlx import is_mlx
    from lorary.adapters.native import NAME

    if (folder / NAME).exists():
        return False
    if is_mlx(folder):
        return True
    header = _header(folder)
    return header is not None and any(".experts." in name for name in header.tensors)


def _header(folder: Path) -> Header | None:
    """The names and shapes in PEFT's tensor file; None if it cannot be read, which its reader explains."""
    from lorary.adapters.peft.reader import WEIGHTS
    from lorary.files.tensor_file import TensorFile

    with suppress(FileError), TensorFile(folder.resolve(), WEIGHTS) as file:
        return file.header
    return None


def find_model(name: str, base: str | None = None) -> tuple[Path | None, ModelSection]:
    """The adapter folder at or in `name`, if any, and the model to load: the adapter's base, or else `base` or `name`.

    Args:
        name: an adapter or run folder, a Hub id, a model folder, or builtin:base.
        base: replaces the base that the adapter names.

    Raises:
        FileError: it is an adapter whose base cannot be found, or neither a folder nor on the Hub.
    """
    folder = adapter_at(name)
    if folder is not None:
        return folder, find_base(folder, base)
    return None, ModelSection.of(base or name)


def base_class(section: ModelSection, folder: Path, adapter: Adapter) -> ModelClass | None:
    """The class that an adapter's base is loaded with; None for a causal language model.

    A new head is in the adapter, so that the base need not hold it.

    Args:
        section: the base.
        folder: of the adapter, for the names of its labels.
        adapter: the adapter.

    Raises:
        FileError: the base or the names of the labels cannot be read.
    """
    from lorary.adapters.label_names import read_label_names
    from lorary.model.loading.model_kind import classes

    if adapter.base.architecture in classes("CAUSAL_LM"):
        return None
    return _own_class(section, adapter, read_label_names(folder))


def class_of_base(section: ModelSection, adapter: Adapter, labels: LabelNames | None = None) -> ModelClass:
    """The class that an adapter's base is built with, a causal language model included.

    Args:
        section: the base.
        adapter: the adapter.
        labels: the names of its labels, if known; the configuration is the base's own if it brings no new head.

    Raises:
        FileError: the base cannot be read.
    """
    from lorary.model.loading.from_pretrained import load_config
    from lorary.model.loading.model_kind import own_class

    config = load_config(section)
    found = _own_class(section, adapter, labels) or own_class(config)
    return found if adapter.full or labels else ModelClass(found.cls, config)


def _own_class(section: ModelSection, adapter: Adapter, labels: LabelNames | None = None) -> ModelClass | None:
    """The class of Transformers that an adapter names for its base, with its labels; None if it names none."""
    if not adapter.base.architecture:
        return None
    import transformers

    from lorary.model.loading.from_pretrained import load_config
    from lorary.model.loading.model_class import with_labels_of_head

    found = getattr(transformers, adapter.base.architecture, None)
    if not isinstance(found, type):  # a class of the user's own
        return None
    shapes = {key: tuple(value.shape) for key, value in adapter.full.items()}
    return with_labels_of_head(found, load_config(section), shapes, labels, section)


def load_base(section: ModelSection, folder: Path, adapter: Adapter, *, quantized: bool = True) -> PreTrainedModel:
    """The base of an adapter, with its weights and in evaluation mode; nothing is attached.

    Args:
        section: the base.
        folder: of the adapter, for the names of its labels.
        adapter: the adapter.
        quantized: whether it is quantised while it is read, if the adapter's method quantises it.

    Raises:
        LoraryError: it cannot be loaded.
    """
    from lorary.model.loading.from_pretrained import load_model, load_storage

    storage = load_storage(adapter.method, adapter.full, adapter.sites) if quantized else None
    return load_model(section, storage, model_class=base_class(section, folder, adapter))


def load_with_adapter(section: ModelSection, folder: Path | None) -> PreTrainedModel:
    """A causal language model in evaluation mode, with the adapter on it if there is one.

    Raises:
        LoraryError: the model cannot be loaded or generates no text, or the adapter does not fit it.
    """
    from lorary.adapters.switch import load

    loaded = load_for_adapter(section, folder)
    if folder:
        load(loaded, folder)
    return loaded


def load_for_adapter(section: ModelSection, folder: Path | None) -> PreTrainedModel:
    """A causal language model in evaluation mode, stored as an adapter was trained on it; nothing is attached.

    Raises:
        LoraryError: the model cannot be loaded or generates no text.
    """
    from lorary.model.loading.from_pretrained import load_model, load_storage

    adapter = read_adapter(folder, section.id) if folder else None
    if folder and adapter and base_class(section, folder, adapter) is not None:
        what = f"it was trained on a {adapter.base.architecture}, which generates no text"
        fix = "`lorary merge` makes a plain model of it, for Transformers' pipeline"
        raise FileError(f"{folder} holds no language model:", [Diagnostic(str(folder), what, fix)])
    return load_model(section, load_storage(adapter.method, adapter.full, adapter.sites) if adapter else None)
