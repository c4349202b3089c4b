"""An adapter in PEFT's words: what its two files say, and why some adapters have no such words.

PEFT matches module names by their tails and patterns by regular expressions; what is written here matches exactly
the sites that are meant, in any model that has them. All lists and keys are sorted, so that the same adapter gives
the same bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from lorary.adapted import base_parameters, plain_modules
from lorary.adapter import Adapter
from lorary.errors import Problem
from lorary.formats import peft_keys
from lorary.formats.banks import Banks
from lorary.formats.bounded_regex import MOST_CHARACTERS
from lorary.formats.peft_sorts import adalora_words, sort_obstacles, sort_of, vera_words
from lorary.methods.lora import ByRank
from lorary.methods.rslora import BySqrtRank
from lorary.placed import Placed
from lorary.sites import kind_of

_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


class Full(NamedTuple):
    """How PEFT would keep the base parameters that an adapter holds whole, and why it cannot."""

    modules_to_save: list[str]
    bias: str
    problems: list[Problem]


def obstacles(adapter: Adapter, model: nn.Module | None, shared: Banks) -> list[Problem]:
    """Why PEFT cannot compute this adapter's function from its very tensors; empty where it can.

    Args:
        adapter: any adapter.
        model: the base, where it is at hand: only it tells whether a module is trained whole, and how a convolution
            slides.
        shared: what its sites share.
    """
    sort = sort_of(adapter)
    what = "PEFT has no adapter with these tensors and this function"
    problems = [] if sort else [Problem("method", what)]
    problems += sort_obstacles(adapter, sort, shared)
    if words := stretched(adapter):
        problems.append(Problem("context", f"PEFT's files do not say how positions are divided: {words}"))
    return problems + site_obstacles(adapter, model) + full_words(adapter, model).problems


def stretched(adapter: Adapter) -> dict[str, Any]:
    """What the base's `rope_parameters` must say for an adapter, beside what they say; empty where they may stay."""
    return dict(adapter.method.context.words) if adapter.method.context is not None else {}


_README = """# A PEFT adapter on a base whose positions are divided

It was trained on {base!r} with positions divided by {factor:g}. PEFT's files do not say so: load the base like this.

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained({base!r})
rope = config.rope_parameters
rope.get("full_attention", rope).update({words})
base = AutoModelForCausalLM.from_pretrained({base!r}, config=config)
model = PeftModel.from_pretrained(base, "this folder")
```
"""


def base_text(adapter: Adapter) -> str:
    """How the base is to be loaded, beside an adapter whose positions are divided."""
    words = stretched(adapter)
    return _README.format(base=adapter.base.name or "the base", factor=words["factor"], words=words)


def site_obstacles(adapter: Adapter, model: nn.Module | None = None) -> list[Problem]:
    """Why PEFT has no LoRA at some of the sites."""
    problems = []
    if not adapter.placed:
        what = "it trains base parameters only, and PEFT's adapters adapt at least one layer"
        problems.append(Problem("sites", what))
    modules = plain_modules(model) if model is not None else {}
    for p in adapter.placed:
        if p.site.groups > 1:
            what = f"a convolution with {p.site.groups} groups: PEFT's LoRA of it is no change of its weight"
            problems.append(Problem(p.site.name, what))
        elif what := sliding(modules.get(p.site.name)):
            problems.append(Problem(p.site.name, what))
    return problems


def sliding(layer: nn.Module | None, sort: str = "LoRA") -> str:
    """Why PEFT's filters do not slide over a convolution's input as its own do; empty where they do."""
    if layer is None or not (kind_of(layer) or "").startswith("conv"):
        return ""
    conv = cast(nn.Conv1d, layer)
    dilated = any(d != 1 and n != 1 for d, n in zip(conv.dilation, conv.kernel_size, strict=True))
    if dilated and sort != "AdaLoRA":
        return f"a convolution of dilation {conv.dilation}, which PEFT's LoRA of it leaves out"
    if conv.padding_mode != "zeros" and any(conv._reversed_padding_repeated_twice):
        return f"a convolution with {conv.padding_mode} padding, for which PEFT's LoRA of it pads with zeros"
    return ""


def full_words(adapter: Adapter, model: nn.Module | None) -> Full:
    """`modules_to_save` and `bias` for an adapter's full parameters."""
    sites = {p.site.name for p in adapter.placed}
    written = [name for name in sorted(adapter.full) if name.removesuffix(".weight") in sites]
    if written:  # Delta-LoRA's
        what = "is changed beside the adapter there, and PEFT leaves the weights alone that it adapts"
        return Full([], "none", [Problem(name, what, "merge the adapter, and save the model") for name in written])
    biases = {name for name in adapter.full if name.rpartition(".")[2] == "bias"}
    others = sorted(set(adapter.full) - biases)
    bias = "all" if biases else "none"
    if not others:
        return Full([], bias, [])
    if model is None:
        where = others[0] + (f", and {len(others) - 1:,} more" if len(others) > 1 else "")
        what = "is trained in full, and whether its module is trained whole only the model can tell"
        return Full([], bias, [Problem(where, what, "give the model too: model=, or --base on the command line")])
    modules, parameters = plain_modules(model), dict(base_parameters(model))
    kept = sorted({name.rpartition(".")[0] for name in others})
    problems = [p for path in kept for p in _module_problems(path, modules, parameters, adapter)]
    saved = [n for n in biases if n.rpartition(".")[0] not in kept]
    return Full(kept, "all" if saved else "none", problems)


def _module_problems(
    path: str, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor], adapter: Adapter
) -> list[Problem]:
    """Why PEFT cannot keep the module at `path` in `modules_to_save`."""
    inside = {name: t for name, t in parameters.items() if name.startswith(f"{path}.")}
    left_out = sorted(set(inside) - set(adapter.full))
    same = sorted(name for name in modules if name.endswith(path) and name != path)
    ties = sorted(n for n, t in parameters.items() if n not in inside and any(t is own for own in inside.values()))
    state = modules[path].state_dict() if path in modules else {}
    reasons = {
        "PEFT keeps modules, and this is a parameter of the model itself": not path,
        f"PEFT keeps whole modules, and {', '.join(left_out[:3])} is not trained": bool(left_out),
        f"PEFT would take {', '.join(same[:3])} for it": bool(same),
        f"PEFT would untie it from {', '.join(ties[:3])}": bool(ties),
        "PEFT keeps its buffers as well, which did not train": len(state) > len(inside),
    }
    return [Problem(path, reason) for reason, holds in reasons.items() if holds]


def scales(adapter: Adapter) -> tuple[dict[str, tuple[int, float]], bool]:
    """site -> (rank, alpha) as PEFT has to read them, and whether its scale is alpha / sqrt(rank)."""
    root = bool(adapter.placed) and all(isinstance(p.method.scale, BySqrtRank) for p in adapter.placed)
    return {p.site.name: (peft_keys.rank(p), _alpha(p, root)) for p in adapter.placed}, root


def _alpha(p: Placed, root: bool) -> float:
    rank = peft_keys.rank(p)
    if p.alpha is not None and isinstance(p.method.scale, BySqrtRank if root else ByRank):
        return p.alpha * (math.sqrt(rank / p.r) if root else rank / p.r)
    return p.scale * rank


def config(adapter: Adapter, model: nn.Module | None, shared: Banks) -> dict[str, Any]:
    """The contents of `adapter_config.json` for an adapter's own tensors."""
    sort = sort_of(adapter)
    if sort == "VeRA":
        return _shared_words(adapter, model) | vera_words(adapter, shared)
    if sort == "AdaLoRA":
        words = _shared_words(adapter, model) | adalora_words(adapter)
        return words | {"lora_alpha": _number(words["lora_alpha"])}
    return lora_config(adapter, model, *scales(adapter), magnitudes=sort == "DoRA")


def lora_config(
    adapter: Adapter,
    model: nn.Module | None,
    sizes: Mapping[str, tuple[int, float]],
    root: bool,
    magnitudes: bool,
) -> dict[str, Any]:
    """The contents of `adapter_config.json` for a LoRA.

    Args:
        adapter: the adapter; only its sites, full parameters, dropout and base are looked at.
        model: the base, where it is at hand: it makes for shorter target lists.
        sizes: site -> (rank, alpha).
        root: whether the scale is alpha / sqrt(rank).
        magnitudes: whether it is a DoRA.
    """
    r, alpha = (Counter(pair[i] for pair in sizes.values()).most_common(1)[0][0] for i in (0, 1))
    return _shared_words(adapter, model) | {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": _number(alpha),
        "lora_dropout": adapter.method.dropout,
        "use_rslora": root,
        "use_dora": magnitudes,
        "lora_bias": False,
        "init_lora_weights": True,
        "exclude_modules": None,
        "rank_pattern": patterns({name: size[0] for name, size in sizes.items()}, r),
        "alpha_pattern": patterns({name: _number(size[1]) for name, size in sizes.items()}, _number(alpha)),
    }


def _shared_words(adapter: Adapter, model: nn.Module | None) -> dict[str, Any]:
    """The fields that all of PEFT's adapters have."""
    kept, bias, _ = full_words(adapter, model)
    architecture = adapter.base.architecture
    return {
        "task_type": next((task for end, task in _TASKS.items() if architecture.endswith(end)), None),
        "auto_mapping": None,
        "base_model_name_or_path": adapter.base.name or None,
        "revision": None,
        "inference_mode": True,
        "target_modules": targets([p.site.name for p in adapter.placed], model),
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": any(p.site.kind == "transposed" for p in adapter.placed),
        "modules_to_save": kept or None,
        "bias": bias,
    }


def config_text(words: Mapping[str, Any]) -> str:
    """A configuration as the file's text: sorted, so that the same adapter gives the same bytes."""
    return json.dumps(words, indent=2, sort_keys=True) + "\n"


def targets(sites: list[str], model: nn.Module | None) -> list[str] | str:
    """PEFT's `target_modules` for exactly these sites: tails of names, else whole names, else one pattern.

    >>> targets(["layers.0.q_proj", "layers.1.q_proj"], None)
    ['layers.0.q_proj', 'layers.1.q_proj']
    """
    whole = sorted(sites)
    pattern = "|".join(map(re.escape, whole))
    if model is None:
        # a name of one component is the tail of many
        exact = all("." in name for name in whole) or len(pattern) > MOST_CHARACTERS
        return whole if exact else pattern
    modules = list(plain_modules(model))
    for entries in (sorted({name.rpartition(".")[2] for name in whole}), whole):
        if {m for m in modules if any(m == e or m.endswith(f".{e}") for e in entries)} == set(whole):
            return entries
    return pattern


def patterns(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """PEFT's `rank_pattern` or `alpha_pattern`: for every site whose value is not the usual one, a key for it alone.

    >>> patterns({"a.q_proj": 8, "b.q_proj": 8, "a.down_proj": 4, "b.down_proj": 4}, 8)
    {'down_proj': 4}
    """
    by_tail: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_tail.setdefault(name.rpartition(".")[2], set()).add(value)
    found = {}
    for name, value in values.items():
        if value != usual:
            tail = name.rpartition(".")[2]
            key = re.escape(tail) if len(by_tail[tail]) == 1 else f"^{re.escape(name)}"
            found[key] = value
    return dict(sorted(found.items()))


def _number(value: float) -> float | int:
    """A whole number as one: readers in other languages expect an integer alpha."""
    return int(value) if value == int(value) else value
