"""How the updates of PEFT's LORA join the weight: added, as DoRA, with a bias beside B, or from an invocation on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import PeftConfig
from lorary.adapters.peft.fields import Field, field, token_list
from lorary.adapters.peft.keys import BIAS, MAGNITUDE
from lorary.adapters.peft.tasks import task_fields
from lorary.errors import Diagnostic, FileError
from lorary.files.bounded_regex import Budget
from lorary.files.strict_json import show
from lorary.methods.alora import FromInvocation, InvocationContext, invocation_of
from lorary.methods.dora import MagnitudeDirection
from lorary.methods.lora import Add, AddWithBias
from lorary.spec.fields import FLAG
from lorary.spec.interfaces import Join
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Site

INVOCATION = "alora_invocation_tokens"
JOINS: tuple[type[Join], ...] = (Add, MagnitudeDirection, AddWithBias, FromInvocation)


def _invocation(value: Any, budget: Budget) -> tuple[int, ...]:
    ids = token_list(value)
    if not ids:
        raise ValueError("names no token")
    return ids


FIELDS: Mapping[str, Field] = {
    "use_dora": field(FLAG, False, nullable=True),
    "lora_bias": field(FLAG, False, nullable=True),
    INVOCATION: Field(_invocation, nullable=True),
}


def join_of(config: PeftConfig) -> tuple[Any, Any]:
    """The join of a configuration's updates, and the context that it needs or None: hashable components."""
    if config["use_dora"]:
        return MagnitudeDirection(), None
    if config[INVOCATION]:
        return FromInvocation(), InvocationContext(config[INVOCATION])
    return AddWithBias() if config["lora_bias"] else Add(), None


def join_mismatches(config: PeftConfig, sites: set[str]) -> list[tuple[str, str]]:
    """(field, reason) for the fields that contradict each other, or do not fit these sites."""
    on = [name for name in FIELDS if config[name]]
    task = config["task_type"]
    if INVOCATION in on and task != "CAUSAL_LM":
        return [(INVOCATION, f"is set, and task_type is {show(task)}: PEFT looks for it only under CAUSAL_LM")]
    found = [(name, f"is set beside {on[0]}: here an adapter has one of the two") for name in on[1:]]
    bare = [name for name in sorted(sites) if config.targets_parameter(f"{name}.weight")][:1]
    what = "is set, and {} is in target_parameters: PEFT refuses both together"
    return found + [(name, what.format(site)) for name in on if name != "use_dora" for site in bare]


def leaves_of_join(config: PeftConfig) -> dict[str, str]:
    """The end of a tensor's name -> the role, for the tensors beside the factors."""
    return ({MAGNITUDE: "m"} if config["use_dora"] else {}) | ({BIAS: "c"} if config["lora_bias"] else {})


def join_fields(adapter: Adapter) -> dict[str, Any]:
    """The fields of an adapter's configuration that are not always there."""
    context = adapter.method.context
    return {INVOCATION: list(context.tokens)} if isinstance(context, InvocationContext) else {}


def waits_in_vain(adapter: Adapter) -> bool:
    """Whether PEFT would never look for an adapter's invocation: only its class for CAUSAL_LM does."""
    waits = bool(invocation_of(adapter.method))
    return waits and task_fields(adapter, None, None)["task_type"] != "CAUSAL_LM"


def is_dora(adapted: AdaptedSite) -> bool:
    """Whether a site has DoRA's magnitudes."""
    return isinstance(adapted.method.join, MagnitudeDirection)


def has_bias(adapted: AdaptedSite) -> bool:
    """Whether a site has a bias beside B."""
    return isinstance(adapted.method.join, AddWithBias)


def is_added(adapted: AdaptedSite) -> bool:
    """Whether a site's update is added to the weight, and nothing else."""
    return isinstance(adapted.method.join, Add)


def magnitude_shape(site: Site, shape: tuple[int, ...], found: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of DoRA's magnitudes, which has been written in several ways.

    A row (1, out) differs from magnitudes per input, which other programs write, only if the layer is not square.
    """
    ones = (1,) * len(site.kernel_size)
    column, row = (site.out_features, 1, *ones), (1, site.out_features, *ones)
    if found in ((site.out_features,), column) or (
        found == row and (site.kernel_size or site.out_features != site.in_features)
    ):
        return found
    if found[:1] == (1,) and math.prod(found) == site.in_features:
        what = f"has the shape {list(found)}, a magnitude for each input; DoRA as published has one per output"
        fix = f"if they are the outputs' after all, write them as [{site.out_features}]"
        raise FileError("", [Diagnostic(f"{site.name}.{MAGNITUDE}", what, fix)])
    return shape
