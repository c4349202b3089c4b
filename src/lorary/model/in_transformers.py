"""A Transformers model with a method attached, as other people's trainers and Transformers itself see it.

`Trainer`, TRL and accelerate know one kind of adapted model, PEFT's: they ask whether the model is a `PeftModel`, and
then save its adapter alone, read it back on resume, accept a quantised base, and take the model with its adapter
disabled for the reference of DPO and GRPO. Attaching therefore gives a Transformers model a subclass of its class with
the few methods that they call; detaching and merging take it away. The weights, their names and `forward` are the
model's own.

`isinstance` is answered through `__class__`, as by mocks and proxies, so that PEFT is not imported for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorary.errors import Diagnostic, StateError
from lorary.layers.adapted import Adapted
from lorary.layers.wrappers import original_class
from lorary.model.disable import disabled
from lorary.model.state import require_attached

DEFAULT = "default"  # PEFT's name of a model's first adapter


def adopt(model: nn.Module) -> None:
    """Give a Transformers model with adapters the methods that trainers call; nothing for another model."""
    if _is_transformers(model):
        cls: Any = type(model)
        model.__class__ = _subclass(cls)
    refusal = _Refusal(original_class(model).__name__)
    for module in model.modules():
        if module is not model and _is_transformers(module) and any(isinstance(m, Adapted) for m in module.modules()):
            vars(module)["save_pretrained"] = refusal


def release(model: nn.Module) -> None:
    """Undo `adopt`."""
    if isinstance(model, InTransformers):
        model.__class__ = _plain(type(model))
    for module in model.modules():
        if isinstance(vars(module).get("save_pretrained"), _Refusal):
            del vars(module)["save_pretrained"]


class InTransformers(nn.Module):
    """The methods of an adapted Transformers model that trainers, TRL, accelerate and the Hub's mixin call."""

    _hf_peft_config_loaded = True

    @property
    def __class__(self) -> type:
        """The class for `isinstance`: also a `PeftModel`, once somebody has imported PEFT."""
        peft = sys.modules.get("peft")
        wanted: type | None = getattr(peft, "PeftModel", None)
        own: Any = type(self)
        cls: type = own if wanted is None else _also(own, wanted)
        return cls

    @__class__.setter
    def __class__(self, cls: type) -> None:
        vars(object)["__class__"].__set__(self, cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles: the subclass cannot be imported by name."""
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (_plain(type(self)),), *reduced[2:])

    # --- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write the adapter folder, as `lorary.save` does; never the base under names that nobody can read.

        Args:
            save_directory: the folder.
            is_main_process: whether this rank writes.
            state_dict: unused: the adapter's tensors are taken from the model.
            push_to_hub: whether to upload the folder, to `repo_id` or a repository of the folder's name.
            options: of `push_to_hub`; the others concern whole models.
        """
        _adapters("save_attached")(self, save_directory, write=is_main_process)
        if push_to_hub and is_main_process:
            repository = options.pop("repo_id", None) or Path(save_directory).name
            upload: Any = self.push_to_hub  # of Transformers
            upload(repository, **options)

    def load_adapter(
        self, folder: str | os.PathLike[str], adapter_name: str = DEFAULT, *args: Any, **options: Any
    ) -> None:
        """Give the attached adapter the values of a saved one, in place; whether it trains does not change.

        Raises:
            FileError: the folder holds another adapter, or one of another base.
            StateError: `adapter_name` is neither that of the attached adapter nor of one that is held.
        """
        if (held := self._held([adapter_name])) is not None and adapter_name not in held.active:
            held[adapter_name] = _public("load_adapter")(folder)
            return
        if held is None:
            self._one_adapter(adapter_name)
        _adapters("restore_attached")(self, folder)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """PyTorch's, also for the state dict of this model with PEFT's layers: sentence-transformers resumes so."""
        if any(".base_layer." in key for key in state_dict):
            _adapters("rename_peft_tensors")(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """A plain model, as of the plain class."""
        return _plain(cls).from_pretrained(*args, **options)

    # --- adapters, in PEFT's words ----------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, AdapterFacts]:
        """The attached adapter under PEFT's default name."""
        return {DEFAULT: AdapterFacts()}

    @property
    def active_peft_config(self) -> AdapterFacts:
        return AdapterFacts()

    @property
    def active_adapter(self) -> str:
        return DEFAULT

    @property
    def active_adapters(self) -> list[str]:
        return [DEFAULT]

    def get_base_model(self) -> nn.Module:
        """The model itself: adapters are in its layers, and there is no module around it."""
        return self

    @property
    def base_model(self) -> Any:
        """The model without its head, whose `model` is the whole one, as PEFT has it."""
        base = super().base_model  # type: ignore[misc]
        return self if base is self else _BaseModel(self, base)

    def disable_adapter(self) -> contextlib.AbstractContextManager[nn.Module]:
        """A block in which the model is its base: the reference of DPO and GRPO."""
        return disabled(self)

    def add_adapter(self, adapter_name: Any = DEFAULT, config: Any = None, **_: Any) -> None:
        """Nothing for TRL's `ref`: its reference is the disabled adapter.

        Raises:
            StateError: it would be a second adapter.
        """
        names = [adapter_name, config]  # PEFT's order, and Transformers'
        if "ref" not in [name for name in names if isinstance(name, str)]:
            self._one_adapter("a second adapter")

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False, **_: Any) -> None:
        """`lorary.switch` to held adapters; as in PEFT, a single one then trains."""
        names = list(adapter_name) if isinstance(adapter_name, list | tuple) else [adapter_name]
        if self._held(names) is None:
            self._one_adapter(*names)
        else:
            _public("switch")(self, names, trainable=len(names) == 1 and not inference_mode)

    def enable_adapters(self) -> None:
        self._one_adapter("the switch of PEFT's layers")

    def disable_adapters(self) -> None:
        self._one_adapter("the switch of PEFT's layers")

    def delete_adapter(self, adapter_names: Any) -> None:
        """Drop held adapters that are not active."""
        names = list(adapter_names) if isinstance(adapter_names, list | tuple) else [adapter_names]
        if (held := self._held(names)) is None:
            self._one_adapter("the removal of PEFT's layers")
        for name in sorted(names, key=list(held.active).count, reverse=True):  # an active one is refused
            del held[name]

    def _held(self, names: list[Any]) -> Any:
        """`lorary.named_adapters(self)` if all of these adapters are held, else None."""
        held = _public("NamedAdapters")(self)
        return held if names and all(isinstance(name, str) and name in held for name in names) else None

    def _one_adapter(self, *names: Any) -> None:
        """Refuse what is not about the attached adapter.

        Raises:
            StateError: always, unless all names are the default.
        """
        require_attached(self, "use PEFT's methods of")
        fix = "lorary.switch, lorary.disabled and lorary.detach do this; lorary.named_adapters(model) holds several"
        what = "is not supported: one adapter of lorary is attached"
        problems = [Diagnostic("model", f"{name} {what}", fix) for name in names if name != DEFAULT]
        if problems:
            raise StateError("this is not a PEFT model:", problems)


@dataclass(frozen=True)
class AdapterFacts:
    """What trainers read of an adapter's configuration."""

    peft_type: str = "LORARY"
    is_prompt_learning: bool = False
    target_parameters: None = None


class _BaseModel:
    """`base_model` as PEFT's wrapper has it: `.model` is the whole model; all else is the base model's."""

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        self.model, self._base = model, base

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_base":  # asked by a copy before there is one
            raise AttributeError(name)
        return getattr(self._base if hasattr(self._base, name) else self.model, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._base(*args, **options)

    def __eq__(self, other: object) -> bool:
        return other is self._base or (isinstance(other, _BaseModel) and other._base is self._base)

    def __hash__(self) -> int:
        return hash(self._base)


@dataclass(frozen=True)
class _Refusal:
    """`save_pretrained` of a part of an adapted model, whose weights have names that only the whole one can read."""

    whole: str

    def __call__(self, *_: Any, **__: Any) -> None:
        """Refuse.

        Raises:
            StateError: always.
        """
        what = f"the adapter is attached to the whole {self.whole}, and a part of it cannot be saved alone"
        fix = "lorary.save(model, folder) saves the adapter; or attach to this part instead: lorary.attach(part, plan)"
        raise StateError("cannot save:", [Diagnostic("model", what, fix)])


def _is_transformers(module: nn.Module) -> bool:
    """Whether a module is a Transformers model, which need not be imported for it."""
    return any(
        cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.") for cls in type(module).__mro__
    )


def _adapters(name: str) -> Any:
    """A function of the room above, which writes and reads files: found when it is called."""
    return getattr(importlib.import_module("lorary.adapters.attached"), name)


def _public(name: str) -> Any:
    """A function of the whole package."""
    return getattr(importlib.import_module("lorary"), name)


@functools.cache
def _subclass(cls: Any) -> Any:
    """The class of an adapted model, under the name of its own."""
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (InTransformers, cls), names)


def _plain(cls: type) -> Any:
    """The class that a model had before it was adapted."""
    mro = cls.__mro__
    return mro[mro.index(InTransformers) + 1]


def _new(plain: type) -> Any:
    """An empty adapted model, to be filled by `copy` or `pickle`."""
    cls = _subclass(plain)
    return cls.__new__(cls)


class _Also(type):
    """A metaclass that puts PEFT's class at the very end of the method resolution order, behind the model's own."""

    def mro(cls) -> list[type]:
        order = super().mro()
        wanted = sys.modules["peft"].PeftModel
        return order if wanted in order else [*order[:-1], wanted, object]


@functools.cache
def _also(cls: Any, wanted: Any) -> Any:
    """A subclass of an adapted model's class that is also PEFT's; no object has it as its type."""
    return cls if wanted in cls.__mro__ else _Also(cls.__name__, (cls,), {"__module__": cls.__module__})
