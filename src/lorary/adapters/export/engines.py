"""vLLM and SGLang: an adapter as the plain LoRA that the engine computes correctly, and the command that serves it.

Both read PEFT's two files. vLLM follows the patterns of ranks and alphas in them, SGLang ignores them and `use_rslora`.
So these files have the folded form of `export_peft`: one rank and one scale at all sites, which both compute correctly.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorary.adapters.adapter import Adapter, without_empty_sites
from lorary.adapters.compose.plain_lora import PLAIN_LORA
from lorary.adapters.export.plain_factors import MERGE, plain_factors, site_problems
from lorary.adapters.peft.export import SERVE, lora_files, write_lora
from lorary.adapters.peft.writer import rope_overrides
from lorary.adapters.readers.vllm import RANKS, serving_rank
from lorary.errors import Diagnostic, FileError, deduplicated, did_you_mean, not_a
from lorary.files.safe_open import checked_path
from lorary.files.strict_json import show
from lorary.layers.adapted import unwrapped_modules
from lorary.layers.kinds import site as site_of
from lorary.model.ambient import mode_independent
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Site

NAME_OF_ADAPTER = "[A-Za-z0-9_-][A-Za-z0-9._-]*"  # it stands in `--lora-modules name=path`, and names a folder
_VLLM_HEADS = ("granite", "llama", "mixtral", "qwen3", "qwen3_moe")  # whose classes declare `embedding_modules`
_SGLANG_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_SGLANG_LAYERS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("qkv_proj", "gate_up_proj", "embed_tokens", "lm_head"),
)


@dataclass(frozen=True)
class Engine:
    """An inference engine.

    Args:
        title: its name in messages.
        largest_rank: the largest rank that it takes; None for any.
        why_not: (site, whether it is the embedding or the LM head, base) -> why it does not compute an adapter of it;
            empty if it does.
        command: (base, name, path, configuration, RoPE parameters) -> the command that serves an adapter, which ends
            with `name=path`.
        scales_rope: whether the command can say which RoPE scaling the base needs.
        groups: fused projections; an adapter must adapt all or none of them.
    """

    title: str
    largest_rank: int | None
    why_not: Callable[[Site, bool, Any], str]
    command: Callable[[str, str, str, dict[str, Any], dict[str, Any]], list[str]]
    scales_rope: bool
    groups: tuple[tuple[str, ...], ...] = ()


@mode_independent
def export_for_engine(
    adapter: Adapter,
    folder: str | os.PathLike[str],
    engine: str,
    *,
    model: nn.Module,
    base: str = "",
    name: str = "",
) -> list[str]:
    """Write an adapter as a PEFT LoRA that an inference engine computes correctly, with the command in `serve.sh`.

    Args:
        adapter: an adapter of any method whose update is B A alone.
        folder: a new folder, or one that holds a PEFT adapter to be replaced.
        engine: `vllm` or `sglang`.
        model: the base; it may be on the meta device, unless the method needs its weights.
        base: what the engine is to load: a folder or Hub id; by default the adapter's record of its base.
        name: the model name under which requests ask for the adapter; by default the folder's name.

    Returns:
        The command that serves it.

    Raises:
        FileError: the engine cannot run this adapter, with every reason; or the folder cannot be written.
    """
    path = checked_path(folder, "cannot export an adapter:")
    problems = not_a(nn.Module, "a torch.nn.Module", model=model) + not_a(Adapter, "an Adapter", adapter=adapter)
    problems += not_a(str, "a text", base=base, name=name)
    if not isinstance(engine, str) or engine not in ENGINES:
        problems.append(Diagnostic("engine", f"{show(engine)} is not known", did_you_mean(str(engine), ENGINES)))
    if problems:
        raise FileError(f"cannot export an adapter to {show(path, most=400)}:", problems)
    target = ENGINES[engine]
    name = name or Path(os.path.abspath(path)).name
    problems = engine_problems(adapter, model, target, base or adapter.base.name, name)
    if problems:
        raise FileError(
            f"cannot export an adapter to {show(path, most=400)} for {target.title}", deduplicated(problems)
        )
    files = lora_files(_with_whole_groups(adapter, model, target.groups), folder, model, folded=True)
    rope = rope_parameters(adapter, model)
    *command, last = target.command(base or adapter.base.name, name, path, files.config, rope)
    here = f'{name}="$(cd "$(dirname "$0")" && pwd)"'  # the last argument, wherever the folder is moved
    text = f"#!/bin/sh\n# Serve this folder's adapter with {target.title}, as the model {name}.\n"
    write_lora(folder, files, {SERVE: f'{text}exec {shlex.join(command)} {here} "$@"\n'}, model)
    return [*command, last]


def engine_problems(adapter: Adapter, model: nn.Module, target: Engine, base: str, name: str) -> list[Diagnostic]:
    """Why an engine cannot run an adapter."""
    factors, problems = plain_factors(adapter, model, target.title)
    root = unwrapped_modules(model)[""]
    problems += site_problems(adapter, model, lambda site, head: target.why_not(site, head, root))
    r = max((A.shape[-2] for _, A in factors.values()), default=0)
    if target.largest_rank is not None and r > target.largest_rank:
        what = f"is {r}, and {target.title} takes at most {target.largest_rank}"
        problems.append(Diagnostic("rank", what, f"lower it with `lorary compress`, or {MERGE}"))
    if rope_overrides(adapter) and not target.scales_rope:
        problems.append(Diagnostic("context", f"it needs RoPE scaling, which {target.title} has to be given", MERGE))
    if not base:
        problems.append(Diagnostic("base", "the adapter does not name its base", "give --base MODEL"))
    if base.startswith("-") or not base.isprintable():  # it is an argument of the command
        problems.append(Diagnostic("base", f"{show(base)} is neither a folder nor a Hub id", "give --base MODEL"))
    if not re.fullmatch(NAME_OF_ADAPTER, name):
        what = f"{show(name)} cannot name an adapter, which takes letters, digits and `.`, `_`, `-`"
        problems.append(Diagnostic("name", what, "export to a folder with another name"))
    return problems


def _with_whole_groups(adapter: Adapter, model: nn.Module, groups: tuple[tuple[str, ...], ...]) -> Adapter:
    """The adapter with zeros at the projections that are fused with adapted ones and are not adapted themselves."""
    adapter = without_empty_sites(adapter)
    modules = unwrapped_modules(model)
    tensors = {adapted.site.name: adapter.tensors[adapted.site.name] for adapted in adapter.sites}
    added = []
    for adapted in adapter.sites:
        layer, _, leaf = adapted.site.name.rpartition(".")
        for name in (f"{layer}.{other}" for group in groups if leaf in group for other in group):
            if name in modules and name not in tensors:
                zero = AdaptedSite(site_of(name, modules[name]), PLAIN_LORA)
                added.append(zero)
                tensors[name] = {role: torch.zeros(zero.shapes[role]) for role in ("A", "B")}
    return dataclasses.replace(adapter, sites=(*adapter.sites, *added), tensors=tensors)


def rope_parameters(adapter: Adapter, model: nn.Module) -> dict[str, Any]:
    """The base's whole `rope_parameters` with the adapter's scaling; empty if it needs none."""
    overrides = rope_overrides(adapter)
    if not overrides:
        return {}
    root: Any = unwrapped_modules(model)[""]
    found: dict[str, Any] = copy.deepcopy(dict(root.config.rope_parameters))
    found.get("full_attention", found).update(overrides)
    return found


def _why_not_vllm(site: Site, head: bool, model: Any) -> str:
    if head:
        kind = model.config.model_type
        return "" if kind in _VLLM_HEADS else f"vLLM is not known to adapt the embedding or the LM head of {kind}"
    if site.experts:
        return f"is of {site.experts} experts, and vLLM does not read PEFT's layout of these"
    if site.kind not in ("linear", "transposed"):
        return f"is of kind {site.kind}, and vLLM adapts linear layers"
    if site.name.endswith(".kv_b_proj"):
        return "vLLM folds it into its attention, and ignores adapters of it"
    return ""


def _why_not_sglang(site: Site, head: bool, model: Any) -> str:
    if site.experts:
        return f"is of {site.experts} experts, and SGLang does not read PEFT's layout of these"
    leaf = site.name.rpartition(".")[2]
    return "" if leaf in _SGLANG_LAYERS else f"SGLang is known to adapt {', '.join(_SGLANG_LAYERS)}"


def _vllm(base: str, name: str, path: str, config: dict[str, Any], rope: dict[str, Any]) -> list[str]:
    rank = str(serving_rank(config["r"]))
    command = ["vllm", "serve", base, "--enable-lora", "--max-loras", "1", "--max-lora-rank", rank]
    overrides = ["--hf-overrides", json.dumps({"rope_parameters": rope})] if rope else []
    return [*command, *overrides, "--lora-modules", f"{name}={path}"]


def _sglang(base: str, name: str, path: str, config: dict[str, Any], rope: dict[str, Any]) -> list[str]:
    targets = sorted({target.rpartition(".")[2] for target in config["target_modules"]})
    command = ["python", "-m", "sglang.launch_server", "--model-path", base, "--enable-lora"]
    return [
        *command,
        *("--max-lora-rank", str(config["r"])),
        *("--lora-target-modules", *targets),
        *("--lora-paths", f"{name}={path}"),
    ]


ENGINES = {
    "vllm": Engine("vLLM", RANKS[-1], _why_not_vllm, _vllm, scales_rope=True),
    "sglang": Engine("SGLang", None, _why_not_sglang, _sglang, scales_rope=False, groups=_SGLANG_GROUPS),
}
