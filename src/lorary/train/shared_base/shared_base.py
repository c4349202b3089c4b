"""SharedBase: several adapters on one frozen base, whose batches go through it in one forward pass.

Every adapter has a model of its own, an ordinary one with the adapter attached, over the weights of one base. So all
that is done to one adapter (optimizer groups, rules, evaluation, saving) is done to such a model. The forward pass for
training is that of one more copy of the base, in which every adapted layer hands the rows of a batch to the layer of
the adapter that they belong to. No row meets another one, so the gradients are those of training apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.errors import Diagnostic, TrainingError, did_you_mean, not_a
from lorary.layers.adapted import adapted_layers
from lorary.layers.wrappers import named_modules, submodule, unwrapped
from lorary.model.ambient import mode_independent
from lorary.model.attach import attach
from lorary.model.buffers import freeze_statistics
from lorary.model.plan import Plan
from lorary.train.shared_base import refusals
from lorary.train.shared_base.batches import Batch, joined
from lorary.train.shared_base.copies import give_own_weights, sharing_copy
from lorary.train.shared_base.losses import Loss, Losses, alone
from lorary.train.shared_base.rows import HEADLINE, Rows, RowsForward, adds_factors


class SharedBase:
    """Several adapters on one base.

    Args:
        model: the base, without adapters; it does not change, and must not while this exists.
        plans: name of an adapter -> its plan, made for this model. Methods, ranks and targets may differ.
        seeds: of the adapters' initialisation: one for all, or name -> seed.
        dtype: of the adapters' tensors.
        loss: (output of the rows of one adapter, its batch) -> a mean over them; by default that of causal language
            models and of sequence classifiers.

    Raises:
        TrainingError: adapters that cannot share a forward pass, or a model that cannot be copied; every reason.
        PlanError: a plan does not fit the model.

    Example:
        >>> plan = lorary.plan(model, lorary.method("lora", r=8))
        >>> shared = SharedBase(model, {"seed 0": plan, "seed 1": plan}, seeds={"seed 0": 0, "seed 1": 1})
        >>> losses = shared.losses({name: batch for name in shared.names})
        >>> sum(losses.values()).backward()  # each adapter has its own gradient
    """

    @mode_independent
    def __init__(
        self,
        model: nn.Module,
        plans: Mapping[str, Plan],
        *,
        seeds: int | Mapping[str, int] = 0,
        dtype: torch.dtype = torch.float32,
        loss: Loss | None = None,
    ) -> None:
        refusals.check(model, plans, seeds)
        self._plans = dict(plans)
        try:
            self._base = sharing_copy(unwrapped(model))
            self._models = {name: sharing_copy(unwrapped(model)) for name in plans}
        except (TypeError, RuntimeError, AttributeError) as error:
            raise TrainingError(HEADLINE, [Diagnostic("model", f"cannot be copied: {error}")]) from error
        for name, plan in plans.items():
            give_own_weights(self._models[name], plan)
            attach(self._models[name], plan, seed=seeds if isinstance(seeds, int) else seeds[name], dtype=dtype)
            self._models[name].train()
        self._rows = Rows({})
        self._forwards = self._install()
        freeze_statistics(self._base, ())
        self._base.train()
        self._losses = Losses(self._base, loss)
        self._order = sorted(plans, key=self._has_own_layers)

    def _install(self) -> list[RowsForward]:
        """Let the layers of the base that adapters change compute the rows of all."""
        own: dict[str, dict[str, nn.Module]] = {}  # path -> adapter -> its layer
        for name, plan in self._plans.items():
            layers = dict(named_modules(self._models[name]))
            paths = {s.site.name for s in plan.sites}
            paths |= {f.name.rpartition(".")[0] for f in plan.full}
            for path in paths:
                own.setdefault(path, {})[name] = layers[path]
        forwards = []
        for path, layers in own.items():
            base = submodule(self._base, path)
            forward = RowsForward(path, base, layers, self._rows)
            base.forward = forward
            forwards.append(forward)
        return forwards

    def _has_own_layers(self, name: str) -> bool:
        """Whether some layers of an adapter compute its rows by themselves: those rows stand behind the others."""
        return not all(adds_factors(layer) for layer in adapted_layers(self._models[name]).values())

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that have not left."""
        return tuple(self._models)

    def model(self, name: str) -> nn.Module:
        """The model of one adapter, for its optimizer, rules and evaluation; it shares the base's weights.

        Raises:
            TrainingError: there is no such adapter, or it has left.
        """
        if name not in self._models:
            fix = did_you_mean(name, self._models) if isinstance(name, str) else ""
            what = "has left" if name in self._plans else "is not the name of an adapter"
            raise TrainingError("no such adapter here:", [Diagnostic(str(name), what, fix)])
        found: nn.Module = self._models[name]
        return found

    def adapter(self, name: str) -> Adapter:
        """A copy of an adapter as a value.

        Raises:
            TrainingError: as `model`.
        """
        return Adapter.of(self.model(name))

    def losses(self, batches: Mapping[str, Batch], some: bool = False) -> dict[str, Tensor]:
        """The loss of every adapter on its own batch, by one forward pass; the sum's gradient is that of each.

        Args:
            batches: adapter -> its batch, as the model's forward takes it, with `labels`.
            some: whether adapters may be left out, which would otherwise be an error.

        Raises:
            DataError: the batches cannot stand below each other; there are no labels.
            TrainingError: other adapters than those that have not left; a layer's input has other rows than the batch.
        """
        if problems := not_a(Mapping, "a mapping from names to batches", batches=batches):
            raise TrainingError("batches of other adapters:", problems)
        problems = [Diagnostic(str(name), "has a batch and is not here") for name in batches if name not in self.names]
        problems += [Diagnostic(name, "has no batch") for name in self.names if name not in batches and not some]
        if problems or not batches:
            raise TrainingError("batches of other adapters:", problems)
        order = [name for name in self._order if name in batches]
        pad = getattr(getattr(self._base, "config", None), "pad_token_id", None)
        batch, counts = joined({name: batches[name] for name in order}, pad or 0)
        self._rows.counts = {}
        self._losses.judge(batch)
        self._rows.counts = counts  # until the next forward pass: checkpointing computes layers again in backward
        found = self._losses(batch, counts)
        return {name: found[name] for name in batches}

    def loss_alone(self, name: str, batch: Batch) -> Tensor:
        """The loss of one adapter on a batch, by a forward pass of its own model.

        Raises:
            TrainingError: as `model`.
        """
        return alone(self.model(name), batch, self._losses)

    def weights(self, micro_batches: Sequence[Batch]) -> list[float]:
        """The share of each micro-batch in the loss of a step: of the labels, or equal where the loss has no tokens."""
        return self._losses.weights(micro_batches)

    def leave(self, name: str) -> Adapter:
        """Take an adapter out: the next forward pass is without its rows.

        Returns:
            The adapter.

        Raises:
            TrainingError: as `model`.
        """
        adapter = self.adapter(name)
        del self._models[name]
        for forward in self._forwards:
            forward.leave(name)
        return adapter

    def __repr__(self) -> str:
        return f"SharedBase({', '.join(self.names)})"
