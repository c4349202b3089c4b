"""PEFT's PREFIX_TUNING and PROMPT_TUNING: one tensor `prompt_embeddings`, without a prefix and without sites.

    PREFIX_TUNING  [l, 2 L d_kv]  for every layer in turn its keys, then its values
    PROMPT_TUNING  [l, d]

Only the model knows which layers they belong to. Sizes that the configuration may leave out, PEFT takes from the model,
as it does when it trains; so none is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import NAME, PeftConfig
from lorary.adapters.peft.fields import RANK, SHARED, Field, field, unsupported
from lorary.adapters.peft.tasks import task_fields
from lorary.adapters.tensor_checks import read_tensors
from lorary.errors import Diagnostic
from lorary.files.findings import Findings
from lorary.files.tensor_file import TensorFile
from lorary.layers.block_names import projects_to
from lorary.layers.fused_qkv import FUSED, fused_parts
from lorary.layers.kinds import site
from lorary.layers.prepended import attention_layers, token_embedding
from lorary.methods.prefix_tuning import Prefix, prefix_tuning
from lorary.methods.prompt_tuning import Prompt, prompt_tuning
from lorary.model.base import Base
from lorary.model.fingerprint import Fingerprint, base_name
from lorary.spec.fields import COUNT, FLAG, TEXT, optional
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Site

TENSOR = "prompt_embeddings"
_SIZE = field(optional(COUNT))
_ONE = {
    "check": lambda value: value in (None, 1),
    "expects": "1: models of an encoder and a decoder have no virtual tokens here",
}
_COMMON: dict[str, Field] = {
    "base_model_name_or_path": SHARED["base_model_name_or_path"],
    "modules_to_save": unsupported("modules trained beside virtual tokens are not read"),
    "num_virtual_tokens": field(RANK),
    "num_transformer_submodules": field(_ONE),
    **dict.fromkeys(("token_dim", "num_attention_heads", "num_layers"), _SIZE),
}
_TEXT = field(optional(TEXT))
_ANY = Field(lambda value, budget: value)  # of training alone
FIELDS: dict[str, dict[str, Field]] = {
    "PREFIX_TUNING": _COMMON
    | {"encoder_hidden_size": _SIZE, "prefix_projection": field(FLAG, False), "init_weights": _TEXT},
    "PROMPT_TUNING": _COMMON
    | {"prompt_tuning_init": _TEXT, "prompt_tuning_init_text": _TEXT, "tokenizer_name_or_path": _TEXT}
    | {"tokenizer_kwargs": _ANY},
}


def read_virtual_tokens(config: PeftConfig, base: Base | None, findings: Findings, file: TensorFile) -> Adapter:
    """The prefix or the prompt that PEFT saved.

    Args:
        config: the checked configuration.
        base: the base; needed.
        findings: collects the problems, and raises them.
        file: the open file of tensors.

    Raises:
        FileError: every reason why it cannot be used.
    """
    tokens = config["num_virtual_tokens"]
    if tokens is None:
        findings.fatal.append(Diagnostic(f"{NAME}: num_virtual_tokens", "is missing"))
    if base is None:
        what = f"the layers that a {config.peft_type} adapter belongs to are known only to the model"
        findings.fatal.append(Diagnostic("", what, "read it onto its base: lorary.load(model, folder)"))
    findings.raise_refused()
    assert base is not None
    prefix = config.peft_type == "PREFIX_TUNING"
    method = Method(**(prefix_tuning if prefix else prompt_tuning)(tokens))
    assert method.context is not None
    findings.fatal += [Diagnostic("", *why) for why in method.context.problems(base.model)]
    findings.raise_refused()
    sites = tuple(
        AdaptedSite(s, method) for s in (_prefix_sites(base) if prefix else [base.site(token_embedding(base.model))])
    )
    tensors = virtual_tokens(sites, file, findings)
    fingerprint = Fingerprint(name=base_name(config["base_model_name_or_path"]))
    return Adapter(method, sites, tensors, {}, fingerprint, findings.conclude())


def virtual_tokens(sites: Sequence[AdaptedSite], file: TensorFile, findings: Findings) -> dict[str, dict[str, Tensor]]:
    """site -> role -> tensor, from the one tensor of a file.

    Raises:
        FileError: every reason why the file is not that of these sites.
    """
    columns = _columns(sites)
    tokens = next(iter(sites[0].shapes.values()))[0]
    shape = tokens, sum(width for _, _, width in columns)
    names = {name: name for name in file.header.tensors}
    explain = "is not a tensor of virtual tokens"
    values = read_tensors(file, names, {TENSOR: shape}, findings, lambda _: explain, {TENSOR}, ())
    findings.raise_refused()
    found: dict[str, dict[str, Tensor]] = {adapted.site.name: {} for adapted in sites}
    parts = values[TENSOR].split([width for _, _, width in columns], dim=1)
    for (name, role, _), part in zip(columns, parts, strict=True):
        found[name][role] = part.contiguous()
    return found


def _columns(sites: Sequence[AdaptedSite]) -> list[tuple[str, str, int]]:
    """(site, role, width) of the columns of the tensor: layer by layer, keys before values."""
    layers: dict[str, list[tuple[str, str, int]]] = {}
    for adapted in sites:
        name = adapted.site.name
        own = [(role, name, shape[1]) for role, shape in adapted.shapes.items()]
        layers.setdefault(name.rpartition(".")[0], []).extend(own)
    return [(name, role, width) for columns in layers.values() for role, name, width in sorted(columns)]


def _prefix_sites(base: Base) -> list[Site]:
    """The projections of keys and values of a language model."""
    layers, projects, found = set(attention_layers(base.model)), projects_to("kv"), []
    config = getattr(base.model, "config", None)
    for name in base.kinds:
        parent, _, last = name.rpartition(".")
        if parent in layers and projects(name):
            parts = fused_parts(name, base.modules[name], config) if last in FUSED else {}
            found.append(site(name, base.modules[name], (parts["k"], parts["v"])) if parts else base.site(name))
    return found


# --- writing ----------------------------------------------------------------------------------------------------------


def has_virtual_tokens(sites: Iterable[AdaptedSite]) -> bool:
    """Whether some of these sites have a prefix or a prompt."""
    return any(isinstance(adapted.join, Prefix | Prompt) for adapted in sites)


def are_virtual_tokens(sites: Sequence[AdaptedSite]) -> bool:
    """Whether these sites hold a prefix or a prompt, and nothing else: neither other methods nor a network."""
    joins = list({adapted.join for adapted in sites})
    return len(joins) == 1 and isinstance(joins[0], Prefix | Prompt) and not getattr(joins[0], "mlp", 0)


def is_exact(adapter: Adapter) -> bool:
    """Whether PEFT has an adapter of exactly these tensors."""
    return are_virtual_tokens(adapter.sites) and not virtual_token_problems(adapter)


def virtual_token_problems(adapter: Adapter) -> list[Diagnostic]:
    """Why PEFT has no adapter like one with a prefix or a prompt."""
    problems, joins = [], {type(adapted.join) for adapted in adapter.sites}
    if len(joins) > 1:
        names = ", ".join(sorted(join.__name__ for join in joins))
        problems.append(Diagnostic("sites", f"PEFT's virtual tokens stand alone, and this adapter has {names}"))
    if adapter.full:
        what = f"{', '.join(sorted(adapter.full)[:3])} train in full, and PEFT saves no base parameters beside a prompt"
        problems.append(Diagnostic("full", what))
    if task_fields(adapter, None, None)["auto_mapping"] is not None:
        what = f"PEFT has virtual tokens for models of a task that it knows, and {adapter.base.architecture} is of none"
        problems.append(Diagnostic("task", what))
    widths = {shape for adapted in adapter.compact().sites for shape in adapted.shapes.values()}
    if not problems and len(widths) > 1:
        problems.append(Diagnostic("sites", "PEFT's prefix has one width in all layers, and this one has several"))
    return problems


def virtual_token_files(adapter: Adapter, model: nn.Module | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) of a prefix or a prompt; a prefix without the network that computed it in training."""
    adapter = adapter.compact()
    united = torch.cat([adapter.tensors[name][role] for name, role, _ in _columns(adapter.sites)], 1)
    return _config(adapter, model), {TENSOR: united}


def _config(adapter: Adapter, model: nn.Module | None) -> dict[str, Any]:
    join = adapter.sites[0].join
    assert isinstance(join, Prefix | Prompt)
    own = (
        {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "encoder_hidden_size": None}
        if isinstance(join, Prefix)
        else {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
    )
    empty = dict.fromkeys(("modules_to_save", "num_attention_heads", "num_layers", "revision", "token_dim"))
    head = {"base_model_name_or_path": adapter.base.name or None, "inference_mode": True}
    task = {"task_type": task_fields(adapter, model, None)["task_type"] or "CAUSAL_LM", "auto_mapping": None}
    return {**empty, **head, **task, **own, "num_virtual_tokens": join.tokens, "num_transformer_submodules": 1}
