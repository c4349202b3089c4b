"""The plan of a vLLM server: each adapter in a form that vLLM computes, and the command as a value.

vLLM holds one base, with one RoPE scaling, and adapters that add B A x. A PEFT folder that it reads as PEFT does is
served from where it lies. Others are converted into a folder of their own. What has no such form is refused, with every
reason of every adapter, before anything is started.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from lorary.adapters.export.engines import ENGINES, NAME_OF_ADAPTER, engine_problems, export_for_engine, rope_parameters
from lorary.adapters.peft.config import NAME
from lorary.adapters.readers.folder import read_folder
from lorary.adapters.readers.vllm import RANKS, rank_needed, serving_rank, vllm_reader
from lorary.adapters.resolve import base_class
from lorary.adapters.save_load import load_adapter
from lorary.errors import ConfigError, Diagnostic, FileError, LoraryError, deduplicated
from lorary.files.strict_json import show
from lorary.model.loading.dtype import load_dtype
from lorary.model.loading.from_pretrained import load_config, skeleton
from lorary.model.loading.source import ModelSection, location
from lorary.serve.address import local_url

_HEADLINE = "cannot serve with vLLM:"
_READER = vllm_reader(RANKS[-1])  # --max-lora-rank is ours to choose
_IN_A_BATCH = 16  # adapters; vLLM holds memory for as many of the highest rank


@dataclass(frozen=True)
class VllmSettings:
    """The settings of a vLLM server.

    Args:
        program: the command that runs vLLM, as in a shell; a path, or a name on the PATH.
        host, port: where it listens.
        key: that requests must bring; empty for none.
        name: under which requests ask for the base; empty for the base as it is given.
        options: options of `vllm serve`, as in a shell; they come last, so that they replace those chosen here.
    """

    program: str = "vllm"
    host: str = "127.0.0.1"
    port: int = 8000
    key: str = field(default="", repr=False)
    name: str = ""
    options: str = ""

    @property
    def url(self) -> str:
        """The address at which this machine reaches it."""
        return local_url(self.host, self.port)


@dataclass(frozen=True)
class VllmAdapter:
    """An adapter as vLLM serves it.

    Args:
        name: under which requests ask for it.
        source: its folder.
        folder: what vLLM reads: `source`, or its converted form.
        rank: its rank there.
        rope: the base's `rope_parameters` that it needs; empty for the base's own.
    """

    name: str
    source: Path
    folder: Path
    rank: int
    rope: Mapping[str, Any] = field(default_factory=dict)

    @property
    def converted(self) -> bool:
        """Whether vLLM reads another form than the adapter's own."""
        return self.folder != self.source

    def __str__(self) -> str:
        how = "converted to plain LoRA" if self.converted else "read as it is"
        return f"{self.name}: {how}, rank {self.rank}"


@dataclass(frozen=True)
class VllmPlan:
    """A vLLM server, before it is started.

    Args:
        command: its arguments.
        environment: variables to add: no reports to its makers; the key, which other users could read in arguments.
        adapters: in their order.
        base: the name under which requests ask for the base.
        url: where it will answer.
        key: that requests must bring.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    adapters: tuple[VllmAdapter, ...]
    base: str
    url: str
    key: str = field(default="", repr=False)

    @property
    def scaled(self) -> bool:
        """Whether the base runs with other RoPE scaling than its own, so that its answers are not the base's."""
        return any(adapter.rope for adapter in self.adapters)

    def __str__(self) -> str:
        return "\n".join([shlex.join(self.command), *map(str, self.adapters)])


def vllm_plan(
    folders: Mapping[str, Path],
    section: ModelSection,
    converted: Path,
    settings: VllmSettings = VllmSettings(),
    *,
    progress: Callable[[str], object] = lambda text: None,
) -> VllmPlan:
    """The plan of a vLLM server for adapters of one base; converted adapters are written into `converted`.

    Args:
        folders: name -> adapter folder.
        section: the base.
        converted: an existing folder.
        settings: of the server.
        progress: is told what is being done.

    Raises:
        ConfigError: the settings are not acceptable, with every reason.
        FileError: vLLM refuses or miscomputes an adapter; every reason of every adapter.
    """
    settings = replace(settings, name=settings.name or section.id)
    problems = [*_setting_problems(settings), *_name_problems(folders, settings.name)]
    if problems:
        raise ConfigError(_HEADLINE, problems)
    forms, problems = list[VllmAdapter](), list[Diagnostic]()
    for name, folder in folders.items():
        progress(f"preparing {name}")
        try:
            forms.append(_form(name, folder, section, converted))
        except LoraryError as error:
            problems += deduplicated(error.problems_of(name))
    problems += _mixed_scalings(forms)
    if problems:
        raise FileError(_HEADLINE, problems)
    command = tuple(_command(forms, section, settings))
    environment = {"VLLM_NO_USAGE_STATS": "1"} | ({"VLLM_API_KEY": settings.key} if settings.key else {})
    return VllmPlan(command, environment, tuple(forms), settings.name, settings.url, settings.key)


def _setting_problems(settings: VllmSettings) -> Iterator[Diagnostic]:
    for option, text in (("--vllm", settings.program), ("--vllm-options", settings.options)):
        try:
            words = shlex.split(text)
        except ValueError as error:
            yield Diagnostic(option, f"{show(text)}: {str(error).lower()}")
        else:
            if option == "--vllm" and not words:
                yield Diagnostic(option, "is empty", "name the command that runs vLLM")
    if not 0 < settings.port < 2**16:
        yield Diagnostic("--port", f"is {settings.port}, and must be between 1 and 65535")
    if not re.fullmatch(r"[\w.:\[\]-]+", settings.host):
        yield Diagnostic("--host", f"{show(settings.host)} is not the name or address of this machine")


def _name_problems(folders: Mapping[str, Path], base: str) -> Iterator[Diagnostic]:
    if not folders:
        yield Diagnostic("", "no adapter is given", "without adapters, start vLLM itself: vllm serve MODEL")
    fix = "give the adapter another name: NAME=FOLDER"
    if base in folders:
        yield Diagnostic(base, "is the name of the base", fix)
    for name in folders:
        if not re.fullmatch(NAME_OF_ADAPTER, name):
            what = f"{show(name)} cannot name an adapter, which takes letters, digits and `.`, `_`, `-`"
            yield Diagnostic("", what, fix)


def _form(name: str, folder: Path, section: ModelSection, converted: Path) -> VllmAdapter:
    """An adapter as vLLM serves it, converted if vLLM would refuse or miscompute its own folder.

    Raises:
        LoraryError: it cannot be read, or has no form that vLLM computes; every reason.
    """
    adapter = load_adapter(folder)
    model = skeleton(section, base_class(section, folder, adapter))
    base = location(section)
    if problems := engine_problems(adapter, model, ENGINES["vllm"], base, name):
        raise FileError("", problems)
    source, target = folder.absolute(), converted / name
    rope = rope_parameters(adapter, model)
    rank = _own_rank(source, model)
    if rank is None:
        export_for_engine(adapter, target, "vllm", model=model, base=base, name=name)
        rank = _rank_of_export(target, model)
    else:
        target = source
    return VllmAdapter(name, source, target, rank, rope)


def _own_rank(folder: Path, model: nn.Module) -> int | None:
    """The rank of a folder that vLLM reads as it is; None if it must be converted."""
    if not (folder / NAME).is_file():
        return None
    found = read_folder(folder, model)
    return rank_needed(found) if _READER.verdict(found).accepted else None


def _rank_of_export(folder: Path, model: nn.Module) -> int:
    rank = _own_rank(folder, model)
    if rank is None:
        raise FileError("", [Diagnostic("", "vLLM would not read its converted form as PEFT does")])
    return rank


def _mixed_scalings(forms: Sequence[VllmAdapter]) -> Iterator[Diagnostic]:
    """One process has one RoPE scaling: adapters that need different ones cannot share it."""
    scalings = {json.dumps(form.rope, sort_keys=True): form.name for form in forms}
    if len(scalings) > 1:
        names = ", ".join(scalings.values())
        what = f"{names} need different RoPE scalings, and a vLLM server has one"
        yield Diagnostic("", what, "serve them by separate servers, or by lorary's own engine")


def _command(forms: Sequence[VllmAdapter], section: ModelSection, settings: VllmSettings) -> Iterator[str]:
    dtype = str(load_dtype(section, load_config(section))).removeprefix("torch.")  # vLLM's own `auto` rounds float32
    yield from (*shlex.split(settings.program), "serve", location(section))
    yield from ("--served-model-name", settings.name, "--dtype", dtype)
    yield from ("--host", settings.host, "--port", str(settings.port))
    if section.revision:
        yield from ("--revision", section.revision)
    yield "--enable-lora"
    yield from ("--max-lora-rank", str(serving_rank(max(form.rank for form in forms))))
    yield from ("--max-loras", str(min(len(forms), _IN_A_BATCH)))
    yield from ("--max-cpu-loras", str(len(forms)))
    if forms[0].rope:
        yield from ("--hf-overrides", json.dumps({"rope_parameters": forms[0].rope}))
    yield "--lora-modules"
    for form in forms:
        yield json.dumps({"name": form.name, "path": os.fspath(form.folder), "base_model_name": settings.name})
    yield from shlex.split(settings.options)
