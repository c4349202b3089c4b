"""The rows of a run that an init reads before training (LoRA-GA, EVA, CorDA)."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from lorary.model.calibration import calibrate
from lorary.model.plan import Plan
from lorary.model.state import attached
from lorary.spec.calibration import CalibratedInit
from lorary.train.data.tokenize import Row
from lorary.train.runner.prepare import RunPlan
from lorary.train.trainer.distributed import on_main_process, this_process


def calibrated(base: Any, plan: Plan, prepared: RunPlan) -> Plan:
    """The plan with the start that its inits read from the training rows. Every process must call this.

    The rows are drawn by the run's seed. The first process measures, so that all start alike.

    Raises:
        PlanError: the rows do not determine a start.
    """
    samples = [site.init.samples for site in plan.sites if isinstance(site.init, CalibratedInit)]
    if not samples:
        return plan
    rows, seed = prepared.train.rows, prepared.config.training.seed
    drawn = random.Random(seed).sample(range(len(rows)), min(max(samples), len(rows)))
    batches = [_batch(rows[i]) for i in drawn]

    def measure() -> Plan:
        try:  # the base was loaded on the CPU, and training moves it to the accelerator only later
            return calibrate(base.to(this_process().device), plan, batches, seed=seed)
        finally:
            base.to("cpu")

    return on_main_process(measure)


def _batch(row: Row) -> dict[str, Tensor]:
    """One row as the model's arguments: nothing is padded, and the loss is the mean over its own labels."""
    found = {key: torch.tensor([row[key]]) for key in ("input_ids", "token_type_ids", "labels") if key in row}
    if "label" in row:  # of a classification
        found["labels"] = torch.tensor([row["label"]])
    return found | {"attention_mask": torch.ones_like(found["input_ids"])}


def with_sites(prepared: RunPlan, model: Any) -> RunPlan:
    """The run with the layers and ranks that its model has, which an init may have moved (EVA)."""
    now = attached(model)
    if now is None or not any(isinstance(site.init, CalibratedInit) for site in prepared.plan.sites):
        return prepared
    return dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, sites=now.sites))
