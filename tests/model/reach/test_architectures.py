"""`all-linear` and `conv` have no dead site on any kind of model: each site gets a gradient in one training step.

One architecture of every family, or all of them with `--laws=all`. The list is in docs/reference/targets.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lorary
from lorary.errors import PlanError
from lorary.layers.adapted import adapted_layers
from tests import tiny
from tests.architectures import ARCHITECTURES, FAMILIES, gradients, model


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises by architecture: one of each family, unless `--laws=all`."""
    if "architecture" in metafunc.fixturenames:
        quick = [next(iter(names)) for names in FAMILIES.values()]
        metafunc.parametrize("architecture", ARCHITECTURES if metafunc.config.getoption("laws") == "all" else quick)


# Layers that run, but whose output the model drops.
UNUSED = {
    "LlavaForConditionalGeneration": "model.vision_tower.encoder.layers.1.*",  # it reads the last but one layer
    "PaliGemmaForConditionalGeneration": "model.vision_tower.head.*",  # it reads the patches, not the pooled image
}


def targets(base: nn.Module) -> list[str]:
    """The presets among `all-linear` and `conv` of which the model has layers that can be adapted."""
    return [preset for preset in ("all-linear", "conv") if matched(base, preset)]


def matched(base: nn.Module, preset: str) -> bool:
    try:
        return bool(lorary.plan(base, tiny.LORA, preset))
    except PlanError as refusal:
        if f"`{preset}` matches no layer" in str(refusal) or f"`{preset}` names only layers" in str(refusal):
            return False
        raise


def without_gradient(base: Any, plan: lorary.Plan) -> list[str]:
    """The sites of a plan that a training step does not reach."""
    lorary.attach(base, plan)
    tiny.shaken(base, 0.1)
    gradients(base)
    return [
        name
        for name, layer in adapted_layers(base).items()
        if not all(p.grad is not None and bool(p.grad.any()) for p in layer.params.values())
    ]


def test_every_site_gets_a_gradient(architecture: str) -> None:
    base = model(architecture)
    plan = lorary.plan(base, tiny.LORA, targets(base), exclude=UNUSED.get(architecture, ()))
    assert without_gradient(base, plan) == []


def test_the_page_lists_these_architectures() -> None:
    page = (Path(__file__).parents[3] / "docs/reference/targets.md").read_text(encoding="utf-8")
    for family, names in FAMILIES.items():
        assert f"| {family} | {', '.join(f'`{name}`' for name in names)} |" in page
    assert len(ARCHITECTURES) >= 40
