"""LoRA-drop: a probe says which half of the layers keep a LoRA of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice

from tasks import HEADERS, batches
from torch import nn
from training import Setting, train

import lorary
from lorary import builtin
from lorary.analysis.importance import drop_layers, layer_importance
from lorary.methods.lora_drop import Importance, Measured

PROBE = 1 / 3  # of the steps of a run
LOOKS = 8  # batches on which importance is measured


def half(method: lorary.Method, rate: float, least: bool = False) -> Callable[[Setting, int], nn.Module]:
    """What builds the model in which of every module kind the more important half of the layers keep their own.

    Args:
        method: of the probe, and of the run.
        rate: the probe's learning rate.
        least: keep the less important half instead.
    """

    def build(setting: Setting, seed: int) -> nn.Module:
        steps = max(1, round(setting.size.short * PROBE))
        probe = builtin.load_model()
        plan = lorary.plan(probe, method)
        lorary.attach(probe, plan, seed=seed)
        train(probe, HEADERS, rate, seed, steps, setting.size.batch)
        looks = islice(batches(HEADERS, seed, setting.size.batch), LOOKS)
        measured = layer_importance(probe, [{"input_ids": ids} for ids in looks])
        model = builtin.load_model()
        return lorary.attach(model, drop_layers(plan, _halved(measured.g, least), threshold=0.99), seed=seed)

    return build


def _halved(g: Mapping[str, float], least: bool) -> Importance:
    """Half of the layers of every module kind count, alike; the others not at all. So it is half that are kept."""
    kinds: dict[str, list[str]] = {}
    for site in g:
        kinds.setdefault(site.rpartition(".")[2], []).append(site)
    kept = {
        site
        for sites in kinds.values()
        for site in sorted(sites, key=g.__getitem__, reverse=not least)[: len(sites) // 2]
    }
    return Importance(tuple(Measured(site, float(site in kept), 0.0) for site in g))
