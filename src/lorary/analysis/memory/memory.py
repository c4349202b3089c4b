"""Memory: what the fullest moment of a training step holds, item by item."""

from __future__ import annotations

from dataclasses import dataclass

from lorary.model.plan import human_bytes

ITEMS = ("weights", "adapters", "gradients", "optimizer", "rules", "activations", "logits", "working")


@dataclass(frozen=True)
class Memory:
    """What the fullest moment of a training step holds, in bytes.

    Args:
        weights: the base model's parameters and buffers.
        adapters: the adapters' tensors, as float32 masters.
        gradients: of everything that trains, in its own dtype.
        optimizer: the optimizer's state.
        rules: what the method's rules keep from step to step.
        activations: kept by the forward pass for the backward pass; None where it could not be found out.
        logits: what LM head and loss hold on top for a moment; None likewise.
        working: what the backward pass holds on top for a moment, one block at a time; None likewise.
        notes: what the figures assume.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int | None
    logits: int | None
    working: int | None
    notes: tuple[str, ...] = ()
    rules: int = 0

    @property
    def fixed(self) -> int:
        """What is there from the second step on, whatever the batch: all but activations, logits and working."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.rules

    @property
    def moving(self) -> int:
        """What comes and goes in every step. Loss and backward pass come one after the other: the larger one counts."""
        return (self.activations or 0) + max(self.logits or 0, self.working or 0)

    @property
    def total(self) -> int:
        """The fullest moment."""
        return self.fixed + self.moving

    def rows(self) -> list[tuple[str, str]]:
        """(item, size) of everything that there is, and the total."""
        found = [(name, getattr(self, name)) for name in ITEMS]
        texts = {name: "unknown" if value is None else human_bytes(value) for name, value in found if value != 0}
        unknown = self.activations is None
        texts["total"] = f"more than {human_bytes(self.total)}" if unknown else human_bytes(self.total)
        if self.logits and self.working:
            smaller = "logits" if self.logits < self.working else "working"
            texts[smaller] += "  (at another moment than the fullest)"
        return list(texts.items())

    def __str__(self) -> str:
        lines = [f"{name:<12}{text}" for name, text in self.rows()]
        return "\n".join(lines + [f"{'note':<12}{note}" for note in self.notes])
